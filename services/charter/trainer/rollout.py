"""A frozen rollout: one scored answer with everything that PPO needs to learn from it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from charter.errors import RequestError


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer that some version of the policy gave, and what the reward model thinks of it."""

    rollout_id: str
    prompt_ids: tuple[int, ...]
    answer_ids: tuple[int, ...]
    """What followed the prompt, the stop token included; in conversations, the user's later turns too."""
    behaviour_logprobs: tuple[float, ...]
    """Of each answer token under the whole distribution of the policy that behaved, at `temperature`. Where
    sampling was truncated, the log of the kept mass has been added."""
    score: float
    """The reward model's, normalised."""
    stopped: bool = True
    """Whether the answer ended by itself; false where it was cut off."""
    temperature: float = 1.0
    policy_step: int = 0
    """Trainer steps behind the policy that behaved."""
    drawn: tuple[bool, ...] | None = None
    """Which answer tokens the policy drew; None: all. False marks tokens that the user wrote."""

    @property
    def tokens(self) -> int:
        """Prompt and answer together."""
        return len(self.prompt_ids) + len(self.answer_ids)

    def checked(self, vocabulary: int, context: int) -> Rollout:
        """The rollout itself, if PPO can learn from it; raises `RequestError` with what is wrong."""
        where = f"rollout {self.rollout_id!r}"
        if not self.prompt_ids:
            raise RequestError(f"{where} has no prompt tokens; the first answer token needs one to follow")
        if not self.answer_ids:
            raise RequestError(
                f"{where} has an empty answer, from which nothing can be learned; sample it again"
            )
        if len(self.behaviour_logprobs) != len(self.answer_ids):
            raise RequestError(
                f"{where} has {len(self.answer_ids)} answer tokens and {len(self.behaviour_logprobs)} "
                "log-probs; the sampler must store one for each token"
            )
        if self.drawn is not None and (len(self.drawn) != len(self.answer_ids) or not any(self.drawn)):
            raise RequestError(f"{where}: `drawn` must mark each answer token, and at least one as drawn")
        if not math.isfinite(self.score):
            raise RequestError(f"{where} has the score {self.score}; the reward model is broken")
        if not all(math.isfinite(p) and p <= 1e-4 for p in self.behaviour_logprobs):
            raise RequestError(f"{where} has log-probs that are not finite, or above 0")
        if not self.temperature > 0:
            raise RequestError(
                f"{where} was sampled at temperature {self.temperature}; PPO needs answers drawn at random"
            )
        if not all(0 <= t < vocabulary for t in (*self.prompt_ids, *self.answer_ids)):
            raise RequestError(
                f"{where} has token ids outside the policy's vocabulary of {vocabulary}; it was made with "
                "another tokenizer"
            )
        if self.tokens > context:
            raise RequestError(
                f"{where} has {self.tokens} tokens; the policy's context holds {context}: shorten the "
                "prompt, or lower the sampler's max_tokens"
            )
        return self
