"""The learner: a process of its own that trains, so that scoring goes on and a crash takes nothing along.

TRL takes ten seconds to import, so the process stays between rounds. It dies with its parent, however that
ends.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING, Any

from charter import children, errors
from charter.errors import BackendError, CharterError
from charter.reward.config import RewardConfig

if TYPE_CHECKING:
    from charter.reward.rounds import Job

Tell = Callable[[str, int, int, float], None]
"""Takes training or evaluating, the step, the steps, and the loss."""


class LearnerDiedError(BackendError):
    """The process ended in the middle of a round: killed, or out of memory."""


class Learner:
    """The parent's end. `train` is called by one thread at a time; `stop` by any."""

    def __init__(self, config: RewardConfig) -> None:
        self._config = config
        self._process: Any = None
        self._pipe: Connection | None = None
        self._stopped = threading.Event()
        self._reaping = threading.Lock()

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        process = self._process
        return process.pid if process is not None and process.is_alive() else None

    def arm(self) -> None:
        """Forgets earlier calls of `stop`; before a round."""
        self._stopped.clear()

    def train(self, job: Job, target: Path, tell: Tell) -> bool:
        """Does a round; False when `stop` ended it.

        Raises `LearnerDiedError` when the process did, and what it raised itself.
        """
        pipe = self._started()
        try:
            pipe.send((job, target))
            while not self._stopped.is_set():
                kind, *rest = pipe.recv()
                if kind == "told":
                    tell(*rest)
                elif kind == "done":
                    return True
                else:
                    raise _error(*rest)
            raise EOFError
        except (EOFError, OSError) as error:
            code = self._reap()
            if self._stopped.is_set():
                return False
            raise LearnerDiedError(
                f"the learner of round {job.number} ended with code {code}; the model in force stays; look "
                "for a lack of memory if this comes again"
            ) from error

    def stop(self) -> None:
        """Ends the process; a round under way is lost. Safe to repeat."""
        self._stopped.set()
        process = self._process
        if process is not None:
            process.kill()

    def close(self) -> None:
        """Ends the process and waits for it."""
        self.stop()
        self._reap()

    def _started(self) -> Connection:
        if self.pid is None or self._pipe is None:
            self._reap()
            context = multiprocessing.get_context("spawn")
            self._pipe, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(theirs, self._config), name="charter-reward-learner", daemon=True
            )
            process.start()
            self._process = process
            theirs.close()
        return self._pipe

    def _reap(self) -> int | None:
        with self._reaping:
            process, pipe = self._process, self._pipe
            self._process = self._pipe = None
        if pipe is not None:
            pipe.close()
        if process is None:
            return None
        process.join(5)
        if process.is_alive():
            process.kill()
            process.join()
        code: int | None = process.exitcode
        process.close()
        return code


def _error(name: str, text: str) -> Exception:
    kind = getattr(errors, name, None)
    if isinstance(kind, type) and issubclass(kind, CharterError):
        return kind(text)
    return BackendError(f"the learner failed: {name}: {text}")


def _serve(pipe: Connection, config: RewardConfig) -> None:
    """The process: does rounds until its parent is gone."""
    children.begin(config.learner.niceness)
    if config.learner.threads:
        import torch

        torch.set_num_threads(config.learner.threads)
    with contextlib.suppress(EOFError, OSError):
        while True:
            job, target = pipe.recv()
            _do(pipe, config, job, target)


def _do(pipe: Connection, config: RewardConfig, job: Job, target: Path) -> None:
    try:
        from charter.reward import rounds

        rounds.run(
            job,
            config,
            target,
            report=lambda p: pipe.send(("told", "training", p.step, p.steps, p.loss)),
            evaluating=lambda: pipe.send(("told", "evaluating", 0, 0, 0.0)),
        )
        pipe.send(("done",))
    except (EOFError, BrokenPipeError):
        raise
    except Exception as error:
        pipe.send(("failed", type(error).__name__, str(error)))
