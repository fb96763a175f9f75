"""Exports of methods with experts: one of them alone is an adapter of its own rank; what is advised instead of a merge can be done."""

from __future__ import annotations

import json

import pytest
from test_export import difference, exported, world  # noqa: F401 (world is a fixture)

from proglora_jax.continual import torch_check
from proglora_jax.continual.export import export_adapter, export_merged
from proglora_jax.continual.export_gates import export_dynamic
from proglora_jax.data.errors import UserError
from proglora_jax.methods.base import Method
from proglora_jax.methods.moelora import MoELoRA

OPTIONS = {"moelora": {"experts": 2}, "branchlora": {"experts": 2, "topk": 1}, "mocl": {}}


@pytest.mark.parametrize("name, rank", [("moelora", 1), ("branchlora", 1), ("mocl", 2)])
def test_one_expert_alone_has_the_logits_of_ours_in_torch(world, tmp_path, name, rank):  # noqa: F811
    said = exported(export_adapter, world.run(name, **OPTIONS[name]), tmp_path / "out", block=1, verify=True)
    assert difference(said) < torch_check.TOLERANCE
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, 2.0 * rank)


def test_all_forms_that_there_are_get_named(world, tmp_path):  # noqa: F811
    forms = r"one block alone \(--kind adapter --block\), or all blocks with their gates \(--kind dynamic\)$"
    for name in ("proglora_dynamic", *OPTIONS):
        for how in (export_merged, export_adapter):
            with pytest.raises(UserError, match=f"{name} cannot be folded into one adapter: .*{forms}"):
                exported(how, world.run(name, **OPTIONS.get(name, {})), tmp_path / "out")
    with pytest.raises(UserError, match="lora has no gates that depend on the input; use --kind adapter or --kind merged$"):
        exported(export_dynamic, world.run("lora"), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_method_that_does_not_describe_its_gates_is_refused(world, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(MoELoRA, "routing", Method.routing)
    reason = r"how the gates of moelora follow from a prompt is not described by the method; what can be exported is one block alone .*\)$"
    with pytest.raises(UserError, match=reason):
        exported(export_dynamic, world.run("moelora", **OPTIONS["moelora"]), tmp_path / "out")
    assert not list(tmp_path.iterdir())
