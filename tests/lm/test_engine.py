"""The embedded engine: the model's own numbers, whatever else is in the batch; nothing dropped or mixed."""

import asyncio
import contextlib
import json
import math
import shutil

import pytest
import torch
from tests.lm.conftest import ARCHITECTURES, ask

from charter.errors import (
    BackendError,
    BackendUnavailable,
    CheckpointError,
    ConfigError,
    ContextOverflow,
    Overloaded,
    RequestError,
)
from charter.lm import open_model
from charter.lm.base import FinishReason, Sampling
from charter.lm.checkpoint import load_checkpoint
from charter.lm.engine_network import (
    FusedLlama,
    TransformersNetwork,
    WholeNetwork,
    _difference,
    choose_network,
)

PROMPTS = [ask("word " * n + "?", system="Rules." if n % 2 else None) for n in (1, 9, 2, 30, 5, 17, 3, 60)]
BLOCKED = (0, 1, 2, 3)


@contextlib.asynccontextmanager
async def opened(folder, **options):
    model = await asyncio.to_thread(open_model, f"local:{folder}", **options)
    try:
        yield model
    finally:
        await model.close()


async def text_of(stream):
    chunks = [c async for c in stream]
    assert all(c.finish_reason is None for c in chunks[:-1])
    return "".join(c.text for c in chunks), chunks


# The numbers.


@pytest.mark.parametrize("architecture", ARCHITECTURES)
async def test_scores_are_the_models_own_logprobs(tiny, reference, architecture):
    expected = reference(architecture)
    continuations = ["Yes", "No", "because it would harm", "你"]
    async with opened(tiny(architecture)) as model:
        found = await asyncio.gather(*(model.score(p, continuations) for p in PROMPTS))
    for prompt, scored in zip(PROMPTS, found, strict=True):
        for text, one in zip(continuations, scored, strict=True):
            assert expected.tokenizer.decode(one.token_ids) == text
            truth = expected.logprobs(expected.prompt_ids(prompt), one.token_ids)
            assert one.logprobs == pytest.approx(truth, abs=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [1.0, 0.7])
async def test_sampled_logprobs_are_those_of_the_distribution_drawn_from(
    tiny, reference, architecture, temperature
):
    expected = reference(architecture)
    width = expected.model.config.vocab_size
    blocked = (*BLOCKED, *range(len(expected.tokenizer), width))
    sampling = Sampling(temperature=temperature, max_tokens=24, seed=3)
    async with opened(tiny(architecture), max_batch=5) as model:
        found = await asyncio.gather(*(model.generate(p, sampling, n=2) for p in PROMPTS))
    for prompt, samples in zip(PROMPTS, found, strict=True):
        assert list(samples.prompt_token_ids) == expected.prompt_ids(prompt)
        for answer in samples.completions:
            truth = expected.logprobs(
                samples.prompt_token_ids, answer.token_ids, blocked=blocked, temperature=temperature
            )
            assert answer.logprobs == pytest.approx(truth, abs=1e-4)


