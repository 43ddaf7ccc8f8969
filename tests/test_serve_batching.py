"""Requests that are computed together: which meet, which wait, which are refused, and what a failure costs whom."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import pytest

from pairdr.serve.batching import Batcher
from pairdr.serve.failures import ApiError

LONG = 20.0
"""Seconds that no test ever waits: what ends earlier ended for another reason."""


class Recorder:
    """Work that doubles numbers, notes what it is given, and can be held up."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, list[Any]]] = []
        self.observed: list[tuple[int, list[float]]] = []
        self.threads: set[str] = set()
        self.begun, self.go = threading.Event(), threading.Event()
        self.go.set()

    def work(self, key: Any, items: list[Any]) -> list[Any]:
        self.calls.append((key, list(items)))
        self.threads.add(threading.current_thread().name)
        self.begun.set()
        assert self.go.wait(LONG)
        if key == "broken":
            raise ValueError("broken")
        return [2 * item for item in items]

    def observe(self, items: int, waited: Sequence[float]) -> None:
        self.observed.append((items, list(waited)))

    def make(self, work: Any = None, **options: Any) -> Batcher:
        chosen = {"size": 4, "wait": 0.0, "room": 100, **options}
        return Batcher("toys", work or self.work, observe=self.observe, **chosen)


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


def run(batcher: Batcher, use: Callable[[], Awaitable[Any]]) -> Any:
    """Start a batcher, use it, and stop it."""

    async def live() -> Any:
        batcher.start()
        try:
            async with asyncio.timeout(LONG):
                return await use()
        finally:
            await batcher.stop()

    return asyncio.run(live())


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


async def hold_up(batcher: Batcher, recorder: Recorder) -> asyncio.Task[Any]:
    """Let the thread begin with a request, and keep it there."""
    recorder.go.clear()
    task = asyncio.create_task(submit(batcher, "first", [0]))
    await asyncio.to_thread(recorder.begun.wait, LONG)
    return task


async def submit(batcher: Batcher, key: Any, items: list[Any]) -> Any:
    return await batcher.submit(key, items)


# --- who meets --------------------------------------------------------------------------------------------------------


def test_what_comes_while_the_thread_works_is_computed_together(recorder: Recorder) -> None:
    batcher = recorder.make(size=10)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        tasks = [asyncio.create_task(submit(batcher, "a", items)) for items in ([1], [2, 3], [4, 5, 6])]
        await wait_until(lambda: batcher.waiting == 6)
        recorder.go.set()
        return await asyncio.gather(first, *tasks)

    assert run(batcher, use) == [[0], [2], [4, 6], [8, 10, 12]]
    assert recorder.calls == [("first", [0]), ("a", [1, 2, 3, 4, 5, 6])]
    assert [items for items, _ in recorder.observed] == [1, 6]
    assert [len(waited) for _, waited in recorder.observed] == [1, 3]
    assert all(0 <= seconds < LONG for _, waited in recorder.observed for seconds in waited)
    assert recorder.threads == {"toys_0"}


def test_a_full_batch_does_not_wait(recorder: Recorder) -> None:
    batcher = recorder.make(size=4, wait=LONG)

    async def use() -> Any:
        return await asyncio.gather(*(submit(batcher, "a", [number]) for number in range(4)))

    begin = time.perf_counter()
    assert run(batcher, use) == [[0], [2], [4], [6]]
    assert time.perf_counter() - begin < LONG / 2
    assert recorder.calls == [("a", [0, 1, 2, 3])]


def test_a_batch_that_is_not_full_waits_for_company_until_the_deadline(recorder: Recorder) -> None:
    batcher = recorder.make(size=4, wait=0.2)

    async def use() -> Any:
        first = asyncio.create_task(submit(batcher, "a", [1]))
        await wait_until(lambda: batcher.waiting == 1)
        second = asyncio.create_task(submit(batcher, "a", [2]))
        return await asyncio.gather(first, second)

    begin = time.perf_counter()
    assert run(batcher, use) == [[2], [4]]
    assert time.perf_counter() - begin >= 0.2
    assert recorder.calls == [("a", [1, 2])]
    ((items, waited),) = recorder.observed
    assert items == 2
    assert waited[0] >= 0.2  # the deadline is that of the oldest


def test_a_request_that_fits_a_batch_is_not_parted_and_order_is_kept(recorder: Recorder) -> None:
    batcher = recorder.make(size=4)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        tasks = [asyncio.create_task(submit(batcher, "a", items)) for items in ([1, 2, 3], [4, 5], [6], list(range(9)))]
        await wait_until(lambda: batcher.waiting == 15)
        recorder.go.set()
        return (await asyncio.gather(first, *tasks))[1:]

    assert run(batcher, use) == [[2, 4, 6], [8, 10], [12], [2 * item for item in range(9)]]
    # [4, 5] would overfill the first batch; the last request is larger than any batch, and comes in parts.
    assert [items for _, items in recorder.calls[1:]] == [[1, 2, 3], [4, 5, 6], [0, 1, 2, 3], [4, 5, 6, 7], [8]]


