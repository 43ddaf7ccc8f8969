"""The start model: found, cut to its first layers, and settled on one contract.

Takes a name and options, returns a sentence-transformers model whose own settings say what the contract says.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router, Transformer
from torch import nn

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.config import ModelConfig
from pairdr.errors import RefusedError, UsageError
from pairdr.sources.minilm import find_minilm
from pairdr.tokens import Contract


def load_start(name: str, config: ModelConfig) -> tuple[SentenceTransformer, Contract, float, bool]:
    """Load a start model that pairdr did not save.

    Args:
        name: a folder or hub name of sentence-transformers or Hugging Face form.
        config: layers, pooling, similarity, towers, prefixes, lengths.

    Returns:
        The model, its contract, the temperature that fits its similarity, and whether it is a retriever already.

    Raises:
        UsageError: no model there, or one of another kind.
        RefusedError: dot product at temperature 1 on normalised vectors.
    """
    torch.manual_seed(0)  # weights that the folder lacks, a pooler's say, are drawn: alike in every call
    model, tuned = _load_modules(name, config)
    model.float()  # a start stored in half precision would be trained in it
    if config.layers is not None:
        _keep_layers(model, config.layers)
    _settle_similarity(model, config, tuned)
    contract = _settle_contract(model, config)
    _require_room(model, contract)
    temperature = config.temperature or (0.05 if contract.similarity == "cosine" else 1.0)
    if contract.similarity == "dot" and temperature == 1.0 and any(isinstance(m, Normalize) for m in model):
        raise RefusedError(
            "Dot product at temperature 1 on normalised vectors: all scores lie within 2 of each other, "
            "and the softmax cannot learn.",
            path=name,
            remedy="Set temperature = 0.05 or similarity = 'cosine'.",
        )
    if config.towers == "untied":
        model = _untie(model)
    return model, contract, temperature, tuned


def is_retriever(config: ModelConfig) -> bool:
    """Return whether a start model has been tuned for similarity: a sentence-transformers folder, or one of ours."""
    name = find_minilm() if config.start == "minilm" else config.start
    if (Path(name) / MANIFEST).is_file():
        return bool(read_manifest(name, "model").facts["is_retriever"])
    return _is_sentence_transformer(name)


def _load_modules(name: str, config: ModelConfig) -> tuple[SentenceTransformer, bool]:
    """Return the model and whether it comes as a sentence-transformers one."""
    _require_encoder_folder(Path(name))
    try:
        if _is_sentence_transformer(name):
            model = SentenceTransformer(name, device=config.device)
            if not isinstance(model[0], Transformer):
                raise ValueError(f"its first module is {type(model[0]).__name__}, not a transformer.")
            return model, True
        transformer = Transformer(name)
        pooling = "cls" if config.pooling == "auto" else config.pooling
        modules = [transformer, Pooling(transformer.get_embedding_dimension(), pooling)]
        return SentenceTransformer(modules=modules, device=config.device), False
    except (OSError, ValueError, KeyError, AttributeError, RuntimeError, AssertionError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UsageError(
            f"The model {name!r} cannot be loaded: {reason}", remedy="Name a folder or a hub name of an encoder."
        ) from error


def _require_encoder_folder(folder: Path) -> None:
    """Refuse a folder that is no model, or one of sentence-transformers' other kinds."""
    if not folder.exists():
        if folder.is_absolute() or folder.parts[:1] == ("..",):
            raise UsageError("There is no such folder.", path=folder, remedy="Name a model folder or a hub name.")
        return
    if not (folder / "modules.json").is_file() and not (folder / "config.json").is_file():
        raise UsageError("This is no model folder.", path=folder, remedy="It needs config.json or modules.json.")
    path = folder / "config_sentence_transformers.json"
    if path.is_file():
        try:
            kind = json.loads(path.read_text(encoding="utf-8")).get("model_type", "SentenceTransformer")
        except (ValueError, AttributeError) as error:
            raise UsageError("This is no JSON object.", path=path, remedy="Download the model again.") from error
        if kind != "SentenceTransformer":
            raise UsageError(
                f"This model is a {kind}, not an encoder of single texts.",
                path=folder,
                remedy="Name a sentence-transformers or Hugging Face encoder.",
            )


