"""A stand-in for text-generation-inference, which cannot be had here: no package installs it, and it needs
a GPU image. It answers as TGI's published API does (router/src/server.rs and its OpenAPI description):
`/info`, `/chat_tokenize`, `/tokenize`, and `POST /` with `parameters` and `stream`. What it says comes from
a real model, run by transformers.
"""

import json
import math
import random

from aiohttp import web


class FakeTgi:
    """Serves a `Reference`; `requests` keeps the parameters of every generation."""

    def __init__(self, reference, context=512):
        self.reference = reference
        self.tokenizer = reference.tokenizer
        self.context = context
        self.requests = []
        self.prefix_caching = False
        self.overloaded = False

    def app(self):
        app = web.Application()
        app.router.add_get("/info", self.info)
        app.router.add_post("/chat_tokenize", self.chat_tokenize)
        app.router.add_post("/tokenize", self.tokenize)
        app.router.add_post("/", self.generate)
        return app

    async def info(self, request):
        return web.json_response(
            {"model_id": "tiny", "model_sha": "abc", "max_total_tokens": self.context, "version": "3.3.6"}
        )

    def ids(self, text):
        return self.tokenizer.encode(text, add_special_tokens=False)

    def tokens(self, text):
        encoding = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        pairs = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [{"id": i, "text": text[a:b], "start": a, "stop": b} for i, (a, b) in pairs]

    async def chat_tokenize(self, request):
        chat = await request.json()
        text = self.tokenizer.apply_chat_template(
            chat["messages"], tokenize=False, add_generation_prompt=True
        )
        return web.json_response({"tokenize_response": self.tokens(text), "templated_text": text})

    async def tokenize(self, request):
        return web.json_response(self.tokens((await request.json())["inputs"]))

    async def generate(self, request):
        body = await request.json()
        text, parameters = body["inputs"], body["parameters"]
        self.requests.append(parameters)
        ids, limit = self.ids(text), parameters["max_new_tokens"]
        if self.overloaded:
            error = {"error": "Model is overloaded", "error_type": "overloaded"}
            return web.json_response(error, status=429)
        if len(ids) + limit > self.context:
            said = f"`inputs` tokens + `max_new_tokens` must be <= {self.context}. Given: {len(ids)} ..."
            error = {"error": f"Input validation error: {said}", "error_type": "validation"}
            return web.json_response(error, status=422)
        written = self.write(ids, limit, parameters)
        if body.get("stream"):
            return await self.stream(request, written, len(ids))
        prefill = []
        if parameters.get("decoder_input_details") and not self.prefix_caching:
            logp = self.reference.logits(ids).log_softmax(-1)
            values = [None, *(float(logp[i, t]) for i, t in enumerate(ids[1:]))]
            prefill = [
                {"id": i, "text": self.tokenizer.decode([i]), "logprob": v}
                for i, v in zip(ids, values, strict=True)
            ]
        details = {
            "finish_reason": written["reason"],
            "generated_tokens": len(written["tokens"]),
            "prefill": prefill,
            "tokens": written["tokens"],
            "seed": parameters.get("seed"),
        }
        if parameters.get("top_n_tokens"):
            details["top_tokens"] = written["top"]
        return web.json_response([{"generated_text": written["text"], "details": details}])

    async def stream(self, request, written, length):
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        for n, token in enumerate(written["tokens"]):
            event = {"index": n + 1, "token": token, "generated_text": None, "details": None}
            event["top_tokens"] = written["top"][n]
            if n == len(written["tokens"]) - 1:
                event["generated_text"] = written["text"]
                event["details"] = {
                    "finish_reason": written["reason"],
                    "generated_tokens": n + 1,
                    "input_length": length,
                }
            await response.write(f"data:{json.dumps(event)}\n\n".encode())
        await response.write_eof()
        return response

    def write(self, ids, limit, parameters):
        """Tokens as TGI reports them: text as far as whole characters go, the end token included."""
        rng, written, tokens, top, shown = random.Random(parameters.get("seed")), [], [], [], ""
        reason = "length"
        while len(written) < limit:
            logits = self.reference.logits([*ids, *written])[-1] / (parameters.get("temperature") or 1.0)
            logp = logits.log_softmax(-1)
            token = int(logp.argmax())
            if parameters.get("do_sample"):
                token = rng.choices(range(len(logp)), logp.exp().tolist())[0]
            written.append(token)
            whole = self.tokenizer.decode(written, skip_special_tokens=True)
            new = "" if whole.endswith("\ufffd") else whole[len(shown) :]
            shown += new
            tokens.append(self.record(token, float(logp[token]), new))
            best = logp.topk(parameters.get("top_n_tokens") or 1)
            top.append([self.record(int(i), float(v)) for v, i in zip(*best, strict=True)])
            if token == self.tokenizer.eos_token_id:
                reason = "eos_token"
                break
            if any(stop in shown for stop in parameters.get("stop") or ()):
                reason = "stop_sequence"
                break
        text = self.tokenizer.decode(written, skip_special_tokens=True)
        return {"tokens": tokens, "top": top, "reason": reason, "text": text}

    def record(self, token, logprob, text=None):
        special = token in self.tokenizer.all_special_ids
        text = self.tokenizer.decode([token]) if text is None or special else text
        assert not math.isnan(logprob)
        return {"id": token, "text": text, "logprob": logprob, "special": special}
