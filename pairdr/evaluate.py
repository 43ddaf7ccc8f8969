"""A run, and labels or answers, to measures, per query and mean."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pairdr.answers import MEASURES, AnswerMode, Answers, measure_answers, read_answers
from pairdr.artefact import publish, read_manifest
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, EvaluateConfig, OnDuplicate
from pairdr.errors import DataError, UsageError
from pairdr.files import hash_file
from pairdr.formats import read_qrels, read_run, read_unlabelled
from pairdr.measures import PerQuery, mean_measures, measure_run
from pairdr.progress import say
from pairdr.records import Qrels, Query, Run, positives_of

PER_QUERY = "per_query.json"


@dataclass(frozen=True)
class AnswerFiles:
    """What a run is measured by in place of labels.

    Attributes:
        path: accepted answers.
        data: the BEIR folder whose passages were searched.
        queries: the questions that were searched for, where the folder lacks them; answers without ids need them.
        split: the folder's split whose questions count; None is all that have answers.
        mode: how answers are read.
        on_duplicate: which passage of an id that occurs twice is taken.
    """

    path: Path | None = None
    data: Path | None = None
    queries: Path | None = None
    split: str | None = None
    mode: AnswerMode = "dpr"
    on_duplicate: OnDuplicate = "error"


def evaluate_run(
    run: Run,
    qrels: Qrels,
    config: EvaluateConfig,
    output: str | Path | None = None,
    *,
    inputs: dict[str, str] | None = None,
) -> PerQuery:
    """Measure a run and, with `output`, publish the values per query and their means.

    Args:
        run: ranked passages.
        qrels: labels; unanswered queries count as 0.
        config: which measures.
        output: a folder for `per_query.json`.
        inputs: fingerprints to keep in the manifest.

    Returns:
        measure to {query_id: value}.
    """
    values = measure_run(run, qrels, config.measures)
    if output is not None:
        _publish(values, config.as_dict(), inputs or {}, output)
    return values


def evaluate_answers(
    run: Run,
    answers: Answers,
    collection: Collection,
    config: EvaluateConfig,
    output: str | Path | None = None,
    *,
    mode: AnswerMode = "dpr",
    inputs: dict[str, str] | None = None,
) -> PerQuery:
    """Measure by answers in the passages that a run found, and publish as `evaluate_run` does.

    Args:
        run: ranked passages, for every question that has answers.
        answers: what is accepted.
        collection: the corpus.
        config: which measures, such as answer_recall@20.
        output: a folder for `per_query.json`.
        mode: how answers are read.
        inputs: fingerprints to keep in the manifest, beside the collection's.

    Returns:
        measure to {query_id: 1 or 0}.
    """
    values = measure_answers(run, answers, collection.passages, config.measures, mode)
    if output is not None:
        kept = {"collection": collection.fingerprint} | (inputs or {})
        _publish(values, config.as_dict() | {"answer_mode": mode}, kept, output)
    return values


def evaluate_files(
    run: Path, qrels: Path | None, answers: AnswerFiles, config: EvaluateConfig, output: str | Path | None = None
) -> PerQuery:
    """Measure the run of a file or folder, by the labels of a file or by answers.

    Args:
        run: a TREC run, our Arrow file, or a folder that has one.
        qrels: labels.
        answers: answers, in place of labels.
        config: which measures; those of the default become answer recall where answers are given.
        output: a folder for `per_query.json`.

    Raises:
        UsageError: both labels and answers, or neither; labels, and options of how answers are read.
        DataError: the run has no query of the labels.
    """
    if qrels is not None and answers.path is None and answers.data is None:
        if answers != AnswerFiles():
            raise UsageError(
                "--queries, --split, --answer-mode and --on-duplicate go with --answers and --data.",
                remedy="Leave them out: labels say which queries count; for a split, name its own labels.",
            )
        labels = read_qrels(qrels)
        answered = read_answered(run, labels)
        inputs = {"run": hash_file(_find_run(run)), "qrels": hash_file(qrels)}
        return evaluate_run(answered, labels, config, output, inputs=inputs)
    if qrels is not None or answers.path is None or answers.data is None:
        raise UsageError("A run is measured by labels (QRELS), or by --answers in the passages of --data.")
    found = read_run(_find_run(run))
    if config.measures == EvaluateConfig().measures:
        config = replace(config, measures=MEASURES)
    collection = open_collection(answers.data, DataConfig(on_duplicate=answers.on_duplicate))
    asked = (
        (collection.query(query_id) for query_id in found)
        if answers.queries is None
        else (Query(query_id, text) for _, query_id, text in read_unlabelled(answers.queries) if query_id in found)
    )
    accepted = read_answers(answers.path, asked)
    if answers.split is not None:
        counted = collection.qrels(answers.split)
        accepted = {query_id: texts for query_id, texts in accepted.items() if query_id in counted}
    inputs = {"answers": hash_file(answers.path)}
    return evaluate_answers(found, accepted, collection, config, output, mode=answers.mode, inputs=inputs)


def read_answered(place: Path, qrels: Qrels) -> Run:
    """Read the run of a file or folder, and say how many queries of the labels it lacks.

    Raises:
        DataError: it has none of them.
    """
    run = read_run(_find_run(place))
    asked = [query_id for query_id in qrels if positives_of(qrels, query_id)]
    missing = sum(query_id not in run for query_id in asked)
    if asked and missing == len(asked):
        raise DataError(
            "The run has no query of the labels.", path=place, remedy="Take the labels of the split that was searched."
        )
    if missing:
        say(f"{place}: {missing} of {len(asked)} queries of the labels are not in this run; they count as 0.")
    return run


def _find_run(place: Path) -> Path:
    return place / "run.arrow" if place.is_dir() else place


def _publish(values: PerQuery, options: dict[str, Any], inputs: dict[str, str], output: str | Path) -> None:
    with publish(output, "evaluation", options=options, inputs=inputs) as staging:
        (staging.path / PER_QUERY).write_text(json.dumps(values), encoding="utf-8")
        staging.facts |= {"means": mean_measures(values), "queries": len(next(iter(values.values())))}


def read_evaluation(folder: str | Path) -> PerQuery:
    """Read the values per query of an evaluation."""
    read_manifest(folder, "evaluation")
    values: PerQuery = json.loads((Path(folder) / PER_QUERY).read_text(encoding="utf-8"))
    return values
