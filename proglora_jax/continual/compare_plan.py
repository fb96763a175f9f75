"""What a comparison has to run: methods x seeds as runs of the main job, and the isolated runs that families of methods share.

    out/proglora_dynamic_seed0/          a run's workdir
    out/isolated_lora_1a2b3c4d_seed0/    each task alone, for FWT; the hash is that of the config, seed aside

A family shares its isolated run because `Method.isolated_as` names the same method and the same hyper-parameters remain.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from proglora_jax.checkpoints.integrity import read_json
from proglora_jax.continual.run_record import load_run
from proglora_jax.data.errors import UserError
from proglora_jax.methods.registry import method_class
from proglora_jax.training.config_defaults import completed
from proglora_jax.training.config_file import load_config
from proglora_jax.training.settings import build

Config = Mapping[str, Mapping[str, Any]]


@dataclasses.dataclass(frozen=True, eq=False)
class PlannedRun:
    """One run of the main job.

    Attributes:
        method: what it trains.
        seed: its seed.
        workdir: where it goes on.
        config: what it computes.
        arguments: flags of the main job that say the same.
        families: methods whose isolated accuracies it gives; () for a run of a sequence.
    """

    method: str
    seed: int
    workdir: Path
    config: Config
    arguments: tuple[str, ...]
    families: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """What it is called in progress lines."""
        return (f"each task alone for {', '.join(self.families)}" if self.families else self.method) + f", seed {self.seed}"

    @property
    def finished(self) -> bool:
        """Whether the workdir holds this very run, complete."""
        try:
            stated = read_json(self.workdir / "config.json").get("config")
            return _plain(completed(stated)) == _plain(completed(self.config)) and load_run(self.workdir).finished
        except (UserError, AttributeError, TypeError):
            return False


def plan(named: str, overrides: Sequence[str], methods: Sequence[str], seeds: Sequence[int], out: Path, isolated: bool) -> list[PlannedRun]:
    """The runs of a comparison, those of sequences first, seed by seed so that an early end has a whole table.

    Args:
        named: config file with its argument behind a colon or without; it must know `method=` and `seed=`.
        overrides: flags such as "--config.train.epochs=1", for every run.
        methods: names of methods.
        seeds: seeds of each.
        out: folder of the workdirs.
        isolated: whether the isolated runs are planned too.

    Raises:
        UserError: "compare: <what> is given twice ..."; as `load_config`, the table of methods and hyper-parameters that do not fit raise.
    """
    for what, values in (("--methods", methods), ("--seeds", seeds)):
        if not values:
            raise UserError(f"compare: {what} is missing; give at least one")
        if twice := sorted({str(value) for value in values if list(values).count(value) > 1}):
            raise UserError(f"compare: {what} names {', '.join(twice)} twice; give each once")
    if any(seed < 0 for seed in seeds):
        raise UserError(f"compare: --seeds {min(seeds)}: must be 0 or more")
    runs, alone = [], {}
    for seed in seeds:
        for method in methods:
            run = _run(named, overrides, method, seed, out)
            runs.append(run)
            if isolated and (found := isolated_run(named, overrides, run, out)):
                known = alone.get(found.workdir, found)
                alone[found.workdir] = dataclasses.replace(known, families=(*known.families, *(() if known is found else found.families)))
    return runs + list(alone.values())


def isolated_run(named: str, overrides: Sequence[str], run: PlannedRun, out: Path) -> PlannedRun | None:
    """The run of each task alone against which a run's forward transfer is measured, None where there is none.

    Its method is the one that the run's method says with these hyper-parameters; it has them as far as it knows them.
    """
    own = {name: value for name, value in run.config["method"].items() if name != "name"}
    against = build(method_class(run.method), own, "config.method").isolated_as
    if not against:
        return None
    method = run.method if against == "self" else against
    changed = list(overrides) + ["--config.run.protocol=isolated"]
    if method != run.method:
        fields = load_config(_with(named, method, run.seed))["method"]
        given = {name: run.config["method"][name] for name in fields if name != "name" and name in run.config["method"]}
        # What only the run's own method knows, its pool for example, has no meaning for the other.
        changed = [flag for flag in changed if not _of_method(flag)]
        changed += [f"--config.method.{name}={value}" for name, value in given.items() if value != fields[name]]
    made = _run(named, changed, method, run.seed, out)
    content = _plain(made.config)
    content["run"].pop("seed")
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]
    workdir = out / f"isolated_{method}_{digest}_seed{run.seed}"
    return dataclasses.replace(made, workdir=workdir, arguments=(*made.arguments[:-1], f"--workdir={workdir}"), families=(run.method,))


def _run(named: str, overrides: Sequence[str], method: str, seed: int, out: Path) -> PlannedRun:
    method_class(method)
    config, workdir = _with(named, method, seed), out / f"{method}_seed{seed}"
    return PlannedRun(method, seed, workdir, load_config(config, overrides), (f"--config={config}", *overrides, f"--workdir={workdir}"))


def _with(named: str, method: str, seed: int) -> str:
    """The config's name with a method and a seed in its argument."""
    path, _, argument = named.partition(":")
    words = [word for word in argument.split(",") if word.strip()]
    if taken := [word for word in words if word.partition("=")[0].strip() in ("method", "seed", "isolated")]:
        raise UserError(f"compare: --config={named}: leave out {', '.join(taken)}; --methods, --seeds and --isolated say so")
    return f"{path}:{','.join([*words, f'method={method}', f'seed={seed}'])}"


def _of_method(flag: str) -> bool:
    return flag.startswith("--config.method.")


def _plain(config: Config) -> dict[str, Any]:
    """A config in the form that JSON gives back, but for the number of threads, which decides nothing: it is the default of before."""
    plain = json.loads(json.dumps({section: dict(fields) for section, fields in config.items()}))
    if "threads" in plain.get("data", {}):
        plain["data"]["threads"] = 2
    return plain
