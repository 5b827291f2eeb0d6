"""Which checkpoints may lose their weights, so that a run without end fits a disk. Their manifests stay."""

from __future__ import annotations

from collections.abc import Sequence

from charter.registry.manifest import Kind, Manifest
from charter.registry.status import POLICY, Change, Status

_WAITING = (Status.CANDIDATE, Status.PROMOTING)
_TAKEN_OUT = (Status.ROLLED_BACK, Status.REJECTED)


def expendable(manifests: Sequence[Manifest], history: Sequence[Change], keep: int) -> list[str]:
    """Ids, the oldest first. `manifests` are in the order of their making.

    Only what RL made is ever pruned; seed, SL-CAI and reward models are few. Kept are the newest `keep`; the
    last `keep` that served and were not taken out, but at least the one that serves and the one before it, to
    roll back to; whatever waits for the gate; and what those need.
    """
    last = {c.checkpoint_id: c.status for c in history}
    kept = {name for name, status in last.items() if status in _WAITING}
    made_by_rl = [m.id for m in manifests if m.facts.kind is Kind.RL]
    kept.update(made_by_rl[-keep:])
    served = [c.checkpoint_id for c in history if c.status is Status.SERVING and c.family == POLICY]
    sound = [name for name in dict.fromkeys(reversed(served)) if last[name] not in _TAKEN_OUT]
    kept.update(sound[: max(keep, 2)])
    needed = {name for m in manifests if m.id in kept for name in m.facts.needs}
    return [name for name in made_by_rl if name not in kept | needed]
