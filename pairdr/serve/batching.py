"""Work of many requests, done together by one thread: a full batch, or what came until the deadline.

A model computes thirty questions at once in little more time than one, and a search reads the vectors once for all of
them. While the thread works, what arrives meets in the next batch; the deadline counts only where it is idle, and
after a batch: those whom it has answered ask again, and one batch of all costs less than two halves that take turns.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple, Protocol

from pairdr.serve.failures import refuse_busy

Work = Callable[[Any, list[Any]], Sequence[Any]]
"""Computes as many results as it is given items; all items share a key."""


class Observe(Protocol):
    """Is told of every batch."""

    def __call__(self, items: int, waited: Sequence[float]) -> None:
        """Note what a batch costs, and how long each of its requests has waited, in seconds."""


class _Request(NamedTuple):
    key: Hashable
    items: Sequence[Any]
    cost: int
    answer: asyncio.Future[Sequence[Any]]
    arrived: float


class Batcher:
    """Collects requests and has them computed, oldest first.

    A request of more than a batch is computed in parts, and each waits its turn: what others ask comes between them.

    Args:
        name: of the thread.
        work: what computes.
        size: cost from which a batch is full.
        wait: seconds that an idle batch waits for company; after a batch, for each further request, and in all for a
            quarter of the time that the batch took.
        room: most cost that waits; a request of more is taken where nothing else waits.
        observe: is told of every batch.
        weigh: what an item costs.
    """

    def __init__(
        self,
        name: str,
        work: Work,
        *,
        size: int,
        wait: float,
        room: int,
        observe: Observe,
        weigh: Callable[[Any], int] = lambda _: 1,
    ) -> None:
        self._work, self._size, self._wait, self._room, self._observe = work, size, wait, room, observe
        self._weigh = weigh
        self._requests: deque[_Request] = deque()
        self._later = 0  # cost of parts whose request waits for those before them
        self._batch: list[_Request] = []  # under way
        self._came = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._task: asyncio.Task[None] | None = None
        self._patience = 0.0  # until when more may be waited for

    @property
    def waiting(self) -> int:
        """Return what the waiting items cost, those of requests that were given up not among them."""
        return self._queued + self._later

    @property
    def _queued(self) -> int:
        return sum(request.cost for request in self._requests if not request.answer.done())

    @property
    def is_full(self) -> bool:
        """Return whether nothing more is taken."""
        return self.waiting >= self._room

    def start(self) -> None:
        """Begin to compute, in the running event loop."""
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """End; who still waits is given up."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        for request in (*self._batch, *self._requests):
            request.answer.cancel()
        self._thread.shutdown()

    async def submit(self, key: Hashable, items: Sequence[Any]) -> Sequence[Any]:
        """Return the results of some items, computed together with those of other requests of the same key.

        Raises:
            ApiError: too much waits already (429).
        """
        self.require_room(items)
        parts = self._part(items)
        costs = [sum(map(self._weigh, part)) for part in parts]
        later = sum(costs)
        self._later += later
        results: list[Any] = []
        try:
            for part, cost in zip(parts, costs, strict=True):
                self._later, later = self._later - cost, later - cost
                results += await self._queue(key, part, cost)
        finally:
            self._later -= later
        return results

    def require_room(self, items: Sequence[Any]) -> None:
        """Refuse items that may not wait now.

        Raises:
            ApiError: too much waits already (429).
        """
        waiting = self.waiting
        if waiting and waiting + sum(map(self._weigh, items)) > self._room:
            raise refuse_busy()

    def _part(self, items: Sequence[Any]) -> list[list[Any]]:
        """Return the items in parts that fit a batch; one that does not fit is alone."""
        parts: list[list[Any]] = [[]]
        cost = 0
        for item in items:
            if parts[-1] and cost + self._weigh(item) > self._size:
                parts.append([])
                cost = 0
            parts[-1].append(item)
            cost += self._weigh(item)
        return parts

    async def _queue(self, key: Hashable, items: Sequence[Any], cost: int) -> Sequence[Any]:
        answer: asyncio.Future[Sequence[Any]] = asyncio.get_running_loop().create_future()
        self._requests.append(_Request(key, items, cost, answer, time.perf_counter()))
        self._came.set()
        return await answer  # a request that is given up cancels its future, and is left out

    async def _run(self) -> None:
        while True:
            await self._gather()
            begin = time.perf_counter()
            await self._answer()
            end = time.perf_counter()
            self._patience = end + (end - begin) / 4

    async def _answer(self) -> None:
        """Take a batch and compute it, key by key."""
        batch = self._batch = self._take()
        if batch:
            now = time.perf_counter()
            self._observe(sum(r.cost for r in batch), [now - r.arrived for r in batch])
        for key in dict.fromkeys(request.key for request in batch):
            wanted = [r for r in batch if r.key == key and not r.answer.done()]
            if wanted:
                await self._compute(key, wanted)
        self._batch = []  # an idle service holds no old version

    async def _gather(self) -> None:
        """Wait until a batch is full, nobody comes any more, or it has been waited for long enough."""
        while not self._requests:
            self._came.clear()
            await self._came.wait()
        until = max(self._requests[0].arrived + self._wait, self._patience)
        while self._queued < self._size:
            left = min(until - time.perf_counter(), self._wait)
            if left <= 0:
                return
            self._came.clear()
            try:
                async with asyncio.timeout(left):
                    await self._came.wait()
            except TimeoutError:
                return

    def _take(self) -> list[_Request]:
        """Return the oldest requests that fit a batch, at least one; those that were given up are dropped."""
        batch: list[_Request] = []
        count = 0
        while self._requests:
            request = self._requests[0]
            if not request.answer.done():
                if batch and count + request.cost > self._size:
                    break
                batch.append(request)
                count += request.cost
            self._requests.popleft()
        return batch

    async def _compute(self, key: Hashable, batch: list[_Request]) -> None:
        items = [item for request in batch for item in request.items]
        try:
            loop = asyncio.get_running_loop()
            results = await loop.run_in_executor(self._thread, self._work, key, items)
            if len(results) != len(items):
                raise RuntimeError(f"{len(items)} texts have {len(results)} results")
        except asyncio.CancelledError:
            raise
        except BaseException as error:  # every request of the batch is told, of a panic in other languages' code too
            failure = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__}: {error}")
            for request in batch:
                if not request.answer.done():
                    request.answer.set_exception(failure)
            return
        start = 0
        for request in batch:
            if not request.answer.done():
                request.answer.set_result(results[start : start + len(request.items)])
            start += len(request.items)
