"""Teacher scores made on a Ray cluster: parts of the queries go to workers that hold the teacher.

Questions and passages are read on the driver's node, and what the teacher is made of is carried to the workers, so no
file system has to be shared.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pairdr.cluster import join_cluster
from pairdr.collection import Collection
from pairdr.config import ModelConfig
from pairdr.errors import UsageError
from pairdr.lexical import LexicalIndex
from pairdr.records import PASSAGE_COLUMNS, RUN_SCHEMA, Passage, Query, Run
from pairdr.scoring import Scores, Spread, score_part
from pairdr.store_config import RayConfig
from pairdr.texts import TextTable
from pairdr.workers import ShippedFolder

Part = list[tuple[Query, list[Passage]]]


@contextlib.contextmanager
def open_spread(
    config: RayConfig,
    collection: Collection,
    run: Run,
    depth: int,
    recipe: dict[str, Any],
    folder: str | Path,
    index: LexicalIndex,
    model: ModelConfig,
) -> Iterator[Spread | None]:
    """Make ready what scores elsewhere, while the block runs; None where the options say here.

    Args:
        config: the cluster, and how many workers of which size.
        collection: the data; its cache is on this machine.
        run: candidates in rank order.
        depth: candidates per query.
        recipe: the teacher's, as `read_recipe` gives it.
        folder: where the recipe was saved.
        index: BM25.
        model: as of `load_teacher`.

    Raises:
        MissingExtraError: Ray is not installed.
        UsageError: no cluster; a device, which is not this machine's to choose.
    """
    if config.on != "ray":
        yield None
        return
    if model.device is not None:
        raise UsageError(
            "Workers run on the GPUs that they are given, or else on CPUs.",
            remedy="Leave --device out, and see --gpus-per-worker.",
        )
    with join_cluster(config) as cluster:
        used = _prune_recipe(recipe)
        work = OpenTeacher(
            _ship_sources(used, Path(folder)),
            ShippedFolder.put(index.folder) if _needs_index(used) else None,
            replace(model, device="cuda" if config.gpus_per_worker else "cpu"),
            config.cpus_per_worker,
        )
        read = ReadCandidates(collection.folder, _put_run(run, depth))
        yield lambda parts: cluster.map_blocks(parts, read, work)


@dataclass(frozen=True)
class ReadCandidates:
    """Reads questions of a converted collection, and the passages that a run has for them.

    Attributes:
        folder: of the collection.
        run: reference of the run's table.
    """

    folder: Path
    run: Any

    def __call__(self, query_ids: list[str]) -> Part:
        """Return the questions with the passages that are to be scored."""
        (queries, passages), run = _open_tables(self.folder), _open_run(self.run)
        found: Part = []
        for query_id in query_ids:
            ((text,),) = queries.take(np.array([queries.row_of(query_id)]), ("text",))
            rows = np.array([passages.row_of(hit.passage_id) for hit in run[query_id]], dtype=np.int64)
            found.append((Query(query_id, text), [Passage(*row) for row in passages.take(rows, PASSAGE_COLUMNS)]))
        return found


@dataclass(frozen=True)
class OpenTeacher:
    """Loads the teacher in a worker."""

    recipe: dict[str, Any]
    index: ShippedFolder | None
    model: ModelConfig
    threads: int

    def __call__(self) -> Callable[[Part], Scores]:
        """Return what scores a part."""
        import torch

        from pairdr.teachers import load_teacher

        torch.set_num_threads(self.threads)
        with contextlib.ExitStack() as stack:
            recipe = _unpack_sources(self.recipe, stack)
            index = None if self.index is None else LexicalIndex(stack.enter_context(self.index.unpack()))
            teacher = load_teacher(recipe, "", index, self.model)
        return lambda part: score_part(teacher, part)


def _prune_recipe(recipe: dict[str, Any]) -> dict[str, Any]:
    """Return a teacher's description without the members that weigh nothing."""
    if recipe["kind"] != "fusion":
        return recipe
    pairs = zip(recipe["members"], recipe["weights"], strict=True)
    used = [(_prune_recipe(member), weight) for member, weight in pairs if weight > 0]
    return recipe | {"members": [member for member, _ in used], "weights": [weight for _, weight in used]}


def _needs_index(recipe: dict[str, Any]) -> bool:
    return recipe["kind"] == "bm25" or any(map(_needs_index, recipe.get("members", ())))


def _ship_sources(recipe: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return a description whose folders are in the object store; hub names stay as they are."""
    if recipe["kind"] == "fusion":
        return recipe | {"members": [_ship_sources(member, folder) for member in recipe["members"]]}
    place = folder / str(recipe.get("source", ""))
    return recipe | {"source": ShippedFolder.put(place)} if "source" in recipe and place.is_dir() else recipe


def _unpack_sources(recipe: dict[str, Any], stack: contextlib.ExitStack) -> dict[str, Any]:
    """Return a description whose folders are there while the stack is open."""
    if recipe["kind"] == "fusion":
        return recipe | {"members": [_unpack_sources(member, stack) for member in recipe["members"]]}
    source = recipe.get("source")
    if not isinstance(source, ShippedFolder):
        return recipe
    return recipe | {"source": str(stack.enter_context(source.unpack()))}


def _put_run(run: Run, depth: int) -> Any:
    """Put the first passages of a run into the object store and return the reference."""
    import ray

    columns = [pc.list_slice(run.table[name], 0, depth, return_fixed_size_list=False) for name in RUN_SCHEMA.names[1:]]
    return ray.put(pa.Table.from_arrays([run.table["query_id"], *columns], schema=RUN_SCHEMA))


@lru_cache(maxsize=1)
def _open_run(reference: Any) -> Run:
    import ray

    return Run(ray.get(reference))


@lru_cache(maxsize=1)
def _open_tables(folder: Path) -> tuple[TextTable, TextTable]:
    return TextTable(folder, "queries"), TextTable(folder, "passages")
