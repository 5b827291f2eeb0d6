"""Loading a constitution: what is accepted, what is refused, and in which words."""

# ruff: noqa: E501 - messages and transcripts are quoted whole

import json
import textwrap
from dataclasses import fields
from pathlib import Path

import pytest

from charter.constitution import (
    Constitution,
    CritiqueExample,
    Phase,
    PreferenceExample,
    Principle,
    check,
    load,
)
from charter.constitution.loader import check_text, schema_path
from charter.errors import ConstitutionError

GOOD = """\
name: small
version: "1"
language: en
description: A small one.
principles:
  - id: be-kind
    title: The answer is kind.
    rationale: Kindness costs nothing.
    category: harm
    priority: 1
    weight: 1.0
    phases: [critique, preference]
    critique_request: Say where the answer is unkind.
    revision_request: Rewrite it kindly.
    preference_question: Which answer is kinder?
"""


def problems_of(text: str) -> list[str]:
    report = check_text("c.yaml", text)
    assert report.constitution is None
    return [str(p) for p in report.problems]


@pytest.mark.parametrize("name", ["charter", "charter.zh"])
def test_shipped_constitutions_load_without_problems_or_remarks(name: str) -> None:
    report = check(name)
    assert (report.problems, report.remarks) == ((), ())
    assert len(report.constitution.serving(Phase.CRITIQUE)) >= 16
    assert len(report.constitution.serving(Phase.PREFERENCE)) >= 16
    categories = {p.category for p in report.constitution.principles}
    wanted = "harm illegality discrimination privacy self-harm deception honesty helpfulness"
    assert categories == set(wanted.split())
    assert report.constitution.critique_examples
    assert {e.better for e in report.constitution.preference_examples} == {"A", "B"}


def test_every_file_in_the_folder_loads() -> None:
    for file in schema_path().parent.glob("*.yaml"):
        assert check(file).problems == ()


def test_worked_examples_ask_in_the_words_of_their_principles() -> None:
    for name in ("charter", "charter.zh"):
        c = load(name)
        requests = {(p.critique_request, p.revision_request) for p in c.principles}
        questions = {p.preference_question for p in c.principles}
        assert {(e.critique_request, e.revision_request) for e in c.critique_examples} <= requests
        assert {e.question for e in c.preference_examples} <= questions


def test_the_schema_names_exactly_the_fields_of_the_records() -> None:
    schema = json.loads(schema_path().read_text())
    records = {
        "principle": Principle,
        "critique_example": CritiqueExample,
        "preference_example": PreferenceExample,
    }
    for definition, record in records.items():
        assert list(schema["$defs"][definition]["properties"]) == [f.name for f in fields(record)]
    assert list(schema["properties"]) == [f.name for f in fields(Constitution)]


# The digest ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "other",
    [
        GOOD.replace("title: The answer is kind.", "title: >\n      The answer\n      is kind."),
        GOOD.replace("title: The answer is kind.", 'title: "The answer  is kind. "'),
        GOOD.replace("[critique, preference]", "\n      - preference\n      - critique"),
        GOOD.replace("weight: 1.0", "weight: 1   # as all the others"),
        GOOD.replace("\n", "\r\n"),
        "\ufeff" + GOOD,
        "# a comment\n" + "\n".join(reversed(GOOD.split("principles:", maxsplit=1)[0].splitlines()))
        + "\nprinciples:" + GOOD.split("principles:", maxsplit=1)[1],
        json.dumps(
            {
                "principles": [
                    {
                        "preference_question": "Which answer is kinder?", "revision_request": "Rewrite it kindly.",
                        "critique_request": "Say where the answer is unkind.", "phases": ["preference", "critique"],
                        "weight": 1, "priority": 1, "category": "harm", "rationale": "Kindness costs nothing.",
                        "title": "The answer is kind.", "id": "be-kind",
                    }
                ],
                "description": "A small one.", "language": "en", "version": "1", "name": "small",
            }
        ),
    ],
)  # fmt: skip
def test_formatting_does_not_change_the_digest(other: str, tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(other.encode())
    assert load(file).digest == check_text("c.yaml", GOOD).constitution.digest


def test_rewrapping_chinese_does_not_change_the_digest() -> None:
    one = GOOD.replace("Which answer is kinder?", "哪个回答更友善，更体贴？")
    wrapped = GOOD.replace("Which answer is kinder?", ">\n      哪个回答\n      更友善，\n      更体贴？")
    assert check_text("a", one).constitution.digest == check_text("b", wrapped).constitution.digest


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("is kind.", "is very kind."),
        ("weight: 1.0", "weight: 2"),
        ("priority: 1", "priority: 2"),
        ("[critique, preference]", "[critique]"),
        ('version: "1"', 'version: "2"'),
    ],
)
def test_meaning_changes_the_digest(old: str, new: str) -> None:
    changed = check_text("c.yaml", GOOD.replace(old, new)).constitution
    assert changed.digest != check_text("c.yaml", GOOD).constitution.digest


