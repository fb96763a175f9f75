"""Reads a BERT or a ViT from a Hugging Face folder, for the similarity of tasks: all naming styles, safetensors or torch files."""

from __future__ import annotations

import dataclasses
import pathlib
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.checkpoints.names import Row
from proglora_jax.checkpoints.tensors import FLOATS, StoredTensor
from proglora_jax.checkpoints.weight_files import CONFIG, Path, files_digest, index_folder, read_fields
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.data.images import ImageSpec
from proglora_jax.data.word_pieces import load_word_pieces
from proglora_jax.models.encoders import BertEncoder, VitEncoder, abstract_bert, abstract_vit
from proglora_jax.models.layers import fill, path_of
from proglora_jax.models.presets import BertConfig, VitConfig

# Files beside the weights that decide what an encoder makes of a text or an image.
_INPUT_FILES = (
    "tokenizer.json", "tokenizer_config.json", "vocab.txt", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json",
    "processor_config.json",
)
# (pattern, replacement), all applied in turn: transformers 5 in memory -> what 4 and 5 write.
_VIT_NAMES = (
    (r"^(model\.)?vit\.", ""), (r"^layers\.", "encoder.layer."), (r"\.attention\.q_proj\.", ".attention.attention.query."),
    (r"\.attention\.k_proj\.", ".attention.attention.key."), (r"\.attention\.v_proj\.", ".attention.attention.value."),
    (r"\.attention\.o_proj\.", ".attention.output.dense."), (r"\.mlp\.fc1\.", ".intermediate.dense."), (r"\.mlp\.fc2\.", ".output.dense."),
)
# The first BERT files name norms as TensorFlow did.
_BERT_NAMES = ((r"^(model\.)?bert\.", ""), (r"LayerNorm\.gamma$", "LayerNorm.weight"), (r"LayerNorm\.beta$", "LayerNorm.bias"))
# Poolers, heads of pre-training and of classifiers, masks and buffers are of no use here.
_UNUSED = re.compile(r"^(pooler|cls|classifier|cls_classifier|qa_outputs|decoder|lm_head)\.|mask_token$|position_ids$|token_type_ids$")


@dataclasses.dataclass(frozen=True)
class EncoderSource:
    """An encoder on disk, found and checked; nothing but headers was read.

    Attributes:
        folder: its folder.
        config: its sizes.
        tensors: name in the table of names -> where it lies.
        files: the weight files.
    """

    folder: pathlib.Path
    config: BertConfig | VitConfig
    tensors: Mapping[str, StoredTensor]
    files: tuple[pathlib.Path, ...]

    def fingerprint(self) -> str:
        """SHA-256 over all files that decide what the encoder computes, as hex digits."""
        beside = [self.folder / name for name in (CONFIG, *_INPUT_FILES) if (self.folder / name).exists()]
        return files_digest([*beside, *self.files])

    def load(self, dtype: Any = jnp.float32) -> BertEncoder | VitEncoder:
        """The encoder, its parameters as numpy arrays of a dtype."""
        rows = {row.path: row for row in _rows(self.config)}

        def leaf(path: str, abstract: jax.ShapeDtypeStruct) -> np.ndarray:
            row = rows[path]
            layers = [row.read(self.tensors[name].read()).astype(np.dtype(dtype)) for name in row.names(abstract.shape[0])]
            return np.stack(layers) if row.stacked else layers[0]

        return fill(_abstract(self.config), leaf)


def find_bert(folder: Path, field: str = "config.similarity.bert_path") -> EncoderSource:
    """Finds a BERT (bert-base-uncased, or one of another size) and compares every tensor's shape with its config.

    Args:
        folder: a Hugging Face folder.
        field: where the folder's name came from, for messages.

    Raises:
        UserError: "<field>=<folder>: no such folder ...", "<field>=<folder>: holds a model of the type 'vit', not a BERT ...", what
            `weight_files.index_folder` says, or "<folder>: <count> problem(s): no tensor <name>; ..."
    """
    return _find(folder, field, "BERT", "bert", BertConfig.from_hf, _BERT_NAMES)


def find_vit(folder: Path, field: str = "config.similarity.vit_path") -> EncoderSource:
    """Finds a ViT (vit-base-patch16-224, or one of another size); arguments and errors as for `find_bert`."""
    return _find(folder, field, "ViT", "vit", VitConfig.from_hf, _VIT_NAMES)


def vit_images(source: EncoderSource) -> ImageSpec:
    """How a ViT's folder wants images to be prepared.

    Raises:
        UserError: "<folder>: the image processor makes 384 pixels, but config.json says image_size=224; ...", or what
            `ImageSpec.from_folder` says.
    """
    spec = ImageSpec.from_folder(str(source.folder), vit=True)
    if spec.size != source.config.image_size:
        raise UserError(f"{source.folder}: the image processor makes {spec.size} pixels, but {CONFIG} says image_size="
                        f"{source.config.image_size}; use the processor that belongs to the model")
    return spec


