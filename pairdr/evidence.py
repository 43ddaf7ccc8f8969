"""What is known of the training labels: who ranks a query's passages where, and what the teacher says of them."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from pairdr.artefact import read_manifest
from pairdr.collection import Collection
from pairdr.config import LexicalConfig, ModelConfig, SearchConfig
from pairdr.errors import UsageError
from pairdr.files import hash_file
from pairdr.formats import Examples, read_run
from pairdr.lexical import LexicalIndex, index_words
from pairdr.mine import Candidates, open_candidates
from pairdr.parts import is_work_folder
from pairdr.records import Example, Run, Scored, positives_of
from pairdr.scoring import score_candidates
from pairdr.search import rank_dense
from pairdr.store_config import AuditConfig
from pairdr.teachers import Teacher, load_teacher, read_recipe
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from pairdr.backends import Encoder

Scores = dict[str, float]
Ranks = dict[str, dict[str, tuple[int, float]]]
"""system to {passage id: (rank from 1, score)}, of the systems that ranked a query."""


@dataclass(frozen=True)
class AuditSources:
    """What an audit reads besides the data; the more there is, the more kinds of faults are found.

    Attributes:
        examples: the folder that `label` wrote.
        candidates: what mining found.
        teacher: scores candidates; without one the scores that the examples keep are taken.
        model: the final model and its vectors of the corpus.
        run: the final model's run of training and pool queries, in place of `model`.
        inputs: further fingerprints for the manifest.
    """

    examples: Path
    candidates: Candidates | None = None
    teacher: Teacher | None = None
    model: tuple[Encoder, VectorStore] | None = None
    run: Run | None = None
    inputs: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Case:
    """What is known of one labelled query.

    Attributes:
        query_id: the query.
        positives: its relevant passages.
        negatives: mined, or negatives of a training row, and not judged by a person.
        others: further candidates without a label.
        scores: the teacher's, by passage.
        ranks: who ranks what where.
    """

    query_id: str
    positives: tuple[str, ...]
    negatives: tuple[str, ...]
    others: tuple[str, ...]
    scores: Scores
    ranks: Ranks


def open_work(folder: str | Path, collection: Collection, device: str | None = None) -> AuditSources:
    """Open the parts of a work folder of `pairdr run`.

    Args:
        folder: the work folder.
        collection: the data, opened as for the run.
        device: cpu, cuda, ...; unset picks the best there is.

    Raises:
        ArtefactError: the run is not finished, or its candidates are of other data.
    """
    from pairdr.backends import open_encoder

    folder = Path(folder)
    encoder, store = open_encoder(folder / "models" / "pair", device), VectorStore(folder / "vectors" / "pair")
    store.require_encoder(encoder.fingerprint)
    contract = encoder.contract
    lengths = ModelConfig(
        query_length=contract.query_length, passage_length=contract.passage_length, title=contract.title, device=device
    )
    recipe = read_recipe(folder / "teacher")
    teacher = None
    if recipe is not None:
        mined_by = "student" if (folder / "vectors" / "student").is_dir() else "start"
        places = [folder / "vectors" / name for name in (mined_by, "whole")]
        stores = [VectorStore(place) for place in places if place.is_dir()]
        teacher = load_teacher(recipe, folder / "teacher", LexicalIndex(folder / "bm25"), lengths, stores)
    return AuditSources(
        examples=folder / "examples",
        candidates=open_candidates(folder / "candidates", collection),
        teacher=teacher,
        model=(encoder, store),
        inputs={"teacher": read_manifest(folder / "teacher").fingerprint, "model": encoder.fingerprint},
    )


def open_parts(
    examples: str | Path,
    collection: Collection,
    *,
    candidates: str | Path | None = None,
    teacher: str | Path | None = None,
    run: str | Path | None = None,
    model: ModelConfig = ModelConfig(),
    lexical: LexicalConfig = LexicalConfig(),
    words: str | Path = "bm25",
) -> AuditSources:
    """Open what an audit reads, part by part.

    Args:
        examples: the folder that `label` wrote.
        collection: the data.
        candidates: what `mine` wrote, or a run of another tool.
        teacher: what `teach` wrote.
        run: the final model's run of training and pool queries: a TREC file, or a folder of `search`.
        model: device, and lengths of a dual encoder that pairdr did not save.
        lexical: BM25 of the teacher.
        words: where that is made.
    """
    inputs, judge, ranked = {}, None, None
    if teacher is not None:
        recipe = read_recipe(teacher)
        inputs["teacher"] = read_manifest(teacher).fingerprint
        if recipe is not None:
            judge = load_teacher(recipe, teacher, index_words(collection, lexical, words), model)
    if run is not None:
        path = Path(run) / "run.arrow" if Path(run).is_dir() else Path(run)
        ranked = read_run(path)
        inputs["run"] = hash_file(path)
    mined = None if candidates is None else open_candidates(candidates, collection)
    return AuditSources(Path(examples), mined, judge, run=ranked, inputs=inputs)


def open_sources(
    place: Path,
    collection: Collection,
    parts: Mapping[str, Path | None],
    *,
    model: ModelConfig,
    lexical: LexicalConfig,
    words: Path,
) -> AuditSources:
    """Open a work folder, or examples with parts beside them: candidates, teacher, run (see `open_parts`).

    Raises:
        UsageError: parts beside a work folder, which has its own.
    """
    named = {name: part for name, part in parts.items() if part is not None}
    if not is_work_folder(place):
        return open_parts(place, collection, **named, model=model, lexical=lexical, words=words)
    if named:
        raise UsageError(
            f"A work folder is audited as it is, without --{next(iter(named))}.",
            path=place,
            remedy=f"Name {place / 'examples'} and the parts.",
        )
    return open_work(place, collection, model.device)


def rank_systems(collection: Collection, sources: AuditSources, depth: int, query_ids: Sequence[str]) -> dict[str, Run]:
    """Return the runs that there are, by "bm25", "student" and "model"; the final model ranks the given queries."""
    runs = {}
    if sources.candidates is not None:
        runs = {"bm25": sources.candidates.bm25, "student": sources.candidates.student}
    if sources.run is not None:
        runs["model"] = sources.run
    elif sources.model is not None:
        queries = (collection.query(query_id) for query_id in query_ids)
        ranked: dict[str, list[Scored]] = {}
        for ids, hits in rank_dense(queries, *sources.model, SearchConfig(k=depth)):
            ranked |= zip(ids, hits, strict=True)
        runs["model"] = Run.from_mapping(ranked)
    return runs


def find_ranks(runs: Mapping[str, Run], query_id: str, depth: int) -> Ranks:
    """Return where each system that ranked a query has its best passages."""
    return {
        name: {hit.passage_id: (rank, hit.score) for rank, hit in enumerate(run[query_id][:depth], start=1)}
        for name, run in runs.items()
        if query_id in run
    }


def read_cases(
    collection: Collection,
    sources: AuditSources,
    config: AuditConfig,
    query_ids: Sequence[str],
    runs: Mapping[str, Run],
) -> Iterator[Case]:
    """Yield what is known of labelled queries, in the order given."""
    train = collection.qrels("train")
    rows = _read_rows(sources.examples, query_ids)
    scores = _score(collection, sources, config, query_ids, rows)
    for query_id in query_ids:
        judged, mined, candidates = train[query_id], list[str](), list[str]()
        if sources.candidates is not None and query_id in sources.candidates.negatives:
            mined = [hit.passage_id for hit in sources.candidates.negatives[query_id]]
        if sources.candidates is not None and query_id in sources.candidates.merged:
            candidates = [hit.passage_id for hit in sources.candidates.merged[query_id][: config.audit_depth]]
        in_rows = [passage_id for row in rows[query_id] for passage_id in row.negative_ids]
        negatives = tuple(p for p in dict.fromkeys([*mined, *in_rows]) if p not in judged)
        others = tuple(p for p in candidates if p not in judged and p not in negatives)
        ranks = find_ranks(runs, query_id, config.audit_depth)
        yield Case(query_id, positives_of(train, query_id), negatives, others, scores[query_id], ranks)


def open_rows(examples: Path, *names: str) -> Examples:
    """Return the rows of some of a folder's example files as one."""
    return Examples.open(*(examples / f"{name}.arrow" for name in names))


