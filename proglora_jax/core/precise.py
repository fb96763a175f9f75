"""Products of float32 arrays in all of float32: by default accelerators round their operands to TF32 or bfloat16."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

einsum = partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
matmul = partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