def test_what_comes_meanwhile_is_computed_between_the_parts_of_a_large_request(recorder: Recorder) -> None:
    batcher = recorder.make(size=2)

    async def use() -> Any:
        recorder.go.clear()
        large = asyncio.create_task(submit(batcher, "large", list(range(6))))
        await asyncio.to_thread(recorder.begun.wait, LONG)
        assert batcher.waiting == 4  # its other parts have their room
        small = [asyncio.create_task(submit(batcher, "small", [number])) for number in (7, 8, 9)]
        await wait_until(lambda: batcher.waiting == 7)
        recorder.go.set()
        return await asyncio.gather(large, *small)

    assert run(batcher, use) == [[0, 2, 4, 6, 8, 10], [14], [16], [18]]
    assert [items for _, items in recorder.calls] == [[0, 1], [7, 8], [9], [2, 3], [4, 5]]
    assert batcher.waiting == 0


def test_a_large_request_that_is_given_up_leaves_all_of_its_room(recorder: Recorder) -> None:
    batcher = recorder.make(size=2, room=6)

    async def use() -> Any:
        recorder.go.clear()
        large = asyncio.create_task(submit(batcher, "large", list(range(6))))
        await asyncio.to_thread(recorder.begun.wait, LONG)
        with pytest.raises(ApiError):
            await batcher.submit("small", [7, 8, 9])
        large.cancel()
        await asyncio.wait([large])
        assert batcher.waiting == 0
        recorder.go.set()
        return await batcher.submit("small", [7, 8, 9])

    assert run(batcher, use) == [14, 16, 18]
    assert ("large", [2, 3]) not in recorder.calls


def test_keys_are_computed_apart(recorder: Recorder) -> None:
    batcher = recorder.make(size=10)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        tasks = [asyncio.create_task(submit(batcher, key, [at])) for at, key in enumerate("abab")]
        await wait_until(lambda: batcher.waiting == 4)
        recorder.go.set()
        return (await asyncio.gather(first, *tasks))[1:]

    assert run(batcher, use) == [[0], [2], [4], [6]]
    assert recorder.calls[1:] == [("a", [0, 2]), ("b", [1, 3])]


def test_after_a_batch_those_whom_it_answered_may_join_who_waits(recorder: Recorder) -> None:
    batcher = recorder.make(size=2, wait=0.2)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        waits = asyncio.create_task(submit(batcher, "a", [1]))
        await asyncio.sleep(0.8)  # longer than the deadline of who waits; a quarter of it is what follows
        recorder.go.set()
        await first
        return await asyncio.gather(waits, submit(batcher, "a", [2]))

    assert run(batcher, use) == [[2], [4]]
    assert recorder.calls[1:] == [("a", [1, 2])]


# --- who is refused ---------------------------------------------------------------------------------------------------


def test_past_its_room_the_queue_refuses_and_takes_again_when_it_is_emptied(recorder: Recorder) -> None:
    batcher = recorder.make(room=3)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        waits = asyncio.create_task(submit(batcher, "a", [1, 2]))
        await wait_until(lambda: batcher.waiting == 2)
        with pytest.raises(ApiError) as refused:
            await batcher.submit("a", [3, 4])
        fits = asyncio.create_task(submit(batcher, "a", [5]))
        recorder.go.set()
        found = await asyncio.gather(first, waits, fits)
        return refused.value, found, await batcher.submit("a", [6, 7])

    error, found, later = run(batcher, use)
    assert (error.status, error.code, error.headers) == (429, "queue_full", {"Retry-After": "1"})
    assert found == [[0], [2, 4], [10]]
    assert later == [12, 14]


def test_items_that_cost_more_fill_batch_and_room(recorder: Recorder) -> None:
    batcher = recorder.make(size=10, room=10, weigh=lambda item: item)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        waits = [asyncio.create_task(submit(batcher, "a", [cost])) for cost in (6, 4)]
        await wait_until(lambda: batcher.waiting == 10)
        with pytest.raises(ApiError):
            await batcher.submit("a", [1])
        recorder.go.set()
        return await asyncio.gather(first, *waits), await batcher.submit("a", [50])

    found, large = run(batcher, use)
    assert found == [[0], [12], [8]]
    assert large == [100]  # more than the room, but nothing waits
    assert [calls for _, calls in recorder.calls] == [[0], [6, 4], [50]]
    assert [cost for cost, _ in recorder.observed] == [0, 10, 50]


