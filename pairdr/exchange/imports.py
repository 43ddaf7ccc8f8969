"""Files of other tools to a BEIR folder, and training files to examples beside it.

What has no id gets one from its words, so equal texts are one passage and equal questions one query. A corpus passes
through; of what training files name, memory holds the labels and two 64-bit hashes of each text.
"""

from __future__ import annotations

import math
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from pairdr.answers import ANSWERS
from pairdr.artefact import publish
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig
from pairdr.errors import DataError, UsageError
from pairdr.exchange.corpora import read_corpus, read_queries
from pairdr.exchange.files import dump_json
from pairdr.exchange.training import (
    Candidate,
    RowReader,
    TrainingRow,
    read_dpr,
    read_flagembedding,
    read_rocketqa,
    read_tevatron,
)
from pairdr.files import hash_file, hash_json
from pairdr.formats import Examples, read_qrels, write_examples, write_qrels
from pairdr.ids import hash_text
from pairdr.records import Example, Qrels, Query, positives_of
from pairdr.store_config import ImportDataConfig, SourceFormat

READERS: dict[str, RowReader] = {
    "dpr": read_dpr,
    "tevatron": read_tevatron,
    "flagembedding": read_flagembedding,
    "rocketqa": read_rocketqa,
}
_CORPUS_FILES = ("collection.tsv", "para.txt", "corpus.tsv")
_QRELS_FILE = re.compile(r"qrels\.(.+?)\.tsv(?:\.gz)?")
_QUERIES_FILE = re.compile(r"queries\.(.+?)\.tsv(?:\.gz)?|(.+?)\.query\.txt(?:\.gz)?")
_ID_DIGITS = 20
Sources = Sequence[tuple[str, Path]]


def import_data(
    sources: Sources,
    source_format: SourceFormat,
    data: DataConfig,
    config: ImportDataConfig,
    output: Path,
    corpus: Path | None = None,
) -> dict[str, Any]:
    """Turn files of another tool into a BEIR folder, and training files into examples beside it.

    Args:
        sources: (split, file) of training files; or one folder of a collection, whose files say their splits.
        source_format: what they are.
        data: how training will open the folder; the examples leave out what is kept for dev.
        config: what is taken.
        output: the BEIR folder; the examples stand at `<output>.examples`.
        corpus: passages by their ids; needed where training files name passages by id alone.

    Returns:
        Counts of what was written and of what was left out.

    Raises:
        UsageError: a file that is missing, or a folder where files are expected.
        DataError: a broken line, naming it.
    """
    folder = next((path for _, path in sources if path.is_dir()), None)
    if folder is None and source_format != "msmarco":
        return _import_training(sources, source_format, data, config, output, corpus)
    if folder is None or len(sources) > 1 or corpus is not None or source_format not in ("msmarco", "rocketqa"):
        raise UsageError(
            "A folder is a collection of msmarco or rocketqa, and stands alone; the other formats are training files.",
            path=sources[0][1],
            remedy="Name one folder, or training files.",
        )
    return _import_collection(folder, output)


def parse_sources(texts: Sequence[str]) -> list[tuple[str, Path]]:
    """Return (split, file) of each FILE or SPLIT=FILE; a file without a split is for training."""
    sources = []
    for text in texts:
        split, _, place = text.partition("=")
        named = place != "" and re.fullmatch(r"[\w.-]+", split) is not None and not Path(text).exists()
        sources.append((split, Path(place)) if named else ("train", Path(text)))
    return sources


def identify_query(query: Query) -> str:
    """Return the query's id, or one that its words give."""
    return query.query_id or hash_json([query.text])[:_ID_DIGITS]


def identify_passage(found: Candidate) -> str:
    """Return the passage's id, or one that its title and text give."""
    return found.passage_id or hash_json([found.title, found.text])[:_ID_DIGITS]


class _OnceFile:
    """A file of JSON lines in which an id stands once; where it comes again, it has to mean the same."""

    def __init__(self, stream: IO[str], kind: str) -> None:
        self._stream, self._kind = stream, kind
        self._given = np.empty(0, dtype=np.uint64)
        self._seen: dict[int, int] = {}
        self.count = 0

    def __contains__(self, text_id: str) -> bool:
        key = hash_text(text_id)
        return key in self._seen or self._is_given(key)

    def fill(self, records: Iterable[Mapping[str, Any]]) -> None:
        """Write records that have an id each; of what is added later under these ids, nothing is compared."""
        keys = array("Q")
        for record in records:
            keys.append(hash_text(record["_id"]))
            self._stream.write(dump_json(record) + "\n")
        self._given = np.sort(np.array(keys, dtype=np.uint64))
        self.count += len(keys)

    def add(self, record: Mapping[str, Any], path: Path, line: int) -> bool:
        """Write a record unless its id is there already, and return whether it was written.

        Raises:
            DataError: the id stands for something else.
        """
        key, digest = hash_text(record["_id"]), hash_text(dump_json(record))
        if self._is_given(key):
            return False
        if key in self._seen:
            if self._seen[key] != digest:
                raise DataError(
                    f"{self._kind} {record['_id']} had other words before.",
                    path=path,
                    line=line,
                    remedy="Give one of the two another id, or the corpus that has the right one as --corpus.",
                )
            return False
        self._seen[key] = digest
        self._stream.write(dump_json(record) + "\n")
        self.count += 1
        return True

    def _is_given(self, key: int) -> bool:
        place = int(np.searchsorted(self._given, np.uint64(key)))
        return place < len(self._given) and int(self._given[place]) == key


