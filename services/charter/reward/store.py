"""What the service keeps in its folder beside the labels: rounds, models, and which one is in force.

    state.json            the last round and its outcome, the model in force
    job.json              the round under way
    rounds/000003/        what the learner made of it
    current               a link to the model in force, for people and for the value model

Models that are or were in force lie in a registry of checkpoints, each with the labels that made it.

Every change is one rename. After a kill at any instant a round is done again, or its outcome is drawn
from its findings again, which gives the same.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from charter.errors import CheckpointError
from charter.feedback.scores import Normalisation
from charter.finetune.checkpoints import write_whole
from charter.registry import Facts, Kind, Manifest, Registry, Status
from charter.reward.promotion import Verdict
from charter.reward.rounds import FINDINGS, RECORD, Findings, Job


@dataclass(frozen=True, slots=True)
class State:
    """What is true after the last round."""

    round: int = 0
    """Number of the last round that ended; 0 before the first."""
    trained: int = 0
    """Labels that it saw: the first so many."""
    in_force: str = ""
    """Id of the checkpoint that scores; empty while there is none."""
    tokenizer_digest: str = ""
    """Of all labels here."""
    outcome: str = ""
    """in_force, kept_old or failed: of the last round."""
    reason: str = ""
    """Why."""
    accuracy: float = 0.0
    """Of the model in force, on the held-out labels of the last round."""
    calibration_error: float = 0.0
    drift: float = 0.0
    paused: bool = False
    """Rounds begin only when somebody asks for them."""


class ModelStore:
    """The folder. One process at a time uses it."""

    def __init__(self, folder: Path, registry: str = "") -> None:
        """Reads the state and clears up after a kill. Raises `CheckpointError`."""
        self.folder = folder
        self.registry = Registry(registry or folder / "models")
        try:
            (folder / "rounds").mkdir(parents=True, exist_ok=True)
            file = folder / "state.json"
            self.state = State(**json.loads(file.read_text())) if file.exists() else State()
            job = folder / "job.json"
            self.job = Job(**json.loads(job.read_text())) if job.exists() else None
        except (OSError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{folder}: state.json or job.json cannot be read ({error}); restore, or name another folder"
            ) from error
        if self.job is not None and self.job.number <= self.state.round:
            self._clear(self.job)

    @property
    def model(self) -> Path | None:
        """Folder of the model in force."""
        return self.registry.resolve(self.state.in_force) if self.state.in_force else None

    def target(self, job: Job) -> Path:
        """Where the learner leaves a round."""
        return self.folder / "rounds" / f"{job.number:06d}"

    def change(self, **changes: object) -> None:
        """Changes the state."""
        self._write(replace(self.state, **changes))  # type: ignore[arg-type]

    def begin(self, job: Job) -> None:
        """Writes down that a round is under way."""
        write_whole(self.folder / "job.json", json.dumps(asdict(job)))
        self.job = job

    def candidate(self, job: Job) -> Path:
        """The model that the learner left."""
        return self.target(job) / "model"

    def findings(self, job: Job) -> Findings | None:
        """What the learner found, once the round is whole."""
        file = self.target(job) / FINDINGS
        return Findings.loads(file.read_text()) if file.is_file() else None

    def settle(self, found: Findings, verdict: Verdict) -> None:
        """Ends a round: its model comes into force, or the old one stays."""
        job, measured = found.job, found.candidate
        in_force = self.state.in_force
        if verdict.promoted:
            in_force = self._register(found, verdict).id
            self.registry.set_status(in_force, Status.SERVING, verdict.reason, asdict(measured.quality))
        elif found.in_force is not None:
            measured = found.in_force
        self._write(
            replace(
                self.state,
                round=job.number,
                trained=job.upto,
                in_force=in_force,
                outcome="in_force" if verdict.promoted else "kept_old",
                reason=verdict.reason,
                accuracy=measured.quality.accuracy,
                calibration_error=measured.quality.calibration_error,
                drift=measured.drift,
            )
        )
        self._clear(job)
        self._link()

    def adopt(self, folder: Path) -> None:
        """Puts a reward model in force that was made elsewhere."""
        facts = Facts(Kind.REWARD, note="given by the configuration")
        manifest = self.registry.write(facts, lambda into: _copy(folder, into))
        self.registry.set_status(manifest.id, Status.SERVING, facts.note)
        self.change(in_force=manifest.id, reason=facts.note)
        self._link()

    def _register(self, found: Findings, verdict: Verdict) -> Manifest:
        """Writes the round's model to the registry; a second time changes nothing, its id is its content."""
        learned = found.learned
        facts = Facts(
            Kind.REWARD,
            parent=self.state.in_force,
            step=found.job.number,
            constitution_digest=_commonest(learned.by_constitution),
            judge_digest=_commonest(learned.by_judge),
            labels=learned,
            evaluation={**asdict(found.candidate.quality), "drift": found.candidate.drift},
            note=verdict.reason,
        )
        return self.registry.write(facts, lambda into: _copy(self.candidate(found.job), into))

    def give_up(self, job: Job, reason: str) -> None:
        """Ends a round that cannot be done; its labels are in the next round's window."""
        self._write(replace(self.state, round=job.number, trained=job.upto, outcome="failed", reason=reason))
        self._clear(job)

    def drop(self, job: Job) -> None:
        """Forgets a round that somebody stopped."""
        self._clear(job)

    def _write(self, state: State) -> None:
        write_whole(self.folder / "state.json", json.dumps(asdict(state), indent=1))
        self.state = state

    def _clear(self, job: Job) -> None:
        target = self.target(job)
        (self.folder / "job.json").unlink(missing_ok=True)
        for left in (
            target,
            target.with_name(f"{target.name}.work"),
            target.with_name(f".{target.name}.partial"),
        ):
            shutil.rmtree(left, ignore_errors=True)
        self.job = None

    def _link(self) -> None:
        """A convenience: a file system without links goes without."""
        if not self.state.in_force:
            return
        with contextlib.suppress(OSError):
            draft = self.folder / ".current"
            draft.unlink(missing_ok=True)
            draft.symlink_to(self.registry.resolve(self.state.in_force).absolute())
            draft.replace(self.folder / "current")


def _copy(source: Path, into: Path) -> None:
    shutil.copytree(source, into, dirs_exist_ok=True)


def _commonest(counts: Mapping[str, int]) -> str:
    return max(counts, key=lambda name: (counts[name], name), default="")


def scale_of(folder: Path) -> Normalisation:
    """Mean and deviation that a reward model's folder records. Raises `CheckpointError`."""
    try:
        record = json.loads((folder / RECORD).read_text())
        return Normalisation(float(record["mean"]), float(record["deviation"]))
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder}: {RECORD} does not say how its scores are scaled ({error}); use a model that this "
            "service made, or start from a language model"
        ) from error
