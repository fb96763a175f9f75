"""CoIN's instruction sets under every name that they had in its scripts, and the file in which one set has the records of all tasks."""

from __future__ import annotations

from collections.abc import Mapping

from proglora_jax.data.errors import UserError

# Random parts of the Original set; the papers' ablation of the amount of data took the numbered ones.
REDUCED = ("slim", *(f"slim_0.{tenths}" for tenths in range(1, 9)))
# Folders, and suffixes of the files in them, that CoIN used for a set at one time or another; the first one found counts.
FOLDERS: dict[str, tuple[tuple[str, str], ...]] = {
    "Original": (("Instructions_Original", ""), ("Instructions", ""), ("Instructions_Type1", "")),
    "Diverse": (
        ("Instructions_Diverse", ""),
        ("Instructions_Type2", ""),
        ("Instructions_New", ""),
        ("Instructions", "_new"),
        ("Instructions_Original", "_new"),
    ),
    "10Type": (("Instructions_10Type", ""),),
} | {name: ((f"Instructions_{name}", ""),) for name in REDUCED}
# {any name: the set}: a set's own, those of its folders, and what these have behind "Instructions_".
_NAMES: dict[str, str] = {}
for _set, _folders in FOLDERS.items():
    for _name in (_set, *(form for folder, _ in _folders for form in (folder, folder.removeprefix("Instructions_")))):
        _NAMES.setdefault(_name, _set)

# The folder beside those of the tasks whose train.json has the records of all eight, for multi-task training.
MULTITASK = "Multitask"
# In the folder of a set that was made from another one: what was done, by task.
MADE = "re_templated.json"
_BY_IMAGES = {
    "TextVQA": "TextVQA", "ImageNet_withlabel": "ImageNet", "ImageNet": "ImageNet", "GQA": "GQA", "VizWiz": "VizWiz",
    "OCR-VQA": "OCRVQA", "OCRVQA": "OCRVQA",
}  # fmt: skip
_COCO = ("COCO2014", "COCO", "coco")


def set_names() -> tuple[str, ...]:
    """Every name that config.data.instruction_set may have."""
    return tuple(_NAMES)


def find_set(name: str) -> str:
    """The set that a name stands for: `Type2`, `New`, `Instructions_Type2` are `Diverse`.

    Raises:
        UserError: "config.data.instruction_set=x: unknown; choose one of Original, Diverse, ..."
    """
    if name not in _NAMES:
        raise UserError(f"config.data.instruction_set={name}: unknown; choose one of {', '.join(FOLDERS)}, or one of CoIN's former folders")
    return _NAMES[name]


def wording(name: str) -> str:
    """The set whose instructions the records of a set carry; raises as `find_set` does."""
    found = find_set(name)
    return "Original" if found in REDUCED else found


def task_of(record: object) -> str:
    """The task of a record in the file of all tasks, which does not say it.

    It is told from the folder of the image; both tasks on COCO's images from the first answer, a box for Grounding. Whatever
    else there is, text-only records above all, is ScienceQA's, so that no record is lost.
    """
    image = record.get("image") if isinstance(record, Mapping) else None
    folder = image.replace("\\", "/").lstrip("./").partition("/")[0] if isinstance(image, str) else ""
    if folder in _COCO:
        return "Grounding" if _first_answer(record).lstrip().startswith("[") else "VQAv2"
    return _BY_IMAGES.get(folder, "ScienceQA")


def _first_answer(record: Mapping) -> str:
    turns = record.get("conversations")
    turns = [turn for turn in turns if isinstance(turn, Mapping)] if isinstance(turns, list) else []
    return next((str(turn.get("value")) for turn in turns if turn.get("from") in ("gpt", "assistant")), "")
