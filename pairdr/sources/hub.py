"""`hf:`: data sets of the Hugging Face hub in BEIR's form, or local copies of such a repository.

A repository has the tables `corpus` and `queries` as JSON lines or Parquet, under their names or in folders of these
names, and labels as `qrels/*`, as `data/*`, or in a repository of its own, `REPOSITORY-qrels`. Files are read as they
are, without the datasets library: nothing in them is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pairdr.errors import DataError, UsageError
from pairdr.files import hash_json
from pairdr.formats import read_qrels
from pairdr.lines import read_jsonl
from pairdr.records import Qrels
from pairdr.sources.folder import SPLIT_WORDS, Parts, Row, make_row, read_relevance

FILES = ["corpus*", "queries*", "qrels*", "data/*", "default/*"]
LABEL_FILES = ["*.tsv", "*.tsv.gz", "*.jsonl", "*.jsonl.gz", "*.parquet"]
LABEL_KEYS = (("query-id", "corpus-id"), ("qid", "pid"))
_TABLE = ("{0}.jsonl", "{0}.jsonl.gz", "{0}.parquet", "{0}/**/*.parquet", "{0}/**/*.jsonl*", "data/{0}-*.parquet")
_LABELS = (
    "qrels/*.tsv*",
    *("qrels/**/*.parquet", "qrels/**/*.jsonl*"),
    *("data/**/*.parquet", "data/**/*.jsonl*"),
    "default/**/*.parquet",
)
_SHARD = re.compile(r"-\d+-of-\d+$")


def read_hub_dataset(name: str, splits: Mapping[str, str]) -> Parts:
    """Return what a repository of data in BEIR's form holds.

    Args:
        name: `REPOSITORY`, `REPOSITORY@REVISION`, or a local folder of the same form.
        splits: split to the name that the repository has for it; only these are then taken. Empty: all.

    Raises:
        UsageError: no such repository or split, not BEIR's form, or the hub cannot be reached.
        DataError: a broken file.
    """
    folder, version = _fetch(name, FILES)
    versions = {name: version}
    corpus, queries = (_find_table(folder, table, name) for table in ("corpus", "queries"))
    labels = _find_labels(folder, _LABELS)
    if not labels:
        apart = _name_labels(name)
        found = _fetch_if_there(apart, LABEL_FILES)
        if found is not None:
            versions[apart] = found[1]
            labels = _find_labels(found[0], (*_LABELS, *LABEL_FILES))
    qrels = {split: _read_labels(paths) for split, paths in labels.items()}
    labels_from = _choose_splits(name, splits, qrels) if splits else {split: split for split in qrels}
    taken = {split: qrels[source] for split, source in labels_from.items()}
    other = set[str]().union(*qrels.values()).difference(*taken.values())
    return Parts(
        passages=_read_rows(corpus),
        queries=(row for row in _read_rows(queries) if row["_id"] not in other),
        qrels=taken,
        labels_from=labels_from,
        versions=versions,
    )


def describe_local(name: str) -> list[Any]:
    """Return what changes when a local copy does: paths, sizes and times; nothing for a repository of the hub."""
    places = [Path(path).resolve() for path in (name, _name_labels(name)) if Path(path).is_dir()]
    files = [path for place in places for path in sorted(place.rglob("*")) if path.is_file()]
    return [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files]


def _name_labels(name: str) -> str:
    """Return the repository that has the labels where `name` has none."""
    return f"{Path(name).resolve()}-qrels" if Path(name).is_dir() else f"{name.partition('@')[0]}-qrels"


def _fetch(name: str, patterns: list[str]) -> tuple[Path, str]:
    """Return the local copy of a repository's files, and the commit."""
    found = _fetch_if_there(name, patterns)
    if found is None:
        raise UsageError(
            f"There is no data set {name!r} on the hub and no such folder, or it is private or gated.",
            remedy="Check the name, as in hf:BeIR/scifact; HF_TOKEN opens what you may read.",
        )
    return found


