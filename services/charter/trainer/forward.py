"""Log-probs and values of a micro-batch, computed for the slots and nothing else.

*Packed*: the answers of a micro-batch lie end to end in one row, without padding, and attention runs within
each of them (`packed_attention`, registered with transformers, so it serves every model that uses its
attention interface). Models that cannot be packed (`can_pack` finds out by trying) get rectangles of
answers of similar length, padded on the right, where a causal model cannot see the padding.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from charter.errors import BackendUnsupported
from charter.trainer.batch import Batch, MicroBatch

PACKED_ATTENTION = "charter_packed"

_CHUNK_ELEMENTS = 1 << 17
"""Elements of the logits handled at once: what stays in a core's cache while it is read five times."""


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    dropout: float = 0.0,
    scaling: float | None = None,
    segments: tuple[int, ...] | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each segment of one packed row.

    Args:
        module: the attention layer.
        query: [1, heads, tokens, width].
        key: [1, key heads, tokens, width].
        value: as `key`.
        attention_mask: not used; the segments say all.
        dropout: must be 0.
        scaling: of the scores.
        segments: tokens of each answer; their sum is `tokens`.
        sliding_window: tokens that a query looks back, itself included.
        softcap: not supported.
        s_aux: not supported.

    Returns:
        [1, tokens, heads, width], and no attention weights.
    """
    if segments is None or softcap is not None or s_aux is not None or dropout:
        raise BackendUnsupported("packed attention needs segments, and knows no soft cap, sinks or dropout")
    grouped = query.shape[1] != key.shape[1]
    outputs = []
    parts = (torch.split(x, list(segments), 2) for x in (query, key, value))
    for q, k, v in zip(*parts, strict=True):
        mask = None
        if sliding_window is not None and q.shape[2] > sliding_window:
            place = torch.arange(q.shape[2], device=q.device)
            back = place[:, None] - place[None, :]
            mask = (back >= 0) & (back < sliding_window)
        outputs.append(
            scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, 2).transpose(1, 2).contiguous(), None


def register_packed_attention() -> None:
    """Makes `packed_attention` known to transformers; safe to repeat."""
    from transformers import AttentionInterface

    AttentionInterface.register(PACKED_ATTENTION, packed_attention)


class _SelectedLogSoftmax(torch.autograd.Function):
    """log_softmax(logits·scale)[target], row by row, in float32, with one buffer for logits and gradient.

    The forward pass leaves the probabilities where the logits were, the backward pass leaves the gradient
    there. Rows are handled in chunks that stay in the cache. The logits are of no use to anybody
    afterwards; had another operation kept them for its own backward pass, autograd would notice.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, scale: Tensor) -> Tensor:
        selected = torch.empty(len(targets), device=logits.device)
        with torch.no_grad():
            for rows in _chunks(logits):
                scaled = logits[rows].float().mul_(scale[rows, None])
                scaled.sub_(torch.logsumexp(scaled, -1, keepdim=True))
                selected[rows] = scaled.gather(-1, targets[rows, None]).squeeze(-1)
                logits[rows] = scaled.exp_().to(logits.dtype)
        ctx.buffer = logits.detach()
        ctx.save_for_backward(targets, scale)
        return selected

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        targets, scale = ctx.saved_tensors
        buffer: Tensor = ctx.buffer
        step = grad * scale
        buffer.mul_(-step[:, None].to(buffer.dtype))
        buffer.scatter_add_(-1, targets[:, None], step[:, None].to(buffer.dtype))
        del ctx.buffer
        return buffer, None, None


