"""API keys: only hashes are kept, changes are noticed, a damaged file never opens the door."""

import json
import os
import stat

import pytest
from typer.testing import CliRunner

from charter.errors import ConfigError
from charter.gateway.cli import app
from charter.gateway.guard import GuardMode
from charter.gateway.keys import KeyFile, add_key, read_keys, revoke_key


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "keys.json"


def test_a_key_is_found_by_its_text_and_by_nothing_else(path):
    record, key = add_key(path, "alice")
    keys = KeyFile(path)
    assert keys.find(key) == record
    for wrong in (
        key[:-1] + ("A" if key[-1] != "A" else "B"),
        key.upper(),
        "",
        "ck-",
        f"ck-{record.id}-",
        "ü",
    ):
        assert keys.find(wrong) is None


def test_the_file_holds_no_key_and_only_its_owner_may_read_it(path):
    _, key = add_key(path, "alice")
    assert key.rpartition("-")[2] not in path.read_text()
    assert key.split("-", 2)[2] not in path.read_text()
    assert stat.S_IMODE(os.stat(path).st_mode) == 0o600


def test_adding_and_revoking_are_noticed_by_a_gateway_that_runs(path):
    keys = KeyFile(path, check_seconds=0.0)
    assert not keys.in_use
    record, key = add_key(path, "alice", guard=GuardMode.ALWAYS, requests_per_minute=3)
    assert keys.in_use
    assert keys.find(key).guard is GuardMode.ALWAYS
    revoke_key(path, record.id)
    assert keys.find(key) is None
    assert keys.in_use, "a door with only revoked keys stays shut"
    assert keys.active == ()


@pytest.mark.parametrize(
    "damage", ["", "{", '{"format": 9, "keys": []}', '{"format": 1, "keys": [{"id": 1}]}', None]
)
def test_a_file_damaged_under_a_running_gateway_changes_nothing(path, damage):
    record, key = add_key(path, "alice")
    keys = KeyFile(path, check_seconds=0.0)
    if damage is None:
        path.unlink()
    else:
        path.write_text(damage)
    assert keys.find(key) == record
    assert keys.in_use


def test_a_damaged_file_says_what_to_do(path):
    path.parent.mkdir()
    path.write_text("[]")
    with pytest.raises(ConfigError, match="restore it from a backup"):
        read_keys(path)


def test_a_key_whose_mode_is_weaker_than_it_allows_is_refused(path):
    with pytest.raises(ConfigError, match="weaker"):
        add_key(path, "alice", guard=GuardMode.OFF, weakest_guard=GuardMode.GATED)


def test_the_command_line_adds_lists_and_revokes(path):
    run = CliRunner()
    made = run.invoke(
        app, ["add", "alice", "--file", str(path), "--guard", "gated", "--tokens-per-minute", "500"]
    )
    key = made.stdout.strip()
    assert KeyFile(path).find(key).tokens_per_minute == 500
    record = read_keys(path)[0]
    listed = run.invoke(app, ["list", "--file", str(path)]).stdout
    assert record.id in listed
    assert "guard=gated" in listed
    assert key.split("-", 2)[2] not in listed
    assert "revoked" in run.invoke(app, ["revoke", record.id, "--file", str(path)]).stdout
    assert KeyFile(path).find(key) is None
    missing = run.invoke(app, ["revoke", "nosuchid", "--file", str(path)])
    assert isinstance(missing.exception, ConfigError)


def test_keys_added_at_once_by_several_processes_are_all_kept(path):
    import subprocess
    import sys

    code = "import sys; from pathlib import Path; from charter.gateway.keys import add_key; "
    code += "[add_key(Path(sys.argv[1]), f'k{i}') for i in range(5)]"
    workers = [subprocess.Popen([sys.executable, "-c", code, str(path)]) for _ in range(3)]
    assert [w.wait() for w in workers] == [0, 0, 0]
    assert len(json.loads(path.read_text())["keys"]) == 15
