"""What a step is about to learn from, written down before it begins.

A killed step is repeated with the same labels and the same scores, although the log has grown and the reward
model may have been renewed meanwhile. Plans are kept until a checkpoint contains their step.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from charter.errors import CheckpointError
from charter.finetune.checkpoints import write_whole


@dataclass(frozen=True, slots=True)
class Plan:
    """One step."""

    parent: str
    """The checkpoint that this run started from or wrote last; empty before the first."""
    step: int
    places: tuple[tuple[int, int], ...]
    """Partition and offset of every record that is consumed."""
    positions: Mapping[str, int]
    """Partition: where the next step goes on."""
    scores: tuple[tuple[float, float], ...]
    """Of both answers of each label."""
    reward_digest: str
    constitution: str = ""
    """Digest of the one under which the labels were taken."""


class Plans:
    """The plans of the steps that no checkpoint contains yet, in a folder of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find(self, parent: str, step: int) -> Plan | None:
        """The plan of a step after this checkpoint, if it was begun before."""
        file = self._file(step)
        try:
            record = json.loads(file.read_text())
            plan = Plan(
                str(record["parent"]),
                int(record["step"]),
                tuple((int(p), int(o)) for p, o in record["places"]),
                {str(p): int(o) for p, o in record["positions"].items()},
                tuple((float(a), float(b)) for a, b in record["scores"]),
                str(record["reward_digest"]),
                str(record.get("constitution", "")),
            )
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}); remove it to begin the step anew with newer labels"
            ) from error
        return plan if plan.parent == parent and plan.step == step else None

    def write(self, plan: Plan) -> None:
        """Keeps it; raises `CheckpointError` when the disk refuses."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(
                f"{self._folder} cannot be made ({error.strerror}); give a folder that can be written"
            ) from error
        write_whole(self._file(plan.step), json.dumps(asdict(plan)) + "\n")

    def forget_before(self, step: int) -> None:
        """Removes the plans of steps that a checkpoint contains."""
        for file in self._folder.glob("step-*.json"):
            if int(file.stem.partition("-")[2]) < step:
                file.unlink(missing_ok=True)

    def _file(self, step: int) -> Path:
        return self._folder / f"step-{step:08d}.json"
