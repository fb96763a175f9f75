"""Every published layout of a LLaVA reads as the same model, says which protocol it is, and comes back exactly from a conversion."""

from __future__ import annotations

import json
import shutil
import tracemalloc

import chex
import jax.numpy as jnp
import llama_pieces
import numpy as np
import pytest
import tiny_hf
import tokenizers
import torch
import transformers
from safetensors.numpy import load_file
from test_hf_import import in_memory_4x, in_memory_5x, original, style_4x

from proglora_jax import tools
from proglora_jax.checkpoints import hf_import
from proglora_jax.checkpoints.hf_convert import convert_from_hf, whole_folder
from proglora_jax.checkpoints.hf_import import load_llava, load_source
from proglora_jax.checkpoints.shards import Entry, write_file
from proglora_jax.checkpoints.sources import _protocol, disk_names, find_source, image_folder, read_config
from proglora_jax.checkpoints.weight_files import read_fields
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.data.images import ImageSpec
from proglora_jax.data.synthetic import tokenizer as pieces
from proglora_jax.data.tokens import load_tokenizer
from proglora_jax.models.presets import llava15_7b, llava15_13b

VOCABULARY = 62  # of the language model alone; <image> becomes row 62, <pad> row 63


def llava_state(model) -> dict[str, torch.Tensor]:
    """A model's tensors under the names of transformers 4.x on disk."""
    names = {}
    for name, tensor in model.state_dict().items():
        name = name.replace("model.language_model.", "language_model.model.").replace("model.vision_tower.", "vision_tower.vision_model.")
        name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
        names["language_model.lm_head.weight" if name == "lm_head.weight" else name] = tensor.clone()
    return names


