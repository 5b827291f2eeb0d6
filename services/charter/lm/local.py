"""The `local:` backend: a checkpoint in this process, run by the embedded engine."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from charter.errors import ConfigError
from charter.lm.base import Chunk, ModelInfo, ModelVersion, Prompt, Samples, Sampling, Scored
from charter.lm.checkpoint import load_checkpoint
from charter.lm.engine import Engine, EngineStatus
from charter.lm.engine_runner import Limits

_DTYPES = ("float32", "bfloat16", "float16", "float64")


class LocalModel:
    """A `LanguageModel` on local weights, which can be exchanged while it serves."""

    def __init__(
        self,
        source: str,
        *,
        version: str = "",
        device: str = "cpu",
        dtype: str | None = None,
        threads: int | None = None,
        limits: Limits | None = None,
        **options: Any,
    ) -> None:
        """Loads the checkpoint, which takes seconds; raises `CheckpointError`.

        `version` is the name that answers carry (default: the registry's id, or the folder's name);
        `dtype` is float32 on a CPU and the checkpoint's own elsewhere, unless given; `threads` bounds
        torch's threads for the whole process; `options` are fields of `Limits`.
        """
        if limits is None:
            try:
                limits = Limits(**options)
            except TypeError as e:
                raise ConfigError(f"option of a local model: {e}; there are {Limits.__slots__}") from e
        checkpoint = load_checkpoint(
            source, version=version, dtype=_dtype(dtype), device=device, threads=threads
        )
        self._engine = Engine(checkpoint, limits)

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        """See `LanguageModel`."""
        return await self._engine.generate(prompt, sampling, n)

    def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        """See `LanguageModel`."""
        return self._engine.stream(prompt, sampling)

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        """See `LanguageModel`."""
        return await self._engine.score(prompt, continuations)

    async def info(self) -> ModelInfo:
        """See `LanguageModel`."""
        status = self._engine.status()
        return ModelInfo(status.model, status.context_length, can_score=True, has_token_ids=True)

    async def reload(self, source: str, *, version: str = "") -> tuple[ModelVersion, ModelVersion]:
        """Other weights, without dropping a request; see `Engine.reload`."""
        return await self._engine.reload(source, version=version)

    def status(self) -> EngineStatus:
        """What the engine is doing now."""
        return self._engine.status()

    async def close(self) -> None:
        """See `LanguageModel`."""
        await self._engine.close()


def _dtype(name: str | None) -> Any:
    if name is None:
        return None
    if name not in _DTYPES:
        raise ConfigError(f"dtype {name!r} is unknown; give one of {', '.join(_DTYPES)}")
    import torch

    return getattr(torch, name)
