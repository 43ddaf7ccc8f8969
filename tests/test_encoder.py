"""The encoder and its contract, and the vectors of a corpus: what is stored, what is refused, what goes on."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from sentence_transformers import CrossEncoder, SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding

from pairdr.artefact import publish, read_manifest
from pairdr.config import ModelConfig
from pairdr.dropout import use_dropout
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, RefusedError, UsageError
from pairdr.records import Passage
from pairdr.start import is_retriever
from pairdr.tokens import FORWARD_COST, plan_forwards

LONG = "the river runs through the town and the market is held on the square near the old bridge " * 4
QUERIES = ["which river runs through Ashford", "market", "", LONG]
PASSAGES = [
    Passage("a", "The river of Ashford", "The river is called the Lune."),
    Passage("b", "", "A market is held on Monday."),
    Passage("c", "The old bridge", LONG),
    Passage("d", "", ""),
]


def load(folder: Path, **options: Any) -> DualEncoder:
    return DualEncoder.load(ModelConfig(start=str(folder), device="cpu", **options))


def save(encoder: DualEncoder, folder: Path, **facts: Any) -> Path:
    encoder.save(folder, options={}, inputs={}, facts=facts)
    return folder


def words_of(encoder: DualEncoder, ids: list[int]) -> list[str]:
    return list(encoder.model.tokenizer.convert_ids_to_tokens(ids))


# --- defaults that follow the start model -----------------------------------------------------------------------------


def test_a_bare_encoder_is_cls_dot_and_temperature_one_and_no_retriever(bare_model: Path) -> None:
    encoder = load(bare_model)
    assert (encoder.contract.pooling, encoder.contract.similarity, encoder.temperature) == ("cls", "dot", 1.0)
    assert not encoder.is_retriever
    norms = np.linalg.norm(encoder.encode_queries(["river", "market"]), axis=1)
    assert not np.allclose(norms, 1)


def test_a_sentence_transformers_folder_keeps_its_pooling_and_cosine(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    assert (encoder.contract.pooling, encoder.contract.similarity, encoder.temperature) == ("mean", "cosine", 0.05)
    assert encoder.is_retriever
    assert np.linalg.norm(encoder.encode_queries(["river", "market"]), axis=1) == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(("model", "expected"), [("bare_model", False), ("tiny_model", True)])
def test_whether_a_start_is_a_retriever_is_known_without_loading_it(
    request: pytest.FixtureRequest, model: str, expected: bool
) -> None:
    assert is_retriever(ModelConfig(start=str(request.getfixturevalue(model)))) is expected


def test_a_bare_encoder_for_cosine_ends_with_a_normalisation(bare_model: Path) -> None:
    encoder = load(bare_model, similarity="cosine", pooling="mean")
    assert isinstance(encoder.model[-1], Normalize)
    assert (encoder.contract.pooling, encoder.temperature) == ("mean", 0.05)
    assert np.linalg.norm(encoder.encode_queries(["river"])) == pytest.approx(1, abs=1e-6)


def test_a_chosen_pooling_replaces_the_folders_own(tiny_model: Path) -> None:
    own, cls = load(tiny_model), load(tiny_model, pooling="cls")
    assert cls.contract.pooling == "cls"
    assert not np.allclose(own.encode_queries(QUERIES), cls.encode_queries(QUERIES))


def test_dot_product_at_temperature_one_on_a_normalised_model_is_refused_with_the_remedy(tiny_model: Path) -> None:
    with pytest.raises(RefusedError, match=r"temperature = 0\.05 or similarity = 'cosine'"):
        load(tiny_model, similarity="dot")
    assert load(tiny_model, similarity="dot", temperature=0.05).temperature == 0.05


def test_layers_are_cut_and_stay_cut(tiny_model: Path, tmp_path: Path) -> None:
    whole, cut = load(tiny_model), load(tiny_model, layers=1)
    assert len(cut.model[0].model.encoder.layer) == 1
    assert not np.allclose(whole.encode_queries(QUERIES), cut.encode_queries(QUERIES))
    again = DualEncoder.open(save(cut, tmp_path / "cut"), device="cpu")
    assert np.array_equal(cut.encode_queries(QUERIES), again.encode_queries(QUERIES))


def test_more_layers_than_there_are_are_refused_with_their_number(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="layers is 3; this model has 2 layers"):
        load(tiny_model, layers=3)


def test_a_length_over_the_models_positions_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match="161 tokens is over the model's 160 positions"):
        load(tiny_model, passage_length=161)


# --- the contract in sentence-transformers' places --------------------------------------------------------------------

CONTRACTS = {
    "plain": {},
    "prefixes": {"query_prefix": "query: ", "passage_prefix": "passage: "},
    "short": {"query_length": 6, "passage_length": 9},
    "both": {"query_prefix": "what is ", "passage_prefix": "town: ", "query_length": 8, "passage_length": 150},
}


@pytest.mark.parametrize("model", ["tiny_model", "bare_model"])
@pytest.mark.parametrize("contract", CONTRACTS)
def test_plain_sentence_transformers_gives_our_vectors(
    request: pytest.FixtureRequest, tmp_path: Path, model: str, contract: str
) -> None:
    encoder = load(request.getfixturevalue(model), **CONTRACTS[contract])
    folder = save(encoder, tmp_path / "model")
    plain, opened = SentenceTransformer(str(folder), device="cpu"), DualEncoder.open(folder, device="cpu")
    documents = plain.encode_document([passage.joined for passage in PASSAGES])
    assert plain.encode_query(QUERIES) == pytest.approx(opened.encode_queries(QUERIES), abs=1e-6)
    assert documents == pytest.approx(opened.encode_passages(PASSAGES), abs=1e-6)
    assert plain.similarity_fn_name == encoder.contract.similarity


def test_texts_are_cut_to_the_length_special_tokens_included(tiny_model: Path) -> None:
    encoder = load(tiny_model, query_length=7, passage_length=11)
    assert len(encoder.tokenize_queries([LONG])[0].input_ids) == 7
    assert len(encoder.tokenize_passages(PASSAGES[2:3])[0].input_ids) == 11
    longer = encoder.encode_queries([LONG, LONG + " and more"])
    assert np.array_equal(longer[0], longer[1])


def test_prefixes_change_the_vectors_of_their_own_side_alone(tiny_model: Path) -> None:
    plain, prefixed = load(tiny_model), load(tiny_model, query_prefix="town ")
    assert not np.allclose(plain.encode_queries(QUERIES), prefixed.encode_queries(QUERIES))
    assert np.array_equal(plain.encode_passages(PASSAGES), prefixed.encode_passages(PASSAGES))


def test_a_models_own_prompts_are_its_prefixes(tiny_model: Path, tmp_path: Path) -> None:
    model = SentenceTransformer(str(tiny_model), device="cpu", prompts={"query": "q: ", "document": "d: "})
    model.save(str(tmp_path / "prompted"), create_model_card=False)
    contract = load(tmp_path / "prompted").contract
    assert (contract.query_prefix, contract.passage_prefix) == ("q: ", "d: ")
    assert load(tmp_path / "prompted", query_prefix="").contract.query_prefix == ""


def test_a_saved_model_opens_with_its_contract(bare_model: Path, tmp_path: Path) -> None:
    encoder = load(bare_model, query_prefix="q ", query_length=9, title="segment", temperature=0.7)
    opened = DualEncoder.open(save(encoder, tmp_path / "model"), device="cpu")
    assert opened.contract == encoder.contract
    assert (opened.temperature, opened.is_retriever) == (0.7, False)
    assert opened.fingerprint == encoder.fingerprint == read_manifest(tmp_path / "model").facts["encoder"]
    assert np.array_equal(opened.encode_passages(PASSAGES), encoder.encode_passages(PASSAGES))


def test_a_start_in_half_precision_is_trained_in_single(tiny_model: Path, tmp_path: Path) -> None:
    SentenceTransformer(str(tiny_model), device="cpu").bfloat16().save(str(tmp_path / "half"), create_model_card=False)
    assert {parameter.dtype for parameter in load(tmp_path / "half").model.parameters()} == {torch.float32}


def test_weights_that_a_start_lacks_are_drawn_alike(bare_model: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(bare_model, tmp_path / "bare"))
    weights = {name: value for name, value in load_file(folder / "model.safetensors").items() if "pooler" not in name}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    assert load(folder).hash_weights() == load(folder).hash_weights()


def test_a_saved_model_is_a_start_model(tiny_model: Path, tmp_path: Path) -> None:
    folder = save(load(tiny_model, query_prefix="q "), tmp_path / "model")
    assert load(folder).contract.query_prefix == "q "


def test_a_trained_model_is_a_retriever(bare_model: Path, tmp_path: Path) -> None:
    folder = save(load(bare_model), tmp_path / "model", stages=[{"name": "stage 1"}])
    assert DualEncoder.open(folder, device="cpu").is_retriever
    assert is_retriever(ModelConfig(start=str(folder)))


def test_the_fingerprint_is_of_the_weights_and_the_contract(tiny_model: Path) -> None:
    encoders = [load(tiny_model, **options) for options in ({}, {}, {"query_prefix": "q "}, {"passage_length": 20})]
    first, same, prefixed, shorter = (encoder.fingerprint for encoder in encoders)
    assert first == same
    assert len({first, prefixed, shorter}) == 3
    with torch.no_grad():
        next(encoders[0].model.parameters()).mul_(1.5)
    assert encoders[0].fingerprint != first


def test_weights_without_dimensions_are_hashed_too(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    encoder.model.register_buffer("scale", torch.tensor(1.0))
    first = encoder.hash_weights()
    encoder.model.scale.fill_(2.0)
    assert encoder.hash_weights() != first


# --- title and text as a pair -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def segments(tiny_model: Path) -> DualEncoder:
    """Return an encoder that takes title and text as a pair."""
    return load(tiny_model, title="segment")


def cut_as_the_paper(title: int, text: int, room: int) -> tuple[int, int]:
    """Cut one token at a time from the end of the longer part; ties cut the text (the official code)."""
    while title + text > room:
        title, text = (title - 1, text) if title > text else (title, text - 1)
    return title, text


def segment_lengths(encoder: DualEncoder, title: int, text: int) -> tuple[int, int]:
    """Return how many tokens are left of a title and a text of so many."""
    (tokens,) = encoder.tokenize_passages([Passage("p", " ".join(["town"] * title), " ".join(["river"] * text))])
    words = words_of(encoder, tokens.input_ids)
    assert words == ["[CLS]", *["town"] * words.count("town"), "[SEP]", *["river"] * words.count("river"), "[SEP]"]
    assert tokens.token_type_ids == [0] * (words.count("town") + 2) + [1] * (words.count("river") + 1)
    return words.count("town"), words.count("river")


def test_title_and_text_as_segments_are_a_pair_of_the_tokeniser(segments: DualEncoder) -> None:
    titles, texts = [passage.title or "-" for passage in PASSAGES], [passage.text for passage in PASSAGES]
    expected = segments.model.tokenizer(titles, texts, truncation="longest_first", max_length=128)
    found = segments.tokenize_passages(PASSAGES)
    assert [tokens.input_ids for tokens in found] == expected["input_ids"]
    assert [tokens.token_type_ids for tokens in found] == expected["token_type_ids"]


def test_a_missing_title_is_a_dash_where_titles_are_segments(segments: DualEncoder) -> None:
    (tokens,) = segments.tokenize_passages([Passage("p", "", "river")])
    assert words_of(segments, tokens.input_ids) == ["[CLS]", "-", "[SEP]", "river", "[SEP]"]


def test_a_question_is_cut_to_32_and_a_pair_to_128_special_tokens_included(segments: DualEncoder) -> None:
    (query,) = segments.tokenize_queries(["river " * 200])
    assert words_of(segments, query.input_ids) == ["[CLS]", *["river"] * 30, "[SEP]"]
    assert segment_lengths(segments, 10, 200) == (10, 115)
    assert segment_lengths(segments, 200, 10) == (115, 10)
    assert segment_lengths(segments, 60, 65) == (60, 65)


@given(title=st.integers(1, 140), text=st.integers(1, 140))
def test_pairs_are_cut_longest_first_as_in_the_paper_but_for_one_token(
    segments: DualEncoder, title: int, text: int
) -> None:
    """Where both parts are over half of an odd room, the paper's code gives the token in the middle to the title.

    The tokeniser gives it to the longer part, and to the text where both are equally long.
    """
    expected = cut_as_the_paper(title, text, 125)
    if min(title, text) >= 63:
        expected = (63, 62) if title > text else (62, 63)
    assert segment_lengths(segments, title, text) == expected


def test_sentence_transformers_gives_the_vectors_of_segments_for_pairs(tiny_model: Path, tmp_path: Path) -> None:
    encoder = load(tiny_model, title="segment")
    plain = SentenceTransformer(str(save(encoder, tmp_path / "model")), device="cpu")
    pairs = [(passage.title or "-", passage.text) for passage in PASSAGES]
    assert plain.encode_document(pairs) == pytest.approx(encoder.encode_passages(PASSAGES), abs=1e-6)
    assert "(title, text) pairs" in (tmp_path / "model" / "README.md").read_text(encoding="utf-8")


# --- embed and encode -------------------------------------------------------------------------------------------------


def test_embed_with_dropout_off_equals_encode_in_any_order(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    tokens = encoder.tokenize_queries([LONG[: 7 * number] for number in range(60)])
    order = np.random.default_rng(13).permutation(60)
    encoder.model.eval()
    embedded = encoder.embed([tokens[place] for place in order])
    assert embedded.requires_grad
    assert embedded.detach().numpy() == pytest.approx(encoder.encode(tokens)[order], abs=1e-6)


def test_dropout_is_on_in_training_until_it_is_set_to_zero(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    tokens = encoder.tokenize_queries(QUERIES)
    encoder.model.train()
    assert not torch.equal(encoder.embed(tokens), encoder.embed(tokens))
    with use_dropout(encoder.model, 0.0):
        assert torch.equal(encoder.embed(tokens), encoder.embed(tokens))


def test_embed_is_one_forward_pass_padded_to_the_longest_text(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    shapes: list[tuple[int, ...]] = []
    layer = encoder.model[0].model.encoder.layer[0]
    layer.register_forward_hook(lambda module, inputs, out: shapes.append(tuple(inputs[0].shape)))
    tokens = encoder.tokenize_queries(QUERIES)
    assert encoder.embed(tokens).shape == (4, 32)
    assert shapes == [(4, max(len(text.input_ids) for text in tokens), 32)]


def test_the_vectors_of_no_texts_are_an_empty_array(tiny_model: Path) -> None:
    assert load(tiny_model).encode_queries([]).shape == (0, 32)


def test_the_size_of_a_batch_does_not_change_the_vectors(tiny_model: Path) -> None:
    encoder = load(tiny_model)
    alone, together = (encoder.encode_passages(PASSAGES, tokens) for tokens in (16, 10_000))
    assert alone == pytest.approx(together, abs=1e-6)


lengths_of_texts = st.lists(st.integers(1, 200), max_size=60)


def padded_tokens(groups: list[list[int]], lengths: list[int]) -> int:
    return sum(len(group) * max(lengths[place] for place in group) for group in groups)


@given(lengths_of_texts, st.integers(16, 500))
def test_forward_passes_hold_every_text_once_and_at_most_so_many_tokens(lengths: list[int], limit: int) -> None:
    groups = plan_forwards(lengths, limit)
    assert sorted(place for group in groups for place in group) == list(range(len(lengths)))
    assert all(len(group) == 1 or padded_tokens([group], lengths) <= limit for group in groups)
    assert groups == plan_forwards(lengths, limit)


@given(lengths_of_texts, st.integers(16, 500))
def test_forward_passes_go_from_the_shortest_texts_to_the_longest(lengths: list[int], limit: int) -> None:
    order = [lengths[place] for group in plan_forwards(lengths, limit) for place in group]
    assert order == sorted(order)


@given(lengths_of_texts)
def test_padding_and_passes_cost_no_more_than_in_one_pass_or_in_one_for_each_length(lengths: list[int]) -> None:
    groups = plan_forwards(lengths, 1_000_000)
    cost = padded_tokens(groups, lengths) + FORWARD_COST["cpu"] * len(groups)
    assert cost <= len(lengths) * max(lengths, default=0) + FORWARD_COST["cpu"]
    assert cost <= sum(lengths) + FORWARD_COST["cpu"] * len(set(lengths))


@given(st.lists(st.integers(1, 200), min_size=1, max_size=7))
def test_no_other_plan_costs_less(lengths: list[int]) -> None:
    ordered = sorted(lengths)
    costs = []
    for cuts in product((False, True), repeat=len(ordered) - 1):
        groups = [[0]]
        for place, cut in enumerate(cuts, start=1):
            groups.append([place]) if cut else groups[-1].append(place)
        costs.append(padded_tokens(groups, ordered) + FORWARD_COST["cpu"] * len(groups))
    groups = plan_forwards(lengths, 1_000_000)
    assert padded_tokens(groups, lengths) + FORWARD_COST["cpu"] * len(groups) == min(costs)


def test_long_and_short_texts_do_not_meet_where_padding_costs_more_than_a_pass() -> None:
    assert plan_forwards([100, 3, 90, 4, 100, 4], 10_000) == [[1, 3, 5], [2, 0, 4]]
    assert plan_forwards([5, 9, 5, 9], 10_000) == [[0, 2, 1, 3]]


# --- what is no model -------------------------------------------------------------------------------------------------


def make_cross_encoder(folder: Path, tiny_model: Path) -> None:
    CrossEncoder(str(tiny_model), num_labels=1, device="cpu").save(str(folder))


def make_static_model(folder: Path, tiny_model: Path) -> None:
    tokenizer = SentenceTransformer(str(tiny_model), device="cpu").tokenizer.backend_tokenizer
    model = SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=8)], device="cpu")
    model.save(str(folder), create_model_card=False)


def make_cut_weights(folder: Path, tiny_model: Path) -> None:
    SentenceTransformer(str(tiny_model), device="cpu").save(str(folder), create_model_card=False)
    os.truncate(folder / "model.safetensors", 1000)


def make_broken_config(folder: Path, _: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{", encoding="utf-8")


def make_empty_folder(folder: Path, _: Path) -> None:
    folder.mkdir()


def make_nothing(folder: Path, _: Path) -> None:
    assert not folder.exists()


NO_MODELS = {
    make_cross_encoder: "is a CrossEncoder",
    make_static_model: "first module is StaticEmbedding, not a transformer",
    make_cut_weights: "cannot be loaded",
    make_broken_config: "cannot be loaded: .*config.json",
    make_empty_folder: r"This is no model folder\. It needs config\.json or modules\.json",
    make_nothing: "There is no such folder",
}


@pytest.mark.parametrize("make", NO_MODELS, ids=lambda make: make.__name__)
def test_what_is_no_encoder_is_refused_in_one_sentence(
    tmp_path: Path, tiny_model: Path, make: Callable[[Path, Path], None]
) -> None:
    make(tmp_path / "model", tiny_model)
    with pytest.raises(UsageError, match=NO_MODELS[make]) as caught:
        load(tmp_path / "model")
    assert str(tmp_path / "model") in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_on_the_hub_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'nobody/has-this-model' cannot be loaded"):
        DualEncoder.load(ModelConfig(start="nobody/has-this-model"))


@pytest.mark.parametrize("open_model", [load, DualEncoder.open])
def test_an_artefact_of_another_kind_is_no_model(tmp_path: Path, open_model: Callable[[Path], DualEncoder]) -> None:
    with publish(tmp_path / "vectors", "vectors", options={}, inputs={}):
        pass
    with pytest.raises(ArtefactError, match="holds 'vectors', not 'model'"):
        open_model(tmp_path / "vectors")


def test_a_saved_model_with_cut_weights_is_refused(tmp_path: Path, tiny_model: Path) -> None:
    folder = save(load(tiny_model), tmp_path / "model")
    os.truncate(folder / "model.safetensors", 1000)
    with pytest.raises(ArtefactError, match=r"model\.safetensors has 1000 bytes"):
        load(folder)


@pytest.mark.parametrize(
    "option", [{"query_length": 20}, {"query_prefix": "ask: "}, {"layers": 1}, {"temperature": 0.3}]
)
def test_options_against_a_saved_models_contract_are_refused(tiny_model: Path, tmp_path: Path, option: dict) -> None:
    DualEncoder.load(ModelConfig(start=str(tiny_model))).save(tmp_path / "m", options={}, inputs={})
    with pytest.raises(UsageError, match=f"Option {next(iter(option))} is .* but this model was saved with"):
        DualEncoder.load(ModelConfig(start=str(tmp_path / "m"), **option))


def test_options_that_a_saved_models_contract_has_are_taken(tiny_model: Path, tmp_path: Path) -> None:
    DualEncoder.load(ModelConfig(start=str(tiny_model), query_length=20)).save(tmp_path / "m", options={}, inputs={})
    again = DualEncoder.load(ModelConfig(start=str(tmp_path / "m"), query_length=20))
    assert again.contract.query_length == 20


def test_a_prefix_that_leaves_no_room_for_the_text_is_refused(tiny_model: Path) -> None:
    with pytest.raises(UsageError, match=r"takes \d+ of 6 tokens"):
        DualEncoder.load(ModelConfig(start=str(tiny_model), query_prefix="a b c d e f ", query_length=6))


def test_another_tokenizer_is_another_encoder(tiny_model: Path) -> None:
    encoder = DualEncoder.load(ModelConfig(start=str(tiny_model)))
    before = encoder.fingerprint
    encoder.encode_queries(["a question"])
    assert encoder.fingerprint == before
    encoder.model.tokenizer.add_tokens(["newword"])
    assert encoder.fingerprint != before


def test_half_precision_keeps_directions_and_lengths(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DualEncoder.load(ModelConfig(start=str(tiny_model), device="cpu"))
    texts = ["which river runs through Kendal", "market", "who founded the town"]
    whole, noise = encoder.encode_queries(texts), encoder.noise
    monkeypatch.setattr("pairdr.encoder.HALF", {"cpu": torch.bfloat16})
    half = encoder.encode_queries(texts)
    assert not np.array_equal(half, whole)
    assert (half * whole).sum(1).min() > 0.99
    np.testing.assert_allclose(np.linalg.norm(half, axis=1), 1, atol=1e-6)
    assert encoder.noise > noise
