"""The `tgi+http:` backend: text-generation-inference through huggingface_hub's `InferenceClient`.

The server applies its own chat template (`/chat_tokenize`); what it wrote, and the prefill, is then
continued by `text_generation(details=True)`, which gives token ids and log-probs of the distribution that
was sampled from. `score` reads log-probs of the prompt's own tokens (`decoder_input_details`).
"""

from __future__ import annotations

import contextlib
import importlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from charter.errors import BackendError, BackendUnsupported, ContextOverflow, Overloaded, RequestError
from charter.lm.base import (
    Alternative,
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
from charter.lm.detokenise import StopStrings
from charter.lm.remote import HttpServer, defused, gathered, turns, unreachable
from charter.lm.sampling import check_sampling

_REASONS = {"length": FinishReason.LENGTH}


class TgiModel:
    """A model behind text-generation-inference."""

    def __init__(self, base: str, *, api_key: str = "", timeout_s: float = 120.0, version: str = "") -> None:
        """`base` is the server's root; `version` names the model (default: what the server says)."""
        self._server = HttpServer(base, api_key=api_key, timeout_s=timeout_s)
        # A token of our own in any case: without one, the client would send the user's hub token along.
        self._options = {"base_url": base, "token": api_key or "none", "timeout": timeout_s}
        self._client = self._open()
        self._named = version
        self._info: ModelInfo | None = None

    def _open(self) -> Any:
        return _inference_client(self._options)

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        """See `LanguageModel`; n requests at the same time."""
        check_sampling(sampling)
        if n < 1:
            raise RequestError(f"n is {n}; ask for at least one answer")
        version, (text, ids) = (await self.info()).model, await self._rendered(prompt)
        parameters = await self._parameters(sampling, len(ids))
        completions = await gathered(
            [self._complete(text, len(ids), parameters, sampling, i, version) for i in range(n)]
        )
        return Samples(tuple(completions), ids, version)

    async def stream(self, prompt: Prompt, sampling: Sampling) -> AsyncIterator[Chunk]:
        """See `LanguageModel`."""
        check_sampling(sampling)
        version, (text, ids) = (await self.info()).model, await self._rendered(prompt)
        parameters = await self._parameters(sampling, len(ids))
        stops, written = StopStrings(sampling.stop), 0
        held: list[Token] = []
        with _translated(self._server.base):
            # A client of its own: the library holds a stream's connection until the client is closed.
            async with self._open() as client:
                events = await client.text_generation(text, details=True, stream=True, **parameters)
                async for event in events:
                    held.append(_token(event.token, event.top_tokens))
                    written += 1
                    shown = stops.push("" if event.token.special else event.token.text)
                    if event.details is not None:
                        reason = _REASONS.get(event.details.finish_reason, FinishReason.STOP)
                        reason = FinishReason.STOP if stops.stopped else reason
                        yield Chunk(shown + stops.flush(), tuple(held), reason, len(ids), written, version)
                        return
                    if shown:  # tokens come with the text that they complete
                        yield Chunk(shown, tuple(held))
                        held.clear()
        raise BackendError(f"{self._server.base} ended the stream without a finish reason")

    async def score(self, prompt: Prompt, continuations: Sequence[str]) -> tuple[Scored, ...]:
        """See `LanguageModel`; one request for each continuation."""
        text, ids = await self._rendered(prompt)
        return tuple(await gathered([self._score_one(text, ids, c) for c in continuations]))

    async def info(self) -> ModelInfo:
        """See `LanguageModel`; asked once."""
        if self._info is None:
            told = await self._server.get("/info")
            version = ModelVersion(self._named or str(told["model_id"]), str(told.get("model_sha") or ""))
            context = int(told.get("max_total_tokens") or 0)
            self._info = ModelInfo(version, context, can_score=True, has_token_ids=True)
        return self._info

    async def close(self) -> None:
        """See `LanguageModel`."""
        await self._server.close()
        await self._client.close()

    async def _rendered(self, prompt: Prompt) -> tuple[str, tuple[int, ...]]:
        """The prompt as text to continue, and the ids that the server will make of it."""
        body = {"messages": turns(prompt.messages)}
        text = str((await self._server.post("/chat_tokenize", body))["templated_text"])
        text += defused(prompt.prefill)
        tokens = await self._server.post("/tokenize", {"inputs": text, "parameters": {}})
        if len(tokens) > 1 and tokens[0]["id"] == tokens[1]["id"] and text.startswith(tokens[1]["text"]):
            # The template wrote the beginning-of-text token, and the server would put another before it.
            text, tokens = text[len(tokens[1]["text"]) :], tokens[1:]
        return text, tuple(int(t["id"]) for t in tokens)

    async def _parameters(self, sampling: Sampling, prompt_tokens: int) -> dict[str, Any]:
        context = (await self.info()).context_length
        if context and prompt_tokens + 1 > context:
            raise ContextOverflow(
                f"the prompt has {prompt_tokens} tokens, but {self._server.base} takes {context} of prompt "
                "and answer together; shorten the conversation"
            )
        room = context - prompt_tokens if context else sampling.max_tokens
        return {
            "do_sample": sampling.temperature > 0,
            "temperature": sampling.temperature or None,
            "top_k": sampling.top_k or None,
            "top_p": sampling.top_p if sampling.top_p < 1 else None,
            "max_new_tokens": min(sampling.max_tokens, room),
            "stop": list(sampling.stop) or None,
            "seed": sampling.seed,
            "top_n_tokens": sampling.top_logprobs or None,
            "return_full_text": False,
        }

    async def _complete(
        self,
        text: str,
        prompt_tokens: int,
        parameters: dict[str, Any],
        sampling: Sampling,
        index: int,
        version: ModelVersion,
    ) -> Completion:
        seed = None if sampling.seed is None else sampling.seed + index
        with _translated(self._server.base):
            answer = await self._client.text_generation(text, details=True, **(parameters | {"seed": seed}))
        details = _details(answer, self._server.base)
        tops = details.top_tokens or [None] * len(details.tokens)
        tokens = tuple(_token(t, top) for t, top in zip(details.tokens, tops, strict=True))
        stops = StopStrings(sampling.stop)
        shown = stops.push(answer.generated_text) + stops.flush()
        reason = _REASONS.get(details.finish_reason, FinishReason.STOP)
        return Completion(
            shown,
            tokens,
            FinishReason.STOP if stops.stopped else reason,
            prompt_tokens,
            details.generated_tokens,
            version,
        )

    async def _score_one(self, text: str, ids: tuple[int, ...], continuation: str) -> Scored:
        if not continuation:
            return Scored((), ())
        with _translated(self._server.base):
            answer = await self._client.text_generation(
                text + defused(continuation),
                details=True,
                decoder_input_details=True,
                max_new_tokens=1,
                do_sample=False,
            )
        prefill = _details(answer, self._server.base).prefill
        if not prefill:
            raise BackendUnsupported(
                f"{self._server.base} returns no log-probs of the prompt; start text-generation-inference "
                "without prefix caching (PREFIX_CACHING=0), or use another backend"
            )
        if tuple(t.id for t in prefill[: len(ids)]) != ids:
            raise BackendUnsupported(
                f"{self._server.base}: the continuation {continuation!r} merges with the prompt's last "
                "token, so its own log-prob is not defined here; begin it with a space or another letter"
            )
        rest = prefill[len(ids) :]
        return Scored(tuple(t.id for t in rest), tuple(float(t.logprob) for t in rest))


def _inference_client(options: dict[str, Any]) -> Any:
    """The library's client, which obeys HF_HUB_OFFLINE for the hub alone: this server is not the hub."""
    from huggingface_hub import AsyncInferenceClient

    class Client(AsyncInferenceClient):  # type: ignore[misc]  # the library is skipped by mypy
        async def _get_async_client(self) -> Any:
            session = await super()._get_async_client()
            session.event_hooks = {**session.event_hooks, "request": []}
            return session

    return Client(**options)


def _details(answer: Any, base: str) -> Any:
    if answer.details is None:
        raise BackendError(f"{base} answered without details; is it text-generation-inference?")
    return answer.details


def _token(token: Any, top: Sequence[Any] | None) -> Token:
    # The client leaves the inner records of a list of lists as dictionaries.
    listed = [t if isinstance(t, dict) else vars(t) for t in top or ()]
    alternatives = tuple(Alternative(t["id"], t["text"], float(t["logprob"])) for t in listed)
    return Token(token.id, token.text, float(token.logprob), alternatives)


@contextlib.contextmanager
def _translated(base: str) -> Any:
    """The client's failures as ours."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        InferenceTimeoutError,
        OverloadedError,
        TextGenerationError,
        ValidationError,
    )

    transport_error = _transport_error()
    try:
        yield
    except OverloadedError as e:
        raise Overloaded(f"{base} is overloaded: {e}") from e
    except ValidationError as e:
        kind = ContextOverflow if "tokens" in str(e) else RequestError
        raise kind(f"{base} refused the request: {e}") from e
    except (InferenceTimeoutError, transport_error) as e:
        raise unreachable(base, e) from e
    except (TextGenerationError, HfHubHTTPError) as e:
        raise BackendError(f"{base} failed: {e}") from e


def _transport_error() -> Any:
    """What the HTTP library beneath huggingface_hub raises: httpx2 since its version 2, httpx before."""
    for name in ("httpx2", "httpx"):
        with contextlib.suppress(ImportError):
            return importlib.import_module(name).TransportError
    return ConnectionError
