"""Runs a sequence of tasks: flags, config, workdir, mesh, run (python -m proglora_jax.main --config configs/coin_mini.py)."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from proglora_jax.checkpoints.integrity import atomic_write_json, read_json
from proglora_jax.data.errors import UserError

_CONFIG = config_flags.DEFINE_config_file("config", None, "The config, e.g. configs/coin_mini.py:smoke; override with --config.train.epochs=1.")
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run; the same folder again goes on where the run stopped. Default: runs/<config>_<method>_seed<seed>.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", "", "host:port of process 0, for runs of several processes.")
_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes the run has.")
_PROCESS = flags.DEFINE_integer("process_id", -1, "Which of them this one is.")

# Fields that may differ between a run and its continuation: they change nothing that is computed.
_FREE = (("run", "log_every_steps"), ("run", "checkpoint_every_steps"), ("run", "tensorboard"), ("run", "compilation_cache"),
         ("run", "isolated_results"), ("data", "threads"), ("data", "image_cache_mb"), ("data", "root"), ("mesh", "data"), ("mesh", "fsdp"), ("mesh", "model"))


def main(argv: list[str]) -> None:
    """Builds the run from the flags and runs it.

    Raises:
        SystemExit: with 0 after a stop signal, with 1 after an error of the user's, whose sentence is printed.
    """
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments: {' '.join(argv[1:])}")
    # Imported here: --help and a mistyped flag should not wait for jax.
    from proglora_jax.training.console import setup_console
    from proglora_jax.training.loop import Stopped

    setup_console()
    try:
        _run()
    except Stopped as stop:
        logging.info("%s; run the same command to go on", stop)
    except UserError as error:
        logging.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _run() -> None:
    import jax

    from proglora_jax.continual import runner
    from proglora_jax.continual.report import write_report
    from proglora_jax.continual.session import open_session
    from proglora_jax.training.settings import from_config

    # ---- config and workdir, before anything slow
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a config file, e.g. --config configs/coin_mini.py")
    if _PROCESSES.value > 1:
        jax.distributed.initialize(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
    config = _CONFIG.value.to_dict()
    settings = from_config(config)
    workdir = Path(_WORKDIR.value or default_workdir(settings.method.name, settings.run.seed))
    lock = claim_workdir(workdir, config)

    # ---- devices
    if settings.run.compilation_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(os.path.expanduser(settings.run.compilation_cache)))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    began = time.monotonic()
    logging.info("workdir %s, %d device(s): %s", workdir, jax.device_count(), jax.devices()[0].device_kind)

    # ---- the run
    session = open_session(settings, workdir, resumed=(workdir / "metrics.jsonl").exists())
    with session.logger:
        runner.run(session)
    if session.chief:
        written = write_report(workdir)
        logging.info("done in %.0f s; the report is %s", time.monotonic() - began, ", ".join(map(str, written[:2])))
    lock.close()


def default_workdir(method: str, seed: int) -> str:
    """runs/<config>_<method>_seed<seed>, from the name of the config file and its argument."""
    name = next((arg.split("=", 1)[-1] for arg in sys.argv if "--config=" in arg), None)
    if name is None:
        name = sys.argv[sys.argv.index("--config") + 1] if "--config" in sys.argv else "run"
    path, _, variant = name.partition(":")
    stem = Path(path).stem + (f"_{variant.replace(',', '_').replace('=', '-')}" if variant and "method" not in variant else "")
    return os.path.join("runs", f"{stem}_{method}_seed{seed}")


def claim_workdir(workdir: Path, config: dict[str, Any]) -> Any:
    """Takes a workdir for this process and this config; a new one gets its config.json.

    Returns:
        The open lock file; the lock goes with the process, however it ends.

    Raises:
        UserError: for a folder that cannot be written, is in use, or belongs to another config.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from error
    if int(os.environ.get("PROGLORA_PROCESS_ID", max(_PROCESS.value, 0))) > 0:
        return lock
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise UserError(f"--workdir={workdir}: another process is using it; wait for it or choose another folder") from error
    path, now = workdir / "config.json", _comparable(config)
    if path.exists():
        there = _comparable(read_json(path)["config"])
        differing = [f"config.{name} is {there.get(name)!r} there and {now.get(name)!r} here" for name in sorted(set(there) | set(now))
                     if there.get(name) != now.get(name)]
        if differing:
            raise UserError(
                f"--workdir={workdir}: belongs to another config: {'; '.join(differing[:3])}"
                f"{f'; and {len(differing) - 3} more' if len(differing) > 3 else ''}. Choose another folder, or run with that config")
        return lock
    if any(workdir.glob("stages/*")):
        raise UserError(f"--workdir={workdir}: holds stages but no config.json; choose an empty folder")
    command = " ".join(shlex.quote(arg) for arg in ["python", "-m", "proglora_jax.main", *sys.argv[1:]])
    digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
    atomic_write_json(path, {"config": config, "hash": digest, "command": command})
    return lock


def _comparable(config: dict[str, Any]) -> dict[str, Any]:
    """{"section.field": value} of all fields that decide the results, in the form that JSON gives back."""
    flat = {f"{section}.{name}": value for section, fields in config.items() for name, value in fields.items() if (section, name) not in _FREE}
    return json.loads(json.dumps(flat))


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake in a config or a flag is one sentence, not a stack trace."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = re.sub(r"^\w*(Error|Exception): ", "", lines[-1])
        print(f"error: {reason if len(lines) > 1 else lines[0]}", file=sys.stderr)
        sys.exit(1)


def entry() -> None:
    """The console script proglora-jax."""
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    entry()
