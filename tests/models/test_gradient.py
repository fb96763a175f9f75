"""Training all parameters: the gradient of every one against torch's."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import tiny_hf
import torch

from proglora_jax.checkpoints.hf_export import hf_entries
from proglora_jax.checkpoints.hf_import import load_llava
from proglora_jax.checkpoints.names import canonical
from proglora_jax.models.llava import Llava


def test_gradient_of_every_parameter_is_torchs(rng, tmp_path):
    theirs = tiny_hf.make("grouped")
    theirs.save_pretrained(tmp_path)
    ours = load_llava(tmp_path, jnp.float32)
    tokens, length, image = tiny_hf.batch(theirs, rng, lengths=(6, 8), images=(True, True))
    labels = np.where(np.arange(tokens.shape[1])[None] < length[:, None], tokens, -100)
    labels[:, :7] = -100
    theirs(**tiny_hf.torch_inputs(tokens, length, image), labels=torch.tensor(labels, dtype=torch.long)).loss.backward()
    expected = {canonical(name): parameter.grad for name, parameter in theirs.named_parameters()}

    @jax.jit
    @jax.value_and_grad
    def gradient(tree):
        llava = Llava.from_tree(ours.config, tree)
        hidden = llava.decode(llava.embed(tokens, llava.project(llava.encode_image(image, trainable=True)))).hidden
        scores = jax.nn.log_softmax(llava.logits(hidden))[:, :-1]
        kept = labels[:, 1:] != -100
        picked = jnp.take_along_axis(scores, np.where(kept, labels[:, 1:], 0)[..., None], axis=-1)[..., 0]
        return -jnp.sum(picked * kept) / kept.sum()

    value, tree = gradient(ours.to_tree())
    for entry in hf_entries(Llava.from_tree(ours.config, tree)):
        name, actual = entry.name, entry.read()
        if expected[name] is None:  # a layer of the vision tower that the feature layer does not need
            assert not np.any(actual), name
        else:
            # Biases of keys have a gradient of exactly 0 (softmax does not see them): there both sides hold rounding only.
            scale = expected[name].abs().max().item()
            np.testing.assert_allclose(actual, expected[name], rtol=1e-4, atol=1e-6 + 1e-5 * scale, err_msg=name)
