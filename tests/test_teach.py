"""Teachers: one contract whatever is behind it, and a gate that only a better one passes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from pairdr import teach as module
from pairdr.artefact import read_manifest
from pairdr.config import ModelConfig, TeachConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, RefusedError, UsageError
from pairdr.mine import Candidates
from pairdr.records import Passage, Query, Run, positives_of
from pairdr.teach import (
    TeachResult,
    choose_teacher,
    judge_teachers,
    require_accepted,
    sample_ids,
    train_cross_encoder,
)
from pairdr.teachers import (
    CrossEncoderTeacher,
    DualEncoderTeacher,
    FusionTeacher,
    LexicalTeacher,
    Teacher,
    load_dual_encoder,
    load_teacher,
    read_recipe,
)

if TYPE_CHECKING:
    from conftest import Parts

QUICK = {"fusion": False, "gate_queries": 8, "rerank_depth": 10}
KINDS = ("dual encoder", "bm25", "cross-encoder", "fusion")


class FakeTeacher:
    """Scores by a function of query id and passage id, and remembers what it was asked."""

    needs_index = False

    def __init__(self, name: str, score: Callable[[str, str], float]) -> None:
        self.name, self.score_pair = name, score
        self.asked: list[tuple[str, int]] = []

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[np.ndarray]:
        self.asked += [(query.query_id, len(row)) for query, row in zip(queries, candidates, strict=True)]
        return [
            np.array([self.score_pair(query.query_id, p.passage_id) for p in row], dtype=float)
            for query, row in zip(queries, candidates, strict=True)
        ]

    def describe(self) -> dict[str, Any]:
        return {"kind": "fake", "name": self.name}


def make_knowing(parts: Parts, share: float = 1.0, name: str = "knowing") -> FakeTeacher:
    """Return a teacher that knows the dev labels, of a share of the queries only."""
    dev = parts.collection.qrels("dev")
    known = set(sorted(dev)[: round(share * len(dev))])
    return FakeTeacher(name, lambda q, p: float(q in known and p in positives_of(dev, q)))


def make_guessing(seed: int, name: str = "guessing") -> FakeTeacher:
    rng = np.random.default_rng(seed)
    return FakeTeacher(name, lambda q, p: float(rng.random()))


def judge(parts: Parts, *others: Teacher, student: Teacher | None = None, **options: Any) -> TeachResult:
    """Judge teachers against the student; BM25 guesses unless it is among the others."""
    config = TeachConfig(**{"fusion": False, "rerank_depth": 120} | options)
    base = student or DualEncoderTeacher(parts.encoder, "student", str(parts.start), [parts.store])
    return judge_teachers(parts.collection, base, make_guessing(0, "bm25"), others, parts.candidates, config)


@pytest.fixture(scope="module")
def cross_encoder(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    """Return a cross-encoder that was trained for three steps."""
    folder = tmp_path_factory.mktemp("cross-encoder")
    config = TeachConfig(cross_encoder_steps=3, cross_encoder_batch=8)
    train_cross_encoder(toy_parts.collection, toy_parts.start, toy_parts.candidates, config, folder)
    return folder


def make_teacher(kind: str, parts: Parts, cross_encoder: Path) -> Teacher:
    dual = DualEncoderTeacher(parts.encoder, "student", str(parts.start))
    words = LexicalTeacher(parts.index)
    pairs = CrossEncoderTeacher(str(cross_encoder))
    return {
        "dual encoder": dual,
        "bm25": words,
        "cross-encoder": pairs,
        "fusion": FusionTeacher([dual, words, pairs], [0.2, 0.5, 0.3]),
    }[kind]


def read_candidates(parts: Parts, counts: Sequence[int]) -> tuple[list[Query], list[list[Passage]]]:
    """Return some dev queries with so many candidates each."""
    query_ids = sorted(parts.collection.qrels("dev"))[: len(counts)]
    rows = [
        [parts.collection.passage(hit.passage_id) for hit in parts.candidates.student[query_id][:count]]
        for query_id, count in zip(query_ids, counts, strict=True)
    ]
    return [parts.collection.query(query_id) for query_id in query_ids], rows


# --- the contract -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_teacher_gives_one_score_per_candidate(kind: str, toy_parts: Parts, cross_encoder: Path) -> None:
    queries, rows = read_candidates(toy_parts, (7, 0, 3))
    scores = make_teacher(kind, toy_parts, cross_encoder).score(queries, rows)
    assert [score.shape for score in scores] == [(7,), (0,), (3,)]
    assert all(np.isfinite(score).all() for score in scores)
    assert len(set(scores[0].tolist())) > 1


@pytest.mark.parametrize("kind", KINDS)
def test_every_teacher_gives_nothing_for_nothing(kind: str, toy_parts: Parts, cross_encoder: Path) -> None:
    queries, rows = read_candidates(toy_parts, (0, 0))
    scores = make_teacher(kind, toy_parts, cross_encoder).score(queries, rows)
    assert [score.shape for score in scores] == [(0,), (0,)]


@pytest.mark.parametrize("kind", KINDS)
def test_every_teacher_can_be_made_again_from_its_description(
    kind: str, toy_parts: Parts, cross_encoder: Path, tmp_path: Path
) -> None:
    queries, rows = read_candidates(toy_parts, (7, 3))
    teacher = make_teacher(kind, toy_parts, cross_encoder)
    again = load_teacher(teacher.describe(), tmp_path, toy_parts.index, ModelConfig())
    assert again.name == teacher.name
    assert again.describe() == teacher.describe()
    for expected, found in zip(teacher.score(queries, rows), again.score(queries, rows), strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_a_query_is_scored_alike_alone_and_in_company(toy_parts: Parts, cross_encoder: Path) -> None:
    queries, rows = read_candidates(toy_parts, (7, 3))
    for kind in KINDS:
        teacher = make_teacher(kind, toy_parts, cross_encoder)
        together, alone = teacher.score(queries, rows)[1], teacher.score(queries[1:], rows[1:])[0]
        np.testing.assert_allclose(alone, together, atol=1e-5)


def test_a_dual_encoder_scores_by_inner_product(toy_parts: Parts, cross_encoder: Path) -> None:
    queries, rows = read_candidates(toy_parts, (4,))
    vectors = toy_parts.encoder.encode_passages(rows[0]) @ toy_parts.encoder.encode_queries([queries[0].text])[0]
    np.testing.assert_allclose(make_teacher("dual encoder", toy_parts, cross_encoder).score(queries, rows)[0], vectors)


def test_bm25_scores_as_it_searches(toy_parts: Parts, cross_encoder: Path) -> None:
    queries, rows = read_candidates(toy_parts, (120,))
    found, best = toy_parts.index.search(queries[0].text, 5)
    scores = make_teacher("bm25", toy_parts, cross_encoder).score(queries, rows)[0]
    by_id = {passage.passage_id: score for passage, score in zip(rows[0], scores, strict=True)}
    assert [by_id[passage_id] for passage_id in toy_parts.collection.passages.ids_of(found)] == best.tolist()


def test_a_fusion_adds_standardised_scores(toy_parts: Parts) -> None:
    members = [FakeTeacher("a", lambda q, p: float(len(p))), FakeTeacher("b", lambda q, p: -100.0 * len(p))]
    queries, rows = read_candidates(toy_parts, (9,))
    lengths = np.array([len(passage.passage_id) for passage in rows[0]], dtype=float)
    even = (lengths - lengths.mean()) / lengths.std()
    np.testing.assert_allclose(FusionTeacher(members, [0.75, 0.25]).score(queries, rows)[0], 0.5 * even, atol=1e-9)


def test_a_fusion_does_not_ask_a_member_without_weight(toy_parts: Parts) -> None:
    idle = make_guessing(1)
    teacher = FusionTeacher([FakeTeacher("a", lambda q, p: float(len(p))), idle], [1.0, 0.0])
    teacher.score(*read_candidates(toy_parts, (3,)))
    assert (teacher.name, idle.asked) == ("1 a", [])


def test_stored_vectors_spare_encoding_the_passages(toy_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = read_candidates(toy_parts, (7, 0))
    recipe = {"kind": "dual_encoder", "name": "student", "source": str(toy_parts.start)}
    parts = (recipe, ".", toy_parts.index, ModelConfig())
    expected = load_teacher(*parts).score(queries, rows)
    teacher = load_teacher(*parts, stores=[toy_parts.store])
    monkeypatch.setattr(DualEncoder, "encode_passages", lambda *_: pytest.fail("encoded again"))
    for one, other in zip(teacher.score(queries, rows), expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6)


def test_a_dual_encoder_forgets_passages_and_scores_the_same(toy_parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    queries, rows = read_candidates(toy_parts, (7, 5, 6))
    recipe = {"kind": "dual_encoder", "name": "student", "source": str(toy_parts.start)}
    expected = load_teacher(recipe, ".", toy_parts.index, ModelConfig()).score(queries, rows)
    monkeypatch.setattr("pairdr.teachers._MOST_KNOWN", 4)
    teacher = load_teacher(recipe, ".", toy_parts.index, ModelConfig())
    for query, row, scores in zip(queries, rows, expected, strict=True):
        np.testing.assert_allclose(teacher.score([query], [row])[0], scores, atol=1e-6)
        assert isinstance(teacher, DualEncoderTeacher)
        assert len(teacher._vectors) <= 4 + len(row)


def test_stored_vectors_of_another_model_are_not_used(toy_parts: Parts, bare_model: Path) -> None:
    queries, rows = read_candidates(toy_parts, (7,))
    recipe = {"kind": "dual_encoder", "name": "larger", "source": str(bare_model)}
    parts = (recipe, ".", toy_parts.index, ModelConfig())
    expected = load_teacher(*parts).score(queries, rows)[0]
    np.testing.assert_allclose(load_teacher(*parts, stores=[toy_parts.store]).score(queries, rows)[0], expected)


def test_a_larger_dual_encoder_keeps_its_own_prefixes_and_takes_the_students_lengths(bare_model: Path) -> None:
    model = ModelConfig(start="student", layers=1, query_prefix="ask: ", similarity="cosine", query_length=9)
    contract = load_dual_encoder(str(bare_model), model).contract
    assert (contract.query_prefix, contract.similarity, contract.query_length) == ("", "dot", 9)


def test_a_larger_dual_encoder_works_on_the_chosen_device(bare_model: Path) -> None:
    places = [load_dual_encoder(str(bare_model), ModelConfig(device=device)).model.device for device in ("cpu", "meta")]
    assert [place.type for place in places] == ["cpu", "meta"]


def test_an_unknown_kind_of_teacher_is_refused(toy_parts: Parts) -> None:
    with pytest.raises(UsageError, match="Unknown kind of teacher 'oracle'"):
        load_teacher({"kind": "oracle"}, "teacher", toy_parts.index, ModelConfig())


def test_a_folder_that_is_no_cross_encoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be loaded"):
        CrossEncoderTeacher(str(tmp_path))


def test_a_dual_encoder_is_no_cross_encoder(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="without the head of a cross-encoder"):
        CrossEncoderTeacher(str(tiny_model))


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_teacher_that_knows_the_answers_is_accepted(toy_parts: Parts) -> None:
    result = judge(toy_parts, make_knowing(toy_parts))
    assert result.teacher is not None
    assert result.teacher.name == "knowing"
    assert result.verdicts[-1].rr10 == 1.0
    assert result.verdicts[-1].p_value < 0.001
    require_accepted(result)


def test_a_teacher_that_guesses_is_refused_with_both_numbers(toy_parts: Parts) -> None:
    result = judge(toy_parts, make_guessing(5))
    assert not result.accepted
    student, *others = (verdict.rr10 for verdict in result.verdicts)
    with pytest.raises(RefusedError, match=rf"student has RR@10 {student:.4f}, .* has {max(others):.4f} \(p = "):
        require_accepted(result)


def test_the_student_does_not_beat_itself(toy_parts: Parts) -> None:
    result = judge(toy_parts, DualEncoderTeacher(toy_parts.encoder, "twin", str(toy_parts.start), [toy_parts.store]))
    assert result.verdicts[-1].rr10 == result.verdicts[0].rr10
    assert result.verdicts[-1].p_value == 1.0
    assert not result.accepted


def test_the_best_of_several_is_taken(toy_parts: Parts) -> None:
    half = make_knowing(toy_parts, 0.8, "knows most")
    result = judge(toy_parts, half, make_knowing(toy_parts, 1.0, "knows all"))
    assert result.teacher.name == "knows all"


def test_a_lucky_teacher_is_not_enough(toy_parts: Parts) -> None:
    student = make_knowing(toy_parts, 0.9, "student")
    result = judge(toy_parts, make_knowing(toy_parts, 0.95, "better by luck"), student=student)
    assert result.verdicts[-1].rr10 > result.verdicts[0].rr10
    assert 0.05 < result.verdicts[-1].p_value < 1
    assert not result.accepted
    assert judge(toy_parts, make_knowing(toy_parts, 0.95), student=student, gate_level=1.0).accepted


def test_a_significantly_worse_teacher_is_refused(toy_parts: Parts) -> None:
    result = judge(toy_parts, make_guessing(5), student=make_knowing(toy_parts, name="student"))
    assert result.verdicts[-1].p_value < 0.001
    assert not result.accepted


def test_the_gate_level_is_an_option(toy_parts: Parts) -> None:
    assert not judge(toy_parts, make_knowing(toy_parts), gate_level=1e-6).accepted


def test_the_more_teachers_are_tried_the_surer_the_best_has_to_be(toy_parts: Parts) -> None:
    p_value = judge(toy_parts, make_knowing(toy_parts)).verdicts[-1].p_value
    # Two were tried against the student: BM25 and the one that knows.
    assert not judge(toy_parts, make_knowing(toy_parts), gate_level=1.9 * p_value).accepted
    assert judge(toy_parts, make_knowing(toy_parts), gate_level=2.1 * p_value).accepted


def test_the_gate_asks_a_seeded_sample_of_dev(toy_parts: Parts) -> None:
    def asked(seed: int) -> list[str]:
        teacher = make_knowing(toy_parts)
        assert judge(toy_parts, teacher, gate_queries=8, teach_seed=seed).queries == 8
        return [query_id for query_id, _ in teacher.asked]

    assert asked(1) == asked(1)
    assert asked(1) != asked(2)
    assert set(asked(1)) < set(toy_parts.collection.qrels("dev"))


def test_a_sample_of_more_than_there_are_is_all(toy_parts: Parts) -> None:
    dev = toy_parts.collection.qrels("dev")
    assert sample_ids(dev, 500, 1) == sorted(dev)


def test_teachers_re_rank_the_students_first_candidates(toy_parts: Parts) -> None:
    teacher = make_knowing(toy_parts)
    judge(toy_parts, teacher, rerank_depth=11)
    assert {count for _, count in teacher.asked} == {11}


def test_a_dev_query_without_candidates_counts_as_unanswered(toy_parts: Parts) -> None:
    dev = sorted(toy_parts.collection.qrels("dev"))
    run = Run.from_mapping({query_id: toy_parts.candidates.student[query_id] for query_id in dev[1:]})
    parts = toy_parts._replace(
        candidates=Candidates(run, run, run, toy_parts.candidates.negatives, "run of another tool", None)
    )
    result = judge(parts, make_knowing(toy_parts))
    assert result.queries == len(dev)
    assert result.verdicts[-1].rr10 == pytest.approx((len(dev) - 1) / len(dev))


def test_fusions_are_tried_only_when_asked_for(toy_parts: Parts) -> None:
    other = make_guessing(3)
    single = [verdict.name for verdict in judge(toy_parts, other, gate_queries=6).verdicts]
    fused = [verdict.name for verdict in judge(toy_parts, other, gate_queries=6, fusion=True).verdicts]
    assert single == ["student", "bm25", "guessing"]
    assert fused[:3] == single
    assert len(fused) == 6


def test_fusion_weights_are_chosen_on_the_half_that_is_not_judged(toy_parts: Parts) -> None:
    # The student knows one half of the queries, BM25 the other, and each is wrong on the rest: weights that were
    # chosen on the judged half would make every answer right, weights from the other half make every one wrong.
    dev = toy_parts.collection.qrels("dev")
    order = sorted(dev)

    def make(name: str, half: int) -> FakeTeacher:
        def score(query_id: str, passage_id: str) -> float:
            right = passage_id in positives_of(dev, query_id)
            return float(right == (order.index(query_id) % 2 == half))

        return FakeTeacher(name, score)

    config = TeachConfig(fusion=True, rerank_depth=120)
    result = judge_teachers(toy_parts.collection, make("student", 0), make("bm25", 1), [], toy_parts.candidates, config)
    student, words, fused = (verdict.rr10 for verdict in result.verdicts)
    assert student == words == 0.5
    assert fused == 0.0


def test_a_fusion_of_two_half_knowing_teachers_beats_both(toy_parts: Parts) -> None:
    dev = toy_parts.collection.qrels("dev")
    order = sorted(dev)

    def make(name: str, part: set[int]) -> FakeTeacher:
        return FakeTeacher(name, lambda q, p: float(order.index(q) % 4 in part and p in positives_of(dev, q)))

    config = TeachConfig(fusion=True, rerank_depth=120)
    one, other = make("student", {0, 1}), make("bm25", {2, 3})
    result = judge_teachers(toy_parts.collection, one, other, [], toy_parts.candidates, config)
    assert result.teacher is not None
    assert result.teacher.name == "0.5 student + 0.5 bm25"
    assert result.verdicts[-1].rr10 == 1.0


# --- the cross-encoder ------------------------------------------------------------------------------------------------


def hash_body(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def train(parts: Parts, output: Path, **options: Any) -> CrossEncoderTeacher:
    config = TeachConfig(**{"cross_encoder_steps": 1, "cross_encoder_batch": 4} | options)
    train_cross_encoder(parts.collection, parts.start, parts.candidates, config, output)
    return CrossEncoderTeacher(str(output))


@pytest.mark.slow
def test_the_same_seed_trains_the_same_cross_encoder(toy_parts: Parts, cross_encoder: Path, tmp_path: Path) -> None:
    train(toy_parts, tmp_path / "same", cross_encoder_steps=3, cross_encoder_batch=8)
    train(toy_parts, tmp_path / "other", cross_encoder_steps=3, cross_encoder_batch=8, teach_seed=99)
    assert hash_body(tmp_path / "same") == hash_body(cross_encoder)
    assert hash_body(tmp_path / "other") != hash_body(cross_encoder)


@pytest.mark.slow
def test_it_trains_for_so_many_steps_of_so_many_pairs(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss

    sizes: list[int] = []
    forward = BinaryCrossEntropyLoss.forward

    def watch(self: BinaryCrossEntropyLoss, inputs: Any, labels: Any, **rest: Any) -> Any:
        sizes.append(len(labels))
        return forward(self, inputs, labels, **rest)

    monkeypatch.setattr(BinaryCrossEntropyLoss, "forward", watch)
    train(toy_parts, tmp_path / "x", cross_encoder_steps=3, cross_encoder_batch=6)
    assert sizes == [6, 6, 6]


@pytest.mark.slow
def test_the_learning_rate_moves_the_cross_encoder(toy_parts: Parts, tmp_path: Path) -> None:
    frozen, moved = (
        train(toy_parts, tmp_path / str(rate), cross_encoder_learning_rate=rate, cross_encoder_steps=2)
        for rate in (0.0, 1e-2)
    )
    name = "bert.embeddings.word_embeddings.weight"
    start = dict(toy_parts.encoder.model[0].model.named_parameters())[name.removeprefix("bert.")]
    first, second = (dict(teacher.model.named_parameters()) for teacher in (frozen, moved))
    key = next(key for key in first if key.endswith(name))
    assert bool((first[key] == start).all())
    assert not bool((second[key] == start).all())


def test_a_cross_encoder_reads_no_more_tokens_than_it_is_told(toy_parts: Parts, tmp_path: Path) -> None:
    teacher = train(toy_parts, tmp_path / "short", cross_encoder_length=9)
    passage = Passage("p", "", "the river runs through the town and the market stands on the square")
    longer = passage._replace(text=passage.text + " with many stalls")
    first, second = (teacher.score([Query("q", "which river")], [[p]])[0] for p in (passage, longer))
    assert first == second


def watch_pairs(parts: Parts, monkeypatch: pytest.MonkeyPatch, output: Path, **options: Any) -> list[dict[str, Any]]:
    """Train a cross-encoder and return the pairs that it was trained on."""
    rows: list[dict[str, Any]] = []
    make = module._make_pairs
    monkeypatch.setattr(module, "_make_pairs", lambda *parts: rows.extend(make(*parts)) or make(*parts))
    train(parts, output, **options)
    return rows


def test_its_pairs_are_labels_and_the_students_mined_negatives(
    toy_parts: Parts, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rows = watch_pairs(
        toy_parts, monkeypatch, tmp_path / "x", cross_encoder_negatives=3, cross_encoder_batch=8, cross_encoder_steps=2
    )
    data = toy_parts.collection
    train_queries = {data.query(query_id).text: query_id for query_id in data.qrels("train")}
    texts = {p.joined: p.passage_id for block in data.read_passages() for p in block}
    for row in rows:
        query_id, passage_id = train_queries[row["query"]], texts[row["passage"]]
        mined = {hit.passage_id for hit in toy_parts.candidates.negatives[query_id]}
        assert passage_id in (positives_of(data.qrels("train"), query_id) if row["label"] else mined)
    positives = sum(row["label"] for row in rows)
    assert len(rows) == 4 * positives
    assert len(rows) >= 2 * 8


@pytest.mark.slow
def test_training_one_here_judges_it_and_keeps_it(toy_parts: Parts, tmp_path: Path) -> None:
    config = TeachConfig(cross_encoder="train", cross_encoder_steps=2, cross_encoder_batch=8, **QUICK)
    result = choose(toy_parts, config, tmp_path / "teacher")
    assert "trained cross-encoder" in [verdict.name for verdict in result.verdicts]
    assert CrossEncoderTeacher(str(tmp_path / "teacher" / "cross_encoder")).model.num_labels == 1


# --- the stage --------------------------------------------------------------------------------------------------------


def choose(parts: Parts, config: TeachConfig, output: Path) -> TeachResult:
    return choose_teacher(
        parts.collection,
        parts.encoder,
        parts.start,
        parts.index,
        parts.candidates,
        ModelConfig(),
        config,
        output,
        stores=[parts.store],
    )


def test_the_verdicts_and_the_recipe_are_published(toy_parts: Parts, tmp_path: Path) -> None:
    result = choose(toy_parts, TeachConfig(), tmp_path / "teacher")
    facts = read_manifest(tmp_path / "teacher", "teacher").facts
    assert facts["accepted"]
    assert facts["teacher"] == result.teacher.name
    assert [verdict["name"] for verdict in facts["verdicts"]] == [verdict.name for verdict in result.verdicts]
    assert facts["dev_queries"] == len(toy_parts.collection.qrels("dev"))
    assert read_recipe(tmp_path / "teacher") == result.teacher.describe()


def test_candidates_of_other_data_are_refused(toy_parts: Parts, tmp_path: Path) -> None:
    parts = toy_parts._replace(candidates=replace(toy_parts.candidates, collection="0123456789abcdef"))
    with pytest.raises(ArtefactError, match="mined from data 0123456789ab"):
        choose(parts, TeachConfig(), tmp_path / "teacher")


def test_no_recipe_is_kept_where_nothing_beats_the_student(toy_parts: Parts, tmp_path: Path) -> None:
    result = choose(toy_parts, TeachConfig(gate_level=0.0), tmp_path / "teacher")
    assert not result.accepted
    assert read_recipe(tmp_path / "teacher") is None
    assert read_manifest(tmp_path / "teacher", "teacher").facts["accepted"] is False


def test_a_ready_cross_encoder_is_judged(toy_parts: Parts, cross_encoder: Path, tmp_path: Path) -> None:
    config = TeachConfig(cross_encoder=str(cross_encoder), **QUICK)
    assert [verdict.name for verdict in choose(toy_parts, config, tmp_path / "teacher").verdicts] == [
        *("student", "bm25", "cross-encoder")
    ]


def test_a_larger_dual_encoder_is_judged(toy_parts: Parts, bare_model: Path, tmp_path: Path) -> None:
    config = TeachConfig(dual_encoder=str(bare_model), **QUICK)
    verdicts = choose(toy_parts, config, tmp_path / "teacher").verdicts
    assert [verdict.name for verdict in verdicts] == ["student", "bm25", "larger dual encoder"]
    assert verdicts[2].rr10 != verdicts[0].rr10


def take_all(*parts: Any) -> TeachResult:
    """Accept the even fusion of every teacher at hand."""
    _, student, lexical, others, _, _ = parts
    members = [student, lexical, *others]
    teacher = FusionTeacher(members, [1 / len(members)] * len(members))
    return TeachResult([], teacher, 0)


@pytest.mark.slow
def test_a_teacher_can_be_moved_together_with_its_work_folder(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "judge_teachers", take_all)
    work = tmp_path / "work"
    for name in ("start", "whole"):
        toy_parts.encoder.save(work / "models" / name, options={}, inputs={})
    monkeypatch.chdir(tmp_path)
    config = TeachConfig(
        cross_encoder="train", cross_encoder_steps=1, cross_encoder_batch=4, dual_encoder="work/models/whole"
    )
    parts = toy_parts._replace(start=Path("work/models/start"))
    choose(parts, config, Path("work/teacher"))
    queries, rows = read_candidates(toy_parts, (6,))

    def score(folder: Path) -> np.ndarray:
        recipe = read_recipe(folder)
        assert recipe is not None
        return load_teacher(recipe, folder, parts.index, ModelConfig()).score(queries, rows)[0]

    before = score(work / "teacher")
    work.rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    np.testing.assert_allclose(score(tmp_path / "moved" / "teacher"), before, atol=1e-6)


def test_a_teacher_from_elsewhere_is_found_from_any_folder(
    toy_parts: Parts, bare_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "judge_teachers", take_all)
    monkeypatch.chdir(bare_model.parent)
    choose(toy_parts, TeachConfig(dual_encoder=bare_model.name), tmp_path / "work" / "teacher")
    (tmp_path / "work").rename(tmp_path / "moved")
    monkeypatch.chdir("/")
    folder = tmp_path / "moved" / "teacher"
    teacher = load_teacher(read_recipe(folder), folder, toy_parts.index, ModelConfig())
    assert len(teacher.members) == 3
