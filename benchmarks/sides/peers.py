"""Their side: transformers' LLaVA with PEFT's adapters in torch, all of them active and the last one training."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import peft
import torch
import transformers

TARGETS = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"


def attach(model: Any, blocks: int, rank: int, alpha: float, dropout: float = 0.0) -> Any:
    """PEFT's loop over blocks: it has no gates. The last block and the projector train.

    Adapters have the model's dtype: in 16 bits that is quicker than PEFT's default of 32, and what the papers' scripts did.
    """
    config = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS, lora_dropout=dropout)
    model = peft.get_peft_model(model, config, adapter_name="block0", autocast_adapter_dtype=False)
    for index in range(1, blocks):
        model.add_adapter(f"block{index}", config, autocast_adapter_dtype=False)
    model.base_model.set_adapter([f"block{index}" for index in range(blocks)])
    for name, leaf in model.named_parameters():
        leaf.requires_grad_(f".block{blocks - 1}." in name or "multi_modal_projector" in name)
    return model


def set_checkpointing(model: Any, wanted: bool) -> None:
    """Switches gradient checkpointing of every layer on or off.

    transformers then asks for the gradient of all embeddings, of CLIP's patches too, so that the frozen tower would be computed again and
    gone back through. Checkpointing that is not reentrant does not need it: it is taken back.
    """
    if wanted:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    else:
        model.gradient_checkpointing_disable()
    model.disable_input_require_grads()


def compile_layers(model: Any, wanted: bool) -> None:
    """Switches torch.compile of every layer of the decoder on or off: they are alike, so that one graph serves all of them."""
    for layer in model.get_base_model().model.language_model.layers:
        if wanted:
            layer.compile()
        else:
            layer._compiled_call_impl = None


def random_model(config: Mapping[str, Any], dtype: str, device: str) -> Any:
    """A random LLaVA made on the device, from the fields of a config.json."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device(device):
            return transformers.LlavaForConditionalGeneration._from_config(
                transformers.LlavaConfig(**dict(config)), attn_implementation="sdpa")
    finally:
        torch.set_default_dtype(before)


def tensors(batch: Mapping[str, np.ndarray], labels: int, device: str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """A batch of `rows.random_batch` as transformers takes it.

    No row is padded, so there is no mask: SDPA takes its quickest kernel.
    """
    tokens = torch.tensor(batch["tokens"], dtype=torch.int64)
    wanted = torch.full_like(tokens, -100)
    wanted[:, tokens.shape[1] - labels :] = tokens[:, tokens.shape[1] - labels :]
    pixels = torch.tensor(np.ascontiguousarray(batch["image"].transpose(0, 3, 1, 2)))
    return {"input_ids": tokens.to(device), "labels": wanted.to(device), "pixel_values": pixels.to(device, dtype)}


class Trainer:
    """A training step of what `attach` made, and generation.

    Attributes:
        model: the model, in training mode.
    """

    def __init__(self, model: Any, rate: float):
        self.model = model
        model.train()
        trained = [leaf for leaf in model.parameters() if leaf.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, fused=trained[0].is_cuda or None)

    def train(self, batch: Mapping[str, Any]) -> torch.Tensor:
        """One step; its loss, which may not be there yet. No keys and values are kept for a generation that does not follow."""
        loss = self.model(**batch, use_cache=False).loss
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    def generate(self, batch: Mapping[str, Any], new_tokens: int) -> np.ndarray:
        """New tokens i64[B, N] after the batch's rows, greedy, none of them an end."""
        given = {name: value for name, value in batch.items() if name != "labels"}
        given["attention_mask"] = torch.ones_like(given["input_ids"])
        self.model.eval()
        with torch.no_grad():
            out = self.model.generate(**given, max_new_tokens=new_tokens, min_new_tokens=new_tokens, do_sample=False)
        self.model.train()
        return out[:, given["input_ids"].shape[1] :].cpu().numpy()
