"""Starts runs of the main job in forks of a process that has imported everything: to start a finished run took 1.9 s of CPU, not 4.7.

    run = warm_start.start(["--config=...", "--workdir=..."], environment, log, folder)   # in a test
    python tests/warm_start.py                                                            # the process, which reads requests from stdin

A fork is a process of its own, with its own devices, signals and exit code; no device is made before it.
"""

from __future__ import annotations

import atexit
import functools
import gc
import json
import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path


class Started:
    """A run in a process of its own, with the interface of `subprocess.Popen` as far as the tests use it."""

    def __init__(self, pid: int):
        self.pid, self.returncode, self._asked = pid, None, 0.0

    def poll(self) -> int | None:
        """The exit code, negative for a signal, or None while it runs; asks fifty times a second at most."""
        if self.returncode is None and time.monotonic() - self._asked > 0.02:
            self.returncode, self._asked = _ask(ended=self.pid), time.monotonic()
        return self.returncode

    def wait(self, timeout: float = 600) -> int:
        """Waits for the exit code.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds.
        """
        end = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("proglora_jax.main", timeout)
            time.sleep(0.02)
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Sends a signal to a process that has not ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        """Ends it at once."""
        self.send_signal(signal.SIGKILL)


def start(arguments: list[str], environment: dict[str, str], log: Path, folder: Path) -> Started:
    """Starts `python -m proglora_jax.main`.

    Args:
        arguments: its flags.
        environment: all its variables. JAX has read its own (JAX_...) when it was imported; of these, only
            JAX_DISABLE_MOST_OPTIMIZATIONS may differ from this process's.
        log: file for what it prints.
        folder: its working directory.
    """
    return Started(_ask(arguments=arguments, environment=environment, log=str(log), folder=str(folder)))


def _ask(**request):
    server = _server()
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    return json.loads(server.stdout.readline())


@functools.cache
def _server() -> subprocess.Popen:
    server = subprocess.Popen([sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.stdin.close)
    return server


# ---- the process that forks


def _import_all() -> None:
    """What a run imports."""
    gc.set_threshold(100_000, 50, 50)  # as in conftest.py, and for the same reason; the forks inherit it
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from proglora_jax.core import host

    host.leave_torch_out()
    import grain.python  # noqa: F401
    import matplotlib.backends.backend_agg  # noqa: F401
    import matplotlib.figure  # noqa: F401
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # noqa: F401

    import jax  # noqa: F401
    import proglora_jax.continual.report
    import proglora_jax.continual.runner
    import proglora_jax.main  # noqa: F401

    # Forks are made before there are threads of JAX.
    warnings.filterwarnings("ignore", message="os.fork")
    gc.collect()
    gc.freeze()


def _serve() -> tuple[list[str], dict[str, str]]:
    """Answers requests until stdin ends; returns in each fork, with its flags and environment."""
    for line in sys.stdin:
        request = json.loads(line)
        if "ended" in request:
            pid, status = os.waitpid(request["ended"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif answer := os.fork():
            pass
        else:
            _become(Path(request["log"]), Path(request["folder"]))
            return request["arguments"], request["environment"]
        print(json.dumps(answer), flush=True)
    sys.exit()


def _become(log: Path, folder: Path) -> None:
    """Takes the files of a process that was started with output to `log`."""
    os.chdir(folder)
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, file in ((0, nothing), (1, out), (2, out)):
        os.dup2(file, number)


def _run(arguments: list[str], environment: dict[str, str]) -> None:
    import jax
    from proglora_jax import main

    jax.config.update("jax_disable_most_optimizations", json.loads(environment["JAX_DISABLE_MOST_OPTIMIZATIONS"]))
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["proglora_jax.main", *arguments]
    main.entry()


if __name__ == "__main__":
    _import_all()
    _run(*_serve())
