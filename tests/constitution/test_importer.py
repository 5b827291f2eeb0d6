"""Importing the authors' JSON files: every published form, and everything that can be wrong with one."""

# ruff: noqa: E501 - messages and transcripts are quoted whole

import json
from pathlib import Path

import pytest

from charter.constitution.dump import dumps
from charter.constitution.importer import DEFAULT_QUESTION, Imported, import_files
from charter.constitution.loader import check_text
from charter.constitution.model import Phase
from charter.errors import ConstitutionError
from charter.lm.base import ChatMessage, Role

H, A = "\n\nHuman: ", "\n\nAssistant:"

INSTRUCTIONS = {
    "harmful0": {
        "prompt": ["\n\nCritiqueRequest: Say what in the reply is illegal.\n\nCritique:"],
        "edit_request": "\n\nRevisionRequest: Please rewrite the reply within the law. Keep it polite.\n\nRevision:",
    },
    "Kind Ness": {
        "prompt": ["\n\nCritiqueRequest: Say what is unkind."],
        "edit_request": "\n\nRevisionRequest: Rewrite it to be helpful and kind.",
    },
}
QUESTIONS = ["\nPlease choose the kinder reply. Options:", "\nWhich reply is more honest? Options:"]
TRANSCRIPTS = [
    f"{H}Hello{A} Go away.{H}Why?{A} Because.\n\nCritiqueRequest: What is rude?\n\nCritique: All of it.\n\n"
    "RevisionRequest: Be kind.\n\nRevision: Sorry!\nHow can I help?\n\nHuman:",
    f"{H}Hi{A} Bah.\n\nCritiqueRequest: 1?\n\nCritique: One.\n\nRevisionRequest: Do 1.\n\nRevision: Hm.\n\n"
    "CritiqueRequest: 2?\n\nCritique: Two.\n\nRevisionRequest: Do 2.\n\nRevision: Hi!",
]
PAIRS = [
    {"prompt": f"{H}Hello{A}", "corrects": ["Hello!"], "incorrects": ["Bah."]},
    {"prompt": f"{H}Good day{A}", "corrects": ["Good day!"], "incorrects": ["So what."]},
]
REASONED = [
    {
        "prompt": f"{H}Consider the following conversation between a human (H) and an assistant (A):\n\nH: How are you?"
        f"\n\nA:  Fine.\n\nH: Great\n\n{{}}\n (A) [[[So what]]]\n (B) [[[Thank you!\n\nAnd you?]]]{A} Let's think step "
        "by step: B is kinder.\n\nTherefore B.\n\nHuman:\nSo the answer is: (B)"
    }
]


