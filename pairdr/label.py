"""Teacher scores to training examples: pseudo positives for the pool, denoised negatives for every query.

For a query of the pool (RocketQA, step 4; PAIR, section 4.2): the best-scored candidate is the pseudo positive if it
scores above s_pos; the first candidates in rank order that score below s_neg are its negatives; a query without
either is left out. For a labelled query the positives are given and the negatives are the mined ones below s_neg.
Both comparisons are strict. A teacher's score means something else with every teacher, so s_pos and s_neg are
calibrated on labelled dev queries unless they are given. One s_neg for all queries also rejects negatives
that score below their query's own positive; `negatives_below="positive"` keeps these.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairdr.artefact import publish, read_manifest
from pairdr.blocks import keep_blocks
from pairdr.collection import Collection
from pairdr.config import LabelConfig
from pairdr.errors import ArtefactError, RefusedError
from pairdr.files import write_json
from pairdr.formats import write_examples
from pairdr.mine import Candidates, is_near_copy
from pairdr.records import Example, Qrels, Run, Scored, positives_of
from pairdr.scoring import Score, Spread, fingerprint_scores, make_scorer

if TYPE_CHECKING:
    from pairdr.teachers import Teacher

LEAST_SHARE, MOST_SHARE = 0.01, 0.95
CALIBRATED_SHARE = 0.9
"""A calibrated s_pos labels at most this share of the queries: below the share at which labels are refused."""
LEAST_QUERIES = 20
"""Fewer dev queries than this above a threshold say nothing of its precision."""
SOURCES = ("labelled", "pseudo", "plain")
"""Example files: denoised labelled rows, pseudo-labelled rows, labelled rows with the negatives as mined."""
SCORES = "scores.json"
"""Histograms of the teacher's scores, kept beside the examples."""
SCORE_BINS = 40
Tops = Sequence[tuple[float, bool]]
"""Per query, the best score and whether that passage is relevant."""


@dataclass(frozen=True)
class Calibration:
    """Thresholds and what they promise, measured on labelled dev queries.

    Attributes:
        s_pos: a pseudo positive scores above this.
        s_neg: a negative scores below this.
        precision: share of right pseudo positives among the dev queries that get one, judged on queries that did
            not choose the threshold; a lower bound, since dev labels are rarely complete. None where none gets one.
        yield_share: share of the dev queries that get a pseudo positive.
        queries: dev queries behind these numbers.
    """

    s_pos: float
    s_neg: float
    precision: float | None
    yield_share: float | None
    queries: int


def label_examples(
    collection: Collection,
    candidates: Candidates,
    teacher: Teacher | None,
    config: LabelConfig,
    output: str | Path,
    *,
    teacher_fingerprint: str = "",
    note: str = "",
    spread: Spread | None = None,
) -> dict[str, Any]:
    """Write the examples that training reads, with the teacher's scores.

    Scores are kept beside the output until it is published, so a call that was killed, or refused for its thresholds,
    is followed by one that has them.

    Args:
        collection: the data.
        candidates: what mining found.
        teacher: an accepted teacher; None writes labelled examples with mined negatives only.
        config: thresholds, depth, negatives per query.
        output: the folder of the examples.
        teacher_fingerprint: kept in the manifest.
        note: why there is no teacher.
        spread: scores elsewhere, with the same teacher.

    Returns:
        Counts, thresholds, yield, and the measured precision on hidden labels.

    Raises:
        RefusedError: the pool's yield is below 1 % or above 95 %, or no threshold reaches the wanted precision.
    """
    inputs = {
        "collection": collection.fingerprint,
        "candidates": candidates.fingerprint,
        "teacher": teacher_fingerprint,
    }
    candidates.require_collection(collection)
    known = None if teacher is None else fingerprint_scores(teacher)
    scored_with = [inputs["collection"], inputs["candidates"], known, config.label_depth]
    with (
        keep_blocks(output, scored_with) as blocks,
        publish(output, "examples", options=config.as_dict(), inputs=inputs) as staging,
    ):
        facts = staging.facts
        counts: Counter[str] = Counter()
        facts["plain"] = write_examples(staging.path / "plain.arrow", _label_plainly(collection, candidates, config))
        if teacher is None:
            facts |= {"teacher": None, "note": note, "labelled": facts["plain"], "pseudo": 0}
            write_examples(staging.path / "labelled.arrow", _label_plainly(collection, candidates, config))
            write_examples(staging.path / "pseudo.arrow", [])
            return dict(facts)
        kept = None if known is None else blocks
        score = make_scorer(collection, candidates.merged, teacher, config.label_depth, kept, spread)
        tops, positives = score_dev(collection, score)
        calibration = choose_thresholds(tops, positives, config)
        facts |= {"teacher": teacher.name, "calibration": asdict(calibration)}
        labelled = _denoise(collection, candidates, score, calibration.s_neg, config, counts)
        facts["labelled"] = write_examples(staging.path / "labelled.arrow", labelled)
        best: list[float] = []
        pseudo = list(_label_pool(collection, score, calibration, config, counts, best))
        facts["pseudo"] = write_examples(staging.path / "pseudo.arrow", pseudo)
        write_json(staging.path / SCORES, count_scores(tops, positives, best))
        facts |= {
            "counts": dict(counts),
            "pool": len(collection.pool),
            "hidden": measure_precision(pseudo, collection.hidden),
        }
        if collection.pool:
            _require_yield(len(pseudo), len(collection.pool), calibration)
    return dict(facts)


