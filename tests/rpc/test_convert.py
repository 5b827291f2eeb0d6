import pytest

from charter.errors import RequestError
from charter.lm import base
from charter.rpc import convert
from charter.v1 import types_pb2

MODEL = base.ModelVersion("step-3", "d" * 64, "t" * 64)
TOKENS = (
    base.Token(5, "he", -0.5, (base.Alternative(6, "she", -1.5),), -0.25),
    base.Token(7, "llo", -0.125),
)


def test_a_conversation_survives_the_wire():
    messages = tuple(base.ChatMessage(role, f"I am {role}") for role in base.Role)
    assert convert.messages_from_proto(convert.messages_to_proto(messages)) == messages


def test_an_empty_conversation_and_an_unknown_role_are_refused():
    with pytest.raises(RequestError, match="empty"):
        convert.messages_from_proto([])
    with pytest.raises(RequestError, match="message 0 has no known role"):
        convert.messages_from_proto([types_pb2.ChatMessage(content="hi")])


def test_sampling_survives_the_wire_exactly():
    sampling = base.Sampling(0.7, 0.95, 40, 17, ("\n\n", "是"), 2**63 + 1, 5)
    assert convert.sampling_from_proto(convert.sampling_to_proto(sampling)) == sampling
    greedy = base.Sampling(temperature=0.0)
    assert convert.sampling_from_proto(convert.sampling_to_proto(greedy)) == greedy


def test_fields_that_are_not_set_take_the_defaults():
    defaults = base.Sampling(0.3, 0.9, 7, 99, ("stop",), 4)
    assert convert.sampling_from_proto(types_pb2.Sampling(), defaults) == defaults
    assert convert.sampling_from_proto(types_pb2.Sampling(top_k=0), defaults).top_k == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -1.0),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.5),
        ("top_k", -1),
        ("max_tokens", 0),
        ("max_tokens", -5),
        ("top_logprobs", 21),
    ],
)
def test_a_sampling_value_out_of_range_is_refused_by_name(field, value):
    with pytest.raises(RequestError, match=f"sampling.{field} is"):
        convert.sampling_from_proto(types_pb2.Sampling(**{field: value}))


def test_an_empty_stop_string_is_refused():
    with pytest.raises(RequestError, match=r"sampling\.stop"):
        convert.sampling_from_proto(types_pb2.Sampling(stop=[""]))


def test_a_completion_survives_the_wire():
    completion = base.Completion("hello", TOKENS, base.FinishReason.LENGTH, 3, 2, MODEL)
    assert (
        convert.completion_from_proto(convert.completion_to_proto(completion, with_tokens=True), MODEL, 3)
        == completion
    )


def test_a_completion_without_texts_keeps_ids_logprobs_and_kept_mass():
    completion = base.Completion("hello", TOKENS, base.FinishReason.STOP, 3, 2, MODEL)
    back = convert.completion_from_proto(convert.completion_to_proto(completion), MODEL, 3)
    assert back.token_ids == (5, 7)
    assert back.logprobs == (-0.5, -0.125)
    assert [t.kept_log_mass for t in back.tokens] == [-0.25, 0.0]


def test_versions_and_finish_reasons_survive_the_wire():
    assert convert.version_from_proto(convert.version_to_proto(MODEL)) == MODEL
    for reason in (*base.FinishReason, None):
        assert convert.finish_reason_from_proto(convert.finish_reason_to_proto(reason)) is reason
