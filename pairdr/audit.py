"""What is wrong with the training labels? Suspicious ones, as rows for a person to mark (findings.py, relabel.py).

| kind | what is found | its rows are ordered by |
|---|---|---|
| near_copy | a candidate without a label that has nearly the text of a positive | share of common five-word grams |
| negative_above_positive | a negative that the teacher scores above the best positive | the positive's score |
| contradicted | a pseudo positive that the final model, trained on it, does not rank well | its rank |
| unretrieved_positive | a labelled positive that no system finds | the teacher's score, the lowest first |

A negative above a positive of which the teacher is sure is more likely a positive than one far above a positive that
the teacher does not understand: that says more of the teacher.

Only training queries and the pool are looked at. The kinds take turns in that order, each with its worst row first,
since their numbers have no common scale. A pair that the labels judge as not relevant (0) is not asked about again.
"""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

from pairdr.artefact import publish
from pairdr.collection import Collection, normalise_text
from pairdr.errors import UsageError
from pairdr.evidence import AuditSources, Case, find_ranks, open_rows, rank_systems, read_cases, scores_of
from pairdr.findings import AUDIT_FILE, KINDS, Finding, read_audit, shorten_text, write_audit
from pairdr.label import measure_precision, require_same_data
from pairdr.mine import jaccard_grams
from pairdr.records import Example, Run, positives_of
from pairdr.store_config import AuditConfig

Found = tuple[tuple[float, ...], Finding]
"""How bad a finding is among those of its kind, the first number first, and the finding."""
Item = TypeVar("Item")
FEW = 5
"""Of fewer negatives most say nothing of the positive."""
NOT_LOOKED = {
    "near_copy": "there are neither candidates nor negatives",
    "negative_above_positive": "no teacher scored a positive and its negatives",
    "contradicted": "there is no pseudo label, or no run of the final model",
    "unretrieved_positive": "there is no run of the training queries",
}
"""Why there may be nothing to look at."""


def audit_labels(
    collection: Collection, sources: AuditSources, config: AuditConfig, output: str | Path
) -> list[Finding]:
    """Find suspicious training labels and write them to `audit.tsv` in a folder, to be marked.

    Args:
        collection: the data.
        sources: what was made of them (`evidence.open_work`, `evidence.open_parts`).
        config: depths, limits, seed.
        output: the folder; its manifest says how many labels were looked at, and how many were found suspicious.

    Returns:
        The findings, as they stand in the file.

    Raises:
        UsageError: an audit with marks stands there already, or files of others.
        ArtefactError: examples or candidates of other data.
    """
    _require_unmarked(Path(output))
    examples = require_same_data(sources.examples, collection)
    inputs = {"collection": collection.fingerprint, "examples": examples, **sources.inputs}
    if sources.candidates is not None:
        sources.candidates.require_collection(collection)
        inputs["candidates"] = sources.candidates.fingerprint
    train = collection.qrels("train")
    labelled = _sample([query_id for query_id in train if positives_of(train, query_id)], config)
    rows = open_rows(sources.examples, "pseudo")
    pseudo = rows.take(_sample(range(len(rows)), config))
    looked: Counter[str] = Counter()
    found: dict[str, list[Found]] = {kind: [] for kind in KINDS}
    with publish(output, "audit", options=config.as_dict(), inputs=inputs, beside=(AUDIT_FILE,)) as staging:
        runs = rank_systems(collection, sources, config.audit_depth, [*labelled, *(row.query_id for row in pseudo)])
        for case in read_cases(collection, sources, config, labelled, runs):
            copies = _find_copies(collection, case, config, looked)
            copied = {finding.passage_id for _, finding in copies}
            found["near_copy"] += copies
            found["negative_above_positive"] += _find_above(collection, case, looked, copied)
            found["unretrieved_positive"] += _find_unretrieved(collection, case, looked)
        for row in pseudo:
            found["contradicted"] += _find_contradicted(collection, row, runs, config, looked)
        listed = {kind: _choose(rows, config) for kind, rows in found.items()}
        doubted = {finding.query_id for _, finding in found["contradicted"]}
        staging.facts |= {
            "labelled queries": len(labelled),
            "pseudo-labelled queries": len(pseudo),
            "looked at": {kind: looked[kind] for kind in KINDS},
            "found": {kind: len(found[kind]) for kind in KINDS},
            "listed": {kind: len(listed[kind]) for kind in KINDS},
            "hidden": {
                "contradicted": measure_precision([q for q in pseudo if q.query_id in doubted], collection.hidden),
                "others": measure_precision([q for q in pseudo if q.query_id not in doubted], collection.hidden),
            },
        }
    # Beside what the manifest seals: this file is there to be edited.
    write_audit(Path(output) / AUDIT_FILE, _take_turns(listed))
    return read_audit(output)


