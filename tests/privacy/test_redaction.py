"""What is removed from a conversation before it is kept, and what is left alone."""

# ruff: noqa: E501 - examples are quoted whole

import random
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from charter.privacy import Kind, checks, redact

EXAMPLES = {
    Kind.EMAIL: [
        "ada.l+x@example.co.uk", "josé@exämple.fr", "ada (at) example [dot] org", "o'neil@a-b.museum", "１２３@qq.com",
    ],
    Kind.PHONE: [
        "+44 (0) 20 7946 0958", "+1-202-555-0123", "0049 30 901820", "(555) 234-5678", "555-234-5678", "1 555 234 5678",
        "020 7946 0958", "06 12 34 56 78", "0171/1234567", "07700900123", "13812345678", "138 1234 5678",
        "+86 138-1234-5678", "010-62345678", "１３８１２３４５６７８", "138\u200b12345678", "+91 98765 43210",
    ],
    Kind.CREDIT_CARD: [
        "4111 1111 1111 1111", "4111-1111-1111-1111", "5555555555554444", "378282246310005", "3782 822463 10005",
        "6200000000000005", "4012888888881881 12/27",
    ],
    Kind.IBAN: ["DE89 3704 0044 0532 0130 00", "GB82WEST12345698765432", "FR14 2004 1010 0505 0001 3M02 606",
                "no93 8601 1117 947"],
    Kind.IP_ADDRESS: ["192.168.1.17", "8.8.8.8", "2001:db8:85a3::8a2e:370:7334", "fe80::1", "::ffff:192.0.2.1"],
    Kind.MAC_ADDRESS: ["00:1A:2B:3C:4D:5E", "00-1a-2b-3c-4d-5e"],
    Kind.US_SSN: ["123-45-6789", "123 45 6789", "123–45–6789"],
    Kind.URL_CREDENTIALS: ["https://ada:engine@example.org/x", "postgres://u:p%40@localhost/db",
                           "https://example.org/cb?code=1&access_token=ya8b7c6d5", "https://example.org/?sig=aGVsbG8h"],
    Kind.SECRET: [
        "sk-proj-abcdefghijklmnop1234", "ghp_abcdefghijklmnopqrstuvwxyz0123456789", "AKIAIOSFODNN7EXAMPLE",
        "xoxb-123456789012-abcdefghijkl", "glpat-abcdefghij1234567890", "hf_abcdefghijklmnopqrstuvwxyzABCDEF",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.c2lnbmF0dXJl", "sk_live_abcdefghij1234567890",
        "-----BEGIN RSA PRIVATE KEY-----\nDEK-Info: AES-128\n\nMIIB\n-----END RSA PRIVATE KEY-----",
    ],
    Kind.CN_ID: ["11010519491231002X", "11010519491231002x"],
    Kind.ADDRESS: [
        "12b Old Mill Road, Apt 4, Springfield, IL 62704", "221B Baker Street", "350 5th Ave", "Goethestr. 12a, 10115 Berlin",
        "Lange Straße 5", "12 bis, rue de la Paix, 75002 Paris", "P.O. Box 1234", "北京市海淀区中关村大街27号3号楼502室",
        "上海市浦东新区世纪大道 100 号",
    ],
}  # fmt: skip
CASES = [(kind, text) for kind, texts in EXAMPLES.items() for text in texts]


@pytest.mark.parametrize(("kind", "text"), CASES, ids=[t for _, t in CASES])
@pytest.mark.parametrize("carrier", ["{}", "It is {}, and I mean it.", "就是{}，谢谢。"])
def test_each_form_of_each_kind_is_removed(kind: Kind, text: str, carrier: str) -> None:
    redacted, counts = redact(carrier.format(text))
    assert counts == {kind: 1}
    assert f"[{kind}]" in redacted
    assert set(re.findall(r"\d{3,}", redacted)) == set()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("my password is hunter2!", "my password is [SECRET]"),
        ('{"api_key": "abc123xyz"}', '{"api_key": "[SECRET]"}'),
        ("PASSWORD=swordfish", "PASSWORD=[SECRET]"),
        ("Authorization: Bearer abcdefghijklmnop1234", "Authorization: Bearer [SECRET]"),
        ("我的密码是abc12345", "我的密码是[SECRET]"),
        ("my SSN: 123456789", "my SSN: [US_SSN]"),
        ("passport number E12345678", "passport number [PASSPORT]"),
        ("护照号：E12345678", "护照号：[PASSPORT]"),
        ("driver's license: D1234567", "driver's license: [ID_NUMBER]"),
        ("call me at 5551234", "call me at [PHONE]"),
        ("电话：62345678", "电话：[PHONE]"),
        ("我住在北京市海淀区中关村大街27号", "我住在[ADDRESS]"),
        ("card 4111 1111 1111 1111 12/27", "card [CREDIT_CARD] 12/27"),
        ("https://ada:engine@host/path?x=1", "https://[URL_CREDENTIALS]@host/path?x=1"),
    ],
)
def test_only_the_personal_part_is_removed(text: str, expected: str) -> None:
    assert redact(text)[0] == expected


