"""Where the parts of a LLaVA lie: one folder of transformers, or original LLaVA's language folder, projector file and CLIP folder.

    transformers    one folder with everything; names of 4.x, of 5.x, or of a model in memory
    original        a folder whose config.json is a Llama's with `mm_*` fields (or a bare Vicuna), the projector in it or in
                    mm_projector.bin, the vision tower in the folder of a CLIP; no row in the vocabulary for <image>

Weights are safetensors or files of torch.save, in one file or in shards with an index.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from proglora_jax.checkpoints.names import canonical, llava_rows
from proglora_jax.checkpoints.tensors import FLOATS, StoredTensor
from proglora_jax.checkpoints.weight_files import (
    CONFIG, PROJECTORS, Path, existing, files_digest, index_folder, named_tensors, read_fields, weight_files,
)  # fmt: skip
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.models.llava import abstract_llava
from proglora_jax.models.presets import PRESETS, ClipConfig, LlamaConfig, LlavaConfig

PROTOCOL = "proglora_protocol"  # field of a config.json that we write
ROW_MULTIPLE = 64  # transformers' conversion of LLaVA pads the vocabulary to a multiple of this


@dataclasses.dataclass(frozen=True)
class Source:
    """A LLaVA on disk, found and checked; nothing but headers was read.

    Attributes:
        folder: of the whole model, or of its language model.
        vision_folder: of the CLIP, where the vision tower, or its sizes, are not in `folder`.
        config: sizes, with room in the vocabulary for <image> and <pad>.
        tensors: name in the table of names -> where it lies; every parameter of `config` once.
        rows: rows of the vocabulary on disk; those from here to the config's are new.
        original: whether it is in the layout of original LLaVA.
        protocol: what training from it reproduces: "vicuna7b_projector" (the papers': a language model and a projector that was
            only pre-trained), "llava15_7b" (a whole instruction-tuned LLaVA), the same of 13b, or "..._custom" for other sizes;
            "...+projector" where a projector that was asked for took the place of the model's own.
        files: the weight files that are read.
        note: which of two projectors or vision towers was taken, "" where there is one of each.
    """

    folder: pathlib.Path
    vision_folder: pathlib.Path | None
    config: LlavaConfig
    tensors: Mapping[str, StoredTensor]
    rows: int
    original: bool
    protocol: str
    files: tuple[pathlib.Path, ...]
    note: str = ""

    @property
    def image_folder(self) -> pathlib.Path:
        """The folder that says how images are prepared."""
        return self.vision_folder or self.folder

    def describe(self) -> str:
        """One line for people: protocol, layout, number of files and formats."""
        formats = sorted({tensor.format for tensor in self.tensors.values()})
        layout = "original LLaVA layout" if self.original else "transformers layout"
        wide = self.config.text_config.vocab_size
        grown = f", vocabulary {self.rows} -> {wide} rows" if self.rows != wide else ""
        note = f"; {self.note}" if self.note else ""
        return f"{self.protocol}: {layout}, {len(self.files)} weight file(s), {'+'.join(formats)}{grown}{note}"

    def fingerprint(self) -> str:
        """SHA-256 over config.json and the weight files, names and contents, as hex digits: the name of a base model."""
        files = weight_files(self.folder)
        if self.vision_folder:  # a tower that is not read is not part of the model
            tower = any(path.parent == self.vision_folder for path in self.files)
            files += weight_files(self.vision_folder) if tower else [self.vision_folder / CONFIG]
        return files_digest(files + [path for path in self.files if path not in files])


def find_source(folder: Path, vision_folder: Path | None = None, projector_file: Path | None = None) -> Source:
    """Finds the parts of a LLaVA and compares every tensor's shape with the config.

    Args:
        folder: of the whole model or of the language model.
        vision_folder: of a CLIP, for a `folder` without a vision tower or its sizes; a tower among the weights of `folder` wins over the
            CLIP's. Default: what `mm_vision_tower` in config.json names.
        projector_file: file with the projector's four tensors, or the folder of a stage-1 checkpoint that holds it; wins over those in
            `folder`. Default: the projector among the weights, then mm_projector.bin in `folder`, then what `pretrain_mm_mlp_adapter`
            in config.json names.

    Raises:
        UserError: "<folder>: no such folder ...", "<folder>: config.json is missing ...", "<file>: <field>=<value> is not supported ...",
            "<folder>: describes a language model without a vision tower; ...", "<folder>: holds no projector; ...", what
            `weight_files.index_folder` says, or "<folder>: <count> problem(s): no tensor <name>; ..." for all missing, unexpected
            and misshapen tensors at once.
    """
    folder = existing(folder)
    fields = read_fields(folder)
    original = is_original(fields)
    vision = existing(vision_folder) if vision_folder else _named_vision(folder, fields) if original else None
    config = _config(folder, fields, vision)
    file = _projector(folder, fields, projector_file, original)
    tensors, files = index_folder(folder, canonical)
    own, notes = any(name.startswith("multi_modal_projector.") for name in tensors), []
    if own and file is not None:
        notes.append(f"the projector of {file} takes the place of the one in the weights, as asked")
        if not projector_file:
            beside = file.name if file.parent == folder else file
            file, notes = None, [f"{beside} is not read, the weights hold the projector"]
    if vision is not None and any(name.startswith("vision_tower.") for name in tensors):
        said = f"the weights hold the vision tower; of {vision} only sizes and image settings are read"
        notes.append(said if original else f"{vision} is not read, the weights hold the vision tower")
        vision = vision if original else None
    elif vision is not None:
        towers, more = index_folder(vision, canonical)
        tensors |= {name: tensor for name, tensor in towers.items() if name.startswith("vision_tower.")}
        files += more
    if file is not None:
        named = named_tensors([file], canonical)
        tensors |= {name: tensor for name, tensor in named.items() if name.startswith("multi_modal_projector.")}
        files.append(file)
    if original and not any(name.startswith("multi_modal_projector.") for name in tensors):
        raise UserError(
            f"{folder}: holds no projector; give the one of LLaVA's first stage ({PROJECTORS[0]}): config.model.projector_path in a run, "
            "--projector in the tools"
        )
    rows = config.text_config.vocab_size
    grown = _with_image_row(config)
    tensors = _checked(folder, config, tensors)
    protocol = fields.get(PROTOCOL) or _protocol(grown, stage_1=original and (not own or bool(fields.get("tune_mm_mlp_adapter"))))
    replaced = "+projector" if own and file is not None else ""
    return Source(folder, vision, grown, tensors, rows, original, f"{protocol}{replaced}", tuple(files), "; ".join(notes))


def read_config(folder: Path, vision_folder: Path | None = None) -> LlavaConfig:
    """Reads the sizes of the model from config.json, of a LLaVA or of a Llama and a CLIP in two folders.

    Raises:
        UserError: "<folder>: no such folder ...", "<folder>: config.json is missing ...", "<file>: <field>=<value> is not supported ..."
    """
    folder = existing(folder)
    fields = read_fields(folder)
    vision = existing(vision_folder) if vision_folder else _named_vision(folder, fields)
    return _with_image_row(_config(folder, fields, vision))


def image_folder(folder: Path, vision_folder: Path | None = None) -> pathlib.Path:
    """`Source.image_folder` of a LLaVA whose weights nobody needs: the CLIP's, where one is given or named and its settings count.

    Raises:
        UserError: "<folder>: no such folder ...", "<folder>: config.json is missing ..."
    """
    folder = existing(folder)
    fields, vision = read_fields(folder), existing(vision_folder) if vision_folder else None
    if is_original(fields):
        return vision or _named_vision(folder, fields) or folder
    if vision is None:
        return folder
    with contextlib.suppress(UserError):  # there may be no weights
        if any(name.startswith("vision_tower.") for name in index_folder(folder, canonical)[0]):
            return folder
    return vision


def is_original(fields: Mapping[str, Any]) -> bool:
    """Whether a config.json is of the layout of original LLaVA: a language model's own, which has no row for <image>."""
    return not ("vision_config" in fields or "text_config" in fields)


