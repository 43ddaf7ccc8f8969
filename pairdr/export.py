"""Write a model as another library runs it: onnxruntime, or OpenVINO in fp32 or with int8 products.

Whatever is written has passed `pairdr.gate`: its vectors, and on data its rankings, are near enough to the model's. The
graph holds encoder, pooling and normalisation, so that what runs it needs a tokenizer and no torch.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import random
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from sentence_transformers import SentenceTransformer
from torch import Tensor, nn

from pairdr.artefact import UNSEALED, Manifest, publish, read_manifest
from pairdr.backends.exported import TOKENIZER, ExportedEncoder, find_graph, fingerprint_export
from pairdr.backends.openvino import import_openvino, open_core
from pairdr.backends.texts import pad_tokens
from pairdr.collection import Collection
from pairdr.encoder import DualEncoder
from pairdr.errors import MissingExtraError, RefusedError, UsageError
from pairdr.gate import MEASURE, Sample, draw_sample, judge_export, make_sample, refuse_loss
from pairdr.progress import say
from pairdr.readme import format_command, format_contract, quote_card, sign_card
from pairdr.store_config import ExportConfig, Target
from pairdr.tokens import Contract, Tokens

_NEEDED = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("onnx", "onnxscript", "openvino"),
    "openvino-int8": ("onnx", "onnxscript", "openvino", "nncf"),
}
_LIBRARIES = {"onnx": "onnxruntime", "openvino": "OpenVINO"}
_HEADER = """---
library_name: pairdr
pipeline_tag: sentence-similarity
tags:
- {backend}
- sentence-similarity
- feature-extraction
- dense-retrieval
- pairdr
---"""


def export_model(
    model_folder: str | Path,
    output: str | Path,
    *,
    to: Target,
    collection: Collection | None = None,
    config: ExportConfig | None = None,
) -> ExportedEncoder:
    """Export a model, judge it against the model it was made from, and publish it if it is near enough.

    Args:
        model_folder: a model that pairdr saved.
        output: where the export will stand.
        to: which library runs it, and in which precision.
        collection: the user's data. int8 needs it, for calibration and for the gate; fp32 is judged on texts of the
            house without it.
        config: what may be lost, and the sizes of the samples.

    Returns:
        The published export, opened.

    Raises:
        RefusedError: the export is too far from the model; nothing was written.
        UsageError: int8 without data, untied towers, or a model that cannot be written as a graph.
        MissingExtraError: a package is not installed.
    """
    config = config or ExportConfig()
    backend, precision = to.removesuffix("-int8"), "int8" if to.endswith("-int8") else "fp32"
    _require_packages(to, backend)
    if precision == "int8" and collection is None:
        raise UsageError(
            "int8 needs data: texts that set the ranges of activations, and dev queries that judge it.",
            remedy="Name a BEIR folder with --data.",
        )
    source = read_manifest(model_folder, "model")
    model = DualEncoder.open(model_folder, device="cpu")
    if model.contract.towers == "untied":
        raise UsageError("Untied towers are not exported.", path=model_folder, remedy="Export a model with tied ones.")
    sample = make_sample() if collection is None else draw_sample(collection, config)
    inputs = {"model": source.fingerprint} | ({} if collection is None else {"collection": collection.fingerprint})
    with publish(
        output, "exported", options={"to": to} | config.as_dict(), inputs=inputs, beside=(UNSEALED,)
    ) as staging:
        (staging.path / TOKENIZER).write_text(_read_tokenizer(model), encoding="utf-8")
        say("writing the graph")
        with tempfile.TemporaryDirectory() as scratch:
            path = (staging.path if backend == "onnx" else Path(scratch)) / "model.onnx"
            _write_graph(model, path)
            if backend == "openvino":
                texts = None if collection is None else _draw_texts(collection, model, config)
                _convert_graph(path, staging.path / find_graph(backend).file, texts if precision == "int8" else None)
        contract = asdict(model.contract)
        staging.facts |= {
            "backend": backend,
            "precision": precision,
            "contract": contract,
            "temperature": model.temperature,
            "token_types": bool(model.tokenize_queries(["a"])[0].token_type_ids),
            "pad_id": model.model.tokenizer.pad_token_id or 0,
            "encoder": fingerprint_export(staging.path, contract),
            "source_encoder": model.fingerprint,
            "widths": source.options.get("matryoshka_dims", []),
        }
        export = ExportedEncoder(staging.path, staging.facts)
        _require_same_tokens(model, export, sample)
        say(f"judging it on {len(sample.queries)} queries and {len(sample.passages)} passages")
        found = judge_export(model, export, sample, config)
        refuse_loss(found, precision, config)
        staging.facts["gate"] = found
        card = _format_card(Path(model_folder), source, Path(output), staging.facts, to, collection, config)
        (staging.path / UNSEALED).write_text(sign_card(card), encoding="utf-8")
    return ExportedEncoder.open(output)


def _format_card(
    model: Path,
    source: Manifest,
    output: Path,
    facts: dict[str, Any],
    to: Target,
    collection: Collection | None,
    config: ExportConfig,
) -> str:
    """Return the card of an export: what it is, what the gate measured, the command, the card of its model."""
    name = model.resolve().name
    data = [] if collection is None else ["--data", collection.given_name]
    command = format_command(["pairdr", "export", name, "--to", to, *data, "-o", output.resolve().name], config)
    parts = [
        _HEADER.format(backend=facts["backend"]),
        f"# {name}, for {_LIBRARIES[facts['backend']]} in {facts['precision']}",
        f"The model `{name}` as another library runs it, on a CPU and without torch. Its vectors are searched with "
        "queries of this export alone, not with those of the model.",
        "## Use\n\n```sh\npairdr encode DATA --start path/to/this/folder -o VECTORS\n"
        'pairdr search VECTORS --start path/to/this/folder "how do I parse a date?"\n```\n\n'
        + format_contract(Contract(**facts["contract"])),
        _format_gate(facts["gate"], collection),
        f"## How it was made\n\n```sh\n{command}\n```\n\nThe model's manifest has the fingerprint "
        f"`{source.fingerprint}`, its weights the sha256 `{source.facts['weights_sha256']}`.",
    ]
    card = model / UNSEALED
    if card.is_file():
        quoted = quote_card(card.read_text(encoding="utf-8", errors="replace"))
        parts += [f"## The model it was made of\n\nThis is the card of `{name}`, and speaks of that folder.", quoted]
    return "\n\n".join(parts)


def _format_gate(gate: dict[str, Any], collection: Collection | None) -> str:
    """Return what the gate measured, as Markdown."""
    lines = [
        "## How near it is to its model",
        "",
        f"On {gate['queries']} queries and {gate['passages']} passages: the cosine between a vector of the export and "
        f"the model's own is {gate['cosine_mean']:.6f} in the mean and {gate['cosine_min']:.6f} at least.",
    ]
    if collection is None:
        return "\n".join([*lines, "", "These are texts of pairdr's own; rankings were not compared."])
    return "\n".join(
        [
            *lines,
            "",
            "| | model | export | lost (95 % interval) | of the first ten in both |",
            "|---|---|---|---|---|",
            f"| {MEASURE} | {gate['ndcg_model']:.4f} | {gate['ndcg_export']:.4f} | {gate['loss']:.4f} "
            f"({gate['loss_low']:.4f} to {gate['loss_high']:.4f}) | {gate['overlap']:.1%} |",
            "",
            f"The queries are dev queries of `{collection.given_name}`, searched in a sample of its passages, which is "
            f"easier than all: the difference counts, not the height. Licence of the data: {collection.licence}.",
        ]
    )


class _Whole(nn.Module):
    """All modules of a sentence-transformers model, from arrays to vectors."""

    def __init__(self, model: SentenceTransformer) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        features = {"input_ids": input_ids, "attention_mask": attention_mask}
        if token_type_ids is not None:
            features["token_type_ids"] = token_type_ids
        vectors: Tensor = self.model(features, task="document")["sentence_embedding"]
        return vectors


def _write_graph(model: DualEncoder, path: Path) -> None:
    """Write all modules as one ONNX graph for any number of texts of any length."""
    arrays = pad_tokens(model.tokenize_queries(["a short text", "and a longer one beside it"]), 0)
    if not model.tokenize_queries(["a"])[0].token_type_ids:
        del arrays["token_type_ids"]
    free = torch.export.Dim.DYNAMIC
    whole = _Whole(model.model).eval()
    try:
        with _plain_attention(model), _quiet_export():
            program = torch.onnx.export(
                whole,
                tuple(torch.from_numpy(array) for array in arrays.values()),
                input_names=list(arrays),
                output_names=["vectors"],
                dynamo=True,
                dynamic_shapes=tuple({0: free, 1: free} for _ in arrays),
                verbose=False,
            )
            if program is None:
                raise ValueError("torch.onnx gave no graph")
            for node in program.model.graph:
                node.metadata_props.clear()  # where in which file each node comes from
            program.save(path)
    except (RuntimeError, ValueError, TypeError, torch.onnx.OnnxExporterError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"This model cannot be written as a graph: {reason}", remedy="Use it as it is, with torch."
        ) from error


def _convert_graph(source: Path, target: Path, texts: list[Tokens] | None) -> None:
    """Write an ONNX graph in OpenVINO's form; with texts, in int8, calibrated on them."""
    openvino = import_openvino()
    graph = open_core().read_model(str(source))
    if texts is not None:
        say(f"calibrating int8 on {len(texts)} texts")
        graph = _quantise(graph, texts)
    openvino.save_model(graph, str(target), compress_to_fp16=False)


