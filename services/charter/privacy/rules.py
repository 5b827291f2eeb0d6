"""What counts as personal data here, rule by rule, the most telling first.

Each rule gives spans of a text. Every pattern is bounded in what it repeats and has no two ways to read the
same characters, so that the cost is linear in the text, whatever it is; what a pattern cannot say (check
digits, the left edge of a Chinese address) is a function.

Where in doubt a rule removes too much rather than too little: a conversation with a gap still teaches, a
leaked number cannot be taken back.
"""

# ruff: noqa: E501 - a pattern is easier to read on one line

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from charter.privacy import checks


class Kind(enum.StrEnum):
    """Kinds of personal data; `[KIND]` takes their place."""

    SECRET = "SECRET"  # noqa: S105 - a name, not a secret
    """Keys, tokens and passwords."""
    URL_CREDENTIALS = "URL_CREDENTIALS"
    """User and password, or a token, inside an address."""
    EMAIL = "EMAIL"
    IBAN = "IBAN"
    CN_ID = "CN_ID"
    """Chinese resident identity numbers."""
    CREDIT_CARD = "CREDIT_CARD"
    US_SSN = "US_SSN"
    IP_ADDRESS = "IP_ADDRESS"
    MAC_ADDRESS = "MAC_ADDRESS"
    PASSPORT = "PASSPORT"
    ID_NUMBER = "ID_NUMBER"
    """Driving licences, national insurance and identity numbers that the text names as such."""
    PHONE = "PHONE"
    ADDRESS = "ADDRESS"
    """Street addresses and post-office boxes."""


Span = tuple[int, int]


@dataclass(frozen=True, slots=True)
class Rule:
    """Finds one form of one kind."""

    kind: Kind
    find: Callable[[str], Iterator[Span]]


def _by_pattern(
    kind: Kind, pattern: str, *, check: Callable[[str], bool] | None = None, flags: int = 0
) -> Rule:
    """Spans of the pattern's group `it`, or of all of it, for which `check` holds."""
    # ASCII: a Chinese character before a number is not a part of it, though Unicode calls both letters.
    compiled = re.compile(pattern, flags | re.ASCII)
    group: str | int = "it" if "it" in compiled.groupindex else 0

    def find(text: str) -> Iterator[Span]:
        for match in compiled.finditer(text):
            if check is None or check(match.group(group)):
                yield match.span(group)

    return Rule(kind, find)


# Secrets -------------------------------------------------------------------------------------------------

_B = r"(?<![A-Za-z0-9_-])"
"""Where a token may begin."""
# The forms that issuers publish for secret scanning: a fixed beginning, then a body.
_TOKENS = (
    r"sk-[A-Za-z0-9_-]{16,256}",  # OpenAI, Anthropic and others
    r"(?:sk|pk|rk)_(?:live|test)_[A-Za-z0-9]{10,128}",  # Stripe
    r"whsec_[A-Za-z0-9]{16,128}",
    r"gh[pousr]_[A-Za-z0-9]{20,255}",  # GitHub
    r"github_pat_[A-Za-z0-9_]{20,255}",
    r"glpat-[A-Za-z0-9_-]{16,64}",  # GitLab
    r"xox[abeoprs]-[A-Za-z0-9-]{10,255}",  # Slack
    r"(?:AKIA|ASIA)[0-9A-Z]{16}(?![0-9A-Z])",  # AWS
    r"AIza[A-Za-z0-9_-]{35}",  # Google
    r"ya29\.[A-Za-z0-9_-]{20,512}",
    r"hf_[A-Za-z0-9]{20,64}",  # Hugging Face
    r"npm_[A-Za-z0-9]{30,64}",
    r"pypi-[A-Za-z0-9_-]{40,512}",
    r"SG\.[A-Za-z0-9_-]{16,64}\.[A-Za-z0-9_-]{16,64}",  # SendGrid
    r"\d{8,10}:AA[A-Za-z0-9_-]{30,40}",  # Telegram
    r"eyJ[A-Za-z0-9_-]{8,4096}\.eyJ[A-Za-z0-9_-]{8,4096}\.[A-Za-z0-9_-]{0,1024}",  # JSON Web Tokens
)
_LABEL = (
    r"(?:pass(?:word|wd|phrase|code)|pwd|secret(?:[ _-]?key)?|api[ _-]?key|access[ _-]?key|auth[ _-]?token|"
    r"access[ _-]?token|refresh[ _-]?token|private[ _-]?key|token|密码|口令|密钥|令牌)"
)

