"""The `openai+http:` backend: any OpenAI-compatible server (vLLM, `transformers serve`, KServe's runtime).

Only chat completions are used. Such servers report no token ids, so completions carry none; `score`
reads single-token options from `top_logprobs` of one generated token, where the server gives them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import AsyncIterator, Sequence
from typing import Any

from charter.errors import BackendError, BackendUnavailable, BackendUnsupported, ConfigError, RequestError
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
)
from charter.lm.detokenise import StopStrings
from charter.lm.remote import HttpServer, defused, gathered, turns
from charter.lm.sampling import MAX_TOP_LOGPROBS, check_sampling

_PATH = "/chat/completions"
_REASONS = {"length": FinishReason.LENGTH}


class OpenAIModel:
    """A model behind an OpenAI-compatible endpoint."""

    def __init__(
        self,
        base: str,
        model: str,
        *,
        api_key: str = "",
        timeout_s: float = 120.0,
        version: str = "",
        usage_in_streams: bool = True,
        extra: dict[str, Any] | None = None,
    ) -> None:
        """`base` ends in /v1. `usage_in_streams` asks for token counts with `stream_options`, which a few
        servers refuse; `extra` is added to every request body (for example `chat_template_kwargs`).
        """
        if not model:
            raise ConfigError(f"{base}: name the model after #, as in openai+{base}#my-model")
        self._server = HttpServer(base, api_key=api_key, timeout_s=timeout_s)
        self._model = model
        self._version = ModelVersion(version or model)
        self._usage_in_streams = usage_in_streams
        self._extra = extra or {}
        self._context = -1

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        """See `LanguageModel`; n requests at the same time."""
        check_sampling(sampling)
        if n < 1:
            raise RequestError(f"n is {n}; ask for at least one answer")
        completions = await gathered([self._complete(prompt, sampling, i) for i in range(n)])
        return Samples(tuple(completions), (), self._version)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        """See `LanguageModel`."""
        check_sampling(sampling)
        body = self._body(prompt, sampling, 0) | {"stream": True}
        if self._usage_in_streams:
            body["stream_options"] = {"include_usage": True}
        stops, pieces = StopStrings(sampling.stop), 0
        reason: FinishReason | None = None
        usage: dict[str, int] = {}
        async with contextlib.aclosing(self._server.events(_PATH, body)) as events:
            async for event in events:
                if "error" in event:
                    raise BackendError(f"{self._server.base} broke off the answer: {event['error']}")
                usage = event.get("usage") or usage
                for choice in event.get("choices") or ():
                    text = (choice.get("delta") or {}).get("content") or ""
                    pieces += bool(text)
                    if shown := stops.push(text):
                        yield Chunk(shown)
                    if choice.get("finish_reason"):
                        reason = _REASONS.get(choice["finish_reason"], FinishReason.STOP)
                if stops.stopped:
                    reason = FinishReason.STOP
                    break
        if reason is None:
            raise BackendError(f"{self._server.base} ended the stream without a finish reason")
        yield Chunk(
            stops.flush(),
            (),
            reason,
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", pieces),  # without usage: pieces, of a token each as a rule
            self._version,
        )

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        """Log-probs of options that are one token each; see `LanguageModel`.

        An option that is not among the 20 likeliest tokens gets an upper bound: the smaller of the last
        one's log-prob and that of all the mass that was not listed.
        """
        if not continuations:
            return ()
        body = self._body(prompt, Sampling(max_tokens=1), 0)
        body |= {"logprobs": True, "top_logprobs": MAX_TOP_LOGPROBS}
        try:
            answer = await self._server.post(_PATH, body)
        except RequestError as e:
            if "logprobs" in str(e):
                raise self._cannot_score() from e
            raise
        content = (_choice(answer, self._server.base).get("logprobs") or {}).get("content")
        if not content or not content[0].get("top_logprobs"):
            raise self._cannot_score()
        listed = [(t["token"], float(t["logprob"])) for t in content[0]["top_logprobs"]]
        found = [_listed(listed, option) for option in continuations]
        if all(p is None for p in found):
            raise BackendError(
                f"{self._model} at {self._server.base}: none of the options {list(continuations)} is among "
                f"the {len(listed)} likeliest tokens; the model does not answer in this form"
            )
        bound = _unlisted(listed)
        return tuple(Scored((), (bound if p is None else p,)) for p in found)

    async def info(self) -> ModelInfo:
        """See `LanguageModel`; the context length where the server tells (vLLM does), asked once."""
        if self._context < 0:
            self._context = await self._context_length()
        return ModelInfo(self._version, self._context, can_score=True, has_token_ids=False)

    async def close(self) -> None:
        """See `LanguageModel`."""
        await self._server.close()

    async def _context_length(self) -> int:
        # A server that cannot list its models may still serve them (`transformers serve` searches its
        # cache for half a minute, and fails where it has none).
        try:
            models = await self._server.get("/models", timeout_s=2)
        except BackendUnavailable as e:
            if isinstance(e.__cause__, TimeoutError):
                return 0
            raise
        except (BackendError, RequestError):
            return 0
        for entry in models.get("data") or ():
            if entry.get("id") == self._model:
                return int(entry.get("max_model_len") or 0)
        return 0

    async def _complete(self, prompt: Prompt, sampling: Sampling, index: int) -> Completion:
        answer = await self._server.post(_PATH, self._body(prompt, sampling, index))
        choice, usage = _choice(answer, self._server.base), answer.get("usage") or {}
        stops = StopStrings(sampling.stop)
        text = stops.push((choice.get("message") or {}).get("content") or "") + stops.flush()
        reason = _REASONS.get(str(choice.get("finish_reason")), FinishReason.STOP)
        return Completion(
            text,
            (),
            FinishReason.STOP if stops.stopped else reason,
            usage.get("prompt_tokens", 0),
            usage.get("completion_tokens", 0),
            self._version,
        )

    def _body(self, prompt: Prompt, sampling: Sampling, index: int) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": turns(prompt.messages),
            "temperature": sampling.temperature,
            "max_tokens": sampling.max_tokens,
            "top_p": sampling.top_p,
        }
        if prompt.prefill:  # the extension that vLLM and transformers' chat templates share
            body["messages"] += [{"role": "assistant", "content": defused(prompt.prefill)}]
            body |= {"continue_final_message": True, "add_generation_prompt": False}
        if sampling.stop:
            body["stop"] = list(sampling.stop)
        if sampling.seed is not None:
            body["seed"] = sampling.seed + index
        if sampling.top_k:
            body["top_k"] = sampling.top_k
        return body | self._extra

    def _cannot_score(self) -> BackendUnsupported:
        return BackendUnsupported(
            f"{self._model} at {self._server.base} reports no log-probabilities, so it cannot score; "
            "use a server with top_logprobs, such as vLLM, or another backend"
        )


def _choice(answer: Any, base: str) -> dict[str, Any]:
    choices = answer.get("choices") if isinstance(answer, dict) else None
    if not choices:
        raise BackendError(f"{base} answered without a choice: {str(answer)[:200]}")
    return dict(choices[0])


def _listed(listed: Sequence[tuple[str, float]], option: str) -> float | None:
    """The log-prob of an option among listed tokens; with and without a space before it counts as one."""
    exact = [p for token, p in listed if token == option]
    if exact:
        return exact[0]
    loose = [math.exp(p) for token, p in listed if token.strip() == option.strip()]
    return math.log(sum(loose)) if loose else None


def _unlisted(listed: Sequence[tuple[str, float]]) -> float:
    rest = 1.0 - sum(math.exp(p) for _, p in listed)
    return min([p for _, p in listed] + [math.log(max(rest, 1e-12))])
