"""A run and labels to measures, per query and mean."""

from __future__ import annotations

import json
from pathlib import Path

from pairdr.artefact import publish, read_manifest
from pairdr.config import EvaluateConfig
from pairdr.measures import PerQuery, mean_measures, measure_run
from pairdr.records import Qrels, Run

PER_QUERY = "per_query.json"


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
        with publish(output, "evaluation", options=config.as_dict(), inputs=inputs or {}) as staging:
            (staging.path / PER_QUERY).write_text(json.dumps(values), encoding="utf-8")
            staging.facts |= {"means": mean_measures(values), "queries": len(next(iter(values.values())))}
    return values


def read_evaluation(folder: str | Path) -> PerQuery:
    """Read the values per query of an evaluation."""
    read_manifest(folder, "evaluation")
    values: PerQuery = json.loads((Path(folder) / PER_QUERY).read_text(encoding="utf-8"))
    return values
