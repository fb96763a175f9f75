"""What check-data takes from a model: the encoder that lengths are measured with, and how images are prepared for a folder of them."""

from __future__ import annotations

from typing import Any

from proglora_jax.data.errors import UserError


def measuring_encoder(arguments: Any) -> Any:
    """The encoder that lengths are measured with, or None where neither a model nor a tokenizer is named.

    Raises:
        UserError: for what cannot be read, and for arguments that do not go together.
    """
    from proglora_jax.data.templates import get_template
    from proglora_jax.data.tokens import Encoder, load_tokenizer

    template = get_template(arguments.template)
    # The tokenizer of a language model alone has no <image>; a run adds it, too.
    folder, patches, vocab_size, bare = arguments.tokenizer, arguments.image_tokens, 0, True
    if arguments.vision and not arguments.model:
        raise UserError("--vision: goes with --model; with --tokenizer, give --image-tokens")
    if arguments.model:
        from proglora_jax.checkpoints.sources import is_original, read_config
        from proglora_jax.checkpoints.weight_files import read_fields
        from proglora_jax.continual.session import model_folder

        folder = model_folder(arguments.model)
        config, bare = read_config(folder, arguments.vision), is_original(read_fields(folder))
        patches, vocab_size = config.image_tokens, config.text_config.vocab_size
    if not folder:
        return None
    tokenizer = load_tokenizer(folder, vocab_size, add_image_token=bare)
    return Encoder(tokenizer, template, patches, arguments.max_length)


def images_to_fill(arguments: Any) -> Any:
    """The folder that --fill-image-cache names and the model's images, or None without it.

    Raises:
        UserError: "--fill-image-cache: goes with --model ...", "--fill-image-cache=<folder>: cannot be written (...); ..."
    """
    from proglora_jax.data.check.fill import Fill
    from proglora_jax.data.image_cache import ImageCache
    from proglora_jax.data.images import ImageSpec

    if not arguments.fill_image_cache:
        return None
    if not arguments.model:
        raise UserError("--fill-image-cache: goes with --model, which says how images are prepared")
    from proglora_jax.checkpoints.sources import image_folder
    from proglora_jax.continual.session import model_folder

    spec = ImageSpec.from_folder(str(image_folder(model_folder(arguments.model), arguments.vision)))
    return Fill(ImageCache(arguments.fill_image_cache, "--fill-image-cache", must_write=True), spec)
