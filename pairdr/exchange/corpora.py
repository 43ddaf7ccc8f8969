"""Collections of other tools: passages and queries by their ids, read and written."""

from __future__ import annotations

import csv
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from pairdr.errors import DataError
from pairdr.exchange.files import (
    NO_TITLE,
    flatten,
    read_columns,
    read_objects,
    read_quoted_columns,
    read_title,
    write_columns,
    write_objects,
)
from pairdr.formats import require_id
from pairdr.lines import read_lines
from pairdr.records import Passage, Query

CorpusWriter = Callable[[Path, Iterable[Passage], Counter[str]], None]


def read_corpus(path: Path, titles: Path | None = None) -> Iterator[tuple[int, Passage]]:
    """Yield (line number, passage) of a corpus.

    Args:
        path: JSON lines (`docid` or `_id`, `title`, `text` or `document_text`); DPR's psgs_w100.tsv, which its header
            tells; or columns without a header: id and text, or id, title and text.
        titles: id and title in the order of `path`, for columns; a passage may have none.
    """
    if ".jsonl" in path.suffixes:
        for found in read_objects(path):
            title, text = found.text_or_empty("title"), found.text("text", "document_text")
            yield found.line, Passage(found.id("docid", "_id"), title, text)
    elif next(read_lines(path), (0, ""))[1].startswith("id\t"):
        for line, (passage_id, text, title) in _read_after_header(path):
            yield line, Passage(_require_id(passage_id, path, line), title, text)
    else:
        named = _read_titles(titles) if titles is not None else iter(())
        passage_id, title, line = next(named, ("", "", 0))
        for number, (own_id, *texts) in read_columns(path, (2, 3), "id, text; or id, title, text"):
            own_title = read_title(texts[0]) if len(texts) == 2 else ""
            if own_id == passage_id:
                own_title = title
                passage_id, title, line = next(named, ("", "", 0))
            yield number, Passage(_require_id(own_id, path, number), own_title, texts[-1])
        if passage_id:
            raise DataError(
                f"Passage {passage_id} is not in {path.name}, or not in this order.",
                path=titles,
                line=line,
                remedy="Sort both files alike.",
            )


def read_queries(path: Path) -> Iterator[tuple[int, Query]]:
    """Yield (line number, query) of a file of `id<TAB>text`."""
    for line, (query_id, text) in read_columns(path, (2,), "id, text"):
        yield line, Query(_require_id(query_id, path, line), text)


def write_collection(folder: Path, passages: Iterable[Passage], counts: Counter[str]) -> None:
    """Write MS MARCO's collection.tsv. It has no titles: title and text are one string, as they are encoded."""
    with (folder / "collection.tsv").open("w", encoding="utf-8") as stream:
        for passage in passages:
            write_columns(stream, counts, passage.passage_id, passage.joined)


def write_paragraphs(folder: Path, passages: Iterable[Passage], counts: Counter[str]) -> None:
    """Write RocketQA's para.txt and para.title.txt."""
    with (
        (folder / "para.txt").open("w", encoding="utf-8") as texts,
        (folder / "para.title.txt").open("w", encoding="utf-8") as titles,
    ):
        for passage in passages:
            write_columns(texts, counts, passage.passage_id, passage.text)
            write_columns(titles, counts, passage.passage_id, passage.title or NO_TITLE)


def write_psgs(folder: Path, passages: Iterable[Passage], counts: Counter[str]) -> None:
    """Write DPR's psgs_w100.tsv: a header; id, text and title, quoted where they have quotes."""
    with (folder / "psgs_w100.tsv").open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(("id", "text", "title"))
        for passage in passages:
            writer.writerow([flatten(text, counts) for text in (passage.passage_id, passage.text, passage.title)])


def write_tevatron_corpus(folder: Path, passages: Iterable[Passage], counts: Counter[str]) -> None:
    """Write Tevatron's corpus for the new keys: one string, under both names that it goes by there."""
    rows = ({"docid": p.passage_id, "text": p.joined, "document_text": p.joined} for p in passages)
    write_objects(folder / "corpus.jsonl", rows)


def write_tevatron_old_corpus(folder: Path, passages: Iterable[Passage], counts: Counter[str]) -> None:
    """Write Tevatron's corpus for the old keys."""
    rows = ({"docid": p.passage_id, "title": p.title, "text": p.text} for p in passages)
    write_objects(folder / "corpus.jsonl", rows)


def write_candidate_pool(folder: Path, passages: Iterable[Passage], counts: Counter[str]) -> None:
    """Write the texts that FlagEmbedding's miner takes negatives from."""
    write_objects(folder / "candidate_pool.jsonl", ({"text": p.joined} for p in passages))


def _read_titles(path: Path) -> Iterator[tuple[str, str, int]]:
    for line, (passage_id, title) in read_columns(path, (2,), "id, title"):
        yield passage_id, read_title(title), line


def _read_after_header(path: Path) -> Iterator[tuple[int, list[str]]]:
    lines = read_quoted_columns(path, 3)
    next(lines)
    return lines


def _require_id(text: str, path: Path, line: int) -> str:
    found = require_id(text, "The id", path, line)
    if not found:
        raise DataError("The id is blank.", path=path, line=line, remedy="Give it one.")
    return found