def test_a_request_that_is_given_up_is_left_out_and_leaves_its_room(recorder: Recorder) -> None:
    batcher = recorder.make(room=3)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        gone = asyncio.create_task(submit(batcher, "a", [1, 2, 3]))
        await wait_until(lambda: batcher.waiting == 3)
        gone.cancel()
        await asyncio.wait([gone])
        assert batcher.waiting == 0
        stays = asyncio.create_task(submit(batcher, "a", [4, 5, 6]))
        await wait_until(lambda: batcher.waiting == 3)
        recorder.go.set()
        return await asyncio.gather(first, stays)

    assert run(batcher, use)[1] == [8, 10, 12]
    assert recorder.calls == [("first", [0]), ("a", [4, 5, 6])]


def test_a_request_that_is_given_up_while_it_is_computed_harms_nobody(recorder: Recorder) -> None:
    batcher = recorder.make()

    async def use() -> Any:
        gone = await hold_up(batcher, recorder)
        waits = asyncio.create_task(submit(batcher, "a", [1]))
        late = asyncio.create_task(submit(batcher, "b", [2]))
        await wait_until(lambda: batcher.waiting == 2)
        gone.cancel()
        recorder.go.set()
        return await asyncio.gather(waits, late)

    assert run(batcher, use) == [[2], [4]]


def test_what_is_given_up_while_another_key_of_its_batch_is_computed_is_not_computed(recorder: Recorder) -> None:
    held = threading.Event()

    def work(key: Any, items: list[Any]) -> list[Any]:
        if key == "a":
            held.set()
            assert released.wait(LONG)
        return recorder.work(key, items)

    released = threading.Event()
    batcher = recorder.make(work, size=10)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        tasks = [asyncio.create_task(submit(batcher, key, [1])) for key in "ab"]
        await wait_until(lambda: batcher.waiting == 2)
        recorder.go.set()
        await asyncio.to_thread(held.wait, LONG)
        tasks[1].cancel()
        await asyncio.wait([tasks[1]])
        released.set()
        return await asyncio.gather(first, tasks[0])

    run(batcher, use)
    assert [key for key, _ in recorder.calls] == ["first", "a"]


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_a_failure_is_told_to_those_of_its_key_and_the_next_are_answered(recorder: Recorder) -> None:
    batcher = recorder.make(size=10)

    async def use() -> Any:
        first = await hold_up(batcher, recorder)
        tasks = [asyncio.create_task(submit(batcher, key, [1])) for key in ("broken", "a", "broken")]
        await wait_until(lambda: batcher.waiting == 3)
        recorder.go.set()
        found = await asyncio.gather(first, *tasks, return_exceptions=True)
        return found[1:], await batcher.submit("a", [4])

    (one, two, three), later = run(batcher, use)
    assert [str(one), two, str(three)] == ["broken", [2], "broken"]
    assert later == [8]


def test_what_is_no_exception_does_not_end_the_service(recorder: Recorder) -> None:
    """A panic in a tokenizer's own code is a BaseException: its request fails, and the next is answered."""

    class PanicError(BaseException):
        pass

    def work(key: Any, items: list[Any]) -> list[Any]:
        if key == "panic":
            raise PanicError("a broken invariant")
        return recorder.work(key, items)

    batcher = recorder.make(work)

    async def use() -> Any:
        with pytest.raises(RuntimeError, match="a broken invariant"):
            await batcher.submit("panic", [1])
        return await batcher.submit("a", [4])

    assert run(batcher, use) == [8]


def test_too_few_results_are_a_failure_and_no_other_requests_answer(recorder: Recorder) -> None:
    batcher = recorder.make(lambda _, items: items[1:], size=2, wait=LONG)

    async def use() -> Any:
        return await asyncio.gather(*(submit(batcher, "a", [number]) for number in (1, 2)), return_exceptions=True)

    assert [type(found) for found in run(batcher, use)] == [RuntimeError, RuntimeError]


def test_an_idle_batcher_holds_nothing_of_what_it_has_done(recorder: Recorder) -> None:
    class Version:
        pass

    version = Version()
    seen = weakref.ref(version)
    batcher = recorder.make(lambda _, items: items)

    async def use() -> None:
        nonlocal version
        await batcher.submit(version, [1])
        del version
        await wait_until(lambda: seen() is None)

    run(batcher, use)


def test_nobody_waits_after_the_end(recorder: Recorder) -> None:
    """Neither those that wait for company, nor those of the batch under way, of any key."""
    batcher = recorder.make(size=10)

    async def live() -> Any:
        batcher.start()
        first = await hold_up(batcher, recorder)
        tasks = [asyncio.create_task(submit(batcher, key, [1])) for key in "ab"]
        await wait_until(lambda: batcher.waiting == 2)
        threading.Timer(0.05, recorder.go.set).start()  # the thread is waited for
        await batcher.stop()
        return await asyncio.gather(first, *tasks, return_exceptions=True)

    found = asyncio.run(asyncio.wait_for(live(), LONG))
    assert [type(error) for error in found] == [asyncio.CancelledError] * 3
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("toys")]
