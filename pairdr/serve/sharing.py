"""One encoder for everybody: questions, texts to embed, passages that are written."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from pairdr.records import Passage
from pairdr.tokens import Contract, Tokens

if TYPE_CHECKING:
    from pairdr.backends import Encoder

Clock = Callable[[str], AbstractContextManager[None]]
"""Measures the stage that its block is."""


class SharedEncoder:
    """An encoder whose time is taken, used by one thread at a time: tokenizers of transformers bear no more.

    Args:
        encoder: is shared.
        clock: takes its time.
        most: passages that are encoded in one go; between two goes comes who waits.
    """

    def __init__(self, encoder: Encoder, clock: Clock, most: int) -> None:
        self._encoder, self._clock, self._most = encoder, clock, most
        self._turn, self._lock = threading.Lock(), threading.Lock()
        self.contract: Contract = encoder.contract
        self.device, self.noise, self.fingerprint = encoder.device, encoder.noise, encoder.fingerprint

    def encode_queries(self, texts: Sequence[str], tokens_per_batch: int | None = None) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of questions."""
        with self._wait(), self._clock("encode"):
            return self._encoder.encode_queries(texts, tokens_per_batch)

    def encode_passages(
        self, passages: Sequence[Passage], tokens_per_batch: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of passages."""
        made = []
        for start in range(0, max(len(passages), 1), self._most):
            with self._wait(), self._clock("encode"):
                part = passages[start : start + self._most]
                made.append(self._encoder.encode_passages(part, tokens_per_batch))
        return np.concatenate(made)

    def tokenize_queries(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of questions."""
        with self._wait():
            return self._encoder.tokenize_queries(texts)

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[Tokens]:
        """Return the tokens of passages."""
        with self._wait():
            return self._encoder.tokenize_passages(passages)

    @contextmanager
    def _wait(self) -> Iterator[None]:
        """Wait for the encoder. Who waits has the turn: who gives the encoder back cannot take it again before."""
        with self._turn:
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()
