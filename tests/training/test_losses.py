"""Cross-entropy at label slots against transformers' loss over the whole sequence, and every way of averaging it."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_hf
import tiny_llava
import torch

from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.data.batch import ANSWER
from proglora_jax.data.errors import UserError
from proglora_jax.models.layers import gather_positions
from proglora_jax.training import losses


def test_gather_takes_the_hidden_states_before_the_labels(rng):
    hidden, index = rng.standard_normal((2, 5, 3)).astype(np.float32), np.array([[4, 0, 0], [2, 1, 3]])
    np.testing.assert_array_equal(gather_positions(hidden, index), np.stack([hidden[0, [4, 0, 0]], hidden[1, [2, 1, 3]]]))


def test_token_nll_is_torchs_and_masks_exactly(rng):
    logits = 30 * rng.standard_normal((2, 4, 7)).astype(np.float32)
    labels, mask = rng.integers(0, 7, (2, 4)), rng.random((2, 4)) < 0.6
    expected = torch.nn.functional.cross_entropy(torch.tensor(logits).transpose(1, 2), torch.tensor(labels), reduction="none").numpy()
    nll = losses.token_nll(logits, labels, mask)
    np.testing.assert_allclose(nll, np.where(mask, expected, 0), rtol=1e-5, atol=1e-5)
    gradient = jax.grad(lambda logits: losses.token_nll(logits, labels, mask).sum())(logits)
    assert not np.any(gradient[~mask]) and np.all(np.isfinite(gradient))
    with pytest.raises(AssertionError):
        losses.token_nll(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(mask[:, :2]))


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A tiny LLaVA of transformers and the same in ours."""
    theirs, folder = tiny_hf.make("plain", seed=5), tmp_path_factory.mktemp("llava")
    theirs.save_pretrained(folder)
    return theirs, load_llava(folder, jnp.float32)


def whole_sequence(batch) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """A batch as transformers trains on it: labels over the whole sequence, -100 everywhere but in answers."""
    labels = np.where(batch["segments"] == ANSWER, batch["tokens"], -100)
    return tiny_hf.torch_inputs(batch["tokens"], batch["length"], batch["image"]), torch.tensor(labels, dtype=torch.long)


def test_loss_at_label_slots_is_transformers_shifted_loss(pair, rng):
    theirs, ours = pair
    rows = [tiny_llava.row(rng, i % 2, image=i != 2, words=2 + i, answer=(1, 4, 2, 0)[i]) for i in range(4)]  # the last has no answer
    batch = tiny_llava.batch(rows, positions=24, labels=8)  # more room than any row needs
    inputs, labels = whole_sequence(batch)
    expected = theirs(**inputs, labels=labels).loss.item()

    @jax.jit
    def loss(llava, batch):
        x = llava.embed(batch["tokens"], llava.project(llava.encode_image(batch["image"])))
        hidden = llava.decode(x).hidden
        nll = losses.token_nll(llava.logits(gather_positions(hidden, batch["label_index"])), batch["labels"], batch["label_mask"])
        return nll.sum(1), (nll.sum(1) * losses.row_scales(batch["label_mask"], batch["weight"], "global_token_mean", 1)).sum()

    rowwise, value = loss(ours, batch)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert rowwise[3] == 0
    # Each row alone, so that no row's error hides in the mean.
    for row in range(3):
        one, targets = whole_sequence({k: v[row : row + 1] for k, v in batch.items()})
        alone = theirs(**one, labels=targets).loss.item()
        np.testing.assert_allclose(rowwise[row] / batch["label_mask"][row].sum(), alone, rtol=1e-5, err_msg=str(row))


MASK = np.zeros((8, 5), bool)
for _row, _count in enumerate((1, 5, 2, 0, 3, 3, 0, 4)):
    MASK[_row, :_count] = True
COUNTS, WEIGHT = MASK.sum(1), np.float32([1, 2, 1, 1, 0.5, 1, 3, 1])


def loop_loss(nll, weight, groups):
    """Mean over groups of (sum over a group's tokens of weight * nll) / (the group's tokens), as LLaVA's trainer."""
    total = 0.0
    for rows in groups:
        total += (nll[rows].sum(1) * weight[rows]).sum() / max(MASK[rows].sum(), 1)
    return total / len(groups)


@pytest.mark.parametrize("norm,size", [("global_token_mean", 8), ("global_token_mean", 3), ("micro_batch_mean", 8), ("micro_batch_mean", 2),
                                       ("micro_batch_mean", 1)])  # fmt: skip
def test_the_sum_of_scaled_rows_is_the_mean_it_says(rng, norm, size):
    nll = rng.random((8, 5)) * MASK
    scale = losses.row_scales(jnp.asarray(MASK), jnp.asarray(WEIGHT), norm, size)
    groups = np.arange(8).reshape(-1, size) if norm == "micro_batch_mean" else [np.arange(8)]
    np.testing.assert_allclose((nll.sum(1) * scale).sum(), loop_loss(nll, WEIGHT, groups), rtol=1e-6)
    assert np.all(np.isfinite(scale))


def test_the_two_means_differ_under_unequal_counts(rng):
    both = [losses.row_scales(jnp.asarray(MASK), jnp.ones(8), norm, 2) for norm in ("global_token_mean", "micro_batch_mean")]
    assert np.abs(both[0] - both[1]).max() > 0.01
    np.testing.assert_allclose((both[0] * COUNTS).sum(), 1, rtol=1e-6)
    np.testing.assert_allclose((both[1] * COUNTS).sum(), 1, rtol=1e-6)


@pytest.mark.parametrize("norm", ["global_token_mean", "micro_batch_mean"])
def test_replay_as_a_batch_of_its_own_has_its_own_mean(rng, norm):
    nll, replayed = rng.random((8, 5)) * MASK, np.array([0, 0, 0, 0, 0, 1, 1, 1], bool)
    weight = np.where(replayed, 2.0, 1.0)
    scale = losses.row_scales(jnp.asarray(MASK), jnp.asarray(weight), norm, 8, jnp.asarray(replayed))
    expected = nll[~replayed].sum() / MASK[~replayed].sum() + 2.0 * nll[replayed].sum() / MASK[replayed].sum()
    np.testing.assert_allclose((nll.sum(1) * scale).sum(), expected, rtol=1e-6)


@pytest.mark.parametrize("norm", ["global_token_mean", "micro_batch_mean"])
def test_no_supervised_token_at_all_gives_a_finite_zero(norm):
    scale = losses.row_scales(jnp.zeros((4, 3), bool), jnp.ones(4), norm, 2)
    assert np.all(np.isfinite(scale)) and (np.zeros(4) * scale).sum() == 0
    apart = losses.row_scales(jnp.asarray(MASK[:4]), jnp.ones(4), norm, 2, jnp.zeros(4, bool))  # nothing is replayed
    np.testing.assert_allclose((apart * COUNTS[:4]).sum(), 1, rtol=1e-6)


def test_groups_must_divide_the_batch():
    with pytest.raises(UserError, match=r"config.train.loss_group_size=3: must divide the batch of 8 rows"):
        losses.row_scales(jnp.asarray(MASK), jnp.ones(8), "micro_batch_mean", 3)
