"""Batches: no two rows share a query or a positive, and known positives are masked by id."""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairdr import batches
from pairdr.batches import WINDOW, Batch, collate, make_masks, permute, plan_epoch
from pairdr.formats import EXAMPLE_SCHEMA, Examples
from pairdr.records import Example


def make_row(query: str, positive: str, negatives: Sequence[str] = (), known: Sequence[str] = ()) -> Example:
    scores = (math.nan,) * len(negatives)
    return Example(query, positive, tuple(negatives), (positive, *known), "labelled", math.nan, scores)


def make_examples(pairs: Sequence[tuple[str, str]]) -> Examples:
    """Return rows of (query, positive)."""
    rows = [vars(make_row(query, positive)) for query, positive in pairs]
    return Examples(pa.Table.from_pylist(rows, EXAMPLE_SCHEMA))


def make_distinct(count: int) -> Examples:
    return make_examples([(f"q{number}", f"p{number}") for number in range(count)])


def draw(rows: Sequence[Example], negatives: int = 1, *, mask: bool = True, seed: int = 0) -> Batch:
    return collate(rows, negatives, mask=mask, rng=random.Random(seed))


# --- the plan of an epoch ---------------------------------------------------------------------------------------------

pairs = st.lists(st.tuples(st.sampled_from("abcdefgh"), st.sampled_from("stuvwxyz")), max_size=40)


@given(pairs, st.integers(2, 6), st.integers(0, 3))
def test_no_two_rows_of_a_batch_share_a_query_or_a_positive(rows: list[tuple[str, str]], size: int, epoch: int) -> None:
    for batch in plan_epoch(make_examples(rows), size, 13, epoch):
        assert len(batch) == size
        assert len({rows[row][0] for row in batch}) == size
        assert len({rows[row][1] for row in batch}) == size


@given(pairs, st.integers(2, 6))
def test_a_row_is_used_at_most_once_an_epoch(rows: list[tuple[str, str]], size: int) -> None:
    used = [row for batch in plan_epoch(make_examples(rows), size, 13, 0) for row in batch]
    assert len(used) == len(set(used))
    assert set(used) <= set(range(len(rows)))


def test_all_rows_that_fill_batches_are_used() -> None:
    batches = list(plan_epoch(make_distinct(12), 4, 13, 0))
    assert sorted(row for batch in batches for row in batch) == list(range(12))


def test_no_row_brings_the_known_positive_of_another_row_of_its_batch() -> None:
    rows = [make_row(f"q{at}", f"p{at}", known=[f"p{(at + 1) % 12}"]) for at in range(12)]
    examples = Examples(pa.Table.from_pylist([vars(row) for row in rows], EXAMPLE_SCHEMA))
    batches = list(plan_epoch(examples, 3, 13, 0))
    assert batches
    for batch in batches:
        known = [passage_id for row in batch for passage_id in rows[row].known_positive_ids]
        assert len(known) == len(set(known))


def test_a_last_short_batch_is_dropped() -> None:
    batches = list(plan_epoch(make_distinct(14), 4, 13, 0))
    assert [len(batch) for batch in batches] == [4, 4, 4]


def test_a_row_that_clashes_waits_for_the_next_batch() -> None:
    # Each query has two rows; batches of all four queries have to part the twins.
    rows = [(f"q{number % 4}", f"p{number}") for number in range(8)]
    batches = list(plan_epoch(make_examples(rows), 4, 13, 0))
    assert sorted(row for batch in batches for row in batch) == list(range(8))


def test_the_order_is_a_function_of_the_seed() -> None:
    examples = make_distinct(30)
    assert list(plan_epoch(examples, 3, 13, 0)) == list(plan_epoch(examples, 3, 13, 0))
    assert list(plan_epoch(examples, 3, 13, 0)) != list(plan_epoch(examples, 3, 14, 0))


def test_every_epoch_has_an_order_of_its_own() -> None:
    first, second = (list(plan_epoch(make_distinct(30), 3, 13, epoch)) for epoch in (0, 1))
    assert first != second


def test_too_few_rows_make_no_batch() -> None:
    assert list(plan_epoch(make_distinct(3), 4, 13, 0)) == []
    assert list(plan_epoch(make_examples([("q", f"p{number}") for number in range(9)]), 2, 13, 0)) == []


