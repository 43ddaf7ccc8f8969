"""The data of `train.py`: a data set by its name, and seeded rows of it."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from pathlib import Path

from pairdr.collection import Collection, open_collection
from pairdr.formats import Examples, write_examples
from pairdr.records import Example
from pairdr.sources.python_docs import build_python_docs

SEED = 13


def open_data(name: str, folder: Path) -> Collection:
    """Open a data set by its name, making it in `folder` where it has to be made."""
    if name == "python_docs":
        build_python_docs(folder / "python_docs", train_queries=3000, pool_queries=0)
        return open_collection(folder / "python_docs")
    source = Path(os.environ["PAIRDR_DATA"]) / "en_qa_mix"
    if name == "en_qa_mix":
        return open_collection(source)
    return open_collection(_cut_words(open_collection(source), folder / "words100"))


def draw_examples(data: Collection, count: int, path: Path) -> Examples:
    """Write seeded rows: a labelled question, its passage, and another passage as the hard negative."""
    rng = random.Random(SEED)
    qrels = data.qrels("train")
    queries = rng.sample(sorted(qrels), min(count, len(qrels)))
    places = range(len(data.passages))

    def draw() -> Iterator[Example]:
        for query_id in queries:
            positive = min(qrels[query_id])
            other = data.passages.id_of(rng.choice(places))
            yield Example(query_id, positive, (other,), (positive,), "labelled", 0.0, (0.0,))

    write_examples(path, draw())
    return Examples.open(path)


def _cut_words(data: Collection, folder: Path) -> Path:
    """Write the texts of a data set as passages of exactly 100 words, with its training questions."""
    folder.mkdir()
    words: list[str] = []
    passages: list[str] = []
    for row in range(len(data.passages)):
        words += data.passage_at(row).joined.split()
        while len(words) >= 100:
            passages.append(" ".join(words[:100]))
            del words[:100]
    queries = sorted(data.qrels("train"))[: len(passages)]
    (folder / "qrels").mkdir()
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"_id": f"p{n}", "title": "", "text": t}) + "\n" for n, t in enumerate(passages))
    with (folder / "queries.jsonl").open("w", encoding="utf-8") as stream:
        stream.writelines(json.dumps({"_id": q, "text": data.query(q).text}) + "\n" for q in queries)
    with (folder / "qrels" / "train.tsv").open("w", encoding="utf-8") as stream:
        stream.write("query-id\tcorpus-id\tscore\n")
        stream.writelines(f"{q}\tp{n}\t1\n" for n, q in enumerate(queries))
    return folder
