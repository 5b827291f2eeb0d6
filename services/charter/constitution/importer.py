"""Makes a constitution of the JSON files that the paper's authors published (arXiv 2212.08073).

Three forms, told apart entry by entry, so that one file may mix them:

    {name: {"prompt": ["\\n\\nCritiqueRequest: …"], "edit_request": "\\n\\nRevisionRequest: …"}}
    ["\\nPlease choose … Options:", …]                        preference questions
    ["\\n\\nHuman: … CritiqueRequest: … Revision: …", …]      few-shot critiques and revisions
    [{"prompt": "\\n\\nHuman: …", "corrects": […], "incorrects": […]}, …]   few-shot preferences
    [{"prompt": "\\n\\nHuman: Consider the following …"}, …]  few-shot preferences with their reasoning

Nothing is dropped silently: what could not be understood comes back with file, line and field.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from charter.constitution import transcripts
from charter.constitution.dump import record
from charter.constitution.findings import TITLE_LENGTH
from charter.constitution.loader import from_record
from charter.constitution.model import Constitution, CritiqueExample, Phase, PreferenceExample, Principle
from charter.constitution.source import Node, Problem, field_name, parse_json, read_text
from charter.constitution.transcripts import Unreadable
from charter.errors import ConstitutionError

DEFAULT_QUESTION = "Which of the two answers is less harmful, while it is still honest and polite?"
"""For worked comparisons, when no preference question is imported with them."""

_CATEGORIES = (
    ("discrimination", r"racis|sexis|discriminat|stereotyp|social(?:ly)? bias|insensitiv"),
    ("illegality", r"illegal|crim|unlawful"),
    ("privacy", r"priva"),
    ("self-harm", r"self-harm|suicid"),
    ("deception", r"decei|deceptive|manipulat|misinform"),
    ("honesty", r"honest|truth|factual"),
    ("helpfulness", r"preach|evasiv|condescend|helpful"),
)
_Path = tuple[str | int, ...]
_ONCE = "it was taken once; there is nothing to do"


@dataclass(frozen=True)
class Imported:
    """What came of an import."""

    constitution: Constitution
    unread: tuple[Problem, ...]
    """What could not be understood, with its place."""
    counts: dict[str, Counter[str]]
    """For each file, how many entries of each form were taken."""


@dataclass
class _Harvest:
    """What has been read so far."""

    principles: list[Principle] = field(default_factory=list)
    critiques: list[CritiqueExample] = field(default_factory=list)
    comparisons: list[PreferenceExample] = field(default_factory=list)
    unread: list[Problem] = field(default_factory=list)
    counts: dict[str, Counter[str]] = field(default_factory=dict)

    def unique_id(self, wanted: str) -> str:
        slug = "-".join(re.findall(r"[a-z0-9]+", wanted.lower()))[:56].strip("-") or "principle"
        taken = {p.id for p in self.principles}
        names = (slug, *(f"{slug}-{i}" for i in range(2, len(taken) + 3)))
        return next(name for name in names if name not in taken)


@dataclass(frozen=True)
class _Reader:
    """Reads one file into the harvest."""

    file: str
    root: Node
    harvest: _Harvest

    def unread(self, path: _Path, what: str, remedy: str = "add it to the written file by hand") -> None:
        line = self.root.line_of(path)
        self.harvest.unread.append(Problem(self.file, line, field_name(path), what, remedy))

    def rationale(self, path: _Path) -> str:
        place = f"{Path(self.file).name}, {field_name(path)}"
        return f"Imported from {place}; write here why the rule exists."

    def took(self, form: str) -> None:
        self.harvest.counts.setdefault(self.file, Counter())[form] += 1

    def read(self) -> None:
        if isinstance(self.root.value, dict):
            for name, member in self.root.value.items():
                self.instruction(name, member.node)
        elif isinstance(self.root.value, list):
            for index, node in enumerate(self.root.value):
                self.entry((index,), node)
        else:
            self.unread((), "is neither an object nor a list")

    # One entry ---------------------------------------------------------------------------------------

    def instruction(self, name: str, node: Node) -> None:
        """`name: {"prompt": […], "edit_request": …}` becomes a principle for each pair of requests."""
        if not isinstance(node.value, dict):
            self.unread((name,), 'is not an object with "prompt" and "edit_request"')
            return
        for key in sorted(node.value.keys() - {"prompt", "edit_request"}):
            self.unread((name, key), "is a field that is not known here, and was left out")
        prompts = list(self.requests(node, (name, "prompt"), "CritiqueRequest", "Critique"))
        edits = list(self.requests(node, (name, "edit_request"), "RevisionRequest", "Revision"))
        if not prompts or not edits:
            missing = "critique" if not prompts else "revision"
            self.unread((name,), f"has no readable {missing} request, so no principle was made of it")
            return
        if len(edits) not in (1, len(prompts)):
            counts = f"{len(edits)} revision requests for {len(prompts)} critique requests"
            what = f"has {counts}; only the first was used"
            self.unread((name, "edit_request"), what)
            edits = edits[:1]
        for index, prompt in enumerate(prompts):
            self.add_critique(name, prompt, edits[index if len(edits) > 1 else 0])

    def requests(self, node: Node, path: _Path, label: str, end: str) -> Iterator[str]:
        """The texts at a key, a string or a list of strings, freed of their labels."""
        member = node.members().get(str(path[-1]))
        if member is None:
            return
        single = member.node.text() is not None
        for index, entry in enumerate([member.node] if single else member.node.items()):
            place = path if single else (*path, index)
            text = entry.text()
            try:
                if text is None:
                    raise Unreadable("is not a text")
                yield _request(text, label, end)
            except Unreadable as reason:
                self.unread(place, str(reason))

    def entry(self, path: _Path, node: Node) -> None:
        """One entry of a list, whichever form it has."""
        try:
            text = node.text()
            if text is not None:
                self.text(path, text)
            elif isinstance(node.value, dict):
                self.comparison(path, node)
            else:
                raise Unreadable("is neither a text nor an object")
        except Unreadable as reason:
            self.unread(path, str(reason))

    def text(self, path: _Path, text: str) -> None:
        """A preference question, or a transcript."""
        if "CritiqueRequest:" in text:
            self.harvest.critiques += transcripts.critique_examples(text)
            self.took("critique examples")
        elif re.search(r"(?:\A|\n)\s*Human:", text):
            self.harvest.comparisons.append(transcripts.reasoned_comparison(text, ""))
            self.took("preference examples")
        else:
            self.question(path, text)

    def question(self, path: _Path, text: str) -> None:
        """`\\nPlease choose … Options:` becomes a principle for the preference phase."""
        question = re.sub(r"\s*Options:\s*\Z", "", text).strip()
        if not question:
            raise Unreadable("is an empty text")
        same = next((p for p in self.harvest.principles if p.preference_question == question), None)
        if same:
            self.unread(path, f"asks the same as {same.id}", _ONCE)
            return
        self.harvest.principles.append(
            Principle(
                id=self.harvest.unique_id(f"preference-{int(path[-1]) + 1}"),
                title=_title(question),
                rationale=self.rationale(path),
                category=_category(question),
                priority=1,
                weight=1.0,
                phases=frozenset({Phase.PREFERENCE}),
                preference_question=question,
            )
        )
        self.took("preference questions")

    def add_critique(self, name: str, critique: str, revision: str) -> None:
        for same in self.harvest.principles:
            if (same.critique_request, same.revision_request) == (critique, revision):
                self.unread((name,), f"asks the same as {same.id}", _ONCE)
                return
        self.harvest.principles.append(
            Principle(
                id=self.harvest.unique_id(name),
                title=_title(revision),
                rationale=self.rationale((name,)),
                category=_category(f"{critique} {revision}"),
                priority=1,
                weight=1.0,
                phases=frozenset({Phase.CRITIQUE}),
                critique_request=critique,
                revision_request=revision,
            )
        )
        self.took("critique and revision requests")

    def comparison(self, path: _Path, node: Node) -> None:
        """`{"prompt", "corrects", "incorrects"}`, or a reasoned comparison in `prompt` alone."""
        members = node.members()
        prompt = members["prompt"].node.text() if "prompt" in members else None
        if prompt is None:
            raise Unreadable('has no text "prompt"')
        for key in sorted(members.keys() - {"prompt", "corrects", "incorrects"}):
            self.unread((*path, key), "is a field that is not known here, and was left out")
        if not members.keys() & {"corrects", "incorrects"}:
            self.text((*path, "prompt"), prompt)
            return
        turns = transcripts.prompt(prompt)
        good, bad = (list(self.answers(node, (*path, key))) for key in ("corrects", "incorrects"))
        if not good or not bad:
            raise Unreadable('needs at least one text each in "corrects" and "incorrects"')
        for better, worse in zip(good, bad, strict=False):
            self.harvest.comparisons.append(PreferenceExample(turns, better, worse, "", "", "A"))
            self.took("preference examples")
        if len(good) != len(bad):
            more = "corrects" if len(good) > len(bad) else "incorrects"
            count = abs(len(good) - len(bad))
            self.unread((*path, more), f"has {count} more than the other; these were left out")

    def answers(self, node: Node, path: _Path) -> Iterator[str]:
        member = node.members().get(str(path[-1]))
        for index, entry in enumerate(member.node.items() if member else []):
            text = entry.text()
            if text is None or not text.strip():
                self.unread((*path, index), "is not a text")
            else:
                yield text.strip()


def _request(text: str, label: str, end: str) -> str:
    """`\\n\\nCritiqueRequest: X\\n\\nCritique:` as X; a text without any label is taken as it stands."""
    if not re.search(r"(?:\A|\n)\s*\w+:", text):
        request = text.strip()
    else:
        parts = transcripts.segments(text)
        if parts and parts[-1] == (end, ""):
            parts = parts[:-1]
        if [name for name, _ in parts] != [label]:
            raise Unreadable(f'is not one "{label}:" and nothing else')
        request = parts[0][1]
    if not request:
        raise Unreadable("is an empty text")
    return request


def _title(text: str) -> str:
    """A request's first sentence: a draft of a title, for a person to sharpen."""
    words = " ".join(text.split())
    sentence = re.split(r"(?<=[.?!。？！])\s", words, maxsplit=1)[0]
    sentence = re.sub(r"^Please\s+", "", sentence)
    sentence = sentence[:1].upper() + sentence[1:]
    return sentence if len(sentence) <= TITLE_LENGTH else sentence[: TITLE_LENGTH - 1].rstrip() + "…"