@pytest.mark.parametrize(
    "text",
    [
        "In 2024 we sold 1,234,567 units for 12.50 each.",
        "See section 3.14.15 on pages 10-12, or call kill -9 4242.",
        "Born on 01.02.1990 at 10:30:15, 2024-05-06.",
        "order 1234567890123456, a number without the check digit of a card",
        "The secret is patience, and the password is long.",
        "std::vector a::b ::1 127.0.0.1 0.0.0.0 localhost",
        "5 Grand Pianos in the main hall",
        "版本 1.2.3，共 12345 条，第 27 号。",
        "def f(x): return x @ y  # a@b",
        "passport control is at gate 12",
        "",
    ],
)
def test_what_is_no_personal_data_stays(text: str) -> None:
    assert redact(text) == (text, {})


def test_counts_say_how_often_each_kind_was_removed() -> None:
    text = "a@example.org, b@example.org and 10.1.2.3"
    assert redact(text) == ("[EMAIL], [EMAIL] and [IP_ADDRESS]", {"EMAIL": 2, "IP_ADDRESS": 1})


# Properties ----------------------------------------------------------------------------------------------

words = st.text(string.ascii_letters + " ", max_size=30)
anything = st.text(max_size=200) | st.text("0123456789 -+.()@:/abcDE\n０１号路市", max_size=120)


@settings(deadline=None, max_examples=400)
@given(anything)
def test_redacting_twice_is_redacting_once(text: str) -> None:
    once, _ = redact(text)
    assert redact(once) == (once, {})


@settings(deadline=None, max_examples=400)
@given(anything)
def test_what_is_not_removed_is_left_as_it_was_and_in_order(text: str) -> None:
    redacted, counts = redact(text)
    position = 0
    for piece in re.split(rf"\[(?:{'|'.join(Kind)})\]", redacted):
        position = text.index(piece, position) + len(piece)
    assert redacted.count("[") - text.count("[") <= sum(counts.values())


@settings(deadline=None)
@given(words)
def test_plain_words_are_never_touched(text: str) -> None:
    assert redact(text) == (text, {})


@settings(deadline=None)
@given(
    words, st.from_regex(r"[a-z][a-z0-9._]{0,20}[a-z0-9]@[a-z]{2,10}\.(com|org|cn)", fullmatch=True), words
)
def test_no_address_survives_between_words(before: str, email: str, after: str) -> None:
    assert email not in redact(f"{before} {email} {after}")[0]


@settings(deadline=None)
@given(
    words,
    st.integers(12, 17),
    st.sampled_from("3456"),
    st.randoms(use_true_random=False),
    st.sampled_from(["", " ", "-"]),
)
def test_no_card_survives_however_it_is_grouped(
    before: str, length: int, network: str, rng: random.Random, separator: str
) -> None:
    body = network + "".join(rng.choices(string.digits, k=length - 1))
    number = body + next(d for d in string.digits if checks.luhn(body + d))
    written = separator.join(number[i : i + 4] for i in range(0, len(number), 4))
    redacted, _ = redact(f"{before} {written}.")
    assert written not in redacted


@settings(deadline=None)
@given(st.sampled_from(sorted(checks.IBAN_LENGTHS)), st.randoms(use_true_random=False), st.booleans())
def test_no_iban_survives(country: str, rng: random.Random, spaced: bool) -> None:
    body = "".join(rng.choices(string.digits, k=checks.IBAN_LENGTHS[country] - 4))
    check = 98 - int("".join(str(int(c, 36)) for c in f"{body}{country}00")) % 97
    number = f"{country}{check:02}{body}"
    written = " ".join(number[i : i + 4] for i in range(0, len(number), 4)) if spaced else number
    assert redact(f"Pay to {written} today") == ("Pay to [IBAN] today", {"IBAN": 1})


@pytest.mark.timeout(120)  # a pattern that backtracks without bound would take years on these
@pytest.mark.parametrize(
    "unit",
    ["a", "1", "1 ", "a@", "a.", "@a.", "a-", "1-", "(1)", "::", "1:", "sk-", "eyJ-", "eyJa.", "://", "a://", "password ",
     "password=", "-----BEGIN PRIVATE KEY", "-----BEGIN PRIVATE KEY-----", "DE89", "de", "路1号", "市", "省市区路", "号",
     "1 A ", "12 Aa ", "Aa", "0 1", "+1", "[at]", "a (at) ", "P<", "phone ", "passport ", "?token=", "１", "\u200b", "[EMAIL]"],
)  # fmt: skip
def test_no_long_text_takes_more_than_linear_time(unit: str) -> None:
    text = (unit * 60_000)[:60_000]
    redacted, counts = redact(text)
    assert (redacted == text) == (counts == {})
