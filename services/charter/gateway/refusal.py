"""The refusal that is given when no revision passed: polite, says which kind of principle, offers to go on.

It is written here and not by a model, so that it is safe by construction.
"""

from __future__ import annotations

from charter.constitution.model import Principle

_KINDS_EN = {
    "harm": "it could lead to somebody being hurt",
    "illegality": "it could help with something unlawful",
    "discrimination": "it could be unfair to people for who they are",
    "privacy": "it could intrude on somebody's private life",
    "self-harm": "it could endanger you or someone close to you",
    "deception": "it could help to deceive somebody",
    "honesty": "I could not say it honestly",
    "helpfulness": "it would not have helped you",
}
_KINDS_ZH = {
    "harm": "它可能使人受到伤害",
    "illegality": "它可能助长违法行为",
    "discrimination": "它可能对某些人不公平",
    "privacy": "它可能侵犯他人的隐私",
    "self-harm": "它可能危及您或您身边的人",
    "deception": "它可能帮助欺骗他人",
    "honesty": "我无法诚实地这样说",
    "helpfulness": "它对您没有真正的帮助",
}


def refusal(principle: Principle | None, language: str) -> str:
    """A refusal for an answer that kept breaking `principle` (None: one that this gateway does not know)."""
    if language.lower().split("-", maxsplit=1)[0] == "zh":
        reason = (
            _KINDS_ZH.get(principle.category, "它违背了我遵循的一条原则")
            if principle
            else "它违背了我遵循的一条原则"
        )
        title = f"(原则:{principle.title})" if principle else ""
        return (
            f"很抱歉,我不能这样回答,因为{reason}。{title}如果您告诉我您想达到的目的,我愿意换一种方式帮助您。"
        )
    reason = _KINDS_EN.get(principle.category, "") if principle else ""
    because = reason or "it went against a principle that I follow"
    title = f" (The principle: {principle.title.rstrip('.')}.)" if principle else ""
    return (
        f"I'm sorry, I can't answer this as asked, because {because}.{title} "
        "If you tell me what you are trying to achieve, I will gladly help in another way."
    )
