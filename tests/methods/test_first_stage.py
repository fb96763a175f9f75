"""Runs first_stage.py with the newer emitters of a run; with the other tests' older ones, two programs may differ in the last bit.

LLVM's costly optimisations are off here as in all tests. With them, seven of the nine cases hold to the last bit; EWC and SEMA, whose
programs hold more than LoRA's in the first stage too, then round differently (losses differ by 1e-7, jax 0.10.2 on a CPU).
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path


def test_the_first_stage_of_a_family_is_plain_lora_bit_for_bit():
    flags = re.sub(r"--xla_backend_extra_options=\S*", "", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("first_stage.py"))]
    environment = {**os.environ, "XLA_FLAGS": flags, "TESTS_WITH_EMITTERS": "newer"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "9 passed" in done.stdout, done.stdout[-3000:]
