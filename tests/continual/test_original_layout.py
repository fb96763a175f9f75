"""A run straight from the layout of original LLaVA: language folder, projector file and CLIP folder, as the papers start."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tiny_run
import torch
from safetensors.torch import load_file
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax import main, tools
from proglora_jax.checkpoints.sources import find_source
from proglora_jax.checkpoints.stage import load_records
from proglora_jax.continual.trained import open_trained
from proglora_jax.data.errors import UserError
from proglora_jax.data.synthetic import tokenizer as pieces
from proglora_jax.data.synthetic.benchmark import write_benchmark

DROPPED = (pieces.PAD, pieces.IMAGE)


def take_apart(model: Path, out: Path) -> dict[str, str]:
    """The tiny run's model in three places, its vocabulary without <pad> and <image>; the config's fields that name them."""
    for name in ("vicuna", "clip"):
        (out / name).mkdir(parents=True)
    tensors = load_file(model / "model.safetensors")
    rows = [i for i in range(tensors["language_model.lm_head.weight"].shape[0]) if i not in DROPPED]
    language, tower, projector = {}, {}, {}
    for name, tensor in tensors.items():
        if name.startswith("multi_modal_projector"):
            projector[name.replace("multi_modal_projector.linear_1", "mm_projector.0").replace(
                "multi_modal_projector.linear_2", "mm_projector.2")] = tensor
        elif name.startswith("vision_tower."):
            tower[name.removeprefix("vision_tower.")] = tensor
        else:
            own = name.removeprefix("language_model.")
            language[own] = tensor[rows].clone() if own in ("model.embed_tokens.weight", "lm_head.weight") else tensor
    torch.save(language, out / "vicuna" / "pytorch_model.bin")
    torch.save(tower, out / "clip" / "pytorch_model.bin")
    torch.save(projector, out / "mm_projector.bin")
    fields = json.loads((model / "config.json").read_text())
    (out / "vicuna" / "config.json").write_text(json.dumps({**fields["text_config"], "vocab_size": len(rows)}))
    (out / "clip" / "config.json").write_text(json.dumps(fields["vision_config"]))
    (out / "clip" / "preprocessor_config.json").write_text((model / "preprocessor_config.json").read_text())
    content = json.loads((model / "tokenizer.json").read_text())
    table = {old: new for new, old in enumerate(rows)}
    content["model"]["vocab"] = [content["model"]["vocab"][index] for index in rows]
    content["added_tokens"] = [{**token, "id": table[token["id"]]} for token in content["added_tokens"] if token["id"] in table]
    (out / "vicuna" / "tokenizer.json").write_text(json.dumps(content))
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "vicuna" / "tokenizer_config.json").write_text(json.dumps(special))
    names = {"path": "vicuna", "vision_path": "clip", "projector_path": "mm_projector.bin"}
    return {f"model__{field}": str(out / name) for field, name in names.items()}


@pytest.fixture(scope="module")
def parts(tmp_path_factory):
    """The fields that name Vicuna, CLIP and projector of the tiny model."""
    folder = tmp_path_factory.mktemp("original")
    return take_apart(tiny_run.save_model(folder / "model"), folder / "parts")


def doctor(capsys, places: dict[str, str]) -> str:
    """What tools doctor prints of the tiny benchmark with a backbone in these places."""
    flags = [f"--config.{name.replace('__', '.')}={place}" for name, place in places.items()]
    assert tools.main(["doctor", f"--config={tiny_run.CONFIGS / 'coin_mini.py'}:method=lora", "--memory-gb=80", *flags]) == 0
    return capsys.readouterr().out


def test_doctor_finds_the_three_places_and_says_what_is_missing(parts, capsys):
    text = doctor(capsys, parts)
    rows = json.loads(Path(parts["model__path"], "config.json").read_text())["vocab_size"]
    assert f"backbone vicuna_projector_custom: original LLaVA layout, 3 weight file(s), F32, vocabulary {rows} -> " in text
    assert "tensor" not in text.split("Before you run it:")[-1]
    without = {name: place for name, place in parts.items() if name != "model__projector_path"}
    said = doctor(capsys, without)
    assert "holds no projector; give the one of LLaVA's first stage (mm_projector.bin): config.model.projector_path in a run" in said
    assert "backbone vicuna" not in said
    alone = f"--config.model.path={parts['model__path']}"
    assert tools.main(["doctor", f"--config={tiny_run.CONFIGS / 'coin_mini.py'}:method=lora", alone]) == 1
    assert "without a vision tower; give the folder of a CLIP: config.model.vision_path" in capsys.readouterr().err


def test_check_data_measures_with_the_tokenizer_that_a_run_would_use(parts, tmp_path, capsys):
    """Vicuna's tokenizer has no <image>; a run adds it, and so the lengths are those of the joined model."""
    root, model = tmp_path / "data", Path(parts["model__path"]).parents[1] / "model"
    write_benchmark(str(root), 0, 8, 4)
    reports = []
    for name, arguments in {"apart": [parts["model__path"], "--vision", parts["model__vision_path"]], "joined": [str(model)]}.items():
        report = tmp_path / f"{name}.json"
        common = ["--template", "vicuna_v1_bare", "--max-length", "92", "--json", str(report)]
        assert tools.main(["check-data", str(root), "--model", *arguments, *common]) == 0, capsys.readouterr()
        reports.append(json.loads(report.read_text()))
    assert reports[0]["tasks"] == reports[1]["tasks"] and reports[0]["tasks"][0]["train"]["longest"] > 20
    capsys.readouterr()
    for arguments, sentence in (
        (["--model", parts["model__path"]], "without a vision tower; give the folder of a CLIP"),
        (["--vision", parts["model__vision_path"]], "--vision: goes with --model; with --tokenizer, give --image-tokens"),
    ):
        assert tools.main(["check-data", str(root), *arguments]) == 1
        assert sentence in capsys.readouterr().err


