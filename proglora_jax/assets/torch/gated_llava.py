"""A LLaVA with a pool of LoRA blocks that every prompt gates for itself, in torch; written beside the weights that it reads.

    from gated_llava import GatedLlava

    model = GatedLlava.load("this/folder", base="/models/llava-1.5-7b-hf", dtype=torch.bfloat16).to("cuda")
    answers = model.answer(["What is this?\\nAnswer the question using a single word or phrase."], ["photo.jpg"])
    print(answers, model.columns, model.gates)       # gates: one row per prompt, one column per block

It needs torch, transformers, safetensors and Pillow, and gated_routers.py beside it; no code is loaded from anywhere else. The folder holds

    routing.json                  sizes, template, and how gates follow from a prompt
    routing.safetensors           what the gates are computed from: keys, a query projector, routers
    mm_projector.safetensors      the projector that was trained with the blocks
    block_00, block_01, ...       one LoRA block each, as PEFT adapters; or
    ranks                         where ranks are gated one by one, all of them in one adapter
    shared                        where there is one, a block that no prompt gates
    tokenizer.json, ...           the tokenizer
"""

from __future__ import annotations

import json
import pathlib

import numpy as np
import torch
import transformers
from gated_routers import ROUTERS, Prompt, Router
from PIL import Image, ImageFile
from safetensors.torch import load_file
from torch.nn import functional


def rgb(image: Image.Image | str | pathlib.Path) -> Image.Image:
    """An image in RGB: of 16-bit grey the high byte, of a file that is cut off what can be decoded, as in training."""
    before, ImageFile.LOAD_TRUNCATED_IMAGES = ImageFile.LOAD_TRUNCATED_IMAGES, True
    try:
        image = image if isinstance(image, Image.Image) else Image.open(image)
        if image.mode == "I" or image.mode.startswith("I;16"):
            image = Image.fromarray((np.clip(np.asarray(image).astype(np.int64), 0, 65535) >> 8).astype(np.uint8))
        return image.convert("RGB")
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


class GatedLinear(torch.nn.Module):
    """A frozen linear plus scale * sum_n w_n B_n A_n x, the blocks side by side along rank."""

    def __init__(self, base: torch.nn.Linear, a: torch.Tensor, b: torch.Tensor, owner: torch.Tensor, place: tuple, pool: GatedLlava):
        """Args: a: [R, d_in]; b: [d_out, R]; owner: i64[R], each rank's gate; place: layer and name; pool: where it belongs."""
        super().__init__()
        self.base, self.place = base, place
        self.register_buffer("a", a.to(base.weight))
        self.register_buffer("b", b.to(base.weight))
        self.register_buffer("owner", owner)
        object.__setattr__(self, "pool", pool)  # not a part of this module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, T, d_in] -> [B, T, d_out]."""
        gates = self.pool.router.gate(x, *self.place)  # [B, T or 1, M]
        gates = functional.pad(gates, (0, 1), value=self.pool.fields["routing"]["shared_gate"])[..., self.owner].to(x)  # [B, T or 1, R]
        h = (x @ self.a.T) * gates
        if self.pool.fields["fuse"] == "factor":  # (sum w_n B_n)(sum w_m A_m) x
            blocks = len(self.owner.unique())
            h = h.unflatten(-1, (blocks, -1)).sum(-2).repeat(1, 1, blocks) * gates
        return self.base(x) + (h @ self.b.T) * self.pool.fields["scale"]


