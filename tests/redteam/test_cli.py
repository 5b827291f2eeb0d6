"""`charter redteam` on its own: what it says before any model is asked."""

# ruff: noqa: E501 - messages are quoted whole

from pathlib import Path

import pytest
from tests.feedback_fixtures import write_constitution
from tests.scripted import Scripted
from typer.testing import CliRunner

from charter import lm
from charter.errors import BackendUnavailable, ConfigError, ConstitutionError
from charter.redteam.cli import app

runner = CliRunner()


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    (tmp_path / "p.txt").write_text("one\ntwo\nthree\n")
    return str(tmp_path / "p.txt")


def invoke(tmp_path: Path, *arguments: str):
    places = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    return runner.invoke(app, ["--prompts", *arguments, *places])


def opening(monkeypatch: pytest.MonkeyPatch, **models: Scripted) -> list[str]:
    opened = []

    def open_model(uri: str) -> Scripted:
        opened.append(uri)
        return models[uri.rpartition(":")[2]]

    monkeypatch.setattr(lm, "open_model", open_model)
    return opened


def test_one_model_drafts_and_revises_and_is_opened_once(tmp_path, prompts, monkeypatch) -> None:
    model = Scripted()
    opened = opening(monkeypatch, some=model)
    constitution = write_constitution(tmp_path / "c.yaml")
    (tmp_path / "q.txt").write_text("three\nfour\n")
    result = invoke(tmp_path, prompts, str(tmp_path / "q.txt"), "--model", "local:some", "--critic", "local:some",
                    "--constitution", constitution)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "4 finished, 1 repeated; rows in" in result.output
    assert opened == ["local:some"]
    assert model.closed


def test_failures_are_told_and_the_status_says_when_nothing_came(tmp_path, prompts, monkeypatch) -> None:
    opening(monkeypatch, mute=Scripted(lambda prompt, sampling: " "), some=Scripted())
    result = invoke(tmp_path, prompts, "--model", "local:mute", "--critic", "local:some")
    assert result.exit_code == 1
    assert f"prompt has no row: {prompts}:2: the model wrote an empty answer" in result.output
    assert "0 finished, 3 failed" in result.output


def test_a_run_that_gives_up_says_how_to_go_on(tmp_path, prompts, monkeypatch) -> None:
    def away(prompt, sampling):
        raise BackendUnavailable("127.0.0.1:1 cannot be reached")

    opening(monkeypatch, away=Scripted(away), some=Scripted())
    result = invoke(tmp_path, prompts, "--model", "local:away", "--critic", "local:some", "--give-up", "0.1")
    assert isinstance(result.exception, BackendUnavailable)
    assert "start the same command again to go on" in str(result.exception)


@pytest.mark.parametrize(
    ("arguments", "error", "said"),
    [
        (
            ["--critic", "grpc://127.0.0.1:1", "--constitution", "charter"],
            ConfigError,
            "has its own constitution",
        ),
        (
            ["--critic", "local:some", "--constitution", "absent"],
            ConstitutionError,
            "no constitution is called absent",
        ),
        (["--critic", "local:some", "--rounds", "0"], ConfigError, "must be at least 1"),
        (["--critic", "local:some", "--bus", "rabbit:x"], ConfigError, "unknown kind"),
        (["--critic", "local:some", "--state", "/dev/null/x"], ConfigError, "name another with --state"),
    ],
)
def test_a_wrong_option_is_told_before_any_model_is_loaded(
    arguments, error, said, tmp_path, prompts, monkeypatch
) -> None:
    opened = opening(monkeypatch)
    places = ["--out", str(tmp_path / "out"), "--state", str(tmp_path / "state")]
    command = ["--prompts", prompts, *places, "--model", "local:some", *arguments]
    result = runner.invoke(app, command)
    assert isinstance(result.exception, error)
    assert said in str(result.exception)
    assert opened == []
