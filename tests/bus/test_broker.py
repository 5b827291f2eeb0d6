"""What a local broker is held by, without Kafka; `make test-kafka` has the rest."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

from charter.bus.broker import ends_with_us

OWNER = """
import subprocess, sys
from charter.bus.broker import ends_with_us
child = subprocess.Popen(["sleep", "600"], start_new_session=True, stdout=subprocess.DEVNULL)
guard = ends_with_us(child.pid)
print(child.pid, flush=True)
child.wait()
"""


def runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_what_a_killed_process_started_ends_with_it() -> None:
    owner = subprocess.Popen(
        [sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert owner.stdout is not None
    with owner.stdout:
        pid = int(owner.stdout.readline())
    try:
        assert runs(pid)
        os.killpg(owner.pid, signal.SIGKILL)
        owner.wait()
        deadline = time.monotonic() + 60
        while runs(pid) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert not runs(pid)
    finally:
        if runs(pid):
            os.kill(pid, signal.SIGKILL)


def test_it_lives_as_long_as_its_owner() -> None:
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    guard = ends_with_us(child.pid)
    try:
        time.sleep(0.3)
        assert child.poll() is None
        assert guard.poll() is None
        guard.communicate()  # closes the pipe, as our end would
        assert child.wait(60) == -signal.SIGKILL
    finally:
        child.kill()
        child.wait()
