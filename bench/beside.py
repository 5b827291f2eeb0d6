"""What learning costs the endpoint beside it, and how fast Ctrl-C ends each part of it.

    python bench/beside.py [--every 1.0] [--alone 60] [--stops] [--json FILE]

`charter run` is started with the seed model: first without learning, then with it, up to a few PPO steps.
Every so many seconds a plain held-out prompt is asked, guarded as users are, and its latency counts for the
phase that the learning was in. With --stops, SIGINT is then sent in every phase, in a reward round and
while the gate asks, each followed by a start of the same state; the time until the process is gone is what an
operator waits.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from charter.seedmodel.world import RequestClass, Split, sample

SEED = 21_000
PATIENCE_S = 900.0
ALONE = "alone"
PHASE = re.compile(r"^learning: (revising|supervised learning|comparing|reinforcing|done)$", re.MULTILINE)
ENDPOINT = re.compile(r"endpoint +(http://[\d.:]+)/v1")
STEPS = 6


class Run:
    """`charter run` in a process group of its own, as a terminal would have it."""

    def __init__(self, state: Path, learn: bool) -> None:
        arguments = ["--learn", "--set", f"learning.steps={STEPS}"] if learn else ["--no-learn"]
        command = [
            sys.executable,
            "-m",
            "charter.cli",
            "run",
            "--port",
            "0",
            "--state",
            str(state),
            *arguments,
        ]
        self._log = state.with_suffix(".log")
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def output(self) -> str:
        """All that it printed."""
        return self._log.read_text()

    @property
    def phase(self) -> str:
        """Of the learning; empty before the first."""
        found = PHASE.findall(self.output)
        return found[-1] if found else ""

    def url(self) -> str:
        """Where it answers, once it does."""
        self.until(lambda: "ready after" in self.output)
        found = ENDPOINT.search(self.output)
        assert found is not None
        return found[1]

    def until(self, condition: Callable[[], bool]) -> None:
        """Waits; raises when the process ends, or patience does."""
        deadline = time.monotonic() + PATIENCE_S
        while not condition():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"charter run is not where it should be:\n{self.output[-2000:]}")
            time.sleep(0.05)

    def interrupt(self) -> tuple[float, int]:
        """Ctrl-C: seconds until the process was gone, and its exit status."""
        began = time.perf_counter()
        os.killpg(self._process.pid, signal.SIGINT)
        status = self._process.wait(120)
        return time.perf_counter() - began, status

    def close(self) -> None:
        """Ends it, however it is."""
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()


class Asking:
    """Asks every so many seconds, on a thread; latencies by phase."""

    def __init__(self, run: Run, every: float) -> None:
        self.seconds: dict[str, list[float]] = {}
        self._run, self._every, self._url = run, every, run.url()
        self._stopping = threading.Event()
        self._error: OSError | None = None
        self._thread = threading.Thread(target=self._ask_until_stopped, daemon=True)
        self._thread.start()

    def stop(self) -> dict[str, list[float]]:
        """What was measured; raises what ended the asking."""
        self._stopping.set()
        self._thread.join()
        if self._error is not None:
            raise self._error
        return self.seconds

    @property
    def failed(self) -> bool:
        """No more is asked."""
        return self._error is not None

    def _ask_until_stopped(self) -> None:
        try:
            self._ask_on()
        except OSError as error:
            self._error = error

    def _ask_on(self) -> None:
        requests = sample(SEED, RequestClass.PLAIN, Split.HELDOUT, 400)
        self._ask(requests[0].text, 0)
        for number in range(1, 1_000_000):
            if self._stopping.wait(self._every):
                return
            phase = self._run.phase or ALONE
            taken = self._ask(requests[number % len(requests)].text, number)
            if phase == (self._run.phase or ALONE):
                self.seconds.setdefault(phase, []).append(taken)

    def _ask(self, text: str, seed: int) -> float:
        body = {"model": "charter", "messages": [{"role": "user", "content": text}], "temperature": 0.7}
        request = urllib.request.Request(
            f"{self._url}/v1/chat/completions",
            json.dumps({**body, "seed": seed, "max_tokens": 128}).encode(),
            {"Content-Type": "application/json"},
        )
        began = time.perf_counter()
        with urllib.request.urlopen(request, timeout=300) as response:
            response.read()
        return time.perf_counter() - began


def measure_latency(folder: Path, every: float, alone: int) -> list[dict[str, Any]]:
    """A row for the endpoint alone and one for each phase of the learning."""
    seconds: dict[str, list[float]] = {}
    for learn in (False, True):
        run = Run(folder / f"latency-{learn}", learn)
        try:
            asking = Asking(run, every)
            enough = _learned(run) if learn else _asked(asking, alone)
            run.until(lambda enough=enough, asking=asking: enough() or asking.failed)  # type: ignore[misc]
            measured = asking.stop()
            if learn:
                measured.pop(ALONE, None)  # before its first phase
            seconds |= measured
        finally:
            run.close()
    base = statistics.median(seconds[ALONE])
    return [_row(phase, taken, base) for phase, taken in seconds.items()]


def _learned(run: Run) -> Callable[[], bool]:
    return lambda: run.phase == "done"


def _asked(asking: Asking, count: int) -> Callable[[], bool]:
    return lambda: len(asking.seconds.get(ALONE, ())) >= count


def _row(phase: str, taken: Sequence[float], base: float) -> dict[str, Any]:
    return {
        "phase": phase,
        "n": len(taken),
        "median_ms": round(statistics.median(taken) * 1000, 1),
        "p95_ms": round(sorted(taken)[int(0.95 * (len(taken) - 1))] * 1000, 1),
        "relative": round(statistics.median(taken) / base, 2),
    }


@dataclass(frozen=True, slots=True)
class Instant:
    """When Ctrl-C comes."""

    name: str
    reached: Callable[[Run, Path], bool]


def _counted(pattern: str) -> Callable[[Run, Path], bool]:
    return lambda run, state: re.search(pattern, run.output, re.MULTILINE) is not None


INSTANTS = (
    Instant("revising", _counted(r"^learning: revisions [1-9]")),
    Instant("supervised learning", _counted(r"^learning: training [1-9]")),
    Instant("gate of SL-CAI, and first pairs", _counted(r"^learning: comparing")),
    Instant("reward round", lambda run, state: (state / "reward" / "job.json").exists()),
    Instant("reinforcing", _counted(r"^learning: step ")),
)


def measure_stops(folder: Path) -> list[dict[str, Any]]:
    """One state from its beginning, interrupted at each instant and started again."""
    state = folder / "stops"
    rows = []
    for instant in INSTANTS:
        run = Run(state, learn=True)
        try:
            run.until(lambda run=run, instant=instant: instant.reached(run, state))  # type: ignore[misc]
            time.sleep(1.0)
            seconds, status = run.interrupt()
        finally:
            run.close()
        rows.append({"instant": instant.name, "seconds": round(seconds, 2), "status": status})
        print(f"  Ctrl-C in {instant.name}: {seconds:.1f} s, status {status}", file=sys.stderr)
    return rows


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--every", type=float, default=1.0, help="seconds between two questions")
    parser.add_argument("--alone", type=int, default=60, help="questions without learning")
    parser.add_argument("--stops", action="store_true", help="also Ctrl-C at every instant; minutes")
    parser.add_argument("--json", type=Path, help="writes all figures there")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        result: dict[str, Any] = {"latency": measure_latency(Path(name), args.every, args.alone)}
        print("phase                  n  median ms  p95 ms  relative to alone")
        for r in result["latency"]:
            print(f"{r['phase']:20}{r['n']:4}{r['median_ms']:11.1f}{r['p95_ms']:8.1f}  {r['relative']:.2f}")
        if args.stops:
            result["stops"] = measure_stops(Path(name))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
