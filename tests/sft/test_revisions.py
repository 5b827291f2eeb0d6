"""Which revisions are learned from, and that both sources of them say the same."""

from __future__ import annotations

from pathlib import Path

import pytest
from pyarrow import parquet

from charter.bus import Outgoing, open_bus
from charter.bus.messages import encode
from charter.errors import ConfigError
from charter.feedback.records import RevisionStep
from charter.lm.base import ChatMessage, ModelVersion, Role
from charter.redteam import records
from charter.sft.revisions import Revision, choose, read_bus, read_parquet


def _asked(text: str):
    return (ChatMessage(Role.USER, text),)


def _revision(i: int, draft: str, final: str) -> Revision:
    return Revision(f"r{i}", f"p{i}", _asked(f"question {i}"), draft, final)


CHANGED = [_revision(i, "yes", f"no, because of {i}") for i in range(6)]
SAME = [_revision(i, "fine", "fine") for i in range(6, 10)]


def test_revisions_that_changed_the_answer_come_first() -> None:
    chosen = choose([*SAME, *CHANGED], 7, keep_unchanged=True, seed=1)
    assert {r.revision_id for r in CHANGED} < {r.revision_id for r in chosen}
    assert len(chosen) == 7


def test_unchanged_drafts_can_be_left_out() -> None:
    chosen = choose([*SAME, *CHANGED], 0, keep_unchanged=False, seed=1)
    assert sorted(chosen, key=lambda r: r.revision_id) == CHANGED


def test_the_order_depends_on_the_seed_and_not_on_the_order_of_reading() -> None:
    first = choose([*SAME, *CHANGED], 8, keep_unchanged=True, seed=1)
    assert first == choose([*CHANGED, *SAME][::-1], 8, keep_unchanged=True, seed=1)
    assert first != choose([*SAME, *CHANGED], 8, keep_unchanged=True, seed=2)


def test_empty_answers_and_copies_are_left_out() -> None:
    copy = Revision("r99", "p0", CHANGED[0].conversation, "yes", CHANGED[0].final)
    chosen = choose([CHANGED[0], copy, _revision(5, "yes", "  ")], 0, keep_unchanged=True, seed=0)
    assert chosen == [CHANGED[0]]


def _rows() -> list[records.Revision]:
    model = ModelVersion("m", "d", "t")
    steps = (
        RevisionStep("harm", "it harms", "no"),
        RevisionStep("blunt", "it is blunt", "no, since it harms"),
    )
    return [
        records.Revision("run/a", "a", _asked("a?"), "sure", steps, model, model, "c0ffee", 1),
        records.Revision("run/b", "b", _asked("b?"), "of course", (), model, model, "c0ffee", 2),
    ]


WANTED = [
    Revision("run/a", "a", _asked("a?"), "sure", "no, since it harms", "c0ffee"),
    Revision("run/b", "b", _asked("b?"), "of course", "of course", "c0ffee"),
]


def test_the_parquet_of_a_red_team_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    parquet.write_table(records.table(_rows()), tmp_path / "data/revisions-00000.parquet")
    assert list(read_parquet([tmp_path])) == WANTED


def test_the_bus_gives_the_same_revisions_and_passes_over_what_is_none(tmp_path: Path) -> None:
    with open_bus(f"sqlite:{tmp_path / 'bus.db'}") as bus:
        bus.publish([encode("revisions", r.prompt_id, r.to_proto()) for r in _rows()])
        bus.publish([Outgoing("revisions", b"x", b"not a revision")])
        assert sorted(read_bus(bus), key=lambda r: r.revision_id) == WANTED


@pytest.mark.parametrize("content", [None, b"no parquet"])
def test_a_source_without_revisions_is_named(tmp_path: Path, content: bytes | None) -> None:
    file = tmp_path / "revisions.parquet"
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(ConfigError, match=r"revisions\.parquet"):
        list(read_parquet([file]))