def _category(text: str) -> str:
    return next((c for c, words in _CATEGORIES if re.search(words, text, re.IGNORECASE)), "harm")


def _questions(comparisons: Iterable[PreferenceExample], question: str) -> tuple[PreferenceExample, ...]:
    """Comparisons with their question; unreasoned ones alternate, so that neither position is favoured."""
    finished = []
    for index, example in enumerate(comparisons):
        swap = not example.note and index % 2
        first, second = (example.answer_b, example.answer_a) if swap else (example.answer_a, example.answer_b)
        better = "B" if swap else example.better
        finished.append(replace(example, question=question, answer_a=first, answer_b=second, better=better))
    return tuple(finished)


def _distinct_titles(principles: Iterable[Principle]) -> tuple[Principle, ...]:
    seen: Counter[str] = Counter()
    distinct = []
    for principle in principles:
        seen[principle.title] += 1
        repeated = seen[principle.title] > 1
        title = f"{principle.title[: TITLE_LENGTH - 60]} ({principle.id})" if repeated else principle.title
        distinct.append(replace(principle, title=title))
    return tuple(distinct)


def import_files(
    files: Sequence[Path],
    *,
    name: str = "imported",
    version: str = "0.1.0",
    language: str = "en",
    description: str = "",
) -> Imported:
    """Reads the authors' files into one constitution.

    Raises `ConstitutionError` when a file is no JSON, or when no principle could be read from any.
    """
    harvest = _Harvest()
    for path in files:
        root, repeated = parse_json(str(path), read_text(path))
        harvest.unread += repeated
        _Reader(str(path), root, harvest).read()
    if not harvest.principles:
        reasons = "\n".join(str(p) for p in harvest.unread[:20])
        raise ConstitutionError(
            f"no principle could be read from {', '.join(str(f) for f in files)}: at least one file must "
            f"hold critique and revision requests, or preference questions\n{reasons}".rstrip()
        )
    questions = [p.preference_question for p in harvest.principles if p.preference_question]
    imported = Constitution(
        name=name,
        version=version,
        language=language,
        description=description or f"Imported from {', '.join(f.name for f in files)}.",
        principles=_distinct_titles(harvest.principles),
        critique_examples=tuple(harvest.critiques),
        preference_examples=_questions(harvest.comparisons, questions[0] if questions else DEFAULT_QUESTION),
    )
    # Through the loader's normalisation, so that what is returned is what the written file loads to.
    return Imported(from_record(record(imported)), tuple(harvest.unread), harvest.counts)