def save_bin(folder, tensors: dict[str, torch.Tensor], shards: int = 1) -> None:
    """Weights as torch.save writes them, in parts with an index where there are several."""
    if shards == 1:
        torch.save(tensors, folder / "pytorch_model.bin")
        return
    names, weight_map = sorted(tensors), {}
    for shard in range(shards):
        file = f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin"
        torch.save({name: tensors[name] for name in names[shard::shards]}, folder / file)
        weight_map |= dict.fromkeys(names[shard::shards], file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """One model in the layout of original LLaVA: vicuna/ (two .bin parts), stage1/mm_projector.bin, clip/; and its tensors."""
    root = tmp_path_factory.mktemp("world")
    model = tiny_hf.make("grouped")
    state = {name: tensor for name, tensor in llava_state(model).items()}
    for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
        state[name] = state[name][:VOCABULARY].clone()
    for folder in ("vicuna", "stage1", "clip"):
        (root / folder).mkdir()
    text = {name: value for name, value in model.config.text_config.to_dict().items() if name not in ("rope_parameters", "pad_token_id")}
    text |= {"architectures": ["LlamaForCausalLM"], "vocab_size": VOCABULARY, "max_position_embeddings": 4096, "torch_dtype": "float16"}
    (root / "vicuna" / "config.json").write_text(json.dumps(text))
    language = {original(name): tensor.half() for name, tensor in state.items() if name.startswith("language_model")}
    language["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(3)
    save_bin(root / "vicuna", language, 2)
    projector = {original(name): tensor.bfloat16() for name, tensor in state.items() if name.startswith("multi_modal")}
    torch.save(projector, root / "stage1" / "mm_projector.bin")
    (root / "stage1" / "config.json").write_text(json.dumps({**text, "tune_mm_mlp_adapter": True, "mm_projector_type": "mlp2x_gelu"}))
    vision = model.config.vision_config.to_dict()
    (root / "clip" / "config.json").write_text(json.dumps({"model_type": "clip", "vision_config": vision, "text_config": {}}))
    tower = {name.removeprefix("vision_tower."): tensor for name, tensor in state.items() if name.startswith("vision_tower")}
    tower |= {"text_model.final_layer_norm.weight": torch.zeros(3), "visual_projection.weight": torch.zeros(3)}
    tower["logit_scale"] = torch.zeros(())
    tower["vision_model.embeddings.position_ids"] = torch.arange(5)
    save_bin(root / "clip", tower)
    image = {"image_mean": [0.5] * 3, "image_std": [0.3] * 3, "size": {"shortest_edge": 8}, "crop_size": {"height": 8, "width": 8}}
    (root / "clip" / "preprocessor_config.json").write_text(json.dumps(image))
    return root, state


def apart(root) -> dict:
    return {"vision_folder": root / "clip", "projector_file": root / "stage1" / "mm_projector.bin"}


def expected(state, dtype=np.float32) -> dict[str, np.ndarray]:
    """The tensors as the layout's files hold them: language f16, projector bf16, vision f32."""
    kinds = {"language_model": torch.float16, "multi_modal_projector": torch.bfloat16, "vision_tower": torch.float32}
    return {name: tensor.to(kinds[name.split(".")[0]]).float().numpy() for name, tensor in state.items()}


def test_original_llava_in_three_places(world):
    root, state = world
    source = find_source(root / "vicuna", **apart(root))
    assert source.protocol == "vicuna_projector_custom" and source.original and source.rows == VOCABULARY
    assert source.config.image_token_id == 62 and source.config.pad_token_id == 63 and source.config.text_config.vocab_size == 64
    assert len(source.files) == 4 and {tensor.format for tensor in source.tensors.values()} == {"F16", "BF16", "F32"}
    assert "vicuna_projector_custom: original LLaVA layout, 4 weight file(s), BF16+F16+F32, vocabulary 62 -> 64 rows" == source.describe()
    llava = load_source(source, jnp.float32)
    values = expected(state)
    np.testing.assert_array_equal(llava.language.embed_tokens[...][:62], values["language_model.model.embed_tokens.weight"])
    np.testing.assert_array_equal(llava.mm_projector.linear_2.kernel[...], values["multi_modal_projector.linear_2.weight"].T)
    k_proj = llava.language.layers.k_proj.kernel[...]
    np.testing.assert_array_equal(k_proj[2], values["language_model.model.layers.2.self_attn.k_proj.weight"].T)


def test_the_projector_is_found_by_folder_by_name_and_beside_the_weights(world, tmp_path):
    root, _ = world
    whole = load_llava(root / "vicuna", jnp.float32, **apart(root))
    by_folder = load_llava(root / "vicuna", jnp.float32, vision_folder=root / "clip", projector_file=root / "stage1")
    fields = json.loads((root / "vicuna" / "config.json").read_text())
    fields |= {"mm_vision_tower": str(root / "clip"), "pretrain_mm_mlp_adapter": str(root / "stage1" / "mm_projector.bin")}
    named = tmp_path / "named"
    named.mkdir()
    for file in (root / "vicuna").iterdir():
        (named / file.name).write_bytes(file.read_bytes())
    (named / "config.json").write_text(json.dumps(fields))
    by_name = load_llava(named, jnp.float32)
    (named / "config.json").write_text(json.dumps({**fields, "pretrain_mm_mlp_adapter": None}))
    (named / "mm_projector.bin").write_bytes((root / "stage1" / "mm_projector.bin").read_bytes())
    beside = load_llava(named, jnp.float32)
    for other in (by_folder, by_name, beside):
        chex.assert_trees_all_equal(other.to_tree(), whole.to_tree())
    assert find_source(named).fingerprint() != find_source(root / "vicuna", **apart(root)).fingerprint()
    assert find_source(named).protocol == "vicuna_projector_custom"
    torch.save({f"base_model.model.{name}": tensor for name, tensor in torch.load(named / "mm_projector.bin").items()}, tmp_path / "x.bin")
    trained = load_llava(root / "vicuna", jnp.float32, vision_folder=root / "clip", projector_file=tmp_path / "x.bin")
    chex.assert_trees_all_equal(trained.to_tree(), whole.to_tree())


def test_original_llava_in_one_folder(world, tmp_path):
    """llava-v1.5-7b: the projector is among the weights; the tower may be too, but only CLIP's folder has its sizes."""
    root, state = world
    fields = json.loads((root / "vicuna" / "config.json").read_text())
    fields |= {"model_type": "llava", "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2, "mm_vision_tower": "openai/clip"}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    save_bin(tmp_path, {original(name): tensor for name, tensor in state.items()}, 3)
    source = find_source(tmp_path, root / "clip")
    assert source.protocol == "llava_custom" and {tensor.format for tensor in source.tensors.values()} == {"F32"}
    chex.assert_trees_all_equal(
        load_source(source, jnp.float32).mm_projector.linear_1.kernel[...], state["multi_modal_projector.linear_1.weight"].T.numpy()
    )
    with pytest.raises(UserError, match=r"without a vision tower; give the folder of a CLIP \(openai/clip\): config.model.vision_path"):
        find_source(tmp_path)
    for change, sentence in {
        "mm_projector_type": ("linear", "mm_projector_type='linear' is not supported .'mlp2x_gelu' is."),
        "mm_use_im_start_end": (True, "mm_use_im_start_end=True is not supported"),
        "mm_vision_select_feature": ("slices", "mm_vision_select_feature='slices' is not supported .patch, cls_patch are."),
        "mm_vision_select_layer": (-9, "vision_feature_layer=-9 must be one integer"),
    }.items():
        (tmp_path / "config.json").write_text(json.dumps({**fields, change: sentence[0]}))
        with pytest.raises(UserError, match=sentence[1]):
            find_source(tmp_path, root / "clip")
    (tmp_path / "config.json").write_text(json.dumps({**fields, "tune_mm_mlp_adapter": True, "mm_vision_select_feature": "cls_patch"}))
    source = find_source(tmp_path, root / "clip")
    assert source.protocol == "vicuna_projector_custom" and source.config.vision_feature_select_strategy == "full"


def test_a_vision_tower_among_the_weights_wins_over_the_folder_of_a_clip(world, tmp_path):
    """Trained on with its tower, or of transformers: the CLIP's folder says how large it is, and may say how images are prepared."""
    root, state = world
    clip = tmp_path / "clip"
    shutil.copytree(root / "clip", clip)
    save_bin(clip, {name: tensor * 3 for name, tensor in torch.load(root / "clip" / "pytorch_model.bin").items()})
    fields = json.loads((root / "vicuna" / "config.json").read_text()) | {"model_type": "llava", "mm_vision_tower": "openai/clip"}
    (tmp_path / "llava").mkdir()
    (tmp_path / "llava" / "config.json").write_text(json.dumps(fields))
    save_bin(tmp_path / "llava", {original(name): tensor for name, tensor in state.items()})
    tiny_hf.make("grouped").save_pretrained(tmp_path / "hf")
    own = state["vision_tower.vision_model.encoder.layers.0.mlp.fc1.weight"].T.numpy()
    for folder, said in (("llava", f"the weights hold the vision tower; of {clip} only sizes and image settings are read"),
                         ("hf", f"{clip} is not read, the weights hold the vision tower")):
        source = find_source(tmp_path / folder, clip)
        assert source.protocol == "llava_custom" and source.describe().endswith(f"; {said}") and len(source.files) == 1
        np.testing.assert_array_equal(load_source(source, jnp.float32).vision.layers.fc1.kernel[...][0], own)
        # images are prepared ahead as a run prepares them
        assert image_folder(tmp_path / folder, clip) == source.image_folder == (clip if folder == "llava" else tmp_path / folder)
    # what is not read is not part of the model's name; a run of before, which read it, does not go on with another tower
    before = find_source(tmp_path / "llava", clip).fingerprint()
    assert before == find_source(tmp_path / "llava", root / "clip").fingerprint()
    assert find_source(tmp_path / "hf", clip).fingerprint() == find_source(tmp_path / "hf").fingerprint()


def test_a_projector_among_the_weights_wins_over_a_file_beside_them(world, tmp_path):
    """The folder of llava-v1.5-7b has mm_projector.bin, too, and its config.json may name the file of the first stage."""
    root, state = world
    fields = json.loads((root / "vicuna" / "config.json").read_text())
    stage_1 = str(root / "stage1" / "mm_projector.bin")
    (tmp_path / "config.json").write_text(json.dumps(fields | {"model_type": "llava", "pretrain_mm_mlp_adapter": stage_1}))
    save_bin(tmp_path, {original(name): tensor for name, tensor in state.items() if not name.startswith("vision_tower")}, 3)
    torch.save({name: tensor * 3 for name, tensor in torch.load(stage_1).items()}, tmp_path / "mm_projector.bin")
    own = state["multi_modal_projector.linear_1.weight"].T.numpy()
    source = find_source(tmp_path, root / "clip")
    assert source.protocol == "llava_custom"
    assert source.describe().endswith("; mm_projector.bin is not read, the weights hold the projector")
    np.testing.assert_array_equal(load_source(source, jnp.float32).mm_projector.linear_1.kernel[...], own)
    (tmp_path / "mm_projector.bin").unlink()
    assert find_source(tmp_path, root / "clip").describe().endswith(f"; {stage_1} is not read, the weights hold the projector")

    given = find_source(tmp_path, root / "clip", stage_1)
    assert given.protocol == "llava_custom+projector"
    assert given.describe().endswith(f"; the projector of {stage_1} takes the place of the one in the weights, as asked")
    theirs = torch.load(stage_1)["model.mm_projector.0.weight"].float().numpy().T
    np.testing.assert_array_equal(load_source(given, jnp.float32).mm_projector.linear_1.kernel[...], theirs)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("style", [style_4x, in_memory_4x, in_memory_5x, original])
def test_files_of_torch_in_every_style(tmp_path, style, shards):
    model = tiny_hf.make("grouped")
    model.save_pretrained(tmp_path / "safe")
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "config.json").write_text((tmp_path / "safe" / "config.json").read_text())
    save_bin(tmp_path / "bin", {style(name): tensor for name, tensor in llava_state(model).items()}, shards)
    chex.assert_trees_all_equal(load_llava(tmp_path / "bin", jnp.float32), load_llava(tmp_path / "safe", jnp.float32))
    assert find_source(tmp_path / "bin").protocol == "llava_custom"


def test_published_sizes_have_protocols_of_their_own():
    """By the config alone: no weights of that size are here."""
    assert [_protocol(make(), stage_1=stage) for make in (llava15_7b, llava15_13b) for stage in (True, False)] == [
        "vicuna7b_projector", "llava15_7b", "vicuna13b_projector", "llava15_13b"]


# ---------------------------------------------------------------------------------------------------------- conversion


def same_numbers(first, second) -> None:
    """Two folders hold the same tensors, in the same formats."""
    a, b = find_source(*first), find_source(*second)
    assert a.protocol == b.protocol and a.config == b.config
    for name, tensor in a.tensors.items():
        other = b.tensors[name]
        if tensor.shape == other.shape:
            assert tensor.format == other.format, name
            np.testing.assert_array_equal(tensor.read(), other.read(), err_msg=name)
        else:
            rows = min(tensor.shape[0], other.shape[0])
            np.testing.assert_array_equal(tensor.read()[:rows], other.read()[:rows], err_msg=name)


@pytest.mark.parametrize("style", ["hub", "transformers5", "memory", "original"])
def test_conversion_to_every_style_and_back_is_exact(world, tmp_path, style):
    root, _ = world
    places = (root / "vicuna", root / "clip", root / "stage1")
    convert_from_hf(places[0], tmp_path / "out", vision_folder=places[1], projector_file=places[2], style=style, log=lambda line: None)
    same_numbers((tmp_path / "out",), places)
    convert_from_hf(tmp_path / "out", tmp_path / "back", log=lambda line: None)
    same_numbers((tmp_path / "back",), places)
    chex.assert_trees_all_equal(
        load_llava(tmp_path / "back", jnp.float32).to_tree(), load_llava(places[0], jnp.float32, **apart(root)).to_tree()
    )
    # original LLaVA has no row for <image>; its tower lies in a folder of its own
    rows = find_source(tmp_path / "out").rows
    assert rows == (62 if style == "original" else 64) and (tmp_path / "out" / "vision_tower").exists() == (style == "original")
    assert not list(tmp_path.glob(".*"))


def test_the_clean_folder_is_loaded_by_transformers(world, tmp_path, rng, capsys):
    root, state = world
    arguments = ["convert", "from-hf", str(root / "vicuna"), "--vision", str(root / "clip"), "--projector", str(root / "stage1")]
    assert tools.main([*arguments, "--out", str(tmp_path / "out"), "--dtype", "float32"]) == 0
    said = capsys.readouterr().out
    assert "found vicuna_projector_custom: original LLaVA layout" in said and "holds no tokenizer" in said and "wrote" in said
    back, info = transformers.LlavaForConditionalGeneration.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"] and back.dtype == torch.float32
    back = back.eval()
    ours = load_llava(tmp_path / "out", jnp.float32)
    tokens = rng.integers(3, 60, (2, 12)).astype(np.int32)
    tokens[:, 2:6] = back.config.image_token_id
    image = rng.standard_normal((2, 8, 8, 3)).astype(np.float32)
    with torch.no_grad():
        theirs = back(input_ids=torch.tensor(tokens).long(), pixel_values=torch.tensor(image.transpose(0, 3, 1, 2))).logits.numpy()
    hidden = ours.decode(ours.embed(jnp.asarray(tokens), ours.project(ours.encode_image(jnp.asarray(image))))).hidden
    np.testing.assert_allclose(ours.logits(hidden), theirs, atol=1e-4, rtol=0)
    assert ImageSpec.from_folder(str(tmp_path / "out")).size == 8
    assert tools.main([*arguments, "--out", str(tmp_path / "out")]) == 1
    assert "out: is not empty; choose another folder or remove it" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["tokenizer.json", "tokenizer.model"])
def test_a_language_models_tokenizer_gets_image_and_pad(world, tmp_path, kind):
    root, _ = world
    folder = tmp_path / "vicuna"
    folder.mkdir()
    backend = pieces.build_tokenizer()
    words = [word for word, index in sorted(backend.get_vocab().items(), key=lambda item: item[1]) if word not in ("<image>", "<pad>")]
    plain = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    plain.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.save_pretrained(folder)
    if kind == "tokenizer.model":  # as Vicuna v1.5 is published
        shutil.rmtree(folder)
        plain = llama_pieces.save_model(folder)
        words = [plain.id_to_piece(index) for index in range(plain.vocab_size())]
    rows = len(words)
    fields = json.loads((root / "vicuna" / "config.json").read_text()) | {"vocab_size": rows}
    (folder / "config.json").write_text(json.dumps(fields))
    tensors = {}
    for part in (root / "vicuna").glob("*.bin"):
        tensors |= torch.load(part)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.randn(rows, 36).half()
    save_bin(folder, tensors)
    convert_from_hf(folder, tmp_path / "out", **apart(root), log=lambda line: None)
    config = read_config(tmp_path / "out")
    tokenizer = load_tokenizer(str(tmp_path / "out"), config.text_config.vocab_size)
    assert (tokenizer.image_token_id, tokenizer.pad_id, config.image_token_id, config.pad_token_id) == (rows, rows + 1, rows, rows + 1)
    assert config.text_config.vocab_size % 64 == 0 and tokenizer.size == rows + 2
    convert_from_hf(folder, tmp_path / "theirs", **apart(root), style="original", log=lambda line: None)
    assert read_fields(tmp_path / "theirs")["model_type"] == "llava_llama" and find_source(tmp_path / "theirs").config == config
    beside = load_tokenizer(str(tmp_path / "theirs"), config.text_config.vocab_size, add_image_token=True)
    assert beside.fingerprint == tokenizer.fingerprint
    on_the_fly = load_tokenizer(str(folder), add_image_token=True)
    assert on_the_fly.encode(words[-1]) == tokenizer.encode(words[-1]) and on_the_fly.image_token_id == rows
    (folder / "config.json").write_text(json.dumps(fields | {"vocab_size": rows + 1}))
    save_bin(folder, {name: torch.randn(rows + 1, 36) if tensor.shape[0] == rows else tensor for name, tensor in tensors.items()})
    with pytest.raises(UserError, match=f"the tokenizer's <image> gets the id {rows}, but the vocabulary has {rows + 1} rows"):
        convert_from_hf(folder, tmp_path / "other", **apart(root), log=lambda line: None)
    assert not (tmp_path / "other").exists() and not list(tmp_path.glob(".*"))


def test_a_model_with_image_amid_its_words_has_no_original_layout(tmp_path):
    tiny_hf.make("plain").save_pretrained(tmp_path / "theirs")
    reason = "theirs: the layout of original LLaVA has no row for <image>, but this model has it at 61 amid 64 rows"
    with pytest.raises(UserError, match=reason) as refused:
        convert_from_hf(tmp_path / "theirs", tmp_path / "out", style="original", log=lambda line: None)
    assert str(refused.value).startswith(str(tmp_path / "theirs")) and "partial" not in str(refused.value)


def test_what_is_wrong_with_a_folder_is_said_of_the_place_that_was_named(tmp_path):
    with pytest.raises(UserError) as refused, whole_folder(tmp_path / "out") as partial:
        raise UserError(f"{partial}: differs from our model")
    assert str(refused.value) == f"{tmp_path / 'out'}: differs from our model" and not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------------------- damage


def test_damaged_parts_give_one_sentence(world, tmp_path):
    root, _ = world
    folder = tmp_path / "vicuna"
    folder.mkdir()
    for file in (root / "vicuna").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    part = folder / "pytorch_model-00002-of-00002.bin"
    whole = part.read_bytes()
    part.write_bytes(whole[:-100])
    with pytest.raises(UserError, match="00002-of-00002.bin: cannot be read as a file of torch.save"):
        find_source(folder, **apart(root))
    part.unlink()
    with pytest.raises(UserError, match="1 problem.*pytorch_model-00002-of-00002.bin is missing"):
        find_source(folder, **apart(root))
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.bin"}}))
    with pytest.raises(UserError, match="../../secret.bin lies outside of the folder"):
        find_source(folder, **apart(root))
    index.unlink()
    with pytest.raises(UserError, match="no index of parts .found pytorch_model-00001-of-00002.bin: the index .* is missing"):
        find_source(folder, **apart(root))
    (folder / "pytorch_model.bin").write_bytes((root / "vicuna" / "pytorch_model-00001-of-00002.bin").read_bytes())
    with pytest.raises(UserError, match="vicuna: [0-9]+ problem.*no tensor language_model"):
        find_source(folder, **apart(root))
    with pytest.raises(UserError, match="clip: holds none of mm_projector.bin"):
        find_source(root / "vicuna", root / "clip", root / "clip")
    with pytest.raises(UserError, match="none.bin: no such file; give the projector's file"):
        find_source(root / "vicuna", root / "clip", root / "none.bin")
    wrong = {name: torch.zeros(3, 3) for name in torch.load(root / "stage1" / "mm_projector.bin")}
    torch.save(wrong, tmp_path / "wrong.bin")
    with pytest.raises(UserError, match=r"4 problem.*mm_projector.0.weight has shape \[3, 3\], but config.json asks for \[36, 16\]"):
        find_source(root / "vicuna", root / "clip", tmp_path / "wrong.bin")


# ------------------------------------------------------------------------------------------------------------- memory


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_the_host_holds_no_more_than_two_tensors(tmp_path, monkeypatch, kind):
    """Ten layers of 4 MiB linears: what numpy holds at its peak is counted, what lies on the devices is not."""
    text = dict(hidden_size=1024, intermediate_size=1024, num_hidden_layers=10, num_attention_heads=8, vocab_size=1024)
    text |= dict(num_key_value_heads=8, model_type="llama")
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, projection_dim=8)
    vision |= dict(image_size=8, patch_size=4)
    fields = {"model_type": "llava", "text_config": text, "vision_config": vision, "image_token_index": 1000}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    names = list(disk_names(read_config(tmp_path)))
    if kind == "bin":
        save_bin(tmp_path, {name: torch.full(shape, 0.5, dtype=torch.float32) for name, shape in names}, 2)
    else:
        entries = [Entry(name, np.dtype("f4"), shape, lambda shape=shape: np.full(shape, 0.5, np.float32)) for name, shape in names]
        write_file(tmp_path / "model.safetensors", entries)
    monkeypatch.setattr(hf_import, "STACK_ON_HOST", 0)
    largest = 4 * 1024 * 1024
    mesh = meshes.make_mesh({"data": 2, "fsdp": 2, "model": 2})
    source = find_source(tmp_path)
    tracemalloc.start()
    try:
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        llava = load_source(source, jnp.float32, mesh=mesh)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    assert largest <= peak < 2 * largest + (1 << 20), peak / largest
    assert llava.language.layers.up_proj.kernel[...].shape == (10, 1024, 1024)
    np.testing.assert_array_equal(llava.language.layers.up_proj.kernel[...][9, ::100], np.full((11, 1024), 0.5, np.float32))


def test_conversion_streams(tmp_path, world):
    """From file to file no more than one tensor and its copy are held, whatever the size of the model."""
    root, _ = world
    tensors = 12
    entries = [Entry(f"t{i}", np.dtype("f4"), (1024, 1024), lambda: np.zeros((1024, 1024), np.float32)) for i in range(tensors)]
    tracemalloc.start()
    try:
        write_file(tmp_path / "x.safetensors", entries)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 2 * entries[0].nbytes + (1 << 20)
    assert len(load_file(tmp_path / "x.safetensors")) == tensors and root.exists()
