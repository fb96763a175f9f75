"""What `tools convert to-hf` does with its parsed arguments."""

from __future__ import annotations

from typing import Any

from proglora_jax.continual.export import export_adapter, export_merged
from proglora_jax.continual.export_gates import export_dynamic
from proglora_jax.data.errors import UserError


def export_command(arguments: Any) -> None:
    """Writes the kind of export that was asked for.

    Raises:
        UserError: for options that do not belong to it; as the three functions that write.
    """
    names = ("stage", "base", "vision", "projector", "verify", "tolerance")
    common = {name: getattr(arguments, name) for name in names}
    if arguments.block is not None and arguments.kind != "adapter":
        raise UserError("--block: a block alone is an adapter, not a model; use --kind adapter")
    if arguments.dtype is not None and arguments.kind != "merged":
        raise UserError("--dtype: adapters are written in float32, as they were trained; use it with --kind merged")
    if arguments.kind == "merged":
        export_merged(arguments.workdir, arguments.out, task=arguments.task, dtype=arguments.dtype, **common)
    elif arguments.kind == "dynamic":
        if arguments.task is not None:
            raise UserError("--task: with --kind dynamic the prompt chooses among the blocks of all tasks; leave it out")
        export_dynamic(arguments.workdir, arguments.out, **common)
    else:
        export_adapter(arguments.workdir, arguments.out, task=arguments.task, block=arguments.block, **common)