# What is wrong, where, and what to do --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("rationale:", "rational:", "c.yaml:8: principles[0].rational: is not a known field; write instead rationale"),
        ('version: "1"', "version: 1.0", 'c.yaml:2: version: is 1.0, and must be a text; write instead "1.0", in quotes'),
        ("weight: 1.0", "weight: -1", "c.yaml:11: principles[0].weight: is -1, which is out of range; "
         "write instead a number above 0 and at most 1000, such as `1.0`"),
        ("weight: 1.0", "weight: .nan", "c.yaml:11: principles[0].weight: is not a number; write instead 1.0"),
        ("weight: 1.0", "weight: .inf", "c.yaml:11: principles[0].weight: is inf, which is out of range; "
         "write instead a number above 0 and at most 1000, such as `1.0`"),
        ("weight: 1.0", "weight: heavy", 'c.yaml:11: principles[0].weight: is "heavy", and must be a number; '
         "write instead a number, such as `1.0`"),
        ("weight: 1.0", 'weight: "1.0"', 'c.yaml:11: principles[0].weight: is "1.0", and must be a number; '
         "write instead 1.0, without quotes"),
        ("priority: 1", "priority: true", "c.yaml:10: principles[0].priority: is true, and must be a whole number; "
         "write instead a whole number, such as `1`"),
        ("[critique, preference]", "[critique, preferences]", 'c.yaml:12: principles[0].phases[1]: is "preferences", '
         "which is none of critique, preference; write instead preference"),
        ("[critique, preference]", "critique", 'c.yaml:12: principles[0].phases: is "critique", and must be a list; '
         "write instead [critique]"),
        ("[critique, preference]", "[]", "c.yaml:12: principles[0].phases: is an empty list; "
         "write at least one entry, such as `[critique, preference]`"),
        ("id: be-kind", "id: Be Kind!", 'c.yaml:6: principles[0].id: is "Be Kind!"; '
         "write instead lower-case words joined by hyphens, such as be-kind"),
        ("    revision_request: Rewrite it kindly.\n", "", "c.yaml:6: principles[0]: revision_request is missing, and "
         "the principle serves the phase critique; add a line such as "
         "`revision_request: Rewrite the answer so that it keeps this rule.`"),
        ("    preference_question: Which answer is kinder?\n", "", "c.yaml:6: principles[0]: preference_question is "
         "missing, and the principle serves the phase preference; add a line such as "
         "`preference_question: Which answer keeps this rule better?`"),
        ("title: The answer is kind.", "title: '  '", "c.yaml:7: principles[0].title: is empty; "
         "write the text, such as `The answer does not help anyone to hurt others.`"),
        ("title: The answer is kind.", "title:", "c.yaml:7: principles[0].title: has no value; "
         "write a text, such as `The answer does not help anyone to hurt others.`"),
        ("category: harm", "category: harm\n    category: privacy", "c.yaml:10: principles[0].category: is given twice, "
         "here and in line 9; delete one of the two"),
        ("category: harm", "category: !!python/name:os.system x", "c.yaml:9: principles[0].category: has the tag "
         "tag:yaml.org,2002:python/name:os.system; delete the tag"),
        ("category: harm", "\tcategory: harm", "c.yaml:9: is indented with a tab; write instead two spaces for each level"),
        ("rationale: Kindness", "rationale: Note: kindness", "c.yaml:8: is not YAML (mapping values are not allowed "
         'here); put a text that has ": " in it in quotes, and check the indentation'),
        ("language: en", "language: en\n---", "c.yaml:4: is not YAML (expected a single document in the stream; but found "
         "another document); delete the line `---`: one file holds one constitution"),
        ("A small one.", "A \x07 small one.", "c.yaml:4: has a control character; delete it"),
    ],
)  # fmt: skip
def test_a_mistake_is_shown_with_line_field_and_remedy(old: str, new: str, expected: str) -> None:
    assert old in GOOD
    assert problems_of(GOOD.replace(old, new)) == [expected]


