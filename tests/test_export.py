"""Exports and their gate: what is published, what is refused, and that nothing refused is ever written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exporting import share_graphs
from transformers import AutoConfig, AutoModel, AutoTokenizer

from pairdr import export as export_module
from pairdr.artefact import read_manifest, verify_artefact
from pairdr.backends import open_encoder
from pairdr.backends.texts import pad_tokens
from pairdr.cli import main
from pairdr.collection import Collection, open_collection
from pairdr.config import ModelConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, DataError, MissingExtraError, RefusedError, UsageError
from pairdr.export import export_model
from pairdr.gate import draw_sample, judge_export, make_sample, refuse_loss
from pairdr.readme import is_edited
from pairdr.records import Passage, positives_of
from pairdr.store_config import ExportConfig

SMALL = ExportConfig(export_queries=30, export_passages=80, calibration_texts=20)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    """Return a saved model."""
    folder = tmp_path_factory.mktemp("saved") / "model"
    DualEncoder.load(ModelConfig(start=str(tiny_model), device="cpu")).save(folder, options={}, inputs={})
    return folder


@pytest.fixture
def quick_graph(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Write the graph of a model once for all tests."""
    share_graphs(monkeypatch, tmp_path_factory.getbasetemp())


@pytest.fixture
def collection(toy: Path) -> Collection:
    """Return the toy data, opened."""
    return open_collection(toy)


class Turned:
    """An encoder whose vectors lean towards random ones."""

    def __init__(self, encoder: DualEncoder, share: float) -> None:
        self.encoder, self.share = encoder, share
        self.contract, self.fingerprint = encoder.contract, "turned"

    def encode_queries(self, texts: list[str], tokens_per_batch: int = 0) -> np.ndarray:
        """Return spoilt vectors."""
        return self._spoil(self.encoder.encode_queries(texts))

    def encode_passages(self, passages: list[Passage], tokens_per_batch: int = 0) -> np.ndarray:
        """Return spoilt vectors."""
        return self._spoil(self.encoder.encode_passages(passages))

    def _spoil(self, vectors: np.ndarray) -> np.ndarray:
        noise = np.random.default_rng(13).standard_normal(vectors.shape).astype(np.float32)
        mixed = vectors + self.share * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        return mixed / np.linalg.norm(mixed, axis=1, keepdims=True)


# --- what is published ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.usefixtures("quick_graph")
def test_the_manifest_says_what_was_made_of_what_and_how_near_it_is(
    model: Path, tmp_path: Path, collection: Collection
) -> None:
    export_model(model, tmp_path / "out", to="openvino-int8", collection=collection, config=SMALL)
    manifest = verify_artefact(tmp_path / "out")
    facts, source = manifest.facts, read_manifest(model)
    assert (manifest.kind, facts["backend"], facts["precision"]) == ("exported", "openvino", "int8")
    assert sorted(manifest.files) == ["model.bin", "model.xml", "tokenizer.json"]
    assert (facts["contract"], facts["temperature"]) == (source.facts["contract"], 0.05)
    assert facts["source_encoder"] == source.facts["encoder"] != facts["encoder"]
    assert manifest.inputs == {"model": source.fingerprint, "collection": collection.fingerprint}
    assert manifest.options == {"to": "openvino-int8"} | SMALL.as_dict()
    judged = facts["gate"]
    assert (judged["queries"], judged["passages"]) == (30, len(draw_sample(collection, SMALL).passages))
    assert judged["loss"] == pytest.approx(judged["ndcg_model"] - judged["ndcg_export"])
    assert judged["loss_low"] <= judged["loss"] <= judged["loss_high"] <= judged["loss"] + 0.1
    assert 0.9 <= judged["cosine_min"] <= judged["cosine_mean"] < 1
    assert 0.5 < judged["overlap"] <= 1
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert "# model, for OpenVINO in int8\n" in card
    low, high = judged["loss_low"], judged["loss_high"]
    assert f" | {judged['ndcg_export']:.4f} | {judged['loss']:.4f} ({low:.4f} to {high:.4f}) | " in card
    assert f"dev queries of `{collection.given_name}`" in card
    command = f"pairdr export model --to openvino-int8 --data {collection.given_name} -o out --export-queries 30"
    assert f"```sh\n{command}" in card
    assert str(model.parent) not in card
    assert not is_edited(card)


