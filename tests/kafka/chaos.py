"""The circle under fire: `make chaos`, or `make chaos CHAOS=--short`.

Rounds: stand-ins on one broker and on three, then the circle's own workers on one. `tests.kafka.arena` says
what a round is and what is counted, `tests.kafka.faults` what is done.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.kafka.arena import HEAD, Cast, Outcome, arena, line, say
from tests.kafka.casts import RealWorkers, StandIns
from tests.kafka.faults import FAULTS, all_of_it, suffer

from charter.bus.broker import missing_tools
from charter.errors import CharterError

CASTS: dict[str, type[Cast]] = {"stand-ins": StandIns, "real workers": RealWorkers}
NUMBERS = {1: "one broker", 3: "three brokers"}


@dataclass(frozen=True)
class Round:
    """Faults that one arena suffers: how often in the full form, and in the short one."""

    cast: str
    brokers: int
    faults: dict[str, tuple[int, int]]

    def times(self, fault: str, short: bool) -> int:
        """How often a fault is done here; one that is not of this round (but was asked for), once."""
        often, seldom = self.faults.get(fault, (1, 1))
        return seldom if short else often


NETWORK = {
    "network: connections reset and refused for 5 s": (3, 1),
    "network: silent (half-open) for 12 s": (3, 1),
    "network: requests arrive, answers lost for 8 s": (3, 1),
    "network: drops in mid-message for 10 s": (3, 1),
    "network: 200 ms late for 10 s": (2, 1),
}
ROUNDS = (
    Round(
        "stand-ins",
        1,
        {
            "none": (2, 1),
            "SIGKILL of a worker": (20, 3),
            "SIGSTOP of a worker, past its session": (5, 1),
            "every broker killed and restarted": (3, 1),
            **NETWORK,
        },
    ),
    Round(
        "stand-ins",
        3,
        {"one broker lost for 8 s": (3, 1), "every broker killed and restarted": (5, 1)},
    ),
    Round(
        "real workers",
        1,
        {
            "none": (1, 1),
            "SIGKILL of a sampler": (4, 1),
            "SIGKILL of a judge worker": (4, 1),
            "SIGKILL of the trainer": (4, 1),
            "SIGKILL of sampler, judge worker and trainer": (1, 0),
            "SIGKILL of the model servers": (2, 1),
            "SIGSTOP of a sampler, past its session": (1, 0),
            "SIGSTOP of a judge worker, past its session": (1, 1),
            "SIGSTOP of the trainer, past its session": (2, 0),
            "every broker killed and restarted": (2, 1),
            "network: silent (half-open) for 12 s": (1, 0),
            "network: requests arrive, answers lost for 8 s": (1, 0),
        },
    ),
)


def run(
    folder: Path, cast: Cast, brokers: int, faults: dict[str, int], ended: list[str] | None = None
) -> list[Outcome]:
    """Does each of the faults so often to an arena of its own, prints the table, and returns it.

    `ended` gets the workers that ended though nobody killed them.
    """
    with arena(folder, cast, brokers) as place:
        outcomes = []
        for fault, times in faults.items():
            outcomes.append(suffer(place, fault, times))
            say(line(outcomes[-1]))
        outcomes.append(all_of_it(place))
        say(line(outcomes[-1]))
        buried = len(place.dead_letters.events())
        if buried:
            say(f"  {buried} dead letters: no message here was bad")
        if ended is not None:
            ended += [*place.workers.ended, *(["a good message was buried"] if buried else [])]
        return outcomes


def chosen(options: argparse.Namespace) -> list[tuple[Round, dict[str, int]]]:
    """The rounds, and how often each fault is done in them."""
    rounds = [r for r in ROUNDS if options.cast in (None, r.cast) and options.brokers in (None, r.brokers)]
    if not rounds:  # asked for what is in no round
        rounds = [Round(options.cast, options.brokers, {"none": (1, 1)})]
    plan = []
    for r in rounds:
        asked = options.fault or list(r.faults)
        if options.fault and options.cast is None and options.brokers is None:
            asked = [fault for fault in asked if fault in r.faults]
        faults = {fault: options.times or r.times(fault, options.short) for fault in asked}
        plan.append((r, {fault: times for fault, times in faults.items() if times}))
    return [(r, faults) for r, faults in plan if faults]


def main() -> int:
    parser = argparse.ArgumentParser(description="The circle under fire.")
    parser.add_argument("--short", action="store_true", help="each fault once or a few times")
    parser.add_argument("--cast", choices=sorted(CASTS), help="only the rounds of these workers")
    parser.add_argument("--brokers", type=int, choices=sorted(NUMBERS), help="only the rounds on so many")
    parser.add_argument(
        "--fault", action="append", choices=sorted(FAULTS), help="only this one; may be repeated"
    )
    parser.add_argument("--times", type=int, default=0, help="do each fault so often")
    parser.add_argument("--json", type=Path, help="write the table here too")
    parser.add_argument("--keep", type=Path, help="keep logs and data in this folder")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that brokers and workers are ended too
    problem = missing_tools()
    if problem is not None:
        say(f"make chaos needs a Kafka broker, and {problem}")
        return 1
    tables: dict[str, list[Outcome]] = {}
    failures: list[str] = []
    with tempfile.TemporaryDirectory() as temporary:
        for r, faults in chosen(options):
            title = f"{r.cast}, {NUMBERS[r.brokers]}"
            say(f"\n{title}\n{HEAD}")
            folder = (options.keep or Path(temporary)) / f"{r.cast}-{r.brokers}".replace(" ", "-")
            folder.mkdir(parents=True, exist_ok=True)
            try:
                tables[title] = run(folder, CASTS[r.cast](), r.brokers, faults, failures)
            except CharterError as error:
                say(f"make chaos: {error}")
                return 1
    if options.json:
        found = {title: [asdict(outcome) for outcome in rows] for title, rows in tables.items()}
        options.json.write_text(json.dumps(found, indent=1))
    dirty = [o for rows in tables.values() for o in rows if not o.clean]
    return 1 if dirty or failures else 0


if __name__ == "__main__":
    sys.exit(main())
