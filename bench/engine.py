"""The embedded engine beside a plain `generate` and `transformers serve`, on the same model, in one run.

    python bench/engine.py [--model FOLDER] [--streams 32] [--answers 8] [--no-serve]

The engine serves `--streams` callers that arrive over time, each streaming `--answers` answers one after
the other, prompts and answers of uneven length. `generate` gets the same prompts in batches of 32 with
neither arrivals nor uneven answers: every row writes until the batch ends, and every token counts. The
target is a ratio of at least 0.7. Times to the first token are those that a caller of the engine sees.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import aiohttp

from charter.constitution import load
from charter.feedback import prompts as feedback
from charter.lm import open_model
from charter.lm.base import ChatMessage, LanguageModel, Prompt, Role, Sampling
from charter.seedmodel import WEIGHTS
from charter.seedmodel.world import prompts as world_prompts

ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Report:
    """What was measured; tokens a second unless the name says otherwise."""

    generate_tokens_per_s: float = 0.0
    engine_tokens_per_s: float = 0.0
    ratio: float = 0.0
    first_token_median_ms: float = 0.0
    first_token_p95_ms: float = 0.0
    answers: int = 0
    mean_prompt_tokens: float = 0.0
    mean_answer_tokens: float = 0.0
    assess_six_principles_ms: float = 0.0
    answer_alone_ms: float = 0.0
    serve_tokens_per_s: float | None = None
    serve_first_token_p95_ms: float | None = None


def workload(count: int, seed: int) -> list[tuple[Prompt, Sampling]]:
    """Requests of the seed world: a third are chat, a third critiques, a third assessments of an answer."""
    rng = random.Random(seed)
    principles = load(ROOT / "constitutions" / "seed.yaml").principles
    work = []
    for i, text in enumerate(world_prompts(seed, count)):
        asked = (ChatMessage(Role.USER, text),)
        prompt = Prompt(asked)
        if i % 3:
            answer = " ".join(f"First do the thing, then do it {n} times." for n in range(rng.randint(1, 8)))
            make = feedback.assess if i % 3 == 1 else feedback.critique
            critical = [p for p in principles if p.critique_request]
            prompt = make(asked, answer, rng.choice(critical))
        work.append((prompt, Sampling(temperature=0.7, max_tokens=rng.randint(16, 54), seed=i)))
    rng.shuffle(work)
    return work


async def measure_engine(
    model: LanguageModel, work: list[tuple[Prompt, Sampling]], streams: int, report: Report
) -> None:
    """`streams` callers that start a little apart, each with its share of the work."""
    first: list[float] = []
    tokens: list[tuple[int, int]] = []

    async def caller(share: list[tuple[Prompt, Sampling]], delay: float) -> None:
        await asyncio.sleep(delay)
        for prompt, sampling in share:
            start, heard = time.perf_counter(), False
            async for chunk in model.stream(prompt, sampling):
                if not heard:
                    first.append(time.perf_counter() - start)
                    heard = True
                if chunk.finish_reason is not None:
                    tokens.append((chunk.prompt_tokens, chunk.completion_tokens))

    begin = time.perf_counter()
    await asyncio.gather(*(caller(work[i::streams], 0.005 * i) for i in range(streams)))
    seconds = time.perf_counter() - begin
    report.answers = len(tokens)
    report.mean_prompt_tokens = statistics.fmean(p for p, _ in tokens)
    report.mean_answer_tokens = statistics.fmean(a for _, a in tokens)
    report.engine_tokens_per_s = sum(a for _, a in tokens) / seconds
    report.first_token_median_ms = 1e3 * statistics.median(first)
    report.first_token_p95_ms = 1e3 * statistics.quantiles(first, n=20)[-1]


def measure_generate(folder: str, work: list[tuple[Prompt, Sampling]], new_tokens: int, rounds: int) -> float:
    """Tokens a second of `model.generate` at batch 32; every row writes `new_tokens`."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    batches = []
    for start in range(0, 32 * rounds, 32):
        chats = [
            [{"role": m.role.value, "content": m.content} for m in work[i % len(work)][0].messages]
            for i in range(start, start + 32)
        ]
        batches.append(
            tokenizer.apply_chat_template(
                chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
            )
        )
    seconds = 0.0
    with torch.inference_mode():
        for n, batch in enumerate([batches[0], *batches]):  # the first warms up
            begin = time.perf_counter()
            model.generate(
                **batch, do_sample=True, temperature=0.7, min_new_tokens=new_tokens, max_new_tokens=new_tokens
            )
            seconds += (time.perf_counter() - begin) if n else 0.0
    return 32 * new_tokens * len(batches) / seconds


