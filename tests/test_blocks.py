"""Parts of mining and labelling: kept by a call that ends early, found by the next, and never taken for others."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pairdr import mine, scoring
from pairdr.artefact import verify_artefact
from pairdr.blocks import keep_blocks
from pairdr.config import LabelConfig, MineConfig
from pairdr.errors import ArtefactError, BusyError, RefusedError
from pairdr.label import label_examples
from pairdr.mine import mine_candidates
from pairdr.teachers import (
    CrossEncoderTeacher,
    DualEncoderTeacher,
    FusionTeacher,
    LexicalTeacher,
    Teacher,
    fingerprint_teacher,
)

if TYPE_CHECKING:
    from conftest import Parts


def write_text(text: str) -> Callable[[Path], None]:
    return lambda path: path.write_text(text) and None


# --- the blocks themselves --------------------------------------------------------------------------------------------


def test_a_block_is_made_once_and_gone_when_the_output_is_there(tmp_path: Path) -> None:
    with pytest.raises(KeyError), keep_blocks(tmp_path / "out", ["a"]) as blocks:
        assert not blocks.has("x")
        blocks.make("x", write_text("first"))
        raise KeyError
    with keep_blocks(tmp_path / "out", ["a"]) as blocks:
        assert blocks.has("x")
        assert blocks.make("x", lambda _: pytest.fail("made again")).read_text() == "first"
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_other_inputs_are_removed(tmp_path: Path) -> None:
    for inputs in (["a"], ["b"]):
        with pytest.raises(KeyError), keep_blocks(tmp_path / "out", inputs) as blocks:
            assert not blocks.has("x")
            blocks.make("x", write_text("of these"))
            raise KeyError
    assert len(list((tmp_path / "out.parts").iterdir())) == 1


def test_what_others_put_there_stays(tmp_path: Path) -> None:
    (tmp_path / "out.parts" / "mine").mkdir(parents=True)
    for path in (tmp_path / "out.parts" / "notes.txt", tmp_path / "out.parts" / "mine" / "notes.txt"):
        path.write_text("mine")
    with keep_blocks(tmp_path / "out", ["a"]) as blocks:
        blocks.make("x", write_text("of these"))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["mine", "notes.txt", "notes.txt", "out.parts"]


def test_half_a_block_is_none(tmp_path: Path) -> None:
    def break_off(path: Path) -> None:
        path.write_text("ha")
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(ArtefactError, match="No space left"), keep_blocks(tmp_path / "out", []) as blocks:
        blocks.make("x", break_off)
    with keep_blocks(tmp_path / "out", []) as blocks:
        assert not blocks.has("x")
        assert blocks.make("x", write_text("whole")).read_text() == "whole"


def test_a_second_call_for_the_same_output_is_refused(tmp_path: Path) -> None:
    with (
        keep_blocks(tmp_path / "out", []),
        pytest.raises(BusyError, match="Another command is at work here"),
        keep_blocks(tmp_path / "out", []),
    ):
        pass


# --- mining -----------------------------------------------------------------------------------------------------------


def count_ranked(monkeypatch: pytest.MonkeyPatch, stop_after: int | None = None) -> list[str]:
    """Note the queries that are ranked, and stop as Ctrl-C does after some."""
    ranked: list[str] = []

    def watch(name: str) -> None:
        rank = getattr(mine, name)

        def ranking(*arguments: Any) -> Any:
            for ids, hits in rank(*arguments):
                if stop_after is not None and len(ranked) >= stop_after:
                    raise KeyboardInterrupt
                ranked.extend(f"{name} {query_id}" for query_id in ids)
                yield ids, hits

        monkeypatch.setattr(mine, name, ranking)

    watch("rank_dense")
    watch("rank_words")
    return ranked


def run_mine(parts: Parts, output: Path, **options: Any) -> str:
    config = MineConfig(**{"depth": 9, "relative_margin": None} | options)
    return mine_candidates(parts.collection, parts.encoder, parts.store, parts.index, config, output).fingerprint


@pytest.mark.parametrize("stop_after", [0, 20, 150, 270])
def test_mining_goes_on_from_the_parts_that_are_there(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(mine, "PART", 16)
    expected = run_mine(toy_parts, tmp_path / "whole")
    with monkeypatch.context() as patch:
        before = count_ranked(patch, stop_after)
        with pytest.raises(KeyboardInterrupt):
            run_mine(toy_parts, tmp_path / "candidates")
    kept = 16 * len(list((tmp_path / "candidates.parts").rglob("*.arrow")))
    assert stop_after <= len(before) == kept
    after = count_ranked(monkeypatch)
    assert run_mine(toy_parts, tmp_path / "candidates") == expected
    assert sorted([*before, *after]) == sorted({*before, *after})
    assert len(before) + len(after) == 2 * 144
    verify_artefact(tmp_path / "candidates")
    assert not (tmp_path / "candidates.parts").exists()


def test_parts_of_another_depth_are_not_taken(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mine, "PART", 16)
    with monkeypatch.context() as patch:
        count_ranked(patch, 100)
        with pytest.raises(KeyboardInterrupt):
            run_mine(toy_parts, tmp_path / "candidates", depth=5)
    assert run_mine(toy_parts, tmp_path / "candidates") == run_mine(toy_parts, tmp_path / "whole")


def test_a_part_is_as_good_as_a_whole(toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = run_mine(toy_parts, tmp_path / "whole")
    monkeypatch.setattr(mine, "PART", 256)
    assert run_mine(toy_parts, tmp_path / "parts") == whole


# --- labelling --------------------------------------------------------------------------------------------------------


class CountingTeacher(LexicalTeacher):
    """BM25 that counts pairs, and stops as Ctrl-C does after some."""

    pairs = 0
    stop_after: float = float("inf")

    def score(self, queries: Any, candidates: Any) -> Any:
        if self.pairs >= self.stop_after:
            raise KeyboardInterrupt
        self.pairs += sum(map(len, candidates))
        return super().score(queries, candidates)


def run_label(parts: Parts, teacher: Teacher | None, output: Path, **options: Any) -> dict[str, Any]:
    config = LabelConfig(**{"label_depth": 5, "s_pos": 2.0, "s_neg": 1.4} | options)
    return label_examples(parts.collection, parts.candidates, teacher, config, output)


@pytest.mark.parametrize("stop_after", [0, 1, 300, 680])
def test_labelling_goes_on_from_the_scores_that_are_there(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop_after: int
) -> None:
    monkeypatch.setattr(scoring, "PART", 8)
    whole = CountingTeacher(toy_parts.index)
    run_label(toy_parts, whole, tmp_path / "whole")
    assert whole.pairs == 3 * 48 * 5
    first, second = CountingTeacher(toy_parts.index), CountingTeacher(toy_parts.index)
    first.stop_after = stop_after
    with pytest.raises(KeyboardInterrupt):
        run_label(toy_parts, first, tmp_path / "examples")
    assert len(list((tmp_path / "examples.parts").rglob("*.npy"))) * 8 * 5 == first.pairs
    run_label(toy_parts, second, tmp_path / "examples")
    assert first.pairs + second.pairs == whole.pairs
    found, expected = (verify_artefact(tmp_path / name) for name in ("examples", "whole"))
    assert found.files == expected.files
    assert not (tmp_path / "examples.parts").exists()


def test_other_thresholds_after_a_refusal_need_no_scores(toy_parts: Parts, tmp_path: Path) -> None:
    teacher = CountingTeacher(toy_parts.index)
    with pytest.raises(RefusedError):
        run_label(toy_parts, teacher, tmp_path / "examples", s_pos=1000.0)
    pairs, teacher.pairs = teacher.pairs, 0
    run_label(toy_parts, teacher, tmp_path / "examples")
    assert (pairs, teacher.pairs) == (720, 0)


def test_another_depth_or_teacher_finds_no_scores(toy_parts: Parts, tmp_path: Path) -> None:
    teacher = CountingTeacher(toy_parts.index)
    with pytest.raises(RefusedError):
        run_label(toy_parts, teacher, tmp_path / "examples", s_pos=1000.0)
    teacher.pairs = 0
    with pytest.raises(RefusedError):
        run_label(toy_parts, teacher, tmp_path / "examples", s_pos=1000.0, label_depth=4)
    assert teacher.pairs == 3 * 48 * 4
    run_label(toy_parts, None, tmp_path / "examples")
    assert not (tmp_path / "examples.parts").exists()


def test_scores_are_a_function_of_the_part(toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A dual encoder keeps vectors of passages, whose last bits depend on what they were batched with."""
    monkeypatch.setattr(scoring, "PART", 8)

    def score(ids: list[str]) -> dict[str, bytes]:
        teacher = DualEncoderTeacher(toy_parts.encoder, "student", "x")
        scorer = scoring.make_scorer(toy_parts.collection, toy_parts.candidates.merged, teacher, 5)
        return {query_id: scores.tobytes() for query_id, _, scores in scorer("dev", ids)}

    ids = list(toy_parts.collection.qrels("dev"))
    assert score(ids) | score(ids[24:]) == score(ids)


