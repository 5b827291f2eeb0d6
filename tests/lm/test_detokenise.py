"""Text from tokens: whole characters only, nothing of a stop string."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from charter.lm.detokenise import REPLACEMENT, StopStrings, TokenBytes, WindowText

EVERY_BYTE = TokenBytes([bytes([b]) for b in range(256)])


@given(st.text())
def test_a_text_comes_out_as_it_was_and_never_half_a_character(text):
    decoder = EVERY_BYTE.decoder()
    pieces = [decoder.push(b) for b in text.encode()] + [decoder.flush()]
    assert "".join(pieces) == text
    assert REPLACEMENT in text or not any(REPLACEMENT in p for p in pieces)


@given(st.binary())
def test_any_bytes_read_the_same_one_by_one_and_whole(data):
    decoder = EVERY_BYTE.decoder()
    pieces = [decoder.push(b) for b in data] + [decoder.flush()]
    assert "".join(pieces) == EVERY_BYTE.text(data) == data.decode("utf-8", "replace")


def test_a_character_comes_out_with_its_last_byte():
    decoder = EVERY_BYTE.decoder()
    assert [decoder.push(b) for b in "你".encode()] == ["", "", "你"]


def test_bytes_that_never_become_a_character_come_out_at_the_end():
    decoder = EVERY_BYTE.decoder()
    assert decoder.push("你".encode()[0]) == ""
    assert decoder.flush() == REPLACEMENT


def test_decoding_over_a_window_agrees_with_decoding_whole():
    vocabulary = ["Hello", " wor", "ld", "\xe4", "!"]

    def decode(ids):  # strips the space before the first word, as some tokenizers do
        return "".join(vocabulary[i] for i in ids).replace("\xe4", REPLACEMENT).lstrip()

    window = WindowText(decode)
    decoder = window.decoder()
    assert [decoder.push(i) for i in (0, 1, 2)] == ["Hello", " wor", "ld"]
    assert decoder.push(3) == ""
    assert decoder.push(4) == REPLACEMENT + "!"
    assert window.text((0, 1, 2, 4)) == "Hello world!"


def feed(stop, pieces):
    stops = StopStrings(stop)
    shown = [stops.push(p) for p in pieces]
    return shown, stops


def test_text_that_may_begin_a_stop_string_waits():
    shown, stops = feed(["END"], ["a E", "N", "x"])
    assert shown == ["a ", "", "ENx"]
    assert not stops.stopped


def test_a_stop_string_in_pieces_ends_the_text_before_it():
    shown, stops = feed(["END"], ["a E", "N", "D and more"])
    assert "".join(shown) == "a "
    assert stops.stopped
    assert stops.flush() == ""


def test_the_earliest_of_several_stop_strings_wins():
    shown, stops = feed(["later", "now"], ["do it now or later"])
    assert shown == ["do it "]
    assert stops.stopped


def test_what_was_held_back_comes_out_at_the_end():
    shown, stops = feed(["</answer>"], ["done</ans"])
    assert shown == ["done"]
    assert stops.flush() == "</ans"


@given(st.text("ab", max_size=40), st.lists(st.text("ab", min_size=1, max_size=4), min_size=1, max_size=3))
def test_pieces_of_any_size_show_the_same_text(text, stop):
    ends = [at for at in (text.find(s) for s in stop) if at >= 0]
    expected = text[: min(ends)] if ends else text
    for size in (1, 2, 3):
        shown, stops = feed(stop, [text[i : i + size] for i in range(0, len(text), size)])
        joined = "".join(shown) + stops.flush()
        if size == 1 and ends:  # letter by letter, the stop string that ends first wins
            first = min((text.find(s) + len(s), text.find(s)) for s in stop if s in text)[0]
            expected = text[: min(text[:first].find(s) for s in stop if s in text[:first])]
            assert joined == expected
        if not ends:
            assert joined == text
        assert not any(s in joined for s in stop)


@pytest.mark.parametrize("stop", [[], [""]])
def test_without_stop_strings_nothing_waits(stop):
    shown, _ = feed(stop, ["a", "b"])
    assert shown == ["a", "b"]
