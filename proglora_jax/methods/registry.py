"""The one table of methods: a new method is a file and a row here."""

from __future__ import annotations

from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Method
from proglora_jax.methods.branchlora import BranchLoRA
from proglora_jax.methods.ewc import EWC
from proglora_jax.methods.lora import LoRA, MultiTask, ZeroShot
from proglora_jax.methods.lwf import LwF
from proglora_jax.methods.mocl import MoCL
from proglora_jax.methods.moelora import MoELoRA
from proglora_jax.methods.olora import OLoRA
from proglora_jax.methods.pclr import PCLR
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.methods.proglora_light import ProgLoRALight
from proglora_jax.methods.proglora_static import ProgLoRAStatic
from proglora_jax.methods.sema import SEMA

_ROWS: tuple[type[Method], ...] = (
    ZeroShot,
    MultiTask,
    LoRA,
    MoELoRA,
    LwF,
    EWC,
    OLoRA,
    SEMA,
    MoCL,
    BranchLoRA,
    PCLR,
    ProgLoRAStatic,
    ProgLoRADynamic,
    ProgLoRALight,
)


def _table(rows: tuple[type[Method], ...]) -> dict[str, type[Method]]:
    table: dict[str, type[Method]] = {}
    for row in rows:
        if row.name in table:
            raise ValueError(f"two methods are called '{row.name}': {table[row.name].__qualname__} and {row.__qualname__}")
        table[row.name] = row
    return table


METHODS = _table(_ROWS)
NAMES = tuple(METHODS)


def method_class(name: str) -> type[Method]:
    """The class of a method.

    Raises:
        UserError: "config.method.name='<name>': no such method; known: ..."
    """
    if name not in METHODS:
        raise UserError(f"config.method.name='{name}': no such method; known: {', '.join(NAMES)}")
    return METHODS[name]
