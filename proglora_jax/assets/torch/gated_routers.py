"""How blocks are gated, in torch: the ways in which the gates of the methods follow from a prompt; used by gated_llava.py beside it.

Each Router below reads a prompt (`read`) and then gives every adapted linear its gates (`gate`), for the prompt and for the tokens that
are generated after it. Its tensors are those of routing.safetensors, its settings those of "routing" in routing.json.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn import functional


class Prompt(NamedTuple):
    """What a router sees of a batch of prompts.

    Attributes:
        embeddings: [B, T, D] input embeddings.
        routed: bool[B, T] the tokens that route.
        real: bool[B, T] all tokens of the prompts, image and template included.
        image: f32[B, Dv] class token of the vision tower; zeros without an image.
        shown: bool[B] prompts with an image.
    """

    embeddings: torch.Tensor
    routed: torch.Tensor
    real: torch.Tensor
    image: torch.Tensor
    shown: torch.Tensor


def mean(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Mean over the positions of a mask, f32[B, D]; zeros where there is none."""
    return torch.where(mask[..., None], x.float(), 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)


def largest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """bool[..., N]: which are the `count` largest; of equal ones the first."""
    order = scores.argsort(dim=-1, descending=True, stable=True)[..., :count]
    return torch.zeros_like(scores, dtype=torch.bool).scatter(-1, order, True)


class Router(torch.nn.Module):
    """What is common to all ways.

    Attributes:
        gates: f32[B, M] of the prompts read last, for people to look at.
        prompt: the prompts while they are being read, None after.
    """

    by_rank = False  # whether a gate belongs to a single rank; else to a block
    reads_first = False  # whether it must have read the prompt before the image goes through the projector

    def __init__(self, how: dict, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.how, self.gates, self.prompt, self.rows = how, None, None, 0
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())

    def read(self, prompt: Prompt) -> None:
        """Called before the decoder reads prompts."""
        self.prompt, self.rows = prompt, len(prompt.routed)

    def enter(self, layer: int, h: torch.Tensor) -> None:
        """Called before each decoder layer with what enters it, [B, T, D]."""

    def end(self) -> None:
        """Called when the decoder has read the prompts."""
        self.prompt = None

    def gate(self, x: torch.Tensor, layer: int, linear: str) -> torch.Tensor:
        """f32[B, T or 1, M] gates of a linear's blocks (or ranks) for its input x [B, T, d_in]; layer -1 is the image's projector."""
        raise NotImplementedError

    def check(self, x: torch.Tensor) -> None:
        """Refuses rows that are not the prompts read last."""
        if len(x) != self.rows:
            raise RuntimeError("no gates for these prompts; call GatedLlava itself or its generate, not the parts of it")


class PromptRouter(Router):
    """One set of gates per prompt: w = softmax(<projector(z), key> / temperature), z the pooled input embeddings of the instruction."""

    def read(self, prompt: Prompt) -> None:
        """Makes the gates; they serve all layers and tokens."""
        super().read(prompt)
        self.gates = self(prompt.embeddings, prompt.routed)

    def gate(self, x: torch.Tensor, layer: int, linear: str) -> torch.Tensor:
        """The prompts' gates, whatever the linear."""
        self.check(x)
        return self.gates[:, None]

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """f32[B, M] from embeddings [B, T, D] and the positions that count, bool[B, T]."""
        if self.how["pool"] == "max":
            z = embeddings.float().masked_fill(~mask[..., None], -torch.inf).amax(1)
            z = torch.where(mask.any(1, keepdim=True), z, 0.0)
        else:
            z = mean(embeddings, mask)
        query, keys = self.query(z), self.keys
        if self.how["score"] == "cosine":
            query, keys = functional.normalize(query, dim=-1), functional.normalize(keys, dim=-1)
        scores = query @ keys.T / self.how["temperature"]
        return scores.softmax(-1) if self.how["weights"] == "softmax" else scores

    def query(self, z: torch.Tensor) -> torch.Tensor:
        """LayerNorm(W2 silu(W1 z + b1) + b2), or the released code's LayerNorm(silu(W2 W1 z)), or z itself; f32[B, D]."""
        if self.how["query"] == "none":
            return z
        if self.how["query"] == "paper":
            h = functional.silu(functional.linear(z, self.linear_1_weight, self.linear_1_bias))
            h = functional.linear(h, self.linear_2_weight, self.linear_2_bias)
        else:
            h = functional.silu(z @ self.linear_1_weight.T @ self.linear_2_weight.T)
        return functional.layer_norm(h, h.shape[-1:], self.norm_weight, self.norm_bias, 1e-5)


