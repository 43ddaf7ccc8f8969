"""Training: two stages, one loop; the same seed gives the same weights, and L_P moves what it is meant to move."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch

from pairdr import losses
from pairdr import train as module
from pairdr.artefact import publish, read_manifest, verify_artefact
from pairdr.batches import collate
from pairdr.collection import open_collection
from pairdr.config import DataConfig, LabelConfig, StageConfig, TrainConfig, WarmConfig, list_stages
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, DataError, PairdrError
from pairdr.formats import Examples, write_examples
from pairdr.label import label_examples
from pairdr.records import Example, positives_of
from pairdr.teachers import LexicalTeacher
from pairdr.train import (
    DevSample,
    Means,
    compute_loss,
    count_steps,
    make_optimizer,
    measure_similarities,
    read_batches,
    read_stage_examples,
    run_stage,
    schedule_rate,
    train_model,
)
from pairdr.warm import warm_student

if TYPE_CHECKING:
    from conftest import Parts

BOTH = ("pseudo", "labelled")
PAIR = StageConfig("pair", 0.1, BOTH)
QUERY = StageConfig("query_centric", 0.0, BOTH)
FEW = {"max_steps": 2, "per_device_train_batch_size": 8, "eval_passages": 20, "eval_queries": 5}


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    """Return the folder of examples that BM25 as the teacher makes of the toy data."""
    folder = tmp_path_factory.mktemp("labelled") / "examples"
    teacher = LexicalTeacher(toy_parts.collection, toy_parts.index)
    label_examples(toy_parts.collection, toy_parts.candidates, teacher, LabelConfig(), folder)
    return folder


@pytest.fixture
def encoder(toy_parts: Parts) -> DualEncoder:
    """Return the start model, to be trained in place."""
    return DualEncoder.open(toy_parts.start)


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**FEW | options)


def train(parts: Parts, examples: Path, output: Path, *stages: StageConfig, **options: Any) -> DualEncoder:
    config = make_config(**options)
    return train_model(parts.collection, examples, parts.start, stages or (PAIR, QUERY), config, output)


def run(parts: Parts, rows: Examples, encoder: DualEncoder, stage: StageConfig = PAIR, **options: Any) -> list[dict]:
    return run_stage(parts.collection, rows, encoder, stage, make_config(**options))


def read_rows(examples: Path, count: int | None = None) -> Examples:
    rows = read_stage_examples(examples, PAIR, make_config())
    return rows if count is None else Examples(rows.table.slice(0, count))


def read_log(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "training.jsonl").read_text(encoding="utf-8").splitlines()]


def hash_after(parts: Parts, rows: Examples, stage: StageConfig = QUERY, **options: Any) -> str:
    """Train a fresh copy of the start model for a few steps and return the hash of its weights."""
    fresh = DualEncoder.open(parts.start)
    run(parts, rows, fresh, stage, **options)
    return fresh.hash_weights()


# --- the two relations ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_with_alpha_zero_pair_is_the_query_centric_model(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    config = make_config(alpha=0.0)
    for arm in ("pair", "query_centric"):
        stages = list_stages(arm, config)
        train_model(toy_parts.collection, examples, toy_parts.start, stages, config, tmp_path / arm)
    pair, query_centric = (
        read_manifest(tmp_path / arm, "model").facts["weights_sha256"] for arm in ("pair", "query_centric")
    )
    assert pair == query_centric
    assert pair != toy_parts.encoder.hash_weights()


def test_any_other_alpha_is_another_model(toy_parts: Parts, examples: Path) -> None:
    rows = read_rows(examples)
    weights = {hash_after(toy_parts, rows, StageConfig("pair", alpha, BOTH)) for alpha in (0.0, 0.1, 0.5)}
    assert len(weights) == 3


@pytest.mark.slow
def test_the_second_stage_never_computes_the_passage_centric_loss(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    compute = losses.passage_centric_loss

    def watch(*parts: Any, **options: Any) -> Any:
        calls.append("L_P")
        return compute(*parts, **options)

    monkeypatch.setattr(losses, "passage_centric_loss", watch)
    train(toy_parts, examples, tmp_path / "pair", max_steps=3)
    assert len(calls) == 3
    first, second = read_log(tmp_path / "pair.stage1")[1:], read_log(tmp_path / "pair")[1:]
    assert all("passage_centric" in line for line in first)
    assert not any("passage_centric" in line for line in second)


@pytest.mark.slow
def test_the_passage_centric_loss_parts_positives_from_negatives(toy_parts: Parts, examples: Path) -> None:
    rows = read_rows(examples)

    def measure_gap(alpha: float) -> float:
        """Return mean s(p+,p-) - s(p+,q) over all rows after training."""
        fresh = DualEncoder.open(toy_parts.start)
        options = {"max_steps": 25, "per_device_train_batch_size": 16, "learning_rate": 1e-3, "dropout": 0.0}
        run(toy_parts, rows, fresh, StageConfig("pair", alpha, BOTH), **options)
        data = toy_parts.collection
        gaps = []
        for row in rows:
            texts = [data.passage(p) for p in (row.positive_id, *row.negative_ids)]
            positive, *negatives = fresh.encode_passages(texts)
            query = fresh.encode_queries([data.query(row.query_id).text])[0]
            gaps += [float(positive @ negative - positive @ query) for negative in negatives]
        return float(np.mean(gaps))

    assert measure_gap(0.1) < measure_gap(0.0) - 0.01


def test_the_candidates_of_the_passage_centric_loss_are_an_option(
    toy_parts: Parts, examples: Path, encoder: DualEncoder
) -> None:
    rows = [row for row in read_rows(examples) if row.negative_ids][:6]
    encoder.set_dropout(0.0)
    batch = collate(rows, 1, mask=True, rng=module.random.Random(0))
    found = {}
    for variant in ("official", "own", "hard_all", "hard_all_pos"):
        config = make_config(passage_negatives=variant)
        found[variant] = compute_loss(toy_parts.collection, encoder, batch, 0.5, config)[0].passage_centric.item()
    assert len(set(found.values())) == 4
    assert found["own"] == min(found.values())


@pytest.mark.slow
def test_the_loss_falls_and_dev_rises(toy_parts: Parts, examples: Path, encoder: DualEncoder) -> None:
    options = {"max_steps": 40, "per_device_train_batch_size": 16, "learning_rate": 2e-3, "eval_queries": 30}
    log = run(toy_parts, read_rows(examples), encoder, PAIR, **options | {"eval_passages": 120})
    losses_found = [line["loss"] for line in log[1:]]
    assert losses_found[-1] < 0.7 * losses_found[0]
    assert log[-1]["dev_RR@10"] > log[0]["dev_RR@10"] + 0.1


# --- the seed ---------------------------------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_weights(toy_parts: Parts, examples: Path) -> None:
    rows = read_rows(examples)
    first, again, other = (hash_after(toy_parts, rows, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first != other


def test_dropout_is_an_option_and_zero_turns_it_off(toy_parts: Parts, examples: Path, encoder: DualEncoder) -> None:
    rows = read_rows(examples)
    assert len({hash_after(toy_parts, rows, dropout=dropout) for dropout in (None, 0.0, 0.5)}) == 3
    batch = next(read_batches(rows, make_config()))

    def embed_twice(dropout: float) -> list[float]:
        encoder.set_dropout(dropout)
        encoder.model.train()
        return [compute_loss(toy_parts.collection, encoder, batch, 0.1, make_config())[0].loss.item() for _ in "ab"]

    still, moved = embed_twice(0.0), embed_twice(0.5)
    assert still[0] == still[1]
    assert moved[0] != moved[1]


# --- stages and what is kept ------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_model_between_the_stages_stands_beside(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    model = train(toy_parts, examples, tmp_path / "pair")
    assert {path.name for path in tmp_path.iterdir()} == {"pair", "pair.stage1"}
    for name in ("pair", "pair.stage1"):
        verify_artefact(tmp_path / name)
    first, second = (read_manifest(tmp_path / name, "model") for name in ("pair.stage1", "pair"))
    assert first.facts["weights_sha256"] != second.facts["weights_sha256"] == model.hash_weights()
    assert [stage["name"] for stage in second.facts["stages"]] == ["pair", "query_centric"]
    assert first.inputs["start"] == read_manifest(toy_parts.start).fingerprint
    assert second.inputs["start"] == first.fingerprint
    assert (first.facts["examples"], first.facts["is_retriever"]) == (len(read_rows(examples)), True)


def stop_at(stage: str, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Interrupt training at a stage; return the list of stages that are trained, which grows."""
    trained: list[str] = []
    train_stage = module.run_stage

    def watch(collection: Any, rows: Any, encoder: Any, current: StageConfig, *rest: Any) -> Any:
        if current.name == stage:
            raise KeyboardInterrupt
        trained.append(current.name)
        return train_stage(collection, rows, encoder, current, *rest)

    monkeypatch.setattr(module, "run_stage", watch)
    return trained


