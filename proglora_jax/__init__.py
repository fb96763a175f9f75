"""Progressive low-rank adapters for continual instruction tuning of vision-language models, in JAX."""

__version__ = "0.1.0"
