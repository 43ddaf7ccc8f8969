"""Measures by the names people write, per query and mean, and the paired test between two systems.

The numbers come from ir_measures; the test from scipy. Two rules are ours: a query of the labels that the run does
not answer counts as 0, and the order of the run decides, not the order an engine gives to equal scores.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pairdr.errors import DataError, UsageError
from pairdr.records import Qrels, Run

if TYPE_CHECKING:
    import ir_measures
    import numpy.typing as npt

PerQuery = dict[str, dict[str, float]]
"""measure to {query_id: value}."""
EQUAL = 1e-9
"""Values of a measure that differ by no more are equal: means over seeds carry rounding."""


def measure_run(run: Run, qrels: Qrels, measures: Sequence[str]) -> PerQuery:
    """Return each measure for each query of the labels.

    `R@k` is the share of a query's relevant passages in the top k, `Success@k` whether there is at least one.

    Args:
        run: ranked passages; queries that the labels do not name are passed over.
        qrels: labels; a query without a relevant passage is left out, as trec_eval does.
        measures: names such as "RR@10", "nDCG@10", "R@100", "Success@5".

    Raises:
        UsageError: names that ir_measures does not know, all of them at once.
        DataError: no query of the labels has a relevant passage.
    """
    import ir_measures

    parsed = parse_measures(measures)
    judged = {query_id: labels for query_id, labels in qrels.items() if any(r > 0 for r in labels.values())}
    if not judged:
        raise DataError("No query of the labels has a relevant passage.", remedy="Check the qrels.")
    values: PerQuery = {name: dict.fromkeys(judged, 0.0) for name in measures}
    ranked = {query_id: _scores_by_rank(run, query_id) for query_id in judged if query_id in run}
    found: dict[ir_measures.Measure, dict[str, float]] = {measure: {} for measure in parsed}
    for metric in ir_measures.iter_calc(list(found), judged, ranked):
        found[metric.measure][metric.query_id] = float(metric.value)
    for name, measure in zip(measures, parsed, strict=True):
        values[name] |= found[measure]  # MRR@10 and RR@10 are two names of one measure
    return values


def parse_measures(measures: Iterable[str]) -> list[ir_measures.Measure]:
    """Return ir_measures' objects for measure names.

    Raises:
        UsageError: naming all that are unknown, lack their cutoff, or need a package that is not installed.
    """
    import ir_measures

    parsed, unknown = [], []
    engines: Any = ir_measures.DefaultPipeline
    for name in measures:
        try:
            measure = ir_measures.parse_measure(name)
            known = engines.supports(measure)
        except (NameError, ValueError, SyntaxError, AssertionError):  # the last: a cutoff is missing
            known = False
        if known:
            parsed.append(measure)
        else:
            unknown.append(name)
    if unknown:
        raise UsageError(
            f"Unknown measures: {', '.join(unknown)}.", remedy="Write RR@10, nDCG@10, R@100, Success@5, ..."
        )
    return parsed


def mean_measures(values: PerQuery) -> dict[str, float]:
    """Return the mean of each measure over its queries."""
    return {name: float(np.mean(list(by_query.values()))) for name, by_query in values.items()}


def compute_p_value(
    first: Mapping[str, float], second: Mapping[str, float], *, resamples: int = 10000, seed: int = 13
) -> float:
    """Return the two-sided p-value of the paired randomisation test of equal means.

    Under the null hypothesis the two systems' values of a query can be exchanged (Fisher; Smucker et al., CIKM 2007).

    Args:
        first: query_id to value.
        second: query_id to value, of the same queries.
        resamples: random sign changes; the smallest p-value is 2 / (resamples + 1).
        seed: of the sign changes.

    Raises:
        DataError: the two do not have the same queries.
    """
    from scipy.stats import permutation_test

    if first.keys() != second.keys():
        raise DataError(
            "The two systems were measured on different queries.", remedy="Evaluate both on the same split."
        )
    difference = np.array([first[query_id] - second[query_id] for query_id in first])
    difference[np.abs(difference) <= EQUAL] = 0
    if len(difference) < 2 or not difference.any():
        return 1.0

    def mean(values: npt.NDArray[np.float64], axis: int) -> npt.NDArray[np.float64]:
        return np.asarray(np.mean(values, axis=axis))

    outcome = permutation_test(
        (difference,),
        mean,
        permutation_type="samples",
        vectorized=True,
        n_resamples=resamples,
        batch=256,
        rng=np.random.default_rng(seed),
    )
    return float(outcome.pvalue)


def find_interval(
    values: Sequence[float] | npt.NDArray[np.float64], *, resamples: int = 10000, seed: int = 13
) -> tuple[float, float]:
    """Return the 95 % interval of the mean: percentiles of the bootstrap.

    Args:
        values: [Q], one of each query; for a paired interval the differences.
        resamples: samples of Q queries, drawn with replacement.
        seed: of the draws.
    """
    from scipy.stats import bootstrap

    if len(values) < 2 or np.ptp(values) == 0:
        return float(values[0]), float(values[0])
    found = bootstrap(
        (np.asarray(values),),
        np.mean,
        n_resamples=resamples,
        batch=256,
        method="percentile",
        rng=np.random.default_rng(seed),
    ).confidence_interval
    return float(found.low), float(found.high)


def _scores_by_rank(run: Run, query_id: str) -> dict[str, float]:
    hits = run[query_id]
    return {hit.passage_id: float(len(hits) - rank) for rank, hit in enumerate(hits)}


def reciprocal_ranks(relevant: Sequence[npt.NDArray[np.bool_]], cutoff: int = 10) -> npt.NDArray[np.float64]:
    """Return 1 / rank of the first relevant passage per query, 0 where none is within the cutoff.

    The quick form for choosing weights and watching training; `measure_run` makes the numbers that are reported.

    Args:
        relevant: per query, whether the passage at each rank is relevant, best first.
        cutoff: ranks that count.
    """
    values = np.zeros(len(relevant))
    for row, flags in enumerate(relevant):
        hits = np.flatnonzero(flags[:cutoff])
        values[row] = 1.0 / (1 + hits[0]) if len(hits) else 0.0
    return values
