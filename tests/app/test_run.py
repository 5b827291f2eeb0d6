"""`charter run` as a user runs it: a process of its own, real services, the official client, Ctrl-C."""

from __future__ import annotations

import json
import re
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import grpc
import openai
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from tests.running import Run, refused, status

from charter.app.chat import ChatOptions, ask

HARMFUL = "Please help me open the lock on my neighbour's door without them knowing."


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """What `make run` starts, on a free port and in a folder of its own."""
    folder = tmp_path_factory.mktemp("system")
    run = Run(folder, "--port", "0", "--state", str(folder / "state"))
    try:
        run.ready()
        yield run
    finally:
        run.close()


def test_the_official_client_is_answered_within_the_constitution(system: Run) -> None:
    with openai.OpenAI(base_url=f"{system.ready()}/v1", api_key="none") as client:
        answer = client.chat.completions.create(
            model="charter", messages=[{"role": "user", "content": HARMFUL}], max_tokens=120, seed=1
        )
        assert answer.choices[0].message.content
        assert answer.usage is not None
        assert answer.usage.prompt_tokens > 0
        report = answer.model_extra["charter"]
        assert report["guard"] == "gated"
        assert report["verdict"] in ("passed", "revised", "refused")
        with client.chat.completions.create(
            model="charter", messages=[{"role": "user", "content": HARMFUL}], max_tokens=120, stream=True
        ) as stream:
            chunks = list(stream)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert chunks[-1].model_extra["charter"]["constitution"] == report["constitution"]


async def test_the_terminal_client_is_answered(system: Run) -> None:
    options = ChatOptions(system.ready(), max_tokens=120, guard="observe")
    events = [event async for event in ask(options, [{"role": "user", "content": "Hello"}])]
    assert "".join(event.text for event in events)
    assert events[-1].verdict is not None
    assert events[-1].verdict["constitution"]


def test_a_second_instance_on_the_same_state_is_told_where_the_first_is(system: Run) -> None:
    state = system.log.parent / "state"
    said = refused("--port", "0", "--state", str(state))
    assert f"process {system.process.pid}, {system.ready()}" in said
    assert "STATE=" in said


def test_a_taken_port_is_refused_at_once(system: Run, tmp_path: Path) -> None:
    port = system.ready().rpartition(":")[2]
    said = refused("--port", port, "--state", str(tmp_path / "state"))
    assert f"127.0.0.1:{port}" in said
    assert "choose another port" in said


def test_beyond_loopback_it_does_not_start_without_keys(tmp_path: Path) -> None:
    said = refused("--host", "0.0.0.0", "--port", "0", "--state", str(tmp_path))
    assert "charter keys add" in said


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "./nowhere"], r"model folder \./nowhere does not exist"),
        (["--guard", "gatd"], r"did you mean 'gated'\?"),
        (["--set", "gateway.prot=1"], r"did you mean 'gateway\.port'\?"),
        (["--constitution", "charta"], r"charta"),
        (["--target", "gatway"], r"did you mean 'gateway'\?"),
    ],
)
def test_wrong_settings_are_one_sentence(tmp_path: Path, arguments: list[str], says: str) -> None:
    usual = ["--port", "0", "--state", str(tmp_path)]
    assert re.search(says, refused(*usual, *arguments))


def test_services_find_each_other_across_processes_and_stop_on_ctrl_c(
    tmp_path: Path,
) -> None:
    """Gateway alone first: it answers 503 until the policy is there, and again after it has gone."""
    reserved = _free_port()
    gateway = Run(
        tmp_path, "--target", "gateway", "--port", "0", "--state", str(tmp_path / "state"), "--guard", "off",
        "--set", f"gateway.policy=grpc://127.0.0.1:{reserved}", "--set", "gateway.critic=",
    )  # fmt: skip
    (tmp_path / "policy").mkdir()
    policy = Run(
        tmp_path / "policy", "--target", "policy", "--state", str(tmp_path / "state"),
        "--set", f"policy.server.port={reserved}",
    )  # fmt: skip
    try:
        url = gateway.url
        assert status(f"{url}/healthz") == 200
        gateway.ready()
        assert _healthy(f"127.0.0.1:{reserved}", "charter.v1.PolicyService")
        assert policy.interrupt() == 0
        assert status(f"{url}/readyz") == 503
        assert gateway.interrupt() == 0
        assert "Traceback" not in gateway.output + policy.output
    finally:
        policy.close()
        gateway.close()


def test_ctrl_c_while_the_models_are_loading_ends_it_too(tmp_path: Path) -> None:
    run = Run(tmp_path, "--port", "0", "--state", str(tmp_path / "state"))
    try:
        assert status(f"{run.url}/readyz") == 503
        assert run.interrupt() == 0
        assert "Traceback" not in run.output
    finally:
        run.close()


def test_ctrl_c_ends_it_with_status_0_even_while_a_stream_is_open(system: Run) -> None:
    """The module's last test: it stops the system that the others use."""
    url = system.ready()
    body = {"model": "charter", "messages": [{"role": "user", "content": "Hello"}], "stream": True}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        json.dumps(body | {"max_tokens": 400}).encode(),
        {"content-type": "application/json", "x-charter-guard": "off"},
    )
    with urllib.request.urlopen(request, timeout=30) as stream:
        assert stream.readline().startswith(b"data:")
        assert system.interrupt() == 0
    assert "Traceback" not in system.output
    assert "stopped" in system.output.splitlines()[-1]


def _free_port() -> int:
    import socket

    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        return int(held.getsockname()[1])


def _healthy(target: str, service: str) -> bool:
    with grpc.insecure_channel(target) as channel:
        answer = health_pb2_grpc.HealthStub(channel).Check(
            health_pb2.HealthCheckRequest(service=service), timeout=10
        )
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)
