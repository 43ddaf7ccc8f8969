"""Did it help? Systems on the same queries: means with intervals, paired tests, and a verdict in plain words.

A difference is tested over queries; a system that was trained with several seeds has, per query, the mean over them,
and then the difference has to stand over the seeds as well. Every system is compared with the first one; p-values are
Holm's for so many comparisons.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pairdr.artefact import publish
from pairdr.errors import DataError, UsageError
from pairdr.evaluate import PER_QUERY, read_answered, read_evaluation
from pairdr.files import hash_json, write_json
from pairdr.measures import EQUAL, PerQuery, compute_p_value, find_interval, mean_measures, measure_run
from pairdr.parts import is_work_folder, require_no_begun_work
from pairdr.records import Qrels
from pairdr.store_config import CompareConfig
from pairdr.table import MAIN, read_values, say_p

if TYPE_CHECKING:
    import numpy.typing as npt

    Values = npt.NDArray[np.float64]


@dataclass(frozen=True)
class SystemFacts:
    """One system.

    Attributes:
        name: of the system.
        means: of all measures, over queries and seeds.
        interval: bootstrap interval of the tested measure's mean, over queries.
        seeds: mean of the tested measure, per seed.
        distinct: seeds that differ from one another in some measure of some query.
    """

    name: str
    means: dict[str, float]
    interval: tuple[float, float]
    seeds: tuple[float, ...]
    distinct: int


@dataclass(frozen=True)
class Difference:
    """One system against the first one.

    Attributes:
        name: of the system.
        difference: of the means, this one's minus the first one's.
        interval: bootstrap interval of that, paired over queries.
        p_value: two-sided paired randomisation test over queries.
        p_seeds: t-test over seeds; None where no system has several, or they have no deviation.
        p_holm: the larger of the two, corrected for the number of comparisons.
        wins: queries on which this one is better.
        ties: queries on which they are equal.
        losses: queries on which the first one is better.
        detectable: the smallest difference that so many queries show in `power` of all cases; None for one query.
        agreeing: pairs of seeds whose difference has the same sign as that of the means.
        pairs: of seeds.
        verdict: in words.
    """

    name: str
    difference: float
    interval: tuple[float, float]
    p_value: float
    p_seeds: float | None
    p_holm: float
    wins: int
    ties: int
    losses: int
    detectable: float | None
    agreeing: int
    pairs: int
    verdict: str


@dataclass(frozen=True)
class Comparison:
    """Systems on the same queries; the first one is what the others are compared with."""

    measure: str
    queries: int
    systems: tuple[SystemFacts, ...]
    differences: tuple[Difference, ...]

    def format(self) -> str:
        """Return the comparison as plain text."""
        sizes = [(name, max(10, len(name) + 2)) for name in self.systems[0].means]
        width = max(8, *(len(system.name) for system in self.systems)) + 2
        lines = [f"{'':{width}}" + "".join(f"{name:>{size}}" for name, size in sizes) + f"{'95 % interval':>20}"]
        for system in self.systems:
            cells = "".join(f"{system.means[name]:{size}.4f}" for name, size in sizes)
            low, high = system.interval
            seeds = (
                ""
                if len(system.seeds) < 2
                else f"   {len(system.seeds)} seeds, deviation {_deviation(system.seeds):.4f}"
            )
            lines.append(f"{system.name:{width}}{cells}{f'{low:.4f} to {high:.4f}':>20}{seeds}")
        lines.append("")
        for found in self.differences:
            lines.append(found.verdict)
            counts = f"better on {found.wins} queries, equal on {found.ties}, worse on {found.losses}"
            seeds = f"; {found.agreeing} of {found.pairs} pairs of seeds agree" if found.pairs > 1 else ""
            lines.append(f"    {counts}{seeds}")
        for system in self.systems:
            if system.distinct < len(system.seeds):
                lines.append(
                    f"The {len(system.seeds)} runs of {system.name} are {system.distinct} different ones, the others "
                    "equal on every query: a copy of a run is no second seed."
                )
        if all(len(system.seeds) == 1 for system in self.systems):
            lines.append("One run of each: what another seed would give is not known.")
        return "\n".join(lines)


def compare_values(
    systems: Mapping[str, Sequence[PerQuery]], config: CompareConfig, output: str | Path | None = None
) -> Comparison:
    """Compare systems with the first one, and with `output` publish what was found.

    Args:
        systems: name to values per query of each seed, by measure.
        config: measures, of which the first is tested; level, power, resamples.
        output: a folder for `comparison.json`, `comparison.txt` and `per_query.tsv`.

    Raises:
        UsageError: fewer than two systems, or fewer resamples than the level needs.
        DataError: systems that were not measured on the same queries.
    """
    if len(systems) < 2:
        raise UsageError("There is nothing to compare.", remedy="Name at least two systems.")
    least = 2 * (len(systems) - 1) / (config.resamples + 1)
    if least >= config.level:
        raise UsageError(
            f"With {config.resamples} resamples no p-value is below {least:.2g}: nothing could be shown at the level "
            f"{config.level:g}.",
            remedy=f"Set --resamples {math.ceil(10 * least / config.level * config.resamples)}, or a higher --level.",
        )
    measure = config.measures[0]
    queries = list(next(iter(systems.values()))[0][measure])
    values = {name: _stack(name, seeds, measure, queries) for name, seeds in systems.items()}  # [S, Q] each
    facts = tuple(
        SystemFacts(
            name,
            {other: float(np.mean([mean_measures(seed)[other] for seed in seeds])) for other in config.measures},
            find_interval(values[name].mean(0), resamples=config.resamples, seed=config.compare_seed),
            tuple(values[name].mean(1).tolist()),
            len(np.unique(np.hstack([_stack(name, seeds, other, queries) for other in config.measures]), axis=0)),
        )
        for name, seeds in systems.items()
    )
    first, *others = values
    over_queries = [_test(values[name].mean(0), values[first].mean(0), config) for name in others]
    over_seeds = [compare_seeds(values[name].mean(1), values[first].mean(1)) for name in others]
    shown = [p < config.level for p in correct_holm(over_queries)]
    corrected = correct_holm([max(p, q or 0.0) for p, q in zip(over_queries, over_seeds, strict=True)])
    found = tuple(
        _compare(name, first, values[name], values[first], *tested, len(others), config)
        for name, tested in zip(others, zip(over_queries, over_seeds, corrected, shown, strict=True), strict=True)
    )
    comparison = Comparison(measure, len(queries), facts, found)
    if output is not None:
        inputs = {name: hash_json(seeds) for name, seeds in systems.items()}
        with publish(output, "comparison", options=config.as_dict(), inputs=inputs) as staging:
            write_json(staging.path / "comparison.json", asdict(comparison))
            (staging.path / "comparison.txt").write_text(comparison.format() + "\n", encoding="utf-8")
            rows = zip(queries, *(value.mean(0).tolist() for value in values.values()), strict=True)
            lines = ["\t".join(["query", *values]), *("\t".join(map(str, row)) for row in rows)]
            (staging.path / "per_query.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return comparison


def read_system(text: str, qrels: Qrels | None, measures: Sequence[str]) -> tuple[str, list[PerQuery]]:
    """Read what a word of the command line names: `PLACE`, or `NAME=PLACE`, or `NAME=PLACE,PLACE` for several seeds.

    A place is a run (a TREC file, or a folder of `pairdr search`), an evaluation of `pairdr evaluate`, or a work
    folder, of which PAIR's values in its report are taken. The last two were measured already.

    Returns:
        The system's name, and its values per query for each place.

    Raises:
        UsageError: a run that is named twice, one without labels, labels for what was measured already, or measures
            that it does not have.
        DataError: a run that has no query of the labels.
        ArtefactError: a work folder whose run has not ended.
    """
    name, equals, places = text.partition("=")
    if _is_there(text):
        name, paths = "", [Path(text)]
    else:
        paths = [Path(place) for place in (places if equals else text).split(",")]
    twice = [path for at, path in enumerate(paths) if path.resolve() in {other.resolve() for other in paths[:at]}]
    if twice:
        raise UsageError("This run is named twice; it is one seed.", path=twice[0], remedy="Name each seed's run once.")
    values = [_read_values(path, qrels, measures) for path in paths]
    return name if equals and name else paths[0].name.removesuffix(".trec"), values


def _is_there(place: str) -> bool:
    try:
        return Path(place).exists()
    except OSError:  # several places make a name that is too long
        return False


def _read_values(place: Path, qrels: Qrels | None, measures: Sequence[str]) -> PerQuery:
    require_no_begun_work(place)
    if is_work_folder(place) or (place / PER_QUERY).is_file():
        if qrels is not None:
            raise UsageError(
                "This was measured already, and --qrels would not count.",
                path=place,
                remedy="Leave --qrels out, or name the run: a work folder's are runs/test/NAME.",
            )
        values = read_values(place / "report", MAIN) if is_work_folder(place) else read_evaluation(place)
    elif qrels is None:
        raise UsageError("A run is measured by labels.", path=place, remedy="Name them as --qrels.")
    else:
        return measure_run(read_answered(place, qrels), qrels, measures)
    absent = [name for name in measures if name not in values]
    if absent:
        raise UsageError(
            f"There is no {absent[0]} here.", path=place, remedy=f"--measures can be: {', '.join(values)}."
        )
    return {name: values[name] for name in measures}


def compare_seeds(mine: Values, theirs: Values) -> float | None:
    """Return the two-sided p-value of equal means over seeds, by a t-test; None where there is no deviation to test by.

    As many seeds of both are pairs, in the order given; else it is Welch's test, and one run alone stands for itself.

    Args:
        mine: [S], the mean of each seed of a system.
        theirs: [S'], of the other.
    """
    from scipy.stats import ttest_1samp, ttest_ind

    if max(len(mine), len(theirs)) < 2:
        return None
    if len(mine) == len(theirs):
        mine, theirs = mine - theirs, np.zeros(1)
    samples = (sample[:1] if np.ptp(sample) <= EQUAL else sample for sample in (mine, theirs))
    many, few = sorted(samples, key=len, reverse=True)
    if len(many) == 1:  # equal means, by chance or since nothing is drawn: a t-test has nothing to divide by
        return None
    return float(ttest_1samp(many, few[0]).pvalue if len(few) == 1 else ttest_ind(many, few, equal_var=False).pvalue)


def correct_holm(p_values: Sequence[float]) -> list[float]:
    """Return p-values corrected for as many tests (Holm, 1979), in the order given."""
    order = np.argsort(p_values)
    scaled = np.asarray(p_values)[order] * np.arange(len(order), 0, -1)
    corrected = np.empty(len(order))
    corrected[order] = np.minimum(np.maximum.accumulate(scaled), 1)
    return [float(p) for p in corrected]


def find_detectable(differences: Values, comparisons: int, level: float, power: float) -> float | None:
    """Return the difference of means that so many paired queries show with a given power, by the normal form.

    None where one query says nothing of the deviation.

    Args:
        differences: [Q] per query; their deviation counts, not their mean.
        comparisons: tests that share the level.
        level: of the two-sided test.
        power: share of cases in which the difference is shown.
    """
    from scipy.stats import norm

    if len(differences) < 2:
        return None
    quantiles = norm.ppf(1 - level / (2 * comparisons)) + norm.ppf(power)
    return float(quantiles * differences.std(ddof=1) / np.sqrt(len(differences)))


def _compare(
    name: str,
    first: str,
    mine: Values,
    theirs: Values,
    p_value: float,
    p_seeds: float | None,
    p_holm: float,
    shown: bool,
    comparisons: int,
    config: CompareConfig,
) -> Difference:
    differences = mine.mean(0) - theirs.mean(0)  # [Q]
    mean = float(differences.mean())
    low, high = find_interval(differences, resamples=config.resamples, seed=config.compare_seed)
    detectable = find_detectable(differences, comparisons, config.level, config.power)
    between = mine.mean(1)[:, None] - theirs.mean(1)[None]  # [S, S']
    numbers = f"{mean:+.4f} {config.measures[0]}, 95 % interval {low:+.4f} to {high:+.4f}, {say_p(p_holm)}"
    if p_seeds is not None:
        numbers += f" (over queries {say_p(p_value)}, over seeds {say_p(p_seeds)})"
    verdict = f"{name} is {'better' if mean > 0 else 'worse'} than {first}: {numbers}."
    if p_holm >= config.level:
        verdict = f"No difference between {name} and {first} could be shown: {numbers}."
        if shown:
            verdict += " Over queries alone it would be: the seeds are too few, or differ too much."
        elif comparisons * 2.0 ** (1 - len(differences)) >= config.level:  # the smallest p-value that there can be
            verdict += f" {len(differences)} queries can show none."
        elif detectable is not None and max(EQUAL, abs(mean)) < detectable < 1:
            possible = f"{len(differences)} queries would show one of {detectable:.4f}"
            verdict += f" {possible} in {config.power:.0%} of all cases."
    return Difference(
        name=name,
        difference=mean,
        interval=(low, high),
        p_value=p_value,
        p_seeds=p_seeds,
        p_holm=p_holm,
        wins=int((differences > EQUAL).sum()),
        ties=int((np.abs(differences) <= EQUAL).sum()),
        losses=int((differences < -EQUAL).sum()),
        detectable=detectable,
        agreeing=int((np.sign(between) == np.sign(mean)).sum()),
        pairs=between.size,
        verdict=verdict,
    )


def _stack(name: str, seeds: Sequence[PerQuery], measure: str, queries: Sequence[str]) -> Values:
    for seed in seeds:
        if seed[measure].keys() != set(queries):
            raise DataError(
                f"{name!r} was measured on other queries than the first system.", remedy="Use the same qrels for all."
            )
    return np.array([[seed[measure][query] for query in queries] for seed in seeds], dtype=np.float64)


def _test(mine: Values, theirs: Values, config: CompareConfig) -> float:
    one, other = ({str(at): float(value) for at, value in enumerate(values)} for values in (mine, theirs))
    return compute_p_value(one, other, resamples=config.resamples, seed=config.compare_seed)


def _deviation(seeds: Sequence[float]) -> float:
    return float(np.std(seeds, ddof=1))