@pytest.mark.slow
def test_an_export_without_data_is_judged_by_its_vectors(model: Path, tmp_path: Path) -> None:
    encoder = export_model(model, tmp_path / "out", to="onnx")
    facts = read_manifest(tmp_path / "out").facts
    assert set(facts["gate"]) == {"cosine_mean", "cosine_min", "queries", "passages"}
    assert facts["gate"]["cosine_min"] >= 0.9999
    assert encoder.fingerprint == facts["encoder"]
    card = (tmp_path / "out" / "README.md").read_text(encoding="utf-8")
    assert f"{facts['gate']['cosine_min']:.6f} at least" in card
    assert "rankings were not compared" in card
    assert "## The model it was made of\n" in card
    assert "### A dense passage retriever\n" in card
    again = export_model(model, tmp_path / "again", to="onnx")
    assert again.fingerprint == encoder.fingerprint
    assert str(tmp_path) not in (tmp_path / "out" / "model.onnx").read_bytes().decode(errors="replace")
    assert "site-packages" not in (tmp_path / "out" / "model.onnx").read_bytes().decode(errors="replace")


def test_the_models_own_attention_is_put_back(model: Path, tmp_path: Path) -> None:
    encoder = DualEncoder.open(model, device="cpu")
    body = encoder.model[0].model
    before = body.config._attn_implementation
    export_module._write_graph(encoder, tmp_path / "model.onnx")
    assert body.config._attn_implementation == before != "eager"


