"""How long texts are in tokens, and how much of them a model never sees."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pairdr.artefact import read_manifest
from pairdr.charts import Histogram
from pairdr.check import find_body, load_tokenizer
from pairdr.collection import Collection
from pairdr.errors import ArtefactError
from pairdr.store_config import ReportConfig
from pairdr.tokens import Side

BINS = 40


@dataclass(frozen=True)
class Lengths:
    """Tokens of a sample of texts, special tokens included.

    Attributes:
        texts: how many were counted.
        limit: of the model; what is longer is cut.
        longest: of the sample.
        median: likewise.
        cut: share that is longer than the limit.
        histogram: of nearly all; its last bin holds the few that are longer still.
    """

    texts: int
    limit: int
    longest: int
    median: float
    cut: float
    histogram: Histogram


def count_lengths(collection: Collection, side: Side, model: Path, config: ReportConfig) -> Lengths:
    """Count the tokens of a seeded sample of passages or queries.

    Args:
        collection: the data.
        side: which texts.
        model: a model that pairdr saved; its tokenizer counts and its contract has the limit.
        config: the size of the sample, and its seed.

    Raises:
        ArtefactError: the model is not there, or has no tokenizer.json.
    """
    limit = int(read_manifest(model, "model").facts["contract"][f"{side}_length"])
    tokenizer = load_tokenizer(str(find_body(model)))
    if tokenizer is None:
        raise ArtefactError("The model has no tokenizer.json.", path=model, remedy="Make it again.")
    table = collection.passages if side == "passage" else collection.queries
    rows = random.Random(config.report_seed).sample(range(len(table)), min(config.report_texts, len(table)))
    texts = [
        collection.passage_at(row).joined if side == "passage" else str(table.table.column("text")[row].as_py())
        for row in rows
    ]
    tokens = np.array([len(coded.ids) for coded in tokenizer.encode_batch(texts)])
    end = int(min(tokens.max(), max(2 * limit, np.quantile(tokens, 0.95))))  # one long text does not flatten the others
    counts, edges = np.histogram(np.minimum(tokens, end), min(BINS, end), range=(0, end))
    return Lengths(
        texts=len(tokens),
        limit=limit,
        longest=int(tokens.max()),
        median=float(np.median(tokens)),
        cut=float((tokens > limit).mean()),
        histogram=Histogram(edges.tolist(), {"texts": counts.tolist()}),
    )