def _fetch_if_there(name: str, patterns: list[str]) -> tuple[Path, str] | None:
    if Path(name).is_dir():
        return Path(name), hash_json(describe_local(name))
    if name.startswith(("/", ".")):
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    repository, _, revision = name.partition("@")
    try:
        folder = snapshot_download(repository, repo_type="dataset", revision=revision or None, allow_patterns=patterns)
    except RepositoryNotFoundError:
        return None
    except Exception as error:  # those of the HTTP library below the hub's client among them
        reason = str(error).strip().splitlines()[0].rstrip(".") if str(error).strip() else type(error).__name__
        raise UsageError(
            f"{name} cannot be read from the hub: {reason}.",
            remedy="Check the name, the revision, the connection, and HF_TOKEN for a private one.",
        ) from error
    return Path(folder), Path(folder).name


def _find_table(folder: Path, table: str, name: str) -> list[Path]:
    for pattern in _TABLE:
        found = sorted(folder.glob(pattern.format(table)))
        if found:
            return found
    raise UsageError(
        f"{name} has no {table} in BEIR's form.",
        remedy=f"It needs {table}.jsonl[.gz], or a folder {table} of Parquet or JSON lines.",
    )


def _find_labels(folder: Path, patterns: Sequence[str]) -> dict[str, list[Path]]:
    """Return split to files: `test.tsv`, `test-00000-of-00001.parquet` or `test/0000.parquet`."""
    for pattern in patterns:
        splits: dict[str, list[Path]] = {}
        for path in sorted(folder.glob(pattern)):
            stem = _SHARD.sub("", path.name.partition(".")[0])
            split = path.parent.name if stem.isdigit() else stem
            if split not in ("corpus", "queries"):
                splits.setdefault(SPLIT_WORDS.get(split, split), []).append(path)
        if splits:
            return splits
    return {}


def _choose_splits(name: str, splits: Mapping[str, str], qrels: Mapping[str, Qrels]) -> dict[str, str]:
    chosen = {split: SPLIT_WORDS.get(source, source) for split, source in splits.items()}
    for source in chosen.values():
        if source not in qrels:
            there = f"There are: {', '.join(sorted(qrels))}." if qrels else "It has no labels at all."
            raise UsageError(f"{name} has no labels of {source!r}.", remedy=there)
    return chosen


def _read_records(paths: Sequence[Path]) -> Iterator[tuple[Path, int, dict[str, Any]]]:
    """Yield (file, number of the record from 1, record) of JSON lines or Parquet."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    for path in paths:
        if path.suffix != ".parquet":
            yield from ((path, number, record) for number, record in read_jsonl(path))
            continue
        done = 0
        try:
            with pq.ParquetFile(path) as table:
                for batch in table.iter_batches():
                    yield from ((path, done + at, record) for at, record in enumerate(batch.to_pylist(), start=1))
                    done += batch.num_rows
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, OSError) as error:
            raise DataError("This is no Parquet file, or a broken one.", path=path, remedy="Fetch it again.") from error


def _read_rows(paths: Sequence[Path]) -> Iterator[Row]:
    for path, number, record in _read_records(paths):
        text_id, text, title = record.get("_id", record.get("id")), record.get("text", 0), record.get("title")
        if text_id is None or not isinstance(text, str | None) or not isinstance(title, str | None):
            raise DataError(
                f"A record needs _id and text, and a title is a text; here are: {', '.join(record)}.",
                path=path,
                line=number,
                remedy="Write a BEIR folder from it.",
            )
        metadata = record.get("metadata")
        known = metadata if isinstance(metadata, dict) else None
        yield make_row(str(text_id), text, title, known)


def _read_labels(paths: Sequence[Path]) -> Qrels:
    qrels: Qrels = {}
    for path in paths:
        if ".tsv" in path.suffixes:
            for query_id, judged in read_qrels(path).items():
                qrels.setdefault(query_id, {}).update(judged)
            continue
        for _, number, record in _read_records([path]):
            keys = next((keys for keys in LABEL_KEYS if all(key in record for key in keys)), None)
            if keys is None:
                raise DataError(
                    f"A label needs query-id and corpus-id; here are: {', '.join(record)}.",
                    path=path,
                    line=number,
                    remedy="Write a BEIR folder from it.",
                )
            query_id, passage_id = (str(record[key]) for key in keys)
            qrels.setdefault(query_id, {})[passage_id] = read_relevance(record.get("score", 1), path.name)
    return qrels
