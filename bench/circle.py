"""How well sampling and training overlap: two figures, each a ratio within one run.

1. `asynchronous`: the same number of PPO steps with a staleness bound of 0 (sampling and training take turns)
   and of 2. Training is real: the seed model, the real bus, the real pacing. Sampling is simulated: labels
   that were sampled once are handed out again after a wait of as long as a training step takes, as another
   machine would. The ratio of wall times has an ideal of 2. Wanted: at least 1.6.
2. `idle`: from the summary of a `charter demo` (`--demo DIR`), the share of wall time during PPO in which
   neither sampling nor training computes. Wanted: at most 15 %.

    python bench/circle.py [--steps 12] [--demo DIR]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from charter.bus import Bus, Outgoing, open_bus
from charter.bus.messages import encode
from charter.bus.topics import PREFERENCES, PROMPTS
from charter.bus.worker import Worker, WorkerOptions
from charter.circle.config import CircleConfig
from charter.lm.base import ChatMessage, LanguageModel, Prompt, Role, Sampling
from charter.rpc import convert
from charter.sampler.config import SamplerConfig
from charter.sampler.pacing import JUDGE_GROUP, ROLLOUTS, Pacer
from charter.seedmodel import WEIGHTS
from charter.seedmodel.world import prompts
from charter.v1 import events_pb2

LABELS = 32
WANTED_RATIO, WANTED_IDLE = 1.6, 0.15


async def sampled(model: LanguageModel, count: int) -> list[events_pb2.PreferenceEvent]:
    """Labels as a judge would have given them, on answers of the seed model."""

    async def one(number: int, text: str) -> events_pb2.PreferenceEvent:
        conversation = (ChatMessage(Role.USER, text),)
        samples = await model.generate(Prompt(conversation), Sampling(1.0, max_tokens=96, seed=number), 2)
        a, b = (convert.completion_to_proto(c) for c in samples.completions)
        return events_pb2.PreferenceEvent(
            preference_id=f"label-{number}",
            prompt_id=f"prompt-{number}",
            conversation=convert.messages_to_proto(conversation),
            prompt_token_ids=samples.prompt_token_ids,
            answer_a=a,
            answer_b=b,
            probability_a=0.6,
            policy=convert.version_to_proto(samples.model),
            temperature=1.0,
        )

    return list(await asyncio.gather(*(one(i, t) for i, t in enumerate(prompts(0, count)))))


class Scores:
    """Stands in for the reward service: the same answer always gets the same score, at once."""

    async def score(
        self, answers: Sequence[tuple[Sequence[int], Sequence[int]]], tokenizer_digest: str
    ) -> tuple[list[float], str]:
        """See `charter.trainer.worker.Rewards`."""
        return [random.Random(str(answer)).gauss(0.0, 1.0) for answer in answers], "simulated"


class Elsewhere:
    """A sampler and a judge on another machine: a batch takes a while, and none of this machine's time."""

    def __init__(self, labels: Sequence[events_pb2.PreferenceEvent], seconds: float) -> None:
        self._labels, self._seconds = labels, seconds

    async def __call__(self, record: Any) -> Sequence[Outgoing]:
        """A label for a prompt. All of a batch wait together."""
        await asyncio.sleep(self._seconds)
        label = events_pb2.PreferenceEvent()
        label.CopyFrom(self._labels[record.offset % len(self._labels)])
        label.preference_id = f"{record.partition}/{record.offset}"
        return [encode(PREFERENCES, f"{record.partition}/{record.offset}", label)]


def spread(bus: Bus, count: int) -> None:
    """Prompts whose keys do not repeat, so that all of a batch are worked on at once."""
    bus.publish([encode(PROMPTS, f"p{i}", events_pb2.PromptEvent(prompt_id=f"p{i}")) for i in range(count)])
    with bus.consumer(JUDGE_GROUP, [ROLLOUTS]) as consumer:  # the simulated judge never lags
        consumer.poll(1, 0.2)