@pytest.mark.slow
def test_a_model_without_token_types_is_exported(tmp_path: Path, bare_model: Path) -> None:
    folder = Path(shutil.copytree(bare_model, tmp_path / "bare"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(config), encoding="utf-8")
    encoder = DualEncoder.load(ModelConfig(start=str(folder), device="cpu", title="segment"))
    encoder.save(tmp_path / "model", options={}, inputs={})
    assert not encoder.tokenize_queries(["a"])[0].token_type_ids
    other = export_model(tmp_path / "model", tmp_path / "out", to="openvino")
    passages = [Passage("a", "river", "the market of Ashford")]
    assert other.encode_passages(passages) == pytest.approx(encoder.encode_passages(passages), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["roberta", "modernbert"])
def test_other_bodies_are_exported(tmp_path: Path, bare_model: Path, kind: str) -> None:
    """RoBERTa counts its positions from the padding; ModernBERT has local attention and no token types."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {"pad_token_id": 0, "cls_token_id": 2, "sep_token_id": 3, "bos_token_id": 2, "eos_token_id": 3}
    local = {"local_attention": 8, "global_attn_every_n_layers": 2} if kind == "modernbert" else {}
    folder = Path(shutil.copytree(bare_model, tmp_path / "body"))
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8")) | {"model_input_names": ["input_ids", "attention_mask"]}
    path.write_text(json.dumps(config), encoding="utf-8")
    vocabulary = len(AutoTokenizer.from_pretrained(bare_model))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(13)
        body = AutoConfig.for_model(kind, vocab_size=vocabulary, max_position_embeddings=170, **sizes, **ids, **local)
        AutoModel.from_config(body).save_pretrained(folder)
    options = ModelConfig(start=str(folder), device="cpu", pooling="mean", similarity="cosine")
    encoder = DualEncoder.load(options)
    encoder.save(tmp_path / "model", options={}, inputs={})
    queries = ["river", "the market of Ashford is held on Monday", "", "the old bridge " * 30]
    other = export_model(tmp_path / "model", tmp_path / "out", to="onnx")
    assert other.encode_queries(queries) == pytest.approx(encoder.encode_queries(queries), abs=1e-5)


# --- what is refused --------------------------------------------------------------------------------------------------


def test_int8_needs_data(model: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"int8 needs data.*--data"):
        export_model(model, tmp_path / "out", to="openvino-int8")
    assert not (tmp_path / "out").exists()


def test_untied_towers_are_refused(tmp_path: Path, tiny_model: Path) -> None:
    untied = ModelConfig(start=str(tiny_model), towers="untied", device="cpu")
    DualEncoder.load(untied).save(tmp_path / "model", options={}, inputs={})
    with pytest.raises(UsageError, match="Untied towers are not exported"):
        export_model(tmp_path / "model", tmp_path / "out", to="onnx")


def test_a_folder_that_pairdr_did_not_save_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="No model here"):
        export_model(tiny_model, tmp_path / "out", to="onnx")


@pytest.mark.usefixtures("quick_graph")
def test_a_loss_over_what_is_allowed_is_refused_and_the_earlier_export_stays(
    model: Path, tmp_path: Path, collection: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = export_model(model, tmp_path / "out", to="onnx", collection=collection, config=SMALL)
    found = read_manifest(tmp_path / "out").facts["gate"] | {"loss": 0.02, "loss_low": 0.01, "loss_high": 0.03}
    monkeypatch.setattr(export_module, "judge_export", lambda *_: found)
    with pytest.raises(RefusedError, match=r"loses 0\.0200 nDCG@10 on 30 dev .* 0\.0100 to 0\.0300\); 0\.005 is"):
        export_model(model, tmp_path / "out", to="openvino", collection=collection, config=SMALL)
    assert open_encoder(tmp_path / "out").fingerprint == kept.fingerprint
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.slow
@pytest.mark.usefixtures("quick_graph")
def test_a_graph_of_other_weights_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_graph = export_module._write_graph

    def write_another(encoder: DualEncoder, path: Path) -> None:
        other = DualEncoder.open(model, device="cpu")
        with torch.no_grad():
            other.model[0].model.embeddings.word_embeddings.weight.mul_(-1)
        write_graph(other, path)

    monkeypatch.setattr(export_module, "_write_graph", write_another)
    with pytest.raises(RefusedError, match=r"vectors are not the model's: cosine_min is .* at least 0\.9999"):
        export_model(model, tmp_path / "out", to="openvino")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("quick_graph")
def test_a_tokenizer_that_tokenises_otherwise_is_refused(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read_tokenizer = export_module._read_tokenizer

    def read_another(encoder: DualEncoder) -> str:
        content = json.loads(read_tokenizer(encoder))
        return json.dumps(content | {"normalizer": None})

    monkeypatch.setattr(export_module, "_read_tokenizer", read_another)
    with pytest.raises(RefusedError, match="tokenises otherwise"):
        export_model(model, tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_is_no_graph_is_refused_with_the_reason(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("it has no form")

    monkeypatch.setattr(torch.onnx, "export", refuse)
    with pytest.raises(UsageError, match="cannot be written as a graph: it has no form"):
        export_model(model, tmp_path / "out", to="onnx")
    assert list(tmp_path.iterdir()) == []


def test_a_tokenizer_in_python_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = DualEncoder.open(model, device="cpu")
    monkeypatch.setattr(type(encoder.model), "tokenizer", object())
    with pytest.raises(UsageError, match="tokenizer needs Python"):
        export_module._read_tokenizer(encoder)


@pytest.mark.parametrize(
    ("to", "package", "extra"),
    [("onnx", "onnxscript", "onnx"), ("openvino", "openvino", "openvino"), ("openvino-int8", "nncf", "openvino")],
)
def test_a_missing_package_is_named_with_its_extra(
    model: Path,
    tmp_path: Path,
    collection: Collection,
    monkeypatch: pytest.MonkeyPatch,
    to: str,
    package: str,
    extra: str,
) -> None:
    find_spec = export_module.find_spec
    monkeypatch.setattr(export_module, "find_spec", lambda name: None if name == package else find_spec(name))
    with pytest.raises(MissingExtraError, match=rf"package {package}\. .*pairdr\[{extra}\]"):
        export_model(model, tmp_path / "out", to=to, collection=collection)


# --- the gate ---------------------------------------------------------------------------------------------------------


def test_a_model_loses_nothing_against_itself(model: Path, collection: Collection) -> None:
    encoder = DualEncoder.open(model, device="cpu")
    found = judge_export(encoder, encoder, draw_sample(collection, SMALL), SMALL)
    assert (found["loss"], found["loss_low"], found["loss_high"], found["overlap"]) == (0, 0, 0, 1)
    assert found["cosine_min"] == pytest.approx(1)
    refuse_loss(found, "fp32", ExportConfig(allowed_loss=0.0))


def test_noise_costs_cosine_overlap_and_ranking(model: Path, collection: Collection) -> None:
    encoder = DualEncoder.open(model, device="cpu")
    sample = draw_sample(collection, SMALL)
    little, much = (judge_export(encoder, Turned(encoder, share), sample, SMALL) for share in (0.01, 1.0))
    assert 1 > little["cosine_mean"] > much["cosine_mean"]
    assert 1 >= little["overlap"] > much["overlap"]
    assert much["loss"] > 0
    assert much["loss_low"] < much["loss"] < much["loss_high"]
    assert judge_export(encoder, Turned(encoder, 1.0), sample, SMALL) == much
    with pytest.raises(RefusedError, match="not the model's: cosine_mean is"):
        refuse_loss(much, "int8", ExportConfig(allowed_loss=1.0))


@pytest.mark.parametrize("cosine", [0.9, float("nan")])
@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_vectors_far_from_the_models_are_refused_whatever_the_questions_say(precision: str, cosine: float) -> None:
    found = {"cosine_min": cosine, "cosine_mean": cosine, "loss": -1.0}
    with pytest.raises(RefusedError, match="are not the model's"):
        refuse_loss(found, precision, ExportConfig(allowed_loss=1.0))


def test_the_sample_is_seeded_and_holds_the_positives_of_its_dev_queries(collection: Collection) -> None:
    sample = draw_sample(collection, SMALL)
    again, other = draw_sample(collection, SMALL), draw_sample(collection, ExportConfig(export_seed=14))
    assert sample == again
    assert sample.queries != other.queries
    dev = collection.qrels("dev")
    ids = {passage.passage_id for passage in sample.passages}
    assert {query.query_id for query in sample.queries} <= set(dev)
    assert all(set(positives_of(dev, query.query_id)) <= ids for query in sample.queries)
    assert len(sample.queries) == 30
    assert 30 < len(ids) <= 80


def test_few_passages_still_hold_all_positives(collection: Collection) -> None:
    sample = draw_sample(collection, ExportConfig(export_passages=1, export_queries=1000))
    assert (len(sample.queries), len(sample.passages)) == (48, 48)


def test_dev_without_a_positive_is_refused(tmp_path: Path, write_beir: Callable[..., Path]) -> None:
    qrels = {"train": {"a": {"p": 1}}, "dev": {"b": {"p": 0}}}
    data = open_collection(write_beir(tmp_path / "data", {"p": "text"}, {"a": "one", "b": "two"}, qrels))
    with pytest.raises(DataError, match="No dev query has a relevant passage"):
        draw_sample(data, SMALL)


def test_calibration_texts_are_passages_and_training_queries(model: Path, collection: Collection) -> None:
    encoder = DualEncoder.open(model, device="cpu")
    texts = export_module._draw_texts(collection, encoder, SMALL)
    assert len(texts) == 20
    assert texts == export_module._draw_texts(collection, encoder, SMALL)
    known = [collection.query(query_id).text for query_id in collection.qrels("train")]
    assert all(text in encoder.tokenize_queries(known) for text in texts[-4:])
    test = [collection.query(query_id).text for query_id in collection.qrels("test")]
    assert not any(text in encoder.tokenize_queries(test) for text in texts)


@pytest.mark.parametrize("option", ["allowed_loss", "export_queries", "export_passages", "calibration_texts"])
def test_a_gate_without_sense_is_refused(option: str) -> None:
    with pytest.raises(UsageError, match=f"Option {option} is -1; it must be at least"):
        ExportConfig(**{option: -1})


def test_the_texts_of_the_house_are_short_long_and_empty(model: Path) -> None:
    sample = make_sample()
    encoder = DualEncoder.open(model, device="cpu")
    lengths = {len(tokens.input_ids) for tokens in encoder.tokenize_passages(sample.passages)}
    assert min(lengths) == 2
    assert max(lengths) == encoder.contract.passage_length
    assert len(lengths) > 8
    assert sample.qrels == {}


def test_padding_is_on_the_right_and_masked(model: Path) -> None:
    tokens = DualEncoder.open(model, device="cpu").tokenize_queries(["river", "the river and the market"])
    arrays = pad_tokens(tokens, 7)
    assert arrays["input_ids"][0].tolist() == [*tokens[0].input_ids, 7, 7, 7, 7]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [3, 7]
    assert not arrays["token_type_ids"].any()


# --- the command ------------------------------------------------------------------------------------------------------


def run_command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    output, errors = capsys.readouterr()
    return int(end.value.code or 0), output, errors


@pytest.mark.usefixtures("quick_graph")
def test_the_command_exports_and_encode_takes_it_as_a_start(
    capsys: pytest.CaptureFixture[str], model: Path, toy: Path, tmp_path: Path
) -> None:
    sizes = ("--export-queries", 10, "--export-passages", 40, "--calibration-texts", 10, "--allowed-loss", 1)
    arguments = ("export", model, "--to", "openvino-int8", "--data", toy, "-o", tmp_path / "out", *sizes)
    code, output, errors = run_command(capsys, *arguments)
    assert code == 0, errors
    assert {"cosine_mean", "ndcg_model", "ndcg_export", "loss_high", "overlap"} <= set(output.split())
    code, output, errors = run_command(capsys, "encode", toy, "--start", tmp_path / "out", "-o", tmp_path / "vectors")
    assert code == 0, errors
    assert output.startswith("120 vectors of 32 dimensions")
    assert read_manifest(tmp_path / "vectors").inputs["encoder"] == read_manifest(tmp_path / "out").facts["encoder"]


def test_the_command_says_that_int8_needs_data(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    code, _, errors = run_command(capsys, "export", model, "--to", "openvino-int8", "-o", tmp_path / "out")
    assert code == 2
    assert errors.startswith("pairdr: int8 needs data")
