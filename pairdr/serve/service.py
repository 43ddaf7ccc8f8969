"""Questions, texts and passages to answers, through the batches: limits, versions, and what is refused."""

from __future__ import annotations

import asyncio
import base64
import json
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from pairdr.config import EncodeConfig
from pairdr.errors import BusyError, DataError, PairdrError, UsageError
from pairdr.formats import format_metadata
from pairdr.fusion import sort_hits
from pairdr.progress import say
from pairdr.records import Passage, Query
from pairdr.searcher import RERANKED, Hit, Way
from pairdr.serve.batching import Batcher
from pairdr.serve.computing import Asked, Questions, Search, Texts, Vectors, encode_texts, judge_pairs, search_questions
from pairdr.serve.failures import ApiError, exceed_limit
from pairdr.serve.forms import EmbeddingForm, PassageForm, RerankForm, SearchForm
from pairdr.serve.measuring import Meters
from pairdr.serve.shelf import Shelf, Snapshot, follow_words
from pairdr.store_config import ServeConfig
from pairdr.tokens import Side
from pairdr.vectors import VectorStore

RERANKER = "reranker"
UNSAID_RESULTS = 10


class Service:
    """Answers requests until it is stopped.

    Args:
        shelf: the models.
        config: batches and limits.
        meters: what is counted.
    """

    def __init__(self, shelf: Shelf, config: ServeConfig, meters: Meters) -> None:
        if config.queue_texts < config.most_texts:
            raise UsageError(
                f"A request may have {config.most_texts} texts, and only {config.queue_texts} may wait.",
                remedy="Raise --queue-texts, or lower --most-texts.",
            )
        self.shelf, self.config, self._meters = shelf, config, meters
        self._texts = self._make_batcher("texts", self._compute)
        self._pairs = self._make_batcher("pairs", self._judge, lambda pair: len(pair[1]))
        self._writing = asyncio.Lock()
        self._tasks: list[asyncio.Task[None]] = []
        self.draining = False
        self._note_versions()

    @property
    def is_full(self) -> bool:
        """Return whether no text is taken at present."""
        return self._texts.is_full

    def start(self) -> None:
        """Begin to answer and to look for new versions."""
        self._texts.start()
        self._pairs.start()
        self._tasks = [asyncio.get_running_loop().create_task(self._watch())]

    async def stop(self) -> None:
        """End, when nobody waits any more."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._texts.stop()
        await self._pairs.stop()

    async def search(self, form: SearchForm) -> tuple[Search, bool, list[list[Hit]]]:
        """Return by what, whether it was reranked, and the hits of each question; all of one version.

        Raises:
            ApiError: a limit, an unknown model, a way of searching that is not here, or a full queue.
        """
        questions = form.questions
        self.require_texts("queries", questions)
        self.require_texts("filters", form.filters)
        k = min(UNSAID_RESULTS, self.config.most_results) if form.k is None else form.k
        _require_at_most("k", k, self.config.most_results)
        snapshot = self.shelf.take(form.model)
        searcher = snapshot.searcher
        mode = cast(Way, searcher.settle(mode=form.mode).mode)
        if mode not in searcher.modes:
            raise ApiError(
                422, "no_words", f"This service has no BM25; mode can be: auto, {', '.join(searcher.modes)}."
            )
        if form.rerank and searcher.reranker is None:
            raise ApiError(422, "no_reranker", "This service has no reranker; leave rerank out.")
        depth = max(k, RERANKED) if form.rerank else k
        what = "passages to rerank" if form.rerank else "results"
        _require_at_most(f"The number of {what}", len(questions) * depth, self.config.most_hits)
        search = Search(snapshot, depth, mode, tuple(form.filters), form.fold)
        matched = None
        if form.filters:
            self._texts.require_room(questions)
            try:  # of many passages it takes a second, and no batch has to wait for it
                matched = await asyncio.to_thread(searcher.match_filters, mode=mode, where=search.filters)
            except UsageError as error:  # a filter that is none, or a field that no passage has
                raise ApiError(422, "invalid_value", _explain(error)) from error
        asked = [Asked(search, matched, question) for question in questions]
        found: Sequence[list[Hit]] = await self._texts.submit(Questions(snapshot, mode != "bm25"), asked)
        if form.rerank:
            pairs = [
                (Query(str(place), question), [hit.passage for hit in hits])
                for place, (question, hits) in enumerate(zip(questions, found, strict=True))
            ]
            scores = await self._pairs.submit(snapshot, pairs)
            found = [_reorder(hits, row) for hits, row in zip(found, scores, strict=True)]
        return search, form.rerank, [hits[:k] for hits in found]

    async def embed(self, form: EmbeddingForm) -> tuple[Snapshot, list[list[float] | str], int]:
        """Return by what, the embeddings, and how many tokens were read.

        Raises:
            ApiError: a limit, an unknown model, a width that the model was not trained for, or a full queue.
        """
        texts = form.texts
        self.require_texts("input", texts)
        snapshot = self.shelf.take(form.model)
        widths = sorted({*snapshot.widths, snapshot.encoder.contract.dimensions})
        if form.dimensions not in (None, *widths):
            allowed = ", ".join(map(str, widths))
            raise ApiError(422, "invalid_value", f"dimensions can be {allowed}: what {snapshot.name} was trained for.")
        side: Side = "query" if form.input_type == "query" else "passage"
        rows = await self._encode(snapshot, side, texts)
        vectors = np.stack([vector for vector, _ in rows])
        if form.dimensions is not None and form.dimensions < vectors.shape[1]:
            vectors = vectors[:, : form.dimensions]
            if snapshot.encoder.contract.similarity == "cosine":
                vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        as_text = form.encoding_format == "base64"
        written: list[list[float] | str] = [
            base64.b64encode(vector.astype("<f4").tobytes()).decode() if as_text else vector.tolist()
            for vector in vectors
        ]
        return snapshot, written, sum(count for _, count in rows)

    async def rerank(self, form: RerankForm) -> tuple[str, str, list[tuple[int, float]]]:
        """Return by what, of which version, and (place, score) of the best documents, best first.

        Raises:
            ApiError: a limit, an unknown model, a reranker that knows only the index, or a full queue.
        """
        passages = form.passages
        self.require_texts("documents", [passage.joined for passage in passages])
        self.require_texts("query", [form.query])
        teacher = self.shelf.take(None).searcher.reranker
        can_judge = teacher is not None and not teacher.needs_index
        if form.model == RERANKER and not can_judge:
            why = "There is none here" if teacher is None else "This one uses BM25 of the index"
            raise ApiError(422, "no_reranker", f"The reranker cannot judge other texts. {why}; name another model.")
        if form.model == RERANKER or (form.model is None and can_judge):
            name, snapshot = RERANKER, self.shelf.take(None)
            scores = (await self._pairs.submit(snapshot, [(Query("0", form.query), passages)]))[0]
        else:
            snapshot = self.shelf.take(form.model)
            name = snapshot.name
            question, documents = await asyncio.gather(
                self._encode(snapshot, "query", [form.query]), self._encode(snapshot, "passage", passages)
            )
            scores = np.stack([vector for vector, _ in documents]) @ question[0][0]
        ranked = sorted(enumerate(np.asarray(scores).tolist()), key=lambda pair: (-pair[1], pair[0]))
        return name, snapshot.version, ranked[: form.top_n]

    async def upsert(self, forms: Sequence[PassageForm]) -> Snapshot:
        """Add passages, or change their text, and return the version that is served from now on.

        Raises:
            ApiError: a limit, an id that occurs twice, several models, or another writer.
        """
        try:
            passages = [Passage(f.id, f.title, f.text, format_metadata(f.metadata)) for f in forms]
        except ValueError as error:
            raise ApiError(422, "invalid_value", "metadata has a number that JSON does not have.") from error
        except RecursionError as error:
            raise ApiError(422, "invalid_value", "metadata is nested too deeply.") from error
        self.require_texts("passages", ["".join(passage) for passage in passages])
        counts = Counter(passage.passage_id for passage in passages)
        twice = [passage_id for passage_id, count in counts.items() if count > 1]
        if twice:
            raise ApiError(422, "invalid_value", f"The id {twice[0]!r} occurs twice.")

        def write(snapshot: Snapshot) -> object:
            from pairdr.encode import upsert_passages

            return upsert_passages(passages, snapshot.encoder, EncodeConfig(), snapshot.searcher.store.folder)

        return await self._write(write)

    async def delete(self, passage_ids: Sequence[str]) -> Snapshot:
        """Take passages out, and return the version that is served from now on.

        Raises:
            ApiError: a limit, an id that is not there, several models, or another writer.
        """
        self.require_texts("ids", passage_ids)

        def write(snapshot: Snapshot) -> object:
            from pairdr.versions import delete_passages

            store = VectorStore(snapshot.searcher.store.folder)
            if len(set(passage_ids)) >= store.live and (store.rows_of(passage_ids) >= 0).all():
                raise UsageError("These are all passages that there are.", remedy="One has to stay.")
            return delete_passages(store.folder, passage_ids)

        return await self._write(write)

    async def _write(self, write: Callable[[Snapshot], object]) -> Snapshot:
        if len(self.shelf.names) > 1:
            raise ApiError(
                409,
                "conflict",
                f"Passages change where one model is served: start with --models {self.shelf.names[0]}.",
            )
        await self._writing.acquire()
        # What is begun is finished, also where the client has gone: words have to follow vectors.
        task = asyncio.create_task(asyncio.to_thread(self._publish, write))
        task.add_done_callback(lambda _: self._writing.release())
        return await asyncio.shield(task)

    def _publish(self, write: Callable[[Snapshot], object]) -> Snapshot:
        """Make a version of the vectors, index its words, and serve both."""
        snapshot = self.shelf.take(None)
        try:
            with self.shelf.lock(), follow_words(self.shelf.find_parts(snapshot.name)):
                write(snapshot)
        except BusyError as error:
            raise ApiError(409, "conflict", _explain(error)) from error
        except (UsageError, DataError) as error:
            raise ApiError(422, "invalid_value", _explain(error)) from error
        except PairdrError as error:  # a full disk, say: the old version answers on
            say(f"pairdr: writing passages failed: {error}")
            raise ApiError(500, "write_failed", _explain(error)) from error
        self._refresh()
        why = self.shelf.stale.get(snapshot.name)
        if why is not None:
            raise ApiError(500, "write_failed", f"The passages are written, but cannot be served: {why}")
        return self.shelf.take(None)

    async def _watch(self) -> None:
        """Look for newly published versions, again and again."""
        failure = ""
        while True:
            await asyncio.sleep(self.config.watch_seconds)
            if self._writing.locked():
                continue  # between vectors and words nothing fits, and the writer looks itself
            try:
                await asyncio.to_thread(self._refresh)
                failure = ""
            except Exception as error:  # a broken disk, say: the old version answers on
                if str(error) != failure:  # said once
                    failure = str(error)
                    say(f"pairdr: looking for new versions failed: {error}")

    def _refresh(self) -> None:
        if self.shelf.refresh():
            self._note_versions()
        self._meters.note_stale(len(self.shelf.stale))

    def _note_versions(self) -> None:
        for name in self.shelf.names:
            snapshot = self.shelf.take(name)
            store = snapshot.searcher.store
            self._meters.note_version(name, snapshot.version, store.version, store.live)

    def _make_batcher(
        self,
        name: str,
        work: Callable[[Any, list[Any]], Sequence[Any]],
        weigh: Callable[[Any], int] = lambda _: 1,
    ) -> Batcher:
        config = self.config
        batcher = Batcher(
            name,
            work,
            size=config.batch_texts,
            wait=config.batch_wait / 1000,
            room=config.queue_texts,
            observe=lambda items, waited: self._meters.note_batch(name, items, waited),
            weigh=weigh,
        )
        self._meters.watch_queue(name, lambda: batcher.waiting)
        return batcher

    def _compute(self, common: Questions | Texts, items: list[Any]) -> Sequence[Any]:
        """Search questions, or encode texts, in the thread of the batch."""
        if isinstance(common, Texts):
            return encode_texts(common, items)
        with self._meters.clock("search"):
            return search_questions(common, items)

    def _judge(self, snapshot: Snapshot, pairs: list[tuple[Query, list[Passage]]]) -> Sequence[Any]:
        """Score passages for questions, in the thread of the reranker."""
        with self._meters.clock("rerank"):
            return judge_pairs(snapshot, pairs)

    async def _encode(
        self, snapshot: Snapshot, side: Side, texts: Sequence[str] | Sequence[Passage]
    ) -> Sequence[tuple[Vectors, int]]:
        """Return (vector [D], tokens) of each text."""
        return await self._texts.submit(Texts(snapshot, side), texts)

    def require_texts(self, name: str, texts: Sequence[str]) -> None:
        """Refuse more, or longer, texts than are allowed.

        Raises:
            ApiError: naming the limit (422).
        """
        _require_at_most(f"The number of {name}", len(texts), self.config.most_texts)
        longest = max(map(len, texts), default=0)
        _require_at_most(f"The characters of one of {name}", longest, self.config.most_characters)

    def require_passage(self, passage_id: str) -> None:
        """Refuse an id that no passage has.

        Raises:
            ApiError: it is not there (422).
        """
        if self.shelf.take(None).searcher.store.rows_of([passage_id])[0] < 0:
            raise ApiError(422, "invalid_value", "passage_id: no passage has this id.")


def list_hits(hits: Iterable[Hit]) -> list[dict[str, Any]]:
    """Return hits as they are sent."""
    return [
        {
            "id": hit.passage_id,
            "score": hit.score,
            "title": hit.passage.title,
            "text": hit.passage.text,
            "metadata": json.loads(hit.passage.metadata or "{}"),
        }
        for hit in hits
    ]


def _require_at_most(name: str, found: int, limit: int) -> None:
    if found > limit:
        raise exceed_limit(name, found, limit)


def _reorder(hits: Sequence[Hit], scores: npt.NDArray[np.float64]) -> list[Hit]:
    passages = {hit.passage_id: hit.passage for hit in hits}
    ranked = sort_hits(zip(passages, scores.tolist(), strict=True), len(hits))
    return [Hit(*hit, passages[hit.passage_id]) for hit in ranked]


def _explain(error: PairdrError) -> str:
    """Return what is wrong and the way out, without the place on this machine."""
    return error.what if error.remedy is None else f"{error.what} {error.remedy}"
