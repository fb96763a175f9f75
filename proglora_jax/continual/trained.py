"""A trained stage of a run, opened from the workdir alone: method, rank, alpha and targets come from its checkpoint."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proglora_jax.checkpoints.integrity import read_json
from proglora_jax.checkpoints.sources import Source, find_source
from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.continual.session import model_folder
from proglora_jax.continual.stages import FINAL
from proglora_jax.core import tree as trees
from proglora_jax.core.types import CLState, Targets
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Method
from proglora_jax.methods.registry import method_class
from proglora_jax.training.settings import build

_FOLDER = re.compile(r"(\d+)_(.+)")


@dataclasses.dataclass(frozen=True)
class Trained:
    """A stage of a run.

    Attributes:
        folder: the stage's folder.
        method: with the hyper-parameters that it was trained with.
        state: at the end of the stage.
        meta: the checkpoint's meta.json.
        config: the run's config, {section: {field: value}}.
        sequence: whether the stage belongs to a sequence of tasks (else it is one of isolated tasks, or all of them at once).
    """

    folder: Path
    method: Method
    state: CLState
    meta: Mapping[str, Any]
    config: Mapping[str, Any]
    sequence: bool

    @property
    def model(self) -> Mapping[str, Any]:
        """The config's section "model", which names the backbone."""
        return self.config["model"]

    def tasks(self) -> tuple[str, ...]:
        """The tasks that the stage knows, by the ids that the method sees."""
        return tuple(self.meta["tasks"][: self.meta["index"] + 1]) if self.sequence else (self.meta["task"],)

    def task_id(self, name: str | None) -> int:
        """The id of a task; the stage's own without a name.

        Raises:
            UserError: "<folder>: has not learned <name>; it knows ..."
        """
        known = self.tasks()
        if name is None:
            return len(known) - 1
        found = [i for i, task in enumerate(known) if task.lower() == name.lower()]
        if not found:
            raise UserError(f"{self.folder}: has not learned {name}; it knows {', '.join(known)}")
        return found[0]

    def asked_task(self, name: str | None) -> int:
        """As `task_id`, for who may name a task only where the method wants to know it.

        Raises:
            UserError: as `task_id`; "--task <name>: <method> does not know tasks, ..."
        """
        if name is not None and not self.method.uses_task_id:
            raise UserError(f"--task {name}: {self.method.name} does not know tasks, its adapter serves all of them; leave --task out")
        return self.task_id(name)

    def backbone(self, base: str | None = None, vision: str | None = None, projector: str | None = None) -> tuple[Source, str]:
        """The model that the stage was trained on, and a warning ("" for none).

        Args:
            base: where it lies now; None takes the places that the run's config names.
            vision: where its CLIP lies now, if it is of original LLaVA; with `base`, None stands for no CLIP apart.
            projector: where its projector lies now; as `vision`.

        Raises:
            UserError: "<folder>: is not the backbone that <stage> was trained on ..."; as `sources.find_source`.
        """
        model, as_then = self.model, base is vision is projector is None
        if base is None:
            vision, projector = vision or model.get("vision_path") or None, projector or model.get("projector_path") or None
        source = find_source(model_folder(base or model["path"]), vision, projector)
        found, wanted = source.fingerprint(), self.meta["backbone"]
        if found == wanted:
            return source, ""
        if as_then:
            raise UserError(
                f"{source.folder}: is not the backbone that {self.folder} was trained on (hash {found[:12]}, then {wanted[:12]}); put that "
                "model back, or name with --base (and --vision, --projector) where it is"
            )
        return source, f"warning: the files in {source.folder} are not those of the run; right only if it is the same model, converted"


def open_trained(workdir: str | Path, stage: str | None = None) -> Trained:
    """Opens a stage; all checksums are verified.

    Args:
        workdir: the run's folder.
        stage: its number as in the folder's name ("3", "03") or its task's name; None takes the last one that is trained.

    Raises:
        UserError: "<workdir>: no such folder ...", "<workdir>: holds no trained stage ...", "<workdir>: has no trained stage <stage>; it
            has ..."
        CheckpointDamaged: as `stage.load_checkpoint`.
    """
    workdir = Path(workdir)
    if not workdir.is_dir():
        raise UserError(f"{workdir}: no such folder; give the workdir of a run")
    stages = {}
    for path in sorted(workdir.glob("stages/*")):
        match = _FOLDER.fullmatch(path.name)
        if match and ((path / FINAL).exists() or any(path.glob(f"{FINAL}.old-*"))):
            stages[int(match[1])] = path
    if not stages:
        raise UserError(f"{workdir}: holds no trained stage; give the workdir of a run that has finished one")
    number = max(stages) if stage is None else _number(workdir, stages, stage)
    loaded, records = load_checkpoint(stages[number] / FINAL, ["adapter"])
    meta = records["meta"]
    tree = loaded["adapter"]
    if meta["index"]:  # a stage of a sequence: its blocks so far lie in the stages before it
        tree = trees.merge(*_before(workdir, stages, number, meta), tree)
    method = build(method_class(meta["method"]), meta["hyperparameters"], f"{stages[number]}: hyperparameters")
    linears = {name: tuple(shape) for name, shape in meta["targets"].items()}
    targets = Targets(meta["layers"], linears, width=linears["q_proj"][0])
    config = _config(workdir)
    sequence = meta["task"] in meta["tasks"] and config["run"]["protocol"] != "isolated"
    fresh = method.init(targets, tree["params"]["mm_projector"], len(meta["tasks"]) if sequence else 1, 0)
    return Trained(stages[number], method, method.from_disk(tree, fresh, meta["index"]), meta, config, sequence)


def _config(workdir: Path) -> Mapping[str, Any]:
    """The run's config."""
    path = workdir / "config.json"
    content = read_json(path)
    config = content.get("config") if isinstance(content, dict) else None
    needed = {"model": ("path",), "run": ("protocol",), "data": ("template", "max_length"), "evaluate": ("max_new_tokens",)}
    if not isinstance(config, dict) or any(field not in config.get(section, {}) for section in needed for field in needed[section]):
        raise UserError(f"{path}: is not the config of a run; put the file back")
    return config


def _number(workdir: Path, stages: Mapping[int, Path], stage: str) -> int:
    for number, path in stages.items():
        if stage.isdecimal() and int(stage) == number or stage.lower() in (path.name, _FOLDER.fullmatch(path.name)[2]):
            return number
    raise UserError(f"{workdir}: has no trained stage {stage}; it has {', '.join(path.name for path in stages.values())}")


def _before(workdir: Path, stages: Mapping[int, Path], number: int, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The trees of the stages before, first to last, each made from the one before it."""
    found: list[dict[str, Any]] = []
    for earlier in range(number - 1, -1, -1):
        if earlier not in stages:
            raise UserError(f"{workdir}: stage {earlier:02d}, which the later ones build on, is missing; put its folder back")
        loaded, records = load_checkpoint(stages[earlier] / FINAL, ["adapter"])
        if records["meta"]["digest"] != meta["previous"]:
            raise UserError(f"{stages[number]}: was made from another {stages[earlier].name} than lies there now; run the run again")
        found.insert(0, loaded["adapter"])
        meta = records["meta"]
    return found
