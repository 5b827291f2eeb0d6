"""The body of a request: what it means, and what is said about one that is wrong."""

import json

import pytest

from charter.gateway.envelope import ApiError
from charter.gateway.requests import parse
from charter.lm.base import ChatMessage, Role

HELLO = {"model": "charter", "messages": [{"role": "user", "content": "hello"}]}


def read(**fields):
    return parse(json.dumps(HELLO | fields).encode())


def fault(body):
    with pytest.raises(ApiError) as caught:
        parse(body if isinstance(body, bytes) else json.dumps(HELLO | body).encode())
    assert caught.value.status == 400
    return caught.value


def test_content_is_a_string_or_text_parts_and_developers_speak_as_the_system():
    parts = [{"type": "text", "text": "how "}, {"type": "text", "text": "are you?"}]
    messages = [
        {"role": "developer", "content": "Be kind."},
        {"role": "user", "content": "hello"},
        {"role": "assistant", "content": "hi", "refusal": None, "tool_calls": None},
        {"role": "user", "content": parts},
    ]
    assert read(messages=messages).prompt().messages == (
        ChatMessage(Role.SYSTEM, "Be kind."),
        ChatMessage(Role.USER, "hello"),
        ChatMessage(Role.ASSISTANT, "hi"),
        ChatMessage(Role.USER, "how are you?"),
    )


def test_sampling_takes_defaults_where_the_request_is_silent():
    sampling = read().sampling(77, 0.7)
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p, sampling.stop) == (77, 0.7, 1.0, ())
    assert sampling.seed is None


def test_sampling_takes_what_the_request_says():
    sampling = read(
        max_tokens=5, max_completion_tokens=6, temperature=0, top_p=0.5, stop="END", seed=-1, logprobs=True,
        top_logprobs=3,
    ).sampling(77, 0.7)  # fmt: skip
    assert (sampling.max_tokens, sampling.temperature, sampling.top_p) == (6, 0.0, 0.5)
    assert (sampling.stop, sampling.top_logprobs) == (("END",), 3)
    assert 0 <= sampling.seed < 2**62


@pytest.mark.parametrize(
    "body", [b"", b"{", b"hello", b'{"model": "charter",}', b"\xff\xfe", b'{"model": "\\ud800"}']
)
def test_malformed_json_is_told_as_such(body):
    assert fault(body).code == "invalid_json"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": "hello"}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages[0]"),
        ({"messages": [{"role": "user"}]}, "messages[0]"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}]}, "messages"),
        ({"model": 3}, "model"),
        ({"n": "2"}, "n"),
        ({"n": 0}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 2.1}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": 21, "logprobs": True}, "top_logprobs"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"seed": 2**70}, "seed"),
        ({"charter": {"guard": "sometimes"}}, "charter.guard"),
        ({"charter": {"conversation": "../../x"}}, "charter.conversation"),
    ],
)
def test_a_wrong_field_is_named(fields, param):
    error = fault(fields)
    assert error.param == param
    assert error.message.endswith(".")


def test_not_a_number_is_no_temperature():
    assert fault(json.dumps(HELLO)[:-1].encode() + b', "temperature": NaN}').code in (
        "invalid_json",
        "invalid_value",
    )


def test_a_misspelt_field_gets_the_right_name():
    error = fault({"max_token": 5})
    assert (error.code, error.param) == ("unknown_parameter", "max_token")
    assert "'max_tokens'" in error.message


@pytest.mark.parametrize(
    "fields", [{"tools": [{"type": "function"}]}, {"presence_penalty": 1}, {"audio": {}}]
)
def test_a_field_that_cannot_be_honoured_is_refused_rather_than_ignored(fields):
    error = fault(fields)
    assert error.code == "unsupported_parameter"
    assert error.param in fields


def test_fields_that_ask_for_nothing_are_accepted():
    read(
        tools=[],
        presence_penalty=0.0,
        response_format={"type": "text"},
        user="u",
        metadata={"a": "b"},
        store=False,
    )


@pytest.mark.parametrize("character", ["\x00", "\x07", "\x1b", "\x7f"])
def test_control_characters_are_refused_with_their_place(character):
    error = fault({"messages": [{"role": "user", "content": f"ab{character}"}]})
    assert error.code == "control_character"
    assert f"U+{ord(character):04X} at position 2" in error.message


def test_line_breaks_tabs_and_every_script_are_welcome():
    text = "a\tb\r\n你好 \u202e שלום 🙂"
    assert read(messages=[{"role": "user", "content": text}]).messages[0].content == text