_SECRETS = (
    _by_pattern(
        Kind.SECRET,
        r"-----BEGIN[^-\n]{0,40}PRIVATE KEY-----(?:[^-]|-(?!----)){0,16384}(?:-----END[^-\n]{0,40}-----)?",
    ),
    _by_pattern(Kind.SECRET, _B + "(?:" + "|".join(_TOKENS) + ")"),
    _by_pattern(
        Kind.SECRET, r"\b(?:Bearer|Basic)[ \t]{1,4}(?P<it>[A-Za-z0-9._~+/-]{16,2048}={0,2})", flags=re.I
    ),
    # "password: swordfish": after a sign, anything; after a word, only what no sentence would say.
    _by_pattern(
        Kind.SECRET,
        rf"{_LABEL}['\"]?[ \t]{{0,4}}[=:][ \t]{{0,4}}['\"]?(?P<it>[^\s'\",;]{{4,256}})",
        flags=re.I,
    ),
    _by_pattern(
        Kind.SECRET,
        rf"{_LABEL}[ \t]{{0,4}}(?:is|was|是|为)[ \t]{{0,4}}['\"“]?(?P<it>[!-+\--~]{{4,128}})",
        check=lambda s: bool(re.search(r"[0-9@#$%^&*_+=~]", s)),
        flags=re.I,
    ),
)

_QUERY = (
    r"(?:access_|auth_|refresh_|id_|session_)?token|api_?key|key|sig|signature|x-amz-signature|x-amz-credential|"
    r"x-goog-signature|pass|passwd|password|pwd|secret|client_secret|auth|session|sessionid|sid|jwt|otp"
)
_URLS = (
    _by_pattern(Kind.URL_CREDENTIALS, r"\b[A-Za-z][A-Za-z0-9+.-]{1,20}://(?P<it>[^\s/@?#]{1,256})@"),
    _by_pattern(Kind.URL_CREDENTIALS, rf"[?&#;](?:{_QUERY})=(?P<it>[^\s&#\"'<>]{{4,2048}})", flags=re.I),
    _by_pattern(
        Kind.URL_CREDENTIALS,
        r"https://(?:hooks\.slack\.com/services|discord(?:app)?\.com/api/webhooks)/(?P<it>[A-Za-z0-9/_-]{8,256})",
    ),
)

# Addresses in the net ------------------------------------------------------------------------------------

_L = "A-Za-z0-9\u00c0-\u024f"
_NET = (
    _by_pattern(
        Kind.EMAIL, rf"[{_L}._%+'-]{{1,64}}@(?:[{_L}-]{{1,63}}\.){{1,8}}[A-Za-z\u00c0-\u024f]{{2,24}}"
    ),
    _by_pattern(  # name (at) example [dot] org
        Kind.EMAIL,
        rf"[{_L}._%+-]{{1,64}} ?[\[(] ?at ?[\])] ?(?:[{_L}-]{{1,63}} ?(?:\.|[\[(] ?dot ?[\])]) ?){{1,4}}[A-Za-z]{{2,24}}",
        flags=re.I,
    ),
    _by_pattern(Kind.IP_ADDRESS, r"(?<![\w.])(?:\d{1,3}\.){3}\d{1,3}(?!\.?\d)", check=checks.ip),
    _by_pattern(
        Kind.IP_ADDRESS,
        r"(?<![\w:.])[0-9A-Fa-f:]{2,39}(?:\d\.\d{1,3}\.\d{1,3}\.\d{1,3})?(?![\w:])",
        # Without a digit it is more likely a name in a program: `a::b` is an address, too.
        check=lambda s: s.count(":") > 1 and any(c.isdigit() for c in s) and checks.ip(s),
    ),
    _by_pattern(Kind.MAC_ADDRESS, r"(?<![\w:-])(?:[0-9A-Fa-f]{2}[:-]){5}[0-9A-Fa-f]{2}(?![\w:-])"),
)

# Numbers of people and accounts --------------------------------------------------------------------------

_IBAN_START = re.compile(r"(?<![A-Za-z0-9])([A-Za-z]{2})\d{2}")
_DIGIT_GROUPS = re.compile(r"(?<![\w.])\d{1,19}(?:[ -]\d{1,19}){0,40}", re.ASCII)
_GROUP = re.compile(r"\d+", re.ASCII)