@pytest.mark.slow
def test_an_interrupted_call_goes_on_at_the_stage_under_way(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        trained = stop_at("query_centric", patch)
        with pytest.raises(KeyboardInterrupt):
            train(toy_parts, examples, tmp_path / "pair")
        assert trained == ["pair"]
        assert not (tmp_path / "pair").exists()
    with monkeypatch.context() as patch:
        trained = stop_at("none", patch)
        resumed = train(toy_parts, examples, tmp_path / "pair")
        assert trained == ["query_centric"]
    straight = train(toy_parts, examples, tmp_path / "straight")
    assert resumed.hash_weights() == straight.hash_weights()


@pytest.mark.slow
def test_only_a_changed_option_trains_again(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = stop_at("none", monkeypatch)
    train(toy_parts, examples, tmp_path / "pair")
    train(toy_parts, examples, tmp_path / "pair")
    assert trained == ["pair", "query_centric"]
    train(toy_parts, examples, tmp_path / "pair", seed=99)
    assert trained == ["pair", "query_centric"] * 2


@pytest.mark.slow
def test_without_a_passage_centric_loss_its_options_train_nothing_again(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = stop_at("none", monkeypatch)
    train(toy_parts, examples, tmp_path / "model", QUERY)
    train(toy_parts, examples, tmp_path / "model", QUERY, alpha=0.7, passage_negatives="hard_all")
    assert trained == ["query_centric"]
    train(toy_parts, examples, tmp_path / "model", PAIR, passage_negatives="hard_all")
    assert trained == ["query_centric", "pair"]


def test_the_trained_model_opens_in_plain_sentence_transformers(
    toy_parts: Parts, examples: Path, tmp_path: Path
) -> None:
    from sentence_transformers import SentenceTransformer

    model = train(toy_parts, examples, tmp_path / "model", QUERY)
    plain = SentenceTransformer(str(tmp_path / "model"), device="cpu")
    passage = toy_parts.collection.passage_at(0)
    np.testing.assert_allclose(plain.encode_document([passage.joined]), model.encode_passages([passage]), atol=1e-6)
    np.testing.assert_allclose(plain.encode_query(["which river"]), model.encode_queries(["which river"]), atol=1e-6)


def test_a_loss_that_is_not_finite_stops_and_leaves_the_earlier_model(
    toy_parts: Parts, examples: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = train(toy_parts, examples, tmp_path / "model", QUERY).hash_weights()
    monkeypatch.setattr(
        module, "pair_loss", lambda *parts, **options: losses.PairParts(*[parts[0].sum() * math.nan] * 2, None)
    )
    with pytest.raises(PairdrError, match=r"The loss is nan .* step 2\. Lower learning_rate"):
        train(toy_parts, examples, tmp_path / "model", QUERY, seed=99)
    verify_artefact(tmp_path / "model")
    assert DualEncoder.open(tmp_path / "model").hash_weights() == before


@pytest.mark.parametrize("queries", [["q"], ["q", "q", "q"]], ids=["one row", "one query"])
def test_too_few_examples_are_refused(queries: Sequence[str], tmp_path: Path) -> None:
    write_examples(tmp_path / "rows.arrow", [make_row(q, f"p{number}") for number, q in enumerate(queries)])
    rows = Examples.open(tmp_path / "rows.arrow")
    with pytest.raises(DataError, match=f"^{len(queries)} examples do not make a batch of two rows"):
        next(read_batches(rows, make_config()))


@pytest.mark.parametrize("size", [2, 3, 8, 32])
def test_a_batch_shrinks_to_the_rows_that_there_are(size: int, tmp_path: Path) -> None:
    write_examples(tmp_path / "rows.arrow", [make_row(f"q{number}", f"p{number}") for number in range(2)])
    batch = next(read_batches(Examples.open(tmp_path / "rows.arrow"), make_config(per_device_train_batch_size=size)))
    assert sorted(batch.query_ids) == ["q0", "q1"]


def make_row(query: str, positive: str, *negatives: str) -> Example:
    return Example(query, positive, negatives, (positive,), "labelled", math.nan, (math.nan,) * len(negatives))


# --- the schedule and the optimizer -----------------------------------------------------------------------------------


def test_the_rate_rises_over_a_share_of_the_steps_and_falls_to_nothing() -> None:
    rates = [schedule_rate(step, 20, 0.25) for step in range(21)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1.0])
    assert rates[5:] == pytest.approx([(20 - step) / 15 for step in range(5, 21)])
    assert rates[-1] == 0.0


def test_a_warm_up_of_whole_steps_is_taken_as_such() -> None:
    assert [schedule_rate(step, 10, 2) for step in range(4)] == pytest.approx([1 / 3, 2 / 3, 1.0, 7 / 8])
    assert schedule_rate(0, 10, 0) == 1.0


def test_the_rate_never_falls_below_zero() -> None:
    assert schedule_rate(25, 20, 0.1) == 0.0
    assert all(0 < schedule_rate(step, 5, 30) < 1 for step in range(5))


def test_the_learning_rate_and_the_warm_up_show_in_the_log(
    toy_parts: Parts, examples: Path, encoder: DualEncoder
) -> None:
    log = run(toy_parts, read_rows(examples), encoder, QUERY, learning_rate=0.008, warmup_steps=3, max_steps=2)
    assert log[-1]["learning_rate"] == pytest.approx(0.008 * 2 / 4)


def test_a_learning_rate_of_zero_moves_nothing(toy_parts: Parts, examples: Path) -> None:
    rows = read_rows(examples)
    assert hash_after(toy_parts, rows, learning_rate=0.0) == toy_parts.encoder.hash_weights()


def test_only_weight_matrices_decay(encoder: DualEncoder) -> None:
    groups = make_optimizer(encoder.model, make_config(weight_decay=0.3)).param_groups
    assert [group["weight_decay"] for group in groups] == [0.3, 0.0]
    assert all(parameter.dim() > 1 for parameter in groups[0]["params"])
    assert all(parameter.dim() == 1 for parameter in groups[1]["params"])
    assert sum(len(group["params"]) for group in groups) == len(list(encoder.model.parameters()))


def watch_steps(monkeypatch: pytest.MonkeyPatch) -> list[list[torch.Tensor]]:
    """Return the list of gradients of each optimizer step, which grows."""
    seen: list[list[torch.Tensor]] = []
    step = torch.optim.AdamW.step

    def watch(self: torch.optim.AdamW, *rest: Any) -> Any:
        gradients = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        seen.append([gradient.clone() for gradient in gradients])
        return step(self, *rest)

    monkeypatch.setattr(torch.optim.AdamW, "step", watch)
    return seen


def norm_of(gradients: Sequence[torch.Tensor]) -> float:
    return float(torch.cat([gradient.flatten() for gradient in gradients]).norm())


def test_gradients_are_clipped_to_the_norm(
    toy_parts: Parts, examples: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = watch_steps(monkeypatch)
    for norm in (0.0, 0.01):
        run(toy_parts, read_rows(examples), DualEncoder.open(toy_parts.start), QUERY, max_grad_norm=norm, max_steps=1)
    assert norm_of(steps[0]) > 0.1
    assert norm_of(steps[1]) == pytest.approx(0.01, rel=1e-3)


def test_accumulated_gradients_are_the_mean_over_their_batches(
    toy_parts: Parts, examples: Path, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = read_rows(examples)
    options = {"gradient_accumulation_steps": 2, "max_steps": 3, "dropout": 0.0, "max_grad_norm": 0.0}
    seen: list[list[str]] = []
    compute = module.compute_loss

    def watch(collection: Any, model: Any, batch: Any, *rest: Any) -> Any:
        seen.append(batch.query_ids)
        return compute(collection, model, batch, *rest)

    steps = watch_steps(monkeypatch)
    monkeypatch.setattr(module, "compute_loss", watch)
    run(toy_parts, rows, encoder, QUERY, **options)

    config = make_config(**options)
    batches = [batch for _, batch in zip(range(6), read_batches(rows, config), strict=False)]
    assert len(steps) == 3
    assert seen == [batch.query_ids for batch in batches]

    fresh = DualEncoder.open(toy_parts.start)
    fresh.set_dropout(0.0)
    for batch in batches[:2]:
        (compute(toy_parts.collection, fresh, batch, 0.0, config)[0].loss / 2).backward()
    expected = [p.grad for group in make_optimizer(fresh.model, config).param_groups for p in group["params"]]
    for found, wanted in zip(steps[0], [gradient for gradient in expected if gradient is not None], strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_epochs_count_every_row_and_max_steps_overrides_them() -> None:
    config = TrainConfig(per_device_train_batch_size=8, gradient_accumulation_steps=2)
    assert count_steps(96, config) == 6
    assert count_steps(97, config) == 7
    assert count_steps(96, replace(config, num_train_epochs=2.5)) == 15
    assert count_steps(3, config) == 1
    assert count_steps(100, replace(config, num_train_epochs=2.5, max_steps=4)) == 4


def test_the_number_of_epochs_decides_how_long_it_trains(
    toy_parts: Parts, examples: Path, encoder: DualEncoder
) -> None:
    rows = read_rows(examples, 24)
    log = run(toy_parts, rows, encoder, QUERY, max_steps=None, num_train_epochs=2.0)
    assert log[-1]["step"] == 6


# --- batches and the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", [0, 1, 3])
def test_each_row_brings_so_many_hard_negatives(examples: Path, negatives: int) -> None:
    batch = next(read_batches(read_rows(examples), make_config(train_negatives=negatives)))
    assert batch.negative.shape == (8, negatives)


def test_batches_go_on_epoch_after_epoch_in_new_order(examples: Path) -> None:
    stream = read_batches(read_rows(examples, 16), make_config())
    first, second = ([*next(stream).query_ids, *next(stream).query_ids] for _ in range(2))
    assert sorted(first) == sorted(second)
    assert first != second


def loss_of(parts: Parts, encoder: DualEncoder, rows: Sequence[Example], **options: Any) -> float:
    config = make_config(**options)
    encoder.set_dropout(0.0)
    batch = collate(rows, 1, mask=config.mask_false_negatives, rng=module.random.Random(0))
    return compute_loss(parts.collection, encoder, batch, 0.0, config)[0].loss.item()


def test_a_positive_that_is_another_rows_negative_is_masked_unless_told_otherwise(
    toy_parts: Parts, encoder: DualEncoder
) -> None:
    train_ids = list(toy_parts.collection.qrels("train"))[:2]
    first, second = (positives_of(toy_parts.collection.qrels("train"), query_id)[0] for query_id in train_ids)
    clash = [make_row(train_ids[0], first), make_row(train_ids[1], second, first)]
    apart = [make_row(train_ids[0], first), make_row(train_ids[1], second, "ashford-river")]
    for rows, differ in ((clash, True), (apart, False)):
        masked, plain = (loss_of(toy_parts, encoder, rows, mask_false_negatives=mask) for mask in (True, False))
        assert (masked < plain) == differ
        assert (masked == plain) != differ


def test_a_passage_that_occurs_twice_is_embedded_once(
    toy_parts: Parts, encoder: DualEncoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts: list[int] = []
    embed = DualEncoder.embed
    monkeypatch.setattr(DualEncoder, "embed", lambda self, tokens: texts.append(len(tokens)) or embed(self, tokens))
    train_ids = list(toy_parts.collection.qrels("train"))[:3]
    rows = [
        make_row(query_id, place, "ryde-river")
        for query_id, place in zip(train_ids, ("ryde-market", "ryde-school", "ryde-bridge"), strict=True)
    ]
    loss_of(toy_parts, encoder, rows)
    assert texts == [3 + 4]


def test_padding_does_not_count_in_the_similarities() -> None:
    query, positive = torch.eye(2), torch.eye(2)
    negative = torch.tensor([[[3.0, 1.0]], [[9.0, 9.0]]])
    found = measure_similarities(query, positive, negative, torch.tensor([[True], [False]]))
    assert found == {"s(q,p+)": 1.0, "s(q,p-)": 3.0, "s(p+,p-)": 3.0}
    assert measure_similarities(query, positive, negative, torch.zeros(2, 1, dtype=torch.bool)) == {"s(q,p+)": 1.0}


def test_a_mean_is_over_the_steps_that_have_the_value() -> None:
    means = Means()
    means.add(loss=1.0)
    means.add(loss=3.0, other=5.0)
    assert means.flush() == {"loss": 2.0, "other": 5.0}
    assert means.flush() == {}


# --- the log ----------------------------------------------------------------------------------------------------------


def test_dev_is_looked_at_at_the_start_at_intervals_and_at_the_end(
    toy_parts: Parts, examples: Path, encoder: DualEncoder
) -> None:
    log = run(toy_parts, read_rows(examples), encoder, PAIR, max_steps=13, eval_steps=4)
    assert [line["step"] for line in log] == [0, 4, 8, 10, 12, 13]
    assert [line["step"] for line in log if "dev_RR@10" in line] == [0, 4, 8, 12, 13]
    for name in ("loss", "query_centric", "passage_centric", "s(q,p+)", "s(q,p-)", "s(p+,p-)", "learning_rate"):
        assert all(math.isfinite(line[name]) for line in log[1:])
    assert all(
        line["loss"] == pytest.approx(0.9 * line["query_centric"] + 0.1 * line["passage_centric"]) for line in log[1:]
    )


def test_the_dev_sample_has_the_stated_size(toy_parts: Parts, examples: Path, encoder: DualEncoder) -> None:
    small = DevSample(toy_parts.collection, make_config(eval_queries=7, eval_passages=20))
    assert len(small.queries) == 7
    assert 7 <= len(small.passages) <= 20
    assert set().union(*small.positives) <= {passage.passage_id for passage in small.passages}
    full = DevSample(toy_parts.collection, make_config(eval_queries=500, eval_passages=5000))
    assert (len(full.queries), len(full.passages)) == (48, 120)
    log = run(toy_parts, read_rows(examples), encoder, QUERY, max_steps=1, eval_queries=7)
    assert log[0]["dev_queries"] == 7


def test_the_dev_sample_over_all_passages_is_the_measure_over_the_corpus(toy_parts: Parts) -> None:
    from pairdr.config import SearchConfig
    from pairdr.measures import mean_measures, measure_run
    from pairdr.records import Run
    from pairdr.search import rank_dense

    data = toy_parts.collection
    queries = [data.query(query_id) for query_id in data.qrels("dev")]
    ((ids, ranked),) = rank_dense(queries, toy_parts.encoder, toy_parts.store, SearchConfig(k=10))
    measured = measure_run(Run.from_mapping(dict(zip(ids, ranked, strict=True))), data.qrels("dev"), ["RR@10"])
    sample = DevSample(data, make_config(eval_queries=500, eval_passages=5000))
    assert sample.measure(toy_parts.encoder) == pytest.approx(mean_measures(measured)["RR@10"])


def test_the_dev_sample_is_a_function_of_the_seed(toy_parts: Parts) -> None:
    def draw(seed: int) -> list[str]:
        return [query.query_id for query in DevSample(toy_parts.collection, make_config(seed=seed)).queries]

    assert draw(1) == draw(1) != draw(2)


@pytest.mark.slow
def test_a_tracker_of_accelerate_gets_the_log(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    train(toy_parts, examples, tmp_path / "model", QUERY, report_to="tensorboard")
    assert [path.name for path in (tmp_path / "model.trackers").rglob("events.out.tfevents.*")] != []
    verify_artefact(tmp_path / "model")


# --- the model that mines ---------------------------------------------------------------------------------------------


@pytest.fixture
def warm(toy_parts: Parts, tmp_path: Path) -> Iterator[tuple[DualEncoder, Path]]:
    folder = tmp_path / "student"
    config = make_config(max_steps=None)
    model = warm_student(
        toy_parts.collection, toy_parts.index, toy_parts.start, WarmConfig(warm_steps=3), config, folder
    )
    yield model, folder


def test_a_student_is_warmed_for_its_own_number_of_steps(warm: tuple[DualEncoder, Path], toy_parts: Parts) -> None:
    model, folder = warm
    assert read_log(folder)[-1]["step"] == 3
    assert model.is_retriever
    assert model.hash_weights() != toy_parts.encoder.hash_weights()


def test_its_negatives_are_bm25s_and_never_known_positives(warm: tuple[DualEncoder, Path], toy_parts: Parts) -> None:
    rows = list(Examples.open(Path(f"{warm[1]}.examples") / "plain.arrow"))
    train_labels = toy_parts.collection.qrels("train")
    assert len(rows) == len(train_labels)
    for row in rows:
        found, _ = toy_parts.index.search(toy_parts.collection.query(row.query_id).text, 5)
        assert 0 < len(row.negative_ids) <= 4
        assert set(row.negative_ids) <= set(toy_parts.collection.passages.ids_of(found))
        assert not set(row.negative_ids) & set(positives_of(train_labels, row.query_id))


def test_examples_of_another_folder_train_another_model(toy_parts: Parts, examples: Path, tmp_path: Path) -> None:
    inputs = read_manifest(examples).inputs
    with publish(tmp_path / "fewer", "examples", options={}, inputs=inputs) as staging:
        write_examples(staging.path / "labelled.arrow", list(read_rows(examples))[:20])
        write_examples(staging.path / "pseudo.arrow", [])
    whole = train(toy_parts, examples, tmp_path / "a", QUERY)
    fewer = train(toy_parts, tmp_path / "fewer", tmp_path / "b", QUERY)
    assert whole.hash_weights() != fewer.hash_weights()
    assert read_manifest(tmp_path / "b", "model").facts["examples"] == 20


def test_examples_of_other_data_are_refused(toy_parts: Parts, toy: Path, examples: Path, tmp_path: Path) -> None:
    parts = toy_parts._replace(collection=open_collection(toy, DataConfig(hide_labels=0.5)))
    with pytest.raises(ArtefactError, match=r"These examples were made from data \w{12}, this is \w{12}\."):
        train(parts, examples, tmp_path / "model")


def test_rows_without_negatives_are_left_out_where_their_own_are_all_there_is(tmp_path: Path) -> None:
    rows = [make_row("q1", "a", "b"), make_row("q2", "c")]
    for name in BOTH:
        write_examples(tmp_path / f"{name}.arrow", rows)
    counts = {
        (variant, stage.name): len(read_stage_examples(tmp_path, stage, make_config(passage_negatives=variant)))
        for variant in ("own", "official")
        for stage in (PAIR, QUERY)
    }
    assert counts == {
        ("own", "pair"): 2,
        ("own", "query_centric"): 4,
        ("official", "pair"): 4,
        ("official", "query_centric"): 4,
    }
