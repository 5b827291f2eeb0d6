"""The model's own answers to helpful prompts: what keeps it from forgetting how to help.

Answers are appended to a file as they come, so that a run that is stopped goes on where it was.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from charter.errors import CheckpointError, ContextOverflow
from charter.lm.base import Conversation, FinishReason, LanguageModel, Prompt, Sampling
from charter.sft.config import OwnAnswers


async def sample(
    model: LanguageModel,
    prompts: Sequence[Conversation],
    config: OwnAnswers,
    seed: int,
    file: Path,
    report: Callable[[int, int], None] = lambda done, total: None,
) -> list[tuple[Conversation, str]]:
    """One answer to each prompt, unfinished and empty ones left out; the same seed gives the same answers.

    `file` keeps the answers; those that it has already are not sampled again.
    """
    kept = _load(file)
    gate = asyncio.Semaphore(config.concurrency)
    missing = [i for i in range(len(prompts)) if i not in kept]
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a", encoding="utf-8") as stream:

            async def one(index: int) -> None:
                async with gate:
                    answer = await _answer(model, prompts[index], config, seed + index)
                kept[index] = answer
                stream.write(json.dumps({"index": index, "answer": answer}, ensure_ascii=False) + "\n")
                report(len(kept), len(prompts))

            async with asyncio.TaskGroup() as group:
                for index in missing:
                    group.create_task(one(index))
    except* OSError as errors:
        raise CheckpointError(
            f"{file} cannot be written ({errors.exceptions[0]}); make room on the disk"
        ) from None
    return [(prompts[i], kept[i]) for i in range(len(prompts)) if kept[i].strip()]


async def _answer(model: LanguageModel, conversation: Conversation, config: OwnAnswers, seed: int) -> str:
    sampling = Sampling(temperature=config.temperature, max_tokens=config.max_tokens, seed=seed)
    try:
        completion = (await model.generate(Prompt(conversation), sampling)).completions[0]
    except ContextOverflow:
        return ""
    return completion.text if completion.finish_reason is FinishReason.STOP else ""


def _load(file: Path) -> dict[int, str]:
    """What an earlier run kept; a last line that was cut off by a crash is sampled again."""
    kept: dict[int, str] = {}
    if file.is_file():
        whole = [
            line for line in file.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")
        ]
        for line in whole:
            record = json.loads(line)
            kept[int(record["index"])] = str(record["answer"])
        file.write_text("".join(whole), encoding="utf-8")
    return kept
