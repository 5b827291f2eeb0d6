"""From a prompt and the policy's answers to a rollout: what a learner must know, in one record."""

from __future__ import annotations

from charter.errors import BackendUnsupported
from charter.lm.base import Samples
from charter.rpc import convert
from charter.v1 import events_pb2


def rollout_id(prompt: events_pb2.PromptEvent, offset: int) -> str:
    """Names a rollout after its prompt and the prompt's place in the log: made again, it is the same one."""
    return f"{prompt.prompt_id}@{offset}"


def rollout(
    prompt: events_pb2.PromptEvent,
    name: str,
    samples: Samples,
    *,
    temperature: float,
    policy_step: int,
    now_ms: int,
) -> events_pb2.RolloutEvent:
    """The event. Raises `BackendUnsupported` when the policy does not tell token ids and log-probs."""
    if not samples.prompt_token_ids or not all(c.tokens for c in samples.completions):
        raise BackendUnsupported(
            f"policy {samples.model.version} gives no token ids and log-probs, and PPO cannot learn without; "
            "sample from a Charter policy server"
        )
    return events_pb2.RolloutEvent(
        rollout_id=name,
        prompt_id=prompt.prompt_id,
        conversation=prompt.conversation,
        prompt_token_ids=samples.prompt_token_ids,
        answers=[convert.completion_to_proto(c) for c in samples.completions],
        policy=convert.version_to_proto(samples.model),
        temperature=temperature,
        source=prompt.source,
        created_unix_ms=now_ms,
        policy_step=policy_step,
        prompt_created_unix_ms=prompt.created_unix_ms,
    )
