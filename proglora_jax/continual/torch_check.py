"""Reloads what was exported with torch and compares it with ours, before an export says that it is done; needs torch, as nothing else does.

Our side runs the method as it runs in a task's evaluation, from the stage's checkpoint and the backbone's own files: what was folded,
merged and renamed for the export is not used. Both sides compute in f32 on the host.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from proglora_jax.checkpoints.hf_export import Change, source_entries
from proglora_jax.checkpoints.hf_import import load_source
from proglora_jax.checkpoints.names import canonical
from proglora_jax.checkpoints.sources import Source, find_source
from proglora_jax.continual.trained import Trained
from proglora_jax.core.types import CLState
from proglora_jax.data.batch import INSTRUCTION
from proglora_jax.data.errors import UserError, raise_collected
from proglora_jax.methods.base import PROJECTOR
from proglora_jax.methods.lora import LoRA
from proglora_jax.models.layers import Settings
from proglora_jax.training.step import gate_inputs

TOLERANCE = 1e-4  # how far a logit may be from ours, both in f32
_OTHERWISE_ROUNDED = 1e-3  # share of a tensor's elements; a sum in another order may round to the neighbour
_TEXT = 24  # tokens around the image
_ROOM = 1.3  # memory in use at the peak over the bytes of the weights in f32


class CannotCompare(UserError):
    """Why an export cannot be compared here; says nothing about the export."""


def checked(verify: bool | None, compare: Callable[[], str]) -> str:
    """What a comparison says; where it cannot be made, the reason, unless it was asked for.

    Args:
        verify: True for a comparison that must be made, False for none, None for one where it can be made.
        compare: one of the functions below, ready to be called.

    Raises:
        UserError: as the function.
    """
    if verify is False:
        return "not verified, as asked"
    try:
        return compare()
    except CannotCompare as reason:
        if verify:
            raise
        return f"NOT verified: {reason}"


def compare_adapter(
    trained: Trained, source: Source, folder: pathlib.Path, task: int, block: int | None, tolerance: float = TOLERANCE
) -> str:
    """Loads the backbone with transformers and the adapter with peft, in f32, and compares logits on random tokens and an image.

    Returns:
        A sentence with the largest difference.

    Raises:
        CannotCompare: "comparing with torch needs ...", "<backbone>: transformers does not read the layout of original LLaVA; ..."
        UserError: "<folder>: transformers finds no weights for ...; ...", "<folder>: differs from our model by ..."
    """
    transformers, torch, peft = modules("torch", "peft")
    check_readable(source)
    check_memory(source)
    inputs = _inputs(source)
    ours = _our_logits(trained, source, inputs, task, block)
    model = peft.PeftModel.from_pretrained(_load(transformers, torch, source.folder), str(folder)).eval()
    return _verdict(folder, ours, _their_logits(torch, model, inputs), tolerance)


def compare_merged(
    trained: Trained, source: Source, folder: pathlib.Path, task: int, change: Change, tolerance: float = TOLERANCE
) -> str:
    """Loads the merged folder with transformers, in f32, and compares logits with the backbone plus the adapter, not merged.

    Half precision would hide a wrong merge behind its rounding. So the weights in the folder are first compared with the merge in f32,
    rounded; then that merge takes their place, and the logits must agree as closely as in f32. What the cast changes is reported.

    Args:
        trained: the stage.
        source: its backbone.
        folder: what was written.
        task: id of the task.
        change: the merge, see `hf_export.save_source`.
        tolerance: how far a logit may be from ours.

    Returns:
        A sentence with the largest difference.

    Raises:
        UserError: as `compare_adapter`; "<folder>: <count> problem(s): <tensor> is not the merged one, rounded; ...".
    """
    transformers, torch = modules("torch")
    check_memory(source)
    inputs = _inputs(source)
    ours = _our_logits(trained, source, inputs, task, None)
    model, written = _load(transformers, torch, folder), find_source(folder).tensors
    cast = _their_logits(torch, model, inputs)
    if {tensor.format for tensor in written.values()} <= {"F32", "F64"}:
        return _verdict(folder, ours, cast, tolerance)
    places, wrong = {canonical(name): tensor for name, tensor in model.state_dict().items()}, []
    for entry in source_entries(source, np.float32, change):
        whole, stored = entry.read(), written[entry.name].read()
        if np.mean(stored != whole.astype(stored.dtype)) > _OTHERWISE_ROUNDED:
            wrong.append(f"{entry.name} is not the merged one, rounded to {stored.dtype}")
        if entry.name in places:
            places[entry.name].copy_(torch.from_numpy(whole))
    raise_collected(wrong, str(folder), "So it was not kept; please report this.")
    after = float(np.max(np.abs(ours - cast)))
    if not np.isfinite(after):
        raise UserError(f"{folder}: its logits are not finite, some weights do not fit its format; it was not kept: use --dtype bfloat16")
    said = _verdict(folder, ours, _their_logits(torch, model, inputs), tolerance)
    return f"{said} before the cast to half precision, and by {after:.3g} after it; each weight is the merged one, rounded once"


def modules(*names: str) -> list[Any]:
    """transformers and the named modules.

    Raises:
        CannotCompare: "comparing with torch needs <names>, but <missing> is not installed; ..."
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise CannotCompare(
            f"comparing with torch needs {' and '.join(names)}, but {' and '.join(missing)} is not installed; pip install "
            f"{' '.join(missing)} and export again, or say --no-verify, for the export itself needs neither"
        )
    return [importlib.import_module(name) for name in ("transformers", *names)]


def check_readable(source: Source) -> None:
    """Refuses a backbone that transformers does not read.

    Raises:
        CannotCompare: as `unreadable`.
    """
    if source.original:
        raise unreadable(source.folder)