def test_a_run_from_three_places_equals_one_from_the_converted_folder(here, tmp_path, capsys):
    places = take_apart(here.model, tmp_path / "parts")
    fields = {"data__tasks": "TextVQA", "train__max_steps": 3}
    apart = here.run("apart", "lora", **places, **fields)
    arguments = ["--vision", places["model__vision_path"], "--projector", places["model__projector_path"]]
    assert tools.main(["convert", "from-hf", places["model__path"], *arguments, "--out", str(tmp_path / "clean")]) == 0
    assert "vicuna_projector_custom" in capsys.readouterr().out
    joined = here.run("joined", "lora", model__path=str(tmp_path / "clean"), **fields)
    assert tiny_run.differences(tiny_run.outcome(apart), tiny_run.outcome(joined)) == []
    metas = [load_records(tiny_run.stage_folders(workdir)[0] / "adapter")["meta"] for workdir in (apart, joined)]
    assert [meta["protocol"] for meta in metas] == ["vicuna_projector_custom"] * 2
    assert metas[0]["backbone"] != metas[1]["backbone"]

    # what a real run leaves is exported: the merged model is the run's, and a run takes it
    assert tools.main(["convert", "to-hf", str(apart), "--kind", "merged", "--out", str(tmp_path / "merged")]) == 0
    said = capsys.readouterr().out
    assert "lora, stage 00_textvqa: its adapter merged into" in said and "signal lost" in said
    assert find_source(tmp_path / "merged").protocol == "vicuna_projector_custom+lora"
    trained = open_trained(apart)
    assert trained.tasks() == ("TextVQA",) and trained.backbone()[1] == ""
    merged = load_file(tmp_path / "merged" / "model.safetensors")["multi_modal_projector.linear_1.bias"]
    np.testing.assert_array_equal(merged.numpy(), np.asarray(trained.state.params["mm_projector"]["linear_1"]["bias"]))

    # other weights in the same places are noticed, whatever their paths
    other = torch.load(tmp_path / "parts" / "mm_projector.bin")
    torch.save({name: tensor * 2 for name, tensor in other.items()}, tmp_path / "other.bin")
    with pytest.raises(UserError, match="was trained on another backbone"):
        main.run(here.config("lora", **{**places, "model__projector_path": str(tmp_path / "other.bin")}, **fields), apart)