def require_same_data(examples: str | Path, collection: Collection) -> str:
    """Return the fingerprint of examples, unless they were labelled on other data, or other splits of it.

    Raises:
        ArtefactError: naming both fingerprints.
    """
    manifest = read_manifest(examples, "examples")
    found = manifest.inputs.get("collection", "")
    if found != collection.fingerprint:
        raise ArtefactError(
            f"These examples were made from data {found[:12]}, this is {collection.fingerprint[:12]}.",
            path=examples,
            remedy="Use the same data and the same --hide-labels, --unlabelled and --data-seed, or label again.",
        )
    return manifest.fingerprint


def calibrate(collection: Collection, ranked: Run, teacher: Teacher, config: LabelConfig) -> Calibration:
    """Choose s_pos for the wanted precision and s_neg for the accepted share of false negatives, on dev.

    Args:
        collection: the data; its dev split is used.
        ranked: candidates of the dev queries.
        teacher: whose scores they are.
        config: the wanted precision; thresholds that are given are kept.

    Raises:
        RefusedError: no threshold reaches the wanted precision on 20 queries or more.
    """
    score = make_scorer(collection, ranked, teacher, config.label_depth)
    return choose_thresholds(*score_dev(collection, score), config)


def score_dev(collection: Collection, score: Score) -> tuple[Tops, Sequence[float]]:
    """Return the best score of each dev query and whether it is right, and the scores of all known positives."""
    tops: list[tuple[float, bool]] = []
    positives: list[float] = []
    dev = collection.qrels("dev")
    for query_id, hits, scores in score("dev", dev):
        known = positives_of(dev, query_id)
        if not hits:
            continue
        best = int(np.argmax(scores))
        tops.append((float(scores[best]), hits[best].passage_id in known))
        positives += [float(s) for hit, s in zip(hits, scores, strict=True) if hit.passage_id in known]
    return tops, positives


def choose_thresholds(tops: Tops, positives: Sequence[float], config: LabelConfig) -> Calibration:
    """Choose what is not given of s_pos and s_neg, and say what they promise; see `calibrate`."""
    s_pos = _calibrate_s_pos(tops, config.target_precision) if config.s_pos is None else config.s_pos
    s_neg = config.s_neg
    if s_neg is None:
        s_neg = min(s_pos, float(np.quantile(positives, config.false_negatives)) if positives else s_pos)
    labelled, right = _expect(tops, config)
    return Calibration(s_pos, s_neg, right / labelled if labelled else None, labelled / max(1, len(tops)), len(tops))


