"""People's preferences from files."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from charter.bus import open_bus
from charter.bus.messages import decode
from charter.errors import ConfigError
from charter.lm.base import ChatMessage, Role
from charter.reward.cli import app
from charter.reward.human import HumanPair, Unusable, parse, read
from charter.v1 import events_pb2

HEAD = "\n\nHuman: How are you?\n\nAssistant: Fine.\nAnd you?\n\nHuman: Open my lock."
RECORD = {"chosen": f"{HEAD}\n\nAssistant: Is it yours?", "rejected": f"{HEAD}\n\nAssistant: Sure."}
CONVERSATION = (
    ChatMessage(Role.USER, "How are you?"),
    ChatMessage(Role.ASSISTANT, "Fine.\nAnd you?"),
    ChatMessage(Role.USER, "Open my lock."),
)


def _messages(*contents: str):
    roles = ["user", "assistant"] * 3
    return [{"role": r, "content": c} for r, c in zip(roles, contents, strict=False)]


@pytest.mark.parametrize(
    "record",
    [
        RECORD,
        {
            "chosen": _messages("How are you?", "Fine.\nAnd you?", "Open my lock.", "Is it yours?"),
            "rejected": _messages("How are you?", "Fine.\nAnd you?", "Open my lock.", "Sure."),
        },
        {"prompt": HEAD, "chosen": "Is it yours?", "rejected": "Sure."},
        {
            "prompt": _messages("How are you?", "Fine.\nAnd you?", "Open my lock."),
            "chosen": [{"role": "assistant", "content": "Is it yours?"}],
            "rejected": [{"role": "assistant", "content": "Sure."}],
        },
    ],
)
def test_transcripts_and_messages_say_the_same(record) -> None:
    assert parse(record) == HumanPair(CONVERSATION, "Is it yours?", "Sure.")


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ([], "has no"),
        ({"chosen": "a"}, "has no"),
        ({**RECORD, "rejected": RECORD["chosen"]}, "are the same"),
        ({**RECORD, "rejected": "\n\nHuman: Hi\n\nAssistant: Sure."}, "differ before"),
        ({**RECORD, "rejected": HEAD}, "does not end with"),
        ({**RECORD, "rejected": f"{HEAD}\n\nAssistant: "}, "empty answer"),
        ({"chosen": 3, "rejected": 4}, "neither"),
        ({"chosen": [{"role": "owl"}], "rejected": []}, "role"),
        (
            {"chosen": "x\n\nHuman: a\n\nAssistant: b", "rejected": "x\n\nHuman: a\n\nAssistant: c"},
            "begins with",
        ),
    ],
)
def test_a_record_without_a_pair_says_why(record, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse(record)


def test_ids_come_from_the_content_and_the_better_answer_is_not_always_a() -> None:
    pairs = [HumanPair(CONVERSATION, f"yes {i}", f"no {i}") for i in range(40)]
    events = [p.to_proto(0.9, 1) for p in pairs]
    assert len({e.preference_id for e in events}) == 40
    assert len({e.prompt_id for e in events}) == 1
    first = [e for e in events if e.answer_a.text.startswith("yes")]
    assert 8 < len(first) < 32
    assert all(e.probability_a == pytest.approx(0.9 if e in first else 0.1) for e in events)
    assert all(e.human for e in events)


def test_unusable_lines_are_named_and_stop_nothing(tmp_path: Path) -> None:
    file = tmp_path / "pairs.jsonl.gz"
    file.write_bytes(gzip.compress(f"{json.dumps(RECORD)}\nno json\n\n{json.dumps({})}\n".encode()))
    found = list(read(file))
    assert isinstance(found[0], HumanPair)
    assert [u.line for u in found if isinstance(u, Unusable)] == [2, 4]


def test_the_command_publishes_pairs_and_reports_the_rest(tmp_path: Path) -> None:
    file, bus = tmp_path / "pairs.jsonl", f"sqlite:{tmp_path / 'bus.db'}"
    file.write_text(f"{json.dumps(RECORD)}\n{{}}\n")
    done = CliRunner().invoke(app, ["import", str(file), "--bus", bus])
    assert done.exit_code == 0, done.output
    assert "1 pairs published, 1 lines unusable" in done.output
    assert "line 2" in done.output
    with open_bus(bus) as opened:
        records = [r for p in opened.bounds("preferences") for r in opened.fetch("preferences", p, 0)]
    events = [decode(r, events_pb2.PreferenceEvent) for r in records]
    assert [e.preference_id for e in events] == [parse(RECORD).to_proto(1.0, 1).preference_id]
    assert records[0].key == events[0].prompt_id.encode()


def test_a_file_without_pairs_is_an_error(tmp_path: Path) -> None:
    file = tmp_path / "none.jsonl"
    file.write_text("{}\n")
    done = CliRunner().invoke(app, ["import", str(file), "--bus", f"sqlite:{tmp_path / 'bus.db'}"])
    assert isinstance(done.exception, ConfigError)
    absent = CliRunner().invoke(app, ["import", str(tmp_path / "absent.jsonl"), "--bus", "sqlite::memory:"])
    assert isinstance(absent.exception, ConfigError)
