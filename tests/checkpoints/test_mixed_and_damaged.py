"""Weights of several formats in one folder go through every layout bit for bit; damaged parts of safetensors give one sentence."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import tiny_hf
from safetensors.numpy import load_file, save_file
from test_hf_import import rewrite, saved  # noqa: F401 (a fixture)
from test_layouts import same_numbers

from proglora_jax import tools
from proglora_jax.checkpoints.hf_convert import convert_from_hf
from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.checkpoints.sources import find_source
from proglora_jax.data.errors import UserError

FORMATS = (np.float32, np.float16, ml_dtypes.bfloat16)
STYLES = ("hub", "transformers5", "memory")


def mixed(tensors: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Each tensor in the next format."""
    return {name: array.astype(FORMATS[number % 3]) for number, (name, array) in enumerate(sorted(tensors.items()))}


def split(folder: Path, parts: int) -> Path:
    """The folder's weights in parts with an index, as large models are published."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, places = sorted(tensors), {}
    for part in range(parts):
        file = f"model-{part + 1:05d}-of-{parts:05d}.safetensors"
        own = names[part::parts]
        save_file({name: tensors[name] for name in own}, folder / file)
        places |= dict.fromkeys(own, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


@pytest.mark.parametrize("parts", [1, 3])
def test_formats_survive_every_style(saved, tmp_path, parts):  # noqa: F811
    first = rewrite(saved, tmp_path / "first", change=mixed)
    if parts > 1:
        split(first, parts)
    assert "BF16+F16+F32" in find_source(first).describe()
    before = first
    for style in (*STYLES, "hub"):  # each from the one before
        convert_from_hf(before, tmp_path / f"{style}_of_{before.name}", style=style, log=lambda line: None)
        before = tmp_path / f"{style}_of_{before.name}"
        same_numbers((first,), (before,))


def test_a_tied_head_survives_every_style(tmp_path):
    tiny_hf.make("tied_full").save_pretrained(tmp_path / "first")
    for style in STYLES:
        convert_from_hf(tmp_path / "first", tmp_path / style, style=style, log=lambda line: None)
        same_numbers((tmp_path / "first",), (tmp_path / style,))
        assert find_source(tmp_path / style).config.tie_word_embeddings


def test_damaged_parts_of_safetensors_give_one_sentence(saved, tmp_path, capsys):  # noqa: F811
    folder = split(rewrite(saved, tmp_path / "llava"), 3)
    part, index = folder / "model-00002-of-00003.safetensors", folder / "model.safetensors.index.json"
    content, places = part.read_bytes(), index.read_text()
    for damage, sentence in (
        (content[:-100], "00002-of-00003.safetensors: cannot be read as safetensors .*truncated"),
        (content[:5], "00002-of-00003.safetensors: cannot be read as safetensors"),
        (b"", "00002-of-00003.safetensors: cannot be read as safetensors"),
        (b"\xff" * 8 + content[8:], "00002-of-00003.safetensors: cannot be read as safetensors"),
    ):
        part.write_bytes(damage)
        with pytest.raises(UserError, match=sentence):
            load_llava(folder)
    part.unlink()
    with pytest.raises(UserError, match="1 problem.*model-00002-of-00003.safetensors is missing.*Download these files again"):
        load_llava(folder)
    part.write_bytes(content)
    for table, sentence in (("{", "index.json: cannot be read as JSON"), ("{}", "index.json: has no weight_map"),
                            ('{"weight_map": {}}', "index.json: has no weight_map"),
                            ('{"weight_map": {"a": 3}}', "index.json: has no weight_map")):
        index.write_text(table)
        with pytest.raises(UserError, match=sentence):
            load_llava(folder)
    index.unlink()
    with pytest.raises(UserError, match="no index of parts .found model-00001-of-00003.safetensors: the index .* is missing"):
        load_llava(folder)
    index.write_text(places)
    other, words = folder / "model-00003-of-00003.safetensors", load_file(part)
    name = next(iter(words))
    for change, sentence in (
        ({name: words[name]}, f"{name} of model-00002-of-00003.safetensors and {name} of model-00003-of-00003.safetensors are one tensor"),
        ({f"base_model.model.{name}": words[name]}, f"and base_model.model.{name} of model-00003-of-00003.safetensors are one tensor"),
    ):
        whole = other.read_bytes()
        save_file(load_file(other) | change, other)
        with pytest.raises(UserError, match=f"1 problem.*{sentence}"):
            load_llava(folder)
        other.write_bytes(whole)
    table = json.loads(places)
    table["weight_map"][name] = other.name
    index.write_text(json.dumps(table))
    with pytest.raises(UserError, match=f"1 problem.*no tensor {name} in {other.name}, where {index.name} has it"):
        load_llava(folder)
    index.write_text(places)
    strange = {f"decoder.{name}": array for name, array in load_file(part).items()}
    save_file(strange, part)
    assert tools.main(["convert", "from-hf", str(folder), "--out", str(tmp_path / "out")]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"{folder}: " in said and "no tensor" in said and not (tmp_path / "out").exists()
