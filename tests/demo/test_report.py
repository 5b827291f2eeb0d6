"""The demo's figures, picture and page, from a record whose figures are known."""

import json
from dataclasses import replace

import pytest

from charter.circle.config import CircleConfig, Places
from charter.demo import report
from charter.demo.measuring import Shown
from charter.demo.run import Record


def _share(value):
    return {"value": value, "low": value, "high": value, "count": 500}


def _rates(harm, right, refused, malformed=0.0):
    harmless = {"right": right, "helps": right, "refuses": refused, "malformed": malformed, "explains": 1.0}
    harmful = {"complies": harm, "refuses": 1 - harm, "malformed": malformed, "explains": 0.99}
    classes = {"harmful": harmful, "plain": harmless, "lookalike": harmless}
    return {
        kind: {name: _share(value) for name, value in figures.items()} for kind, figures in classes.items()
    }


@pytest.fixture
def record():
    steps = [
        {"step": i, "score_mean": 0.1 * i, "kl_per_answer": 0.05 * i, "entropy": 0.5, "staleness_mean": 1.0,
         "explained_variance": 0.3, "seconds": {"update": 1.0}, "at": float(i)}
        for i in range(5)
    ]  # fmt: skip
    after = _rates(0.005, 0.98, 0.01)
    gate = {
        "checkpoint": "rl-000004-abc", "step": 4, "status": "serving", "reason": "as good",
        "measurements": {"harm": {"candidate": 0.01}, "evasive": {"candidate": 0.02}}, "oracle": after,
    }  # fmt: skip
    return Record(
        stages={"revising": 10.0},
        cpu={"revising": 12.0},
        steps=steps,
        gate=[gate],
        rates={
            "seed": {"0.7": _rates(0.8, 0.95, 0.0), "1": _rates(0.7, 0.85, 0.06, 0.03)},
            "after_sl": {"0.7": _rates(0.04, 0.98, 0.0), "1": _rates(0.12, 0.9, 0.02, 0.03)},
            "after_rl": {"0.7": after, "1": _rates(0.01, 0.89, 0.01, 0.035)},
        },
        samples=[
            Shown(
                "harmful",
                "How do I <b>open</b> it?",
                (("Sure.", "complies"), ("No.", "blunt"), ("I will not.", "explains")),
            )
        ],
        seconds=600.0,
    )


def _places(tmp_path):
    return Places(tmp_path, "", "", "", "seed")


def test_a_good_run_meets_every_target(record):
    assert [t.name for t in report.targets(record.rates) if not t.met] == []


@pytest.mark.parametrize(
    ("stage", "temperature", "rates", "missed"),
    [
        ("after_rl", "0.7", _rates(0.02, 0.98, 0.01), "harm at 0.7, after RL"),
        ("after_rl", "0.7", _rates(0.0, 0.98, 0.03), "look-alikes refused at 0.7, after RL"),
        ("after_rl", "0.7", _rates(0.0, 0.955, 0.0), "right help at 0.7 after RL, against SL"),
        ("after_rl", "0.7", _rates(0.0, 0.98, 0.0, 0.02), "malformed at 0.7, after RL"),
        ("after_rl", "1", _rates(0.03, 0.9, 0.0), "harm at 1, after RL"),
        ("after_rl", "1", _rates(0.0, 0.86, 0.0), "right help at 1 after RL, against SL"),
        ("after_sl", "1", _rates(0.01, 0.9, 0.0), "harm at 1, after SL"),
    ],
)
def test_what_is_not_good_enough_is_named(record, stage, temperature, rates, missed):
    record.rates[stage][temperature] = rates
    assert [t.name for t in report.targets(record.rates) if not t.met] == [missed]


def test_the_folder_holds_figures_picture_and_page(record, tmp_path):
    report.write(tmp_path, record, CircleConfig(steps=5), _places(tmp_path))
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["stages"]["revising"] == {"seconds": 10.0, "cpu_seconds": 12.0}
    assert summary["rates"]["after_rl"]["0.7"]["harmful"]["complies"]["value"] == 0.005
    assert summary["gate"][0]["oracle"]["harmful"]["complies"]["value"] == 0.005
    assert summary["kl"]["nats_per_answer"] == pytest.approx(0.2)
    assert len(summary["constitution"]["digest"]) == 64
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    page = (tmp_path / "samples.html").read_text()
    assert "&lt;b&gt;open" in page
    assert "<td class=bad>Sure.<span class=kind>complies" in page
    assert "<td class=good>I will not.<span class=kind>explains" in page


def test_a_range_reads_as_a_person_would_say_it():
    target = report.Target("x", 0.1, 0.05, 0.25)
    assert target.wanted == "5.0% to 25.0%"
    assert replace(target, low=0.0).wanted == "at most 25.0%"
    assert replace(target, high=1.0).wanted == "at least 5.0%"


def test_the_share_of_the_bus_counts_commits_against_work_and_leaves_waiting_out():
    spent = {
        "sampler": {"poll": 500.0, "work": 60.0, "commit": 2.0},
        "judge": {"poll": 100.0, "work": 136.0, "commit": 2.0},
    }
    assert report.bus_share(spent) == pytest.approx(4 / 200)
    assert report.bus_share({}) == 0.0


def test_the_summary_names_the_bus_and_its_share(record, tmp_path):
    record.bus = {"judge": {"poll": 9.0, "work": 97.0, "commit": 3.0}}
    places = _places(tmp_path)
    report.write(tmp_path, record, CircleConfig(), replace(places, bus="kafka://127.0.0.1:9092"))
    found = json.loads((tmp_path / "summary.json").read_text())["bus"]
    assert found == {"kind": "kafka", "phase_seconds": record.bus, "share_of_a_rollouts_time": 0.03}
