"""Many questions asked of a searcher: their run, with how it was searched, and its measures."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.collection import Collection
from pairdr.config import EvaluateConfig, SearchConfig
from pairdr.errors import UsageError
from pairdr.evaluate import evaluate_run
from pairdr.formats import read_unlabelled
from pairdr.measures import PerQuery, parse_measures
from pairdr.parts import is_work_folder
from pairdr.records import Query, Run
from pairdr.search import write_search
from pairdr.searcher import Searcher


def answer_questions(
    searcher: Searcher,
    output: str | Path,
    k: int,
    *,
    queries: Path | None = None,
    collection: Collection | None = None,
    split: str = "test",
    **options: Any,
) -> Run:
    """Answer the questions of a file or of a split, and publish the run.

    Args:
        searcher: what answers.
        output: the run's folder.
        k: passages per question.
        queries: the file.
        collection: the data that has the split.
        split: its name.
        **options: of `QueryConfig`.

    Raises:
        UsageError: both a file and data, or neither; options that need a part that is not here.
        DataError: a split without labels, or a file that cannot be read.
    """
    if (queries is None) == (collection is None):
        raise UsageError("Name either --queries or --data.")
    inputs, kept = {"vectors": searcher.store.fingerprint}, dict(options)
    if collection is not None:
        inputs["collection"], kept["split"] = collection.fingerprint, split
        questions = [collection.query(query_id) for query_id in collection.qrels(split)]
    else:
        questions = [Query(query_id, text) for _, query_id, text in read_unlabelled(queries or Path())]
    before = searcher.describe_index(**options)
    return write_search(
        searcher.rank(questions, k, **options),
        SearchConfig(k=k),
        output,
        total=len(questions),
        inputs=inputs,
        options=kept,
        describe=lambda: _describe_way(searcher, **options) | _subtract(searcher.describe_index(**options), before),
    )


def _describe_way(searcher: Searcher, **options: Any) -> dict[str, Any]:
    """Return how questions are answered: what was settled where the options, or a work folder, leave it open."""
    config = searcher.settle(**options)
    facts: dict[str, Any] = {"mode": config.mode}
    if config.mode == "hybrid":
        weights = None if config.fusion == "rrf" else searcher.weights
        facts |= {"fusion": "rrf" if weights is None else "weighted", "depth": config.depth}
        facts |= {} if weights is None else {"weights": [float(weight) for weight in weights]}
    if config.mode != "dense" and searcher.words is not None:
        facts["words"] = searcher.words.fingerprint
    return facts


def _subtract(facts: dict[str, Any], before: dict[str, Any]) -> dict[str, Any]:
    """Return facts of an index whose exact searches are those of one run: the index counts since it was opened."""
    if "exact_searches" not in facts.get("index", {}):
        return facts
    count = facts["index"]["exact_searches"] - before["index"]["exact_searches"]
    return facts | {"index": facts["index"] | {"exact_searches": count}}


def can_be_asked(place: Path) -> bool:
    """Return whether a folder holds vectors, or is a finished work folder, and so no run."""
    if is_work_folder(place):
        return True
    return (place / MANIFEST).is_file() and read_manifest(place).kind == "vectors"


def measure_searcher(
    searcher: Searcher, collection: Collection, split: str, config: EvaluateConfig, output: str | Path | None = None
) -> PerQuery:
    """Answer the questions of a split, as deep as the measures look, and measure the run by their labels.

    Args:
        searcher: what answers.
        collection: the data that has the split.
        split: its name.
        config: which measures.
        output: a folder for the values per query; the run stands beside it, as `<output>.run`.

    Raises:
        UsageError: a measure that nobody knows, or one without a cutoff, which looks at all passages.
        DataError: the split has no labels.
    """
    cutoffs = [int(measure.params.get("cutoff", 0)) for measure in parse_measures(config.measures)]
    endless = [name for name, cutoff in zip(config.measures, cutoffs, strict=True) if not cutoff]
    if endless:
        raise UsageError(
            f"No depth of a search is deep enough for {', '.join(endless)}.",
            remedy="Write AP@100 in place of AP, and so on; or write a run with -k, and measure that.",
        )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "run" if output is None else Path(f"{output}.run")
        run = answer_questions(searcher, place, max(SearchConfig().k, *cutoffs), collection=collection, split=split)
        inputs = {"run": read_manifest(place).fingerprint, "collection": collection.fingerprint}
        return evaluate_run(run, collection.qrels(split), config, output, inputs=inputs)