def unreadable(folder: str | pathlib.Path) -> CannotCompare:
    """"<folder>: transformers does not read the layout of original LLaVA; ..."."""
    return CannotCompare(
        f"{folder}: transformers does not read the layout of original LLaVA; convert it first (tools convert from-hf, with the --vision "
        "and --projector that belong to it) and name the new folder with --base"
    )


def check_memory(source: Source) -> None:
    """Refuses to begin what would end for lack of memory.

    Raises:
        CannotCompare: "comparing in f32 needs about <n> GB of memory, ..."
    """
    needed = int(_ROOM * 4 * sum(int(np.prod(tensor.shape)) for tensor in source.tensors.values()))
    free = _free_memory()
    if free is not None and needed > free:
        raise CannotCompare(
            f"comparing in f32 needs about {needed / 1e9:.0f} GB of memory, {free / 1e9:.0f} GB are free; export again where there is "
            "more, or say --no-verify"
        )


def _free_memory() -> int | None:
    """Bytes that a new program can have, None where the system does not say."""
    try:
        lines = pathlib.Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return next((int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable")), None)
    except (OSError, ValueError, IndexError):
        return None


@contextlib.contextmanager
def on_the_host() -> Iterator[Any]:
    """Full precision on the host's processor, which is yielded: an f32 copy of a large model need not fit on an accelerator."""
    try:
        device = jax.devices("cpu")[0]
    except RuntimeError:  # switched off by JAX_PLATFORMS
        device = jax.devices()[0]
    with jax.default_device(device), jax.default_matmul_precision("highest"):
        yield device


def _inputs(source: Source) -> dict[str, np.ndarray]:
    """Two rows of random tokens with an image each, and one of text alone; the same for every call."""
    config, rng = source.config, np.random.default_rng(0)
    count, side = config.image_tokens, config.vision_config.image_size
    words = [i for i in range(3, min(source.rows, config.text_config.vocab_size)) if i not in (config.image_token_id, config.pad_token_id)]
    tokens = rng.choice(words, (3, count + _TEXT)).astype(np.int32)
    tokens[:2, 4 : 4 + count] = config.image_token_id
    image = rng.standard_normal((3, side, side, config.vision_config.num_channels), dtype=np.float32)
    return {"tokens": tokens, "image": image}


def _our_logits(trained: Trained, source: Source, inputs: dict[str, np.ndarray], task: int, block: int | None) -> np.ndarray:
    """f32[B, T, V] of the backbone and the stage's adapter."""
    method, state = trained.method, jax.tree.map(np.asarray, trained.state)
    tokens, rows = inputs["tokens"], len(inputs["tokens"])
    batch = {"segments": np.full(tokens.shape, INSTRUCTION, np.int8), "task_id": np.full((rows,), task, np.int32)}
    if block is not None:
        one = method.block(state, block)
        rank = next(iter(one.values()))["a"].shape[-1]  # an expert has a share of the method's
        method = LoRA(rank=rank, alpha=method.scale * rank)
        state = CLState({"block": one, PROJECTOR: state.params[PROJECTOR]}, {}, {}, state.stage)
    with on_the_host():
        llava = load_source(source, jnp.float32, settings=Settings(dtype="float32"))
        image = llava.project(llava.encode_image(jnp.asarray(inputs["image"])), state.params[PROJECTOR])
        x = llava.embed(jnp.asarray(tokens), image)
        gates = method.gates(state.params, state.memory, gate_inputs(llava, method, x, batch, state.stage))
        return np.asarray(llava.logits(llava.decode(x, adapter=method.adapter(state.params, gates, None)).hidden))


def _load(transformers: Any, torch: Any, folder: pathlib.Path) -> Any:
    model, info = transformers.LlavaForConditionalGeneration.from_pretrained(str(folder), dtype=torch.float32, output_loading_info=True)
    missing = sorted(info["missing_keys"]) + sorted(map(str, info["mismatched_keys"]))
    if missing:
        raise UserError(
            f"{folder}: transformers {transformers.__version__} finds no weights for {missing[0]} and {len(missing) - 1} more; convert the "
            "folder first (tools convert from-hf) and name the new one with --base"
        )
    return model.eval()


def _their_logits(torch: Any, model: Any, inputs: dict[str, np.ndarray]) -> np.ndarray:
    tokens, pixels = torch.tensor(inputs["tokens"]).long(), torch.tensor(inputs["image"][:2].transpose(0, 3, 1, 2))
    with torch.no_grad():
        return model(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens)).logits.float().numpy()


def check_tolerance(tolerance: float) -> None:
    """Refuses a tolerance of 0 or less, or that is no number.

    Raises:
        UserError: "--tolerance <t>: must be above 0 ..."
    """
    if not 0 < tolerance < float("inf"):
        raise UserError(f"--tolerance {tolerance:g}: must be above 0, the largest difference of a logit that is allowed")


def too_far(tolerance: float, largest: float) -> str:
    """What is allowed, and what to do about it."""
    rounding = f"f32 rounds to about {largest * 2**-24:.1g} in every sum, so a large model may need a larger --tolerance"
    return f"{tolerance:g} is allowed, and the largest logit is {largest:.3g}: {rounding}"


def _verdict(folder: pathlib.Path, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> str:
    """The sentence on a comparison."""
    difference, largest = float(np.max(np.abs(ours - theirs))), float(np.max(np.abs(ours)))
    if not difference < tolerance:
        raise UserError(
            f"{folder}: differs from our model by {difference:.3g} in its logits ({too_far(tolerance, largest)}); it was not kept. Please "
            "report this with the versions of torch, transformers and peft"
        )
    return f"reloaded in torch: logits differ by {difference:.3g} at most, {tolerance:g} is allowed (the largest is {largest:.3g})"
