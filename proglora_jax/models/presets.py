"""Sizes of the models, as frozen dataclasses with the field names of Hugging Face's config.json, and the two published LLaVA-1.5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any


def _sizes(where: str, config: Any) -> None:
    """Refuses sizes that are none; those that follow from others may be left out."""
    for field in dataclasses.fields(config):
        value, optional = getattr(config, field.name), field.type == "int | None"
        if (optional and value is not None or field.type == "int") and not (isinstance(value, int) and value > 0):
            raise ValueError(f"{where}: {field.name}={value!r} must be a whole number above 0")


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """Sizes of a Llama decoder; the defaults are those of transformers' LlamaConfig, so that fields omitted on disk mean the same."""

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False

    def __post_init__(self):
        _sizes("text_config", self)
        # Filled in here so that every reader sees numbers; HF leaves both out where they follow from the other sizes.
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if self.head_dim is None:
            object.__setattr__(self, "head_dim", self.hidden_size // self.num_attention_heads)
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"text_config: num_attention_heads={self.num_attention_heads} must be a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2 or not self.head_dim:
            raise ValueError(f"text_config: head_dim={self.head_dim} must be even and above 0, for the rotary positions")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> LlamaConfig:
        """Reads a Llama config.json; takes `rope_parameters` (transformers 5) and `rope_theta`, `rope_scaling` (4).

        Raises:
            ValueError: "text_config: <field>=<value> is not supported (<what is>)"
        """
        rope = dict(fields.get("rope_parameters") or fields.get("rope_scaling") or {})
        kind = rope.get("rope_type", rope.get("type", "default"))
        _require("text_config", "model_type", fields.get("model_type", "llama"), ("llama",))
        _require("text_config", "hidden_act", fields.get("hidden_act", "silu"), ("silu",))
        _require("text_config", "attention_bias", bool(fields.get("attention_bias", False)), (False,))
        _require("text_config", "mlp_bias", bool(fields.get("mlp_bias", False)), (False,))
        _require("text_config", "rope_type", kind, ("default",))
        theta = rope.get("rope_theta", fields.get("rope_theta") or 10000.0)
        return _from_fields(cls, {**fields, "rope_theta": float(theta)})

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json that both transformers 4 and 5 read."""
        rest = dict(model_type="llama", architectures=["LlamaForCausalLM"], hidden_act="silu", attention_bias=False, mlp_bias=False)
        return {**rest, **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class ClipConfig:
    """Sizes of a CLIP vision transformer; the defaults are those of transformers' CLIPVisionConfig."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    def __post_init__(self):
        _sizes("vision_config", self)
        if self.image_size % self.patch_size:
            raise ValueError(f"vision_config: image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"vision_config: hidden_size={self.hidden_size} must be a multiple of num_attention_heads={self.num_attention_heads}"
            )

    @property
    def num_patches(self) -> int:
        """Number of patches of one image, P."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> ClipConfig:
        """Reads a CLIPVisionConfig, or the vision part of a whole CLIP config.json.

        Raises:
            ValueError: "vision_config: model_type=<value> is not supported (clip_vision_model is)"
        """
        fields = fields.get("vision_config", fields)
        _require("vision_config", "model_type", fields.get("model_type", "clip_vision_model"), ("clip_vision_model",))
        return _from_fields(cls, fields)

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json."""
        return {"model_type": "clip_vision_model", "architectures": ["CLIPVisionModel"], **dataclasses.asdict(self)}


@dataclasses.dataclass(frozen=True)
class LlavaConfig:
    """A LLaVA-1.5: sizes of its two towers and how image features enter the language model.

    Attributes:
        text_config: the language model.
        vision_config: the vision tower.
        image_token_id: the token whose positions hold image features (`image_token_index` on disk).
        vision_feature_layer: index into the list (embeddings, output of layer 1, ..., output of layer L); negative from the end.
        vision_feature_select_strategy: "default" drops the class token, "full" keeps it.
        projector_hidden_act: activation between the projector's two linears.
        multimodal_projector_bias: whether these have biases.
        pad_token_id: id for padding, by convention only (padding is never read).
        tie_word_embeddings: the head is the transposed embedding table.
    """

    text_config: LlamaConfig = LlamaConfig(vocab_size=32064, max_position_embeddings=4096, rms_norm_eps=1e-5)
    vision_config: ClipConfig = ClipConfig(
        hidden_size=1024,
        intermediate_size=4096,
        projection_dim=768,
        num_hidden_layers=24,
        num_attention_heads=16,
        image_size=336,
        patch_size=14,
    )
    image_token_id: int = 32000
    vision_feature_layer: int = -2
    vision_feature_select_strategy: str = "default"
    projector_hidden_act: str = "gelu"
    multimodal_projector_bias: bool = True
    pad_token_id: int = 32001
    tie_word_embeddings: bool = False

    def __post_init__(self):
        layers = self.vision_config.num_hidden_layers
        if not isinstance(self.vision_feature_layer, int) or not -layers - 1 <= self.vision_feature_layer <= layers:
            raise ValueError(f"vision_feature_layer={self.vision_feature_layer!r} must be one integer from {-layers - 1} to {layers}")
        _require("config", "vision_feature_select_strategy", self.vision_feature_select_strategy, ("default", "full"))
        if self.text_config.tie_word_embeddings and not self.tie_word_embeddings:
            object.__setattr__(self, "tie_word_embeddings", True)

    @property
    def vision_layers_run(self) -> int:
        """Number of the vision tower's layers that the feature layer needs."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.vision_config.num_hidden_layers + 1 + layer

    @property
    def image_tokens(self) -> int:
        """Number of positions that one image takes in the token sequence, P."""
        return self.vision_config.num_patches + (self.vision_feature_select_strategy == "full")

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> LlavaConfig:
        """Reads a LLaVA config.json as written by transformers 4 or 5.

        Raises:
            ValueError: "config: <field>=<value> is not supported (<what is>)"
        """
        _require("config", "model_type", fields.get("model_type", "llava"), ("llava",))
        known = dict(fields)
        known["text_config"] = LlamaConfig.from_hf(fields.get("text_config") or {})
        vision = fields.get("vision_config")
        known["vision_config"] = ClipConfig.from_hf(vision) if vision else cls.vision_config
        known["image_token_id"] = fields.get("image_token_id", fields.get("image_token_index", cls.image_token_id))
        known["pad_token_id"] = fields.get("pad_token_id") if fields.get("pad_token_id") is not None else cls.pad_token_id
        return _from_fields(cls, known)

    def to_hf(self) -> dict[str, Any]:
        """The fields of a config.json that both transformers 4 and 5 read."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        fields["image_token_index"] = fields.pop("image_token_id")
        fields["text_config"] = {**self.text_config.to_hf(), "tie_word_embeddings": self.tie_word_embeddings}
        fields["vision_config"] = self.vision_config.to_hf()
        rest = dict(model_type="llava", architectures=["LlavaForConditionalGeneration"], ignore_index=-100)
        return {**rest, "image_seq_length": self.image_tokens, **fields}


@dataclasses.dataclass(frozen=True)
class VitConfig:
    """Sizes of a ViT; the defaults are those of transformers' ViTConfig, which are ViT-B/16 at 224 px."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    qkv_bias: bool = True

    def __post_init__(self):
        _sizes("ViT", self)
        _whole_heads("ViT", self.hidden_size, self.num_attention_heads)
        if self.image_size % self.patch_size:
            raise ValueError(f"ViT: image_size={self.image_size} must be a multiple of patch_size={self.patch_size}")

    @property
    def num_patches(self) -> int:
        """Number of patches P of an image."""
        return (self.image_size // self.patch_size) ** 2

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> VitConfig:
        """Reads a ViT's config.json.

        Raises:
            ValueError: "config: model_type=<value> is not supported (vit is)"
        """
        _require("config", "model_type", fields.get("model_type"), ("vit",))
        return _from_fields(cls, fields)


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """Sizes of a BERT encoder; the defaults are those of transformers' BertConfig, which are bert-base-uncased."""

    vocab_size: int = 30522
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12

    def __post_init__(self):
        _sizes("BERT", self)
        _whole_heads("BERT", self.hidden_size, self.num_attention_heads)

    @classmethod
    def from_hf(cls, fields: Mapping[str, Any]) -> BertConfig:
        """Reads a BERT's config.json.

        Raises:
            ValueError: "config: model_type=<value> is not supported (bert is)" or the same of `position_embedding_type`, `is_decoder`
        """
        # The first BERT folders name no model_type; their config has a field that no other model of that time had.
        _require("config", "model_type", fields.get("model_type", "bert" if "type_vocab_size" in fields else None), ("bert",))
        _require("config", "position_embedding_type", fields.get("position_embedding_type", "absolute"), ("absolute",))
        _require("config", "is_decoder", bool(fields.get("is_decoder", False)), (False,))
        return _from_fields(cls, fields)


def llava15_7b() -> LlavaConfig:
    """LLaVA-1.5 7B: Vicuna-7B v1.5 and CLIP ViT-L/14 at 336 px."""
    return LlavaConfig()


def llava15_13b() -> LlavaConfig:
    """LLaVA-1.5 13B: Vicuna-13B v1.5 and CLIP ViT-L/14 at 336 px."""
    text = dataclasses.replace(
        LlavaConfig.text_config,
        hidden_size=5120,
        intermediate_size=13824,
        num_hidden_layers=40,
        num_attention_heads=40,
        num_key_value_heads=40,
        head_dim=128,
    )
    return LlavaConfig(text_config=text)


PRESETS = {"llava15_7b": llava15_7b, "llava15_13b": llava15_13b}


def _require(where: str, name: str, value: Any, allowed: tuple) -> None:
    if value not in allowed:
        raise ValueError(f"{where}: {name}={value!r} is not supported ({', '.join(map(str, allowed))} is)")


def _from_fields(cls: type, fields: Mapping[str, Any]) -> Any:
    names = {field.name for field in dataclasses.fields(cls)}
    return cls(**{name: value for name, value in fields.items() if name in names})


def _whole_heads(where: str, width: int, heads: int) -> None:
    if width % heads:
        raise ValueError(f"{where}: hidden_size={width} must be a multiple of num_attention_heads={heads}")
