"""Several processes as one: rows gathered with their gradients, gradients averaged over ranks.

W ranks give the gradients of one process with the joint batch: each rank's loss is the mean over its own rows with
all ranks' rows as candidates, the gather hands back every rank's gradient with respect to its rows, and parameters'
gradients are averaged. (A gather without gradient, or one that is summed and not averaged, gives another direction or
W times the length.)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn

from pairdr.errors import PairdrError, UsageError
from pairdr.files import hash_json


def count_ranks() -> int:
    """Return W: 1 outside torchrun."""
    return distributed.get_world_size() if _is_parallel() else 1


def find_rank() -> int:
    """Return this process's rank: 0 outside torchrun."""
    return distributed.get_rank() if _is_parallel() else 0


def wait_for_ranks() -> None:
    """Return when every rank has come here."""
    if count_ranks() > 1:
        distributed.barrier()


def agree(flag: bool, device: torch.device) -> bool:
    """Return on every rank whether any rank says so."""
    if count_ranks() == 1:
        return flag
    said = torch.tensor(float(flag), device=device)
    distributed.all_reduce(said, op=distributed.ReduceOp.MAX)
    return bool(said)


def take_from_first(value: float, device: torch.device) -> float:
    """Return the first rank's value on every rank, so that all decide alike."""
    if count_ranks() == 1:
        return value
    said = torch.tensor(value, device=device, dtype=torch.float64)
    distributed.broadcast(said, src=0)
    return float(said)


@contextmanager
def begin_together(device: torch.device, *, first_ahead: bool = False) -> Iterator[None]:
    """Let all ranks fail where one does in the block, so that none waits for another that has ended.

    Args:
        device: of this rank.
        first_ahead: the first rank runs the block before the others do.

    Raises:
        PairdrError: what this rank's block raised, or that another's has failed.
    """
    failure: PairdrError | OSError | None = None
    if first_ahead and find_rank() > 0:
        wait_for_ranks()
    try:
        yield
    except (PairdrError, OSError) as error:
        failure = error
    if first_ahead and find_rank() == 0:
        wait_for_ranks()
    if agree(failure is not None, device):
        raise failure or PairdrError("Another rank could not begin.", remedy="Its own message says why.")


def require_alike(values: Mapping[str, Any], device: torch.device) -> None:
    """Refuse to go on where a rank has another value, such as the fingerprint of its data, than the first one.

    Raises:
        UsageError: on all ranks, naming what differs.
    """
    for name, value in values.items():
        key = float(int(hash_json(value)[:12], 16))  # 48 bits, which a double holds
        if agree(key != take_from_first(key, device), device):
            raise UsageError(
                f"The ranks do not have the same {name}.",
                remedy="Give every machine the same files and options, and one shared output folder.",
            )


@contextmanager
def explain_lost_ranks() -> Iterator[None]:
    """Say in the block what it means that another rank does not answer any more.

    Raises:
        PairdrError: another rank has ended.
    """
    try:
        yield
    except RuntimeError as error:
        if count_ranks() == 1:
            raise
        signs = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out", "timed out")
        network = isinstance(error, distributed.DistBackendError | distributed.DistNetworkError)
        if not network and not any(sign in str(error) for sign in signs):
            raise
        raise PairdrError(
            "Another rank has ended, or cannot be reached.",
            remedy="Its own message says why. The same command on all machines goes on from the newest checkpoint.",
        ) from error


def average_count(count: Tensor) -> Tensor:
    """Return the mean of a count over ranks, as a divisor of at least 1 in all: each rank's share of a joint mean."""
    found = count.float()
    if count_ranks() > 1:
        distributed.all_reduce(found)
    return found.clamp(min=1) / count_ranks()


def gather_rows(local: Tensor) -> Tensor:
    """Return all ranks' rows in rank order, [W*b, ...]; gradients flow back to the rank that each row came from."""
    if count_ranks() == 1:
        return local
    gathered: Tensor = _Gather.apply(local)  # type: ignore[no-untyped-call]
    return gathered


def place_rows(local: Tensor) -> Tensor:
    """Return [W*b, ...] with this rank's rows in their place and zeros elsewhere: the shape of a gather, no traffic."""
    if count_ranks() == 1:
        return local
    blank = torch.zeros_like(local)
    return torch.cat([local if rank == find_rank() else blank for rank in range(count_ranks())])


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Replace every gradient by its mean over ranks; one message per data type."""
    if count_ranks() == 1:
        return
    kinds: dict[torch.dtype, list[nn.Parameter]] = {}
    for parameter in parameters:
        if parameter.requires_grad:
            kinds.setdefault(parameter.dtype, []).append(parameter)
    for group in kinds.values():
        # A parameter that this rank did not use takes part with zeros: the message is equal on all ranks.
        flat = torch.cat([(p.grad if p.grad is not None else torch.zeros_like(p)).flatten() for p in group])
        distributed.all_reduce(flat)
        flat /= count_ranks()
        used = torch.tensor([float(p.grad is not None) for p in group], device=flat.device)
        distributed.all_reduce(used)
        for parameter, part, uses in zip(group, flat.split([p.numel() for p in group]), used.tolist(), strict=True):
            if uses:  # one that no rank used has no gradient, lest the optimizer decay it
                parameter.grad = part.view_as(parameter)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, local: Tensor) -> Tensor:
        context.rows = len(local)
        parts = [torch.empty_like(local) for _ in range(count_ranks())]
        distributed.all_gather(parts, local.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Tensor:
        gradient = gradient.contiguous().clone()
        distributed.all_reduce(gradient)  # each rank has a gradient of its own with respect to these rows
        begin = find_rank() * context.rows
        return gradient[begin : begin + context.rows]


def _is_parallel() -> bool:
    return distributed.is_available() and distributed.is_initialized()
