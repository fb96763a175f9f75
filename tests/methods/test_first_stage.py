"""Runs first_stage.py compiled as a run is; with the other tests' older emitters, two programs may differ in the last bit.

What is alike but for last bits anyway is tested here.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from first_stage import KAIMING, SIZES, assert_alike, five_steps

from proglora_jax.methods.ewc import EWC
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.proglora_static import ProgLoRAStatic


def test_the_first_stage_of_a_family_is_plain_lora_bit_for_bit():
    # that a program is compiled in one part, as all tests have it, changes no bit
    flags = re.sub(r"--xla_backend_extra_options=\S*", "", os.environ["XLA_FLAGS"])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(Path(__file__).with_name("first_stage.py"))]
    environment = {**os.environ, "XLA_FLAGS": flags, "TESTS_WITH_EMITTERS": "newer", "JAX_DISABLE_MOST_OPTIMIZATIONS": "false"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0 and "7 passed" in done.stdout, done.stdout[-3000:]


def test_without_a_past_ewc_is_plain_lora():
    """Its penalty is 0 in the first stage."""
    losses, blocks, _, _ = five_steps(LoRA(**KAIMING))
    mine, same, _, _ = five_steps(EWC(**KAIMING))
    assert_alike(same, blocks)
    np.testing.assert_allclose(mine, losses, rtol=1e-6)


def test_empty_slots_change_the_first_stage_by_rounding_only():
    losses = five_steps(LoRA(**SIZES))[0]
    np.testing.assert_allclose(five_steps(ProgLoRAStatic())[0], losses, rtol=1e-5)
