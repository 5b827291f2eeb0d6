"""What is known about a request and its answer while it goes through the gateway."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from charter.gateway.gate import Outcome
from charter.gateway.guard import GuardMode, Verdict
from charter.lm.base import FinishReason, ModelVersion, Prompt, Role, Sampling, Token


@dataclass(frozen=True, slots=True)
class Call:
    """A chat request that was let in."""

    request_id: str
    model: str
    """The name by which the client asked for it."""
    prompt: Prompt
    sampling: Sampling
    n: int
    logprobs: bool
    stream: bool
    include_usage: bool
    mode: GuardMode
    key_id: str
    named: str
    """The name that the client gave the conversation, or empty."""
    train: bool
    """Whether the user gives the conversation for training."""

    @property
    def conversation(self) -> str:
        """The name by which an upstream is chosen; all turns of a conversation have the same.

        Without a name from the client it is made from the key, the system message and the first question,
        since turns are only ever added.
        """
        return self.named or _opening(self.prompt, self.key_id)

    @property
    def recorded_as(self) -> str:
        """The name on the bus; the request id rather than a hash of words, which could be guessed back."""
        return self.named or self.request_id


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of an answer that may leave."""

    index: int
    text: str
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """One answer as it is given."""

    outcome: Outcome
    tokens: tuple[Token, ...]
    """Empty where a revision or a refusal took the draft's place."""
    finish_reason: FinishReason


@dataclass(frozen=True, slots=True)
class Answer:
    """All answers to a request, and what they cost."""

    choices: tuple[Choice, ...]
    prompt_tokens: int
    completion_tokens: int
    """Tokens that the policy wrote; the guard's own work is not the client's."""
    policy: ModelVersion
    draft_seconds: float
    notes: tuple[str, ...] = ()
    training: str | None = None
    """None: not given; "accepted"; or why it was not recorded."""

    @property
    def verdict(self) -> Verdict:
        """The most severe of the choices'."""
        return max((c.outcome.verdict for c in self.choices), key=lambda v: v.severity)

    @property
    def rounds(self) -> int:
        """The most rounds that a choice took."""
        return max(c.outcome.rounds for c in self.choices)

    @property
    def constitution_digest(self) -> str:
        """Of the constitution that the answers were held to; empty without a guard."""
        return next(
            (c.outcome.constitution_digest for c in self.choices if c.outcome.constitution_digest), ""
        )

    @property
    def usage(self) -> dict[str, int]:
        """OpenAI's `usage`."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "total_tokens": self.prompt_tokens + self.completion_tokens,
        }


def _opening(prompt: Prompt, key_id: str) -> str:
    digest = hashlib.sha256(key_id.encode())
    for message in prompt.messages:
        digest.update(f"\0{message.role}\0{message.content}".encode())
        if message.role is Role.USER:
            break
    return digest.hexdigest()[:32]


def charter_field(call: Call, answer: Answer, total_seconds: float) -> dict[str, Any]:
    """The field `charter` of a response or of a stream's last chunk."""
    first = answer.choices[0]
    report: dict[str, Any] = {
        "request_id": call.request_id,
        "guard": call.mode.value,
        "verdict": answer.verdict.value,
        "constitution": answer.constitution_digest or None,
        "policy_version": answer.policy.version,
        "policy_digest": answer.policy.digest or None,
        "rounds": answer.rounds,
        "principles": _principles(first.outcome),
        "timings_ms": {
            "draft": _ms(answer.draft_seconds),
            "assess": _ms(max(c.outcome.assess_seconds for c in answer.choices)),
            "revise": _ms(max(c.outcome.revise_seconds for c in answer.choices)),
            "total": _ms(total_seconds),
        },
    }
    if len(answer.choices) > 1:
        report["choices"] = [
            {
                "index": i,
                "verdict": c.outcome.verdict.value,
                "rounds": c.outcome.rounds,
                "principles": _principles(c.outcome),
            }
            for i, c in enumerate(answer.choices)
        ]
        report["principles"] = [p for c in report["choices"] for p in c["principles"]]
    if first.outcome.critic_version:
        report["critic_version"] = first.outcome.critic_version
    if answer.training is not None:
        accepted = answer.training == "accepted"
        report["training"] = {"recorded": accepted} | ({} if accepted else {"reason": answer.training})
    if answer.notes:
        report["notes"] = list(answer.notes)
    return report


def charter_headers(answer: Answer) -> dict[str, str]:
    """The verdict as headers, where it is known before they leave."""
    headers = {
        "X-Charter-Verdict": answer.verdict.value,
        "X-Charter-Policy-Version": plain(answer.policy.version),
        "X-Charter-Rounds": str(answer.rounds),
    }
    if answer.constitution_digest:
        headers["X-Charter-Constitution"] = plain(answer.constitution_digest)
    principles = dict.fromkeys(p.id for c in answer.choices for p in c.outcome.principles)
    if principles:
        headers["X-Charter-Principles"] = plain(",".join(principles))
    return headers


def plain(text: str) -> str:
    """Text that may stand in a header: printable ASCII, nothing else."""
    return "".join(c if " " <= c <= "~" else "?" for c in text)


def _principles(outcome: Outcome) -> list[dict[str, Any]]:
    return [
        {"id": p.id, "before": round(p.before, 4), "after": None if p.after is None else round(p.after, 4)}
        for p in outcome.principles
    ]


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 2)
