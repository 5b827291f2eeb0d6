"""`charter constitution` as a person uses it."""

import json
from pathlib import Path

from typer.testing import CliRunner

from charter.constitution.cli import app
from charter.constitution.loader import load

from .test_importer import INSTRUCTIONS, PAIRS, QUESTIONS
from .test_loader import GOOD

runner = CliRunner()


def test_lint_says_what_a_good_file_holds(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD)
    result = runner.invoke(app, ["lint", str(tmp_path / "c.yaml")])
    assert result.exit_code == 0
    assert "small 1 (en), 1 principles, 1 for revision, 1 for preference" in result.output


def test_lint_checks_every_file_and_fails_if_one_is_wrong(tmp_path: Path) -> None:
    (tmp_path / "good.yaml").write_text(GOOD)
    (tmp_path / "bad.yaml").write_text(GOOD.replace("weight: 1.0", "weight: 0").replace("title:", "titel:"))
    names = [str(tmp_path / n) for n in ("bad.yaml", "absent.yaml", "good.yaml")]
    result = runner.invoke(app, ["lint", *names])
    assert result.exit_code == 1
    assert f"{names[0]}:7: principles[0].titel: is not a known field; write instead title" in result.output
    assert "✗" in result.output
    assert "cannot be read" in result.output
    assert "✓" in result.output


def test_lint_without_a_name_checks_the_shipped_ones() -> None:
    result = runner.invoke(app, ["lint"])
    assert result.exit_code == 0
    assert "charter.zh.yaml" in result.output


def test_strict_lint_fails_on_remarks(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(GOOD.replace("[critique, preference]", "[preference]"))
    assert runner.invoke(app, ["lint", str(tmp_path / "c.yaml")]).exit_code == 0
    assert runner.invoke(app, ["lint", "--strict", str(tmp_path / "c.yaml")]).exit_code == 1


def test_show_lists_principles_and_one_in_full() -> None:
    assert load("charter").digest in runner.invoke(app, ["show", "charter"]).output
    assert runner.invoke(app, ["show", "charter", "--digest"]).output.strip() == load("charter").digest
    one = runner.invoke(app, ["show", "charter.zh", "-p", "bu-shuojiao"])
    assert "一句实在话" in one.output
    unknown = runner.invoke(app, ["show", "charter", "-p", "nothing"])
    assert unknown.exit_code == 1
    assert "has no principle 'nothing'" in unknown.output


def test_diff_shows_meaning_only(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(GOOD)
    (tmp_path / "b.yaml").write_text("# moved\n" + GOOD.replace("weight: 1.0", "weight: 1"))
    (tmp_path / "c.yaml").write_text(GOOD.replace("weight: 1.0", "weight: 2"))
    a, b, c = (str(tmp_path / f"{n}.yaml") for n in "abc")
    assert "no difference" in runner.invoke(app, ["diff", "--exit-code", a, b]).output
    changed = runner.invoke(app, ["diff", "--exit-code", a, c])
    assert changed.exit_code == 1
    assert "changed principles.be-kind.weight\n  - 1.0\n  + 2.0\n" in changed.output


def test_import_writes_a_file_that_lints_clean(tmp_path: Path) -> None:
    for name, content in {"i": INSTRUCTIONS, "q": [*QUESTIONS, 5], "p": PAIRS}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    out = tmp_path / "new" / "out.yaml"
    files = [str(tmp_path / f"{n}.json") for n in "iqp"]
    result = runner.invoke(app, ["import", *files, "--out", str(out), "--name", "ours"])
    assert result.exit_code == 0, result.output
    assert "1 not understood" in result.output
    assert "q.json:1: [2]: is neither a text nor an object" in result.output
    assert load(out).name == "ours"
    assert runner.invoke(app, ["lint", "--strict", str(out)]).exit_code == 0
    again = runner.invoke(app, ["import", *files, "--out", str(out)])
    assert again.exit_code == 1
    assert "--force" in again.output


def test_import_under_a_name_that_cannot_be_writes_nothing(tmp_path: Path) -> None:
    (tmp_path / "q.json").write_text(json.dumps(QUESTIONS))
    out = tmp_path / "out.yaml"
    result = runner.invoke(app, ["import", str(tmp_path / "q.json"), "--out", str(out), "--name", "Our Own"])
    assert result.exit_code == 1
    assert "such as our-own" in result.output
    assert not out.exists()


def test_format_keeps_the_digest(tmp_path: Path) -> None:
    formatted = runner.invoke(app, ["format", "charter.zh"]).output
    (tmp_path / "f.yaml").write_text(formatted)
    assert load(tmp_path / "f.yaml").digest == load("charter.zh").digest
