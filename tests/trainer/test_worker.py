"""The trainer on the bus: what it consumes, what it writes, and that no kill changes anything."""

import json
import math
import multiprocessing
import random
import resource
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from tests.forks import fork_server
from tests.tiny import make_tiny_model
from tests.trainer.circle import WIDE_AWAKE, Scorer, label, publishable, run, run_in_process, settings, world

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.errors import CheckpointError, TrainingStopped
from charter.registry import Registry, Status
from charter.trainer.labels import GROUP
from charter.trainer.service import newest_of_lineage
from charter.v1 import events_pb2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return make_tiny_model(tmp_path_factory.mktemp("tiny"), spread=0.1)


def _newest(folder):
    return newest_of_lineage(Registry(folder / "checkpoints"))


def _consumed(folder):
    """Every label in the surviving lineage, as (partition, offset)."""
    registry = Registry(folder / "checkpoints")
    rows = []
    for manifest in reversed(registry.lineage(_newest(folder).id)):
        file = registry.resolve(manifest.id) / "trainer" / "labels.jsonl"
        if file.exists():
            rows += [json.loads(line) for line in file.read_text().splitlines()]
    return [(r["partition"], r["offset"]) for r in rows], rows


def test_labels_become_checkpoints_from_which_one_walks_back_to_labels_and_principles(tmp_path, tiny):
    world(tmp_path, tiny)
    run(tmp_path)
    registry = Registry(tmp_path / "checkpoints")
    newest = _newest(tmp_path)
    lineage = registry.lineage(newest.id)
    assert [m.facts.step for m in lineage] == [6, 4, 2, 0]
    assert newest.facts.labels.count == 12
    assert newest.facts.labels.by_principle == {"helpful": 12}
    assert newest.facts.constitution_digest == "c-1"
    assert newest.facts.reward_model_digest == "reward-digest"
    assert registry.status(newest.id).status is Status.CANDIDATE
    places, rows = _consumed(tmp_path)
    assert len(places) == len(set(places)) == 36
    assert rows[0]["principles"] == ["helpful"]
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 64 - 36
        committed = {p.partition: o for p, o in bus.positions(GROUP).items()}
        named = {int(k.rpartition("/")[2]): v for k, v in newest.facts.positions.items()}
        assert {p: o for p, o in named.items() if o} == {p: o for p, o in committed.items() if o}
        announced = [decode(r, events_pb2.CheckpointEvent) for r in bus.fetch("checkpoints", 0, 0)]
    assert [(e.step, e.status) for e in announced] == [(2, "candidate"), (4, "candidate"), (6, "candidate")]
    assert announced[-1].parent_id == lineage[1].id


def test_a_checkpoint_is_served_like_any_other(tmp_path, tiny):
    from charter.lm.checkpoint import load_checkpoint, tokenizer_digest

    world(tmp_path, tiny)
    run(tmp_path, steps=2)
    manifest = _newest(tmp_path)
    loaded = load_checkpoint(str(Registry(tmp_path / "checkpoints").resolve(manifest.id)))
    assert loaded.version.version == manifest.id
    assert loaded.version.digest == manifest.weights_digest
    assert loaded.version.tokenizer_digest == tokenizer_digest(tiny)


def test_stopping_between_checkpoints_saves_and_the_next_run_goes_on(tmp_path, tiny):
    world(tmp_path, tiny)
    run(tmp_path, steps=3)
    assert _newest(tmp_path).facts.step == 3
    run(tmp_path, steps=6)
    places, _ = _consumed(tmp_path)
    assert len(places) == len(set(places)) == 36


def test_labels_that_cannot_teach_are_buried_with_a_reason_and_people_are_left_alone(tmp_path, tiny):
    world(tmp_path, tiny, labels=0)
    foreign = label(1, tiny)
    foreign.policy.tokenizer_digest = "another"
    empty = label(2, tiny)
    empty.answer_b.ClearField("token_ids")
    empty.answer_b.ClearField("logprobs")
    stale = label(3, tiny)
    stale.constitution_digest = "c-0"
    person = label(4, tiny, human=True)
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        bus.publish([publishable(e) for e in (foreign, empty, stale, person)])
        bus.publish([publishable(label(i, tiny)) for i in range(10, 40)])
    run(tmp_path, steps=5, constitution_digest="c-1")
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        letters = [decode(r, events_pb2.DeadLetterEvent) for r in bus.fetch("dead-letters", 0, 0)]
    reasons = sorted(letter.error for letter in letters)
    assert len(reasons) == 3
    assert any("tokenizer" in r and "other words" in r for r in reasons)
    assert any("empty answer" in r for r in reasons)
    assert any("c-0" in r and "judge the rollout again" in r for r in reasons)
    _, rows = _consumed(tmp_path)
    assert len(rows) == 30


def test_a_reward_model_that_disappears_is_waited_for(tmp_path, tiny):
    world(tmp_path, tiny, labels=20)
    rewards = Scorer(failures=2)
    run(tmp_path, rewards, steps=2)
    assert rewards.asked == 4
    assert _newest(tmp_path).facts.step == 2