def _quantise(graph: Any, texts: list[Tokens]) -> Any:
    """Return the graph with int8 products: SmoothQuant, then static ranges, a text at a time so that none is padded."""
    import nncf

    nncf.set_log_level(logging.ERROR)
    names = {entry.any_name for entry in graph.inputs}
    items = [{name: array for name, array in pad_tokens([text], 0).items() if name in names} for text in texts]
    with contextlib.redirect_stdout(io.StringIO()):  # its progress bars
        return nncf.quantize(graph, nncf.Dataset(items), subset_size=len(items), model_type=nncf.ModelType.TRANSFORMER)


def _draw_texts(collection: Collection, model: DualEncoder, config: ExportConfig) -> list[Tokens]:
    """Draw the texts that calibrate: passages, and a quarter as many training queries."""
    rng = random.Random(config.export_seed)
    queries = sorted(collection.qrels("train")) if collection.labels("train") else []  # dev judges
    queries = sorted(rng.sample(queries, min(config.calibration_texts // 5, len(queries))))
    count = min(config.calibration_texts - len(queries), len(collection.passages))
    rows = sorted(rng.sample(range(len(collection.passages)), count))
    return [
        *model.tokenize_passages([collection.passage_at(row) for row in rows]),
        *model.tokenize_queries([collection.query(query_id).text for query_id in queries]),
    ]


def _read_tokenizer(model: DualEncoder) -> str:
    """Return the tokenizer's JSON, with the end of a long text that is cut and without the lengths of a call.

    Raises:
        UsageError: a tokenizer that is not one of the `tokenizers` library.
    """
    tokenizer = model.model.tokenizer
    if not hasattr(tokenizer, "backend_tokenizer"):
        raise UsageError("This model's tokenizer needs Python to run.", remedy="Export a model with a fast tokenizer.")
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content["truncation"] = {
        "direction": str(tokenizer.truncation_side).capitalize(),
        "max_length": max(model.contract.query_length, model.contract.passage_length),
        "strategy": "LongestFirst",
        "stride": 0,
    }
    return json.dumps(content | {"padding": None}, ensure_ascii=False)


def _require_same_tokens(model: DualEncoder, export: ExportedEncoder, sample: Sample) -> None:
    texts = [query.text for query in sample.queries]
    same = model.tokenize_queries(texts) == export.tokenize_queries(texts)
    if not same or model.tokenize_passages(sample.passages) != export.tokenize_passages(sample.passages):
        raise RefusedError(
            "The tokenizer of this model tokenises otherwise outside of transformers.",
            remedy="Nothing was written. Use the model as it is, with torch.",
        )


def _require_packages(to: str, extra: str) -> None:
    for package in _NEEDED[to]:
        if find_spec(package) is None:
            raise MissingExtraError(package, extra)


@contextlib.contextmanager
def _plain_attention(model: DualEncoder) -> Iterator[None]:
    """Write attention as its plain products: the fused one guards against rows without tokens, which there are none."""
    body: Any = model.model[0].model
    own: str = body.config._attn_implementation
    body.set_attn_implementation("eager")
    try:
        yield
    finally:
        body.set_attn_implementation(own)


@contextlib.contextmanager
def _quiet_export() -> Iterator[None]:
    """Silence what torch says of itself while it exports."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)  # torchvision is not installed
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)` is deprecated", FutureWarning)
            yield
    finally:
        logger.setLevel(level)
