import io
import json
import logging

import pytest

from charter.errors import ConfigError
from charter.telemetry import bind_request_id, configure, get_logger, request_id


@pytest.fixture
def root_restored():
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    token = request_id.set("")
    yield
    request_id.reset(token)
    root.handlers[:] = handlers
    root.setLevel(level)


def written(json_lines: bool, *events, level="INFO") -> str:
    stream = io.StringIO()
    configure(level, json=json_lines, stream=stream)
    for event, fields in events:
        get_logger("charter.test").info(event, **fields)
    return stream.getvalue()


def test_a_json_line_has_time_level_logger_event_request_id_and_fields(root_restored):
    bind_request_id("r-1")
    line = json.loads(written(True, ("checkpoint loaded", {"version": "a1", "seconds": 1.5})))
    assert line.pop("time").endswith("+00:00")
    assert line == {
        "level": "info",
        "logger": "charter.test",
        "event": "checkpoint loaded",
        "request_id": "r-1",
        "version": "a1",
        "seconds": 1.5,
    }


def test_people_get_one_line_for_an_event_even_when_a_text_has_several(root_restored):
    text = written(False, ("prompt refused", {"error": "two\nlines", "n": 3}))
    assert text.count("\n") == 1
    assert "prompt refused" in text
    assert "n=3" in text


@pytest.mark.parametrize("json_lines", [True, False])
@pytest.mark.parametrize(
    ("event", "fields"),
    [
        ("config", {"api_key": "hunter22hunter"}),
        ("config", {"sasl_password": "hunter22hunter"}),
        ("config", {"nested": {"hf_token": "hunter22hunter"}}),
        ("request", {"header": "Authorization: Bearer hunter22hunter"}),
        ("broker", {"uri": "kafka://user:hunter22hunter@broker:9092"}),
        ("call failed with key sk-hunter22hunter", {}),
        ("query ?api_key=hunter22hunter&x=1", {}),
        ("headers", {"all": ["authorization", "bearer hunter22hunter"]}),
    ],
)
def test_a_secret_is_never_written(root_restored, json_lines, event, fields):
    text = written(json_lines, (event, fields))
    assert "hunter22hunter" not in text
    assert "[secret]" in text


def test_a_traceback_is_logged_without_the_secrets_in_it(root_restored):
    stream = io.StringIO()
    configure(json=True, stream=stream)
    try:
        raise RuntimeError("cannot log in with password=hunter22hunter")
    except RuntimeError:
        get_logger("charter.test").exception("failed")
    line = json.loads(stream.getvalue())
    assert "RuntimeError" in line["exception"]
    assert "hunter22hunter" not in line["exception"]


def test_counts_of_tokens_are_no_secrets(root_restored):
    line = json.loads(written(True, ("answer", {"tokens": 5, "token": 7, "max_tokens": 9})))
    assert (line["tokens"], line["token"], line["max_tokens"]) == (5, 7, 9)


def test_a_field_cannot_replace_what_every_line_has(root_restored):
    line = json.loads(written(True, ("real", {"level": "fatal"})))
    assert line["level"] == "info"
    assert line["field_level"] == "fatal"


def test_a_request_id_that_could_forge_a_line_is_replaced(root_restored):
    assert bind_request_id("fine-1.2") == "fine-1.2"
    forged = bind_request_id("x\nlevel=error")
    assert forged != "x\nlevel=error"
    assert request_id.get() == forged


def test_an_unknown_level_is_refused_with_the_choices():
    with pytest.raises(ConfigError, match=r"LOUD.*DEBUG, INFO"):
        configure("LOUD")
