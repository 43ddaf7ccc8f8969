"""BM25 over a collection: bm25s with our tokens, saved beside the vectors."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import bm25s
import numpy as np
import numpy.typing as npt

from pairdr.artefact import publish, read_manifest
from pairdr.collection import Collection
from pairdr.config import LexicalConfig
from pairdr.errors import UsageError
from pairdr.indexes.exact import select_top

_WORD = re.compile(r"(?u)\b\w\w+\b")
_NAME_BORDER = re.compile(r"_+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)")


class _Tokenized(NamedTuple):
    """The form in which bm25s takes token ids."""

    ids: list[list[int]]
    vocab: dict[str, int]


class LexicalIndex:
    """BM25 scores of a collection's passages, by row.

    Attributes:
        count: N.
        id_rank: [N] rank of each row's id, for ties.
        fingerprint: of the saved index.
    """

    def __init__(self, folder: str | Path) -> None:
        manifest = read_manifest(folder, "bm25")
        self.folder, self.fingerprint = Path(folder), manifest.fingerprint
        self.config = LexicalConfig(**manifest.options)
        self.id_rank: npt.NDArray[np.int64] = np.load(self.folder / "rank.npy", mmap_mode="r")
        self.count = len(self.id_rank)
        self._bm25 = bm25s.BM25.load(str(self.folder), mmap=True, show_progress=False)
        self._tokenize = Tokenizer(self.config)

    def score_all(self, text: str) -> npt.NDArray[np.float32]:
        """Return the scores [N] of all passages for one question."""
        known = [token for token in self._tokenize(text) if token in self._bm25.vocab_dict]
        if not known:
            return np.zeros(self.count, dtype=np.float32)
        return np.asarray(self._bm25.get_scores(known), dtype=np.float32)

    def search(self, text: str, k: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Return the rows and scores of the k best passages that share a word with the question, best first."""
        scores = self.score_all(text)
        rows = select_top(scores[None], self.id_rank, k)[0]
        rows = rows[scores[rows] > 0]
        rows = rows[np.lexsort((self.id_rank[rows], -scores[rows]))]
        return rows, scores[rows]


def index_words(collection: Collection, config: LexicalConfig, output: str | Path) -> LexicalIndex:
    """Build and publish the BM25 index of a collection's passages (title and text)."""
    tokenize = Tokenizer(config)
    vocabulary: dict[str, int] = {}
    rows = [
        [vocabulary.setdefault(token, len(vocabulary)) for token in tokenize(passage.joined)]
        for passage in _read_all(collection)
    ]
    inputs = {"passages": collection.passages_fingerprint}
    with publish(output, "bm25", options=asdict(config), inputs=inputs) as staging:
        index = bm25s.BM25(k1=config.k1, b=config.b)
        vocabulary.setdefault("", len(vocabulary))
        index.index(_Tokenized(rows, vocabulary), show_progress=False)
        index.save(str(staging.path), show_progress=False)
        np.save(staging.path / "rank.npy", np.asarray(collection.passages.id_rank), allow_pickle=False)
        staging.facts |= {"passages": len(rows), "words": len(vocabulary) - 1}
    return LexicalIndex(output)


class Tokenizer:
    """Turns a text into stemmed words: `Tokenizer(config)(text)`."""

    def __init__(self, config: LexicalConfig) -> None:
        self._split_names = config.split_names
        self._stem: Any = None
        self._stop: frozenset[str] = frozenset()
        if config.language != "none":
            import Stemmer
            from bm25s.tokenization import _infer_stopwords

            if config.language not in Stemmer.algorithms():
                raise UsageError(
                    f"No stemmer for {config.language!r}.",
                    remedy=f"There are: none, {', '.join(Stemmer.algorithms())}.",
                )
            self._stem = Stemmer.Stemmer(config.language)
            try:
                self._stop = frozenset(_infer_stopwords(config.language))
            except ValueError:
                self._stop = frozenset()

    def __call__(self, text: str) -> list[str]:
        """Return the words of a text."""
        words = [part for word in _WORD.findall(text) for part in self._split(word)]
        kept = [word for word in (w.lower() for w in words) if word not in self._stop]
        return list(self._stem.stemWords(kept)) if self._stem is not None else kept

    def _split(self, word: str) -> list[str]:
        if not self._split_names:
            return [word]
        parts = [part for part in _NAME_BORDER.split(word) if part]
        return parts if len(parts) > 1 else [word]


def _read_all(collection: Collection) -> Iterator[Any]:
    for block in collection.read_passages():
        yield from block
