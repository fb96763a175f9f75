"""Exports of methods with experts: one of them alone is an adapter of its own rank; what is advised instead of a merge can be done."""

from __future__ import annotations

import json

import pytest
from test_export import difference, exported, world  # noqa: F401 (world is a fixture)

from proglora_jax.continual import torch_check
from proglora_jax.continual.export import export_adapter, export_merged
from proglora_jax.continual.export_gates import export_dynamic
from proglora_jax.data.errors import UserError

OPTIONS = {"moelora": {"experts": 2}, "branchlora": {"experts": 2, "topk": 1}, "mocl": {}}


@pytest.mark.parametrize("name, rank", [("moelora", 1), ("branchlora", 1), ("mocl", 2)])
def test_one_expert_alone_has_the_logits_of_ours_in_torch(world, tmp_path, name, rank):  # noqa: F811
    said = exported(export_adapter, world.run(name, **OPTIONS[name]), tmp_path / "out", block=1, verify=True)
    assert difference(said) < torch_check.TOLERANCE
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, 2.0 * rank)


@pytest.mark.parametrize("name", ["moelora", "branchlora"])
def test_only_what_can_be_done_is_advised(world, tmp_path, name):  # noqa: F811
    workdir, advice = world.run(name, **OPTIONS[name]), "what can be exported is one block alone (--kind adapter --block)"
    for how in (export_merged, export_adapter, export_dynamic):
        with pytest.raises(UserError) as error:
            exported(how, workdir, tmp_path / "out")
        reason = f"how the gates of {name} follow" if how is export_dynamic else f"{name} cannot be folded into one adapter: "
        assert reason in str(error.value) and str(error.value).endswith(f"; {advice}"), error.value
    assert not list(tmp_path.iterdir())


def test_all_forms_that_there_are_get_named(world, tmp_path):  # noqa: F811
    for name in ("proglora_dynamic", "mocl"):
        forms = r"one block alone \(--kind adapter --block\), or all blocks with their gates \(--kind dynamic\)$"
        with pytest.raises(UserError, match=forms):
            exported(export_merged, world.run(name, **OPTIONS.get(name, {})), tmp_path / "out")
    with pytest.raises(UserError, match="lora has no gates that depend on the input; use --kind adapter or --kind merged$"):
        exported(export_dynamic, world.run("lora"), tmp_path / "out")