async def circle(
    labels: Sequence[events_pb2.PreferenceEvent], staleness: int, steps: int, sampling_s: float
) -> tuple[float, float]:
    """Wall time of `steps` steps behind the first, and the median time of an update alone."""
    from charter.registry import Facts, Kind, Registry, Status
    from charter.trainer.config import TrainerConfig, WatchConfig
    from charter.trainer.service import Trainer
    from charter.trainer.worker import TrainerWorker

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        registry = Registry(folder / "checkpoints")

        def fill(into: Path) -> None:
            for file in WEIGHTS.iterdir():
                (into / file.name).write_bytes(file.read_bytes())

        seed = registry.write(Facts(Kind.SEED), fill)
        registry.set_status(seed.id, Status.SERVING)
        config = TrainerConfig(
            registry=registry.root,
            work=folder / "work",
            labels_per_step=LABELS,
            checkpoint_every=10_000,
            steps=steps + 1,
            ppo=replace(CircleConfig().ppo, learning_rate=1e-7, value_learning_rate=1e-7),
            watch=WatchConfig(kl_budget=1e6, step_kl_budget=1e6, patience=10_000),
        )
        with open_bus(f"sqlite:{folder}/bus.db") as bus:
            spread(bus, LABELS * (steps + 1 + staleness + 2))
            ends: list[float] = []
            updates: list[float] = []

            def report(metrics: Any) -> None:
                ends.append(time.monotonic())
                updates.append(sum(metrics.seconds.values()))

            trainer = await asyncio.to_thread(Trainer, config, registry)
            teaching = TrainerWorker(bus, trainer, Scores(), report=report)
            pacer = Pacer(bus, SamplerConfig(max_staleness=staleness, batch_size=LABELS), LABELS)
            options = WorkerOptions(
                max_records=LABELS, poll_timeout_s=0.02, room_interval_s=0.02, drain_s=1.0
            )
            sampling = Worker(
                bus, "sampler", [PROMPTS], Elsewhere(labels, sampling_s), options=options, room=pacer.has_room
            )
            running = asyncio.create_task(sampling.run())
            await teaching.run()
            sampling.stop()
            await running
    return ends[-1] - ends[0], statistics.median(updates)


async def asynchronous(steps: int) -> dict[str, float]:
    """The first figure."""
    import torch

    from charter.lm import open_model

    torch.set_num_threads(1)
    model = open_model(f"local:{WEIGHTS}", threads=1)
    try:
        labels = await sampled(model, 4 * LABELS)
    finally:
        await model.close()
    _, update = await circle(labels, 2, 3, 0.0)  # how long a step takes here
    alternating, _ = await circle(labels, 0, steps, update)
    overlapping, _ = await circle(labels, 2, steps, update)
    return {
        "update_s": update,
        "synchronous_s": alternating,
        "asynchronous_s": overlapping,
        "ratio": alternating / overlapping,
    }


def idle(summary: dict[str, Any]) -> dict[str, float]:
    """The second figure, from the intervals that a demo noted while PPO ran."""
    training = [(s["at"] - sum(s["seconds"].values()), s["at"]) for s in summary["ppo"]]
    sampling = [tuple(pair) for pair in summary["sampling"]]
    judging = [tuple(pair) for pair in summary["judging"]]
    begin, end = training[0][1], training[-1][1]
    return {
        "wall_s": end - begin,
        "neither_samples_nor_trains": 1 - covered([*training, *sampling], begin, end) / (end - begin),
        "nothing_computes": 1 - covered([*training, *sampling, *judging], begin, end) / (end - begin),
    }


def covered(intervals: Sequence[tuple[float, ...]], begin: float, end: float) -> float:
    """Length of the union of the intervals within [begin, end]."""
    total, reached = 0.0, begin
    for start, stop in sorted((max(a, begin), min(b, end)) for a, b in intervals):
        if stop > reached:
            total += stop - max(start, reached)
            reached = stop
    return total


def main() -> None:
    """Prints both figures as JSON lines."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--demo", type=Path, help="folder of a finished `charter demo`")
    arguments = parser.parse_args()
    found = asyncio.run(asynchronous(arguments.steps))
    print(json.dumps({k: round(v, 3) for k, v in found.items()}))
    print(f"asynchronous is {found['ratio']:.2f} times as fast as synchronous (wanted: {WANTED_RATIO})")
    if arguments.demo:
        shares = idle(json.loads((arguments.demo / "summary.json").read_text()))
        print(json.dumps({k: round(v, 4) for k, v in shares.items()}))
        print(
            f"neither sampling nor training computes in {shares['neither_samples_nor_trains']:.1%} of the "
            f"time (wanted: at most {WANTED_IDLE:.0%})"
        )


if __name__ == "__main__":
    main()