class CountingExamples(Examples):
    """Examples that count how many of their rows' ids are read."""

    read = 0
    most = 0

    def keys(self, rows: Any) -> list[tuple[str, set[str]]]:
        self.read += len(rows)
        self.most = max(self.most, len(rows))
        return super().keys(rows)


ADVERSARIES = {
    "all rows share one positive": lambda row: (f"q{row}", "p"),
    "all rows share one query": lambda row: ("q", f"p{row}"),
    "half of the rows share one positive": lambda row: (f"q{row}", "p" if row % 2 else f"p{row}"),
    "rows clash on both sides": lambda row: (f"q{row % 7}", f"p{row % 11}"),
    "a few ids have nearly all rows": lambda row: (f"q{row}", f"p{int(row**0.25)}"),
}


@pytest.mark.parametrize("size", [2, 32])
@pytest.mark.parametrize("case", ADVERSARIES)
def test_an_epoch_reads_each_row_once_and_looks_at_a_bounded_number_of_waiting_rows(
    case: str, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    looks = 0

    class CountingLine(deque):  # type: ignore[type-arg]
        def popleft(self) -> Any:
            nonlocal looks
            looks += 1
            return super().popleft()

    monkeypatch.setattr(batches, "deque", CountingLine)
    count = 20_000
    pairs = [ADVERSARIES[case](row) for row in range(count)]
    queries, positives = ([pair[side] for pair in pairs] for side in (0, 1))
    known = [[positive] for positive in positives]
    columns = {"query_id": queries, "positive_id": positives, "known_positive_ids": known}
    examples = CountingExamples(pa.table(columns))
    found = sum(1 for _ in plan_epoch(examples, size, 13, 0))
    assert found > 0 or case.startswith("all") or size > 7
    assert (examples.read, examples.most) == (count, WINDOW)
    assert looks <= 4 * size * (found + 1)
    assert looks <= 4 * count + 4 * size


def test_the_ids_of_an_epoch_are_read_as_they_are_needed() -> None:
    examples = CountingExamples(make_distinct(3 * WINDOW).table)
    stream = plan_epoch(examples, 4, 13, 0)
    next(stream)
    assert examples.read == WINDOW


def test_a_row_that_waits_is_the_first_of_the_next_batch() -> None:
    examples = make_examples([("q", "a"), ("q", "b"), *((f"q{number}", f"p{number}") for number in range(100))])
    seen = 0
    for seed in range(40):
        early = [row for row in next(permute(102, f"{seed}/0"))[:50].tolist() if row < 2]
        if len(early) == 2:  # both would be in the first batch
            first, second = plan_epoch(examples, 50, seed, 0)
            assert early[0] in first
            assert second[0] == early[1]
            seen += 1
    assert seen > 3


# --- the order --------------------------------------------------------------------------------------------------------

counts = st.one_of(st.integers(0, 40), st.sampled_from([WINDOW - 1, WINDOW, WINDOW + 1, 4095, 4096, 4097, 16385]))


@given(counts, st.text(max_size=5))
def test_a_permutation_has_every_number_once_in_windows(count: int, seed: str) -> None:
    windows = list(permute(count, seed))
    assert sorted(np.concatenate([[], *windows]).tolist()) == list(range(count))
    assert all(len(window) == WINDOW for window in windows[:-1])
    assert [window.dtype for window in windows] == [np.int64] * len(windows)


def test_a_permutation_is_a_function_of_its_seed() -> None:
    first, again, other = (np.concatenate(list(permute(3000, seed))) for seed in ("13/0", "13/0", "13/1"))
    assert np.array_equal(first, again)
    # Two permutations at random agree in one place, on the average.
    assert (first == other).sum() < 12


def test_a_permutation_leaves_no_trace_of_the_order_before() -> None:
    count = 16_000
    order = np.concatenate(list(permute(count, "13/0")))
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < 0.04  # five standard deviations
    assert (np.abs(np.diff(order)) == 1).sum() < 12  # neighbours stay neighbours twice, on the average
    # Each quarter of the places has numbers of each quarter: 1,000 each, give or take five standard deviations.
    shares = np.bincount(np.arange(count) // 4000 * 4 + order // 4000, minlength=16)
    assert np.abs(shares - 1000).max() < 5 * math.sqrt(1000)


def test_a_window_of_a_huge_permutation_takes_no_more_memory_than_a_small_one() -> None:
    window = next(permute(10**12, "13/0"))
    assert len(window) == WINDOW == len(set(window.tolist()))
    assert 0 <= window.min() < window.max() < 10**12


# --- the collator -----------------------------------------------------------------------------------------------------


def test_every_passage_of_a_batch_stands_in_it_once() -> None:
    rows = [make_row("q1", "a", ["b", "c"]), make_row("q2", "b", ["a", "d"])]
    batch = draw(rows, 2)
    assert batch.query_ids == ["q1", "q2"]
    assert sorted(batch.passage_ids) == ["a", "b", "c", "d"]


def test_places_point_at_the_passages() -> None:
    rows = [make_row("q1", "a", ["b", "c"]), make_row("q2", "d", ["b", "a"])]
    batch = draw(rows, 2)
    ids = batch.passage_ids
    assert [ids[place] for place in batch.positive] == ["a", "d"]
    assert [[ids[place] for place in row] for row in batch.negative] == [["b", "c"], ["b", "a"]]
    assert batch.negative_valid.all()


def test_a_row_with_fewer_negatives_is_padded_and_marked() -> None:
    rows = [make_row("q1", "a", ["b", "c", "d"]), make_row("q2", "e", ["f"]), make_row("q3", "g")]
    batch = draw(rows, 3)
    assert batch.negative.shape == (3, 3)
    assert batch.negative_valid.tolist() == [[True, True, True], [True, False, False], [False, False, False]]
    assert batch.passage_ids[batch.negative[1, 0]] == "f"


def test_a_batch_is_no_wider_than_its_longest_row() -> None:
    assert draw([make_row("q1", "a", ["b"]), make_row("q2", "c")], 4).negative.shape == (2, 1)


def test_a_batch_may_have_no_negatives_at_all() -> None:
    rows = [make_row("q1", "a", ["b"]), make_row("q2", "c")]
    assert draw(rows, 0).negative.shape == (2, 0)
    assert draw(rows, 0).passage_ids == ["a", "c"]
    assert draw([make_row("q1", "a"), make_row("q2", "c")], 2).negative.shape == (2, 0)


def test_negatives_beyond_those_asked_for_are_drawn_by_the_seed() -> None:
    rows = [make_row("q1", "a", [f"n{number}" for number in range(20)])]
    drawn = [draw(rows, 3, seed=seed).passage_ids[1:] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(set(drawn[0])) == 3


def test_masks_are_made_only_when_asked_for() -> None:
    rows = [make_row("q1", "a", ["b"]), make_row("q2", "b")]
    assert draw(rows, mask=False).masks is None
    assert draw(rows, mask=True).masks is not None


def make_scored(query: str, positive: str, score: float, **negatives: float) -> Example:
    return Example(query, positive, tuple(negatives), (positive,), "labelled", score, tuple(negatives.values()))


def test_the_teachers_scores_stand_in_the_order_of_the_passages() -> None:
    rows = [make_scored("q1", "a", 2.0, b=1.0, c=0.5), make_scored("q2", "d", math.nan, e=-1.0), make_row("q3", "f")]
    batch = draw(rows, 2)
    expected = [[2.0, 1.0, 0.5], [math.nan, -1.0, math.nan], [math.nan] * 3]
    torch.testing.assert_close(batch.teacher_scores, torch.tensor(expected), equal_nan=True)


@given(st.integers(1, 6), st.integers(0, 100))
def test_drawn_negatives_keep_their_own_scores(count: int, seed: int) -> None:
    scores = {f"n{number}": number / 8 for number in range(7)}
    batch = draw([make_scored("q", "a", 9.0, **scores)], count, seed=seed)
    ids = [batch.passage_ids[place] for place in batch.negative[0]]
    assert batch.teacher_scores[0].tolist() == [9.0, *(scores[name] for name in ids)]
    assert len(set(ids)) == count


# --- masks ------------------------------------------------------------------------------------------------------------


def test_a_known_positive_is_masked_where_it_is_another_rows_negative() -> None:
    rows = [make_row("q1", "a", ["x"], known=["b"]), make_row("q2", "c", ["b"]), make_row("q3", "d", ["a"])]
    masks = draw(rows).masks
    assert masks is not None
    # Row q1 may not see b of row q2, which answers it too, nor its own positive as the negative of row q3.
    assert masks.negative[0, :, 0].tolist() == [False, True, True]
    assert not masks.negative[1:].any()


def test_a_known_positive_is_masked_where_it_is_another_rows_positive() -> None:
    rows = [make_row("q1", "a", known=["b"]), make_row("q2", "b")]
    masks = make_masks(rows, [(), ()], 0)
    assert masks.positive.tolist() == [[True, True], [False, True]]
    # q1 is answered by b: for the anchor b it is no negative query.
    assert masks.query.tolist() == [[True, False], [True, True]]


def test_rows_of_one_query_share_what_they_know() -> None:
    masks = make_masks([make_row("q", "a"), make_row("q", "b"), make_row("r", "c")], [("b",), (), ("a",)], 1)
    assert masks.positive[:2, :2].all()
    assert masks.negative[0].tolist() == [[True], [False], [True]]
    assert masks.negative[1].tolist() == [[True], [False], [True]]


ids = st.sampled_from("abcdef")
example_rows = st.lists(
    st.builds(make_row, st.sampled_from("qrs"), ids, st.lists(ids, max_size=3), st.lists(ids, max_size=2)),
    min_size=1,
    max_size=5,
)


@given(example_rows)
def test_masks_equal_four_plain_loops(rows: list[Example]) -> None:
    width = max(len(row.negative_ids) for row in rows)
    masks = make_masks(rows, [row.negative_ids for row in rows], width)

    def answers(query_id: str, passage_id: str) -> bool:
        return any(
            row.query_id == query_id and passage_id in (row.positive_id, *row.known_positive_ids) for row in rows
        )

    for i, row in enumerate(rows):
        for j, other in enumerate(rows):
            assert bool(masks.positive[i, j]) == answers(row.query_id, other.positive_id)
            assert bool(masks.query[i, j]) == answers(other.query_id, row.positive_id)
            for k in range(width):
                named = other.negative_ids[k : k + 1]
                assert bool(masks.negative[i, j, k]) == any(answers(row.query_id, name) for name in named)


@given(example_rows, st.integers(0, 3), st.integers(0, 50))
def test_shares_of_a_joint_batch_are_rows_of_the_whole(rows: list[Example], count: int, seed: int) -> None:
    whole = draw(rows, count, seed=seed)
    for cut in range(len(rows) + 1):
        for share in (slice(0, cut), slice(cut, len(rows))):
            part = collate(rows, count, mask=True, rng=random.Random(seed), share=share)
            assert part.rows == share
            assert part.query_ids == whole.query_ids[share]
            assert torch.equal(part.negative_valid, whole.negative_valid)
            assert all(torch.equal(mine, all_[share]) for mine, all_ in zip(part.masks, whole.masks, strict=True))
            torch.testing.assert_close(part.teacher_scores, whole.teacher_scores[share], equal_nan=True)
            assert name_passages(part, whole.negative_valid[share]) == name_passages(whole, whole.negative_valid)[share]


def name_passages(batch: Batch, valid: torch.Tensor) -> list[list[str]]:
    """Return the ids of each row's positive and negatives."""
    ids = batch.passage_ids
    rows = zip(batch.positive.tolist(), batch.negative, valid, strict=True)
    return [[ids[positive], *(ids[place] for place in negative[kept])] for positive, negative, kept in rows]


def test_a_share_embeds_its_own_passages_alone() -> None:
    rows = [make_row("q1", "a", ["b", "c"]), make_row("q2", "d", ["a", "e"])]
    part = collate(rows, 2, mask=True, rng=random.Random(0), share=slice(1, 2))
    assert (part.query_ids, sorted(part.passage_ids)) == (["q2"], ["a", "d", "e"])


def test_masks_are_boolean_whatever_the_width() -> None:
    masks = make_masks([make_row("q", "a")], [()], 0)
    assert [mask.dtype for mask in masks] == [torch.bool] * 3
    assert masks.negative.shape == (1, 1, 0)


@pytest.mark.parametrize("size", [2, 8])
def test_rows_that_often_clash_are_nearly_all_used(size: int) -> None:
    examples = make_examples([(f"q{number}", f"p{number % 10}") for number in range(1000)])
    batches = list(plan_epoch(examples, size, 13, 0))
    assert len(batches) * size > 950
