"""Prompts at the edge of the context, and answers that are cut off or empty, by a real (random) model."""

import asyncio
import contextlib

import pytest
from prometheus_client import CollectorRegistry
from tests.sampler.test_worker import OPTIONS, rollouts, until
from tests.tiny import CONTEXT_LENGTH, SPECIAL_TOKENS, make_tiny_model

from charter.bus import open_bus
from charter.bus.messages import decode, encode
from charter.lm import open_model
from charter.policy.config import PolicyConfig
from charter.policy.server import serve
from charter.sampler.config import SamplerConfig
from charter.sampler.worker import worker
from charter.v1 import events_pb2, types_pb2

END = SPECIAL_TOKENS.index("<|end|>")


def _ends_at_once(folder):
    """A model whose first word is its last: only the end has a row in the head."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    asked = [{"role": "user", "content": "a"}]
    ids = tokenizer.apply_chat_template(
        asked, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        hidden = model.model(ids["input_ids"]).last_hidden_state[0, -1]
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[END] = 10 * hidden
    model.save_pretrained(folder)
    return folder


@contextlib.asynccontextmanager
async def _sampled(tmp_path, folder, contents, **options):
    """The rollouts and the dead letters of these prompts."""
    async with await serve(PolicyConfig(model=f"local:{folder}"), CollectorRegistry()) as server:
        policy = open_model(f"grpc://{server.target}")
        with open_bus(f"sqlite:{tmp_path / 'bus.db'}?synchronous=normal") as bus:
            for i, content in enumerate(contents):
                message = types_pb2.ChatMessage(role=types_pb2.ROLE_USER, content=content)
                event = events_pb2.PromptEvent(prompt_id=f"p{i}", conversation=[message])
                bus.publish([encode("prompts", event.prompt_id, event)])
            work = worker(bus, policy, SamplerConfig(batch_size=100, **options), options=OPTIONS)
            running = asyncio.create_task(work.run())

            def letters():
                return [decode(r, events_pb2.DeadLetterEvent) for r in bus.fetch("dead-letters", 0, 0)]

            await until(lambda: len(rollouts(bus)) + len(letters()) == len(contents))
            work.stop()
            await running
            yield {r.prompt_id: r for r in rollouts(bus)}, letters()
        await policy.close()


async def test_a_prompt_may_fill_the_context_but_for_one_token_and_one_more_is_buried_with_its_length(
    tmp_path,
):
    folder = make_tiny_model(tmp_path / "tiny")
    around = 4  # <|user|>, <|end|>, <|assistant|>, and the one token that is left
    contents = ["?" * n for n in (1, CONTEXT_LENGTH - around, CONTEXT_LENGTH - around + 1)]
    async with _sampled(tmp_path, folder, contents, max_tokens=5) as (found, letters):
        assert set(found) == {"p0", "p1"}
        assert len(found["p1"].prompt_token_ids) == CONTEXT_LENGTH - 1
        for answer in found["p1"].answers:
            assert len(answer.token_ids) == len(answer.logprobs) == 1
            assert answer.token_ids[0] == END or answer.finish_reason == types_pb2.FINISH_REASON_LENGTH
        for answer in found["p0"].answers:
            ended = answer.token_ids[-1] == END
            assert answer.finish_reason == (
                types_pb2.FINISH_REASON_STOP if ended else types_pb2.FINISH_REASON_LENGTH
            )
        [letter] = letters
        assert "the prompt has 512 tokens and needs room for 1 more" in letter.error
        assert "shorten the conversation by at least 1 tokens" in letter.error


@pytest.mark.filterwarnings("ignore:.*tie_word_embeddings.*")
async def test_an_empty_answer_is_a_rollout_of_the_end_alone_and_stops_nothing(tmp_path):
    folder = _ends_at_once(make_tiny_model(tmp_path / "tiny"))
    async with _sampled(tmp_path, folder, ["a"]) as (found, letters):
        assert [list(a.token_ids) for a in found["p0"].answers] == [[END]] * 2
        assert [a.text for a in found["p0"].answers] == ["", ""]
        assert [a.finish_reason for a in found["p0"].answers] == [types_pb2.FINISH_REASON_STOP] * 2
        assert letters == []
