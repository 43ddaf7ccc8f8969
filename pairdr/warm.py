"""Turn a start model that is not yet a retriever into one that can mine: L_Q on the labels with BM25 negatives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

from pairdr.artefact import publish
from pairdr.collection import Collection
from pairdr.config import StageConfig, TrainConfig, WarmConfig
from pairdr.encoder import DualEncoder
from pairdr.formats import write_examples
from pairdr.lexical import LexicalIndex
from pairdr.mine import is_near_copy
from pairdr.records import Example, positives_of
from pairdr.train import train_model

NEGATIVES = 4


def warm_student(
    collection: Collection,
    index: LexicalIndex,
    start: str | Path,
    warm: WarmConfig,
    config: TrainConfig,
    output: str | Path,
    *,
    device: str | None = None,
) -> DualEncoder:
    """Train the model that mines (RocketQA, step 1), and publish it with its examples beside it.

    Args:
        collection: the data.
        index: BM25, which gives the negatives.
        start: a model folder that pairdr saved.
        warm: how many steps.
        config: batch, optimizer, schedule.
        output: the model's folder; the examples stand at `<output>.examples`.
        device: cpu, cuda, ...; unset picks the best there is.
    """
    examples = Path(f"{output}.examples")
    inputs = {"collection": collection.fingerprint, "bm25": index.fingerprint}
    with publish(examples, "examples", options={"negatives": NEGATIVES}, inputs=inputs) as staging:
        staging.facts["plain"] = write_examples(staging.path / "plain.arrow", _label_with_words(collection, index))
    stage = StageConfig("warm", 0.0, ("plain",))
    return train_model(
        collection, examples, start, (stage,), replace(config, max_steps=warm.warm_steps), output, device=device
    )


def _label_with_words(collection: Collection, index: LexicalIndex) -> Iterator[Example]:
    qrels = collection.qrels("train")
    for query_id in qrels:
        positives = positives_of(qrels, query_id)
        rows, _ = index.search(collection.query(query_id).text, 4 * NEGATIVES + len(positives))
        usable = (p for p in collection.passages.ids_of(rows) if p not in positives and p not in collection.held_out)
        found = list(islice((p for p in usable if not is_near_copy(collection, p, positives)), NEGATIVES))
        for positive in positives:
            yield Example(query_id, positive, tuple(found), positives, "labelled", math.nan, (math.nan,) * len(found))