def format_audit(facts: Mapping[str, Any]) -> str:
    """Return what an audit's manifest says as text: of how many labels of each kind how many were found."""
    lines = [f"{'':26}{'looked at':>10}{'found':>8}{'share':>8}{'listed':>8}"]
    for kind in KINDS:
        looked, found, listed = (facts[name][kind] for name in ("looked at", "found", "listed"))
        numbers = f"{looked:10}{found:8}{found / looked:8.1%}{listed:8}" if looked else f"  {NOT_LOOKED[kind]}"
        lines.append(f"{kind:26}{numbers}")
    queries = [f"{facts[f'{name} queries']} {name}" for name in ("labelled", "pseudo-labelled")]
    lines.append(f"of {' and '.join(queries)} queries")
    for name, measured in facts["hidden"].items():
        if measured:
            lines.append(
                f"by hidden labels {measured['right']} of {measured['checked']} pseudo labels are right: {name}"
            )
    return "\n".join(lines)


def _find_copies(collection: Collection, case: Case, config: AuditConfig, looked: Counter[str]) -> list[Found]:
    found: list[Found] = []
    suggestion = "Nearly the text of the positive: relabel, unless what differs is what was asked."
    positives = [(p, normalise_text(collection.passage(p).joined)) for p in case.positives]
    for passage_id in (*case.negatives, *case.others):
        text = normalise_text(collection.passage(passage_id).joined)
        looked["near_copy"] += 1
        share, positive = max((jaccard_grams(text, other), p) for p, other in positives)
        if share >= config.copy_level:
            label = "negative" if passage_id in case.negatives else "unlabelled"
            made = _make(collection, "near_copy", label, case, passage_id, positive, suggestion, share)
            found.append(((share, float(label == "negative")), made))
    return found


def _find_above(collection: Collection, case: Case, looked: Counter[str], copies: set[str]) -> list[Found]:
    known = [(case.scores[p], p) for p in case.positives if p in case.scores]
    scored = [p for p in case.negatives if p in case.scores and p not in copies]
    if not known or not scored:
        return []
    looked["negative_above_positive"] += len(scored)
    best, positive = max(known)
    above = [p for p in scored if case.scores[p] > best]
    suggestion = "May answer the question too: relabel if it does, drop if that is not clear."
    if 2 * len(above) > len(scored) >= FEW:
        suggestion = f"{len(above)} of {len(scored)} negatives are above this positive: look at the positive too."
    kind = "negative_above_positive"
    return [((best, case.scores[p]), _make(collection, kind, "negative", case, p, positive, suggestion)) for p in above]


def _find_unretrieved(collection: Collection, case: Case, looked: Counter[str]) -> list[Found]:
    if not case.ranks:
        return []
    looked["unretrieved_positive"] += len(case.positives)
    suggestion = f"None of {', '.join(case.ranks)} finds it: relabel or drop, unless it answers the question."
    found: list[Found] = []
    for passage_id in case.positives:
        if not any(passage_id in ranks for ranks in case.ranks.values()):
            other, kind = _find_first(case), "unretrieved_positive"
            made = _make(collection, kind, "positive", case, passage_id, other, suggestion)
            found.append(((-case.scores.get(passage_id, math.inf),), made))
    return found


