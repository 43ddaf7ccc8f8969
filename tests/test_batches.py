"""Batches: no two rows share a query or a positive, and known positives are masked by id."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pairdr.batches import Batch, collate, make_masks, plan_epoch
from pairdr.formats import EXAMPLE_SCHEMA, Examples
from pairdr.records import Example


def make_row(query: str, positive: str, negatives: Sequence[str] = (), known: Sequence[str] = ()) -> Example:
    scores = (math.nan,) * len(negatives)
    return Example(query, positive, tuple(negatives), (positive, *known), "labelled", math.nan, scores)


def make_examples(pairs: Sequence[tuple[str, str]]) -> Examples:
    """Return rows of (query, positive)."""
    import pyarrow as pa

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


def test_masks_are_boolean_whatever_the_width() -> None:
    masks = make_masks([make_row("q", "a")], [()], 0)
    assert [mask.dtype for mask in masks] == [torch.bool] * 3
    assert masks.negative.shape == (1, 1, 0)


@pytest.mark.parametrize("size", [2, 8])
def test_rows_that_often_clash_are_nearly_all_used(size: int) -> None:
    examples = make_examples([(f"q{number}", f"p{number % 10}") for number in range(1000)])
    batches = list(plan_epoch(examples, size, 13, 0))
    assert len(batches) * size > 950
