"""Protobuf messages to `charter.lm.base` records, and back."""

from __future__ import annotations

from collections.abc import Iterable

from charter.errors import RequestError
from charter.lm import base
from charter.lm.sampling import check_sampling
from charter.v1 import types_pb2

_ROLE_TO = {
    base.Role.SYSTEM: types_pb2.ROLE_SYSTEM,
    base.Role.USER: types_pb2.ROLE_USER,
    base.Role.ASSISTANT: types_pb2.ROLE_ASSISTANT,
}
_ROLE_FROM = {proto: role for role, proto in _ROLE_TO.items()}
_REASON_TO = {
    base.FinishReason.STOP: types_pb2.FINISH_REASON_STOP,
    base.FinishReason.LENGTH: types_pb2.FINISH_REASON_LENGTH,
    base.FinishReason.CANCELLED: types_pb2.FINISH_REASON_CANCELLED,
}
_REASON_FROM = {proto: reason for reason, proto in _REASON_TO.items()}


def message_to_proto(message: base.ChatMessage) -> types_pb2.ChatMessage:
    """One turn, for the wire."""
    return types_pb2.ChatMessage(role=_ROLE_TO[message.role], content=message.content)


def messages_to_proto(messages: Iterable[base.ChatMessage]) -> list[types_pb2.ChatMessage]:
    """A conversation, for the wire."""
    return [message_to_proto(m) for m in messages]


def messages_from_proto(messages: Iterable[types_pb2.ChatMessage]) -> base.Conversation:
    """A conversation from the wire; raises `RequestError` for an unknown role or no message at all."""
    found = []
    for i, message in enumerate(messages):
        if message.role not in _ROLE_FROM:
            raise RequestError(f"message {i} has no known role; give SYSTEM, USER or ASSISTANT")
        found.append(base.ChatMessage(_ROLE_FROM[message.role], message.content))
    if not found:
        raise RequestError("the conversation is empty; give at least one message")
    return tuple(found)


def sampling_to_proto(sampling: base.Sampling) -> types_pb2.Sampling:
    """Every field set, so that the server's defaults do not enter."""
    return types_pb2.Sampling(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=sampling.top_k,
        max_tokens=sampling.max_tokens,
        stop=sampling.stop,
        seed=sampling.seed,
        top_logprobs=sampling.top_logprobs,
    )


def sampling_from_proto(sampling: types_pb2.Sampling, defaults: base.Sampling | None = None) -> base.Sampling:
    """Fields that are not set are taken from `defaults`; raises `RequestError` for one out of range."""
    given = defaults or base.Sampling()
    found = base.Sampling(
        temperature=_exact(sampling.temperature) if sampling.HasField("temperature") else given.temperature,
        top_p=_exact(sampling.top_p) if sampling.HasField("top_p") else given.top_p,
        top_k=sampling.top_k if sampling.HasField("top_k") else given.top_k,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else given.max_tokens,
        stop=tuple(sampling.stop) or given.stop,
        seed=sampling.seed if sampling.HasField("seed") else given.seed,
        top_logprobs=sampling.top_logprobs,
    )
    check_sampling(found)
    return found


def _exact(value: float) -> float:
    # 0.7 comes off the wire as 0.699999988 (float32): the decimal that was meant has at most 7 digits.
    return float(f"{value:.7g}")


def version_to_proto(version: base.ModelVersion) -> types_pb2.ModelVersion:
    """Which weights spoke, for the wire."""
    return types_pb2.ModelVersion(
        version=version.version, digest=version.digest, tokenizer_digest=version.tokenizer_digest
    )


def version_from_proto(version: types_pb2.ModelVersion) -> base.ModelVersion:
    """Which weights spoke."""
    return base.ModelVersion(version.version, version.digest, version.tokenizer_digest)


def token_to_proto(token: base.Token) -> types_pb2.Token:
    """A sampled token, for the wire (`kept_log_mass` travels beside it, in `Completion`)."""
    return types_pb2.Token(
        token_id=token.token_id,
        text=token.text,
        logprob=token.logprob,
        alternatives=[
            types_pb2.TokenAlternative(token_id=a.token_id, text=a.text, logprob=a.logprob)
            for a in token.alternatives
        ],
    )


def token_from_proto(token: types_pb2.Token, kept_log_mass: float = 0.0) -> base.Token:
    """A sampled token."""
    alternatives = tuple(base.Alternative(a.token_id, a.text, a.logprob) for a in token.alternatives)
    return base.Token(token.token_id, token.text, token.logprob, alternatives, kept_log_mass)


def finish_reason_to_proto(reason: base.FinishReason | None) -> types_pb2.FinishReason.ValueType:
    """Why an answer ended, for the wire; None while it goes on."""
    return types_pb2.FINISH_REASON_UNSPECIFIED if reason is None else _REASON_TO[reason]


def finish_reason_from_proto(reason: types_pb2.FinishReason.ValueType) -> base.FinishReason | None:
    """Why an answer ended; None when the message does not say."""
    return _REASON_FROM.get(reason)


def completion_to_proto(completion: base.Completion, with_tokens: bool = False) -> types_pb2.Completion:
    """A whole answer, for the wire or a topic; `with_tokens` adds each token's text and alternatives."""
    kept = [t.kept_log_mass for t in completion.tokens]
    return types_pb2.Completion(
        text=completion.text,
        token_ids=completion.token_ids,
        logprobs=completion.logprobs,
        finish_reason=finish_reason_to_proto(completion.finish_reason),
        tokens=[token_to_proto(t) for t in completion.tokens] if with_tokens else [],
        kept_log_mass=kept if any(kept) else [],
    )


def completion_from_proto(
    completion: types_pb2.Completion, model: base.ModelVersion, prompt_tokens: int = 0
) -> base.Completion:
    """A whole answer. Tokens that came without their texts have empty ones."""
    ids, kept = completion.token_ids, completion.kept_log_mass
    masses = list(kept) or [0.0] * len(ids)
    if completion.tokens:
        tokens = tuple(token_from_proto(t, m) for t, m in zip(completion.tokens, masses, strict=True))
    else:
        tokens = tuple(
            base.Token(i, "", p, (), m) for i, p, m in zip(ids, completion.logprobs, masses, strict=True)
        )
    reason = finish_reason_from_proto(completion.finish_reason) or base.FinishReason.STOP
    return base.Completion(completion.text, tokens, reason, prompt_tokens, len(tokens), model)
