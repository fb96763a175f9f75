"""A LLaVA with a pool of LoRA blocks that every prompt gates for itself, in torch; written beside the weights that it reads.

    from gated_llava import GatedLlava

    model = GatedLlava.load("this/folder", base="/models/llava-1.5-7b-hf", dtype=torch.bfloat16).to("cuda")
    answers = model.answer(["What is this?\\nAnswer the question using a single word or phrase."], ["photo.jpg"])
    print(answers, model.blocks, model.gates)        # gates: one row per prompt, one column per block

It needs torch, transformers, safetensors and Pillow, and nothing else: no code is loaded from anywhere. The folder holds

    routing.json                  sizes, template, and how gates follow from a prompt
    routing.safetensors           one key per block, the query projector
    mm_projector.safetensors      the projector that was trained with the blocks
    block_00, block_01, ...       one LoRA block each, as PEFT adapters
    tokenizer.json, ...           the tokenizer
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional


class Router(torch.nn.Module):
    """Gates of prompts: w = softmax(<projector(z), key> / temperature), z the pooled input embeddings of the instruction."""

    def __init__(self, how: dict, tensors: dict[str, torch.Tensor]):
        super().__init__()
        self.how = how
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.float())

    def forward(self, embeddings: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """f32[B, M] from embeddings [B, T, D] and the positions that count, bool[B, T]."""
        x, mask = embeddings.float(), mask[..., None].to(embeddings.device)
        if self.how["pool"] == "max":
            z = x.masked_fill(~mask, -torch.inf).amax(1)
            z = torch.where(mask.any(1), z, 0.0)
        else:
            z = torch.where(mask, x, 0.0).sum(1) / mask.sum(1).clamp(min=1)
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


class GatedLinear(torch.nn.Module):
    """A frozen linear plus scale * sum_n w_n B_n A_n x, the blocks side by side along rank."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, owner: torch.Tensor, pool: GatedLlava):
        """Args: a: [R, d_in]; b: [d_out, R]; owner: i64[R], the block of each rank; pool: where the gates of the prompts lie."""
        super().__init__()
        self.base = base
        self.register_buffer("a", a.to(base.weight))
        self.register_buffer("b", b.to(base.weight))
        self.register_buffer("owner", owner)
        object.__setattr__(self, "pool", pool)  # not a part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d_in] -> [B, T, d_out]."""
        gates = self.pool.gates_for(x.shape[0])[:, self.owner][:, None].to(x)  # [B, 1, R]
        h = (x @ self.a.T) * gates
        if self.pool.fields["fuse"] == "factor":  # (sum w_n B_n)(sum w_m A_m) x
            blocks = len(self.owner.unique())
            h = h.unflatten(-1, (blocks, -1)).sum(-2).repeat(1, 1, blocks) * gates
        return self.base(x) + (h @ self.b.T) * self.pool.fields["scale"]


