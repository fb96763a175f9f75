"""What the GPU benchmark measures, in order of importance, at full size and at a tiny one that a CPU runs through the same code."""

from __future__ import annotations

import dataclasses
import re

from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig, llava15_7b


@dataclasses.dataclass(frozen=True)
class Case:
    """One configuration.

    Attributes:
        side: "ours" or "peers" (transformers and PEFT in torch).
        what: "train" or "answer".
        rows: B.
        positions: T, image included.
        blocks: N, of which one trains; ours with one block is plain LoRA, with more ProgLoRA (dynamic).
        rank: r.
        pool: "fused", or "loop", the same sum block by block (what PEFT does).
        attention: as in config.model.attention.
        remat: policy; for peers "none" or "full" (gradient checkpointing).
        dropout: on the adapter's input.
        unroll: layers per turn of the loop over layers; 0 as a run on a GPU has it, no loop.
        compiled: torch.compile, of every layer of the decoder.
    """

    side: str
    what: str
    rows: int
    positions: int = 704
    blocks: int = 8
    rank: int = 16
    pool: str = "fused"
    attention: str = "auto"
    remat: str = "qkvo_mlp"
    dropout: float = 0.0
    unroll: int = 0
    compiled: bool = False

    @property
    def name(self) -> str:
        """Says everything that differs from the defaults."""
        words = [self.side, self.what, f"N={self.blocks}", f"r={self.rank}", f"B={self.rows}", f"S={self.positions}"]
        words += [self.pool] * (self.pool != "fused") + [self.attention] * (self.attention != "auto")
        if self.side == "peers":
            words += ["checkpointing"] * (self.remat == "full")
        elif self.what == "train":
            words += [f"remat {self.remat}"] * (self.remat != "qkvo_mlp")
        words += [f"dropout {self.dropout}"] * bool(self.dropout) + [f"unroll {self.unroll}"] * (self.unroll > 0)
        return " ".join(words + ["torch.compile"] * self.compiled)


def _ours(rows: int, **fields) -> Case:
    return Case("ours", "train", rows, **fields)


def _peers(rows: int, **fields) -> Case:
    return Case("peers", "train", rows, **fields)


MAIN = _ours(16)
# A series shares a process, its weights, and the threads that compile. What the goals ask for comes first. On an H200 the first four took 400
# seconds, with two batches more of the peers. Batches of peers grow until one does not fit or is no quicker. What is compared with one row
# only is compiled with the layers in a loop, which takes a third of the time, as that row is: MAIN with unroll 1.
SERIES: tuple[tuple[Case, ...], ...] = (
    (MAIN, _ours(16, blocks=1), _ours(24), _ours(16, unroll=1), _ours(16, pool="loop", unroll=1),
     _ours(8, blocks=1, rank=128, unroll=1), _ours(8, rank=128, unroll=1)),
    (*(_peers(rows, remat="full") for rows in (16, 32)), *(_peers(rows, remat="none") for rows in (8, 16, 24))),
    tuple(Case("ours", "answer", rows, 640) for rows in (32, 64)),
    tuple(Case("peers", "answer", rows, 640) for rows in (1, 32, 64)),
    (*(_peers(rows, blocks=1, remat="none") for rows in (8, 16, 24)), *(_peers(rows, blocks=1, remat="full") for rows in (16, 32))),
    (_ours(16, positions=640), _ours(8, positions=1024), _ours(8), _ours(4), _ours(16, attention="xla", unroll=1),
     _ours(16, remat="full", unroll=1), _ours(16, remat="qkvo", unroll=1), _ours(8, remat="dots", unroll=1),
     _ours(8, remat="none", unroll=1), _ours(16, dropout=0.05, unroll=1)),
    (_peers(8, blocks=1, remat="none", compiled=True),),
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Of everything that the cases do not say.

    Attributes:
        config: sizes of the model.
        labels: K, supervised tokens a row.
        new_tokens: of an answer.
        dtype: of weights and activations.
        rounds: times that a turn of `steps` steps is timed, at most.
        steps: of a turn, dispatched without waiting; one where a step takes more than a second.
        seconds: after which a case that was timed three times is not timed again.
        tiny: whether numbers mean nothing.
    """

    config: LlavaConfig
    labels: int = 64
    new_tokens: int = 10
    dtype: str = "bfloat16"
    rounds: int = 5
    steps: int = 2
    seconds: float = 6.0
    tiny: bool = False


def sizes_of(tiny: bool) -> Sizes:
    """LLaVA-1.5 7B, or a model of two narrow layers."""
    if not tiny:
        return Sizes(llava15_7b())
    text = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    vision = ClipConfig(hidden_size=16, intermediate_size=24, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=56,
                        patch_size=28)
    config = LlavaConfig(text_config=text, vision_config=vision, image_token_id=3, pad_token_id=0)
    return Sizes(config, labels=4, new_tokens=3, dtype="float32", rounds=1, steps=1, tiny=True)


def tiny(case: Case) -> Case:
    """A case with three blocks at most, an eighth of its ranks, half of its rows and a sixteenth of its positions."""
    return dataclasses.replace(
        case, blocks=min(case.blocks, 3), rows=-(-case.rows // 2), positions=case.positions // 16, rank=case.rank // 8)


def series(tiny_sizes: bool, only: str = "") -> list[list[Case]]:
    """The cases to measure; `only` is a regular expression that must be found in their names."""
    chosen = [[tiny(case) if tiny_sizes else case for case in cases] for cases in SERIES]
    known: set[str] = set()
    out = []
    for cases in chosen:
        fresh = [case for case in cases if case.name not in known and re.search(only, case.name)]
        known |= {case.name for case in fresh}
        out.append(fresh)
    return [cases for cases in out if cases]