def test_all_problems_come_at_once_in_the_order_of_their_lines() -> None:
    second = GOOD.split("principles:\n")[1].replace("weight: 1.0", "weight: 0")
    text = GOOD.replace("language: en", "language: 7").replace("priority: 1", "priority: 0") + second
    found = problems_of(text)
    assert [p.split(": ")[:2] for p in found] == [
        ["c.yaml:3", "language"],
        ["c.yaml:10", "principles[0].priority"],
        ["c.yaml:16", "principles[1].id"],
        ["c.yaml:21", "principles[1].weight"],
    ]
    assert '"be-kind" is also the id in line 6' in found[2]


def test_load_raises_all_problems_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(GOOD.replace("weight: 1.0", "weight: 0").replace("language: en", "language: 7"))
    with pytest.raises(ConstitutionError) as raised:
        load(file)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2
    assert all(line.startswith(f"{file}:") for line in lines)


def test_an_example_must_end_with_the_users_turn() -> None:
    example = textwrap.dedent("""
        preference_examples:
          - conversation:
              - {role: user, content: Hello}
              - {role: assistant, content: Hello}
              - {role: system, content: Be kind}
            answer_a: x
            answer_b: y
            question: Which is kinder?
            better: C
    """)
    found = problems_of(GOOD + example)
    assert [p.split(";")[0] for p in found] == [
        "c.yaml:21: preference_examples[0].conversation[2]: the last turn is the system's",
        "c.yaml:21: preference_examples[0].conversation[2]: a system turn stands after another turn",
        'c.yaml:25: preference_examples[0].better: is "C", which is none of A, B',
    ]


def test_remarks_name_what_is_allowed_and_seldom_meant() -> None:
    text = GOOD.replace("[critique, preference]", "[preference]").replace("kinder?", "kinder, (A) or (B)?")
    remarks = [str(r) for r in check_text("c.yaml", text).remarks]
    assert [r.split(": ")[1] for r in remarks] == [
        "principles[0].critique_request",
        "principles[0].revision_request",
        "principles[0].preference_question",
    ]


# Hostile and broken files --------------------------------------------------------------------------------


def test_an_alias_bomb_is_refused_without_being_expanded() -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 60)
    )
    found = problems_of(bomb)
    assert "through an alias; write the text out, without & and *" in "\n".join(found)


@pytest.mark.parametrize("nest", ["[" * 5000, "- " * 5000, "{a: " * 5000, "[" * 45 + "]" * 45])
def test_a_deeply_nested_file_is_refused(nest: str) -> None:
    assert problems_of(nest) == ["c.yaml: is nested too deeply to be a constitution; flatten it"]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "the file is empty"),
        (b" \n\n", "the file is empty"),
        (b"# nothing\n", "holds only comments"),
        (b"just a sentence", "where fields are expected"),
        (b"- a\n- b\n", "where fields are expected"),
        (b"name: a\nversion: \xff\n", ":2: byte 0xff is not UTF-8; save the file as UTF-8"),
        ("name: x".encode("utf-16"), "is UTF-16; save it as UTF-8"),
        (b"x" * (1 << 20) + b"x", "has 1,048,577 bytes"),
    ],
)
def test_a_file_that_is_no_constitution_is_refused_in_a_sentence(
    data: bytes, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "c.yaml"
    file.write_bytes(data)
    with pytest.raises(ConstitutionError, match=said.replace("(", r"\(")):
        load(file)


def test_an_endless_file_is_not_read_to_its_end() -> None:
    with pytest.raises(ConstitutionError, match="is this the right file"):
        load("/dev/zero")


def test_a_folder_and_an_absent_file_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConstitutionError, match="is a folder"):
        load(tmp_path)
    with pytest.raises(ConstitutionError, match="cannot be read"):
        load(tmp_path / "absent.yaml")


# Names ---------------------------------------------------------------------------------------------------


def test_a_bare_name_is_looked_for_in_the_users_folder_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "charter.yaml").write_text(GOOD)
    monkeypatch.setenv("CHARTER_CONSTITUTIONS", str(tmp_path))
    assert load("charter").name == "small"
    assert load("charter.zh").name == "charter-zh"


def test_shipped_constitutions_are_found_from_any_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load("charter").name == "charter"


def test_an_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ConstitutionError, match=r"no constitution is called chartre.*charter, charter.zh"):
        load("chartre")