# --- what decides a teacher's scores ----------------------------------------------------------------------------------


def test_teachers_with_other_scores_have_other_fingerprints(toy_parts: Parts, bare_model: Path, tmp_path: Path) -> None:
    import torch
    from sentence_transformers import CrossEncoder

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        CrossEncoder(str(bare_model), num_labels=1, device="cpu").save(str(tmp_path / "ce"))
        CrossEncoder(str(bare_model), num_labels=1, device="cpu").save(str(tmp_path / "other"))

    def make() -> dict[str, Teacher]:
        other = replace(toy_parts.encoder.contract, passage_length=9)
        short = type(toy_parts.encoder)(toy_parts.encoder.model, other, 0.05, True)
        words, dual = LexicalTeacher(toy_parts.index), DualEncoderTeacher(toy_parts.encoder, "d", "x")
        return {
            "words": words,
            "dual": dual,
            "with vectors": DualEncoderTeacher(toy_parts.encoder, "d", "x", [toy_parts.store]),
            "short": DualEncoderTeacher(short, "d", "x"),
            "cross": CrossEncoderTeacher(str(tmp_path / "ce"), device="cpu"),
            "other cross": CrossEncoderTeacher(str(tmp_path / "other"), device="cpu"),
            "fused": FusionTeacher([words, dual], [0.5, 0.5]),
            "fused otherwise": FusionTeacher([words, dual], [0.4, 0.6]),
        }

    first, again = ({name: fingerprint_teacher(teacher) for name, teacher in make().items()} for _ in range(2))
    assert first == again
    assert len(set(first.values())) == len(first)
    assert None not in first.values()


def test_a_teacher_of_an_unknown_kind_keeps_nothing(toy_parts: Parts, tmp_path: Path) -> None:
    class Stranger:
        name, needs_index, calls = "stranger", False, 0

        def score(self, queries: Any, candidates: Any) -> Any:
            Stranger.calls += 1
            return LexicalTeacher(toy_parts.index).score(queries, candidates)

        def describe(self) -> dict[str, Any]:
            return {}

    assert fingerprint_teacher(Stranger()) is None
    assert fingerprint_teacher(FusionTeacher([Stranger()], [1.0])) is None
    for _ in range(2):
        with pytest.raises(RefusedError):
            run_label(toy_parts, Stranger(), tmp_path / "examples", s_pos=1000.0)
    assert Stranger.calls == 6