def scores_of(row: Example) -> Scores:
    """Return the scores that a training row keeps, of the passages that a teacher scored."""
    pairs = zip((row.positive_id, *row.negative_ids), (row.positive_score, *row.negative_scores), strict=True)
    return {passage_id: score for passage_id, score in pairs if not math.isnan(score)}


def _read_rows(examples: Path, query_ids: Iterable[str]) -> Mapping[str, list[Example]]:
    wanted = set(query_ids)
    rows: dict[str, list[Example]] = defaultdict(list)
    for row in open_rows(examples, "labelled", "plain"):
        if row.query_id in wanted:
            rows[row.query_id].append(row)
    return rows


def _score(
    collection: Collection,
    sources: AuditSources,
    config: AuditConfig,
    query_ids: Sequence[str],
    rows: Mapping[str, list[Example]],
) -> dict[str, Scores]:
    """Return the teacher's scores of each query's first candidates and its positives, or those that the rows keep.

    A fused score depends on the candidates beside it: those are the ones that labelling scored, and the positives.
    """
    if sources.teacher is None or sources.candidates is None:
        return {q: {p: score for row in rows[q] for p, score in scores_of(row).items()} for q in query_ids}
    train, merged = collection.qrels("train"), sources.candidates.merged
    wanted = {}
    for query_id in query_ids:
        hits = merged[query_id][: config.scored_depth] if query_id in merged else []
        found = {hit.passage_id for hit in hits}
        lacking = [p for p in positives_of(train, query_id) if p not in found]
        wanted[query_id] = [*hits, *(Scored(passage_id, math.nan) for passage_id in lacking)]
    depth = max((len(hits) for hits in wanted.values()), default=0)
    scored = score_candidates(collection, Run.from_mapping(wanted), sources.teacher, query_ids, depth)
    return {
        query_id: {hit.passage_id: float(score) for hit, score in zip(hits, scores, strict=True)}
        for query_id, hits, scores in scored
    }