async def measure_guard(model: LanguageModel, report: Report) -> None:
    """The cost of assessing an answer by six principles, and of one short answer, both alone."""
    constitution = load(ROOT / "constitutions" / "seed.yaml")
    principles = [p for p in constitution.principles if p.critique_request][:6]
    asked = (ChatMessage(Role.USER, world_prompts(7, 1)[0]),)
    answer = "First take the key, then put it into the lock, then turn it, then push the door."
    assess, alone = [], []
    for _ in range(30):
        begin = time.perf_counter()
        await asyncio.gather(
            *(model.score(feedback.assess(asked, answer, p), (feedback.YES, feedback.NO)) for p in principles)
        )
        assess.append(time.perf_counter() - begin)
        begin = time.perf_counter()
        await model.generate(Prompt(asked), Sampling(temperature=0.7, max_tokens=35, seed=1))
        alone.append(time.perf_counter() - begin)
    report.assess_six_principles_ms = 1e3 * statistics.median(assess)
    report.answer_alone_ms = 1e3 * statistics.median(alone)


async def measure_serve(
    folder: str, work: list[tuple[Prompt, Sampling]], streams: int, report: Report
) -> None:
    """The same callers against `transformers serve`, which does not batch by default."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        *(str(Path(sys.executable).parent / "transformers"), "serve", folder),
        *("--device", "cpu", "--host", "127.0.0.1", "--port", str(port)),
    ]
    server = subprocess.Popen(  # noqa: ASYNC220 - nothing else runs while it starts
        command,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        base = f"http://127.0.0.1:{port}"
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(300)) as session:
            await _until_up(session, base, server)
            await _serve_callers(session, base, folder, work, streams, report)
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


async def _until_up(session: aiohttp.ClientSession, base: str, server: subprocess.Popen) -> None:
    for _ in range(600):
        if server.poll() is not None:
            raise RuntimeError(f"transformers serve ended with {server.returncode}")
        try:
            async with session.get(f"{base}/health") as response:
                if response.status == 200:
                    return
        except aiohttp.ClientConnectionError:
            await asyncio.sleep(0.2)
    raise RuntimeError("transformers serve did not come up within 2 minutes")


async def _serve_callers(
    session: aiohttp.ClientSession,
    base: str,
    folder: str,
    work: list[tuple[Prompt, Sampling]],
    streams: int,
    report: Report,
) -> None:
    first: list[float] = []
    tokens = 0

    async def caller(share: list[tuple[Prompt, Sampling]], delay: float) -> None:
        nonlocal tokens
        await asyncio.sleep(delay)
        for prompt, sampling in share:
            body = {
                "model": folder,
                "messages": [{"role": m.role.value, "content": m.content} for m in prompt.messages],
                "temperature": sampling.temperature,
                "max_tokens": sampling.max_tokens,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            start, heard = time.perf_counter(), False
            async with session.post(f"{base}/v1/chat/completions", json=body) as response:
                response.raise_for_status()
                async for line in response.content:
                    if not line.startswith(b"data: {"):
                        continue
                    event = json.loads(line[6:])
                    if not heard and any(c.get("delta", {}).get("content") for c in event.get("choices", ())):
                        first.append(time.perf_counter() - start)
                        heard = True
                    tokens += (event.get("usage") or {}).get("completion_tokens", 0)

    begin = time.perf_counter()
    await asyncio.gather(*(caller(work[i::streams], 0.005 * i) for i in range(streams)))
    report.serve_tokens_per_s = tokens / (time.perf_counter() - begin)
    report.serve_first_token_p95_ms = 1e3 * statistics.quantiles(first, n=20)[-1]


async def run(options: argparse.Namespace) -> Report:
    """All measurements, one after the other."""
    report = Report()
    work = workload(options.streams * options.answers, seed=1)
    model = open_model(f"local:{options.model}", max_batch=options.streams)
    await measure_engine(model, work[: 2 * options.streams], options.streams, Report())  # warms up
    await measure_engine(model, work, options.streams, report)
    await measure_guard(model, report)
    await model.close()
    new_tokens = round(report.mean_answer_tokens)
    report.generate_tokens_per_s = measure_generate(options.model, work, new_tokens, options.rounds)
    report.ratio = report.engine_tokens_per_s / report.generate_tokens_per_s
    if options.serve:
        await measure_serve(options.model, work[: 2 * options.streams], options.streams, report)
    return report


def main() -> None:
    """Prints the report as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default=str(WEIGHTS), help="a folder in Hugging Face format")
    parser.add_argument("--streams", type=int, default=32, help="callers at the same time")
    parser.add_argument("--answers", type=int, default=8, help="answers for each caller")
    parser.add_argument("--rounds", type=int, default=8, help="batches for generate")
    parser.add_argument("--serve", action=argparse.BooleanOptionalAction, default=True)
    report = asyncio.run(run(parser.parse_args()))
    print(
        json.dumps(
            {k: round(v, 3) if isinstance(v, float) else v for k, v in asdict(report).items()}, indent=1
        )
    )


if __name__ == "__main__":
    main()