def padded_rows(image_token_id: int) -> int:
    """Rows of a vocabulary that ends before <image>, once <image> and <pad> are added: 32000 -> 32064, as transformers pads it."""
    return -(-(image_token_id + 2) // ROW_MULTIPLE) * ROW_MULTIPLE


def disk_names(config: LlavaConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name in the table, shape on disk) of every tensor of a LLaVA, in the table's order."""
    tree = abstract_llava(config).to_tree()
    for row in llava_rows(tied=config.tie_word_embeddings, projector_bias=config.multimodal_projector_bias):
        leaf: Any = tree
        for part in row.path.split("/"):
            leaf = leaf[part]
        shape = row.disk_shape(leaf.shape[1:] if row.stacked else leaf.shape, config.vision_config.num_channels)
        yield from ((name, shape) for name in row.names(leaf.shape[0]))


# ---- config


def _config(folder: pathlib.Path, fields: Mapping[str, Any], vision: pathlib.Path | None) -> LlavaConfig:
    try:
        if not is_original(fields):
            return LlavaConfig.from_hf(fields)
        if vision is None:
            tower = f" ({fields['mm_vision_tower']})" if fields.get("mm_vision_tower") else ""
            raise UserError(
                f"{folder}: {CONFIG} describes a language model without a vision tower; give the folder of a CLIP{tower}: "
                "config.model.vision_path in a run, --vision in the tools"
            )
        _refuse(fields, "mm_projector_type", "mlp2x_gelu")
        _refuse(fields, "mm_use_im_start_end", False)
        text = LlamaConfig.from_hf({**fields, "model_type": "llama"})
        strategies = {"patch": "default", "cls_patch": "full"}
        feature = fields.get("mm_vision_select_feature", "patch")
        if feature not in strategies:
            raise ValueError(f"mm_vision_select_feature={feature!r} is not supported ({', '.join(strategies)} are)")
        return LlavaConfig(
            text_config=text,
            vision_config=ClipConfig.from_hf(read_fields(vision)),
            image_token_id=text.vocab_size,
            pad_token_id=text.vocab_size + 1,
            vision_feature_layer=fields.get("mm_vision_select_layer", LlavaConfig.vision_feature_layer),
            vision_feature_select_strategy=strategies[feature],
        )
    except UserError:
        raise
    except (ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{folder / CONFIG}: {error}") from error


def _refuse(fields: Mapping[str, Any], name: str, supported: Any) -> None:
    if fields.get(name, supported) != supported:
        raise ValueError(f"{name}={fields[name]!r} is not supported ({supported!r} is)")


def _with_image_row(config: LlavaConfig) -> LlavaConfig:
    """The config with rows for <image> and <pad> where the vocabulary ends before <image>."""
    text = config.text_config
    if config.image_token_id < text.vocab_size:
        return config
    return dataclasses.replace(config, text_config=dataclasses.replace(text, vocab_size=padded_rows(config.image_token_id)))


def _protocol(config: LlavaConfig, *, stage_1: bool) -> str:
    text = config.text_config
    size = ""
    for name, preset in PRESETS.items():
        if dataclasses.replace(preset().text_config, vocab_size=text.vocab_size) == text:
            size = name.removeprefix("llava15_")
    return (f"vicuna{size}_projector" if size else "vicuna_projector_custom") if stage_1 else f"llava15_{size}" if size else "llava_custom"


def _named_vision(folder: pathlib.Path, fields: Mapping[str, Any]) -> pathlib.Path | None:
    """The CLIP that config.json names, if it names a folder that is here."""
    named = fields.get("mm_vision_tower")
    return folder / named if isinstance(named, str) and named and (folder / named / CONFIG).exists() else None


def _projector(folder: pathlib.Path, fields: Mapping[str, Any], given: Path | None, original: bool) -> pathlib.Path | None:
    """The projector's file, or None where the model's own weights hold it."""
    if given:
        path = pathlib.Path(given)
        if path.is_dir():
            inside = [path / name for name in PROJECTORS if (path / name).exists()]
            if not inside:
                raise UserError(f"{path}: holds none of {', '.join(PROJECTORS)}; give the projector's file")
            path = inside[0]
        if not path.exists():
            raise UserError(f"{path}: no such file; give the projector's file (mm_projector.bin of a stage-1 checkpoint)")
        return path
    named = fields.get("pretrain_mm_mlp_adapter")
    candidates = [folder / name for name in PROJECTORS[:2]] + ([folder / named] if isinstance(named, str) and named else [])
    return next((path for path in candidates if original and path.is_file()), None)


# ---- tensors


def _checked(folder: pathlib.Path, config: LlavaConfig, tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors that the model needs, after comparing all with the config; raises once for all differences."""
    shapes = dict(disk_names(config))
    problems = [f"no tensor {name}" for name in shapes if name not in tensors]
    for name, tensor in tensors.items():
        if name == "language_model.lm_head.weight" and config.tie_word_embeddings:
            continue  # some writers store a tied head as well
        if name not in shapes:
            problems.append(f"unexpected tensor {tensor.name}")
        elif tensor.shape != shapes[name]:
            problems.append(f"{tensor.name} has shape {list(tensor.shape)}, but {CONFIG} asks for {list(shapes[name])}")
        elif tensor.format not in FLOATS:
            problems.append(f"{tensor.name} holds {tensor.format}, not floats (quantised weights are not supported)")
    raise_collected(problems, str(folder), f"Check that {CONFIG} and the weights belong together.")
    return {name: tensors[name] for name in shapes}