class LinearRouter(Router):
    """A router in every linear: gates = softmax(W x) of its `top` largest, token by token, or once per prompt.

    Where there are several tasks, each with routers of its own, a prompt takes those of the task whose keys are nearest to the mean
    embedding of its instruction and to its image: the largest sum of the two cosines.
    """

    def read(self, prompt: Prompt) -> None:
        """Selects each prompt's task."""
        super().read(prompt)
        self.seen, self.kept = [], {}
        self.task = torch.zeros(self.rows, dtype=torch.long, device=prompt.routed.device)
        if self.how["tasks"] > 1:
            score = self.cosines(mean(prompt.embeddings, prompt.routed), self.text_keys)
            self.task = (score + self.cosines(prompt.image, self.image_keys) * prompt.shown[:, None]).argmax(1)

    @staticmethod
    def cosines(query: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """f32[B, tasks]."""
        return functional.normalize(query, dim=-1) @ functional.normalize(keys, dim=-1).T

    def gate(self, x: torch.Tensor, layer: int, linear: str) -> torch.Tensor:
        """By the linear's own input; what is fixed for the prompt is kept for the tokens behind it."""
        self.check(x)
        if self.how["input"] != "token" and self.prompt is None:
            return self.kept[layer, linear]
        router = self.get_buffer(f"router_{linear}")[layer][self.task]  # [B, M, d_in]
        logits = self.pick(x).float() @ router.mT  # [B, T or 1, M]
        keep = largest(logits, self.how["top"])
        if self.how["renormalise"]:
            gates = logits.masked_fill(~keep, -torch.inf).softmax(-1)
        else:
            gates = logits.softmax(-1) * keep
        if self.prompt is not None:
            self.kept[layer, linear] = gates if self.how["input"] != "token" else None
            self.seen.append(gates[:, 0] if gates.shape[1] == 1 else mean(gates, self.prompt.real))
        return gates

    def pick(self, x: torch.Tensor) -> torch.Tensor:
        """The positions that the router reads: all, the first of the prompt, or the prompt's mean; [B, T or 1, d_in]."""
        if self.how["input"] == "token":
            return x
        if self.how["input"] == "first_token":
            return x[torch.arange(len(x), device=x.device), self.prompt.real.int().argmax(1)][:, None]
        return mean(x, self.prompt.real)[:, None]

    def end(self) -> None:
        """The mean gates over positions, linears and layers are shown."""
        super().end()
        self.gates = torch.stack(self.seen).mean(0)


class LayerRouter(Router):
    """A router in every layer: gates = softmax(W xbar + b) of the layer's blocks, xbar the prompt's mean of what enters the layer."""

    def read(self, prompt: Prompt) -> None:
        """The gates follow layer by layer."""
        super().read(prompt)
        self.own = []

    def enter(self, layer: int, h: torch.Tensor) -> None:
        """Makes a layer's gates; they serve the tokens behind the prompt too."""
        if self.prompt is not None:
            logits = mean(h, self.prompt.real) @ self.rows_weight[layer].T + self.rows_bias[layer]
            self.own.append(logits.masked_fill(self.exists[layer] == 0, -torch.inf).softmax(-1))

    def gate(self, x: torch.Tensor, layer: int, linear: str) -> torch.Tensor:
        """The layer's gates."""
        self.check(x)
        return self.own[layer][:, None]

    def end(self) -> None:
        """The mean gates over the upper layers, those that may have more than one block, are shown."""
        super().end()
        self.gates = torch.stack(self.own[-self.how["growing"] :]).mean(0)


class RankRouter(Router):
    """Single ranks that are on or off: in each layer, and in the projector, the `top` ranks whose keys score highest.

    The score of a rank is <q_text, k_text> + image_weight <q_image, k_image>, all of them unit vectors: the mean word embedding of the
    instruction and the image's class token. Scores are rounded, so that keys that are equal tie; then the first rank is taken.
    """

    by_rank = reads_first = True

    def read(self, prompt: Prompt) -> None:
        """Chooses each layer's ranks; the last of the choices is the projector's."""
        super().read(prompt)
        unit = lambda x: functional.normalize(x, dim=-1)
        scores = torch.einsum("bd,lrd->lbr", unit(mean(prompt.embeddings, prompt.routed)), unit(self.text_keys))
        scores = scores + self.how["image_weight"] * torch.einsum("bd,lrd->lbr", unit(prompt.image), unit(self.image_keys))
        self.chosen = largest(torch.round(scores, decimals=self.how["digits"]), self.how["top"]).float()  # [L + 1, B, R]
        self.shown = prompt.shown
        by_task = self.chosen.sum(0) @ functional.one_hot(self.origin.long(), self.how["tasks"]).float()
        self.gates = by_task / by_task.sum(1, keepdim=True)  # each task's share

    def gate(self, x: torch.Tensor, layer: int, linear: str) -> torch.Tensor:
        """1 for the ranks that were chosen, 0 for the others."""
        if layer < 0:
            return self.chosen[-1][self.shown][:, None]
        self.check(x)
        return self.chosen[layer][:, None]


ROUTERS = {"prompt": PromptRouter, "linear": LinearRouter, "layer": LayerRouter, "rank": RankRouter}
