"""`charter run` as a process, for tests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

START_S = 280.0
"""Patience for a machine that does much else; no measure of speed."""


def _unless_told(arguments: tuple[str, ...]) -> dict[str, str]:
    """Most tests are about the endpoint; learning beside it would only take the time of others."""
    return {} if "--learn" in arguments else {"CHARTER__LEARN": "false"}


class Run:
    """A `charter run` in a process group of its own, as a terminal or make would start it."""

    def __init__(self, folder: Path, *arguments: str) -> None:
        self.log = folder / "run.log"
        environment = {k: v for k, v in os.environ.items() if not k.startswith("CHARTER_")}
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "charter.cli", "run", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment | {"OMP_NUM_THREADS": "1", **_unless_told(arguments)},
            )

    @property
    def output(self) -> str:
        return self.log.read_text()

    def line(self, pattern: str) -> str:
        """The first group of `pattern`, once it is in the output."""
        deadline = time.monotonic() + START_S
        while not (found := re.search(pattern, self.output)):
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.1)
        return found[1]

    @property
    def url(self) -> str:
        return self.line(r"endpoint +(http://[\d.:]+)/v1")

    def ready(self) -> str:
        """Its URL, once it answers."""
        url, deadline = self.url, time.monotonic() + START_S
        while status(f"{url}/readyz") != 200:
            assert self.process.poll() is None, self.output
            assert time.monotonic() < deadline, self.output
            time.sleep(0.2)
        return url

    def interrupt(self) -> int:
        """Ctrl-C: SIGINT to the whole group; the exit status."""
        os.killpg(self.process.pid, signal.SIGINT)
        return self.process.wait(timeout=30)

    def close(self) -> None:
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def status(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.status
    except urllib.error.HTTPError as error:
        with error:
            return error.code
    except OSError:
        return 0


def refused(*arguments: str) -> str:
    """What `charter run` says when it will not start."""
    done = subprocess.run(
        [sys.executable, "-m", "charter.cli", "run", *arguments],
        capture_output=True, text=True, check=False, timeout=START_S,
    )  # fmt: skip
    assert done.returncode == 2, done
    assert "Traceback" not in done.stderr
    (sentence,) = [line for line in done.stderr.splitlines() if line.startswith("charter: ")]
    return sentence


SHORT_CONSTITUTION = """\
name: short
version: "1"
language: en
description: One principle, short enough for a model of few words.
principles:
  - id: no-harm
    title: No harm
    rationale: An answer should harm nobody.
    category: harm
    priority: 1
    weight: 1
    phases: [critique, preference]
    critique_request: Does it harm?
    revision_request: Remove harm.
    preference_question: Which harms less?
"""
"""A constitution whose prompts fit into the context of the tiny model."""
