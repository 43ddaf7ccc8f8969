"""The gate of an export: how far its vectors and its rankings are from those of the model it was made from."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pairdr.backends import Encoder
from pairdr.collection import Collection
from pairdr.errors import DataError, RefusedError
from pairdr.indexes.exact import search_exact
from pairdr.measures import find_interval, measure_run
from pairdr.records import Passage, Qrels, Query, Run, positives_of
from pairdr.store_config import ExportConfig

LEAST_COSINE = {"fp32": 0.9999, "int8": 0.95}
"""Below it an export is broken, whatever the questions say: least over all texts in fp32, mean in int8."""
MEASURE = "nDCG@10"
DEPTH = 10

_SENTENCES = (
    "The river rises in the hills and runs through the town.",
    "How do I parse a date?",
    "Café, naïve, Zürich: 東京 и Москва, 42 °C & 7 %.",
    "def read_lines(path): return open(path).read().splitlines()",
    "market day",
)


class Sample(NamedTuple):
    """The texts that an export is judged on; without labels only the vectors are compared."""

    queries: list[Query]
    passages: list[Passage]
    qrels: Qrels


def make_sample() -> Sample:
    """Return texts for an export without data: short, long, empty, of several scripts."""
    texts = ["", "a", *_SENTENCES, *(" ".join(_SENTENCES * times) for times in (1, 2, 5, 40))]
    queries = [Query(str(number), text) for number, text in enumerate(texts)]
    titles = ["", "A title", " ".join(_SENTENCES * 3)]
    passages = [Passage(f"{n} {m}", title, text) for n, title in enumerate(titles) for m, text in enumerate(texts)]
    return Sample(queries, passages, {})


def draw_sample(collection: Collection, config: ExportConfig) -> Sample:
    """Draw dev queries, their positives, and passages at random beside them.

    Raises:
        DataError: no dev query has a positive.
    """
    dev = collection.qrels("dev")
    rng = random.Random(config.export_seed)
    answered = sorted(query_id for query_id in dev if positives_of(dev, query_id))
    if not answered:
        raise DataError("No dev query has a relevant passage.", path=collection.source, remedy="Check qrels/dev.tsv.")
    query_ids = sorted(rng.sample(answered, min(config.export_queries, len(answered))))
    needed = {passage_id for query_id in query_ids for passage_id in positives_of(dev, query_id)}
    count = min(max(0, config.export_passages - len(needed)), len(collection.passages))
    rows = rng.sample(range(len(collection.passages)), count)
    passage_ids = sorted(needed.union(collection.passages.id_of(row) for row in rows))
    return Sample(
        [collection.query(query_id) for query_id in query_ids],
        [collection.passage(passage_id) for passage_id in passage_ids],
        {query_id: dev[query_id] for query_id in query_ids},
    )


def judge_export(model: Encoder, export: Encoder, sample: Sample, config: ExportConfig) -> dict[str, Any]:
    """Compare an export with the model it was made from.

    Returns:
        cosine_mean and cosine_min over all texts; where the sample has labels also nDCG@10 of both on dev, the loss,
        the 95 % interval of its mean over questions (paired bootstrap), and the mean overlap of the first ten.
    """
    texts = [query.text for query in sample.queries]
    vectors = [(encoder.encode_queries(texts), encoder.encode_passages(sample.passages)) for encoder in (model, export)]
    (queries, passages), (other_queries, other_passages) = vectors
    cosines = np.concatenate([_compare_rows(queries, other_queries), _compare_rows(passages, other_passages)])
    found: dict[str, Any] = {
        "cosine_mean": float(cosines.mean()),
        "cosine_min": float(cosines.min()),
        "queries": len(sample.queries),
        "passages": len(sample.passages),
    }
    if not sample.qrels:
        return found
    runs = [_rank(sample, *pair) for pair in vectors]
    first, second = (measure_run(run, sample.qrels, [MEASURE])[MEASURE] for run in runs)
    lost = np.array([first[query_id] - second[query_id] for query_id in first])
    low, high = find_interval(lost, seed=config.export_seed)
    return found | {
        "ndcg_model": float(np.mean(list(first.values()))),
        "ndcg_export": float(np.mean(list(second.values()))),
        "loss": float(lost.mean()),
        "loss_low": low,
        "loss_high": high,
        "overlap": _overlap(*runs),
    }


def refuse_loss(found: Mapping[str, Any], precision: str, config: ExportConfig) -> None:
    """Refuse an export whose vectors or rankings are too far from the model's.

    Raises:
        RefusedError: naming what was measured and what is allowed.
    """
    name = "cosine_min" if precision == "fp32" else "cosine_mean"
    least = LEAST_COSINE[precision]
    if not found[name] >= least:  # a vector that is no number fails too
        raise RefusedError(
            f"The export's vectors are not the model's: {name} is {found[name]:.6f}, at least {least} is wanted.",
            remedy="Nothing was written. Keep the model as it is; export with another --to.",
        )
    if found.get("loss", 0.0) > config.allowed_loss:
        raise RefusedError(
            f"The export loses {found['loss']:.4f} {MEASURE} on {found['queries']} dev queries "
            f"({found['ndcg_model']:.4f} to {found['ndcg_export']:.4f}; 95 % interval of the loss "
            f"{found['loss_low']:.4f} to {found['loss_high']:.4f}); {config.allowed_loss} is allowed.",
            remedy="Nothing was written. Export in fp32, raise calibration_texts, or raise allowed_loss.",
        )


def _compare_rows(one: npt.NDArray[np.float32], other: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Return the cosine of each row of [n, D] with the same row of the other."""
    left, right = one.astype(np.float64), other.astype(np.float64)
    found: npt.NDArray[np.float64] = (left * right).sum(axis=1) / (
        np.linalg.norm(left, axis=1) * np.linalg.norm(right, axis=1)
    )
    return found


def _rank(sample: Sample, queries: npt.NDArray[np.float32], passages: npt.NDArray[np.float32]) -> Run:
    k = min(DEPTH, len(passages))
    rows, scores = search_exact(queries, [(0, passages)], np.arange(len(passages)), k)
    return Run.from_mapping(
        {
            query.query_id: [
                (sample.passages[row].passage_id, float(score)) for row, score in zip(rows[at], scores[at], strict=True)
            ]
            for at, query in enumerate(sample.queries)
        }
    )


def _overlap(one: Run, other: Run) -> float:
    """Return the mean share of the passages that both runs have."""
    shares = []
    for query_id in one:
        first, second = ({hit.passage_id for hit in run[query_id]} for run in (one, other))
        shares.append(len(first & second) / len(first))
    return float(np.mean(shares))