def imported(tmp_path: Path, *contents: object, indent: int | None = None) -> Imported:
    files = [tmp_path / f"{i}.json" for i in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(json.dumps(content, indent=indent))
    return import_files(files)


def unread(result: Imported, tmp_path: Path) -> list[str]:
    return [str(p).replace(f"{tmp_path}/", "") for p in result.unread]


def test_critique_and_revision_requests_become_principles(tmp_path: Path) -> None:
    result = imported(tmp_path, INSTRUCTIONS)
    assert result.unread == ()
    harmful, kind = result.constitution.principles
    assert (harmful.id, kind.id) == ("harmful0", "kind-ness")
    assert harmful.critique_request == "Say what in the reply is illegal."
    assert harmful.revision_request == "Please rewrite the reply within the law. Keep it polite."
    assert harmful.title == "Rewrite the reply within the law."
    assert (harmful.category, kind.category) == ("illegality", "helpfulness")
    assert harmful.phases == {Phase.CRITIQUE}


def test_preference_questions_lose_the_word_options(tmp_path: Path) -> None:
    principles = imported(tmp_path, QUESTIONS).constitution.principles
    assert [p.preference_question for p in principles] == [
        "Please choose the kinder reply.",
        "Which reply is more honest?",
    ]
    assert all(p.phases == {Phase.PREFERENCE} for p in principles)


def test_a_transcript_becomes_a_critique_example_for_each_of_its_rounds(tmp_path: Path) -> None:
    result = imported(tmp_path, QUESTIONS, TRANSCRIPTS)
    long, first, second = result.constitution.critique_examples
    assert [m.role for m in long.conversation] == [Role.USER, Role.ASSISTANT, Role.USER]
    assert (long.answer, long.revision) == ("Because.", "Sorry!\nHow can I help?")
    assert (first.answer, first.revision, second.answer, second.revision) == ("Bah.", "Hm.", "Hm.", "Hi!")
    assert (first.critique_request, second.critique_request) == ("1?", "2?")


def test_pairs_alternate_so_that_no_position_is_favoured(tmp_path: Path) -> None:
    first, second = imported(tmp_path, QUESTIONS, PAIRS).constitution.preference_examples
    assert (first.answer_a, first.answer_b, first.better) == ("Hello!", "Bah.", "A")
    assert (second.answer_a, second.answer_b, second.better) == ("So what.", "Good day!", "B")
    assert first.conversation == (ChatMessage(Role.USER, "Hello"),)
    assert first.question == "Please choose the kinder reply."


def test_examples_without_any_question_get_a_general_one(tmp_path: Path) -> None:
    examples = imported(tmp_path, INSTRUCTIONS, PAIRS).constitution.preference_examples
    assert {e.question for e in examples} == {DEFAULT_QUESTION}


@pytest.mark.parametrize("content", [REASONED, [REASONED[0]["prompt"]]])
def test_a_reasoned_comparison_keeps_its_reasoning(content: list[object], tmp_path: Path) -> None:
    (example,) = imported(tmp_path, QUESTIONS, content).constitution.preference_examples
    assert [m.content for m in example.conversation] == ["How are you?", "Fine.", "Great"]
    assert (example.answer_a, example.answer_b) == ("So what", "Thank you!\n\nAnd you?")
    assert (example.note, example.better) == ("B is kinder.\n\nTherefore B.", "B")


def test_the_written_file_loads_to_the_same_constitution_without_remarks(tmp_path: Path) -> None:
    result = imported(tmp_path, INSTRUCTIONS, QUESTIONS, TRANSCRIPTS, PAIRS, REASONED)
    report = check_text("out.yaml", dumps(result.constitution))
    assert report.constitution == result.constitution
    assert (report.problems, report.remarks) == ((), ())
    assert [sum(c.values()) for c in result.counts.values()] == [2, 2, 2, 2, 1]


def test_what_is_not_understood_is_reported_with_its_line_and_field(tmp_path: Path) -> None:
    instructions = {
        **INSTRUCTIONS,
        "a": {"prompt": [3], "edit_request": "x"},
        "b": 7,
        "c": {"prompt": ["\n\nHuman: hi"], "edit_request": "\n\nRevisionRequest: y", "note": 1},
        "d": INSTRUCTIONS["harmful0"],
    }
    result = imported(tmp_path, instructions, indent=1)
    assert [line.split("; ")[0] for line in unread(result, tmp_path)] == [
        "0.json:16: a.prompt[0]: is not a text",
        "0.json:14: a: has no readable critique request, so no principle was made of it",
        '0.json:20: b: is not an object with "prompt" and "edit_request"',
        "0.json:26: c.note: is a field that is not known here, and was left out",
        '0.json:23: c.prompt[0]: is not one "CritiqueRequest:" and nothing else',
        "0.json:21: c: has no readable critique request, so no principle was made of it",
        "0.json:28: d: asks the same as harmful0",
    ]
    assert len(result.constitution.principles) == 2


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (5, "is neither a text nor an object"),
        ("", "is an empty text"),
        ("Options:", "is an empty text"),
        (QUESTIONS[0], "asks the same as preference-1"),
        ({"corrects": ["x"]}, 'has no text "prompt"'),
        ({"prompt": f"{H}x{A}", "corrects": [], "incorrects": ["y"]}, 'needs at least one text each in "corrects" and '
         '"incorrects"'),
        ({"prompt": f"{H}x{A} y", "corrects": ["x"], "incorrects": ["y"]}, "has no person's turn before the answer"),
        ({"prompt": f"Note{H}x", "corrects": ["x"], "incorrects": ["y"]}, 'begins with "Note" instead of a label such '
         'as "Human:"'),
        (f"{H}x{A} y\n\nCritiqueRequest: a\n\nRevision: b", "goes CritiqueRequest, Revision where CritiqueRequest, "
         "Critique, RevisionRequest, Revision is expected"),
        ("\n\nCritiqueRequest: a\n\nCritique: b", 'has no "CritiqueRequest:" right after an answer of the assistant'),
        (f"{H}x{A} y", "is not a question, the reasoning and the answer"),
        (REASONED[0]["prompt"].replace("(B)", "(C)"), 'does not end with "So the answer is: (A)" or "(B)"'),
        (REASONED[0]["prompt"].replace("\n (B)", " or"), "does not offer the options (A) and (B) once each"),
    ],
)  # fmt: skip
def test_an_odd_entry_is_reported_and_the_others_are_taken(entry: object, said: str, tmp_path: Path) -> None:
    result = imported(tmp_path, [QUESTIONS[0], entry, QUESTIONS[1]], indent=0)
    (line,) = unread(result, tmp_path)
    assert line.startswith("0.json:3: [1]")
    assert f": {said}; " in line
    assert len(result.constitution.principles) == 2


def test_pairs_left_over_are_reported(tmp_path: Path) -> None:
    result = imported(tmp_path, QUESTIONS, [{**PAIRS[0], "corrects": ["a", "b", "c"]}])
    assert "1.json:1: [0].corrects: has 2 more than the other" in unread(result, tmp_path)[0]


def test_a_repeated_key_is_reported(tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    body = json.dumps(INSTRUCTIONS["harmful0"])
    file.write_text(f'{{"a": {body},\n"a": {body}}}')
    assert [str(p) for p in import_files([file]).unread] == [
        f"{file}:2: a: is given twice; the last one counts; delete one of the two"
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[1,\n2,]", ":2: column 3: is not JSON"),
        ("[" * 1000, "nested too deeply"),
        ("{'a': 1}", "is not JSON"),
        ('["a"', "is not JSON"),
        ("", "the file is empty"),
        ("[]", "no principle could be read"),
        ("7", "no principle could be read"),
        (json.dumps(PAIRS), "no principle could be read"),
    ],
)
def test_a_file_without_principles_is_refused(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "f.json"
    file.write_text(text)
    with pytest.raises(ConstitutionError, match=said):
        import_files([file])
