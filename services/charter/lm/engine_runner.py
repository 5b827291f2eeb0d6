"""One set of weights at work: admits prompts, reads them packed, decodes all answers in one batch.

Belongs to the engine's worker thread, except `submit`, which any thread may call. A reload makes a new
runner; the old one finishes what it has. An iteration (`step`) reads new prompts and scorings in one
packed pass, then writes one token of every answer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from charter.lm.base import FinishReason
from charter.lm.checkpoint import Checkpoint
from charter.lm.engine_cache import SlotCache
from charter.lm.engine_network import choose_network, decode_mask
from charter.lm.engine_pack import Packed, pack
from charter.lm.engine_requests import Answer, Delivery, Inbox, Piece, Scoring
from charter.lm.engine_sampler import Drawn, Plan, draw

Outbox = list[tuple[Inbox, Delivery]]

_LOGITS_AT_ONCE = 16_000_000
"""Floats of logits that a packed pass holds at a time."""
_IDLE_CACHE_BYTES = 256 << 20
"""A larger cache is given back when nothing is left to write."""


@dataclass(frozen=True, slots=True)
class Limits:
    """How much the engine takes on at once."""

    max_batch: int = 32
    """Answers written at the same time."""
    max_waiting: int = 1024
    """Requests waiting for their turn; beyond, `Overloaded`."""
    packed_tokens: int = 2048
    """Prompt tokens read between two decode steps; a longer prompt is read alone."""
    cache_bytes: int = 2 << 30
    """Bound of the key-value cache; a single answer is admitted whatever it needs."""


class _Wanted:
    """The tokens of a packed pass whose states are needed, each once."""

    def __init__(self, packed: Packed) -> None:
        self._packed = packed
        self._width = packed.token_ids.shape[1]
        self._at: dict[int, int] = {}

    def index(self, sequence: int, token: int) -> int:
        """Where the state after a sequence's token will be found."""
        node = self._packed.rows[sequence] * self._width + int(self._packed.paths[sequence][token])
        return self._at.setdefault(node, len(self._at))

    @property
    def nodes(self) -> list[int]:
        """The tokens, as in rows laid end to end."""
        return list(self._at)


