"""Reads a config file outside of a run: "configs/coin.py:method=lora" and --config.section.field=value, as the main job takes them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from absl import flags
from ml_collections import config_flags

from proglora_jax.data.errors import UserError


def load_config(named: str, overrides: Sequence[str] = ()) -> dict[str, dict[str, Any]]:
    """The config as plain dicts.

    Args:
        named: path of the config file, with its argument behind a colon or without.
        overrides: flags such as "--config.train.micro_batches=4".

    Raises:
        UserError: "--config=<file>: no such file; ..." or what the file, its argument or an override is refused for.
    """
    path = named.partition(":")[0]
    if not os.path.isfile(path):
        raise UserError(f"--config={path}: no such file; give a config file, e.g. configs/coin_mini.py")
    strange = [flag for flag in overrides if not flag.startswith("--config.") or "=" not in flag]
    if strange:
        raise UserError(f"{strange[0]}: unknown argument; fields are set with --config.section.field=value")
    values, arguments = flags.FlagValues(), ["config", f"--config={named}", *overrides]
    holder = config_flags.DEFINE_config_file("config", None, "The config.", flag_values=values, sys_argv=arguments)
    try:
        values(arguments)
        return holder.value.to_dict()
    except Exception as error:  # the config file runs here, and may raise anything
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError(f"--config={named}: {lines[-1] if lines else type(error).__name__}") from error
