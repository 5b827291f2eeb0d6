"""What the engine computes with: hidden states of new tokens, and logits of some of them.

Three ways to the same numbers, the first that proves itself at load (`choose_network`) is used:
`FusedLlama` for small models of the Llama shape (Llama, Qwen2, Mistral), with joined matrices and without
the framework's overhead; the transformers model with its head applied only where logits are wanted; and
the transformers model whole, for heads that do more than one matrix.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

from charter.errors import CheckpointError
from charter.lm.engine_cache import SlotCache
from charter.lm.engine_pack import pack

_FUSED_CLASSES = ("LlamaForCausalLM", "Qwen2ForCausalLM", "MistralForCausalLM")
_FUSED_LIMIT = 200_000_000
"""Parameters. Above, matrix products dwarf the overhead and a second copy of the matrices costs memory."""

_Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From queries, keys and values [rows, heads, tokens, dim] to [rows * tokens, heads * dim]."""


class Network(Protocol):
    """The forward pass, split where the engine needs it."""

    def hidden(
        self, token_ids: Tensor, positions: Tensor, mask: Tensor | None, cache: SlotCache, at: Tensor
    ) -> Tensor:
        """Runs new tokens [rows, new]; the hidden states [n, width] of those `at` [n], rows laid end to end.

        `mask` is added to attention scores, [rows, 1, new, seen]; None means causal among the new tokens.
        """
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits [n, vocabulary] of hidden states [n, width]."""
        ...


class TransformersNetwork:
    """The model's own modules, the head only where it is wanted."""

    def __init__(self, model: Any) -> None:
        self._base = model.base_model
        self._head = model.get_output_embeddings()
        if self._base is model or self._head is None:
            raise ValueError("the model has no separate head")
        self._dtype = self._head.weight.dtype

    def hidden(
        self, token_ids: Tensor, positions: Tensor, mask: Tensor | None, cache: SlotCache, at: Tensor
    ) -> Tensor:
        """See `Network`."""
        output = self._base(
            input_ids=token_ids,
            attention_mask=_explicit(mask, token_ids, self._dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.last_hidden_state.flatten(0, 1)[at]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Network`."""
        return self._head(hidden)  # type: ignore[no-any-return]


class WholeNetwork:
    """The model as it is: its logits stand for hidden states."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._dtype = next(model.parameters()).dtype

    def hidden(
        self, token_ids: Tensor, positions: Tensor, mask: Tensor | None, cache: SlotCache, at: Tensor
    ) -> Tensor:
        """See `Network`."""
        output = self._model(
            input_ids=token_ids,
            attention_mask=_explicit(mask, token_ids, self._dtype),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits.flatten(0, 1)[at]  # type: ignore[no-any-return]

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Network`."""
        return hidden


def _explicit(mask: Tensor | None, token_ids: Tensor, dtype: torch.dtype) -> Tensor:
    """The mask, or the causal one: models guess from ids and cache what a missing mask means."""
    if mask is not None:
        return mask
    new = token_ids.shape[1]
    square = torch.full((new, new), float("-inf"), dtype=dtype, device=token_ids.device)
    return square.triu_(1).expand(token_ids.shape[0], 1, new, new)


class FusedLlama:
    """The Llama shape with query, key and value in one product, gate and up in another.

    A decode step of a small model is bound by the number of operations and by reading the cache: this
    does a third of the former, and reads the cache by batched products, which on a CPU are faster than
    the fused attention kernel for a single query.
    """

    def __init__(self, model: Any) -> None:
        config, body = model.config, model.model
        if type(model).__name__ not in _FUSED_CLASSES or config.hidden_act != "silu":
            raise ValueError("not the Llama shape")
        if sum(p.numel() for p in model.parameters()) > _FUSED_LIMIT:
            raise ValueError("too large to gain from it")
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._head_dim = body.layers[0].self_attn.head_dim
        self._scale = self._head_dim**-0.5
        self._embedding = body.embed_tokens.weight
        self._eps = config.rms_norm_eps
        self._norm = body.norm.weight
        self._width = (config.hidden_size,)
        self._head = model.get_output_embeddings()
        self._layers = [_FusedLayer(layer) for layer in body.layers]
        rotary = body.rotary_emb
        steps = torch.arange(config.max_position_embeddings, device=rotary.inv_freq.device).float()
        angles = torch.outer(steps, rotary.inv_freq.float())
        factor = rotary.attention_scaling
        dtype = self._embedding.dtype
        self._cos = (torch.cat((angles.cos(), angles.cos()), -1) * factor).to(dtype)
        self._sin = (torch.cat((-angles.sin(), angles.sin()), -1) * factor).to(dtype)

    def hidden(
        self, token_ids: Tensor, positions: Tensor, mask: Tensor | None, cache: SlotCache, at: Tensor
    ) -> Tensor:
        """See `Network`."""
        rows, new = token_ids.shape
        flat = positions.reshape(-1)
        cos, sin = self._cos[flat][:, None], self._sin[flat][:, None]
        x = functional.embedding(token_ids.reshape(-1), self._embedding)
        if new == 1 and mask is not None:
            attend = self._decode_attention(mask)
            for i, layer in enumerate(self._layers):
                x = self._layer(i, layer, x, (rows, 1), cos, sin, cache, attend)
            x = x[at]
        else:
            attend = self._attention(mask)
            for i, layer in enumerate(self._layers[:-1]):
                x = self._layer(i, layer, x, (rows, new), cos, sin, cache, attend)
            x = self._last_layer(x, (rows, new), cos, sin, mask, cache, at)
        return functional.rms_norm(x, self._width, self._norm, self._eps)

    def _layer(
        self,
        index: int,
        layer: _FusedLayer,
        x: Tensor,
        shape: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        cache: SlotCache,
        attend: _Attend,
    ) -> Tensor:
        heads, both = self._heads, self._heads + self._kv_heads
        h = functional.rms_norm(x, self._width, layer.norm_in, self._eps)
        qkv = functional.linear(h, layer.qkv, layer.qkv_bias).view(x.shape[0], -1, self._head_dim)
        turned = self._turn(qkv[:, :both], cos, sin).view(*shape, both, -1).transpose(1, 2)
        value = qkv[:, both:].view(*shape, -1, self._head_dim).transpose(1, 2)
        keys, values = cache.update(turned[:, heads:], value, index)
        return self._after_attention(layer, x, attend(turned[:, :heads], keys, values))

    def _last_layer(
        self,
        x: Tensor,
        shape: tuple[int, int],
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: SlotCache,
        at: Tensor,
    ) -> Tensor:
        """The last layer: keys and values of all tokens, everything else only of those that are wanted.

        Reading a prompt wants one state of a hundred, so this saves most of a layer.
        """
        layer, (rows, new) = self._layers[-1], shape
        split = self._heads * self._head_dim
        bias_q, bias_kv = (None, None) if layer.qkv_bias is None else layer.qkv_bias.tensor_split((split,))
        h = functional.rms_norm(x, self._width, layer.norm_in, self._eps)
        kv = functional.linear(h, layer.qkv[split:], bias_kv).view(rows * new, -1, self._head_dim)
        key = self._turn(kv[:, : self._kv_heads], cos, sin)
        key, value = (
            t.view(rows, new, -1, self._head_dim).transpose(1, 2) for t in (key, kv[:, self._kv_heads :])
        )
        keys, values = cache.update(key, value, len(self._layers) - 1)
        query = functional.linear(h[at], layer.qkv[:split], bias_q).view(len(at), -1, self._head_dim)
        query = self._turn(query, cos[at], sin[at])
        seen = self._attend_some(query, keys, values, mask, at)
        return self._after_attention(layer, x[at], seen)

    def _attend_some(
        self, query: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, at: Tensor
    ) -> Tensor:
        """Attention of single tokens [n, heads, dim] to their rows; rows with fewer are filled up."""
        rows, _, new, _ = keys.shape
        row, column = at // new, at % new
        order = torch.argsort(row, stable=True)
        counts = torch.bincount(row, minlength=rows)
        place = torch.empty_like(at)
        place[order] = torch.arange(len(at), device=at.device) - (counts.cumsum(0) - counts)[row[order]]
        width = int(counts.max())
        columns = column.new_zeros((rows, width))
        columns[row, place] = column
        queries = query.new_zeros((rows, width, *query.shape[1:]))
        queries[row, place] = query
        if mask is None:
            beyond = torch.arange(new, device=at.device) > columns[:, :, None]
            some = torch.zeros(beyond.shape, dtype=query.dtype, device=at.device)
            some = some.masked_fill_(beyond, float("-inf"))[:, None]
        else:
            some = mask.expand(rows, 1, new, new)[torch.arange(rows)[:, None], 0, columns][:, None]
        seen = self._attention(some)(queries.transpose(1, 2), keys, values)
        return seen.view(rows, width, -1)[row, place]

    def _turn(self, states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Rotary position embedding of [n, heads, dim]."""
        half = self._head_dim // 2
        halves = torch.cat((states[..., half:], states[..., :half]), -1)
        return torch.addcmul(states * cos, halves, sin)

    def _after_attention(self, layer: _FusedLayer, x: Tensor, seen: Tensor) -> Tensor:
        x = torch.addmm(x, seen, layer.out)
        h = functional.rms_norm(x, self._width, layer.norm_out, self._eps)
        gate, up = functional.linear(h, layer.gate_up).chunk(2, -1)
        return torch.addmm(x, functional.silu(gate) * up, layer.down)

    def logits(self, hidden: Tensor) -> Tensor:
        """See `Network`."""
        return self._head(hidden)  # type: ignore[no-any-return]

    def _attention(self, mask: Tensor | None) -> _Attend:
        def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            seen = functional.scaled_dot_product_attention(
                query,
                keys,
                values,
                attn_mask=mask,
                is_causal=mask is None and query.shape[2] > 1,
                scale=self._scale,
                enable_gqa=self._heads != self._kv_heads,
            )
            return seen.transpose(1, 2).reshape(-1, self._heads * self._head_dim)

        return attend

    def _decode_attention(self, mask: Tensor) -> _Attend:
        """One query for each row: two batched products over [rows * key heads]."""
        rows, _, _, columns = mask.shape
        bias = mask.expand(rows, self._kv_heads, 1, columns).reshape(rows * self._kv_heads, 1, columns)
        group = self._heads // self._kv_heads

        def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
            grouped = query.reshape(rows * self._kv_heads, group, self._head_dim)
            scores = torch.baddbmm(bias, grouped, keys.flatten(0, 1).transpose(1, 2), alpha=self._scale)
            seen = torch.bmm(torch.softmax(scores, -1), values.flatten(0, 1))
            return seen.view(rows, -1)

        return attend


class _FusedLayer:
    """One layer's matrices, joined."""

    def __init__(self, layer: Any) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        if attention.o_proj.bias is not None or mlp.down_proj.bias is not None:
            raise ValueError("biases that the fused form does not have")
        self.norm_in, self.norm_out = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.qkv = torch.cat([p.weight for p in projections])
        biased = projections[0].bias is not None
        self.qkv_bias = torch.cat([p.bias for p in projections]) if biased else None
        self.out = attention.o_proj.weight.t()
        self.gate_up = torch.cat((mlp.gate_proj.weight, mlp.up_proj.weight))
        self.down = mlp.down_proj.weight.t()


def choose_network(model: Any, context_length: int, label: str) -> Network:
    """The fastest network whose log-probs equal the model's own; `CheckpointError` when none does."""
    reasons = []
    for build in (FusedLlama, TransformersNetwork, WholeNetwork):
        try:
            network: Network = build(model)
            error = _difference(model, network, context_length)
        except Exception as e:  # any architecture may fail in its own way; the next form may work
            reasons.append(f"{build.__name__}: {e}")
            continue
        if error <= (5e-3 if next(model.parameters()).dtype == torch.float32 else 0.5):
            return network
        reasons.append(f"{build.__name__}: log-probs differ by {error:.2g}")
    raise CheckpointError(
        f"{label}: the embedded engine cannot run {type(model).__name__} ({'; '.join(reasons)}); "
        "serve it with vLLM or text-generation-inference and name it as openai+http://… or tgi+http://…"
    )


@torch.inference_mode()
def _difference(model: Any, network: Network, context_length: int) -> float:
    """Largest difference of log-probs between the model alone and the engine's way of running it.

    Three sequences that share a beginning are packed, put into the cache and decoded for three steps.
    """
    device = next(model.parameters()).device
    vocabulary = model.get_input_embeddings().weight.shape[0]
    length = max(2, min(9, context_length - 4))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (3, length + 3), generator=generator)
    ids[1, : length - 2] = ids[0, : length - 2]
    ends = (length, length - 1, length)
    expected = []
    for i, end in enumerate(ends):
        alone = ids[i : i + 1, : end + 3].to(device)
        logits = model(input_ids=alone, attention_mask=torch.ones_like(alone)).logits
        expected.append(torch.log_softmax(logits[0, end - 1 :].float(), -1))
    found = torch.stack(list(_engine_way(network, ids, ends, device, next(model.parameters()).dtype)), 1)
    worst = max(float((e - f).abs().max()) for e, f in zip(expected, found, strict=True))
    return float("inf") if math.isnan(worst) else worst


def _engine_way(
    network: Network, ids: Tensor, ends: tuple[int, ...], device: Any, dtype: torch.dtype
) -> Iterator[Tensor]:
    packed = pack([ids[i, :end].tolist() for i, end in enumerate(ends)])
    paths = [torch.from_numpy(p).to(device) for p in packed.paths]
    width = packed.token_ids.shape[1]
    cache = SlotCache(max_rows=len(ends))
    cache.begin_packed()
    hidden = network.hidden(
        torch.from_numpy(packed.token_ids).to(device),
        torch.from_numpy(packed.positions).to(device),
        None if packed.mask is None else torch.from_numpy(packed.mask).to(device, dtype),
        cache,
        torch.stack([r * width + p[-1] for r, p in zip(packed.rows, paths, strict=True)]),
    )
    cache.commit(range(len(ends)), packed.rows, paths)
    yield torch.log_softmax(network.logits(hidden).float(), -1)
    for step in range(3):
        positions = torch.tensor([end + step for end in ends], device=device)
        tokens = torch.stack([ids[i, end + step] for i, end in enumerate(ends)]).to(device)
        cache.begin_decode(positions, max(ends) + step + 1)
        mask = decode_mask(positions, max(ends) + step + 1, dtype)
        everything = torch.arange(len(ends), device=device)
        hidden = network.hidden(tokens[:, None], positions[:, None], mask, cache, everything)
        yield torch.log_softmax(network.logits(hidden).float(), -1)


def decode_mask(positions: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """[rows, 1, 1, columns]: 0 up to each row's position, -inf beyond."""
    beyond = torch.arange(columns, device=positions.device) > positions[:, None]
    mask = torch.zeros(beyond.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(beyond, float("-inf"))[:, None, None]