async def test_greedy_answers_are_those_of_transformers(tiny, reference):
    expected = reference()
    async with opened(tiny()) as model:
        found = await asyncio.gather(
            *(model.generate(p, Sampling(temperature=0, max_tokens=20)) for p in PROMPTS)
        )
    for prompt, samples in zip(PROMPTS, found, strict=True):
        ids = torch.tensor([expected.prompt_ids(prompt)])
        truth = expected.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=20,
            suppress_tokens=list(BLOCKED),
        )
        assert list(samples.completions[0].token_ids) == truth[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_way_of_running_a_model_gives_its_own_numbers(tiny, architecture):
    checkpoint = load_checkpoint(str(tiny(architecture)))
    ways = [TransformersNetwork, WholeNetwork] + [FusedLlama] * (architecture != "gpt2")
    for build in ways:
        assert _difference(checkpoint.network, build(checkpoint.network), 512) < 1e-4
    chosen = choose_network(checkpoint.network, 512, "tiny")
    assert isinstance(chosen, ways[-1] if architecture != "gpt2" else TransformersNetwork)


def test_a_model_that_the_engine_would_run_wrongly_is_refused(tiny, monkeypatch):
    model = load_checkpoint(str(tiny())).network
    monkeypatch.setattr("charter.lm.engine_network._FUSED_CLASSES", ())
    with monkeypatch.context() as patch:
        patch.setattr(TransformersNetwork, "logits", lambda self, hidden: hidden @ self._head.weight.T * 1.5)
        patch.setattr(WholeNetwork, "logits", lambda self, hidden: hidden * 0.5)
        with pytest.raises(CheckpointError, match=r"LlamaForCausalLM.*log-probs differ.*vLLM"):
            choose_network(model, 512, "tiny")
    assert isinstance(choose_network(model, 512, "tiny"), TransformersNetwork)


async def test_frequencies_of_first_tokens_follow_the_model(tiny, reference):
    expected, draws = reference(), 3000
    logits = expected.logits(expected.prompt_ids(PROMPTS[0]))[-1]
    logits[list(BLOCKED)] = -math.inf
    probabilities = logits.softmax(-1)
    async with opened(tiny(), max_batch=500, max_waiting=4000) as model:
        samples = await model.generate(PROMPTS[0], Sampling(max_tokens=1, seed=1), n=draws)
    counts = torch.bincount(
        torch.tensor([c.token_ids[0] for c in samples.completions]), minlength=len(logits)
    )
    common = probabilities * draws >= 5
    wanted = torch.cat((probabilities[common], probabilities[~common].sum()[None])) * draws
    found = torch.cat((counts[common], counts[~common].sum()[None]))
    statistic, freedom = float(((found - wanted) ** 2 / wanted).sum()), len(wanted) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


# Seeds and neighbours.


async def test_a_seed_gives_the_same_answer_alone_and_under_load(tiny):
    sampling = [Sampling(temperature=1.0, max_tokens=8 + 5 * i, seed=i) for i in range(len(PROMPTS))]
    async with opened(tiny(), max_batch=6) as model:
        alone = [await model.generate(p, s) for p, s in zip(PROMPTS, sampling, strict=True)]

        async def late(i):
            await asyncio.sleep(0.001 * i)
            return await model.generate(PROMPTS[i], sampling[i])

        noise = [model.generate(ask(f"noise {i}"), Sampling(max_tokens=30)) for i in range(12)]
        crowded = await asyncio.gather(*(late(i) for i in range(len(PROMPTS))), *noise)
    for one, other in zip(alone, crowded[: len(PROMPTS)], strict=True):
        assert one.completions[0].token_ids == other.completions[0].token_ids
        assert one.completions[0].logprobs == pytest.approx(other.completions[0].logprobs, abs=1e-4)


async def test_answer_i_is_drawn_with_seed_plus_i_and_streams_are_the_same(tiny):
    async with opened(tiny()) as model:
        three = await model.generate(PROMPTS[1], Sampling(max_tokens=20, seed=7), n=3)
        second = await model.generate(PROMPTS[1], Sampling(max_tokens=20, seed=8))
        text, chunks = await text_of(model.stream(PROMPTS[1], Sampling(max_tokens=20, seed=9)))
    assert three.completions[1].token_ids == second.completions[0].token_ids
    assert text == three.completions[2].text
    assert tuple(t.token_id for c in chunks for t in c.tokens) == three.completions[2].token_ids
    assert chunks[-1].completion_tokens == three.completions[2].completion_tokens
    assert chunks[-1].prompt_tokens == len(three.prompt_token_ids)


async def test_without_a_seed_answers_differ(tiny):
    async with opened(tiny()) as model:
        samples = await model.generate(PROMPTS[0], Sampling(max_tokens=30), n=4)
    assert len({c.token_ids for c in samples.completions}) == 4


# What an answer contains.


async def test_special_tokens_are_never_sampled_but_the_stop_token_ends_answers(tiny):
    async with opened(tiny(), max_batch=64) as model:
        samples = await model.generate(PROMPTS[2], Sampling(temperature=5.0, max_tokens=60, seed=0), n=64)
    reasons = {c.finish_reason for c in samples.completions}
    assert reasons == {FinishReason.STOP, FinishReason.LENGTH}
    for answer in samples.completions:
        assert not set(BLOCKED) & set(answer.token_ids)
        assert (answer.token_ids[-1] == 4) == (answer.finish_reason is FinishReason.STOP)
        assert 4 not in answer.token_ids[:-1]


async def test_streams_never_show_half_a_character(tiny):
    async with opened(tiny()) as model:
        codec = model._engine._current.codec
        for seed in range(20):
            sampling = Sampling(temperature=3.0, max_tokens=40, seed=seed)
            text, _ = await text_of(model.stream(PROMPTS[0], sampling))
            whole = (await model.generate(PROMPTS[0], sampling)).completions[0]
            assert text == whole.text == codec.detokeniser.text(whole.token_ids)


async def test_a_stop_string_across_tokens_never_shows_and_its_tokens_are_kept(tiny):
    async with opened(tiny()) as model:
        free = (await model.generate(PROMPTS[0], Sampling(max_tokens=40, seed=5))).completions[0]
        assert len(free.text) > 12
        for at in range(2, 10):
            stop = free.text[at : at + 4]
            sampling = Sampling(max_tokens=40, seed=5, stop=("not there", stop))
            whole = (await model.generate(PROMPTS[0], sampling)).completions[0]
            text, chunks = await text_of(model.stream(PROMPTS[0], sampling))
            assert whole.text == text == free.text[: free.text.index(stop)]
            assert whole.finish_reason is chunks[-1].finish_reason is FinishReason.STOP
            assert whole.token_ids == free.token_ids[: len(whole.token_ids)]
            assert len(whole.token_ids) < len(free.token_ids)


async def test_alternatives_are_reported_where_asked(tiny):
    async with opened(tiny()) as model:
        asked, silent = await asyncio.gather(
            model.generate(PROMPTS[0], Sampling(max_tokens=5, seed=1, top_logprobs=3)),
            model.generate(PROMPTS[1], Sampling(max_tokens=5, seed=1)),
        )
    for token in asked.completions[0].tokens:
        assert len(token.alternatives) == 3
        ranked = [a.logprob for a in token.alternatives]
        assert ranked == sorted(ranked, reverse=True)
        assert token.logprob <= ranked[0]
    assert not any(t.alternatives for t in silent.completions[0].tokens)


async def test_truncated_sampling_reports_the_kept_mass(tiny, reference):
    sampling = Sampling(max_tokens=12, seed=2, top_p=0.6)
    async with opened(tiny()) as model:
        cut, whole = await asyncio.gather(
            model.generate(PROMPTS[0], sampling), model.generate(PROMPTS[1], Sampling(max_tokens=12, seed=1))
        )
    answer = cut.completions[0]
    truth = reference().logprobs(cut.prompt_token_ids, answer.token_ids, blocked=BLOCKED)
    restored = [t.logprob + t.kept_log_mass for t in answer.tokens]
    assert restored == pytest.approx(truth, abs=1e-4)
    assert all(math.log(0.6) - 1e-6 <= t.kept_log_mass < 0 for t in answer.tokens)
    assert not any(t.kept_log_mass for t in whole.completions[0].tokens)


# Limits and cancelling.


async def test_max_tokens_and_the_context_end_an_answer(tiny):
    long = ask("a " * 200)
    async with opened(tiny()) as model:
        short = await model.generate(PROMPTS[0], Sampling(max_tokens=3, seed=3))
        edge = await model.generate(long, Sampling(temperature=0.1, max_tokens=4000, seed=1))
        answer = edge.completions[0]
        assert short.completions[0].completion_tokens <= 3
        assert answer.prompt_tokens + answer.completion_tokens <= 512
        with pytest.raises(ContextOverflow, match=r"6\d\d tokens.*512"):
            await model.generate(ask("a " * 600), Sampling())
        with pytest.raises(ContextOverflow, match="shorten"):
            await model.score(ask("a " * 450), ["b " * 60])


async def test_a_full_queue_refuses_with_overloaded(tiny):
    async with opened(tiny(), max_batch=2, max_waiting=4) as model:
        results = await asyncio.gather(
            *(model.generate(PROMPTS[0], Sampling(max_tokens=30, seed=i)) for i in range(10)),
            return_exceptions=True,
        )
        refused = [r for r in results if isinstance(r, Overloaded)]
        assert refused
        assert "max_waiting" in str(refused[0])
        assert all(not isinstance(r, BaseException) for r in results if r not in refused)
        await model.generate(PROMPTS[0], Sampling(max_tokens=2))


async def idle(model):
    for _ in range(500):
        status = model.status()
        if status.running == status.waiting == 0:
            return
        await asyncio.sleep(0.01)
    raise AssertionError(f"the engine is still busy: {status}")


async def test_cancelled_callers_free_their_places(tiny):
    endless = Sampling(temperature=0.3, max_tokens=450, seed=3)
    async with opened(tiny(), max_batch=4) as model:
        tasks = [asyncio.create_task(model.generate(p, endless)) for p in PROMPTS[:6]]
        while not model.status().running:
            await asyncio.sleep(0.001)
        for task in tasks:
            task.cancel()
        assert all(
            isinstance(r, asyncio.CancelledError)
            for r in await asyncio.gather(*tasks, return_exceptions=True)
        )
        await idle(model)
        stream = model.stream(PROMPTS[0], endless)
        await anext(stream)
        await stream.aclose()
        await idle(model)
        after = await model.generate(PROMPTS[3], Sampling(max_tokens=10, seed=1))
        assert after.completions[0].tokens


async def test_closing_fails_what_is_under_way_and_may_be_repeated(tiny):
    async with opened(tiny()) as model:
        task = asyncio.create_task(model.generate(PROMPTS[0], Sampling(temperature=0.1, max_tokens=400)))
        await asyncio.sleep(0.01)
        await model.close()
        result = (await asyncio.gather(task, return_exceptions=True))[0]
        assert isinstance(result, BackendUnavailable) or result.completions
        with pytest.raises(BackendUnavailable):
            await model.generate(PROMPTS[0], Sampling())


async def test_a_failing_step_fails_its_requests_and_not_the_engine(tiny, monkeypatch):
    async with opened(tiny()) as model:
        runner = model._engine._current
        monkeypatch.setattr(runner._network, "logits", lambda hidden: 1 / 0)
        with pytest.raises(BackendError, match="ZeroDivisionError"):
            await model.generate(PROMPTS[0], Sampling(max_tokens=5))
        monkeypatch.undo()
        assert (await model.generate(PROMPTS[0], Sampling(max_tokens=5))).completions


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=-1),
        Sampling(top_p=0),
        Sampling(max_tokens=0),
        Sampling(stop=("",)),
        Sampling(top_k=-1),
    ],
)
async def test_senseless_parameters_are_refused_with_what_they_may_be(tiny, sampling):
    async with opened(tiny()) as model:
        with pytest.raises(RequestError, match="give"):
            await model.generate(PROMPTS[0], sampling)