def _is_sentence_transformer(name: str) -> bool:
    if Path(name).exists():
        return (Path(name) / "modules.json").is_file()
    from sentence_transformers.util import is_sentence_transformer_model

    return bool(is_sentence_transformer_model(name))


def _transformer(model: SentenceTransformer) -> Any:
    """Return the first module, which tokenises and holds the encoder."""
    return model[0]


def _keep_layers(model: SentenceTransformer, count: int) -> None:
    body = _transformer(model).model
    total = body.config.num_hidden_layers
    stacks = [
        (parent, key)
        for parent in body.modules()
        for key, child in parent.named_children()
        if isinstance(child, nn.ModuleList) and len(child) == total
    ]
    if len(stacks) != 1 or count > total:
        raise UsageError(f"Option layers is {count}; this model has {total} layers.", remedy="Choose fewer.")
    parent, key = stacks[0]
    setattr(parent, key, getattr(parent, key)[:count])
    body.config.num_hidden_layers = count


def _settle_similarity(model: SentenceTransformer, config: ModelConfig, is_retriever: bool) -> None:
    """Apply pooling and similarity; cosine models end with a normalisation, so that an inner product is the score."""
    pooling = next((module for module in model if isinstance(module, Pooling)), None)
    if pooling is not None and config.pooling != "auto":
        pooling.pooling_mode = config.pooling
    chosen = config.similarity
    if chosen == "auto":
        chosen = "dot" if not is_retriever or model.similarity_fn_name == "dot" else "cosine"
    model.similarity_fn_name = chosen
    if chosen == "cosine" and not any(isinstance(module, Normalize) for module in model):
        model.append(Normalize())
    if pooling is not None and not pooling.include_prompt:
        raise UsageError(
            "This model leaves the prompt out of its pooling, which pairdr does not do.",
            remedy="Use another start model.",
        )


def _settle_contract(model: SentenceTransformer, config: ModelConfig) -> Contract:
    """Write prefixes and lengths where sentence-transformers reads them, and return the contract."""
    stored = {key: model.prompts.get(key) or "" for key in ("query", "document")}
    query_prefix = stored["query"] if config.query_prefix is None else config.query_prefix
    passage_prefix = stored["document"] if config.passage_prefix is None else config.passage_prefix
    model.prompts = {"query": query_prefix, "document": passage_prefix}
    limit = model.get_max_seq_length() or max(config.query_length, config.passage_length)
    positions = getattr(_transformer(model).config, "max_position_embeddings", None) or limit
    longest = max(config.query_length, config.passage_length)
    if longest > positions:
        raise UsageError(
            f"A length of {longest} tokens is over the model's {positions} positions.",
            remedy="Lower query_length or passage_length.",
        )
    transformer = _transformer(model)
    transformer.query_length, transformer.document_length = config.query_length, config.passage_length
    pooling = next((module.pooling_mode for module in model if isinstance(module, Pooling)), "own")
    return Contract(
        query_prefix,
        passage_prefix,
        config.query_length,
        config.passage_length,
        str(pooling),
        str(model.similarity_fn_name),
        config.title,
        int(model.get_embedding_dimension() or 0),
        config.towers,
    )


def _untie(model: SentenceTransformer) -> SentenceTransformer:
    """Return a model with an encoder for each side, two copies of the one that is given."""
    modules: Any = list(model.children())
    router = Router.for_query_document(modules, copy.deepcopy(modules))
    untied = SentenceTransformer(
        modules=[router], similarity_fn_name=model.similarity_fn_name, device=str(model.device)
    )
    untied.prompts = model.prompts
    return untied


def _require_room(model: SentenceTransformer, contract: Contract) -> None:
    """Refuse a prefix that leaves no room for the text: all texts would get one vector."""
    pairs = ((contract.query_prefix, contract.query_length), (contract.passage_prefix, contract.passage_length))
    for prefix, length in pairs:
        used = len(model.tokenizer(prefix)["input_ids"])
        if prefix and used >= length:
            raise UsageError(f"The prefix {prefix!r} takes {used} of {length} tokens.", remedy="Raise the length.")