class Runner:
    """Weights, their cache, and the answers that they are writing."""

    def __init__(self, checkpoint: Checkpoint, limits: Limits) -> None:
        self.checkpoint = checkpoint
        self.codec = checkpoint.codec
        self.version = checkpoint.version
        self.context_length = checkpoint.context_length
        self._limits = limits
        model = checkpoint.network
        self._network = choose_network(model, self.context_length, self.version.version)
        embedding = model.get_input_embeddings().weight
        self._device, self._dtype = embedding.device, embedding.dtype
        self._blocked = self._blocked_bias()
        self._cache = SlotCache(limits.max_batch)
        self._token_bytes = self._measure()
        self._arrivals: deque[Answer | Scoring] = deque()
        self._queue: deque[Answer] = deque()
        self._scorings: deque[Scoring] = deque()
        self._reading: list[Answer | Scoring] = []  # neither waiting any more nor active yet
        self._active: list[Answer] = []
        self._plan: Plan | None = None
        self.tokens_generated = 0

    def submit(self, request: Answer | Scoring) -> None:
        """Takes a request; any thread."""
        self._arrivals.append(request)

    @property
    def waiting(self) -> int:
        """Requests whose turn has not come."""
        return len(self._arrivals) + len(self._queue) + len(self._scorings)

    @property
    def running(self) -> int:
        """Answers being written."""
        return len(self._active)

    @property
    def busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._active or self._arrivals or self._queue or self._scorings)

    @torch.inference_mode()
    def step(self, outbox: Outbox) -> None:
        """One iteration; results go to the outbox."""
        self._sort_arrivals()
        self._drop_cancelled(outbox)
        answers, scorings = self._admit()
        if answers or scorings:
            self._reading = [*answers, *scorings]
            self._read(answers, scorings, outbox)
            self._reading = []
        if self._active:
            self._decode(outbox)
        elif not self.busy and self._cache.nbytes > _IDLE_CACHE_BYTES:
            self._cache.clear()

    def abandon(self, error: BaseException, outbox: Outbox) -> None:
        """Fails every request; the runner is empty afterwards."""
        self._sort_arrivals()
        begun = [r for r in self._reading if r not in self._active]
        requests: list[Answer | Scoring] = [*begun, *self._active, *self._queue, *self._scorings]
        outbox += [(r.inbox, error) for r in requests]
        self._reading = []
        self._active.clear()
        self._queue.clear()
        self._scorings.clear()
        self._plan = None
        self._cache.clear()

    # Who is next.

    def _sort_arrivals(self) -> None:
        while self._arrivals:
            request = self._arrivals.popleft()
            if isinstance(request, Answer):
                self._queue.append(request)
            else:
                self._scorings.append(request)

    def _drop_cancelled(self, outbox: Outbox) -> None:
        if any(a.cancelled for a in self._queue):
            self._queue = deque(a for a in self._queue if not a.cancelled)
        if any(s.cancelled for s in self._scorings):
            self._scorings = deque(s for s in self._scorings if not s.cancelled)
        for slot in range(len(self._active) - 1, -1, -1):
            if self._active[slot].cancelled:
                self._finish(slot, FinishReason.CANCELLED, outbox)

    def _admit(self) -> tuple[list[Answer], list[Scoring]]:
        """As many scorings and prompts as one packed pass takes, in order of arrival."""
        budget = self._limits.packed_tokens
        share = budget // 2 if self._queue else budget  # neither kind starves the other
        scorings: list[Scoring] = []
        while self._scorings and (not scorings or self._scorings[0].size <= share):
            scorings.append(self._scorings.popleft())
            share -= scorings[-1].size
            budget -= scorings[-1].size
        answers: list[Answer] = []
        longest = max((a.reserve for a in self._active), default=0)
        seen: set[tuple[int, ...]] = set()
        while self._queue and len(self._active) + len(answers) < self._limits.max_batch:
            answer = self._queue[0]
            cost = 0 if answer.prompt_ids in seen else len(answer.prompt_ids)
            rows, longest = len(self._active) + len(answers) + 1, max(longest, answer.reserve)
            if rows > 1 and rows * longest * self._token_bytes > self._limits.cache_bytes:
                break
            if (answers or scorings) and cost > budget:
                break
            answers.append(self._queue.popleft())
            seen.add(answer.prompt_ids)
            budget -= cost
        return answers, scorings

    # Reading prompts.

    def _read(self, answers: list[Answer], scorings: list[Scoring], outbox: Outbox) -> None:
        """One packed pass over new prompts and scorings."""
        parts = [(s, c) for s in scorings for c in s.continuations if c]
        sequences = [*(a.prompt_ids for a in answers), *(s.prompt_ids + c[:-1] for s, c in parts)]
        found: dict[tuple[int, tuple[int, ...]], list[float]] = {}
        if sequences:
            packed = pack(sequences)
            wanted = _Wanted(packed)
            ends = [wanted.index(n, -1) for n in range(len(answers))]
            asked = [
                (wanted.index(n, len(s.prompt_ids) - 1 + k), token_id)
                for n, (s, c) in enumerate(parts, len(answers))
                for k, token_id in enumerate(c)
            ]
            hidden = self._packed_pass(packed, answers, wanted)
            if answers:
                self._begin(answers, hidden[torch.tensor(ends, device=self._device)], outbox)
            if asked:
                logprobs = iter(self._logprobs(hidden, asked))
                found = {(id(s), c): [next(logprobs) for _ in c] for s, c in parts}
        for scoring in scorings:
            outbox.append((scoring.inbox, [found.get((id(scoring), c), []) for c in scoring.continuations]))

    def _packed_pass(self, packed: Packed, answers: list[Answer], wanted: _Wanted) -> Tensor:
        """Hidden states of the wanted tokens; the prompts' keys and values go to their slots."""
        self._cache.begin_packed()
        hidden = self._network.hidden(
            self._tensor(packed.token_ids),
            self._tensor(packed.positions),
            None if packed.mask is None else self._tensor(packed.mask).to(self._dtype),
            self._cache,
            torch.tensor(wanted.nodes, device=self._device),
        )
        first, count = len(self._active), len(answers)
        paths = [slice(0, len(p)) if p[-1] == len(p) - 1 else self._tensor(p) for p in packed.paths[:count]]
        self._cache.commit(range(first, first + count), packed.rows[:count], paths)
        return hidden

    def _begin(self, answers: list[Answer], hidden: Tensor, outbox: Outbox) -> None:
        """First tokens of the new answers."""
        logits = self._network.logits(hidden)
        plan = Plan.of([a.sampling for a in answers], logits.shape[-1], self._device)
        drawn = draw(logits, plan, self._blocked, [a.uniform() for a in answers])
        first = len(self._active)
        self._active += answers
        self._plan = None
        self._take(drawn, first, outbox)

    def _logprobs(self, hidden: Tensor, asked: Sequence[tuple[int, int]]) -> list[float]:
        """Log-probs of tokens after states, both given by (index into `hidden`, token id)."""
        index = torch.tensor(asked, device=self._device)
        size = max(1, _LOGITS_AT_ONCE // self.codec.vocabulary_size)
        found = torch.empty(len(asked), device=self._device)
        for start in range(0, hidden.shape[0], size):
            logits = self._network.logits(hidden[start : start + size]).float()
            inside = (index[:, 0] >= start) & (index[:, 0] < start + size)
            rows, tokens = index[inside, 0] - start, index[inside, 1]
            found[inside] = logits[rows, tokens] - logits.logsumexp(-1)[rows]
        return found.tolist()

    # Writing answers.

    def _decode(self, outbox: Outbox) -> None:
        """One more token of every answer."""
        active = self._active
        tokens = self._tensor(np.array([a.piece.token_ids[-1] for a in active]))
        positions = self._tensor(np.array([a.position for a in active]))
        columns = max(a.position for a in active) + 1
        self._cache.begin_decode(positions, columns)
        mask = decode_mask(positions, columns, self._dtype)
        everything = torch.arange(len(active), device=self._device)
        hidden = self._network.hidden(tokens[:, None], positions[:, None], mask, self._cache, everything)
        logits = self._network.logits(hidden)
        if self._plan is None:
            self._plan = Plan.of([a.sampling for a in active], logits.shape[-1], self._device)
        drawn = draw(logits, self._plan, self._blocked, [a.uniform() for a in active])
        for answer in active:
            answer.position += 1
        self._take(drawn, 0, outbox)

    def _take(self, drawn: Drawn, first: int, outbox: Outbox) -> None:
        """Hands the new tokens of the rows from `first` on to their answers; ends those that are done."""
        stop_ids = self.codec.stop_ids
        done: list[tuple[int, FinishReason]] = []
        self.tokens_generated += len(drawn.token_ids)
        for n, token_id in enumerate(drawn.token_ids):
            answer = self._active[first + n]
            if answer.streams and answer.piece.token_ids:
                answer.piece = Piece()
            piece = answer.piece
            piece.token_ids.append(token_id)
            piece.logprobs.append(drawn.logprobs[n])
            if drawn.kept_log_mass is not None or piece.kept:
                self._note_kept(piece, drawn.kept_log_mass[n] if drawn.kept_log_mass is not None else 0.0)
            if drawn.alternatives is not None and answer.sampling.top_logprobs:
                piece.alternatives.append(drawn.alternatives[n][: answer.sampling.top_logprobs])
            answer.written += 1
            if token_id in stop_ids or (answer.watch and answer.watch.completed_by(token_id)):
                done.append((first + n, FinishReason.STOP))
            elif answer.written >= answer.limit:
                done.append((first + n, FinishReason.LENGTH))
            elif answer.streams:
                outbox.append((answer.inbox, piece))
        for slot, reason in reversed(done):
            self._finish(slot, reason, outbox)

    @staticmethod
    def _note_kept(piece: Piece, kept: float) -> None:
        piece.kept += [0.0] * (len(piece.token_ids) - 1 - len(piece.kept))
        piece.kept.append(kept)

    def _finish(self, slot: int, reason: FinishReason, outbox: Outbox) -> None:
        """Ends the answer in `slot`; the last row takes its place."""
        answer, last = self._active[slot], self._active.pop()
        if last is not answer:
            self._active[slot] = last
            self._cache.move(len(self._active), slot, last.position)
        self._plan = None
        if not answer.cancelled:
            answer.piece.finish = reason
            outbox.append((answer.inbox, answer.piece))

    # Small things.

    def _tensor(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(self._device)

    def _blocked_bias(self) -> Tensor | None:
        if not self.codec.blocked_ids:
            return None
        bias = torch.zeros(self.codec.vocabulary_size, device=self._device)
        bias[list(self.codec.blocked_ids)] = float("-inf")
        return bias

    @torch.inference_mode()
    def _measure(self) -> int:
        """Bytes of cache for one token."""
        cache = SlotCache(1)
        cache.begin_packed()
        token = torch.zeros((1, 1), dtype=torch.int64, device=self._device)
        self._network.hidden(
            token, token, None, cache, torch.zeros(1, dtype=torch.int64, device=self._device)
        )
        cache.commit([0], [0], [slice(0, 1)])
        return max(1, cache.bytes_per_token)
