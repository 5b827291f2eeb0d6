"""The chart's topics, rendered by Helm itself, are what `charter topics apply` makes of the same file."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from charter.bus.kafka import topic_configs
from charter.bus.topics import DEFAULT_FILE, load_topics

ROOT = Path(__file__).resolve().parents[2]
CHART = ROOT / "helm" / "charter"
HELM = os.environ.get("CHARTER_TEST_HELM", "")

pytestmark = pytest.mark.skipif(not HELM, reason="needs Helm: make test-helm")


def _helm(chart: Path, **values: object) -> subprocess.CompletedProcess[str]:
    given = [f"--set=topics.{name}={value}" for name, value in values.items()]
    return subprocess.run(
        [HELM, "template", "it", str(chart), *given], capture_output=True, text=True, timeout=60, check=False
    )


def _topics(chart: Path, **values: object) -> dict[str, dict[str, Any]]:
    done = _helm(chart, strimzi="true", cluster="k", **values)
    assert done.returncode == 0, done.stderr
    documents = [d for d in YAML(typ="safe").load_all(done.stdout) if d]
    return {document["metadata"]["name"]: document for document in documents}


def _copy(tmp_path: Path, topics: str) -> Path:
    """The chart with another topics file."""
    chart = shutil.copytree(CHART, tmp_path / "charter")
    (chart / "files" / "topics.yaml").write_text(topics)
    return chart


@pytest.mark.parametrize("replication", [1, 3])
def test_every_topic_is_what_apply_makes_of_it(replication: int) -> None:
    rendered, specs = _topics(CHART, replication=replication), load_topics()
    assert list(rendered) == sorted(spec.name for spec in specs)
    for spec in specs:
        topic = rendered[spec.name]
        assert (topic["apiVersion"], topic["kind"]) == ("kafka.strimzi.io/v1", "KafkaTopic")
        assert topic["metadata"]["labels"]["strimzi.io/cluster"] == "k"
        assert (topic["spec"]["partitions"], topic["spec"]["replicas"]) == (spec.partitions, replication)
        told = {key: str(value) for key, value in topic["spec"]["config"].items()}
        assert told == topic_configs(spec, replication)


def test_what_the_shipped_file_does_not_use_is_read_the_same_way(tmp_path: Path) -> None:
    text = "\n".join(
        [
            "topics:",
            "  bare: {partitions: 1}",
            "  short: {partitions: 2, retention: 90s, max_message_bytes: 1000}",
            "  hours: {partitions: 2, retention: 12h, cleanup: compact}",
            "  minutes: {partitions: 2, retention: 45m}",
        ]
    )
    chart = _copy(tmp_path, text)
    rendered = _topics(chart)
    for spec in load_topics(chart / "files" / "topics.yaml"):
        told = {key: str(value) for key, value in rendered[spec.name]["spec"]["config"].items()}
        assert told == topic_configs(spec, 3)


def test_the_chart_ships_the_very_file_that_apply_reads() -> None:
    assert (CHART / "files" / "topics.yaml").resolve() == DEFAULT_FILE.resolve()


def test_no_topic_is_made_unless_asked_for() -> None:
    done = _helm(CHART)
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_topics_outlive_the_release() -> None:
    kept = [t["metadata"]["annotations"]["helm.sh/resource-policy"] for t in _topics(CHART).values()]
    assert set(kept) == {"keep"}


def test_a_wrong_value_is_named(tmp_path: Path) -> None:
    for values, says in [
        ({"strimzi": "true"}, "topics.cluster is empty; give the name of Strimzi's Kafka resource"),
        ({"strimzi": "true", "cluster": "k", "replication": 0}, "replication"),
        ({"strimzy": "true"}, "strimzy"),
    ]:
        done = _helm(CHART, **values)
        assert done.returncode != 0
        assert says in done.stderr
    wrong = _copy(tmp_path, "topics:\n  t: {partitions: 1, retention: soon}\n")
    done = _helm(wrong, strimzi="true", cluster="k")
    assert done.returncode != 0
    assert 'retention must read like 12h, 30d or forever, not "soon"' in done.stderr