def _ibans(text: str) -> Iterator[Span]:
    """From each beginning, as many letters and digits as its country's IBANs have, spaces aside."""
    for match in _IBAN_START.finditer(text):
        length = checks.IBAN_LENGTHS.get(match.group(1).upper(), 0)
        end, found = match.start(), ""
        while len(found) < length and end < len(text):
            if text[end].isascii() and text[end].isalnum():
                found += text[end]
            elif text[end] not in " -" or not text[end - 1].isalnum():
                break
            end += 1
        if len(found) == length and length and checks.iban(found):
            yield match.start(), end


def _cards(text: str) -> Iterator[Span]:
    """Runs of whole digit groups, 13 to 19 digits together, that have a card's check digit.

    Groups are tried from each on, since a date or a code often follows the number.
    """
    for run in _DIGIT_GROUPS.finditer(text):
        groups = [(m.start() + run.start(), m.end() + run.start()) for m in _GROUP.finditer(run.group())]
        for first in range(len(groups)):
            digits = ""
            for start, end in groups[first : first + 7]:
                digits += text[start:end]
                if len(digits) > 19:
                    break
                if len(digits) >= 13 and checks.card(digits):
                    yield groups[first][0], end
                    break


_CUE = r"(?:[ \t]{0,2}(?:no\.?|nr\.?|number|code|id|号码|号))?[ \t]{0,2}(?:is|was|[:#=]|是|为)?[ \t]{0,2}"
_SAID = r"(?P<it>(?=[A-Z]{0,3}\d)[A-Z0-9]{6,12})(?![A-Za-z0-9])"

_NUMBERS = (
    Rule(Kind.IBAN, _ibans),
    _by_pattern(Kind.CN_ID, r"(?<![A-Za-z0-9])\d{17}[\dXx](?![A-Za-z0-9])", check=checks.cn_id),
    Rule(Kind.CREDIT_CARD, _cards),
    _by_pattern(
        Kind.US_SSN,
        r"(?<![\w-])(?!000|666|9)\d{3}(?P<sep>[ -])(?!00)\d{2}(?P=sep)(?!0000)\d{4}(?![\w-])",
    ),
    _by_pattern(
        Kind.US_SSN, rf"\b(?:SSN|social security){_CUE}(?P<it>(?!000|666|9)\d{{9}})(?!\d)", flags=re.I
    ),
    _by_pattern(Kind.PASSPORT, rf"(?:passport|护照){_CUE}{_SAID}", flags=re.I),
    _by_pattern(
        Kind.PASSPORT, r"P[A-Z<][A-Z]{3}[A-Z<]{39}\s{0,2}[A-Z0-9<]{44}"
    ),  # its machine-readable lines
    _by_pattern(
        Kind.ID_NUMBER,
        rf"(?:driv(?:er'?s|ing) licen[cs]e|national (?:id|insurance)|identity card|id card|tax id|身份证|驾驶证){_CUE}{_SAID}",
        flags=re.I,
    ),
    _by_pattern(  # United Kingdom, national insurance
        Kind.ID_NUMBER, r"(?<![A-Za-z0-9])[A-CEGHJ-PR-TW-Z]{2} ?\d\d ?\d\d ?\d\d ?[A-D](?![A-Za-z0-9])"
    ),
)

# Telephones ----------------------------------------------------------------------------------------------


def _digits(text: str) -> int:
    return sum(c.isdigit() for c in text)


_PHONES = (
    _by_pattern(Kind.PHONE, r"(?<![\w+])(?:\+|00)[1-9](?:[ .()/-]{0,2}\d){6,14}(?!\d)"),
    _by_pattern(  # North America
        Kind.PHONE,
        r"(?<![\w.-])(?:1[ .-]?)?(?:\([2-9]\d\d\) ?|[2-9]\d\d[ .-])[2-9]\d\d[ .-]\d{4}(?!\d)",
    ),
    _by_pattern(Kind.PHONE, r"(?<![A-Za-z0-9.])1[3-9]\d(?:[ -]?\d{4}){2}(?!\d)"),  # Chinese mobile
    _by_pattern(  # elsewhere, with the trunk prefix: 020 7946 0958, 06 12 34 56 78, 0171/1234567
        Kind.PHONE,
        r"(?<![\w./-])\(?0\d{1,4}\)?(?:[ ./-]\d{2,8}){1,4}(?!\d)",
        check=lambda s: 9 <= _digits(s) <= 12,
    ),
    _by_pattern(Kind.PHONE, r"(?<![\w.])07\d{9}(?!\d)"),  # British mobile
    _by_pattern(
        Kind.PHONE,
        r"(?:\b(?:phone|tel|telephone|mobile|cell|fax|whatsapp|call(?: me)?(?: at| on)?)\b|电话|手机|传真|微信)"
        r"(?: ?number| ?no\.?|号码?)?[ \t]{0,2}(?:is|[:=]|是|为)?[ \t]{0,2}(?P<it>\d(?:[ .()/-]{0,2}\d){5,13})(?!\d)",
        flags=re.I,
    ),
)

