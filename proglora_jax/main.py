"""Runs a sequence of tasks: flags, config, workdir, mesh, run (python -m proglora_jax.main --config configs/coin_mini.py)."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from proglora_jax.checkpoints.integrity import atomic_write_json, read_json, remove_leftovers
from proglora_jax.data.errors import UserError, disk_errors

_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "The config, e.g. configs/coin_mini.py:smoke; override with --config.train.epochs=1.")
_WORKDIR = flags.DEFINE_string(
    "workdir", "", "Folder of the run; the same folder again goes on where the run stopped. Default: runs/<config>_<method>_seed<seed>.")
_DISTRIBUTED = flags.DEFINE_boolean(
    "distributed", False, "A run of several processes that JAX finds by itself, as on Cloud TPU slices and under SLURM or Open MPI.")
_COORDINATOR = flags.DEFINE_string("coordinator_address", "", "host:port of process 0, for runs of several processes.")
_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes the run has.")
_PROCESS = flags.DEFINE_integer("process_id", -1, "Which of them this one is.")
_STOPPED_CODE = flags.DEFINE_integer(
    "stopped_exit_code", 0, "Exit code of a run that obeyed a stop signal, for schedulers that should start it again.")

# Fields that may differ between a run and its continuation: they change nothing that is computed, or only whether it can be. What
# may have to change before a run that stopped with an error can go on must be here, or the work done so far would be lost.
_FREE = {
    "run.log_every_steps", "run.checkpoint_every_steps", "run.tensorboard", "run.compilation_cache", "run.isolated_results",
    "run.published_row", "data.root", "data.threads", "data.image_cache_mb", "data.image_cache_dir", "data.on_bad_record",
    "data.on_bad_image", "data.buckets",
    "evaluate.batch_size", "evaluate.first_new_tokens", "evaluate.prompt_lengths", "evaluate.also_image_mode", "evaluate.share_prefix",
    # The same loss, summed in another order; what is drawn at random within a part (dropout, recalled samples) is drawn anew.
    "mesh.data", "mesh.fsdp", "mesh.model", "model.remat", "model.unroll", "train.micro_batches",
    # Scoring alone: what was asked is scored anew.
    "evaluate.imagenet_empty_ok", "evaluate.grounding_truncate", "evaluate.scienceqa_rule", "evaluate.grounding_rule",
    # The hashes of the files in every stage say whether they are the same.
    "model.vision_path", "model.projector_path", "similarity.vit_path", "similarity.bert_path",
}


def main(argv: list[str]) -> None:
    """Runs what the flags say.

    Raises:
        SystemExit: with 1 after an error of the user's, whose sentence is printed; with --stopped_exit_code after a stop signal that was
            obeyed, which is no error.
    """
    try:
        if len(argv) > 1:
            raise UserError(f"unexpected arguments: {' '.join(argv[1:])}; flags begin with --, see --help")
        _run_flags(_loaded_config(sys.argv[1:]))
    except UserError as error:
        logging.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)


def _run_flags(config: dict[str, Any]) -> None:
    # Imported here: --help and a mistyped flag should not wait for jax.
    from proglora_jax.core import host

    host.claim_gpu_memory()
    host.leave_torch_out()
    host.settle_on_cpu()  # before the next lines import jax
    with host.kept_for_good():
        from proglora_jax.continual import report, runner  # noqa: F401 (what `run` imports)
        from proglora_jax.training.console import setup_console
        from proglora_jax.training.loop import Stopped
        from proglora_jax.training.processes import join, leave_together

    setup_console()
    host.keep_freed_memory()
    join(_COORDINATOR.value, _PROCESSES.value, _PROCESS.value, _DISTRIBUTED.value)
    command = " ".join(shlex.quote(arg) for arg in ["python", "-m", "proglora_jax.main", *sys.argv[1:]])
    stopped = False
    with leave_together():
        try:
            run(config, _WORKDIR.value or default_workdir(sys.argv[1:], config), command)
        except Stopped as stop:
            stopped = True
            logging.info("%s; run the same command to go on", stop)
    if stopped:
        sys.exit(_STOPPED_CODE.value)


def run(config: Mapping[str, Mapping[str, Any]], workdir: str | os.PathLike, command: str = "") -> list[str]:
    """Runs a config in a workdir, or goes on with what was begun there.

    SIGTERM and SIGINT are obeyed between two steps, with the progress saved.

    Args:
        config: {section: {field: value}} with the fields of configs/common.py.
        workdir: folder of the run.
        command: what made the run, for the report.

    Returns:
        The files of the report, report.md first.

    Raises:
        UserError: for what the user can mend; what was computed before stays in the workdir.
        Stopped: after a stop signal.
    """
    import jax

    from proglora_jax.continual import runner
    from proglora_jax.continual.report import write_report
    from proglora_jax.continual.session import open_session
    from proglora_jax.core.host import compiled_folder
    from proglora_jax.training.loop import StopSignal
    from proglora_jax.training.settings import from_config

    began, workdir = time.monotonic(), Path(workdir)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    with contextlib.ExitStack() as stack:
        # ---- config and workdir, before anything slow
        settings = from_config(config)
        stack.enter_context(disk_errors(workdir, "mend that and run the same command again: it goes on from what was saved"))
        stack.enter_context(claim_workdir(workdir, config, command, chief=jax.process_index() == 0))

        # ---- signals: from here on a request to stop is remembered until there is something to save
        stack.callback(lambda: [signal.signal(number, handler) for number, handler in handlers.items()])
        stop = StopSignal().install()

        # ---- devices
        if compiled := compiled_folder(settings.run.compilation_cache, jax.default_backend()):
            jax.config.update("jax_compilation_cache_dir", compiled)
            jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        logging.info("workdir %s, %d device(s): %s", workdir, jax.device_count(), jax.devices()[0].device_kind)

        # ---- the run
        session = open_session(settings, workdir, resumed=_begun(workdir), stop=stop)
        with session.logger:
            runner.run(session)
        written = write_report(workdir) if session.chief else []
    logging.info("done in %.0f s%s", time.monotonic() - began, f"; the report is {', '.join(map(str, written[:2]))}" if written else "")
    return written


def default_workdir(arguments: Sequence[str], config: Mapping[str, Any]) -> str:
    """runs/<config>_<method>_seed<seed>, from the name of the config file and its argument.

    Args:
        arguments: the command line's, without the program's name.
        config: the config; its method and seed become part of the name.
    """
    path, _, variant = _config_name(arguments).partition(":")
    # The method and the seed have their own places in the name.
    words = [word.strip().replace("=", "-") for word in variant.split(",") if word.partition("=")[0].strip() not in ("", "method", "seed")]
    method, seed = config.get("method", {}).get("name", ""), config.get("run", {}).get("seed", 0)
    return os.path.join("runs", "_".join([Path(path).stem or "run", *words, str(method), f"seed{seed}"]))


@contextlib.contextmanager
def claim_workdir(workdir: Path, config: Mapping[str, Mapping[str, Any]], command: str = "", *, chief: bool = True) -> Iterator[None]:
    """Takes a workdir for this process and this config; a new one gets its config.json.

    The lock goes with the process, however it ends.

    Args:
        workdir: the folder; made if missing.
        config: as for `run`.
        command: what made the run, kept in config.json.
        chief: False in all processes of a run but one, which alone locks and writes.

    Raises:
        UserError: for a folder that cannot be written, is in use, or belongs to another config.
    """
    if not chief:
        yield
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        lock = open(workdir / ".lock", "w", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--workdir={workdir}: cannot be written ({error.strerror}); choose another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(f"--workdir={workdir}: another process is using it; wait for it or choose another folder") from error
        _check_owner(workdir, config, command)
        remove_leftovers(workdir)
        yield


def _check_owner(workdir: Path, config: Mapping[str, Mapping[str, Any]], command: str) -> None:
    """Compares a workdir's config.json with the config, or writes it where nothing has been computed yet."""
    path, now, begun = workdir / "config.json", _comparable(config), _begun(workdir)
    if path.exists() and begun:
        stated = read_json(path)
        if not isinstance(stated, dict) or not isinstance(stated.get("config"), dict):
            raise UserError(f"{path}: is not the config of a run; put the file back, or choose another folder")
        there = _comparable(stated["config"])
        shown = lambda values, name: repr(values[name]) if name in values else "absent"
        differing = [f"config.{name} is {shown(there, name)} there and {shown(now, name)} here" for name in sorted(set(there) | set(now))
                     if shown(there, name) != shown(now, name)]
        if differing:
            raise UserError(
                f"--workdir={workdir}: belongs to another config: {'; '.join(differing[:3])}"
                f"{f'; and {len(differing) - 3} more' if len(differing) > 3 else ''}. Choose another folder, or run with that config")
        return
    if begun:
        raise UserError(f"--workdir={workdir}: holds stages but no config.json; choose an empty folder")
    digest = hashlib.sha256(json.dumps(now, sort_keys=True).encode()).hexdigest()[:16]
    atomic_write_json(path, {"config": config, "hash": digest, "command": command})