class GatedLlava(torch.nn.Module):
    """A `LlavaForConditionalGeneration` whose linears have the blocks, and the prompts that it was trained with.

    Attributes:
        llava: transformers' model, with GatedLinear in the place of the adapted linears.
        router: what makes the gates.
        columns: what each column of the gates belongs to: the task of a block, an expert.
    """

    def __init__(self, folder: str, llava: transformers.LlavaForConditionalGeneration):
        super().__init__()
        folder = pathlib.Path(folder)
        self.fields = json.loads((folder / "routing.json").read_text(encoding="utf-8"))
        self.columns, self.llava, self._asked, self._image = self.fields["columns"], llava, None, None
        how = self.fields["routing"]
        self.router: Router = ROUTERS[how["kind"]](how, load_file(folder / "routing.safetensors"))
        llava.model.multi_modal_projector.load_state_dict(load_file(folder / "mm_projector.safetensors"))
        names = [block["folder"] for block in self.fields["blocks"]]
        self._attach(*([load_file(folder / name / "adapter_model.safetensors") if name else {} for name in some]
                       for some in (names, self.fields["shared"])))
        if hasattr(self.router, "image_keys"):
            llava.model.vision_tower.register_forward_hook(self._see_image)
        llava.model.language_model.register_forward_pre_hook(self._begin, with_kwargs=True)
        llava.model.language_model.register_forward_hook(lambda module, args, out: self.router.end() if self.router.prompt else None)
        for index, layer in enumerate(llava.model.language_model.layers if how["kind"] == "layer" else ()):
            layer.register_forward_pre_hook(lambda module, args, index=index: self.router.enter(index, args[0]))
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.tokenizer.backend_tokenizer.encode_special_tokens = True  # a literal </s> or <image> in a question is text

    @property
    def gates(self) -> torch.Tensor:
        """f32[B, M] of the prompts that were read last; where layers or linears have gates of their own, the mean."""
        return self.router.gates

    @classmethod
    def load(cls, folder: str, base: str = "", dtype: torch.dtype = torch.float32) -> GatedLlava:
        """Loads the base model and puts the blocks into it; `base` is its folder, if it is not where it was."""
        fields = json.loads((pathlib.Path(folder) / "routing.json").read_text(encoding="utf-8"))
        base = base or fields["base_model_name_or_path"]
        return cls(folder, transformers.LlavaForConditionalGeneration.from_pretrained(base, dtype=dtype)).eval()

    def _attach(self, blocks: list[dict[str, torch.Tensor]], shared: list[dict[str, torch.Tensor]]) -> None:
        start = "base_model.model."
        for path in sorted({name.rpartition(".lora_")[0] for block in blocks + shared for name in block}):
            here = [(i, block[f"{path}.lora_A.weight"], block[f"{path}.lora_B.weight"])
                    for i, block in enumerate(blocks + shared) if f"{path}.lora_A.weight" in block]
            # A shared block takes the gate behind those of the others.
            own = lambda i, a: torch.arange(len(a)) if self.router.by_rank else torch.full((len(a),), i)
            owner = torch.cat([own(i, a) if i < len(blocks) else torch.full((len(a),), -1) for i, a, _ in here])
            a, b = torch.cat([a for _, a, _ in here]), torch.cat([b for _, _, b in here], 1)
            above, _, name = path.removeprefix(start).rpartition(".")
            parent, numbers = self.llava.get_submodule(above), [int(part) for part in above.split(".") if part.isdecimal()]
            place = (numbers[0] if numbers else -1, name)
            setattr(parent, name, GatedLinear(getattr(parent, name), a, b, owner, place, self))

    # ---- gates

    def _see_image(self, module, args, out) -> None:
        """Behind the vision tower: the class token of the layer that LLaVA takes its features from."""
        self._image = out.hidden_states[self.llava.config.vision_feature_layer][:, 0].float()
        if self.router.reads_first and self._asked is not None:
            self.router.read(self._prompt(self.llava.get_input_embeddings()(self._asked["input_ids"])))

    def _begin(self, module, args, kwargs) -> None:
        """Before the decoder reads a prompt: what its gates follow from. They serve all tokens behind it."""
        if self._asked is not None:
            self.router.read(self._prompt(kwargs["inputs_embeds"]))
            self._asked = None

    def _prompt(self, embeddings: torch.Tensor) -> Prompt:
        ids, real, routed = (self._asked[name].to(embeddings.device) for name in ("input_ids", "attention_mask", "routing_mask"))
        shown = (ids == self.fields["image_token_id"]).any(1)
        copies = len(embeddings) // len(ids)  # beam search repeats each prompt
        if self._image is not None:
            copies = max(copies, len(self._image) // int(shown.sum()))
        repeat = lambda x, length: x if len(x) == length else x.repeat_interleave(length // len(x), 0)
        embeddings, real, routed, shown = (repeat(x, copies * len(ids)) for x in (embeddings, real == 1, routed, shown))
        image = embeddings.new_zeros(len(shown), self.llava.config.vision_config.hidden_size, dtype=torch.float32)
        if self._image is not None:
            image[shown] = repeat(self._image, int(shown.sum())).to(image)
        return Prompt(embeddings, routed, real, image, shown)

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
        if kind == "start_and_instruction":
            inside[0] = True
        return ids, [True] * len(ids) if kind == "multimodal_prompt" else inside

    def _tokens(self, text: str) -> list[tuple[int, tuple[int, int]]]:
        """(id, the characters that it covers) of a text; ids of special tokens never come from text."""
        found, unknown = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False), self.fields["unk_token_id"]
        pairs = [(unknown if token in self.fields["special_ids"] else token, place) for token, place in zip(found.ids, found.offsets)]
        return [pair for pair in pairs if pair[0] >= 0]

    def _pixels(self, image: Image.Image | str | pathlib.Path, mode: str) -> torch.Tensor:
        """f32[3, H, W]: padded to a square of the mean colour and resized, or resized by the shorter edge and cropped; normalised."""
        how, size = self.fields["image"], self.fields["image"]["size"]
        image = rgb(image)
        if mode == "pad":
            side = max(image.size)
            square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in how["mean"]))
            square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
            image = square
        short = min(image.size)
        width, height = (size if edge == short else int(size * edge / short) for edge in image.size)
        left, top = (width - size) // 2, (height - size) // 2
        image = image.resize((width, height), how["resample"]).crop((left, top, left + size, top + size))
        values = torch.from_numpy(np.array(image)).float() / 255
        return ((values - torch.tensor(how["mean"])) / torch.tensor(how["std"])).permute(2, 0, 1)

    # ---- reading and answering

    def _ask(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, routing_mask: torch.Tensor) -> dict[str, torch.Tensor]:
        self._asked = {"input_ids": input_ids, "attention_mask": attention_mask, "routing_mask": routing_mask}
        self._image = None
        return {"input_ids": input_ids, "attention_mask": attention_mask}

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, routing_mask: torch.Tensor, **inputs):
        """transformers' output for whole prompts; `inputs` are its own. `routing_mask` bool[B, T]: the tokens that route."""
        return self.llava(**self._ask(input_ids, attention_mask, routing_mask), **inputs)

    @torch.no_grad()
    def generate(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, routing_mask: torch.Tensor, **options):
        """transformers' `generate`, greedy unless `options` say otherwise; without the prompts, and padded behind the end."""
        rows = self.llava.get_input_embeddings().weight.shape[0]
        plain = {name: self.fields[name] for name in ("eos_token_id", "pad_token_id")} | {"do_sample": False, "num_beams": 1}
        plain["suppress_tokens"] = list(range(self.fields["tokenizer_size"], rows)) or None  # rows that no token uses
        made = self.llava.generate(**self._ask(input_ids, attention_mask, routing_mask), **(plain | options))
        return made[:, input_ids.shape[1] :] if isinstance(made, torch.Tensor) else made

    def answer(
        self, questions: list[str], images: list | None = None, max_new_tokens: int = 128, image_mode: str = "pad"
    ) -> list[str]:
        """Answers to some questions, all in one batch; arguments as for `prompts`."""
        made = self.generate(**self.prompts(questions, images, image_mode), max_new_tokens=max_new_tokens)
        return [text.strip() for text in self.tokenizer.batch_decode(made, skip_special_tokens=True, clean_up_tokenization_spaces=False)]
