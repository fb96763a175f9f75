"""Every option of ProgLoRA (dynamic) that concerns gates, keys, blocks and recall: what it changes, and bad values by name."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import routing_world as world

from proglora_jax.adapters import gates as gating
from proglora_jax.adapters import lowrank
from proglora_jax.core import tree as trees
from proglora_jax.data import batch as codes
from proglora_jax.data.errors import UserError
from proglora_jax.data.replay import replay_indices
from proglora_jax.methods.lora import LoRA
from proglora_jax.methods.proglora import ProgLoRADynamic
from proglora_jax.methods.proglora_static import ProgLoRAStatic
from proglora_jax.training import optim
from proglora_jax.training.settings import TrainSettings

SMALL = dict(rank=2, alpha=4.0, proj_width=5, recall_per_task=8)


def dynamic(**fields) -> ProgLoRADynamic:
    return ProgLoRADynamic(**(SMALL | fields))


@pytest.fixture(scope="module")
def third():
    """A state after three stages and a batch of the last task."""
    return world.stages(dynamic(), 3), world.batch_of(2)


def logits_of(method, state, batch):
    """h . key / temperature, by hand, from the method's own feature."""
    z = method.route(world.inputs(batch, 2))
    h = gating.query_projector(state.params["query_projector"], z, method.proj_variant)
    keys = np.concatenate([np.asarray(state.params["keys"])[:2], np.asarray(state.params["key"])[None]])
    return np.asarray(h) @ keys.T


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


# ---- gates


@pytest.mark.parametrize("tokens,included", [
    ("instruction", [codes.INSTRUCTION]),
    ("text_prompt", [codes.TEMPLATE, codes.INSTRUCTION]),
    ("multimodal_prompt", [codes.TEMPLATE, codes.INSTRUCTION, codes.IMAGE]),
])  # fmt: skip
def test_routing_tokens_say_what_is_pooled(tokens, included):
    batch = world.batch_of(1)
    x, keep = world.embed(batch), np.isin(batch["segments"], included)
    expected = np.stack([x[row][keep[row]].max(0) for row in range(len(x))])
    np.testing.assert_array_equal(dynamic(routing_tokens=tokens).route(world.inputs(batch, 1)), expected)


def test_the_released_codes_feature_takes_answers_and_zero_padding():
    batch = world.batch_of(1)
    x, real = world.embed(batch), batch["segments"] != codes.PAD
    longest = real.sum(1).max()
    padded = [np.concatenate([x[row][real[row]], np.zeros((longest - real[row].sum(), world.WIDTH))]).max(0) for row in range(len(x))]
    assert len(set(real.sum(1))) > 1 and np.any(np.stack(padded) == 0)
    np.testing.assert_allclose(dynamic(routing_tokens="released_code").route(world.inputs(batch, 1)), padded, rtol=1e-6)


@pytest.mark.parametrize("temperature,divisor", [("sqrt_d", np.sqrt(world.WIDTH)), ("1.0", 1.0), ("0.5", 0.5), ("64", 64.0)])
def test_the_temperature_divides_the_logits(third, temperature, divisor):
    state, batch = third
    method = dynamic(temperature=temperature)
    np.testing.assert_allclose(world.gates(method, state, batch), softmax(logits_of(method, state, batch) / divisor), rtol=1e-4, atol=1e-6)


def test_the_projectors_variant_and_width(third):
    state, batch = third
    paper, code = (world.gates(dynamic(proj_variant=variant), state, batch) for variant in ("paper", "code"))
    method = dynamic(proj_variant="code")
    np.testing.assert_allclose(code, softmax(logits_of(method, state, batch) / np.sqrt(world.WIDTH)), rtol=1e-4, atol=1e-6)
    assert np.abs(paper - code).max() > 1e-2
    assert world.start(dynamic(proj_width=7)).params["query_projector"]["linear_1"]["kernel"].shape == (world.WIDTH, 7)


def test_the_split_maximum_of_the_released_code(third):
    state, batch = third
    method = dynamic(split_max_quirk=True)
    logits = logits_of(method, state, batch) / np.sqrt(world.WIDTH)
    shifted = np.concatenate([logits[:, :2] - logits[:, :2].max(), logits[:, 2:] - logits[:, 2:].max()], axis=1)
    np.testing.assert_allclose(world.gates(method, state, batch), softmax(shifted), rtol=1e-4, atol=1e-6)
    alone = np.stack([world.gates(method, state, {k: v[i : i + 1] for k, v in batch.items()})[0] for i in range(6)])
    np.testing.assert_allclose(alone[:, 2], alone[:, :2].max(1), rtol=1e-5)  # at batch 1 the newest ties with the best old block
    assert np.abs(alone - world.gates(method, state, batch)).max() > 1e-3


