"""Writing, comparing and digesting, over constitutions that nobody would think of."""

import string
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from charter.constitution import Constitution, CritiqueExample, Phase, PreferenceExample, Principle
from charter.constitution.diff import compare
from charter.constitution.dump import dumps, record
from charter.constitution.loader import check_text, from_record, load
from charter.constitution.model import Conversation
from charter.lm.base import ChatMessage, Role

texts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(lambda s: s.strip())
slugs = st.text(string.ascii_lowercase + string.digits, min_size=1, max_size=8)


@st.composite
def principles(draw: st.DrawFn) -> Principle:
    phases = draw(st.sets(st.sampled_from(Phase), min_size=1))
    critique, prefer = Phase.CRITIQUE in phases, Phase.PREFERENCE in phases
    return Principle(
        id=draw(slugs),
        title=draw(texts),
        rationale=draw(texts),
        category=draw(slugs),
        priority=draw(st.integers(1, 1000)),
        weight=draw(st.floats(0.001, 1000)),
        phases=frozenset(phases),
        critique_request=draw(texts) if critique else "",
        revision_request=draw(texts) if critique else "",
        preference_question=draw(texts) if prefer else "",
    )


def conversations() -> st.SearchStrategy[Conversation]:
    return st.lists(texts, min_size=1, max_size=3).map(lambda t: tuple(ChatMessage(Role.USER, s) for s in t))


constitutions = st.builds(
    Constitution,
    name=slugs,
    version=slugs,
    language=st.sampled_from(["en", "zh", "pt-BR"]),
    description=texts,
    principles=st.lists(principles(), min_size=1, max_size=3, unique_by=lambda p: p.id).map(tuple),
    critique_examples=st.lists(
        st.builds(CritiqueExample, conversations(), texts, texts, texts, texts, texts), max_size=2
    ).map(tuple),
    preference_examples=st.lists(
        st.builds(PreferenceExample, conversations(), texts, texts, texts, texts, st.sampled_from("AB")),
        max_size=2,
    ).map(tuple),
).map(lambda c: from_record(record(c)))  # as the loader normalises it
valid = constitutions.filter(lambda c: all(t for p in c.principles for t in (p.title, p.rationale)))


@settings(deadline=None, max_examples=60)
@given(valid)
def test_what_is_written_loads_to_the_same_constitution(constitution: Constitution) -> None:
    report = check_text("c.yaml", dumps(constitution))
    assert report.problems == ()
    assert report.constitution == constitution
    assert report.constitution.digest == constitution.digest


@settings(deadline=None, max_examples=60)
@given(valid, valid)
def test_a_difference_is_shown_exactly_when_the_digests_differ(a: Constitution, b: Constitution) -> None:
    assert compare(a, a) == ()
    assert bool(compare(a, b)) == (a.digest != b.digest)


@settings(deadline=None, max_examples=150)
@given(st.text(max_size=200) | st.text("-:[]{}&*!|>'\"#,\n\t ab", max_size=80))
def test_any_text_gives_problems_and_never_an_exception(text: str) -> None:
    report = check_text("c.yaml", text)
    assert report.problems
    assert all(p.what and p.remedy for p in report.problems)


def test_changes_are_named_by_principle_and_field() -> None:
    old = load("charter")
    first, second, third, *rest = old.principles
    changed = (
        replace(first, weight=2.0),
        replace(second, id="renamed"),
        *rest,
        replace(third, id="new", title="New"),
    )
    new = replace(old, version="2", principles=changed)
    assert [(c.kind.value, c.field, c.before, c.after) for c in compare(old, new)] == [
        ("changed", "version", "1.0.0", "2"),
        ("changed", f"principles.{first.id}.weight", "1.0", "2.0"),
        ("changed", f"principles.{second.id}.id", second.id, "renamed"),
        ("removed", f"principles.{third.id}", third.title, ""),
        ("added", "principles.new", "", "New"),
    ]


def test_a_changed_order_is_a_change_since_principles_are_drawn_by_a_seed() -> None:
    old = load("charter")
    (change,) = compare(old, replace(old, principles=old.principles[::-1]))
    assert change.field == "principles (order)"
