"""The records that pass between stages, and the notation that every module uses.

Notation, the same in every shape comment and docstring:

| letter | meaning |
|---|---|
| B | queries per rank in a batch |
| K | hard negatives per query |
| D | dimensions of a vector |
| N | passages of the corpus |
| W | ranks (processes) |

Ids are strings, always. Scores are larger for better.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

if TYPE_CHECKING:
    from pathlib import Path

Item = TypeVar("Item")

Qrels = dict[str, dict[str, int]]
"""query_id to {passage_id: relevance}; only relevance above 0 counts as relevant."""

RUN_SCHEMA = pa.schema(
    [("query_id", pa.string()), ("passage_ids", pa.list_(pa.string())), ("scores", pa.list_(pa.float32()))]
)


class Query(NamedTuple):
    """A question."""

    query_id: str
    text: str


PASSAGE_COLUMNS = ("id", "title", "text", "metadata")
"""The columns of every table of passages, in the order of `Passage`."""


class Passage(NamedTuple):
    """A passage of the corpus; the title may be empty. `metadata` is a JSON object, or empty; no model sees it."""

    passage_id: str
    title: str
    text: str
    metadata: str = ""

    @property
    def joined(self) -> str:
        """Return title and text as the one string that is encoded."""
        return f"{self.title} {self.text}" if self.title else self.text


class Scored(NamedTuple):
    """A passage's place in a run."""

    passage_id: str
    score: float


@dataclass(frozen=True)
class Example:
    """One training row: a query, one positive, its hard negatives, and what the teacher said of each.

    Attributes:
        query_id: the query.
        positive_id: the passage that answers it.
        negative_ids: hard negatives, hardest first; may be empty.
        known_positive_ids: every passage known to answer the query; never a negative in any batch.
        source: "labelled" or "pseudo".
        positive_score: the teacher's score of the positive; NaN where no teacher scored it.
        negative_scores: the teacher's score of each negative; NaN where no teacher scored it.
    """

    query_id: str
    positive_id: str
    negative_ids: tuple[str, ...]
    known_positive_ids: tuple[str, ...]
    source: str
    positive_score: float
    negative_scores: tuple[float, ...]


class Run:
    """Ranked passages per query, best first. Backed by Arrow, so a run of any size can be memory-mapped."""

    def __init__(self, table: pa.Table) -> None:
        self.table = table
        ids = table.column("query_id").to_pylist()
        self._row_of = {query_id: row for row, query_id in enumerate(ids)}

    @classmethod
    def from_mapping(cls, ranked: Mapping[str, Sequence[tuple[str, float]]]) -> Run:
        """Make a run of {query_id: [(passage_id, score), ...]}, best first."""
        columns = [
            pa.array(list(ranked), pa.string()),
            pa.array([[passage_id for passage_id, _ in hits] for hits in ranked.values()], pa.list_(pa.string())),
            pa.array([[score for _, score in hits] for hits in ranked.values()], pa.list_(pa.float32())),
        ]
        return cls(pa.Table.from_arrays(columns, schema=RUN_SCHEMA))

    @classmethod
    def open(cls, path: Path) -> Run:
        """Memory-map a run that was written as an Arrow file."""
        with pa.memory_map(str(path)) as source:
            return cls(pa.ipc.open_file(source).read_all())

    def __len__(self) -> int:
        return len(self._row_of)

    def __iter__(self) -> Iterator[str]:
        return iter(self._row_of)

    def __contains__(self, query_id: object) -> bool:
        return query_id in self._row_of

    def __getitem__(self, query_id: str) -> list[Scored]:
        row = self._row_of[query_id]
        ids = self.table.column("passage_ids")[row].as_py()
        scores = self.table.column("scores")[row].as_py()
        return [Scored(*hit) for hit in zip(ids, scores, strict=True)]

    def count_hits(self) -> int:
        """Return how many passages the run holds over all queries."""
        return int(pc.sum(pc.list_value_length(self.table.column("passage_ids"))).as_py() or 0)


def split_blocks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Yield the items in lists of at most `size`, reading no further than the list under way."""
    stream = iter(items)
    while block := list(islice(stream, size)):
        yield block


def positives_of(qrels: Qrels, query_id: str) -> tuple[str, ...]:
    """Return the ids of a query's relevant passages, in the order of the qrels."""
    return tuple(passage_id for passage_id, relevance in qrels.get(query_id, {}).items() if relevance > 0)
