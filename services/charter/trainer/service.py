"""A lineage of policies in training: opened where it stopped, taught step by step, saved as checkpoints.

With several devices every process opens the same `Trainer`; the first one reads the log and tells the others
what to do (`follow`).
"""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry

from charter.constitution.watch import ConstitutionInForce
from charter.finetune.checkpoints import copy_tokenizer
from charter.lm.checkpoint import tokenizer_digest
from charter.registry import Facts, Kind, Labels, Manifest, Registry, Status
from charter.telemetry.logs import get_logger
from charter.telemetry.metrics import ConstitutionMetrics
from charter.trainer import state
from charter.trainer.algorithm.metrics import UpdateMetrics
from charter.trainer.config import TrainerConfig
from charter.trainer.labels import PREFERENCES, Label, Limits, Positions, Take
from charter.trainer.models import Origin, open_models
from charter.trainer.rollout import Rollout
from charter.trainer.update import Updater
from charter.trainer.watch import Watch, observe

_log = get_logger(__name__)
_WATCH = f"{state.TRAINER_FOLDER}/watch.json"


class Trainer:
    """The models, what they have learned from since the last checkpoint, and where the log goes on."""

    def __init__(self, config: TrainerConfig, registry: Registry, accelerator: Any | None = None) -> None:
        """Goes on with the newest checkpoint that was not rolled back, or begins a lineage."""
        from transformers.utils import logging

        logging.disable_progress_bar()
        self.config = config
        self.registry = registry
        self._constitution = _in_force(config.constitution) if config.constitution else None
        newest = newest_of_lineage(registry)
        folder = registry.resolve(newest.id) if newest else None
        self._origin = Origin.read(folder) if folder else Origin.of(config, registry)
        policy, value, reference, base = open_models(self._origin, config, registry)
        self._base = base
        self._updater = Updater(
            policy, value, reference, config.ppo, accelerator or _accelerator(config.precision)
        )
        self.parent = (
            newest.id if newest else (self._origin.policy if self._known(self._origin.policy) else "")
        )
        self.resumed_from = newest
        self.positions: Positions = {}
        if newest and folder:
            state.load(self._updater, folder)
            self.positions = _by_partition(_spent(registry, newest))
        self._watch = Watch.read(folder / _WATCH, config.watch) if folder else Watch(config.watch)
        self._since: list[tuple[Label, tuple[float, float]]] = []
        self._first_positions: Positions = dict(self.positions)
        self._reward_digest = ""
        _log.info(
            "training opened", step=self.step, parent=self.parent or "none", packed=self._updater.packed
        )

    def _known(self, source: str) -> bool:
        return "/" not in source and source != "seed" and source in self.registry

    @property
    def step(self) -> int:
        """Updates behind the policy."""
        return self._updater.step

    @property
    def is_first(self) -> bool:
        """Whether this process reads the log and writes the checkpoints."""
        return bool(self._updater.accelerator.is_main_process)

    @property
    def limits(self) -> Limits:
        """What a label must fit."""
        return Limits(
            self._updater.vocabulary,
            self._updater.context,
            tokenizer_digest(self._base),
            self._constitution_digest(),
        )

    def _constitution_digest(self) -> str:
        if self._constitution is None:
            return self.config.constitution_digest
        self._constitution.refresh()
        return self._constitution.current.digest

    def learn(self, taken: Take, scores: Sequence[tuple[float, float]], reward_digest: str) -> UpdateMetrics:
        """One PPO step. Raises `TrainingStopped` when the run has gone wrong; then nothing may be saved."""
        rollouts = [
            dataclasses.replace(rollout, score=score)
            for label, pair in zip(taken.labels, scores, strict=True)
            for rollout, score in zip(label.rollouts, pair, strict=True)
        ]
        metrics: UpdateMetrics = self._told("learn", rollouts)
        texts = [text for label in taken.labels for text in label.texts]
        self._watch = self._watch.after(observe(metrics, texts, self._is_refusal))
        if not self._first_positions:
            self._first_positions = {
                p: min(r.offset for r in taken.records if r.partition == p)
                for p in {r.partition for r in taken.records}
            }
        self.positions = dict(taken.positions)
        self._since += list(zip(taken.labels, scores, strict=True))
        self._reward_digest = reward_digest
        return metrics

    def _is_refusal(self, text: str) -> bool:
        return text.lstrip().lower().replace("’", "'").startswith(self.config.refusal_openings)

    @property
    def has_unsaved(self) -> bool:
        """Whether something was learned since the last checkpoint."""
        return bool(self._since)

    def checkpoint(self, evaluation: dict[str, Any] | None = None) -> Manifest:
        """Writes a checkpoint, whole or not at all. Raises `CheckpointError` when the disk refuses."""
        events = [label.event for label, _ in self._since]
        facts = Facts(
            Kind.RL,
            parent=self.parent,
            step=self.step,
            positions=_by_name(self.positions),
            constitution_digest=events[-1].constitution_digest if events else "",
            reward_model_digest=self._reward_digest,
            judge_digest=events[-1].judge.digest if events else "",
            labels=Labels(
                count=len(events),
                by_principle=_counted(o.principle_id for e in events for o in e.opinions),
                by_judge=_counted(e.judge.digest for e in events),
                by_constitution=_counted(e.constitution_digest for e in events),
                positions={
                    f"{PREFERENCES}/{p}": (self._first_positions.get(p, end), end)
                    for p, end in self.positions.items()
                },
            ),
            evaluation=evaluation or {},
            needs=tuple(s for s in (self._origin.policy, self._origin.value) if s and self._known(s)),
        )
        manifest = self.registry.write(facts, self._fill)
        if self.registry.status(manifest.id) is None:
            self.registry.set_status(manifest.id, Status.CANDIDATE, "written by the trainer")
        self.parent = manifest.id
        self._since = []
        self._first_positions = dict(self.positions)
        return manifest

    def _fill(self, folder: Path) -> None:
        self._told("save", folder)
        copy_tokenizer(self._base, folder)
        inner = folder / state.TRAINER_FOLDER
        self._watch.write(folder / _WATCH)
        (inner / "origin.json").write_text(json.dumps(dataclasses.asdict(self._origin)) + "\n")
        with (inner / "labels.jsonl").open("w") as stream:
            for label, scores in self._since:
                stream.write(json.dumps(_row(label, scores), ensure_ascii=False) + "\n")

    # Several devices

    def follow(self) -> None:
        """What every process but the first does: takes part in steps and saves until it is told to stop."""
        while True:
            command, payload = self._shared(None)
            if command == "stop":
                return
            self._do(command, payload)

    def finish(self) -> None:
        """Tells the followers to stop."""
        self._shared(("stop", None))

    def _told(self, command: str, payload: Any) -> Any:
        self._shared((command, payload))
        return self._do(command, payload)

    def _do(self, command: str, payload: Any) -> Any:
        if command == "learn":
            rollouts: Sequence[Rollout] = payload
            return self._updater.update(rollouts)
        state.save(self._updater, payload)
        return None

    def _shared(self, message: Any) -> Any:
        """What the first process says, in all of them."""
        if self._updater.accelerator.num_processes == 1:
            return message
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([message])[0]


