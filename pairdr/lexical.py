"""BM25 over a collection or the passages of a vector store: bm25s with our tokens, saved beside the vectors."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import bm25s
import numpy as np
import pyarrow as pa

from pairdr.artefact import Manifest, publish, read_whole
from pairdr.config import LexicalConfig
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.ids import IdIndex, hash_text, write_id_index
from pairdr.indexes.exact import Allowed, Rows, Scores, select_top
from pairdr.records import Passage
from pairdr.rows import RowReader

_TABLE = "passages"
_SCHEMA = pa.schema([("id", pa.large_string()), ("metadata", pa.large_string())])
_WORD = re.compile(r"(?u)\b\w\w+\b")
_NAME_BORDER = re.compile(r"_+|(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|(?<=\d)(?=[^\W\d])|(?<=[^\W\d])(?=\d)")


class _Tokenized(NamedTuple):
    """The form in which bm25s takes token ids."""

    ids: list[list[int]]
    vocab: dict[str, int]


class PassageSource(Protocol):
    """What can be indexed: a `Collection`, or a `VectorStore`, whose live passages have texts of their own."""

    passages_fingerprint: str

    def read_passages(self) -> Iterator[list[Passage]]:
        """Yield the passages in order, a block at a time."""


class LexicalIndex:
    """BM25 scores of passages, by row, in the order in which their source has them.

    Attributes:
        count: N.
        metadata: [N] of each passage.
        id_rank: [N] rank of each row's id, for ties.
        fingerprint: of the saved index.
        passages_fingerprint: of what was indexed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        read_whole(folder, "bm25", self._open)

    def _open(self, manifest: Manifest) -> None:
        self.fingerprint = manifest.fingerprint
        self.config = LexicalConfig(**manifest.options)
        self.passages_fingerprint = manifest.inputs["passages"]
        with pa.memory_map(str(self.folder / f"{_TABLE}.arrow")) as source:
            passages = pa.ipc.open_file(source).read_all()
        self.metadata, self.count, self._rows = passages["metadata"], passages.num_rows, RowReader([passages])
        self._index = IdIndex(self.folder, _TABLE, passages["id"])
        self.id_rank: Rows = self._index.rank
        self._bm25 = bm25s.BM25.load(str(self.folder), mmap=True, show_progress=False)
        self._tokenize = Tokenizer(self.config)

    def score_all(self, text: str) -> Scores:
        """Return the scores [N] of all passages for one question."""
        known = [token for token in self._tokenize(text) if token in self._bm25.vocab_dict]
        if not known:
            return np.zeros(self.count, dtype=np.float32)
        return np.asarray(self._bm25.get_scores(known), dtype=np.float32)

    def ids_of(self, rows: Rows) -> list[str]:
        """Return the passage ids of rows."""
        return [str(row[0]) for row in self._rows.take(rows, ("id",))]

    def rows_of(self, passage_ids: Sequence[str]) -> Rows:
        """Return the row of each id.

        Raises:
            DataError: no passage has one of them.
        """
        rows = self._index.find_rows(passage_ids)
        if (rows < 0).any():
            raise DataError(
                f"BM25 does not know the passage {passage_ids[int(np.argmin(rows))]!r}.",
                path=self.folder,
                remedy="Index the words of the same passages.",
            )
        return rows

    def require_passages(self, fingerprint: str) -> None:
        """Refuse to stand beside vectors of other passages.

        Raises:
            ArtefactError: the corpus has changed since.
        """
        if fingerprint != self.passages_fingerprint:
            raise ArtefactError(
                "The passages have changed since their words were indexed.",
                path=self.folder,
                remedy="Run pairdr index-words, or pairdr run again.",
            )

    def search(self, text: str, k: int, allowed: Allowed | None = None) -> tuple[Rows, Scores]:
        """Return the rows and scores of the k best passages that share a word with the question, best first.

        Args:
            text: the question.
            k: how many.
            allowed: [N] rows that may be found; None is all.
        """
        scores = self.score_all(text)
        if allowed is not None:
            scores[~allowed] = 0
        rows = select_top(scores[None], self.id_rank, k)[0]
        rows = rows[scores[rows] > 0]
        rows = rows[np.lexsort((self.id_rank[rows], -scores[rows]))]
        return rows, scores[rows]


def index_words(source: PassageSource, config: LexicalConfig, output: str | Path) -> LexicalIndex:
    """Build and publish the BM25 index of passages (title and text)."""
    tokenize = Tokenizer(config)
    vocabulary: dict[str, int] = {}
    rows, blocks = [], []
    for block in source.read_passages():
        rows += [[vocabulary.setdefault(token, len(vocabulary)) for token in tokenize(p.joined)] for p in block]
        blocks.append(pa.table([[p.passage_id for p in block], [p.metadata for p in block]], schema=_SCHEMA))
    passages = pa.concat_tables([_SCHEMA.empty_table(), *blocks])
    inputs = {"passages": source.passages_fingerprint}
    with publish(output, "bm25", options=asdict(config), inputs=inputs) as staging:
        index = bm25s.BM25(k1=config.k1, b=config.b)
        vocabulary.setdefault("", len(vocabulary))
        index.index(_Tokenized(rows, vocabulary), show_progress=False)
        index.save(str(staging.path), show_progress=False)
        with pa.OSFile(str(staging.path / f"{_TABLE}.arrow"), "wb") as sink, pa.ipc.new_file(sink, _SCHEMA) as writer:
            writer.write_table(passages)
        hashes = np.fromiter(map(hash_text, passages["id"].to_pylist()), dtype=np.uint64, count=len(rows))
        write_id_index(staging.path, _TABLE, passages["id"], hashes)
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