# Checkpoints.


async def test_reload_under_load_drops_and_mixes_nothing(tiny):
    old, new = tiny("llama", 0), tiny("llama", 1)
    sampling = [Sampling(max_tokens=40, seed=i) for i in range(30)]

    async def answers(model, i):
        samples = await model.generate(PROMPTS[i % len(PROMPTS)], sampling[i])
        return samples.completions[0]

    async with opened(old) as a, opened(new) as b:
        expected = {(await m.info()).model.digest: [await answers(m, i) for i in range(30)] for m in (a, b)}
    async with opened(old, max_batch=4) as model:
        first = [asyncio.create_task(answers(model, i)) for i in range(15)]
        await asyncio.sleep(0)
        reloading = asyncio.create_task(model.reload(str(new), version="v2"))
        middle = []
        while not reloading.done():
            middle.append(asyncio.create_task(answers(model, len(middle) % 30)))
            await asyncio.sleep(0.005)
        before, after = await reloading
        last = [asyncio.create_task(answers(model, i)) for i in range(15, 30)]
        found = await asyncio.gather(*first, *middle, *last)
        assert (await model.info()).model == after
    assert before.digest != after.digest
    assert after.version == "v2"
    assert {f.model.digest for f in found[:15]} == {before.digest}
    assert {f.model.digest for f in found[-15:]} == {after.digest}
    for n, answer in enumerate(found):
        i = n if n < 15 else (n - 15) % 30 if n < 15 + len(middle) else n - len(middle)
        assert answer.token_ids == expected[answer.model.digest][i].token_ids