@pytest.mark.parametrize("progress,bonus", [(0.0, 6.0), (0.2, 3.0), (0.4, 0.0), (0.9, 0.0)])
def test_the_bonus_lifts_the_newest_block_while_it_trains(third, progress, bonus):
    state, batch = third
    method = dynamic(gate_bonus=6.0, gate_bonus_fraction=0.4)
    logits = logits_of(method, state, batch) / np.sqrt(world.WIDTH) + bonus * np.array([0, 0, 1])
    np.testing.assert_allclose(world.gates(method, state, batch, training=True, progress=progress), softmax(logits), rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(world.gates(method, state, batch, progress=progress), world.gates(dynamic(), state, batch))


def test_gates_learn_at_their_own_rate():
    settings = TrainSettings(learning_rate=1e-3, warmup_fraction=0.0, schedule="constant")
    rates = optim.learning_rates(settings, dynamic(gate_lr_multiplier=7.0), 0, 10)
    np.testing.assert_allclose([rates["adapter"], rates["gate"]], [1e-3, 7e-3])


# ---- keys


def test_fresh_keys_are_drawn_anew_and_scaled():
    method = dynamic(key_scale=3.0)
    keys = [world.begin(method, world.stages(method, index), index).params["key"] for index in range(3)]
    plain = [world.begin(dynamic(), world.stages(dynamic(), index), index).params["key"] for index in range(3)]
    for index in range(3):
        np.testing.assert_allclose(keys[index], 3 * np.asarray(plain[index]), rtol=1e-6)
        assert np.abs(plain[index]).max() <= np.sqrt(6 / (world.WIDTH + 1)) * 1.000001
    assert not np.allclose(plain[0], plain[1]) and not np.allclose(plain[1], plain[2])


def test_a_key_may_start_as_the_one_before():
    method = dynamic(key_init="copy_prev")
    ended = world.stages(method, 1)
    state = world.begin(method, ended, 1)
    np.testing.assert_array_equal(state.params["key"], ended.params["key"])
    np.testing.assert_array_equal(state.params["keys"][0], ended.params["key"])


@pytest.mark.parametrize("index", [0, 1, 2])
def test_a_key_may_start_as_the_mean_query(index):
    method = dynamic(key_init="mean_feature", key_scale=2.0)
    before = world.stages(method, index)
    state = world.begin(method, before, index)
    numbers = replay_indices(world.SIZE, 8, 0, f"task{index}")
    queries = world.prober(method, index)(dataclasses.replace(before, stage=jnp.int32(index)), numbers)["h"]
    mean = queries.mean(0)
    np.testing.assert_allclose(state.params["key"], 2 * mean / np.linalg.norm(mean), rtol=1e-5)


@pytest.mark.parametrize("trains", [False, True])
def test_old_keys_train_by_flag_only(third, trains):
    state, batch = third
    method = dynamic(train_old_keys=trains)
    assert ("keys" in {path for path, on in method.trainable_mask(state, world.info(2)).items() if on}) == trains
    loss = lambda params: (method.gates(params, state.memory, world.inputs(batch, 2, training=True))["blocks"] ** 2).sum()
    gradient = jax.grad(loss)(state.params)["keys"]
    np.testing.assert_array_equal(np.any(gradient, axis=1), [trains, trains, False])  # never the place of the newest


def test_trained_old_keys_survive_a_restart():
    method = dynamic(train_old_keys=True)
    states = [world.stages(method, count) for count in (1, 2, 3)]
    assert not np.array_equal(states[2].params["keys"][0], states[0].params["key"])
    restored = method.from_disk(world.on_disk(method, states), world.start(method), 2)
    np.testing.assert_array_equal(restored.params["keys"], states[2].params["keys"])


# ---- recall


def extra(method, state, key=0):
    return method.extra_loss(state.params, state.memory, world.inputs(world.batch_of(2), 2, training=True), jax.random.key(key))


def test_recall_may_be_left_out():
    state = world.begin(dynamic(), world.stages(dynamic(), 2), 2)
    assert extra(dynamic(recall_enabled=False), state) == (0, {})
    assert extra(dynamic(recall_weight=0.0), state)[0] == 0 and extra(dynamic(), state)[0] > 0
    for fields in ({"recall_per_task": 0}, {"recall_enabled": False}, {"recall_enabled": False, "recall_targets": "recompute"}):
        method = dynamic(**fields)
        state = world.begin(method, world.stages(method, 2), 2)
        assert not np.any(state.memory["mask"]) and extra(method, state)[0] == 0


def test_recall_the_other_way_round():
    method = dynamic(recall_kl="pred_target_eps")
    state = world.begin(method, world.stages(method, 2), 2)
    values = []
    for task, row in np.argwhere(np.asarray(state.memory["mask"]) > 0):
        pred = np.asarray(method.weights(state.params, state.memory["features"][task, row][None], jnp.int32(2)), np.float64)[0]
        target = np.asarray(state.memory["targets"][task, row], np.float64) + 1e-8
        values.append((pred * np.log(pred / (target / target.sum()))).sum())
    np.testing.assert_allclose(extra(method, state)[1]["recall"], np.mean(values), rtol=1e-4)


def test_a_batch_of_memory_samples():
    state = world.begin(dynamic(recall_count="fixed"), world.stages(dynamic(), 2), 2)
    full = extra(dynamic(), state)[1]["recall"]
    np.testing.assert_allclose(extra(dynamic(recall_batch=16), state)[1]["recall"], full, rtol=1e-5)  # all that count
    np.testing.assert_allclose(extra(dynamic(recall_batch=24), state)[1]["recall"], full, rtol=1e-5)  # and places that do not
    ones = [float(extra(dynamic(recall_batch=1), state, key)[1]["recall"]) for key in range(12)]
    only = []
    for task in range(2):
        for row in range(8):
            mask = jnp.zeros((3, 8)).at[task, row].set(1.0)
            only.append(float(extra(dynamic(), dataclasses.replace(state, memory=state.memory | {"mask": mask}))[1]["recall"]))
    assert all(np.min(np.abs(np.array(only) - one)) < 1e-5 for one in ones)
    assert len({round(one, 5) for one in ones}) > 4
    assert extra(dynamic(recall_batch=3), state, 0)[0] == extra(dynamic(recall_batch=3), state, 0)[0]


def test_recomputed_targets_are_the_stored_ones_and_survive_a_restart():
    method = dynamic(recall_targets="recompute")
    states = [world.stages(method, count) for count in (1, 2)]
    state = world.begin(method, states[1], 2)
    np.testing.assert_allclose(state.memory["targets"], states[1].memory["targets"], rtol=1e-5, atol=1e-7)
    restored = method.from_disk(world.on_disk(method, states), world.start(method), 1)
    again = world.begin(method, restored, 2)
    np.testing.assert_array_equal(again.memory["targets"], state.memory["targets"])
    # They come from the projector kept from then: another one gives other targets.
    other = jax.tree.map(lambda leaf: np.asarray(leaf) + 0.5, states[1].carry)
    moved = world.begin(method, dataclasses.replace(states[1], carry=other), 2)
    assert np.abs(moved.memory["targets"][1] - state.memory["targets"][1]).max() > 1e-4


# ---- blocks


def test_fused_factors_have_cross_terms(third, rng):
    state, batch = third
    x = jnp.asarray(rng.standard_normal((6, 4, world.WIDTH)), jnp.float32)
    outputs = {}
    for fuse in ("delta", "factor"):
        method = dynamic(fuse=fuse)
        gates = method.gates(state.params, state.memory, world.inputs(batch, 2))
        adapter = method.adapter(state.params, gates, None)
        leaves = {key: leaf[0] for key, leaf in adapter.leaves["q_proj"].items()}
        outputs[fuse] = adapter.delta(("q_proj",), {"q_proj": leaves}, {}, adapter.gates, x)[0]
        weights = np.asarray(gates["blocks"])
        pool, new = state.params["pool"]["q_proj"], state.params["block"]["q_proj"]
        a = [np.asarray(pool["a"])[0][:, :2], np.asarray(pool["a"])[0][:, 2:4], np.asarray(new["a"])[0]]
        b = [np.asarray(pool["b"])[0][:2], np.asarray(pool["b"])[0][2:4], np.asarray(new["b"])[0]]
        pairs = [(m, n) for m in range(3) for n in range(3) if fuse == "factor" or m == n]
        power = lambda row, m, n: weights[row, m] * (weights[row, n] if fuse == "factor" else 1.0)
        expected = [2.0 * sum(power(row, m, n) * (x[row] @ a[m] @ b[n]) for m, n in pairs) for row in range(6)]
        np.testing.assert_allclose(outputs[fuse], expected, rtol=1e-4, atol=1e-5)
    assert np.abs(outputs["delta"] - outputs["factor"]).max() > 0.1


def test_dropout_draws_a_mask_for_each_input_layer_and_step(rng):
    """While training only; one mask for all blocks of a linear, and for all linears that read the same input."""
    method, x = LoRA(rank=2, dropout=0.5), jnp.asarray(rng.standard_normal((2, 3, world.WIDTH)), jnp.float32)
    params = world.train(method, world.start(method), 0).params
    gates = method.gates(params, {}, None)

    def output(key, layer, *names):
        adapter = method.adapter(params, gates, key)
        own = {leaf: value[0] for leaf, value in params["block"]["q_proj"].items()}
        once = {leaf: value[layer] for leaf, value in adapter.layer.items()}
        outputs = adapter.delta(names, dict.fromkeys(names, own), once, gates, x)
        for other in outputs[1:]:
            np.testing.assert_allclose(other, outputs[0], rtol=1e-5, atol=1e-5)
        return np.asarray(outputs[0])

    keys = jax.random.split(jax.random.key(0))
    seen = [output(keys[0], 0, "q_proj"), output(keys[0], 1, "q_proj"), output(keys[0], 0, "k_proj"), output(keys[1], 0, "q_proj")]
    for index, one in enumerate(seen):
        assert all(not np.allclose(one, other) for other in seen[:index])
    np.testing.assert_allclose(seen[0], output(keys[0], 0, "q_proj", "k_proj", "v_proj"), rtol=1e-5, atol=1e-5)
    a, b = (np.asarray(params["block"]["q_proj"][leaf])[0] for leaf in "ab")
    np.testing.assert_allclose(output(None, 0, "q_proj"), method.scale * x @ a @ b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("cls", [LoRA, ProgLoRADynamic, ProgLoRAStatic])
@pytest.mark.parametrize("init", ["normal001", "kaiming"])
def test_a_starts_as_it_says_and_alpha_scales(cls, init):
    method = cls(rank=4, alpha=256.0, a_init=init)
    expected = lowrank.init_block(trees.named_generator(0, "block", 0), world.TARGETS, 4, init)
    for name, leaf in method.init(world.TARGETS, world.PROJECTOR, 3, 0).params["block"].items():
        np.testing.assert_array_equal(leaf["a"], expected[name]["a"])
    assert method.scale == 64.0
    assert (LoRA().rank, LoRA().scale, LoRA().a_init) == (128, 2.0, "kaiming")
    assert (ProgLoRADynamic().rank, ProgLoRADynamic().scale, ProgLoRADynamic().a_init) == (16, 2.0, "normal001")


def test_the_projector_trains_by_flag():
    for cls in (LoRA, ProgLoRADynamic, ProgLoRAStatic):
        for flag in (True, False):
            method = cls(train_mm_projector=flag, rank=2)
            mask = method.trainable_mask(world.start(method), world.info(0))
            assert {on for path, on in mask.items() if path.startswith("mm_projector")} == {flag}


BAD = [
    (LoRA, "rank", 0), (LoRA, "alpha", 0.0), (LoRA, "dropout", 1.0), (LoRA, "dropout", -0.1), (LoRA, "a_init", "zeros"),
    (ProgLoRADynamic, "fuse", "sum"), (ProgLoRADynamic, "pool_chunk", -1), (ProgLoRADynamic, "routing_tokens", "answer"),
    (ProgLoRADynamic, "temperature", "0"), (ProgLoRADynamic, "temperature", "warm"), (ProgLoRADynamic, "temperature", "nan"),
    (ProgLoRADynamic, "proj_variant", "other"), (ProgLoRADynamic, "proj_width", 0), (ProgLoRADynamic, "key_init", "zeros"),
    (ProgLoRADynamic, "key_scale", -1.0), (ProgLoRADynamic, "gate_bonus", -1.0), (ProgLoRADynamic, "gate_bonus_fraction", 0.0),
    (ProgLoRADynamic, "gate_lr_multiplier", -1.0), (ProgLoRADynamic, "recall_weight", -2.0), (ProgLoRADynamic, "recall_per_task", -1),
    (ProgLoRADynamic, "recall_count", "some"), (ProgLoRADynamic, "recall_kl", "js"), (ProgLoRADynamic, "recall_reduction", "max"),
    (ProgLoRADynamic, "recall_batch", -1), (ProgLoRADynamic, "recall_targets", "new"), (ProgLoRADynamic, "match_weight", -1.0),
    (ProgLoRAStatic, "weights", "learned"), (ProgLoRAStatic, "recall_weight", -1.0), (ProgLoRAStatic, "recall_per_task", -1),
    (ProgLoRAStatic, "recall_count", "some"), (ProgLoRAStatic, "replay_block", "old"), (ProgLoRAStatic, "replay_mix", "all"),
]  # fmt: skip


@pytest.mark.parametrize("cls,field,value", BAD, ids=lambda case: getattr(case, "__name__", str(case)))
def test_a_bad_value_is_refused_by_its_name(cls, field, value):
    with pytest.raises(UserError, match=rf"^config\.method\.{field}='?{value}'?: "):
        cls(**{field: value})


def test_a_matching_loss_is_of_one_gate_for_all_layers():
    with pytest.raises(UserError, match=r"^config\.method\.match_weight=1\.0: must be 0 with routing_scope='per_layer'"):
        ProgLoRADynamic(routing_scope="per_layer", match_weight=1.0)
