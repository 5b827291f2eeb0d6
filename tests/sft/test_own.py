"""The model's own answers to helpful prompts."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from charter.errors import ContextOverflow
from charter.lm.base import (
    ChatMessage,
    Completion,
    FinishReason,
    ModelVersion,
    Prompt,
    Role,
    Samples,
    Sampling,
)
from charter.sft.config import OwnAnswers
from charter.sft.own import sample

PROMPTS = [(ChatMessage(Role.USER, text),) for text in ("cup", "door", "endless", "huge", "silence")]


class Scripted:
    """Answers by the words of the prompt, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, Sampling]] = []

    async def generate(self, prompt: Prompt, sampling: Sampling, n: int = 1) -> Samples:
        word = prompt.messages[-1].content
        self.asked.append((word, sampling))
        if word == "huge":
            raise ContextOverflow("too long")
        reason = FinishReason.LENGTH if word == "endless" else FinishReason.STOP
        text = "" if word == "silence" else f"take the {word}"
        return Samples((Completion(text, (), reason, 1, 1, ModelVersion("m")),))


async def _sample(model: Scripted, file: Path, prompts: Sequence = PROMPTS):
    return await sample(model, prompts, OwnAnswers(temperature=0.5, max_tokens=9), 7, file)


async def test_only_whole_answers_are_kept(tmp_path: Path) -> None:
    answers = await _sample(Scripted(), tmp_path / "own.jsonl")
    assert [(c[0].content, text) for c, text in answers] == [
        ("cup", "take the cup"),
        ("door", "take the door"),
    ]


async def test_each_prompt_has_its_own_seed(tmp_path: Path) -> None:
    model = Scripted()
    await _sample(model, tmp_path / "own.jsonl")
    assert {(word, s.seed, s.temperature, s.max_tokens) for word, s in model.asked} == {
        (p[0].content, 7 + i, 0.5, 9) for i, p in enumerate(PROMPTS)
    }


async def test_a_run_that_was_stopped_asks_only_for_what_is_missing(tmp_path: Path) -> None:
    file = tmp_path / "own.jsonl"
    await _sample(Scripted(), file, PROMPTS[:1])
    with file.open("a") as stream:
        stream.write('{"index": 1, "ans')  # killed while it wrote
    model = Scripted()
    answers = await _sample(model, file)
    assert [text for _, text in answers] == ["take the cup", "take the door"]
    assert "cup" not in [word for word, _ in model.asked]
    assert "door" in [word for word, _ in model.asked]