def _begun(workdir: Path) -> bool:
    """Whether a workdir holds anything that took time to compute."""
    return any(workdir.glob("stages/*/*"))


def _comparable(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """{"section.field": value} of all fields that decide the results, those it does not name too, in the form that JSON gives back."""
    from proglora_jax.training.config_defaults import completed

    flat = {f"{section}.{name}": value for section, fields in completed(config).items() for name, value in fields.items()}
    # With batch_mean a row's gates depend on the rows of its part.
    free = _FREE - {"train.micro_batches"} if flat.get("method.batch_mean") else _FREE
    return json.loads(json.dumps({name: value for name, value in flat.items() if name not in free}))


def _config_name(arguments: Sequence[str]) -> str:
    """What the command line gives as --config: a file, with an argument behind a colon or without; "" where it gives none."""
    followed = [*arguments, ""]
    found = [after if arg in ("--config", "-config") else arg.partition("=")[2]
             for arg, after in zip(followed, followed[1:]) if re.fullmatch("--?config(=.*)?", arg)]
    return found[-1] if found else ""


def _loaded_config(arguments: Sequence[str]) -> dict[str, Any]:
    """The config that the flags gave, as plain dicts."""
    path = _config_name(arguments).partition(":")[0]
    if _CONFIG.value is None:
        raise UserError("--config is missing: give a config file, e.g. --config configs/coin_mini.py")
    try:
        return _CONFIG.value.to_dict()
    except OSError as error:  # ml_collections reports a file that it could not open when the value is first used
        reason = str(error).strip().splitlines()[-1].strip() if os.path.exists(path) else "no such file"
        raise UserError(f"--config={path}: {reason}; give a config file, e.g. configs/coin_mini.py") from error
    except AttributeError as error:
        raise UserError(f"--config={path}: get_config must return a ConfigDict, not {type(_CONFIG.value).__name__}") from error


def _parse(argv: list[str]) -> list[str]:
    """Parses the flags; a mistake in a config or a flag is one sentence, not a stack trace."""
    if any(arg in ("--help", "-help", "-h", "-?") for arg in argv[1:]):  # absl would exit with 1, as after an error
        print(f"{__doc__}\n{flags.FLAGS.module_help(sys.modules[main.__module__])}")
        sys.exit(0)
    try:
        return flags.FLAGS(argv)
    except Exception as error:  # the config file runs here, and may raise anything
        print(f"error: {_flag_problem(error, argv[1:])}", file=sys.stderr)
        sys.exit(1)


def _flag_problem(error: Exception, arguments: Sequence[str]) -> str:
    """What is wrong with the flags or the config file, in one sentence."""
    path = _config_name(arguments).partition(":")[0]
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    kinds = re.search(r"override field '(\w+)'.*?\. (.*) is of original type <class '([\w.]+)'> .* type <class '([\w.]+)'>", str(error))
    if kinds:
        name, value, is_type, must = kinds.groups()
        return f"{path}: sets the field '{name}' to {value} of the type {is_type}; it must be of the type {must.rpartition('.')[2]}"
    if isinstance(error, flags.Error):
        return re.sub(r"^\w*(Error|Exception): ", "", lines[-1]) if len(lines) > 1 else lines[0]
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(os.path.basename(path or "?"))]
    if isinstance(error, SyntaxError):
        return f"{error.filename}, line {error.lineno}: {error.msg}; mend the config file"
    if frames:
        return f"{frames[-1].filename}, line {frames[-1].lineno}: {type(error).__name__}: {lines[-1]}; mend the config file"
    if "get_config" in lines[0]:
        return f"--config={path}: has no function get_config; see configs/coin_mini.py"
    # What is left are overrides of fields that the config does not have.
    missing = re.sub(r"\W", " ", lines[0].replace("\\n", " ")).split()
    fields = [match[1] for arg in arguments if (match := re.match(r"--?(config\.[\w.\[\]]+)", arg))]
    named = [field for field in fields if missing and missing[0] in field.split(".")]
    near = re.search(r'Did you mean "(\w+)"', str(error))
    hint = f"did you mean '{near[1]}'?" if near else "configs/common.py lists all fields"
    return f"{(named or fields or ['config'])[0]}: unknown field; {hint}"


def entry() -> None:
    """The console script proglora-jax."""
    app.run(main, flags_parser=_parse)


if __name__ == "__main__":
    entry()
