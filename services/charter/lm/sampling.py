"""Which sampling parameters mean something."""

from __future__ import annotations

import math

from charter.errors import RequestError
from charter.lm.base import Sampling

MAX_TOP_LOGPROBS = 20


def check_sampling(sampling: Sampling) -> None:
    """Raises `RequestError` for a value that means nothing, with what it may be."""
    rules = (
        ("temperature", sampling.temperature, 0 <= sampling.temperature < math.inf, "0 or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0 and at most 1"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (off) or more"),
        ("max_tokens", sampling.max_tokens, sampling.max_tokens >= 1, "at least 1"),
        ("stop", sampling.stop, all(sampling.stop), "texts that are not empty"),
        (
            "top_logprobs",
            sampling.top_logprobs,
            0 <= sampling.top_logprobs <= MAX_TOP_LOGPROBS,
            f"0 to {MAX_TOP_LOGPROBS}",
        ),
    )
    for name, value, fine, allowed in rules:
        if not fine:
            raise RequestError(f"sampling.{name} is {value}; give {allowed}")
