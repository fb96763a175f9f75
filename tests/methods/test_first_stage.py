"""Runs first_stage.py compiled as a run is; with the other tests' older emitters, two programs may differ in the last bit."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_first_stage_of_a_family_is_plain_lora_bit_for_bit():
    # that a program is compiled in one part, as all tests have it, changes no bit
    flags = re.sub(r"--xla_backend_extra_options=\S*", "", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("first_stage.py"))]
    environment = {**os.environ, "XLA_FLAGS": flags, "TESTS_WITH_EMITTERS": "newer", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "9 passed" in done.stdout, done.stdout[-3000:]
