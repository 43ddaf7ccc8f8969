"""A BEIR folder, and examples, to files of other tools."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from itertools import chain, groupby
from pathlib import Path
from typing import Any

import numpy as np

from pairdr.answers import ANSWERS, read_answers
from pairdr.artefact import publish
from pairdr.collection import Collection
from pairdr.errors import DataError, UsageError
from pairdr.exchange.corpora import (
    CorpusWriter,
    write_candidate_pool,
    write_collection,
    write_paragraphs,
    write_psgs,
    write_tevatron_corpus,
    write_tevatron_old_corpus,
)
from pairdr.exchange.files import write_columns
from pairdr.exchange.training import (
    ROWS,
    Candidate,
    RowWriter,
    TrainingRow,
    write_dpr,
    write_flagembedding,
    write_rocketqa,
    write_rocketqa_cross,
    write_tevatron,
    write_tevatron_old,
)
from pairdr.formats import Examples
from pairdr.label import require_same_data
from pairdr.records import Qrels, positives_of
from pairdr.store_config import ExportDataConfig, TargetFormat

WRITERS: dict[str, tuple[str, RowWriter]] = {
    "dpr": ("json", write_dpr),
    "tevatron": ("jsonl", write_tevatron),
    "tevatron-old": ("jsonl", write_tevatron_old),
    "flagembedding": ("jsonl", write_flagembedding),
    "rocketqa": ("tsv", write_rocketqa),
    "rocketqa-cross": ("tsv", write_rocketqa_cross),
}
"""Training files: how a name ends, and what writes it."""
CORPORA: dict[str, CorpusWriter] = {
    "msmarco": write_collection,
    "dpr": write_psgs,
    "tevatron": write_tevatron_corpus,
    "tevatron-old": write_tevatron_old_corpus,
    "flagembedding": write_candidate_pool,
    "rocketqa": write_paragraphs,
    "rocketqa-cross": write_paragraphs,
}
QUERIES = {"msmarco": "queries.{}.tsv", "rocketqa": "{}.query.txt", "rocketqa-cross": "{}.query.txt"}
"""The name of a split's queries, for those that keep queries and labels in tables."""
EXAMPLES = {"all": ("labelled", "pseudo"), "labelled": ("labelled",), "pseudo": ("pseudo",), "plain": ("plain",)}
Row = tuple[str, dict[str, float], dict[str, float]]
"""Query id; positives and negatives by id, with scores."""


def export_data(
    collection: Collection,
    target_format: TargetFormat,
    config: ExportDataConfig,
    output: Path,
    examples: Path | None = None,
) -> dict[str, Any]:
    """Write a collection, and training rows, as another tool reads them.

    Args:
        collection: the data.
        target_format: what is written.
        config: which examples.
        output: the folder.
        examples: the rows of train; without, they are the labels, and have no negatives.

    Returns:
        Counts of what was written, changed and left out.

    Raises:
        UsageError: MS MARCO's form has no place for examples.
        ArtefactError: examples of other data.
        DataError: there is nothing to write.
    """
    inputs = {"collection": collection.fingerprint}
    if examples is not None:
        if target_format == "msmarco":
            raise UsageError("MS MARCO's form has no place for examples.", remedy="Leave them out.")
        inputs["examples"] = require_same_data(examples, collection)
    with publish(output, "exported-data", options={"to": target_format} | config.as_dict(), inputs=inputs) as staging:
        counts: Counter[str] = Counter({"passages": len(collection.passages)})
        CORPORA[target_format](staging.path, chain.from_iterable(collection.read_passages()), counts)
        if target_format in QUERIES:
            _write_queries(collection, QUERIES[target_format], staging.path, counts)
            _write_labels(collection, target_format == "msmarco", staging.path)
        if target_format not in QUERIES or examples is not None:
            _write_rows(collection, target_format, examples, config, staging.path, counts)
        staging.facts |= +counts
    return dict(staging.facts)