def test_a_step_under_way_is_repeated_with_its_labels_and_scores_though_log_and_reward_changed(
    tmp_path, tiny
):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    for folder in (calm, killed):
        folder.mkdir()
        world(folder, tiny, labels=20)

    class Crash(Exception):
        pass

    class Renewed(Scorer):
        async def score(self, answers, tokenizer_digest):
            scores, _ = await super().score(answers, tokenizer_digest)
            return [-s for s in scores], "another"

    run(calm, steps=1)
    with pytest.MonkeyPatch.context() as patch:
        from charter.trainer.update import Updater

        def crash(*_):
            raise Crash

        patch.setattr(Updater, "learn", crash)
        with pytest.raises(Crash):
            run(killed, steps=1)
    with open_bus(f"sqlite:{killed}/bus.db") as bus:
        bus.publish([publishable(label(i, tiny)) for i in range(100, 130)])
    run(killed, Renewed(), steps=1)
    assert _newest(calm).digest == _newest(killed).digest


def test_a_run_that_drifts_stops_and_the_last_good_checkpoint_stays_in_force(tmp_path, tiny):
    world(tmp_path, tiny)
    run(tmp_path, steps=2)
    good = _newest(tmp_path).id
    Registry(tmp_path / "checkpoints").set_status(good, Status.SERVING)
    strict = replace(WIDE_AWAKE, kl_budget=1e-6, patience=1)
    with pytest.raises(TrainingStopped, match=r"nats per answer.*last good checkpoint stays in force"):
        run(tmp_path, steps=6, watch=strict)
    assert _newest(tmp_path).id == good
    assert Registry(tmp_path / "checkpoints").serving().id == good


def test_a_full_disk_while_a_checkpoint_is_written_leaves_the_last_good_one(tmp_path, tiny):
    world(tmp_path, tiny)
    run(tmp_path, steps=2)
    good = _newest(tmp_path).id
    # A process may not write files beyond this size: the same error, at the same place, as a full disk.
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    config = settings(tmp_path, steps=4)
    from charter.trainer.service import Trainer

    trainer = Trainer(config, Registry(config.registry))
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(CheckpointError, match="last good one stays in force; make room"):
            trainer.checkpoint()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert _newest(tmp_path).id == good
    run(tmp_path, steps=4)
    assert _newest(tmp_path).facts.step == 4


def test_after_a_rollback_training_goes_on_from_its_parent_with_labels_that_are_new(tmp_path, tiny):
    world(tmp_path, tiny)
    run(tmp_path, steps=4)
    registry = Registry(tmp_path / "checkpoints")
    bad = _newest(tmp_path)
    registry.set_status(bad.id, Status.ROLLED_BACK, "worse in production")
    run(tmp_path, steps=4)
    newest = _newest(tmp_path)
    assert newest.id != bad.id
    assert newest.facts.parent == bad.facts.parent
    assert newest.facts.labels.positions["preferences/0"][0] == bad.facts.positions["preferences/0"]
    places, _ = _consumed(tmp_path)
    assert len(places) == len(set(places)) == 24


def test_a_trainer_that_lost_its_partitions_takes_them_back_and_goes_on(tmp_path, tiny):
    world(tmp_path, tiny)
    with open_bus(f"sqlite:{tmp_path}/bus.db") as bus:
        others = []

        def intrude(metrics):
            if not others:
                others.append(bus.consumer(GROUP, ["preferences"], "another"))
                others[0].poll(1, 0.0)
                threading.Timer(0.5, others[0].close).start()

        run(tmp_path, report=intrude)
        assert _newest(tmp_path).facts.step == 6
        assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 64 - 36
    places, _ = _consumed(tmp_path)
    assert len(places) == len(set(places)) == 36


KILLS, LONG = 20, {"steps": 40, "labels_per_step": 2, "checkpoint_every": 1}


def test_kill_9_at_twenty_random_instants_changes_no_parameter_and_counts_each_label_once(tmp_path, tiny):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    labels = LONG["steps"] * LONG["labels_per_step"]
    for folder in (calm, killed):
        folder.mkdir()
        world(folder, tiny, labels=labels)
    context = fork_server()

    def life(folder: Path, **options) -> multiprocessing.Process:
        process = context.Process(target=run_in_process, args=(str(folder), LONG | options))
        process.start()
        return process

    def step(folder: Path) -> int:
        return len([*(folder / "checkpoints").glob("rl-*")])

    started = time.monotonic()
    first = life(calm, steps=2)
    first.join()
    span = time.monotonic() - started
    undisturbed = life(calm)
    undisturbed.join()
    assert (first.exitcode, undisturbed.exitcode) == (0, 0)
    instants = random.Random(7)
    for number in range(KILLS):
        process, before = life(killed), step(killed)
        # Every other life is long enough for a step, however busy the machine is.
        end = math.inf if number % 2 else time.monotonic() + instants.uniform(0.3, 1.0) * span
        while time.monotonic() < end and step(killed) == before and process.is_alive():
            process.join(0.02)
        process.join(instants.uniform(0.0, 0.03))  # somewhere in the next step, if there was one
        assert process.is_alive(), "there is work for more lives than these"
        process.kill()
        process.join()
    assert KILLS // 2 <= step(killed) < LONG["steps"], "they did some of the work"
    last = life(killed)
    last.join()
    assert last.exitcode == 0
    assert _newest(killed).digest == _newest(calm).digest
    assert _consumed(killed) == _consumed(calm)
    places, _ = _consumed(killed)
    assert len(places) == len(set(places)) == labels, "each label is in the surviving lineage, and once"
    for name in ("model.safetensors", "trainer/value.safetensors", "trainer/policy-optimizer.safetensors"):
        a, b = (load_file(Registry(f / "checkpoints").resolve(_newest(f).id) / name) for f in (calm, killed))
        assert all((a[k] == b[k]).all() for k in a)
    with open_bus(f"sqlite:{killed}/bus.db") as bus:
        assert sum(lag.records for lag in bus.lag(GROUP, ["preferences"])) == 0