def damaged(source, target, change):
    shutil.copytree(source, target)
    change(target)
    return target


def truncate(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-500])


def poison(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def shrink(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_size": 64}))


def drop_tensor(folder):
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def pickle_instead(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def remote_code(folder):
    (folder / "evil.py").write_text("raise SystemExit('ran')")
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Config"}}
    (folder / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (truncate, "cannot be loaded"),
        (poison, "NaN"),
        (shrink, "fit|cannot be loaded"),
        (drop_tensor, "missing"),
        (pickle_instead, "pytorch_model.bin.*can run code"),
        (remote_code, "cannot be read"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "cannot be read"),
        (shutil.rmtree, "no model folder"),
    ],
)
async def test_a_bad_checkpoint_is_refused_and_the_old_one_stays(tiny, tmp_path, change, says):
    bad = damaged(tiny("llama", 1), tmp_path / "bad", change)
    async with opened(tiny()) as model:
        before = await model.info()
        with pytest.raises(CheckpointError, match=says):
            await model.reload(str(bad))
        assert await model.info() == before
        assert (await model.generate(PROMPTS[0], Sampling(max_tokens=4))).completions


async def test_digests_tell_weights_and_tokenizers_apart(tiny):
    async with opened(tiny("llama", 0)) as a, opened(tiny("llama", 1)) as b, opened(tiny("gpt2", 0)) as c:
        one, other, third = [(await m.info()).model for m in (a, b, c)]
    assert one.digest != other.digest
    assert one.tokenizer_digest == other.tokenizer_digest != third.tokenizer_digest


def test_an_unknown_option_is_named(tiny):
    with pytest.raises(ConfigError, match="max_batsh"):
        open_model(f"local:{tiny()}", max_batsh=3)
