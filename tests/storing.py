"""What the tests of the vector store share: an encoder that hashes words, passages, and a collection of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from pairdr.collection import Collection, open_collection
from pairdr.config import EncodeConfig
from pairdr.ids import hash_text
from pairdr.records import Passage
from pairdr.tokens import Contract
from pairdr.vectors import VectorStore

SIZE = 16
SMALL = EncodeConfig(shard_size=8)


class WordEncoder:
    """An encoder whose vectors are sums of drawn vectors of the words; it counts what it encodes."""

    device, noise = "cpu", 1e-6
    contract = Contract("", "", 32, 32, "mean", "cosine", "join", SIZE)

    def __init__(self, name: str = "words") -> None:
        self.fingerprint = f"{hash_text(name):064x}"
        self.encoded: list[str] = []

    def encode_queries(self, texts: Sequence[str], tokens_per_batch: int | None = None) -> np.ndarray:
        found = np.zeros((len(texts), SIZE), dtype=np.float32)
        for row, text in enumerate(texts):
            for word in text.split() or [""]:
                found[row] += np.random.default_rng(hash_text(self.fingerprint + word)).standard_normal(SIZE)
        return found / np.linalg.norm(found, axis=1, keepdims=True)

    def encode_passages(self, passages: Sequence[Passage], tokens_per_batch: int | None = None) -> np.ndarray:
        self.encoded += [passage.passage_id for passage in passages]
        return self.encode_queries([passage.joined for passage in passages])


def make_texts(count: int, first: int = 0) -> dict[str, str]:
    """Return texts by id; every third is a copy of another, so that scores tie."""
    return {f"p{number:03d}": f"word{number % 3 and number} town{number % 7}" for number in range(first, first + count)}


def write_collection(folder: Path, texts: Mapping[str, str]) -> Collection:
    """Write a corpus in BEIR form and open it."""
    import json

    folder.mkdir(parents=True, exist_ok=True)
    rows = [json.dumps({"_id": passage_id, "text": text}) for passage_id, text in texts.items()]
    (folder / "corpus.jsonl").write_text("\n".join(rows) + "\n", encoding="utf-8")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "word1"}\n', encoding="utf-8")
    (folder / "qrels").mkdir(exist_ok=True)
    (folder / "qrels" / "test.tsv").write_text(
        f"query-id\tcorpus-id\tscore\nq\t{next(iter(texts))}\t1\n", encoding="utf-8"
    )
    return open_collection(folder)


def to_passages(texts: Mapping[str, str]) -> list[Passage]:
    return [Passage(passage_id, "", text) for passage_id, text in texts.items()]


def read_texts(store: VectorStore) -> dict[str, str]:
    """Return the live texts of a store by id."""
    return {p.passage_id: p.text for block in store.read_passages(5) for p in block}