def _chunks(logits: Tensor) -> list[slice]:
    rows = max(1, _CHUNK_ELEMENTS // logits.shape[-1]) if logits.device.type == "cpu" else 4096
    return [slice(i, i + rows) for i in range(0, len(logits), rows)]


def selected_logprobs(logits: Tensor, targets: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Log-probs of the drawn tokens. **Consumes the logits**: their memory holds the gradient afterwards.

    Args:
        logits: [n, vocabulary]; not needed by anybody else.
        targets: [n].
        inverse_temperature: multiplies the logits, [n].

    Returns:
        float32, [n].
    """
    if len(targets) == 0:
        return logits.sum(-1).float()
    selected: Tensor = _SelectedLogSoftmax.apply(logits, targets, inverse_temperature)
    return selected


@torch.no_grad()
def logprobs_and_entropy(
    logits: Tensor, targets: Tensor, inverse_temperature: Tensor
) -> tuple[Tensor, Tensor]:
    """As `selected_logprobs`, without gradient; and the exact entropy of each distribution, in nats, [n]."""
    selected = torch.empty(len(targets), device=logits.device)
    entropy = torch.empty_like(selected)
    for rows in _chunks(logits):
        scaled = logits[rows].float() * inverse_temperature[rows, None]
        scaled -= torch.logsumexp(scaled, -1, keepdim=True)
        selected[rows] = scaled.gather(-1, targets[rows, None]).squeeze(-1)
        entropy[rows] = -torch.linalg.vecdot(scaled.exp(), scaled)
    return selected, entropy


def mean_entropy_with_gradient(logits: Tensor, inverse_temperature: Tensor) -> Tensor:
    """Entropy of each distribution with its gradient, [n], for the entropy bonus."""
    logp = torch.log_softmax(logits.float() * inverse_temperature[:, None], -1)
    return -(logp.exp() * logp).sum(-1)


def model_inputs(micro: MicroBatch, flat: Tensor) -> dict[str, Any]:
    """What every model gets; `flat` are the places whose hidden states will be read."""
    inputs: dict[str, Any] = {
        "input_ids": micro.input_ids,
        "position_ids": micro.position_ids,
        "use_cache": False,
        "slots": flat,
    }
    if micro.attention_mask is None:
        inputs["segments"] = micro.segments
    else:
        inputs["attention_mask"] = micro.attention_mask
    return inputs


def policy_logits(model: nn.Module, micro: MicroBatch, flat: Tensor) -> Tensor:
    """Logits of a causal model at these places only, [n, vocabulary].

    Args:
        model: any causal model of transformers that went through `narrow_last_layer`, perhaps wrapped by
            peft or accelerate.
        micro: the input.
        flat: places in the flattened input, [n].
    """
    if micro.attention_mask is None:
        logits: Tensor = model(**model_inputs(micro, flat), logits_to_keep=flat).logits[0]
        return logits
    # A rectangle: the columns that any row needs, then each row's own.
    width = micro.input_ids.shape[1]
    columns, inverse = torch.unique(flat % width, return_inverse=True)
    kept = model(**model_inputs(micro, flat), logits_to_keep=columns).logits
    picked: Tensor = kept.flatten(0, 1)[flat // width * len(columns) + inverse]
    return picked


class ValueModel(nn.Module):
    """A backbone with a scalar head, as a reward model has: one value for each place asked for."""

    backbone: Any
    head: Any

    def __init__(self, backbone: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    @classmethod
    def from_reward_model(cls, model: Any) -> ValueModel:
        """From a sequence classifier with one label; shares its parameters."""
        backbone = getattr(model, model.base_model_prefix)
        return cls(backbone, model.score)

    @classmethod
    def from_causal_model(cls, model: Any) -> ValueModel:
        """From a causal model's backbone, with a head that starts at zero; shares the backbone."""
        head = nn.Linear(model.config.get_text_config().hidden_size, 1, bias=False)
        nn.init.zeros_(head.weight)
        return cls(getattr(model, model.base_model_prefix), head.to(model.dtype))

    def forward(self, flat: Tensor, **inputs: Any) -> Tensor:
        """float32 values at these places of the flattened input, [n]."""
        hidden = self.backbone(**inputs).last_hidden_state.flatten(0, 1)
        values: Tensor = self.head(hidden.index_select(0, flat)).float().sum(-1)  # FSDP wants no view
        return values


def slot_values(model: nn.Module, micro: MicroBatch) -> Tensor:
    """Values of a micro-batch's slots, [n]."""
    values: Tensor = model(micro.flat, **model_inputs(micro, micro.flat))
    return values


def disable_dropout(model: nn.Module) -> None:
    """For good and in either mode: a policy must give the same log-prob twice."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name in ("attention_dropout", "dropout"):
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)


def enable_checkpointing(model: Any) -> None:
    """Layers forget their activations and compute them again; transformers does so in training mode only."""
    name = "activation_checkpointing_enable"  # transformers 5; before, gradient_checkpointing_enable
    enable = getattr(model, name, None) or model.gradient_checkpointing_enable
    enable()
    if hasattr(model, "enable_input_require_grads") and hasattr(model, "peft_config"):
        model.enable_input_require_grads()
    model.train()


def select_attention(model: Any, *, packed: bool) -> None:
    """Puts packed attention into a model, or the usual kind back."""
    if packed:
        register_packed_attention()
    usual = "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"
    model.set_attn_implementation(PACKED_ATTENTION if packed else usual)


@torch.no_grad()
def can_pack(model: Any, tolerance: float = 1e-3) -> bool:
    """Whether the model gives two packed sequences the logits that they have alone; tries it.

    Leaves the model with packed attention if so, and with the usual one if not. Models whose layers look
    beyond attention (recurrent ones), or that cap or sink their scores, are found out here.
    """
    vocabulary = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    sequences = [torch.randint(0, vocabulary, (n,), generator=generator) for n in (7, 12)]
    try:
        select_attention(model, packed=True)
        segments = tuple(len(s) for s in sequences)
        packed = model(
            input_ids=torch.cat(sequences)[None].to(model.device),
            position_ids=torch.cat([torch.arange(n) for n in segments])[None].to(model.device),
            use_cache=False,
            segments=segments,
            logits_to_keep=torch.arange(sum(segments), device=model.device),
        ).logits[0]
        select_attention(model, packed=False)
        alone = torch.cat(
            [model(input_ids=s[None].to(model.device), use_cache=False).logits[0] for s in sequences]
        )
        worst = float((packed - alone).abs().max() / alone.abs().max().clamp(min=1e-6))
        reason = f"logits differ by {worst:.1e}"
        fits = worst <= tolerance * (1 if packed.dtype == torch.float32 else 50)
    except (BackendUnsupported, TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        fits, reason = False, str(error)
    if not fits:
        logging.getLogger(__name__).warning(
            "%s cannot be packed (%s); answers are padded instead, sorted by length",
            type(model).__name__,
            reason,
        )
    select_attention(model, packed=fits)
    return fits


def places_of_actions(batch: Batch, micro: MicroBatch) -> tuple[Tensor, Tensor]:
    """The micro-batch's slots at which the policy acted, and their places in its input, both [m]."""
    acts = batch.acts[micro.slots.to(batch.acts.device)].to(micro.flat.device)
    return micro.slots[acts], micro.flat[acts]