def count_scores(tops: Tops, positives: Sequence[float], pool: Sequence[float]) -> dict[str, Any]:
    """Return histograms of a teacher's scores over the same bins.

    Args:
        tops: of dev.
        positives: scores of the known positives of dev.
        pool: the best score of each pool query.

    Returns:
        The `edges` of the bins, and the counts of `right` and `wrong` tops, of `positives` and of `pool`.
    """
    groups = {
        "right": [score for score, is_right in tops if is_right],
        "wrong": [score for score, is_right in tops if not is_right],
        "positives": positives,
        "pool": pool,
    }
    every = np.array([score for scores in groups.values() for score in scores])
    edges = np.histogram_bin_edges(every, SCORE_BINS)
    counts = {name: np.histogram(scores, edges)[0].tolist() for name, scores in groups.items()}
    return {"edges": edges.tolist()} | counts


def _calibrate_s_pos(tops: Tops, target: float) -> float:
    if len(tops) < 2 * LEAST_QUERIES:
        raise RefusedError(
            f"{len(tops)} dev queries are too few to calibrate a teacher; it takes {2 * LEAST_QUERIES}.",
            remedy="Label more dev queries, or give --s-pos and --s-neg.",
        )
    s_pos = choose_s_pos(tops, target)
    if s_pos is None:
        raise RefusedError(
            f"No threshold gives pseudo positives with a precision of {target:g} on {LEAST_QUERIES} of {len(tops)} "
            f"dev queries or more; the best is {max(_precisions(tops)):.2f}.",
            remedy="Use a better teacher, or lower --target-precision.",
        )
    return s_pos


def _expect(tops: Tops, config: LabelConfig) -> tuple[int, int]:
    """Return how many dev queries get a pseudo positive and how many of these are right.

    A calibrated threshold is judged on the half of the queries that did not choose it, both ways.
    """
    halves = (tops[::2], tops[1::2]) if config.s_pos is None else (tops, [])
    labelled = right = 0
    for chosen, judged in (halves, halves[::-1]):
        threshold = choose_s_pos(chosen, config.target_precision) if config.s_pos is None else config.s_pos
        above = [ok for score, ok in judged if threshold is not None and score > threshold]
        labelled += len(above)
        right += sum(above)
    return labelled, right


def choose_s_pos(tops: Tops, target: float) -> float | None:
    """Return the lowest threshold above which the share of right tops is at least the target.

    Args:
        tops: per query, the best score and whether that passage is relevant.
        target: the wanted share.

    Returns:
        The threshold, strictly below the last score that counts and not below the next; None where there is none.
    """
    ordered = sorted((score for score, _ in tops), reverse=True)
    best: float | None = None
    most = max(LEAST_QUERIES, math.floor(CALIBRATED_SHARE * len(tops)))
    for count, precision in enumerate(_precisions(tops)[: max(0, most - LEAST_QUERIES + 1)], start=LEAST_QUERIES):
        follower = ordered[count] if count < len(ordered) else -math.inf
        if precision >= target and follower < ordered[count - 1]:
            best = follower if math.isfinite(follower) else ordered[-1] - 1e-6
    return best


def pick_pseudo_labels(
    hits: Sequence[Scored], scores: Sequence[float], s_pos: float, s_neg: float, most: int
) -> tuple[int, list[int]] | None:
    """Return the place of the pseudo positive and of its negatives, or None where either is missing.

    Args:
        hits: candidates in rank order.
        scores: the teacher's score of each.
        s_pos: the positive's score is strictly above this.
        s_neg: a negative's score is strictly below this.
        most: how many negatives are taken, in rank order.
    """
    if not len(hits):
        return None
    best = int(np.argmax(scores))
    if not scores[best] > s_pos:
        return None
    negatives = [place for place, score in enumerate(scores) if score < s_neg and place != best][:most]
    return (best, negatives) if negatives else None


def measure_precision(examples: Sequence[Example], hidden: Qrels) -> dict[str, Any] | None:
    """Return how many pseudo positives of queries with hidden labels are right; None where nothing was hidden."""
    checked = [example for example in examples if example.query_id in hidden]
    if not checked:
        return None
    right = sum(example.positive_id in positives_of(hidden, example.query_id) for example in checked)
    return {"checked": len(checked), "right": right, "precision": right / len(checked)}


