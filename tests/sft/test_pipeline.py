"""The whole of `charter sft` on a tiny model: revisions and helpful prompts in, a checkpoint out."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from pyarrow import parquet
from tests.tiny import make_tiny_model
from typer import Typer
from typer.testing import CliRunner

from charter.errors import ConfigError
from charter.feedback.records import RevisionStep
from charter.finetune.config import TuningConfig
from charter.lm import open_model
from charter.lm.base import ChatMessage, ModelVersion, Prompt, Role, Sampling
from charter.redteam import records
from charter.registry import Registry, Status
from charter.sft.cli import sft
from charter.sft.config import OwnAnswers, SftConfig
from charter.sft.pipeline import Sources, run

CONFIG = SftConfig(
    max_revisions=12,
    own=OwnAnswers(share=0.5, max_tokens=400),
    tuning=TuningConfig(learning_rate=5e-3, epochs=40, batch_size=8),
)


def _asked(text: str):
    return (ChatMessage(Role.USER, text),)


@pytest.fixture
def revisions(tmp_path: Path) -> Path:
    model = ModelVersion("m")
    step = RevisionStep("harm", "it harms", " I will not help with that.")
    rows = [
        records.Revision(
            f"run/{i}", str(i), _asked(f"open door {i}"), "Sure", (step,), model, model, "c0ffee", 1
        )
        for i in range(16)
    ]
    file = tmp_path / "revisions.parquet"
    parquet.write_table(records.table(rows), file)
    return file


async def _greedy(folder: Path, question: str) -> str:
    model = open_model(f"local:{folder}")
    try:
        samples = await model.generate(Prompt(_asked(question)), Sampling(temperature=0, max_tokens=20))
        return samples.completions[0].text
    finally:
        await model.close()


def test_the_new_checkpoint_answers_as_the_revisions_do(revisions: Path, tmp_path: Path) -> None:
    import asyncio

    seen: dict[str, list[str]] = {}
    sources = Sources(
        str(make_tiny_model(tmp_path / "tiny", spread=0.05)), (revisions,), helpful=(_asked("cup"),) * 9
    )

    def note(what: str, done: int, total: int, remark: str) -> None:
        seen.setdefault(what, []).append(remark)

    outcome = run(sources, CONFIG, tmp_path / "new", note=note)
    assert outcome.mixture.revisions == outcome.changed == 12
    assert outcome.constitution_digests == ("c0ffee",)
    assert seen.keys() == {"own answers", "training"}
    assert seen["training"][0] == "", "no loss is known yet"
    assert 0 < float(seen["training"][-1].removeprefix("loss ")) < 5
    assert not (tmp_path / "new.work").exists()
    assert asyncio.run(_greedy(tmp_path / "new", "open door 99")).strip() == "I will not help with that."


def test_the_command_trains_by_the_same_configuration(revisions: Path, tmp_path: Path) -> None:
    app = Typer()
    app.command()(sft)
    model = make_tiny_model(tmp_path / "tiny")
    arguments = ["--model", str(model), "--revisions", str(revisions), "--out", str(tmp_path / "new")]
    registry = Registry(tmp_path / "checkpoints")
    settings = ["--set", "tuning.epochs=1", "--set", "max_revisions=4", "--registry", registry.root]
    done = CliRunner().invoke(app, [*arguments, *settings])
    assert done.exit_code == 0, done.output
    (manifest,) = registry.list()
    assert f"{manifest.id} is a candidate" in done.output
    assert manifest.facts.constitution_digest == "c0ffee"
    assert registry.status(manifest.id).status is Status.CANDIDATE
    assert "1 steps on 4 revisions (4 changed the draft)" in done.output
    assert (tmp_path / "new/model.safetensors").is_file()
    assert list((tmp_path / "new.logs").glob("events.*"))
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, ConfigError)
    assert "exists already" in str(again.exception)


def test_without_own_answers_no_model_is_opened(revisions: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, tuning=replace(CONFIG.tuning, epochs=1))
    sources = Sources(str(make_tiny_model(tmp_path / "tiny")), (revisions,), answerer="grpc://127.0.0.1:1")
    assert run(sources, config, tmp_path / "new").mixture.own == 0
