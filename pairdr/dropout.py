"""Dropout at a fifth of torch's cost on a CPU, drawn from torch's generator.

torch draws one 64-bit number for every element, in one thread; here one 64-bit number makes four 16-bit ones. An
element is dropped with the probability p rounded to the next 2^-16, and what is kept is scaled by the exact inverse,
so the expectation is the input's. Only the seed comes from torch's generator: saving and restoring that
replays the mask. On other devices than the CPU torch's own kernels run.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

ATTENTION = "pairdr"
"""The name under which transformers finds `attend`."""


class Dropout(nn.Dropout):
    """nn.Dropout, with a cheap mask on a CPU."""

    def forward(self, input: Tensor) -> Tensor:
        """Return the input with elements dropped, in training."""
        if not self.training or self.p == 0:
            return input
        if input.device.type != "cpu":
            return F.dropout(input, self.p)
        return input * draw_mask(input, self.p)


def draw_mask(like: Tensor, p: float) -> Tensor:
    """Return a mask of the input's shape and type: 0 with probability p, else 1 / (1 - p)."""
    dropped = round(p * 2**16)
    seed = int(torch.randint(2**62, ()))
    drawn = np.random.SFC64(seed).random_raw((like.numel() + 3) // 4).view(np.int16)[: like.numel()]
    mask = torch.empty(like.shape, dtype=like.dtype)
    torch.ge(torch.from_numpy(drawn).view(like.shape), dropped - 2**15, out=mask)
    return mask.mul_(2**16 / (2**16 - dropped))


@contextmanager
def use_dropout(model: nn.Module, p: float | None) -> Iterator[None]:
    """Give every dropout of a model this probability and the cheap mask while the block runs.

    Args:
        model: a sentence-transformers or transformers model; afterwards it is as it was.
        p: the probability; None leaves each module's own.
    """
    replaced: list[tuple[nn.Module, str, nn.Dropout]] = []
    configs: list[Any] = []
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Dropout:
                replaced.append((module, name, child))
                setattr(module, name, Dropout(child.p if p is None else p).train(child.training))
        config = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            configs.append(config)
    if configs:
        _register_attention()
    for config in configs:
        config._attn_implementation = ATTENTION
    try:
        yield
    finally:
        for module, name, child in replaced:
            setattr(module, name, child)
        for config in configs:
            config._attn_implementation = "sdpa"


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention as transformers calls it: torch's fused kernel, and with dropout on a CPU the formula itself.

    Args:
        module: the layer that asks.
        query: [n, heads, L, d].
        key: [n, heads, L, d].
        value: [n, heads, L, d].
        attention_mask: [n, 1, L, L] bool, True where a token may be seen; None where all may.
        dropout: the probability that an attention weight is dropped.
        scaling: multiplies the scores; unset: 1 / sqrt(d).
        **options: what transformers hands to its own kernel.

    Returns:
        [n, L, heads, d], and no weights.
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    unmasked = attention_mask is None and causal
    plain = options.get("position_bias") is None and not unmasked and query.shape == key.shape
    if dropout == 0 or query.device.type != "cpu" or not plain:
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
        return found
    scores = query * (scaling or query.shape[-1] ** -0.5) @ key.transpose(2, 3)  # [n, heads, L, L]
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    weights = F.softmax(scores, dim=-1)
    return (weights * draw_mask(weights, dropout) @ value).transpose(1, 2).contiguous(), None


def _register_attention() -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(ATTENTION, attend)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