def _label_plainly(collection: Collection, candidates: Candidates, config: LabelConfig) -> Iterator[Example]:
    for query_id in candidates.negatives:
        chosen = candidates.negatives[query_id][: config.negatives]
        yield from _rows(collection, query_id, [hit.passage_id for hit in chosen], {})


def _denoise(
    collection: Collection,
    candidates: Candidates,
    score: Score,
    s_neg: float,
    config: LabelConfig,
    counts: Counter[str],
) -> Iterator[Example]:
    """Yield labelled rows whose negatives the teacher scores below a limit, in rank order.

    The limit is s_neg, or the query's own positive where that scores higher and `negatives_below` says so.
    The teacher sees the same candidates as for the pool, positives included: fused scores depend on the company.
    """
    train = collection.qrels("train")
    mined = {query_id: {hit.passage_id for hit in candidates.negatives[query_id]} for query_id in candidates.negatives}
    for query_id, hits, scores in score("train", mined):
        scored = {hit.passage_id: float(score) for hit, score in zip(hits, scores, strict=True)}
        usable = [passage_id for passage_id in scored if passage_id in mined[query_id]]
        known = [scored[passage_id] for passage_id in positives_of(train, query_id) if passage_id in scored]
        limit = max(s_neg, min(known)) if known and config.negatives_below == "positive" else s_neg
        kept = [passage_id for passage_id in usable if scored[passage_id] < limit]
        counts["mined negatives kept"] += len(kept)
        counts["mined negatives the teacher rejects"] += len(usable) - len(kept)
        yield from _rows(collection, query_id, kept[: config.negatives], scored)


def _rows(
    collection: Collection, query_id: str, negatives: list[str], scored: Mapping[str, float]
) -> Iterator[Example]:
    """Yield one labelled row per positive of the query, with the scores that the teacher gave."""
    positives = positives_of(collection.qrels("train"), query_id)
    scores = tuple(scored.get(passage_id, math.nan) for passage_id in negatives)
    for positive in positives:
        score = scored.get(positive, math.nan)
        yield Example(query_id, positive, tuple(negatives), positives, "labelled", score, scores)


def _label_pool(
    collection: Collection,
    score: Score,
    calibration: Calibration,
    config: LabelConfig,
    counts: Counter[str],
    best: list[float],
) -> Iterator[Example]:
    """Yield the pseudo-labelled rows, and note the best score of each query of the pool in `best`."""
    for query_id, hits, scores in score("pool", collection.pool):
        best += [float(max(scores))] if hits else []
        picked = pick_pseudo_labels(hits, scores.tolist(), calibration.s_pos, calibration.s_neg, config.negatives)
        if picked is None:
            counts["pool queries without a sure positive or negative"] += 1
            continue
        positive = hits[picked[0]].passage_id
        negatives = [at for at in picked[1] if not is_near_copy(collection, hits[at].passage_id, [positive])]
        if not negatives:
            counts["pool queries without a sure positive or negative"] += 1
            continue
        yield Example(
            query_id,
            positive,
            tuple(hits[place].passage_id for place in negatives),
            (positive,),
            "pseudo",
            float(scores[picked[0]]),
            tuple(float(scores[place]) for place in negatives),
        )


def _precisions(tops: Tops) -> list[float]:
    """Return the share of right ones among the n best-scored tops, for n from 20 up."""
    right = np.array([ok for _, ok in sorted(tops, key=lambda top: -top[0])], dtype=float)
    shares = np.cumsum(right) / np.arange(1, len(right) + 1)
    return [float(share) for share in shares[LEAST_QUERIES - 1 :]]


def _require_yield(found: int, pool: int, calibration: Calibration) -> None:
    share = found / pool
    if not LEAST_SHARE <= share <= MOST_SHARE:
        raise RefusedError(
            f"{found} of {pool} pool queries ({share:.1%}) get a pseudo label with s_pos {calibration.s_pos:.3f} and "
            f"s_neg {calibration.s_neg:.3f}; below 1 % or above 95 % the thresholds do not fit the teacher.",
            remedy="Leave --s-pos and --s-neg unset to calibrate them, or use a better teacher.",
        )
