"""What goes wrong around a run: a reward service that goes away, a full disk, a constitution that changes."""

import contextlib
import os
import random
import re
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from tests.trainer.circle import run
from tests.trainer.lineage import LABELS, heard, holds, labels, letters, publish

from charter.constitution import load as load_constitution
from charter.errors import CheckpointError, RequestError
from charter.registry import Registry
from charter.trainer.rewards import RewardClient
from charter.trainer.service import newest_of_lineage
from charter.trainer.update import Updater
from charter.v1 import reward_pb2, reward_pb2_grpc, types_pb2

ROOT = Path(__file__).parents[2]

# Others that are away, or do not fit


class _Service(reward_pb2_grpc.RewardServiceServicer):
    def __init__(self, refuses=""):
        self.refuses = refuses

    def Score(self, request, context):
        if self.refuses:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, self.refuses)
        scores = [random.Random(str(list(a.answer_token_ids))).gauss(0, 1) for a in request.answers]
        model = types_pb2.ModelVersion(version="r", digest="reward-1")
        return reward_pb2.RewardServiceScoreResponse(scores=scores, model=model)


@contextlib.contextmanager
def _service(port=0, **options):
    server = grpc.server(ThreadPoolExecutor(1), options=[("grpc.so_reuseport", 0)])
    reward_pb2_grpc.add_RewardServiceServicer_to_server(_Service(**options), server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    try:
        yield port
    finally:
        server.stop(None).wait()


def _asks(port):
    """Opens its client in the event loop of the run."""

    class Asks:
        client = None

        async def score(self, answers, tokenizer_digest):
            self.client = self.client or RewardClient(f"127.0.0.1:{port}")
            return await self.client.score(answers, tokenizer_digest)

    return Asks()


def test_a_reward_service_that_disappears_in_the_middle_is_waited_for_and_what_is_good_stays(folder, tiny):
    publish(folder, labels(tiny))
    with contextlib.ExitStack() as stack:
        service = stack.enter_context(contextlib.ExitStack())
        port = service.enter_context(_service())
        steps = []

        def gone(metrics):
            steps.append(metrics.step)
            if len(steps) == 1:
                service.close()

        def back():
            told.wait()
            held.append(holds(folder))
            stack.enter_context(_service(port))

        held = []
        with heard("the reward model is away; training waits") as (told, said):
            watching = threading.Thread(target=back)
            watching.start()
            run(folder, _asks(port), report=gone, steps=4, checkpoint_every=2)
            watching.join()
    assert f"127.0.0.1:{port}" in said[0]["error"]
    assert held == [True]
    assert steps == [2, 3]


def test_a_reward_model_of_another_tokenizer_ends_the_run_with_its_own_words(folder, tiny):
    publish(folder, labels(tiny))
    refusal = (
        "the answers are token ids of the tokenizer a, and the reward model reads those of b; use another"
    )
    with (
        _service(refuses=refusal) as port,
        pytest.raises(RequestError, match="reads those of b; use another"),
    ):
        run(folder, _asks(port), steps=4)
    assert holds(folder)


# A full disk

_ON_A_SMALL_DISK = """
import shutil, sys
from pathlib import Path
from tests.tiny import make_tiny_model
from tests.trainer.circle import run
from charter.errors import CheckpointError
from charter.registry import Registry
from charter.trainer.service import newest_of_lineage
disk, ballast = Path(sys.argv[1]), Path(sys.argv[1]) / "ballast"

def fill(metrics):
    free = shutil.disk_usage(disk).free
    if metrics.step == 3:  # there is room for the log, and none for the checkpoint after it
        ballast.write_bytes(bytes(free - 400_000))

def newest():
    return newest_of_lineage(Registry(disk / "run" / "checkpoints"))

good = newest().id
try:
    run(disk / "run", report=fill, steps=4)
except CheckpointError as error:
    print(error)
registry = Registry(disk / "run" / "checkpoints")
assert newest().id == good == registry.serving().id
assert registry.resolve(good).is_dir()
assert not list((disk / "run").rglob(".partial-*"))
ballast.unlink()
run(disk / "run", steps=4)
print(newest().facts.step, newest().digest)
"""


def test_a_disk_that_is_full_when_a_checkpoint_is_written_costs_nothing_but_time(folder, tiny, tmp_path):
    """The whole state lies on a tmpfs of its own, in a mount namespace, which is really full (ENOSPC)."""
    publish(folder, labels(tiny))
    small, calm = tmp_path / "small", tmp_path / "calm"
    small.mkdir()
    shutil.copytree(folder, calm)
    mount = f'mount -t tmpfs -o size=24m none "{small}" && cp -r "{folder}" "{small}/run" && exec "$@"'
    done = subprocess.run(
        ["unshare", "--map-root-user", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c",
         _ON_A_SMALL_DISK, str(small)],
        cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    if "unshare failed" in done.stderr or "Operation not permitted" in done.stderr:
        pytest.skip("no mount namespaces here; test_worker has the same with a limit on the size of files")
    assert done.returncode == 0, done.stderr[-3000:]
    said, went_on = done.stdout.strip().splitlines()
    assert re.search(r"of step 4 cannot be written to .*\(.*No space left on device.*\)", said), said
    assert "the last good one stays in force; make room, and go on" in said
    run(calm, steps=4)
    assert went_on == f"4 {newest_of_lineage(Registry(calm / 'checkpoints')).digest}", "bit for bit"


def test_a_plan_that_finds_no_room_ends_the_run_and_metrics_that_find_none_do_not(folder, tiny, tmp_path):
    """/dev/full refuses every byte as a full disk does."""
    publish(folder, labels(tiny))
    log = tmp_path / "log"
    log.mkdir()
    (log / "metrics.jsonl").symlink_to("/dev/full")
    with heard("metrics cannot be written; training goes on without them") as (_, said):
        run(folder, steps=3, log=log)
    assert [s["error"] for s in said] == ["No space left on device"]
    assert newest_of_lineage(Registry(folder / "checkpoints")).facts.step == 3
    plans = folder / "work" / "plans"
    (plans / ".step-00000003.json.partial").symlink_to("/dev/full")
    with pytest.raises(CheckpointError, match=r"step-00000003.json cannot be written .*make room"):
        run(folder, steps=5)
    assert newest_of_lineage(Registry(folder / "checkpoints")).facts.step == 3


# A constitution that changes


def test_labels_follow_the_constitution_in_force_and_a_step_that_was_begun_keeps_its_own(
    folder, tiny, tmp_path, monkeypatch
):
    text = (ROOT / "constitutions" / "seed.yaml").read_text()
    file = tmp_path / "constitution.yaml"
    file.write_text(text)
    old = load_constitution(str(file)).digest
    file.write_text(text.replace("1.1.0", "1.2.0"))
    new = load_constitution(str(file)).digest
    assert old != new
    file.write_text(text)

    def under(digest):
        return lambda event, number: setattr(event, "constitution_digest", digest)

    publish(folder, labels(tiny, under(old), count=2 * LABELS))
    with monkeypatch.context() as patch:
        patch.setattr(Updater, "learn", _crash)
        with pytest.raises(ZeroDivisionError):
            run(folder, steps=3, constitution=str(file))
    file.write_text(text.replace("1.1.0", "1.2.0"))
    with heard("labels on the log cannot teach") as (told, said):
        run(folder, steps=4, constitution=str(file), until=told)
    assert newest_of_lineage(Registry(folder / "checkpoints")).facts.labels.by_constitution == {old: LABELS}
    assert old[:12] in said[0]["error"]
    assert new[:12] in said[0]["error"]
    publish(folder, list(labels(tiny, under(new), count=40))[2 * LABELS :])
    run(folder, steps=4, constitution=str(file))
    assert newest_of_lineage(Registry(folder / "checkpoints")).facts.labels.by_constitution == {new: LABELS}
    assert letters(folder)
    assert all(f"under the constitution {old[:12]}, and {new[:12]}" in reason for reason in letters(folder))


def _crash(*_):
    return 1 / 0
