"""What people say of an audit, written back: a new version of the data, and of the training examples.

| | accept | relabel | drop |
|---|---|---|---|
| negative, unlabelled | it is judged: relevance 0 | it is a positive: relevance 1, and a row | no negative any more |
| positive | nothing | it is judged: relevance 0, its row goes | the label and its row go |
| pseudo | nothing | its row goes | its row goes |

Dropped pairs are in the examples neither positives nor negatives: they stay, or come, among the known positives, which
no batch takes for negatives. Labels alone cannot say that, nor hold anything of pseudo labels.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pairdr.answers import ANSWERS
from pairdr.artefact import publish, read_manifest, require_replaceable
from pairdr.collection import Collection, find_texts, open_collection
from pairdr.errors import DataError, UsageError
from pairdr.files import hash_file
from pairdr.findings import Finding, find_audit_file, read_audit_lines
from pairdr.formats import Examples, write_examples, write_qrels
from pairdr.label import SOURCES, require_same_data
from pairdr.lines import copy_file
from pairdr.records import Example, Qrels, positives_of


@dataclass
class _Change:
    """What the marks say of one query's passages.

    Attributes:
        relevant: they are positives from now on.
        irrelevant: judged as not relevant.
        dropped: neither one nor the other.
        gone: positives, pseudo ones among them, that are none any more.
    """

    relevant: set[str] = field(default_factory=set)
    irrelevant: set[str] = field(default_factory=set)
    dropped: set[str] = field(default_factory=set)
    gone: set[str] = field(default_factory=set)


def apply_audit(
    collection: Collection,
    audit: str | Path,
    output: str | Path,
    *,
    examples: str | Path | None = None,
    examples_output: str | Path | None = None,
) -> dict[str, Any]:
    """Write marked findings back as a new BEIR folder, and with `examples` as new training examples.

    Corpus and queries are copied. A dev split that was made of training queries is written out, so that both versions
    are measured by the same queries.

    Args:
        collection: the data, opened as for the audit.
        audit: the marked file, or the folder of an audit.
        output: the folder of the new data.
        examples: the examples that were audited.
        examples_output: the folder of the new ones.

    Returns:
        How many marks of each kind there were, and what changed.

    Raises:
        UsageError: nothing is marked or would change, or an output is where something else is.
        DataError: a row that does not fit the data: an unknown id, or a label that is another one by now; or examples
            that cannot be read.
        ArtefactError: examples of other data.
    """
    path = find_audit_file(audit)
    new_examples = None if examples is None else Path(examples_output or f"{output}.examples")
    _require_other_places(collection, output, examples, new_examples)
    rows: dict[str, Examples] = {}
    if examples is not None and new_examples is not None:
        # What cannot be renewed is refused before the new data are written.
        require_same_data(examples, collection)
        require_replaceable(new_examples, "examples")
        rows = {name: Examples.open(Path(examples) / f"{name}.arrow") for name in SOURCES}
    marked = [(line, finding) for line, finding in read_audit_lines(path) if finding.mark]
    if not marked:
        raise UsageError("No row is marked.", path=path, remedy="Write accept, relabel or drop into the column mark.")
    changes: dict[str, _Change] = defaultdict(_Change)
    pool = frozenset(collection.pool)
    pseudo = {(row.query_id, row.positive_id) for row in rows["pseudo"]} if rows else None
    for line, finding in marked:
        _require_fitting(collection, pool, pseudo, finding, path, line)
        _note(finding, changes[finding.query_id])
    before = collection.labels("train")
    labels = _change_labels(before, changes)
    facts: dict[str, Any] = {
        "marks": dict(Counter(finding.mark for _, finding in marked)),
        "labels": _count_changes(before, labels),
    }
    if examples is None and labels == before:
        raise UsageError(
            "The marks change no label.",
            path=path,
            remedy="Marks of pseudo labels and dropped negatives change training examples alone: name these too.",
        )
    inputs = {"collection": collection.fingerprint, "audit": hash_file(path)}
    with publish(output, "beir", options={}, inputs=inputs, edited=True) as staging:
        _write_data(collection, labels, staging.path)
        staging.facts |= facts
    if examples is not None and new_examples is not None:
        renewed = open_collection(output, collection.config)
        facts["examples"] = _renew_examples(Path(examples), rows, changes, renewed, hash_file(path), new_examples)
    return facts


def _require_other_places(
    collection: Collection, output: str | Path, examples: str | Path | None, new_examples: Path | None
) -> None:
    pairs = [(Path(output), collection.source)]
    if examples is not None and new_examples is not None:
        pairs.append((new_examples, Path(examples)))
    for place, source in pairs:
        if place.resolve() == source.resolve():
            raise UsageError("This would replace what is read.", path=place, remedy="Choose another place.")


def _require_fitting(
    collection: Collection,
    pool: frozenset[str],
    pseudo: set[tuple[str, str]] | None,
    finding: Finding,
    path: Path,
    line: int,
) -> None:
    """Refuse a finding of other data or examples, or one whose label is another one by now.

    Args:
        collection: the data.
        pool: its unlabelled queries.
        pseudo: query and positive of each pseudo-labelled row; None where no examples were named.
        finding: a marked one.
        path: where it stands.
        line: its line there.
    """
    train = collection.qrels("train")
    query_id, passage_id = finding.pair
    relevance = train.get(query_id, {}).get(passage_id, 0)
    problem = None
    if query_id not in collection.queries or passage_id not in collection.passages:
        what = f"query {query_id!r}" if query_id not in collection.queries else f"passage {passage_id!r}"
        problem = f"There is no {what} in these data."
    elif finding.label == "pseudo" and query_id not in pool:
        problem = f"Query {query_id!r} is not in the pool."
    elif finding.label == "pseudo" and pseudo is not None and finding.pair not in pseudo:
        problem = f"Passage {passage_id!r} is no pseudo positive of query {query_id!r}."
    elif finding.label != "pseudo" and query_id not in train:
        problem = f"Query {query_id!r} has no training label."
    elif finding.label == "positive" and relevance <= 0:
        problem = f"Passage {passage_id!r} is no positive of query {query_id!r}."
    elif finding.label in ("negative", "unlabelled") and relevance > 0:
        problem = f"Passage {passage_id!r} is a positive of query {query_id!r}."
    if problem is not None:
        raise DataError(
            problem,
            path=path,
            line=line,
            remedy="Use the data, the examples and the options of the audit; if a spreadsheet changed ids, import "
            "them as text.",
        )


def _note(finding: Finding, change: _Change) -> None:
    if finding.label == "pseudo":
        if finding.mark != "accept":
            change.gone.add(finding.passage_id)
    elif finding.label == "positive":
        if finding.mark != "accept":
            change.gone.add(finding.passage_id)
            (change.irrelevant if finding.mark == "relabel" else change.dropped).add(finding.passage_id)
    else:
        sets = {"accept": change.irrelevant, "relabel": change.relevant, "drop": change.dropped}
        sets[finding.mark].add(finding.passage_id)


def _change_labels(before: Qrels, changes: Mapping[str, _Change]) -> Qrels:
    """Return the new labels; a query without a positive has none, and joins the pool."""
    labels = {query_id: dict(judged) for query_id, judged in before.items()}
    for query_id, change in changes.items():
        if not change.relevant | change.irrelevant | change.dropped:
            continue
        judged = labels[query_id]
        judged |= dict.fromkeys(sorted(change.relevant), 1) | dict.fromkeys(sorted(change.irrelevant), 0)
        for passage_id in change.dropped:
            judged.pop(passage_id, None)
        if not positives_of(labels, query_id):
            del labels[query_id]
    return labels


def _count_changes(before: Qrels, after: Qrels) -> dict[str, int]:
    counts = dict.fromkeys(("made positive", "made not relevant", "judged as negative", "removed"), 0)
    for query_id, judged in after.items():
        old = before[query_id]
        for passage_id, relevance in judged.items():
            was = old.get(passage_id)
            if relevance > 0 and (was or 0) <= 0:
                counts["made positive"] += 1
            elif relevance == 0 and was != 0:
                counts["judged as negative" if was is None else "made not relevant"] += 1
        counts["removed"] += len(old.keys() - judged.keys())
    return counts | {"queries left without a positive": len(before.keys() - after.keys())}


def _write_data(collection: Collection, labels: Qrels, place: Path) -> None:
    source = collection.source
    for name, path in find_texts(source).items():
        copy_file(path, (place / name).with_name(path.name))
    if (source / ANSWERS).is_file():
        copy_file(source / ANSWERS, place / ANSWERS)
    (place / "qrels").mkdir()
    for path in (source / "qrels").glob("*.tsv"):
        copy_file(path, place / "qrels" / path.name)
    if not collection.labels("dev"):
        dev = collection.qrels("dev")
        labels = {query_id: judged for query_id, judged in labels.items() if query_id not in dev}
        write_qrels(place / "qrels" / "dev.tsv", dev)
    write_qrels(place / "qrels" / "train.tsv", labels)


def _renew_examples(
    examples: Path,
    rows: Mapping[str, Examples],
    changes: Mapping[str, _Change],
    renewed: Collection,
    audit: str,
    output: Path,
) -> dict[str, int]:
    """Write new examples and return how many rows each file has."""
    manifest = read_manifest(examples, "examples")
    inputs = {"collection": renewed.fingerprint, "examples": manifest.fingerprint, "audit": audit}
    with publish(output, "examples", options=manifest.options, inputs=inputs) as staging:
        counts = {
            name: write_examples(staging.path / f"{name}.arrow", _change_rows(found, changes))
            for name, found in rows.items()
        }
        for name in manifest.files:
            if not (staging.path / name).exists():
                shutil.copyfile(examples / name, staging.path / name)
        staging.facts |= manifest.facts | counts
    return counts


def _change_rows(rows: Iterable[Example], changes: Mapping[str, _Change]) -> Iterator[Example]:
    added: set[tuple[str, str]] = set()
    for row in rows:
        change = changes.get(row.query_id)
        if change is None:
            yield row
            continue
        scores = dict(zip(row.negative_ids, row.negative_scores, strict=True))
        kept = [p for p in row.negative_ids if p not in change.relevant | change.dropped]
        known = [p for p in row.known_positive_ids if p not in change.irrelevant]
        new = replace(
            row,
            negative_ids=tuple(kept),
            negative_scores=tuple(scores[p] for p in kept),
            known_positive_ids=tuple(dict.fromkeys([*known, *sorted(change.relevant), *sorted(change.dropped)])),
        )
        if row.positive_id not in change.gone:
            yield new
        for passage_id in sorted(change.relevant):
            if (row.query_id, passage_id) not in added:
                added.add((row.query_id, passage_id))
                yield replace(new, positive_id=passage_id, positive_score=scores.get(passage_id, math.nan))
