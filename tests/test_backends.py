"""Exported encoders beside the one they were made from: the same tokens, the same vectors, no torch."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from exporting import share_graphs
from manifests import rewrite_manifest
from test_house import loaded_after

from pairdr.artefact import verify_artefact
from pairdr.backends import exported as exported_module
from pairdr.backends import is_exported, load_encoder, open_encoder
from pairdr.backends import openvino as openvino_module
from pairdr.backends.exported import ExportedEncoder
from pairdr.backends.texts import pad_tokens
from pairdr.collection import open_collection
from pairdr.config import EncodeConfig, ModelConfig
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, MissingExtraError, UsageError
from pairdr.export import export_model
from pairdr.files import hash_json
from pairdr.records import Passage
from pairdr.store_config import ExportConfig
from pairdr.tokens import Tokens

LONG = "the river runs through the town and the market is held on the square near the old bridge " * 40
QUERIES = ["which river runs through Ashford", "market", "", "Zürich 東京 🙂", LONG]
PASSAGES = [
    Passage("a", "The river of Ashford", "The river is called the Lune."),
    Passage("b", "", "A market is held on Monday."),
    Passage("c", "The old bridge", LONG),
    Passage("d", LONG, "short"),
    Passage("e", LONG, LONG),
    Passage("f", "", ""),
]
CONTRACTS: dict[str, dict[str, Any]] = {
    "mean, cosine, prefixes": {"query_prefix": "ask: ", "passage_prefix": "text: ", "query_length": 20},
    "cls, dot, segments, short": {
        "pooling": "cls",
        "similarity": "dot",
        "temperature": 0.5,
        "title": "segment",
        "query_length": 7,
        "passage_length": 40,
    },
}
BACKENDS = ("onnx", "openvino")
LAX = ExportConfig(allowed_loss=1.0, calibration_texts=20, export_queries=20, export_passages=60)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, bare_model: Path, tiny_model: Path) -> dict[str, Path]:
    """Return a saved model of each contract."""
    starts = {"mean, cosine, prefixes": tiny_model, "cls, dot, segments, short": bare_model}
    folder = tmp_path_factory.mktemp("models")
    for name, options in CONTRACTS.items():
        encoder = DualEncoder.load(ModelConfig(start=str(starts[name]), device="cpu", **options))
        encoder.save(folder / name, options={}, inputs={})
    return {name: folder / name for name in CONTRACTS}


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory, models: dict[str, Path], toy: Path) -> Callable[[str, str], Path]:
    """Return `export(contract, target)`: the folder of that export, made when it is first asked for."""
    folder = tmp_path_factory.mktemp("exports")
    collection = open_collection(toy)

    def make(contract: str, to: str) -> Path:
        place = folder / f"{contract} {to}"
        if not place.exists():
            data = collection if to.endswith("int8") else None
            with pytest.MonkeyPatch.context() as patch:
                share_graphs(patch, folder)
                export_model(models[contract], place, to=to, collection=data, config=LAX)
        return place

    return make


@pytest.fixture(scope="module")
def plain(export: Callable[[str, str], Path]) -> Path:
    """Return an export for onnxruntime."""
    return export("mean, cosine, prefixes", "onnx")


def cosines(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    return (one * other).sum(axis=1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contract", CONTRACTS)
def test_fp32_exports_give_the_models_vectors(
    export: Callable[[str, str], Path], models: dict[str, Path], contract: str, backend: str
) -> None:
    model, other = DualEncoder.open(models[contract], device="cpu"), open_encoder(export(contract, backend))
    pairs = [
        (model.encode_queries(QUERIES), other.encode_queries(QUERIES)),
        (model.encode_passages(PASSAGES), other.encode_passages(PASSAGES)),
    ]
    for expected, found in pairs:
        assert found.dtype == np.float32
        assert found == pytest.approx(expected, abs=2e-5)
        assert cosines(expected, found).min() >= 0.9999
    assert other.contract == model.contract


@pytest.mark.slow
@pytest.mark.parametrize("contract", CONTRACTS)
def test_int8_exports_give_vectors_near_the_models(
    export: Callable[[str, str], Path], models: dict[str, Path], contract: str
) -> None:
    model, other = DualEncoder.open(models[contract], device="cpu"), open_encoder(export(contract, "openvino-int8"))
    found = cosines(model.encode_passages(PASSAGES), other.encode_passages(PASSAGES))
    assert found.mean() >= 0.98
    assert not np.array_equal(model.encode_passages(PASSAGES), other.encode_passages(PASSAGES))


@pytest.mark.parametrize("contract", CONTRACTS)
def test_tokens_are_the_models(export: Callable[[str, str], Path], models: dict[str, Path], contract: str) -> None:
    model, other = DualEncoder.open(models[contract], device="cpu"), ExportedEncoder.open(export(contract, "onnx"))
    assert other.tokenize_queries(QUERIES) == model.tokenize_queries(QUERIES)
    assert other.tokenize_passages(PASSAGES) == model.tokenize_passages(PASSAGES)
    assert max(len(t.input_ids) for t in other.tokenize_queries(QUERIES)) == model.contract.query_length


@pytest.mark.parametrize("to", [*BACKENDS, "openvino-int8"])
def test_vectors_do_not_depend_on_order_batches_or_cores(
    export: Callable[[str, str], Path], toy: Path, monkeypatch: pytest.MonkeyPatch, to: str
) -> None:
    folder = export("mean, cosine, prefixes", to)
    passages = next(open_collection(toy).read_passages())
    encoder = ExportedEncoder.open(folder)
    expected = encoder.encode_passages(passages)
    assert np.array_equal(encoder.encode_passages(passages), expected)
    order = np.random.default_rng(13).permutation(len(passages))
    shuffled = encoder.encode_passages([passages[row] for row in order])
    assert shuffled == pytest.approx(expected[order], abs=2e-6)
    assert encoder.encode_passages(passages, 64) == pytest.approx(expected, abs=2e-6)
    assert encoder.encode_passages(passages[5:6])[0] == pytest.approx(expected[5], abs=2e-6)
    monkeypatch.setattr(exported_module, "count_cores", lambda: 3)
    assert np.array_equal(ExportedEncoder.open(folder).encode_passages(passages), expected)


def test_a_corpus_of_several_windows_is_encoded_in_its_order(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = [f"market {number} " * (1 + number % 7) for number in range(50)]
    encoder = ExportedEncoder.open(plain)
    expected = encoder.encode_queries(texts)
    monkeypatch.setattr(exported_module, "WINDOW", 8)
    assert encoder.encode_queries(texts) == pytest.approx(expected, abs=2e-6)


def test_no_text_gives_no_vector(plain: Path) -> None:
    assert ExportedEncoder.open(plain).encode_queries([]).shape == (0, 32)


def test_an_error_while_encoding_reaches_the_caller(plain: Path) -> None:
    encoder = ExportedEncoder.open(plain)
    with pytest.raises(TypeError):
        encoder.encode_queries(["a", None])  # type: ignore[list-item]
    assert encoder.encode_queries(["a"]).shape == (1, 32)


@pytest.mark.parametrize("to", [*BACKENDS, "openvino-int8"])
def test_an_export_runs_without_torch(export: Callable[[str, str], Path], to: str) -> None:
    folder = export("mean, cosine, prefixes", to)
    statement = f"from pairdr.backends import open_encoder; open_encoder({str(folder)!r}).encode_queries(['a'])"
    assert loaded_after(statement, "torch", "transformers", "sentence_transformers") == []


@pytest.mark.parametrize("to", BACKENDS)
def test_encoding_and_searching_with_an_export_load_no_torch(
    export: Callable[[str, str], Path], toy: Path, tmp_path: Path, to: str
) -> None:
    start = ["--start", str(export("mean, cosine, prefixes", to)), "--query-length", "20"]
    vectors = str(tmp_path / "vectors")
    for arguments in (["encode", str(toy), "-o", vectors, *start], ["search", vectors, "which river", *start]):
        statement = f"from pairdr.cli import main; main({arguments!r})"
        assert loaded_after(statement, "torch", "transformers", "sentence_transformers") == []


def test_openvino_and_nncf_are_imported_without_their_telemetry(export: Callable[[str, str], Path]) -> None:
    folder = export("mean, cosine, prefixes", "openvino")
    parts = (
        f"from pairdr.backends import open_encoder; open_encoder({str(folder)!r})",
        "import nncf.telemetry.wrapper, openvino.tools.ovc.telemetry_utils",
        "assert type(nncf.telemetry.wrapper.telemetry).__name__ == 'MagicMock'",
        "assert openvino.tools.ovc.telemetry_utils.tm.__name__.endswith('telemetry_stub')",
    )
    assert loaded_after("; ".join(parts), "openvino_telemetry.main") == []


@pytest.mark.parametrize("to", BACKENDS)
def test_several_threads_share_one_export(export: Callable[[str, str], Path], to: str) -> None:
    encoder = open_encoder(export("mean, cosine, prefixes", to))
    expected = encoder.encode_queries(QUERIES)
    with ThreadPoolExecutor(8) as threads:
        asked = [threads.submit(encoder.encode_queries, [text]) for text in QUERIES * 20]
        asked += [threads.submit(encoder.encode_queries, QUERIES) for _ in range(4)]
        found = [request.result() for request in asked]
    for number, vectors in enumerate(found[: 20 * len(QUERIES)]):
        np.testing.assert_allclose(vectors[0], expected[number % len(QUERIES)], atol=1e-5)
    for vectors in found[20 * len(QUERIES) :]:
        np.testing.assert_allclose(vectors, expected, atol=1e-5)


def test_signals_are_delivered_after_openvino_models_came_and_went(export: Callable[[str, str], Path]) -> None:
    folder = str(export("mean, cosine, prefixes", "openvino"))
    parts = (
        "import signal; from pairdr.backends import open_encoder",
        f"first = open_encoder({folder!r}); first.encode_queries(['a'])",
        f"second = open_encoder({folder!r}); second.encode_queries(['a'])",
        "del first; del second",
        "heard = []; signal.signal(signal.SIGTERM, lambda *_: heard.append(1)); signal.raise_signal(signal.SIGTERM)",
        "assert heard",
    )
    assert loaded_after("; ".join(parts), "torch") == []


def test_the_fingerprint_is_the_exports_own(export: Callable[[str, str], Path], models: dict[str, Path]) -> None:
    contract = "mean, cosine, prefixes"
    model = open_encoder(models[contract], device="cpu")
    encoders = [open_encoder(export(contract, to)) for to in (*BACKENDS, "openvino-int8")]
    assert len({model.fingerprint, *(encoder.fingerprint for encoder in encoders)}) == 4
    assert encoders[0].fingerprint == open_encoder(export(contract, "onnx")).fingerprint


def test_open_encoder_opens_a_model_with_torch(models: dict[str, Path]) -> None:
    assert isinstance(open_encoder(models["mean, cosine, prefixes"], device="cpu"), DualEncoder)


def test_a_folder_of_another_kind_is_refused(toy: Path, tmp_path: Path, plain: Path) -> None:
    encode_corpus(open_collection(toy), open_encoder(plain), EncodeConfig(), tmp_path / "vectors")
    with pytest.raises(ArtefactError, match="holds 'vectors', not a model"):
        open_encoder(tmp_path / "vectors")


def test_an_export_runs_on_a_cpu_alone(plain: Path) -> None:
    open_encoder(plain, device="cpu")
    with pytest.raises(UsageError, match="runs on a CPU, not on 'cuda'"):
        open_encoder(plain, device="cuda")


def test_an_export_is_a_start_with_its_own_contract(plain: Path) -> None:
    assert is_exported(str(plain))
    assert load_encoder(ModelConfig(start=str(plain), query_prefix="ask: ", device="cpu")).contract.query_length == 20
    with pytest.raises(UsageError, match=r"Option query_length is 30, but this model was saved with 20"):
        load_encoder(ModelConfig(start=str(plain), query_length=30))


def test_a_start_that_is_no_export_is_loaded_with_torch(tiny_model: Path) -> None:
    assert not is_exported(str(tiny_model))
    assert isinstance(load_encoder(ModelConfig(start=str(tiny_model), device="cpu")), DualEncoder)


def test_a_corpus_is_encoded_by_an_export(toy: Path, tmp_path: Path, plain: Path) -> None:
    encoder = open_encoder(plain)
    store = encode_corpus(open_collection(toy), encoder, EncodeConfig(), tmp_path / "vectors")
    assert (store.count, store.dimensions) == (120, 32)
    store.require_encoder(encoder.fingerprint)


# --- what is broken ---------------------------------------------------------------------------------------------------


def spoil_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    rewrite_manifest(folder, lambda content: change(content["facts"]))


@pytest.mark.parametrize("fact", ["contract", "encoder", "pad_id", "token_types", "backend"])
def test_a_manifest_without_a_fact_is_refused(plain: Path, tmp_path: Path, fact: str) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    spoil_manifest(folder, lambda facts: facts.pop(fact))
    with pytest.raises(ArtefactError, match=r"cannot be opened: .* Run pairdr export again"):
        open_encoder(folder)


def test_an_unknown_backend_is_refused(plain: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    spoil_manifest(folder, lambda facts: facts.update(backend="other"))
    with pytest.raises(ArtefactError, match="this pairdr has no backend 'other'"):
        open_encoder(folder)


@pytest.mark.parametrize(("backend", "file"), [("onnx", "model.onnx"), ("openvino", "model.xml")])
def test_a_graph_that_is_none_is_refused(
    export: Callable[[str, str], Path], tmp_path: Path, backend: str, file: str
) -> None:
    folder = Path(shutil.copytree(export("mean, cosine, prefixes", backend), tmp_path / "copy"))
    (folder / file).write_bytes(b"\7" * (folder / file).stat().st_size)
    with pytest.raises(ArtefactError, match="cannot be opened"):
        open_encoder(folder)
    with pytest.raises(ArtefactError, match=f"{file} is not the file that was written"):
        verify_artefact(folder)


@pytest.mark.parametrize("spoil", [lambda text: text[:-9], lambda text: text.replace("river", "revir")])
def test_another_tokenizer_is_refused(plain: Path, tmp_path: Path, spoil: Callable[[str], str]) -> None:
    folder = Path(shutil.copytree(plain, tmp_path / "copy"))
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(spoil(text), encoding="utf-8")
    with pytest.raises(ArtefactError, match=r"tokenizer\.json"):
        open_encoder(folder)


@pytest.mark.parametrize(("backend", "package"), [("onnx", "onnxruntime"), ("openvino", "openvino")])
def test_a_missing_package_is_named_with_its_extra(
    export: Callable[[str, str], Path], monkeypatch: pytest.MonkeyPatch, backend: str, package: str
) -> None:
    folder = export("mean, cosine, prefixes", backend)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setattr(openvino_module, "open_core", openvino_module.open_core.__wrapped__)
    with pytest.raises(MissingExtraError, match=rf"package {package}\. .*pairdr\[{backend}\]"):
        open_encoder(folder)


def test_the_fingerprint_is_of_all_files_and_the_contract(tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(b"graph")
    found = [exported_module.fingerprint_export(tmp_path, {"query_prefix": prefix}) for prefix in ("", "q ")]
    (tmp_path / "model.onnx").write_bytes(b"other")
    found.append(exported_module.fingerprint_export(tmp_path, {"query_prefix": ""}))
    assert len(set(found)) == 3
    assert hash_json([]) not in found


@pytest.mark.parametrize(("longest", "width"), [(1, 8), (8, 8), (9, 16)])
def test_passes_are_padded_to_a_multiple(longest: int, width: int) -> None:
    """Few widths: OpenVINO keeps what it has made for every shape."""
    tokens = [Tokens([5] * longest, []), Tokens([6], [])]
    arrays = pad_tokens(tokens, 7, 8)
    assert {array.shape for array in arrays.values()} == {(2, width)}
    assert arrays["input_ids"].tolist() == [[5] * longest + [7] * (width - longest), [6] + [7] * (width - 1)]
    assert arrays["attention_mask"].sum(axis=1).tolist() == [longest, 1]
    assert pad_tokens(tokens, 7)["input_ids"].shape == (2, longest)
