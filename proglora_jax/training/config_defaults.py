"""Configs that earlier versions wrote: fields that came later have their default, which computes what was computed before."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from proglora_jax.data.errors import UserError
from proglora_jax.methods.registry import method_class
from proglora_jax.training.settings import SECTIONS


def completed(config: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """A config with the default of every field that it does not name; a section or method that is not known stays as it is.

    Args:
        config: {section: {field: value}}, the method's name among its fields.
    """
    whole = {section: dict(fields) for section, fields in config.items()}
    for section, cls in [*SECTIONS.items(), ("method", _method(whole))]:
        if cls is not None:
            whole[section] = _defaults(cls) | whole.get(section, {})
    return whole


def _defaults(cls: type) -> dict[str, Any]:
    return {field.name: field.default for field in dataclasses.fields(cls) if field.default is not dataclasses.MISSING}


def _method(config: Mapping[str, Mapping[str, Any]]) -> type | None:
    try:
        return method_class(str(config.get("method", {}).get("name", "")))
    except UserError:
        return None
