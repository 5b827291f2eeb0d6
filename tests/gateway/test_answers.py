"""What is known about a request: the conversation's name, and what a header may carry."""

from charter.gateway.answers import Call, plain
from charter.gateway.guard import GuardMode
from charter.lm.base import ChatMessage, Prompt, Role, Sampling

TURNS = tuple(
    ChatMessage(Role(role), text)
    for role, text in [("system", "Be kind."), ("user", "hello"), ("assistant", "hi"), ("user", "and now?")]
)


def call(turns=TURNS, key="alice", named=""):
    return Call(
        request_id="r1", model="charter", prompt=Prompt(turns), sampling=Sampling(), n=1, logprobs=False,
        stream=False, include_usage=False, mode=GuardMode.OFF, key_id=key, named=named, train=False,
    )  # fmt: skip


def test_all_turns_of_a_conversation_have_its_name_and_other_conversations_another():
    assert call(TURNS[:2]).conversation == call().conversation
    assert call(key="bob").conversation != call().conversation
    assert call(TURNS[1:]).conversation != call().conversation
    assert call(named="mine").conversation == "mine"


def test_on_the_bus_a_conversation_without_a_name_has_no_hash_of_its_words():
    assert call().recorded_as == "r1"
    assert call(named="mine").recorded_as == "mine"


def test_headers_carry_plain_characters_only():
    assert plain("step-12\r\nSet-Cookie: ü") == "step-12??Set-Cookie: ?"
