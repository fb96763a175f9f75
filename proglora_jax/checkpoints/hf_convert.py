"""Any LLaVA that can be read, written anew as one clean folder with tokenizer and image settings: `tools convert from-hf`."""

from __future__ import annotations

import contextlib
import json
import pathlib
import shutil
from collections.abc import Callable, Iterator
from typing import Any

from proglora_jax.checkpoints.hf_export import VISION_FOLDER, Change, processor_fields, save_source
from proglora_jax.checkpoints.sources import Source, find_source
from proglora_jax.checkpoints.weight_files import Path
from proglora_jax.data.errors import UserError, disk_errors
from proglora_jax.data.tokens import load_tokenizer

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def convert_from_hf(
    folder: Path,
    out: Path,
    *,
    vision_folder: Path | None = None,
    projector_file: Path | None = None,
    style: str = "hub",
    dtype: Any = None,
    log: Callable[[str], None] = print,
) -> list[pathlib.Path]:
    """Reads a LLaVA in any layout and writes it as a folder that transformers and a run's `config.model.path` take.

    The folder is built beside `out` and renamed, so that a folder that is there is whole.

    Args:
        folder: see `sources.find_source`.
        out: where to write; must be absent or empty.
        vision_folder: see `sources.find_source`.
        projector_file: see `sources.find_source`.
        style: of the names, see `names.STYLES`.
        dtype: of the weights; None leaves each tensor as it is.
        log: takes a line of text.

    Returns:
        The weight files.

    Raises:
        UserError: as `sources.find_source`, `data.tokens.load_tokenizer` and `hf_export.save_source`; "<out>: is not empty ..."
    """
    check_free(out)
    source = find_source(folder, vision_folder, projector_file)
    log(f"found {source.describe()}")
    return write_folder(source, out, style=style, dtype=dtype, log=log)


def write_folder(
    source: Source,
    out: Path,
    *,
    style: str = "hub",
    dtype: Any = None,
    change: Change | None = None,
    check: Callable[[pathlib.Path], None] | None = None,
    log: Callable[[str], None] = print,
) -> list[pathlib.Path]:
    """Writes weights, config, tokenizer and image settings of a model on disk; all or nothing.

    Args:
        source: the model.
        out: where to write; must be absent or empty.
        style: see `hf_export.save_source`.
        dtype: see `hf_export.save_source`.
        change: see `hf_export.save_source`.
        check: looks at the folder before it gets its name; what it raises undoes everything.
        log: takes a line of text.

    Returns:
        The weight files.

    Raises:
        UserError: as `convert_from_hf`.
    """
    with whole_folder(out) as partial:
        files = save_source(source, partial, style=style, dtype=dtype, change=change)
        for line in [copy_tokenizer(source, partial), copy_image_settings(source, partial, apart=style == "original")]:
            if line:
                log(line)
        if check is not None:
            check(partial)
    log(f"wrote {out}")
    return [pathlib.Path(out) / file.relative_to(partial) for file in files]


def check_free(out: Path) -> None:
    """Refuses a place that something lies at, or where no folder can be made; before anything slow.

    Raises:
        UserError: "<out>: is not empty; choose another folder or remove it", "<out>: <why it cannot be made>; choose another folder"
    """
    out = pathlib.Path(out).absolute()
    with disk_errors(out, "choose another folder", every=True):
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise UserError(f"{out}: is not empty; choose another folder or remove it")
    _make(out).rmdir()


@contextlib.contextmanager
def whole_folder(out: Path) -> Iterator[pathlib.Path]:
    """A folder to write into, which gets the name `out` at the end; after an error nothing is left of it.

    Raises:
        UserError: as `check_free`; what is raised inside, with the name `out` for the folder; "<out>: <what the disk says>; ..."
    """
    out = pathlib.Path(out).absolute()
    check_free(out)
    partial = _make(out)
    try:
        with disk_errors(out, "nothing was kept; make room or choose another folder", partial):
            yield partial
            if out.exists():
                out.rmdir()
            partial.rename(out)
    except UserError as error:  # what is said of the folder is said of the place that the user named
        raise UserError(str(error).replace(str(partial), str(out))) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make(out: pathlib.Path) -> pathlib.Path:
    """The folder that becomes `out` once it is whole, empty."""
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    with disk_errors(out, "choose another folder", every=True):
        partial.mkdir(parents=True)
    return partial


def copy_tokenizer(source: Source, out: pathlib.Path) -> str:
    """Copies the tokenizer's files; a language model's tokenizer gets <image> and <pad>. Returns a warning, "" for none.

    Raises:
        UserError: as `data.tokens.load_tokenizer`, and where the tokenizer's <image> is not the model's.
    """
    if not any((source.folder / name).exists() for name in _TOKENIZER_FILES[:2]):
        return f"warning: {source.folder} holds no tokenizer; put tokenizer.json beside the weights before a run"
    if not source.original:
        for name in _TOKENIZER_FILES:
            if (source.folder / name).exists():
                shutil.copyfile(source.folder / name, out / name)
        return ""
    config = source.config
    tokenizer = load_tokenizer(str(source.folder), config.text_config.vocab_size, add_image_token=True)
    if tokenizer.image_token_id != config.image_token_id:
        raise UserError(
            f"{source.folder}: the tokenizer's <image> gets the id {tokenizer.image_token_id}, but the vocabulary has {source.rows} rows; "
            "use the tokenizer that belongs to the model"
        )
    tokenizer.save(str(out))
    return ""


def copy_image_settings(source: Source, out: pathlib.Path, *, apart: bool = False) -> str:
    """Copies how images are prepared, into the vision tower's own folder if that is `apart`. Returns a warning, "" for none."""
    place = out / VISION_FOLDER if apart else out
    found = [name for name in IMAGE_FILES if (source.image_folder / name).exists()]
    for name in found:
        shutil.copyfile(source.image_folder / name, place / name)
    if not apart and IMAGE_FILES[1] not in found:
        (out / IMAGE_FILES[1]).write_text(json.dumps(processor_fields(source.config), indent=2) + "\n", encoding="utf-8")
    return "" if found else f"warning: {source.image_folder} holds no {IMAGE_FILES[0]}; put one beside the weights before a run"