def check_encoders(vit_path: Path, bert_path: Path) -> None:
    """Looks whether both encoders are there and whole, their tokenizer and image settings too; errors as those of what reads them."""
    vit, bert = find_vit(vit_path), find_bert(bert_path)
    vit_images(vit)
    load_word_pieces(str(bert.folder), bert.config.vocab_size, bert.config.max_position_embeddings)


def _find(folder: Path, field: str, what: str, kind: str, read: Callable, names: tuple[tuple[str, str], ...]) -> EncoderSource:
    path = pathlib.Path(folder)
    if not str(folder):
        raise UserError(f"{field}='': not set; give the Hugging Face folder of a {what}, or set config.similarity.encoders='backbone'")
    if not path.is_dir():
        raise UserError(f"{field}={folder}: no such folder; give the Hugging Face folder of a {what} (nothing is downloaded)")
    fields = read_fields(path)
    if fields.get("model_type", kind) != kind:
        raise UserError(f"{field}={folder}: holds a model of the type {fields['model_type']!r}, not a {what}; give the folder of a {what}")
    try:
        config = read(fields)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise UserError(f"{path / CONFIG}: {error}") from error
    tensors, files = index_folder(path, lambda name: _table_name(name, names))
    return EncoderSource(path, config, _checked(path, config, tensors), tuple(files))


def _table_name(name: str, rewritings: tuple[tuple[str, str], ...]) -> str | None:
    """A name on disk in the table's scheme, or None for a tensor without a use."""
    for pattern, replacement in rewritings:
        name = re.sub(pattern, replacement, name)
    return None if _UNUSED.search(name) else name


def _checked(folder: pathlib.Path, config: BertConfig | VitConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that the encoder needs, after comparing all with its config; raises once for all differences."""
    shapes = dict(_disk_shapes(config))
    problems = [f"no tensor {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name not in shapes:
            problems.append(f"unexpected tensor {tensor.name}")
        elif tensor.shape != shapes[name]:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, but {CONFIG} asks for {list(shapes[name])}")
        elif tensor.format not in FLOATS:
            problems.append(f"{tensor.name} holds {tensor.format}, not floats")
    raise_collected(problems, str(folder), f"Check that {CONFIG} and the weights belong together.")
    return {name: tensors[name] for name in shapes}


def _disk_shapes(config: BertConfig | VitConfig):
    """(name, shape on disk) of every tensor that an encoder needs."""
    rows = {row.path: row for row in _rows(config)}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(_abstract(config))[0]:
        row = rows[path_of(keys)]
        shape = row.disk_shape(leaf.shape[1:] if row.stacked else leaf.shape, getattr(config, "num_channels", 0))
        yield from ((name, shape) for name in row.names(leaf.shape[0]))


def _abstract(config: BertConfig | VitConfig) -> BertEncoder | VitEncoder:
    return abstract_bert(config) if isinstance(config, BertConfig) else abstract_vit(config)


def _rows(config: BertConfig | VitConfig) -> list[Row]:
    """The table of names: every parameter of ours once."""
    ours, disk = "layers/", "encoder.layer.{layer}."
    bert = isinstance(config, BertConfig)
    inner = "attention.self." if bert else "attention.attention."
    rows = [Row(f"{ours}attention/{a}/{leaf}", f"{disk}{inner}{b}.{suffix}", change)
            for a, b in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
            for leaf, suffix, change in (("kernel", "weight", "linear"), ("bias", "bias", "same"))]
    linears = {f"{ours}attention/out_proj": "attention.output.dense", f"{ours}fc1": "intermediate.dense", f"{ours}fc2": "output.dense"}
    for path, name in linears.items():
        rows += [Row(f"{path}/kernel", f"{disk}{name}.weight", "linear"), Row(f"{path}/bias", f"{disk}{name}.bias", "same")]
    if bert:
        norms = {f"{ours}attention_norm": f"{disk}attention.output.LayerNorm", f"{ours}output_norm": f"{disk}output.LayerNorm",
                 "embedding_norm": "embeddings.LayerNorm"}
        rows += [Row(f"{kind}_embedding", f"embeddings.{name}_embeddings.weight", "same")
                 for kind, name in (("word", "word"), ("position", "position"), ("type", "token_type"))]
    else:
        norms = {f"{ours}norm1": f"{disk}layernorm_before", f"{ours}norm2": f"{disk}layernorm_after", "norm": "layernorm"}
        rows += [
            Row("class_embedding", "embeddings.cls_token", "same"),
            Row("position_embedding", "embeddings.position_embeddings", "same"),
            Row("patch_embedding/kernel", "embeddings.patch_embeddings.projection.weight", "patches"),
            Row("patch_embedding/bias", "embeddings.patch_embeddings.projection.bias", "same"),
        ]
    return rows + [row for path, name in norms.items()
                   for row in (Row(f"{path}/scale", f"{name}.weight", "same"), Row(f"{path}/bias", f"{name}.bias", "same"))]
