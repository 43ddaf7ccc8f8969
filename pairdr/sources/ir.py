"""`ir:`: the data sets of ir_datasets, by the names it gives them.

A name like `beir/scifact` takes its subsets `/train`, `/dev` (or `/validation`) and `/test`; a name without such
subsets is one split itself. Which subset is which split can also be said. The library downloads into its own folder
(`IR_DATASETS_HOME`).
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from pairdr.errors import DataError, MissingExtraError, UsageError
from pairdr.records import Qrels
from pairdr.sources.folder import SPLIT_WORDS, Parts, Row, make_row, read_relevance

METADATA_LENGTH = 300  # characters; what is longer is another form of the text
NAMES_SHOWN = 12
_TITLES = ("title", "headline", "document_title", "page_title")
_TEXTS = ("doc_id", *_TITLES, "text", "body", "abstract", "headings", "conclusion", "premises_texts")


def read_ir_dataset(name: str, splits: Mapping[str, str]) -> Parts:
    """Return what a data set of ir_datasets holds.

    Args:
        name: as ir_datasets has it.
        splits: split to subset, below `name` or a whole name; only these are then taken. Empty: by convention.

    Raises:
        MissingExtraError: ir_datasets is not installed.
        UsageError: no such data set, or no such subset; documents without text; subsets of other documents.
        DataError: ir_datasets cannot read or download it.
    """
    registry, version = _load_registry()
    subsets = _name_subsets(name, splits, registry) if splits else _find_subsets(name, registry)
    own = _find(name, registry)
    if own is None and not subsets:
        raise UsageError(f"ir_datasets has no {name!r}.", remedy=_suggest(name, registry))
    parts = {subset: _find(subset, registry) for subset in subsets.values()}
    together = parts if own is None else {name: own} | parts
    corpus = _require_one_corpus(name, together, registry)
    qrels = {split: _read_qrels(subset, parts[subset]) for split, subset in subsets.items()}
    held_out = {subset: qrels[split] for split, subset in subsets.items() if split != "train"}
    return Parts(
        passages=_read_passages(*corpus),
        queries=_read_queries(parts if splits else together, held_out),
        qrels=qrels,
        labels_from=subsets,
        versions={"ir_datasets": version},
    )


def _load_registry() -> tuple[Any, str]:
    try:
        import ir_datasets
    except ImportError as error:
        raise MissingExtraError("ir_datasets", "sources") from error
    return ir_datasets.registry, str(ir_datasets.__version__)


def _find(name: str, registry: Any) -> Any:
    try:
        return registry[name]
    except KeyError:
        return None


def _find_subsets(name: str, registry: Any) -> dict[str, str]:
    """Return split to subset by convention; a data set with labels and without such subsets is one split itself."""
    found: dict[str, str] = {}
    for word, split in SPLIT_WORDS.items():
        subset = _find(f"{name}/{word}", registry)
        if subset is not None and subset.has_qrels():
            found.setdefault(split, f"{name}/{word}")
    own = _find(name, registry)
    if not found and own is not None and own.has_qrels():
        found[_read_split(name)] = name
    return found


def _read_split(name: str) -> str:
    """Return the split that a name speaks of: the last part with such a word in it, as in `dev/small`; else test."""
    for part in reversed(name.split("/")):
        for word in re.findall("[a-z]+", part):
            if word in SPLIT_WORDS:
                return SPLIT_WORDS[word]
    return "test"


def _name_subsets(name: str, splits: Mapping[str, str], registry: Any) -> dict[str, str]:
    subsets = {}
    for split, subset in splits.items():
        there = next((full for full in (f"{name}/{subset}", subset) if _find(full, registry) is not None), None)
        if there is None:
            raise UsageError(f"ir_datasets has no {name}/{subset}.", remedy=_suggest(f"{name}/{subset}", registry))
        if not _find(there, registry).has_qrels():
            raise UsageError(f"{there} has no relevance labels.", remedy=f"Name another subset for {split}.")
        subsets[split] = there
    return subsets


def _suggest(name: str, registry: Any) -> str:
    """Return what there is under a name, or what is spelled alike."""
    names = sorted(registry)
    group = name.rpartition("/")[0]
    below = [known for known in names if known.startswith(f"{name}/")]
    beside = difflib.get_close_matches(name, [known for known in names if group and known.startswith(f"{group}/")])
    near = below or beside or difflib.get_close_matches(name, names, n=NAMES_SHOWN)
    if not near:
        return "https://ir-datasets.com lists the names."
    more = f" and {len(near) - NAMES_SHOWN} more" if len(near) > NAMES_SHOWN else ""
    return f"There are: {', '.join(near[:NAMES_SHOWN])}{more}."


def _require_one_corpus(name: str, datasets: Mapping[str, Any], registry: Any) -> tuple[str, Any]:
    """Return the data set whose documents all of them share, after its name."""
    holders = {holder: dataset for holder, dataset in datasets.items() if dataset.has_docs()}
    if not holders:
        raise UsageError(f"{name} is a group of data sets.", remedy=_suggest(name, registry))
    first, *others = holders
    for other in others:
        if holders[other].docs_handler() is not holders[first].docs_handler():
            raise UsageError(f"{first} and {other} have different documents.", remedy="Name one of them.")
    fields = holders[first].docs_cls()
    if not hasattr(fields, "default_text"):
        raise UsageError(
            f"ir_datasets does not say what the text of {first} is.",
            remedy=f"Write a BEIR folder from its fields: {', '.join(fields._fields)}.",
        )
    return first, holders[first]


def _read_passages(name: str, dataset: Any) -> Iterator[Row]:
    """Yield documents: the text that the library takes for default, without the title that it begins with."""
    for doc in _explain(name, dataset.docs_iter):
        text = doc.default_text()
        title = next((value for field in _TITLES if (value := getattr(doc, field, None))), "")
        if not text.startswith(title):
            title = ""
        fields = doc._asdict().items()
        metadata = {field: value for field, value in fields if field not in _TEXTS and _is_label(value)}
        yield make_row(doc.doc_id, text.removeprefix(title).strip(), title, metadata)


def _is_label(value: Any) -> bool:
    """Return whether a field can be metadata: a number, or short strings."""
    if isinstance(value, int | float):
        return True
    items = value if isinstance(value, list | tuple) else [value]
    return all(isinstance(item, str) for item in items) and sum(map(len, items)) <= METADATA_LENGTH


def _read_queries(datasets: Mapping[str, Any], held_out: Mapping[str, Qrels]) -> Iterator[Row]:
    """Yield every question once; one id with two texts is yielded twice, for the collection to settle.

    A held-out subset's questions without labels, as MS MARCO's dev has them, are left out: they are not for training.
    """
    seen = set()
    for name, dataset in datasets.items():
        if not dataset.has_queries():
            continue
        for query in _explain(name, dataset.queries_iter):
            text = query.default_text() if hasattr(query, "default_text") else getattr(query, "text", None)
            if text is None:
                raise UsageError(
                    f"ir_datasets does not say what the questions of {name} are.",
                    remedy=f"Write a BEIR folder from its fields: {', '.join(query._fields)}.",
                )
            if (query.query_id, text) not in seen and query.query_id in held_out.get(name, (query.query_id,)):
                seen.add((query.query_id, text))
                yield make_row(query.query_id, text)


def _read_qrels(name: str, dataset: Any) -> Qrels:
    """Return labels; of a passage that was judged more than once, for subtopics say, the highest."""
    qrels: Qrels = {}
    for label in _explain(name, dataset.qrels_iter):
        judged = qrels.setdefault(label.query_id, {})
        relevance = read_relevance(label.relevance, name)
        judged[label.doc_id] = max(relevance, judged.get(label.doc_id, relevance))
    return qrels


def _explain(name: str, read: Callable[[], Iterable[Any]]) -> Iterator[Any]:
    """Yield what the library yields; what it raises, with its advice on data that have to be asked for, is ours."""
    try:
        yield from read()
    except Exception as error:  # each of its data sets has a reader of its own
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"ir_datasets cannot read {name}: {reason.rstrip('.')}.",
            remedy=f"Check the connection; `ir_datasets export {name} docs` shows more.",
        ) from error
