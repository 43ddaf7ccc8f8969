"""Untied towers: an encoder for each side, begun from the same weights, in places where sentence-transformers looks."""

from __future__ import annotations

import random
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from manifests import rewrite_manifest
from sentence_transformers import SentenceTransformer
from torch import Tensor

from pairdr.batches import Batch, collate
from pairdr.config import EncodeConfig, LabelConfig, ModelConfig, SearchConfig, StageConfig, TrainConfig
from pairdr.costs import CostModel, measure_costs
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, UsageError
from pairdr.formats import Examples
from pairdr.label import label_examples
from pairdr.loop import backward_batch, run_stage
from pairdr.records import Passage, Query
from pairdr.search import rank_dense
from pairdr.train import train_model
from pairdr.tuning import densify_gradients, prepare_model, seed_step

if TYPE_CHECKING:
    from conftest import Parts

PAIR = StageConfig("pair", 0.1, ("labelled",))
QUERY = StageConfig("query_centric", 0.0, ("labelled",))
FEW = {"max_steps": 3, "per_device_train_batch_size": 8, "eval_passages": 20, "eval_queries": 5, "learning_rate": 1e-3}
QUESTIONS = ["which river runs through Ashford", "market", "", "what is the bridge of Kendal built from " * 9]
PASSAGES = [
    Passage("a", "The river of Ashford", "The river is called the Lune."),
    Passage("b", "", "A market is held on Monday. " * 40),
    Passage("c", "", ""),
]


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, toy_parts: Parts) -> Path:
    """Return the folder of labelled examples with mined negatives."""
    folder = tmp_path_factory.mktemp("labelled") / "examples"
    label_examples(toy_parts.collection, toy_parts.candidates, None, LabelConfig(), folder)
    return folder


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return an untied model that nobody has trained, saved."""
    return save(load(tiny_model), tmp_path_factory.mktemp("untied") / "start")


@pytest.fixture(scope="module")
def trained(toy_parts: Parts, examples: Path, start: Path) -> DualEncoder:
    """Return an untied model after some steps; nobody changes it."""
    return train(toy_parts, examples, start)


def load(folder: Path, towers: str = "untied", **options: Any) -> DualEncoder:
    return DualEncoder.load(ModelConfig(start=str(folder), device="cpu", towers=towers, **options))


def save(encoder: DualEncoder, folder: Path) -> Path:
    encoder.save(folder, options={}, inputs={})
    return folder


def read_rows(examples: Path) -> Examples:
    return Examples.open(examples / "labelled.arrow")


def train(parts: Parts, examples: Path, start: Path, stage: StageConfig = PAIR, **options: Any) -> DualEncoder:
    encoder = DualEncoder.open(start, device="cpu")
    config = TrainConfig(**FEW | options)
    run_stage(parts.collection, read_rows(examples), encoder, stage, config, config.max_steps or 1)
    return encoder


def split_towers(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return what belongs to the queries' tower and to the passages', by the names that both share."""
    query, passage = (
        {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
        for prefix in ("0.sub_modules.query.", "0.sub_modules.document.")
    )
    assert query.keys() == passage.keys()
    assert len(query) + len(passage) == len(tensors)
    return query, passage


def make_batch(examples: Path) -> Batch:
    rows = read_rows(examples)
    return collate([rows[at] for at in range(8)], 2, mask=True, rng=random.Random(0))


def find_gradients(parts: Parts, examples: Path, encoder: DualEncoder, **options: Any) -> dict[str, Tensor]:
    """Return the gradients of one batch by parameter."""
    config = TrainConfig(**FEW | options)
    with prepare_model(encoder, config) as model:
        model.train()
        seed_step(config.seed, 1)
        backward_batch(parts.collection, encoder, make_batch(examples), 0.1, config)
        densify_gradients(model)
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def require_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert any(bool(value.any()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-3, atol=1e-5)


# --- the start model --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["tiny_model", "bare_model"])
@pytest.mark.parametrize("options", [{}, {"layers": 1, "query_prefix": "ask: ", "query_length": 9}])
def test_before_training_untied_towers_give_the_vectors_of_tied_ones(
    request: pytest.FixtureRequest, model: str, options: dict[str, Any]
) -> None:
    tied, untied = (load(request.getfixturevalue(model), towers, **options) for towers in ("tied", "untied"))
    assert np.array_equal(untied.encode_queries(QUESTIONS), tied.encode_queries(QUESTIONS))
    assert np.array_equal(untied.encode_passages(PASSAGES), tied.encode_passages(PASSAGES))
    assert (untied.temperature, untied.is_retriever) == (tied.temperature, tied.is_retriever)
    query, passage = split_towers(untied.model.state_dict())
    assert query.keys() == tied.model[0].model.state_dict(prefix="0.model.").keys()
    assert all(query[name].data_ptr() != passage[name].data_ptr() for name in query)


def test_the_layers_of_both_towers_are_cut(tiny_model: Path) -> None:
    for tower in split_towers(load(tiny_model, layers=1).model.state_dict()):
        assert {name.split(".")[4] for name in tower if ".layer." in name} == {"0"}


def test_a_model_that_was_saved_tied_is_refused_as_an_untied_one(toy_parts: Parts) -> None:
    with pytest.raises(UsageError, match="Option towers is 'untied', but this model was saved with 'tied'"):
        load(toy_parts.start)


def test_a_model_that_was_saved_untied_stays_so(start: Path) -> None:
    assert load(start).contract == load(start, "tied").contract == DualEncoder.open(start).contract
    assert load(start).contract.towers == "untied"


def test_a_model_whose_contract_names_no_towers_is_tied(tiny_model: Path, tmp_path: Path) -> None:
    folder = save(load(tiny_model, "tied"), tmp_path / "old")
    rewrite_manifest(folder, lambda content: content["facts"]["contract"].pop("towers"))
    assert DualEncoder.open(tmp_path / "old").contract == load(tiny_model, "tied").contract


def test_an_untied_forward_pass_without_a_side_is_refused(trained: DualEncoder) -> None:
    tokens = trained.tokenize_queries(QUESTIONS)
    with pytest.raises(ValueError, match="need to know the side"):
        trained.encode(tokens)
    query, passage = trained.encode(tokens, side="query"), trained.encode(tokens, side="passage")
    assert np.array_equal(query, trained.encode_queries(QUESTIONS))
    assert not np.allclose(query, passage, atol=1e-3)


# --- training ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("towers", "expected"), [("tied", {None}), ("untied", {"query", "passage"})])
def test_only_tied_towers_share_a_forward_pass(
    toy_parts: Parts,
    examples: Path,
    tiny_model: Path,
    monkeypatch: pytest.MonkeyPatch,
    towers: str,
    expected: set[str | None],
) -> None:
    passes: list[tuple[str | None, int]] = []
    embed = DualEncoder.embed

    def count(self: DualEncoder, tokens: Any, side: Any = None) -> Tensor:
        passes.append((side, len(tokens)))
        return embed(self, tokens, side)

    monkeypatch.setattr(DualEncoder, "embed", count)
    find_gradients(toy_parts, examples, load(tiny_model, towers))
    batch = make_batch(examples)
    assert {side for side, _ in passes} == expected
    assert sum(texts for _, texts in passes) == len(batch.query_ids) + len(batch.passage_ids)
    assert sum(texts for side, texts in passes if side == "query") == (8 if towers == "untied" else 0)


def test_the_gradients_of_both_towers_add_up_to_the_tied_encoders(
    toy_parts: Parts, examples: Path, tiny_model: Path
) -> None:
    tied, untied = (
        find_gradients(toy_parts, examples, load(tiny_model, towers), dropout=0.0) for towers in ("tied", "untied")
    )
    query, passage = split_towers(untied)
    require_equal({name: query[name] + passage[name] for name in query}, tied)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_grad_cache_gives_the_gradients_of_whole_graphs(
    toy_parts: Parts, examples: Path, start: Path, dropout: float
) -> None:
    whole, cached = (
        find_gradients(
            toy_parts, examples, DualEncoder.open(start), dropout=dropout, tokens_per_forward=128, grad_cache=cache
        )
        for cache in (False, True)
    )
    require_equal(cached, whole)


def test_training_moves_the_towers_apart(trained: DualEncoder, start: Path) -> None:
    begun = split_towers(DualEncoder.open(start).model.state_dict())
    moved = split_towers(trained.model.state_dict())
    name = "0.model.encoder.layer.0.output.dense.weight"
    assert torch.equal(begun[0][name], begun[1][name])
    assert not torch.equal(moved[0][name], begun[0][name])
    assert not torch.equal(moved[1][name], begun[1][name])
    assert not torch.equal(moved[0][name], moved[1][name])
    assert not np.allclose(
        trained.encode_queries(["river"]), trained.encode_passages([Passage("a", "", "river")]), atol=1e-3
    )


def test_lora_trains_both_towers_and_leaves_plain_ones(toy_parts: Parts, examples: Path, start: Path) -> None:
    begun, tuned = DualEncoder.open(start).model.state_dict(), train(toy_parts, examples, start, lora_rank=2)
    assert tuned.model.state_dict().keys() == begun.keys()
    query, passage = split_towers({name: value - begun[name] for name, value in tuned.model.state_dict().items()})
    name = "0.model.encoder.layer.1.attention.self.query.weight"
    assert torch.linalg.matrix_rank(query[name], rtol=1e-3) == torch.linalg.matrix_rank(passage[name], rtol=1e-3) == 2
    assert not torch.equal(query[name], passage[name])
    for tower in (query, passage):
        assert not tower["0.model.embeddings.word_embeddings.weight"].any()
    assert all(p.requires_grad for p in tuned.model.parameters())
    assert train(toy_parts, examples, start, lora_rank=2).hash_weights() == tuned.hash_weights()


@pytest.mark.parametrize("options", [{}, {"lora_rank": 2}, {"grad_cache": True}])
def test_gradient_checkpointing_of_both_towers_changes_no_gradient(
    toy_parts: Parts, examples: Path, start: Path, options: dict[str, Any]
) -> None:
    plain, checkpointed = DualEncoder.open(start), DualEncoder.open(start)
    bodies = [tower[0].model for tower in checkpointed.model[0].sub_modules.values()]
    with prepare_model(checkpointed, TrainConfig(gradient_checkpointing=True)):
        assert [body.is_activation_checkpointing for body in bodies] == [True, True]
    assert [body.is_activation_checkpointing for body in bodies] == [False, False]
    require_equal(
        find_gradients(toy_parts, examples, checkpointed, gradient_checkpointing=True, **options),
        find_gradients(toy_parts, examples, plain, **options),
    )


@pytest.mark.parametrize(
    ("towers", "stages", "expected"),
    [
        ("untied", (PAIR, QUERY), ["pair"]),
        ("untied", (QUERY,), []),
        ("tied", (PAIR, QUERY), []),
    ],
)
def test_only_untied_towers_are_warned_of_the_passage_centric_loss(
    toy_parts: Parts,
    examples: Path,
    start: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    towers: str,
    stages: tuple[StageConfig, ...],
    expected: list[str],
) -> None:
    begin = start if towers == "untied" else toy_parts.start
    config = TrainConfig(**FEW | {"max_steps": 1})
    model = train_model(toy_parts.collection, examples, begin, stages, config, tmp_path / "model", device="cpu")
    assert model.contract.towers == towers
    warned = [line for line in capsys.readouterr().err.splitlines() if "two spaces" in line]
    assert [line.split(": ")[1] for line in warned] == expected


# --- saving, encoding, searching --------------------------------------------------------------------------------------


def test_plain_sentence_transformers_gives_the_vectors_of_each_side(
    trained: DualEncoder, tiny_model: Path, tmp_path: Path
) -> None:
    prefixed = load(tiny_model, query_prefix="ask: ", passage_prefix="say: ", query_length=8, passage_length=40)
    prefixed.model.load_state_dict(trained.model.state_dict())
    for name, encoder in (("plain", trained), ("prefixed", prefixed)):
        plain = SentenceTransformer(str(save(encoder, tmp_path / name)), device="cpu")
        queries, passages = encoder.encode_queries(QUESTIONS), encoder.encode_passages(PASSAGES)
        assert plain.encode_query(QUESTIONS) == pytest.approx(queries, abs=1e-6)
        assert plain.encode_document([p.joined for p in PASSAGES]) == pytest.approx(passages, abs=1e-6)
        assert plain.similarity_fn_name == "cosine"


def test_titles_that_are_segments_go_through_the_passages_tower(
    trained: DualEncoder, tiny_model: Path, tmp_path: Path
) -> None:
    encoder = load(tiny_model, title="segment")
    encoder.model.load_state_dict(trained.model.state_dict())
    plain = SentenceTransformer(str(save(encoder, tmp_path / "model")), device="cpu")
    pairs = [(p.title or "-", p.text) for p in PASSAGES]
    assert plain.encode_document(pairs) == pytest.approx(encoder.encode_passages(PASSAGES), abs=1e-6)


def test_a_saved_model_is_the_same_when_it_is_opened(trained: DualEncoder, tmp_path: Path) -> None:
    again = DualEncoder.open(save(trained, tmp_path / "model"), device="cpu")
    assert again.contract == trained.contract
    assert again.fingerprint == trained.fingerprint
    assert np.array_equal(again.encode_queries(QUESTIONS), trained.encode_queries(QUESTIONS))
    assert np.array_equal(again.encode_passages(PASSAGES), trained.encode_passages(PASSAGES))


@pytest.mark.parametrize("side", ["query", "document"])
def test_the_fingerprint_knows_both_towers(start: Path, side: str) -> None:
    encoder = DualEncoder.open(start)
    before = encoder.fingerprint
    with torch.no_grad():
        next(encoder.model[0].sub_modules[side].parameters()).mul_(1.5)
    assert encoder.fingerprint != before


def test_search_compares_the_queries_tower_with_the_passages(
    toy_parts: Parts, trained: DualEncoder, tmp_path: Path
) -> None:
    collection = toy_parts.collection
    store = encode_corpus(collection, trained, EncodeConfig(), tmp_path / "vectors")
    queries = [collection.query(query_id) for query_id in list(collection.qrels("dev"))[:6]]
    [(ids, found)] = rank_dense(queries, trained, store, SearchConfig(k=5))
    passages = [collection.passage_at(row) for row in range(len(collection.passages))]
    scores = trained.encode_queries([query.text for query in queries]) @ trained.encode_passages(passages).T
    best = [[passages[at].passage_id for at in np.argsort(-row)[:5]] for row in scores]
    assert ids == [query.query_id for query in queries]
    assert [[hit.passage_id for hit in hits] for hits in found] == best
    assert [[hit.score for hit in hits] for hits in found] == pytest.approx(-np.sort(-scores)[:, :5], abs=1e-5)


def test_vectors_of_tied_towers_are_refused(toy_parts: Parts, start: Path) -> None:
    with pytest.raises(ArtefactError, match="made by encoder"):
        list(rank_dense([Query("q", "river")], DualEncoder.open(start), toy_parts.store, SearchConfig()))


# --- costs ------------------------------------------------------------------------------------------------------------


def test_untied_towers_cost_twice_the_models_memory_and_no_time() -> None:
    sizes: tuple[Any, ...] = (1e9, 1e6, 1e6, 32, 2, 100.0, 10.0)
    tied, untied = CostModel(*sizes), CostModel(*sizes, towers=2)
    assert untied.encode(10).seconds == tied.encode(10).seconds
    assert untied.train(1, 8, 1).seconds == tied.train(1, 8, 1).seconds
    assert untied.encode(0).memory == 2 * tied.encode(0).memory == 2 * 4 * 2e6


def test_the_costs_of_an_untied_start_are_predicted(toy_parts: Parts, start: Path, tiny_model: Path) -> None:
    saved, asked, tied = (
        measure_costs(toy_parts.collection, ModelConfig(start=str(folder), towers=towers))
        for folder, towers in ((start, "tied"), (tiny_model, "untied"), (tiny_model, "tied"))
    )
    assert saved is not None
    assert asked is not None
    assert tied is not None
    assert (saved.towers, asked.towers, tied.towers) == (2, 2, 1)
    assert saved.weights == asked.weights == tied.weights > 0
    assert saved.passage_tokens == asked.passage_tokens == tied.passage_tokens