class _RowFiles:
    """The texts of training rows on their way into a BEIR folder."""

    def __init__(self, folder: Path, files: ExitStack, counts: Counter[str]) -> None:
        streams = [
            files.enter_context((folder / name).open("w", encoding="utf-8"))
            for name in ("corpus.jsonl", "queries.jsonl", ANSWERS)
        ]
        self.passages, self.queries = _OnceFile(streams[0], "Passage"), _OnceFile(streams[1], "Query")
        self._answers, self._counts = streams[2], counts

    def add_row(self, row: TrainingRow, path: Path, line: int) -> None:
        """Write the texts of a row that are not there yet."""
        query_id = identify_query(row.query)
        if self.queries.add({"_id": query_id, "text": row.query.text}, path, line) and row.answers:
            self._answers.write(dump_json({"_id": query_id, "answers": row.answers}) + "\n")
        for found in (*row.positives, *row.negatives, *row.others):
            passage_id = identify_passage(found)
            if found.text is not None:
                record = {"_id": passage_id, "title": found.title, "text": found.text}
                self._counts["passages that the training files bring"] += self.passages.add(record, path, line)
            elif passage_id not in self.passages:
                raise DataError(
                    f"There is no text for passage {passage_id}.",
                    path=path,
                    line=line,
                    remedy="Name the corpus that has it as --corpus.",
                )


def _import_training(
    sources: Sources,
    source_format: str,
    data: DataConfig,
    config: ImportDataConfig,
    output: Path,
    corpus: Path | None,
) -> dict[str, Any]:
    read = READERS[source_format]
    facts = _import_rows(sources, read, source_format, corpus, output)
    files = [path for split, path in sources if split == "train"]
    if not files:
        return facts
    keep_scores = config.scores == "keep" or (config.scores == "auto" and source_format != "dpr")
    try:
        collection = open_collection(output, data)
    except DataError as error:
        what = f"{error.what} The data are written, the examples are not."
        raise DataError(what, path=error.path, line=error.line, remedy=error.remedy) from error
    inputs = {"collection": collection.fingerprint} | {path.name: hash_file(path) for path in files}
    options = {"from": source_format} | config.as_dict()
    with publish(f"{output}.examples", "examples", options=options, inputs=inputs) as staging:
        counts: Counter[str] = Counter()
        labelled = staging.path / "labelled.arrow"
        count = write_examples(labelled, _make_examples(files, read, collection, keep_scores, counts))
        write_examples(staging.path / "plain.arrow", map(_forget_scores, Examples.open(labelled)))
        write_examples(staging.path / "pseudo.arrow", [])
        staging.facts |= {"teacher": None, "note": f"read from {source_format}", "counts": dict(+counts)}
        staging.facts |= {"plain": count, "labelled": count, "pseudo": 0}
    return facts | {"examples": count} | +counts


def _import_rows(
    sources: Sources, read: RowReader, source_format: str, corpus: Path | None, output: Path
) -> dict[str, Any]:
    inputs = {f"{split}/{path.name}": _hash_input(path) for split, path in sources}
    if corpus is not None:
        inputs["corpus"] = _hash_input(corpus)
    with (
        publish(output, "beir", options={"from": source_format}, inputs=inputs, edited=True) as staging,
        ExitStack() as files,
    ):
        counts: Counter[str] = Counter()
        qrels: dict[str, Qrels] = {split: {} for split, _ in sources}
        folder = _RowFiles(staging.path, files, counts)
        if corpus is not None:
            folder.passages.fill(_make_records(corpus))
        for split, path in sources:
            for line, row in read(path):
                if not row.positives and split != "train":  # or training would take it for one of its own
                    counts["dev or test queries without a positive"] += 1
                    continue
                folder.add_row(row, path, line)
                for found in row.positives:
                    qrels[split].setdefault(identify_query(row.query), {})[identify_passage(found)] = 1
        files.close()
        if not (staging.path / ANSWERS).stat().st_size:
            (staging.path / ANSWERS).unlink()
        for split, labels in qrels.items():
            if not labels:
                path = next(path for name, path in sources if name == split)
                raise DataError("No row has a positive.", path=path, remedy="Training and dev need some.")
            write_qrels(staging.path / "qrels" / f"{split}.tsv", labels)
            counts[f"{split} queries"] = len(labels)
        staging.facts |= {"passages": folder.passages.count, "queries": folder.queries.count} | +counts
    return dict(staging.facts)


