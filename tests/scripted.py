"""A fake language model for tests in which determinism is the point: a function writes its answers.

It keeps the promises of `charter.lm.base.LanguageModel` (cancellation, counts, the last chunk) and has no
weights. Tests of meaning use a real model.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Callable, Sequence

from charter.lm.base import (
    Chunk,
    Completion,
    FinishReason,
    ModelInfo,
    ModelVersion,
    Prompt,
    Samples,
    Sampling,
    Scored,
    Token,
)

Write = Callable[[Prompt, Sampling], str]
Weigh = Callable[[Prompt, str], float]


class Scripted:
    """A fake. Answers with `write(prompt, sampling)`, scores with `weigh(prompt, continuation)`."""

    def __init__(
        self,
        write: Write = lambda prompt, sampling: "yes indeed",
        weigh: Weigh = lambda prompt, continuation: -float(len(continuation)),
        version: str = "scripted",
        gate: asyncio.Event | None = None,
    ) -> None:
        self.write, self.weigh, self.gate = write, weigh, gate
        self.version = ModelVersion(version, f"digest of {version}", "tokenizer")
        self.prompts: list[Prompt] = []
        self.samplings: list[Sampling] = []
        self.running = 0
        self.most_at_once = 0
        self.closed = False

    async def _work(self) -> None:
        self.most_at_once = max(self.most_at_once, self.running)
        await asyncio.sleep(0)
        if self.gate is not None:
            await self.gate.wait()

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        self.running += n
        try:
            await self._work()
            return Samples(
                tuple(self._completion(prompt, sampling) for _ in range(n)), (1, 2, 3), self.version
            )
        finally:
            self.running -= n

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        self.prompts.append(prompt)
        self.samplings.append(sampling)
        self.running += 1
        try:
            done = self._completion(prompt, sampling)
            for token in done.tokens:
                yield Chunk(token.text, (token,))
                await self._work()
            yield Chunk("", (), done.finish_reason, 3, done.completion_tokens, self.version)
        finally:
            self.running -= 1

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        self.prompts.append(prompt)
        self.running += 1
        try:
            await self._work()
            return tuple(Scored((i,), (self.weigh(prompt, c),)) for i, c in enumerate(continuations))
        finally:
            self.running -= 1

    async def info(self) -> ModelInfo:
        return ModelInfo(self.version, 512, can_score=True, has_token_ids=True)

    async def close(self) -> None:
        self.closed = True

    def _completion(self, prompt: Prompt, sampling: Sampling) -> Completion:
        text, reason = self.write(prompt, sampling), FinishReason.STOP
        for stop in sampling.stop:
            text = text.partition(stop)[0]
        pieces = re.findall(r"\S+\s*|\s+", text)
        if len(pieces) > sampling.max_tokens:
            pieces, reason = pieces[: sampling.max_tokens], FinishReason.LENGTH
        tokens = tuple(Token(i, piece, -0.5) for i, piece in enumerate(pieces))
        return Completion("".join(pieces), tokens, reason, 3, len(tokens), self.version)