def _write_rows(
    collection: Collection,
    target_format: str,
    examples: Path | None,
    config: ExportDataConfig,
    folder: Path,
    counts: Counter[str],
) -> None:
    """Write the rows of each split: those of train from examples, where there are some, others from labels."""
    sources: dict[str, Iterable[Row]] = {}
    if target_format not in QUERIES:
        sources = {split: _read_labels(collection.labels(split)) for split in collection.given_splits}
    if examples is not None:
        files = [examples / f"{name}.arrow" for name in EXAMPLES[config.rows]]
        sources["train"] = _read_examples(Examples.open(*files))
    suffix, write = WRITERS[target_format]
    path = collection.source / ANSWERS
    answers = read_answers(path) if path.is_file() else {}
    written = 0
    for split, rows in sources.items():
        place, tally = folder / f"{split}.{suffix}", Counter[str]()
        write(place, (_make_row(collection, row, answers) for row in rows), tally)
        written += tally[ROWS]
        if not tally[ROWS]:
            place.unlink()
        counts[f"rows of {split}"] = tally.pop(ROWS, 0)
        counts.update(tally)
    if not written:
        raise DataError(
            "There is no row to write.", path=examples or collection.source, remedy="It takes positives and negatives."
        )


def _read_examples(examples: Examples) -> Iterator[Row]:
    """Yield (query id, positives, negatives), with scores, of examples that follow one another."""
    for query_id, group in groupby(examples, key=lambda example: example.query_id):
        positives: dict[str, float] = {}
        negatives: dict[str, float] = {}
        for example in group:
            positives[example.positive_id] = example.positive_score
            negatives |= zip(example.negative_ids, example.negative_scores, strict=True)
        yield query_id, positives, negatives


def _read_labels(labels: Qrels) -> Iterator[Row]:
    for query_id in labels:
        if positives := positives_of(labels, query_id):
            yield query_id, dict.fromkeys(positives, math.nan), {}


def _make_row(collection: Collection, row: Row, answers: Mapping[str, tuple[str, ...]]) -> TrainingRow:
    def look_up(scores: dict[str, float]) -> tuple[Candidate, ...]:
        passages = map(collection.passage, scores)
        return tuple(Candidate(p.passage_id, p.title, p.text, _shorten(scores[p.passage_id])) for p in passages)

    query_id, positives, negatives = row
    query = collection.query(query_id)
    return TrainingRow(query, look_up(positives), look_up(negatives), answers.get(query_id, ()))


def _shorten(score: float) -> float:
    """Return the shortest decimal that is this 32-bit number."""
    return float(str(np.float32(score)))


def _write_queries(collection: Collection, name: str, folder: Path, counts: Counter[str]) -> None:
    """Write the queries of each split; those without labels stand in the training file, as MS MARCO's do."""
    labels = {split: collection.labels(split) for split in dict.fromkeys(("train", *collection.given_splits))}
    with ExitStack() as files:
        streams = {
            split: files.enter_context((folder / name.format(split)).open("w", encoding="utf-8")) for split in labels
        }
        for block in collection.queries.read_blocks(("id", "text")):
            for query_id, text in block:
                for split in [split for split in labels if query_id in labels[split]] or ["train"]:
                    write_columns(streams[split], counts, query_id, text)
                    counts[f"{split} queries"] += 1


def _write_labels(collection: Collection, four_columns: bool, folder: Path) -> None:
    """Write qrels: four columns with the relevance, or query and passage of what is relevant."""
    for split in collection.given_splits:
        with (folder / f"qrels.{split}.tsv").open("w", encoding="utf-8") as stream:
            for query_id, judged in collection.labels(split).items():
                for passage_id, relevance in judged.items():
                    if four_columns:
                        stream.write(f"{query_id}\t0\t{passage_id}\t{relevance}\n")
                    elif relevance > 0:
                        stream.write(f"{query_id}\t{passage_id}\n")
