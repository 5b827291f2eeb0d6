"""From revisions and helpful prompts to a checkpoint: the whole of `charter sft` without its command line."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from charter.finetune.checkpoints import Vocabulary, load_vocabulary
from charter.lm.base import Conversation
from charter.sft import own, revisions
from charter.sft.config import SftConfig
from charter.sft.examples import Mixture, mix
from charter.sft.revisions import Revision
from charter.sft.training import Trained, train
from charter.telemetry.logs import get_logger

if TYPE_CHECKING:
    from charter.finetune.run import Progress
    from charter.registry import Manifest

log = get_logger(__name__)

Note = Callable[[str, int, int, str], None]
"""Takes what is being done, how much of it is done, how much there is, and a remark."""


@dataclass(frozen=True, slots=True)
class Sources:
    """What a run learns from."""

    model: str
    """Folder or hub id of the checkpoint to start from."""
    revisions: tuple[Path, ...] = ()
    """Parquet files of `charter redteam`, or folders of them."""
    bus: str = ""
    """URI of a bus whose topic `revisions` is read as well."""
    helpful: tuple[Conversation, ...] = ()
    """Prompts that the model answers itself; as many are taken as there are revisions, times `own.share`."""
    answerer: str = ""
    """URI of the model that answers them; empty: the checkpoint itself."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a run made, and of what."""

    trained: Trained
    mixture: Mixture
    changed: int
    """Revisions that differ from their draft."""
    constitution_digests: tuple[str, ...]
    """Of the constitutions that the revisions were made by."""


def run(
    sources: Sources,
    config: SftConfig,
    target: Path,
    *,
    work: Path | None = None,
    logs: Path | None = None,
    note: Note = lambda what, done, total, remark: None,
    stop: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Makes the checkpoint `target`.

    `work` (default: beside it) keeps what a run that is killed goes on from, and goes away at the end. Raises
    `ConfigError`, `CheckpointError`, and `finetune.run.Stopped` when `stop` said so.
    """
    work = work or target.with_name(f"{target.name}.work")
    vocabulary = load_vocabulary(sources.model)
    chosen = _chosen(sources, config)
    answers = asyncio.run(_own_answers(sources, config, len(chosen), work, note))
    pairs = [(r.conversation, r.final) for r in chosen]
    mixture = mix(vocabulary, pairs, answers, config.max_length, config.tuning.seed)
    changed = sum(r.changed for r in chosen)
    log.info(
        "sft begins", revisions=mixture.revisions, changed=changed, own=mixture.own, left=mixture.too_long
    )
    trained = _train(vocabulary, mixture, config, target, work, logs, note, stop)
    shutil.rmtree(work, ignore_errors=True)
    digests = sorted({r.constitution_digest for r in chosen if r.constitution_digest})
    return Outcome(trained, mixture, changed, tuple(digests))


def register(outcome: Outcome, root: str, parent: str) -> Manifest:
    """Writes the new checkpoint to a registry, as a candidate; a second time changes nothing.

    `parent` is the id of the checkpoint that it started from, or empty where the registry has none.
    """
    from charter.registry import Facts, Kind, Registry, Status

    registry = Registry(root)
    mixture, digests = outcome.mixture, outcome.constitution_digests
    facts = Facts(
        Kind.SFT,
        parent=parent,
        constitution_digest=digests[0] if len(digests) == 1 else "",
        note=f"SL-CAI on {mixture.revisions} revisions and {mixture.own} own answers",
    )

    def copy(into: Path) -> None:
        shutil.copytree(outcome.trained.folder, into, dirs_exist_ok=True)

    manifest = registry.write(facts, copy)
    if registry.status(manifest.id) is None:
        registry.set_status(manifest.id, Status.CANDIDATE, "written by SL-CAI")
    return manifest


def id_of(model: str) -> str:
    """The registry's id of a checkpoint folder; empty where it is none of a registry's."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return str(json.loads((Path(model) / "manifest.json").read_text()).get("id") or "")
    return ""


def _chosen(sources: Sources, config: SftConfig) -> list[Revision]:
    found = list(revisions.read_parquet(sources.revisions))
    if sources.bus:
        from charter.bus import open_bus

        with open_bus(sources.bus) as bus:
            found += revisions.read_bus(bus)
    return revisions.choose(
        found, config.max_revisions, keep_unchanged=config.keep_unchanged, seed=config.tuning.seed
    )


async def _own_answers(
    sources: Sources, config: SftConfig, revised: int, work: Path, note: Note
) -> Sequence[tuple[Conversation, str]]:
    wanted = min(round(config.own.share * revised), len(sources.helpful))
    if not wanted:
        return []
    from charter.lm import open_model

    model = open_model(sources.answerer or f"local:{sources.model}")
    try:
        return await own.sample(
            model,
            sources.helpful[:wanted],
            config.own,
            config.tuning.seed,
            work / "own-answers.jsonl",
            lambda done, total: note("own answers", done, total, ""),
        )
    finally:
        await model.close()


def _train(
    vocabulary: Vocabulary,
    mixture: Mixture,
    config: SftConfig,
    target: Path,
    work: Path,
    logs: Path | None,
    note: Note,
    stop: Callable[[], bool],
) -> Trained:
    def report(progress: Progress) -> None:
        # Before the first entry of the log nothing is known of it.
        remark = f"loss {progress.loss:.3f}" if math.isfinite(progress.loss) else ""
        note("training", progress.step, progress.steps, remark)

    return train(
        vocabulary, mixture, config, target, work=work / "trainer", report=report, stop=stop, logs=logs
    )
