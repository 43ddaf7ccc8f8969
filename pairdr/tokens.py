"""What an encoder reads: the contract between training and every later use, and texts grouped into forward passes.

Knows no model and no library that runs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal, NamedTuple

from pairdr.config import ModelConfig
from pairdr.errors import UsageError
from pairdr.records import Passage

FORWARD_COST = {"cpu": 64, "cuda": 4096}
"""What a forward pass costs in padded tokens: its calls, and products that are too small. The GPU's is a guess."""

TOKENS_PER_BATCH = {"cpu": 1024, "cuda": 32768}
"""Padded tokens of a pass that encodes, where nobody says otherwise. On a CPU passes that stay in a core's cache
measured best; the GPU's is a guess."""

Side = Literal["query", "passage"]


class Tokens(NamedTuple):
    """One tokenised text."""

    input_ids: list[int]
    token_type_ids: list[int]


@dataclass(frozen=True)
class Contract:
    """What has to be the same in training and in every later use of a model."""

    query_prefix: str
    passage_prefix: str
    query_length: int
    passage_length: int
    pooling: str
    similarity: str
    title: Literal["join", "segment"]
    dimensions: int
    towers: str = "tied"

    def form_queries(self, texts: Sequence[str]) -> list[str]:
        """Return the strings that are tokenised for questions."""
        return [self.query_prefix + text for text in texts]

    def form_passages(self, passages: Sequence[Passage]) -> tuple[list[str], list[str] | None]:
        """Return the strings that are tokenised for passages.

        With `title = "segment"` title and text are a pair, cut longest first; else they are one string.
        """
        if self.title == "segment":
            return [self.passage_prefix + (p.title or "-") for p in passages], [p.text for p in passages]
        return [self.passage_prefix + p.joined for p in passages], None


def require_contract(contract: Contract, temperature: float, config: ModelConfig, name: str) -> None:
    """Refuse options that a saved model's contract does not have.

    Raises:
        UsageError: naming the option, what was asked for and what the model has.
    """
    plain = ModelConfig()
    for option in fields(config):
        asked = getattr(config, option.name)
        if option.name in ("start", "device") or asked == getattr(plain, option.name):
            continue
        kept = temperature if option.name == "temperature" else getattr(contract, option.name, None)
        if asked != kept:
            raise UsageError(
                f"Option {option.name} is {asked!r}, but this model was saved with {kept!r}.",
                path=name,
                remedy="Leave the option out, or start from the model that this one was made from.",
            )


def plan_forwards(lengths: Sequence[int], tokens_per_forward: int, device: str = "cpu") -> list[list[int]]:
    """Group texts by length into forward passes, so that padding and the number of passes cost least together.

    Args:
        lengths: tokens of each text.
        tokens_per_forward: the most padded tokens of one pass; a single longer text may exceed it.
        device: its kind says what a pass costs.

    Returns:
        Places in `lengths`, shortest texts first. A function of its arguments alone.
    """
    places: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        places.setdefault(length, []).append(place)
    widths = sorted(places)
    # cheapest[i]: the least cost of all texts up to width i, and where the last group of that plan begins.
    cheapest: list[tuple[int, int]] = [(0, 0)]
    for end, width in enumerate(widths, start=1):
        count, best = 0, (-1, 0)
        for begin in range(end - 1, -1, -1):
            count += len(places[widths[begin]])
            cost = cheapest[begin][0] + count * width + FORWARD_COST.get(device, 64)
            if best[0] < 0 or cost < best[0]:
                best = (cost, begin)
        cheapest.append(best)
    groups: list[list[int]] = []
    end = len(widths)
    while end:
        begin = cheapest[end][1]
        texts = [place for width in widths[begin:end] for place in places[width]]
        size = max(1, tokens_per_forward // max(1, widths[end - 1]))
        groups.extend(texts[at : at + size] for at in reversed(range(0, len(texts), size)))
        end = begin
    return groups[::-1]
