"""The check of a data root before a run: records, images, counts, lengths, leaks."""

from proglora_jax.data.check.findings import POLICIES, Findings
from proglora_jax.data.check.lengths import Batching
from proglora_jax.data.check.walk import check_data

__all__ = ["POLICIES", "Batching", "Findings", "check_data"]