def _find_contradicted(
    collection: Collection, row: Example, runs: Mapping[str, Run], config: AuditConfig, looked: Counter[str]
) -> list[Found]:
    ranks = find_ranks(runs, row.query_id, config.audit_depth)
    if "model" not in ranks:
        return []
    looked["contradicted"] += 1
    place = {passage_id: rank for passage_id, (rank, _) in ranks["model"].items()}
    beyond = config.audit_depth + 1
    rank = place.get(row.positive_id, beyond)
    above = sum(place.get(passage_id, beyond) < rank for passage_id in row.negative_ids)
    if rank <= config.agree_depth and not above:
        return []
    words = f"at {rank}" if rank < beyond else f"not among its first {config.audit_depth}"
    suggestion = (
        f"The final model has it {words}, below {above} of its {len(row.negative_ids)} negatives: "
        "drop, unless it answers the question."
    )
    case = Case(row.query_id, (row.positive_id,), row.negative_ids, (), scores_of(row), ranks)
    made = _make(collection, "contradicted", "pseudo", case, row.positive_id, _find_first(case), suggestion)
    return [((rank, above), made)]


def _make(
    collection: Collection,
    kind: str,
    label: str,
    case: Case,
    passage_id: str,
    other_id: str,
    suggestion: str,
    share: float | None = None,
) -> Finding:
    model, student, bm25 = (case.ranks.get(name, {}) for name in ("model", "student", "bm25"))
    return Finding(
        kind=kind,
        label=label,
        query_id=case.query_id,
        query=shorten_text(collection.query(case.query_id).text),
        passage_id=passage_id,
        passage=shorten_text(collection.passage(passage_id).joined),
        other_id=other_id,
        other=shorten_text(collection.passage(other_id).joined) if other_id else "",
        teacher_score=case.scores.get(passage_id),
        other_teacher_score=case.scores.get(other_id),
        model_rank=model[passage_id][0] if passage_id in model else None,
        model_score=model[passage_id][1] if passage_id in model else None,
        other_model_rank=model[other_id][0] if other_id in model else None,
        student_rank=student[passage_id][0] if passage_id in student else None,
        bm25_rank=bm25[passage_id][0] if passage_id in bm25 else None,
        jaccard=share,
        suggestion=suggestion,
    )


def _find_first(case: Case) -> str:
    """Return what the final model ranks first, or else another system; empty where nothing was found."""
    systems = [case.ranks[name] for name in ("model", "student", "bm25") if case.ranks.get(name)]
    return next(iter(systems[0])) if systems else ""


def _choose(found: Iterable[Found], config: AuditConfig) -> list[Finding]:
    """Return the worst findings of a kind, the worst first, and not too many of one query."""
    of_query: Counter[str] = Counter()
    chosen = []
    ordered = sorted(found, key=lambda row: row[1].pair)
    for _, finding in sorted(ordered, key=lambda row: row[0], reverse=True):
        of_query[finding.query_id] += 1
        if of_query[finding.query_id] <= config.most_per_query:
            chosen.append(finding)
    return chosen[: config.most]


def _take_turns(listed: Mapping[str, Sequence[Finding]]) -> list[Finding]:
    turns = [finding for turn in zip_longest(*listed.values()) for finding in turn if finding is not None]
    return [replace(finding, rank=rank) for rank, finding in enumerate(turns, start=1)]


def _sample(items: Sequence[Item], config: AuditConfig) -> list[Item]:
    if len(items) <= config.most_queries:
        return list(items)
    places = random.Random(config.audit_seed).sample(range(len(items)), config.most_queries)
    return [items[place] for place in sorted(places)]


def _require_unmarked(output: Path) -> None:
    path = output / AUDIT_FILE
    marked = sum(bool(finding.mark) for finding in read_audit(path)) if path.is_file() else 0
    if marked:
        raise UsageError(
            f"{marked} marks stand here, which a new audit would overwrite.",
            path=path,
            remedy="Choose another --output, or move the file.",
        )
