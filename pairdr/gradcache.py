"""Gradients of a large batch in the memory of a small one (Gao et al., Scaling Deep Contrastive Learning, 2021).

A loss of embeddings needs all of a batch's vectors at once, but not all of their graphs: embed chunk by chunk without
graphs, take the loss's gradient with respect to the vectors, then embed each chunk again, with its graph and the same
dropout, and push that gradient through. Exact for any loss that sees the encoder only through its vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

Chunk = TypeVar("Chunk")
Result = TypeVar("Result")


def backward_cached(
    chunks: Sequence[Chunk],
    embed: Callable[[Chunk], Tensor],
    backward: Callable[[Tensor], Result],
) -> Result:
    """Add the gradients of a loss over all chunks' vectors to the parameters, holding one chunk's graph at a time.

    Args:
        chunks: parts of the batch.
        embed: chunk to vectors [n, D]; may be random, through torch's generators.
        backward: takes the vectors of all chunks [N, D], in order, computes the loss and calls its `backward`.

    Returns:
        What `backward` returned.
    """
    states, parts = [], []
    with torch.no_grad():
        for chunk in chunks[:-1]:
            states.append(save_random_state())
            parts.append(embed(chunk))
    last = embed(chunks[-1])  # the graph that is held meanwhile: this chunk needs no second pass
    vectors = torch.cat([*parts, last.detach()]).requires_grad_()  # [N, D], a leaf
    result = backward(vectors)
    after = save_random_state()
    assert vectors.grad is not None
    *gradients, of_last = vectors.grad.split([len(part) for part in (*parts, last)])
    torch.autograd.backward(last, of_last)
    for chunk, state, gradient in zip(chunks[:-1], states, gradients, strict=True):
        restore_random_state(state)
        torch.autograd.backward(embed(chunk), gradient)
    restore_random_state(after)
    return result


def save_random_state() -> list[Tensor]:
    """Return the states of torch's generators: the CPU's, then each GPU's that was used."""
    return [torch.get_rng_state(), *(torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else ())]


def restore_random_state(states: Sequence[Tensor]) -> None:
    """Set torch's generators to states that `save_random_state` returned."""
    torch.set_rng_state(states[0])
    for device, state in enumerate(states[1:]):
        torch.cuda.set_rng_state(state, device)
