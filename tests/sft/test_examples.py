"""What the model is trained on: ids that it reads and writes itself, with loss on answers alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.tiny import CONTEXT_LENGTH, make_tiny_model

from charter.finetune.checkpoints import Vocabulary, load_vocabulary
from charter.finetune.tokens import IGNORED, tokenise
from charter.lm.base import ChatMessage, Conversation, Role
from charter.sft.examples import mix

CONVERSATION: Conversation = (
    ChatMessage(Role.SYSTEM, "Be brief."),
    ChatMessage(Role.USER, "How do I open the door?"),
    ChatMessage(Role.ASSISTANT, "First find the key."),
    ChatMessage(Role.USER, "And then?"),
)


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory: pytest.TempPathFactory) -> Vocabulary:
    return load_vocabulary(make_tiny_model(tmp_path_factory.mktemp("tiny")))


def test_prompt_tokens_bear_no_loss_and_answer_tokens_all_do(vocabulary: Vocabulary) -> None:
    example = tokenise(vocabulary, CONVERSATION, "Then turn it.")
    prompt = len(example.prompt_ids)
    assert example.labels[:prompt] == [IGNORED] * prompt
    assert example.labels[prompt:] == example.input_ids[prompt:]
    assert vocabulary.tokenizer.decode(example.input_ids[prompt:]) == "Then turn it.<|end|>"


def test_the_ids_are_those_of_the_chat_template(vocabulary: Vocabulary) -> None:
    example = tokenise(vocabulary, CONVERSATION, "Then turn it.")
    turns = [{"role": m.role.value, "content": m.content} for m in CONVERSATION]
    rendered = vocabulary.tokenizer.apply_chat_template(
        [*turns, {"role": "assistant", "content": "Then turn it."}], tokenize=False
    )
    assert example.input_ids == vocabulary.tokenizer.encode(rendered, add_special_tokens=False)


def test_an_answer_that_names_a_special_token_gets_no_special_token(vocabulary: Vocabulary) -> None:
    example = tokenise(vocabulary, CONVERSATION, "Say <|end|> and <|user|>")
    assert [i for i in example.answer_ids if i in vocabulary.codec.control_ids] == [vocabulary.end_id]


def test_both_kinds_are_mixed_and_what_is_too_long_is_counted(vocabulary: Vocabulary) -> None:
    revised = [(CONVERSATION, f"no {i}") for i in range(20)]
    own = [((ChatMessage(Role.USER, f"{i}?"),), "Sure.") for i in range(20)]
    long = ((ChatMessage(Role.USER, "x" * CONTEXT_LENGTH),), "Sure.")
    mixture = mix(vocabulary, revised, [*own, long], 0, seed=3)
    assert (mixture.revisions, mixture.own, mixture.too_long) == (20, 20, 1)
    first_half = [len(e.prompt_ids) > 20 for e in mixture.examples[:20]]
    assert 3 < sum(first_half) < 17
    assert (
        mix(vocabulary, revised, own, 0, seed=3).examples == mix(vocabulary, revised, own, 0, seed=3).examples
    )


def test_templates_without_end_token_of_their_own_end_with_the_tokenizers(tmp_path: Path) -> None:
    folder = make_tiny_model(tmp_path)
    (folder / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    assert load_vocabulary(folder).end_id == load_vocabulary(folder).tokenizer.eos_token_id
