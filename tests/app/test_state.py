"""One Charter on a state folder at a time, and a sentence for the second."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from charter.app.state import StateFolder
from charter.errors import ConfigError

_HOLD = """
import sys
from pathlib import Path
from charter.app.state import StateFolder
with StateFolder(Path(sys.argv[1]), ["gateway"]) as state:
    state.note_address("http://127.0.0.1:1234")
    print("held", flush=True)
    sys.stdin.read()
"""


def _holder(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_told_who_has_the_folder(tmp_path: Path) -> None:
    with _holder(tmp_path) as first:
        with pytest.raises(ConfigError) as refused, StateFolder(tmp_path, ["policy", "gateway"]):
            pass
        assert f"process {first.pid}, http://127.0.0.1:1234" in str(refused.value)
        assert "STATE=" in str(refused.value)
        first.communicate()
    with StateFolder(tmp_path, ["policy", "gateway"]) as state:
        assert state.path == tmp_path


def test_a_killed_process_leaves_no_lock_behind(tmp_path: Path) -> None:
    with _holder(tmp_path) as first:
        first.kill()
        first.wait()
    with StateFolder(tmp_path, ["gateway"]):
        pass


def test_different_targets_share_a_folder(tmp_path: Path) -> None:
    with StateFolder(tmp_path, ["gateway"]), StateFolder(tmp_path, ["policy"]):
        pass


def test_a_refused_start_lets_go_of_what_it_had(tmp_path: Path) -> None:
    with _holder(tmp_path) as first:
        with pytest.raises(ConfigError), StateFolder(tmp_path, ["critic", "gateway"]):
            pass
        with StateFolder(tmp_path, ["critic"]):
            pass
        first.communicate()


def test_a_folder_that_cannot_be_made_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"state folder .*/file cannot be used .* name another"):
        StateFolder(tmp_path / "file", ["gateway"]).__enter__()
