"""Is the data sound? A report before anything is trained."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairdr.artefact import publish
from pairdr.collection import SPLITS, Collection, find_problems, normalise_text
from pairdr.config import ModelConfig
from pairdr.errors import DataError, UsageError
from pairdr.files import hash_file, write_json
from pairdr.ids import hash_text
from pairdr.records import positives_of
from pairdr.sources.minilm import find_minilm

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SAMPLE = 10000
"""Texts that are tokenised to see how many are cut."""


@dataclass
class CheckReport:
    """What was found.

    Attributes:
        errors: what would corrupt training; `run` stops at them.
        warnings: what is worth a look.
        facts: counts and shares.
    """

    errors: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)


def check_collection(collection: Collection, model: ModelConfig, output: str | Path | None = None) -> CheckReport:
    """Look for what would corrupt or weaken training.

    Args:
        collection: opened with `strict=False`, so that everything wrong is listed at once.
        model: the start model's tokenizer and the lengths at which texts are cut.
        output: a folder for `report.json`.

    Returns:
        Errors, warnings and counts.
    """
    report = CheckReport(errors=list(find_problems(collection)))
    _count_texts(collection, report)
    _count_labels(collection, report)
    _count_queries(collection, report)
    _count_cut(collection, model, report)
    if output is not None:
        with publish(
            output, "check", options=model.as_dict(), inputs={"collection": collection.fingerprint}
        ) as staging:
            write_json(staging.path / "report.json", vars(report))
            staging.facts |= {"errors": len(report.errors), "warnings": len(report.warnings)}
    return report


def require_sound(report: CheckReport, name: str) -> None:
    """Stop at what would corrupt training.

    Raises:
        DataError: naming the first error and how many there are.
    """
    if report.errors:
        more = f" ({len(report.errors) - 1} more)" if len(report.errors) > 1 else ""
        raise DataError(f"{report.errors[0]}{more}.", path=name, remedy="Mend the data; pairdr check lists all.")


def _count_texts(collection: Collection, report: CheckReport) -> None:
    empty, hashes = 0, array("Q")
    for block in collection.read_passages():
        for passage in block:
            text = normalise_text(passage.joined)
            empty += not text
            hashes.append(hash_text(text))
    copies = len(hashes) - len(np.unique(np.array(hashes, dtype=np.uint64)))
    report.facts |= {
        "passages": len(collection.passages),
        "queries": len(collection.queries),
        "empty passages": empty,
        "passages with the text of another": copies,
    }
    choice = collection.config.on_duplicate
    for kind, ids in collection.duplicates.items():
        if ids and choice != "error":
            report.warnings.append(f"{len(ids)} {kind} ids occur twice: the {choice} is taken")
    for count, what in ((empty, "passages are empty"), (copies, "passages have the same text as another")):
        if count:
            report.warnings.append(f"{count} {what}")


def _count_labels(collection: Collection, report: CheckReport) -> None:
    for split in SPLITS:
        try:
            qrels = collection.qrels(split)
        except DataError:
            report.facts[f"{split} queries"] = 0
            if split == "test":
                report.warnings.append("there is no test split: the table is measured on dev")
            else:
                report.errors.append(f"the split {split!r} has no labels")
            continue
        counts = [len(positives_of(qrels, query_id)) for query_id in qrels]
        report.facts |= {f"{split} queries": len(qrels), f"{split} labels per query": round(float(np.mean(counts)), 3)}
        unanswered = [query_id for query_id, count in zip(qrels, counts, strict=True) if not count]
        if unanswered:
            (report.errors if split == "train" else report.warnings).append(
                f"{len(unanswered)} {split} queries have no label above 0, such as {unanswered[0]!r}"
            )


def _count_queries(collection: Collection, report: CheckReport) -> None:
    report.facts |= {"pool": len(collection.pool), "hidden labels": len(collection.hidden)}
    for reason, count in collection.removed.items():
        report.facts[reason] = count
        if count:
            report.warnings.append(f"{count} {reason} are kept out of training")
    counts: Counter[str] = Counter()
    labelled = {query_id for split in collection.given_splits for query_id in collection.labels(split)}
    empty = []
    for block in collection.queries.read_blocks(("id", "text")):
        for query_id, text in block:
            normalised = normalise_text(text)
            counts[normalised] += 1
            if not normalised and query_id in labelled:
                empty.append(query_id)
    copies = sum(count - 1 for text, count in counts.items() if text)
    report.facts["queries with the text of another"] = copies
    if empty:
        report.errors.append(f"{len(empty)} labelled queries are empty, such as {empty[0]!r}")
    if copies:
        report.warnings.append(f"{copies} queries have the same text as another")


def _count_cut(collection: Collection, model: ModelConfig, report: CheckReport) -> None:
    tokenizer = load_tokenizer(model.start)
    if tokenizer is None:
        report.warnings.append(f"no tokenizer.json for {model.start!r}: the share of cut texts is not known")
        return
    rng = random.Random(0)
    passages, queries = collection.passages, collection.queries
    rows = rng.sample(range(len(passages)), min(SAMPLE, len(passages)))
    texts = (collection.passage_at(row).joined for row in rows)
    report.facts["share of passages cut"] = _share_over(tokenizer, texts, model.passage_length)
    rows = rng.sample(range(len(queries)), min(SAMPLE, len(queries)))
    texts = (str(queries.table.column("text")[row].as_py()) for row in rows)
    report.facts["share of queries cut"] = _share_over(tokenizer, texts, model.query_length)
    for what, length in (("passages", model.passage_length), ("queries", model.query_length)):
        share = report.facts[f"share of {what} cut"]
        if share > 0.2:
            report.warnings.append(f"{share:.0%} of the {what} are longer than {length} tokens and are cut")


def find_body(start: str | Path) -> Path:
    """Return the folder of a start model's transformer: of untied towers the first one's, else the start itself."""
    return next(Path(start).glob("query_0_*"), Path(start))


def load_tokenizer(start: str) -> Tokenizer | None:
    """Return the tokenizer of a start model without loading the model, or None where it has no tokenizer.json."""
    from tokenizers import Tokenizer

    name = find_minilm() if start == "minilm" else start
    path = find_body(name) / "tokenizer.json"
    if not Path(name).exists():
        try:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(name, "tokenizer.json"))
        except Exception:
            return None
    if not path.is_file():
        return None
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the tokenizers library raises nothing narrower
        raise UsageError("The tokenizer cannot be read.", path=path, remedy="Download the model again.") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def fingerprint_start(start: str) -> str:
    """Return a hash of a local model folder's weights and settings, or the hub name."""
    folder = Path(find_minilm() if start == "minilm" else start)
    if not folder.is_dir():
        return start
    names = sorted(p for p in folder.rglob("*") if p.suffix in (".json", ".safetensors", ".bin", ".txt"))
    return "+".join(hash_file(path)[:12] for path in names)


def _share_over(tokenizer: Tokenizer, texts: Iterable[str], length: int) -> float:
    lengths = [len(coded.ids) for coded in tokenizer.encode_batch(list(texts))]
    return round(float(np.mean(np.array(lengths) > length)), 4) if lengths else 0.0