# Streets -------------------------------------------------------------------------------------------------

_STREET = (
    "Street|St|Avenue|Ave|Road|Rd|Boulevard|Blvd|Lane|Ln|Drive|Dr|Court|Ct|Square|Sq|Place|Pl|Way|Terrace|"
    "Highway|Hwy|Close|Crescent|Parkway|Pkwy|Gardens|Grove|Mews"
)
_WORD = "[A-Z\u00c0-\u00de][a-z\u00df-\u00ff'-]"
_CN_CORE = re.compile(
    r"(?:路|街|大道|巷|弄|胡同|里|新村|小区|花园|苑) ?\d{1,5} ?(?:号院|号楼|号|弄|栋|幢|座)"
    r"(?: ?[0-9A-Z]{1,5} ?(?:号楼|号|栋|幢|座|单元|层|楼|室)){0,5}(?: ?\d{3,4}(?!\d))?"
)
_CN_LEAD = re.compile(r"[\u4e00-\u9fff0-9]{0,24}\Z")
_CN_CUE = re.compile(r".*(?:住在|家住|住址是?|地址是?|位于|寄到|寄往|送到|送往|搬到|来到|去|在|是|为|到)")


def _chinese_addresses(text: str) -> Iterator[Span]:
    """A street with its number, and the province, city and district written before it."""
    for match in _CN_CORE.finditer(text):
        lead = _CN_LEAD.search(text, max(0, match.start() - 24), match.start())
        start = lead.start() if lead else match.start()
        cue = _CN_CUE.match(text, start, match.start())
        yield (cue.end() if cue else start), match.end()


_PLACES = (
    _by_pattern(  # 12b Old Mill Road, Apt 4, Springfield, IL 62704
        Kind.ADDRESS,
        rf"(?<![\w.])\d{{1,6}}[A-Za-z]? (?:(?:[A-Z][A-Za-z'-]{{1,20}}|\d{{1,3}}(?:st|nd|rd|th)|[NSEW]\.?) ){{1,4}}"
        rf"(?:{_STREET})\b\.?(?:,? (?:Apt|Apartment|Suite|Unit|Flat|#)\.? ?[A-Za-z0-9]{{1,6}})?"
        r"(?:, [A-Z][A-Za-z '-]{1,30})?(?:,? [A-Z]{2} \d{5}(?:-\d{4})?|,? [A-Z]{1,2}\d[A-Z0-9]? \d[A-Z]{2}\b)?",
    ),
    _by_pattern(  # Lange Straße 5, Goethestr. 12a, 10115 Berlin
        Kind.ADDRESS,
        rf"(?<!\w){_WORD}{{1,25}}(?:(?<=stra[sß]e)|(?<=strasse)|(?<=weg)|(?<=platz)|(?<=allee)|(?<=gasse)|"
        rf"(?<=str)\.| (?:Straße|Strasse|Weg|Platz|Allee|Gasse)) \d{{1,4}}[a-z]?(?!\w)"
        rf"(?:,? \d{{5}} {_WORD}{{2,25}})?",
    ),
    _by_pattern(  # 12 bis, rue de la Paix
        Kind.ADDRESS,
        r"(?<![\w.])\d{1,4}(?: bis| ter)?,? (?:rue|avenue|boulevard|place|chemin|impasse|allée|quai)"
        rf" (?:d[eu]s? |de la |la |le |l'|d'){{0,2}}[{_L}'-]{{2,25}}(?: [A-ZÀ-Þ][{_L}'-]{{1,25}}){{0,3}}"
        rf"(?:,? \d{{5}} [A-ZÀ-Þ][{_L}-]{{1,25}})?",
    ),
    _by_pattern(Kind.ADDRESS, r"\bP\.? ?O\.? Box \d{1,7}\b", flags=re.I),
    Rule(Kind.ADDRESS, _chinese_addresses),
)

RULES: tuple[Rule, ...] = (*_URLS, *_SECRETS, *_NET, *_NUMBERS, *_PHONES, *_PLACES)
"""All rules; where two overlap, the earlier one names the kind."""
