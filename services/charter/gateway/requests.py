"""The body of a chat request: strict types, messages that say what to write instead, and its meaning.

Fields that would change the answer and that Charter cannot honour are refused, not ignored; fields that
only describe the caller are accepted and have no effect.
"""

from __future__ import annotations

import difflib
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from charter.gateway.envelope import ApiError
from charter.gateway.guard import GuardMode
from charter.lm.base import ChatMessage, Prompt, Role, Sampling

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x0c\x0e-\x1f\x7f\ud800-\udfff]")
_SEEDS = 1 << 62
"""Seeds are taken modulo this, which keeps seed + i within every backend's integers."""

_WITHOUT_EFFECT: dict[str, tuple[Any, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
}
"""Fields that are not supported, with the values (besides null) that ask for nothing."""


def _plain_text(text: str, where: str) -> str:
    found = _CONTROL.search(text)
    if found:
        raise PydanticCustomError(
            "control_character",
            "{where} has the control character U+{code} at position {position}; remove it",
            {"where": where, "code": f"{ord(found[0]):04X}", "position": found.start()},
        )
    return text


def _content(value: Any) -> str:
    """Text, from a string or from a list of text parts."""
    if isinstance(value, str):
        return _plain_text(value, "the text")
    if value is None:
        return ""
    if not isinstance(value, list):
        raise PydanticCustomError("content_type", "must be a string or a list of text parts")
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("text", "refusal") or not isinstance(part.get(kind), str):
            raise PydanticCustomError(
                "content_part",
                'has a part that is not text, and only text is read; write {"type": "text", "text": "…"}',
            )
        texts.append(part[kind])
    return _plain_text("".join(texts), "the text")


def _stop(value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value or []
    if not isinstance(listed, list) or not all(isinstance(s, str) and s for s in listed) or len(listed) > 4:
        raise PydanticCustomError(
            "stop", "must be a string or a list of at most 4 strings, none of them empty"
        )
    return tuple(listed)


class Message(BaseModel):
    """One turn, as a client sends it; what a client echoes from an earlier answer does no harm."""

    model_config = ConfigDict(strict=True, extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_content)] = ""
    tool_calls: Any = None

    @model_validator(mode="after")
    def _speaks(self) -> Message:
        if self.tool_calls:
            raise PydanticCustomError("tool_calls", "has tool calls, which this endpoint does not support")
        if not self.content and self.role == "user":
            raise PydanticCustomError("empty", "has no content; write what the user says")
        return self


class StreamOptions(BaseModel):
    """Options of a stream."""

    model_config = ConfigDict(strict=True, extra="forbid")

    include_usage: bool = False
    include_obfuscation: bool = False


class CharterOptions(BaseModel):
    """What is ours: the field `charter` of a request (`extra_body` of the openai client)."""

    model_config = ConfigDict(strict=True, extra="forbid")

    guard: Literal["off", "observe", "gated", "always"] | None = None
    train: bool | None = None
    conversation: Annotated[str, Field(pattern=r"^[A-Za-z0-9_.:-]{1,128}$")] | None = None


class ChatRequest(BaseModel):
    """The body of `POST /v1/chat/completions`."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=0)] | None = None
    stop: Annotated[tuple[str, ...], BeforeValidator(_stop)] = ()
    seed: Annotated[int, Field(ge=-(1 << 63), lt=1 << 64)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    charter: CharterOptions | None = None

    # Accepted, without effect on the answer.
    user: str | None = None
    metadata: Any = None
    store: Any = None
    service_tier: Any = None
    safety_identifier: Any = None
    prompt_cache_key: Any = None
    prompt_cache_retention: Any = None
    parallel_tool_calls: Any = None
    reasoning_effort: Any = None
    verbosity: Any = None

    # Accepted only where they ask for nothing.
    frequency_penalty: Any = None
    presence_penalty: Any = None
    logit_bias: Any = None
    tools: Any = None
    tool_choice: Any = None
    functions: Any = None
    function_call: Any = None
    response_format: Any = None
    modalities: Any = None
    audio: Any = None
    prediction: Any = None
    web_search_options: Any = None

    @model_validator(mode="after")
    def _together(self) -> ChatRequest:
        for name in self.model_fields_set & _WITHOUT_EFFECT.keys():
            value = getattr(self, name)
            if value is not None and value not in _WITHOUT_EFFECT[name]:
                raise PydanticCustomError(
                    "unsupported_parameter", "{name} is not supported here; leave it out", {"name": name}
                )
        if self.top_logprobs is not None and not self.logprobs:
            raise PydanticCustomError("top_logprobs", "top_logprobs needs logprobs: true")
        if self.stream_options is not None and not self.stream:
            raise PydanticCustomError("stream_options", "stream_options needs stream: true")
        if self.messages[-1].role != "user":
            raise PydanticCustomError(
                "last_turn", "the last message must be the user's; messages ends otherwise"
            )
        return self

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with the counts of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def guard(self) -> GuardMode | None:
        """The guard mode that the body asks for."""
        return GuardMode(self.charter.guard) if self.charter and self.charter.guard else None

    def prompt(self) -> Prompt:
        """The conversation for the model."""
        return Prompt(
            tuple(
                ChatMessage(Role.SYSTEM if m.role == "developer" else Role(m.role), m.content)
                for m in self.messages
            )
        )

    def sampling(self, default_max_tokens: int, default_temperature: float) -> Sampling:
        """How the answers are to be sampled."""
        return Sampling(
            temperature=default_temperature if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            top_k=self.top_k or 0,
            max_tokens=self.max_completion_tokens or self.max_tokens or default_max_tokens,
            stop=self.stop,
            seed=None if self.seed is None else self.seed % _SEEDS,
            top_logprobs=self.top_logprobs or 0,
        )


def parse(body: bytes) -> ChatRequest:
    """The request in `body`; raises `ApiError` (400) with the field and what to write instead."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        raise _told(error) from None


def _told(error: ValidationError) -> ApiError:
    """The first fault of a body, in a sentence."""
    faults = error.errors(include_url=False, include_input=False)
    # A misspelt field explains the missing one that it stands for.
    fault = next((f for f in faults if f["type"] == "extra_forbidden"), faults[0])
    param = _path(fault["loc"])
    kind = fault["type"]
    if kind == "json_invalid":
        detail = fault["ctx"]["error"]
        return ApiError(
            400, f"The body is not valid JSON: {detail}. Send one JSON object.", code="invalid_json"
        )
    if kind == "extra_forbidden":
        near = difflib.get_close_matches(param, ChatRequest.model_fields, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else " Leave it out."
        return ApiError(400, f"Unknown field {param!r}.{hint}", code="unknown_parameter", param=param)
    if kind == "missing":
        return ApiError(
            400, f"The field {param!r} is missing.", code="missing_required_parameter", param=param
        )
    if kind in ("unsupported_parameter", "top_logprobs", "stream_options", "last_turn"):
        named = str(fault.get("ctx", {}).get("name", "messages" if kind == "last_turn" else kind))
        code = kind if kind == "unsupported_parameter" else "invalid_value"
        return ApiError(400, f"{fault['msg']}.", code=code, param=named)
    message = fault["msg"].removeprefix("Input ")
    code = "control_character" if kind == "control_character" else "invalid_value"
    where = param or "The body"
    return ApiError(400, f"{where}: {message}.", code=code, param=param or None)


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for part in location:
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path