def newest_of_lineage(registry: Registry) -> Manifest | None:
    """The newest checkpoint that a trainer can go on from: of this kind, and not rolled back."""
    gone = (Status.ROLLED_BACK,)
    for manifest in reversed(registry.list()):
        if manifest.facts.kind is Kind.RL and f"{state.TRAINER_FOLDER}/state.json" in manifest.files:
            change = registry.status(manifest.id)
            if change is None or change.status not in gone:
                return manifest
    return None


def _spent(registry: Registry, start: Manifest) -> Mapping[str, int]:
    """Where the log goes on: behind all that was learned from, also by checkpoints that were rolled back.

    The same labels would make the same model again.
    """
    positions = dict(start.facts.positions)
    for manifest in registry.list():
        if manifest.facts.kind is Kind.RL and start in registry.lineage(manifest.id):
            for place, offset in manifest.facts.positions.items():
                positions[place] = max(offset, positions.get(place, 0))
    return positions


def _in_force(constitution: str) -> ConstitutionInForce:
    metrics = ConstitutionMetrics.of(CollectorRegistry())
    return ConstitutionInForce(constitution, "trainer", metrics, lambda _: None)


def _accelerator(precision: str) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # Followers wait for the first process, and that waits for labels, for as long as it takes.
    patience = InitProcessGroupKwargs(timeout=timedelta(days=7))
    return Accelerator(
        mixed_precision="bf16" if precision == "bfloat16" else "no", kwargs_handlers=[patience]
    )


def _by_partition(positions: Any) -> dict[int, int]:
    return {int(name.rpartition("/")[2]): offset for name, offset in positions.items()}


def _by_name(positions: Positions) -> dict[str, int]:
    return {f"{PREFERENCES}/{p}": offset for p, offset in sorted(positions.items())}


def _counted(names: Any) -> dict[str, int]:
    return dict(sorted(Counter(n for n in names if n).items()))


def _row(label: Label, scores: tuple[float, float]) -> dict[str, Any]:
    """A line of labels.jsonl: from here one walks back to the label, its principles and its rollout."""
    event = label.event
    return {
        "preference_id": event.preference_id,
        "prompt_id": event.prompt_id,
        "partition": label.record.partition,
        "offset": label.record.offset,
        "probability_a": event.probability_a,
        "scores": list(scores),
        "principles": [o.principle_id for o in event.opinions],
        "policy": event.policy.version,
    }