class GatedLlava(torch.nn.Module):
    """A `LlavaForConditionalGeneration` whose decoder layers have the blocks, and the prompts that it was trained with.

    Attributes:
        llava: transformers' model, with GatedLinear in the place of the adapted linears.
        blocks: what each block was trained on, in the order of the gates.
        gates: f32[B, M] of the prompts that were read last.
    """

    def __init__(self, folder: str, llava: transformers.LlavaForConditionalGeneration):
        super().__init__()
        folder = pathlib.Path(folder)
        self.fields = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
        self.blocks = [block["task"] for block in self.fields["blocks"]]
        self.llava, self.gates, self._mask = llava, None, None
        self.router = Router(self.fields["routing"], load_file(folder / "routing.safetensors"))
        llava.model.multi_modal_projector.load_state_dict(load_file(folder / "mm_projector.safetensors"))
        self._attach([load_file(folder / block["folder"] / "adapter_model.safetensors") for block in self.fields["blocks"]]
                     + [load_file(folder / name / "adapter_model.safetensors") for name in self.fields["shared"]])
        llava.model.language_model.register_forward_pre_hook(self._read_gates, with_kwargs=True)
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.backend_tokenizer.encode_special_tokens = True  # a literal </s> or <image> in a question is text

    @classmethod
    def load(cls, folder: str, base: str = "", dtype: torch.dtype = torch.float32) -> GatedLlava:
        """Loads the base model and puts the blocks into it; `base` is its folder, if it is not where it was."""
        fields = json.loads((pathlib.Path(folder) / "routing.json").read_text(encoding="utf-8"))
        base = base or fields["base_model_name_or_path"]
        return cls(folder, transformers.LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype)).eval()

    def _attach(self, blocks: list[dict[str, torch.Tensor]]) -> None:
        start = "base_model.model."
        for path in sorted({name.rpartition(".lora_")[0] for block in blocks for name in block}):
            here = [(i, block[f"{path}.lora_A.weight"], block[f"{path}.lora_B.weight"])
                    for i, block in enumerate(blocks) if f"{path}.lora_A.weight" in block]
            owner = torch.cat([torch.full((a.shape[0],), i) for i, a, _ in here])
            a, b = torch.cat([a for _, a, _ in here]), torch.cat([b for _, _, b in here], 1)
            parent, name = self.llava.get_submodule(path.removeprefix(start).rpartition(".")[0]), path.rpartition(".")[2]
            setattr(parent, name, GatedLinear(getattr(parent, name), a, b, owner, self))

    # ---- gates

    def _read_gates(self, module, args, kwargs) -> None:
        """Before the decoder reads a prompt: its gates. They serve all tokens that follow it."""
        if self._mask is not None:
            embeddings, mask = kwargs["inputs_embeds"], self._mask
            copies = embeddings.shape[0] // mask.shape[0]  # beam search repeats each prompt
            self.gates, self._mask = self.router(embeddings, mask.repeat_interleave(copies, 0)), None

    def gates_for(self, rows: int) -> torch.Tensor:
        """The gates of the prompts being read, f32[B, M], and 1 for a shared block behind them."""
        if self.gates is None or self.gates.shape[0] != rows:
            raise RuntimeError("no gates for these prompts; call GatedLlava itself or its generate, not the parts of it")
        return torch.cat([self.gates, self.gates.new_ones(rows, len(self.fields["shared"]))], 1)

    # ---- prompts

    def prompts(self, questions: list[str], images: list | None = None, image_mode: str = "pad") -> dict[str, torch.Tensor]:
        """Ids, masks and pixels of questions, padded at the left; what `generate` and a call take.

        Args:
            questions: the whole human text of each, instruction included.
            images: a PIL image, a path, or None for a question about text, for each; None for texts only.
            image_mode: "pad" to a square as in training, or "crop" the centre as CoIN's scripts do for some tasks.
        """
        if image_mode not in ("pad", "crop"):
            raise ValueError(f"image_mode={image_mode!r}: choose 'pad' or 'crop'")
        images = images or [None] * len(questions)
        rows = [self._encode(question, image is not None) for question, image in zip(questions, images, strict=True)]
        length = max(len(ids) for ids, _ in rows)
        ids = [[self.fields["pad_token_id"]] * (length - len(ids)) + ids for ids, _ in rows]
        real = [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]
        routed = [[False] * (length - len(mask)) + mask for _, mask in rows]
        batch = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(real), "routing_mask": torch.tensor(routed)}
        pixels = [self._pixels(image, image_mode) for image in images if image is not None]
        if pixels:
            batch["pixel_values"] = torch.stack(pixels).to(self.llava.dtype)
        return {name: tensor.to(self.llava.device) for name, tensor in batch.items()}

    def _encode(self, question: str, image: bool) -> tuple[list[int], list[bool]]:
        """Ids of a prompt and which of them the router sees.

        The text before the image, and that behind it, are tokenised by themselves. A token is one of the instruction if it covers a
        character of the question, white space around it aside.
        """
        template, kind = self.fields["template"], self.fields["routing"]["tokens"]
        lead = (template["system"] + " " if template["system"] else "") + template["user"]
        bos = self.fields["bos_token_id"]
        ids, inside = [bos] if bos >= 0 else [], [False] if bos >= 0 else []
        if image:
            opening = [token for token, _ in self._tokens(lead)]
            count = self.fields["image_tokens"]
            ids += opening + [self.fields["image_token_id"]] * count
            inside += [False] * (len(opening) + count)
            lead = "\n"
        start, stop = len(lead) + len(question) - len(question.lstrip()), len(lead) + len(question.rstrip())
        for token, (first, last) in self._tokens(f"{lead}{question} {template['assistant']}"):
            ids.append(token)
            inside.append(first < stop and last > start)
        if kind == "text_prompt":
            inside = [token != self.fields["image_token_id"] for token in ids]
        return ids, [True] * len(ids) if kind == "multimodal_prompt" else inside

    def _tokens(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """(id, the characters that it covers) of a text; ids of special tokens never come from text."""
        found, unknown = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False), self.fields["unk_token_id"]
        pairs = [(unknown if token in self.fields["special_ids"] else token, place) for token, place in zip(found.ids, found.offsets)]
        return [pair for pair in pairs if pair[0] >= 0]

    def _pixels(self, image: Image.Image | str | pathlib.Path, mode: str) -> torch.Tensor:
        """f32[3, H, W]: padded to a square of the mean colour and resized, or resized by the shorter edge and cropped; normalised."""
        how, size = self.fields["image"], self.fields["image"]["size"]
        image = (image if isinstance(image, Image.Image) else Image.open(image)).convert("RGB")
        if mode == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in how["mean"]))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        short = min(image.size)
        width, height = (size if edge == short else int(size * edge / short) for edge in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
        values = torch.from_numpy(np.array(image)).float() / 255
        return ((values - torch.tensor(how["mean"])) / torch.tensor(how["std"])).permute(2, 0, 1)

    # ---- reading and answering

    def forward(self, routing_mask: torch.Tensor, **inputs):
        """transformers' output for whole prompts; `inputs` are its own. `routing_mask` bool[B, T]: the tokens that route."""
        self._mask = routing_mask
        return self.llava(**inputs)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, routing_mask: torch.Tensor, **options):
        """transformers' `generate`, greedy unless `options` say otherwise; without the prompts, and padded behind the end."""
        self._mask = routing_mask
        rows = self.llava.get_input_embeddings().weight.shape[0]
        plain = {name: self.fields[name] for name in ("eos_token_id", "pad_token_id")} | {"do_sample": False, "num_beams": 1}
        plain["suppress_tokens"] = list(range(self.fields["tokenizer_size"], rows)) or None  # rows that no token uses
        made = self.llava.generate(input_ids=input_ids, **(plain | options))
        return made[:, input_ids.shape[1] :] if isinstance(made, torch.Tensor) else made

    def answer(
        self, questions: list[str], images: list | None = None, max_new_tokens: int = 128, image_mode: str = "pad"
    ) -> list[str]:
        """Answers to some questions, all in one batch; arguments as for `prompts`."""
        made = self.generate(**self.prompts(questions, images, image_mode), max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)]
