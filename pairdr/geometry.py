"""Where questions, their passages and wrong passages lie, for the start model and for those trained from it.

PAIR's second relation asks that a passage be nearer to its question than to a wrong passage: s(q,p+) > s(p+,p-). How
often that fails is measured on triples of dev, the same for every model, from the vectors that are stored already.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from pairdr.collection import Collection
from pairdr.errors import DataError
from pairdr.records import Run, positives_of
from pairdr.store_config import ReportConfig
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.backends import Encoder

SIMILARITIES = ("s(q,p+)", "s(q,p-)", "s(p+,p-)")
BINS = 40
RARE = 0.1
"""Share of triples up to which the passage-centric relation is taken to hold already: a border by judgement. The study
(docs/results.md) saw no gain at 80 %, so it parts "nothing to do" from "perhaps", not from "yes"."""


class Triple(NamedTuple):
    """A dev query, a passage that answers it, and candidates that are not known to."""

    query_id: str
    positive_id: str
    negative_ids: tuple[str, ...]


@dataclass(frozen=True)
class ModelGeometry:
    """The similarities of one model.

    Attributes:
        model: its name in the work folder.
        means: of each of `SIMILARITIES`.
        query_violations: share of pairs (q, p-) with s(q,p+) < s(q,p-): the query-centric relation fails.
        passage_violations: share of pairs with s(q,p+) < s(p+,p-): the passage-centric relation fails.
        counts: of each of `SIMILARITIES`, per bin.
    """

    model: str
    means: dict[str, float]
    query_violations: float
    passage_violations: float
    counts: dict[str, list[int]]


@dataclass(frozen=True)
class Geometry:
    """The similarities of all models on the same triples.

    Attributes:
        queries: dev queries that were measured.
        pairs: (q, p-) over all of them.
        similarity: cosine or dot.
        edges: of the histograms' bins, the same for all.
        models: in the order of the table, the start model first.
    """

    queries: int
    pairs: int
    similarity: str
    edges: list[float]
    models: tuple[ModelGeometry, ...]


def measure_geometry(
    work: Path, collection: Collection, ranked: Run, models: Sequence[str], config: ReportConfig, device: str | None
) -> Geometry:
    """Measure s(q,p+), s(q,p-) and s(p+,p-) of models on triples of dev.

    Args:
        work: the work folder, with `models/` and `vectors/`.
        collection: the data.
        ranked: candidates of the dev queries.
        models: names in the work folder.
        config: how many queries and negatives, and the seed of the sample.
        device: that encodes the queries; None picks the best there is.

    Raises:
        DataError: no dev query has a positive and a candidate that is none.
        ArtefactError: a model or its vectors are not there, or do not fit each other.
    """
    from pairdr.backends import open_encoder

    triples = draw_triples(collection, ranked, config)
    if not triples:
        raise DataError("No dev query has a labelled passage and a candidate beside it.", remedy="Check the labels.")
    measured = {}
    for model in models:
        store = VectorStore(work / "vectors" / model)
        measured[model] = measure_triples(triples, collection, open_encoder(work / "models" / model, device), store)
    every = np.concatenate([values for found in measured.values() for values in found])
    edges = np.histogram_bin_edges(every, BINS)
    rows = tuple(_summarise(model, found, edges) for model, found in measured.items())
    return Geometry(len(triples), len(next(iter(measured.values()))[0]), store.similarity, edges.tolist(), rows)


def describe_relation(
    collection: Collection, ranked: Run, encoder: Encoder, store: VectorStore, config: ReportConfig = ReportConfig()
) -> str:
    """Say, before anything is trained, how often the passage-centric relation fails, and what that promises.

    Args:
        collection: the data.
        ranked: candidates of the dev queries.
        encoder: the model that training starts from.
        store: its vectors of the passages.
        config: how many queries and negatives, and the seed of the sample.

    Raises:
        ArtefactError: the vectors are not this encoder's.
        DataError: a passage has no vector.
    """
    triples = draw_triples(collection, ranked, config)
    if not triples:
        return "s(q,p+) > s(p+,p-) cannot be looked at: no dev query has a labelled passage and a candidate beside it"
    positive, _, between = measure_triples(triples, collection, encoder, store)
    return say_relation(float((positive < between).mean()), len(positive))


def say_relation(violations: float, pairs: int) -> str:
    """Return one sentence on the share of triples in which the passage-centric relation fails before training."""
    promise = (
        "little is left for the passage-centric loss to do"
        if violations <= RARE
        else "the passage-centric loss has work to do, which promises no gain (docs/results.md: none at 80 %)"
    )
    return f"s(q,p+) > s(p+,p-) fails in {violations:.1%} of {pairs:,} dev triples before training: {promise}"


def draw_triples(collection: Collection, ranked: Run, config: ReportConfig) -> list[Triple]:
    """Return a seeded sample of dev queries, each with its first labelled passage and its best other candidates."""
    dev = collection.qrels("dev")
    triples = []
    for query_id in sorted(set(dev) & set(ranked)):
        positives = positives_of(dev, query_id)
        others = [hit.passage_id for hit in ranked[query_id] if hit.passage_id not in positives]
        if positives and others:
            triples.append(Triple(query_id, positives[0], tuple(others[: config.report_negatives])))
    chosen = random.Random(config.report_seed).sample(triples, min(config.report_queries, len(triples)))
    return sorted(chosen)


def measure_triples(
    triples: Sequence[Triple], collection: Collection, encoder: Encoder, store: VectorStore
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Return s(q,p+), s(q,p-) and s(p+,p-), [P] each, one value per pair of a query and a negative.

    Raises:
        ArtefactError: the vectors are not this encoder's.
        DataError: a passage has no vector.
    """
    store.require_encoder(encoder.fingerprint)
    which = np.repeat(np.arange(len(triples)), [len(triple.negative_ids) for triple in triples])  # [P]
    queries = encoder.encode_queries([collection.query(triple.query_id).text for triple in triples])  # [Q, D]
    positives = _take(store, [triple.positive_id for triple in triples])  # [Q, D]
    negatives = _take(store, [passage_id for triple in triples for passage_id in triple.negative_ids])  # [P, D]
    return (
        np.einsum("pd,pd->p", queries[which], positives[which]),
        np.einsum("pd,pd->p", queries[which], negatives),
        np.einsum("pd,pd->p", positives[which], negatives),
    )


def _take(store: VectorStore, passage_ids: Sequence[str]) -> npt.NDArray[np.float32]:
    rows = store.rows_of(passage_ids)
    if (rows < 0).any():
        missing = passage_ids[int(np.argmin(rows))]
        raise DataError(f"The passage {missing!r} has no vector.", path=store.folder, remedy="Encode the corpus again.")
    return store.take(rows)


def _summarise(
    model: str,
    found: tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]],
    edges: npt.NDArray[np.float64],
) -> ModelGeometry:
    positive, negative, between = found
    return ModelGeometry(
        model,
        {name: float(values.mean()) for name, values in zip(SIMILARITIES, found, strict=True)},
        float((positive < negative).mean()),
        float((positive < between).mean()),
        {name: np.histogram(values, edges)[0].tolist() for name, values in zip(SIMILARITIES, found, strict=True)},
    )
