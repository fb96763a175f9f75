"""The embedded benchmark coin_mini: eight small tasks that mirror CoIN's, drawn by a program and written in CoIN's own layout."""

from proglora_jax.data.synthetic.baselines import baselines
from proglora_jax.data.synthetic.benchmark import write_benchmark

__all__ = ["baselines", "write_benchmark"]