def _import_collection(folder: Path, output: Path) -> dict[str, Any]:
    corpus = next((path for name in _CORPUS_FILES if (path := _find_file(folder, name)) is not None), None)
    titles = _find_file(folder, "para.title.txt")
    qrels_files, queries_files = _find_splits(folder, _QRELS_FILE), _find_splits(folder, _QUERIES_FILE)
    if corpus is None or not queries_files:
        raise UsageError(
            "This is no collection.",
            path=folder,
            remedy=f"One has {' or '.join(_CORPUS_FILES)}, and queries.SPLIT.tsv or SPLIT.query.txt.",
        )
    paths = (corpus, *([titles] if titles else []), *qrels_files.values(), *queries_files.values())
    inputs = {path.name: hash_file(path) for path in paths}
    with (
        publish(output, "beir", options={"from": "msmarco"}, inputs=inputs, edited=True) as staging,
        ExitStack() as files,
    ):
        counts: Counter[str] = Counter()
        named: set[str] = set()
        for split, path in qrels_files.items():
            labels = read_qrels(path)
            named |= set(labels)
            write_qrels(staging.path / "qrels" / f"{split}.tsv", labels)
            counts[f"{split} queries"] = len(labels)
        texts, questions = (
            _OnceFile(files.enter_context((staging.path / name).open("w", encoding="utf-8")), kind)
            for name, kind in (("corpus.jsonl", "Passage"), ("queries.jsonl", "Query"))
        )
        texts.fill(_make_records(corpus, titles))
        for split, path in queries_files.items():
            for line, query in read_queries(path):
                if split == "train" or query.query_id in named:  # others would be taken for training's own
                    questions.add({"_id": query.query_id, "text": query.text}, path, line)
                else:
                    counts["dev or test queries without labels"] += 1
        files.close()
        staging.facts |= {"passages": texts.count, "queries": questions.count} | +counts
    return dict(staging.facts)


def _make_examples(
    files: Iterable[Path], read: RowReader, collection: Collection, keep_scores: bool, counts: Counter[str]
) -> Iterator[Example]:
    """Yield an example for each positive of each row whose query is trained on."""
    labels = collection.qrels("train")
    for row in (row for path in files for _, row in read(path)):
        query_id = identify_query(row.query)
        known = positives_of(labels, query_id)
        if not known:
            counts["rows kept for dev, or without a positive"] += 1
            continue
        positives, negatives = (
            {identify_passage(found): found.score if keep_scores else math.nan for found in chosen}
            for chosen in (row.positives, row.negatives)
        )
        kept = {key: negatives[key] for key in negatives if key not in known and key not in collection.held_out}
        counts["negatives that are positives, or held out"] += len(negatives) - len(kept)
        for positive_id, score in (positives or dict.fromkeys(known, math.nan)).items():
            yield Example(query_id, positive_id, tuple(kept), known, "labelled", score, tuple(kept.values()))


def _forget_scores(example: Example) -> Example:
    nothing = (math.nan,) * len(example.negative_ids)
    return replace(example, positive_score=math.nan, negative_scores=nothing)


def _make_records(corpus: Path, titles: Path | None = None) -> Iterator[dict[str, str]]:
    for _, passage in read_corpus(corpus, titles):
        yield {"_id": passage.passage_id, "title": passage.title, "text": passage.text}


def _hash_input(path: Path) -> str:
    if not path.is_file():
        raise UsageError("There is no such file.", path=path, remedy="Check the path.")
    return hash_file(path)


def _find_file(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _find_splits(folder: Path, name: re.Pattern[str]) -> dict[str, Path]:
    """Return the files of each split. Of two dev sets the small one is dev; a second train file is passed over.

    RocketQA's qrels.train.addition.tsv is such a second file: as a split of its own it would take its queries away
    from training.
    """
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        match = name.fullmatch(path.name)
        split = "" if match is None else next(filter(None, match.groups()))
        if split and not split.startswith("train."):
            found.setdefault(split, path)
    if "dev.small" in found:
        small = {"dev": found.pop("dev.small")}
        found = small | {"dev.full" if split == "dev" else split: path for split, path in found.items()}
    return found
