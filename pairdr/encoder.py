"""The dual encoder: one sentence-transformers model that both sides share or route through, and its contract.

The contract (prefixes, lengths, pooling, similarity, title form) is stored with the model in sentence-transformers'
own places, so that plain `encode_query` and `encode_document` give the same vectors, and in the manifest, so that
encode, search and serve can refuse vectors of another one.

Takes texts, returns vectors. Knows nothing of losses, stores or measures.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError
from sentence_transformers import SentenceTransformer
from torch import Tensor

from pairdr.artefact import MANIFEST, UNSEALED, publish, read_manifest
from pairdr.config import ModelConfig
from pairdr.errors import ArtefactError, UsageError
from pairdr.files import hash_json
from pairdr.readme import describe_use, format_copy, sign_card
from pairdr.records import Passage
from pairdr.sources.minilm import find_minilm
from pairdr.start import load_start
from pairdr.tokens import TOKENS_PER_BATCH, Contract, Side, Tokens, plan_forwards, require_contract

HALF = {"cuda": torch.bfloat16}
"""Devices on which vectors are computed in half precision."""


class DualEncoder:
    """A dual encoder: one encoder for both sides (tied towers), or one for each (untied).

    Attributes:
        model: the sentence-transformers model.
        contract: prefixes, lengths, pooling, similarity, towers.
        temperature: the divisor of scores that fits the similarity.
        is_retriever: False for a bare encoder that nobody has tuned for similarity yet.
    """

    def __init__(self, model: SentenceTransformer, contract: Contract, temperature: float, is_retriever: bool) -> None:
        self.model, self.contract, self.temperature, self.is_retriever = model, contract, temperature, is_retriever

    @classmethod
    def load(cls, config: ModelConfig) -> DualEncoder:
        """Load a start model: a folder or hub name of sentence-transformers or Hugging Face form.

        A model that pairdr saved keeps the contract it was saved with; options that say otherwise are refused.

        Raises:
            UsageError: no model there, or one of another kind.
            RefusedError: dot product at temperature 1 on normalised vectors.
        """
        name = find_minilm() if config.start == "minilm" else config.start
        if (Path(name) / MANIFEST).is_file():
            encoder = cls.open(name, device=config.device)
            require_contract(encoder.contract, encoder.temperature, config, name)
            return encoder
        return cls(*load_start(name, config))

    @classmethod
    def open(cls, folder: str | Path, device: str | None = None) -> DualEncoder:
        """Open a model that pairdr saved.

        Raises:
            ArtefactError: the folder is missing, broken or of another kind.
        """
        facts = read_manifest(folder, "model").facts
        try:
            model = SentenceTransformer(str(folder), device=device, local_files_only=True)
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise ArtefactError(
                f"The model cannot be loaded: {error}", path=folder, remedy="Check --device, or make the model again."
            ) from error
        return cls(model, Contract(**facts["contract"]), facts["temperature"], facts["is_retriever"])

    def save(
        self,
        folder: str | Path,
        *,
        options: dict[str, Any],
        inputs: dict[str, str],
        facts: dict[str, Any] | None = None,
        files: dict[str, str] | None = None,
        card: str = "",
    ) -> None:
        """Save as a sentence-transformers folder with a manifest.

        Args:
            folder: where it will stand.
            options: what it was made with.
            inputs: fingerprints of what it was made from.
            facts: further facts for the manifest; `stages` marks a trained model.
            files: further text files, by name.
            card: what is known of it at this moment, in Markdown; unset: how it is used.
        """
        facts = facts or {}
        with publish(folder, "model", options=options, inputs=inputs, beside=(UNSEALED,)) as staging:
            self.model.save(str(staging.path), create_model_card=False)
            text = sign_card(card or "# A dense passage retriever\n\n" + describe_use(self.contract))
            (staging.path / UNSEALED).write_text(text, encoding="utf-8")
            for name, text in (files or {}).items():
                (staging.path / name).write_text(text, encoding="utf-8")
            staging.facts |= facts | {
                "contract": asdict(self.contract),
                "temperature": self.temperature,
                "is_retriever": True if facts.get("stages") else self.is_retriever,
                "weights_sha256": self.hash_weights(),
                "encoder": self.fingerprint,
            }

    def save_copy(self, folder: str | Path, config: ModelConfig) -> None:
        """Save a start model as it was loaded; with the stages and data of one that pairdr trained.

        Args:
            folder: where it will stand.
            config: what it was loaded with.

        Raises:
            ArtefactError: the folder that it was loaded from is broken, or `folder` cannot be written.
        """
        options, facts = config.as_dict(), {}
        if (Path(config.start) / MANIFEST).is_file():
            source = read_manifest(config.start, "model")
            if "stages" in source.facts:
                facts["stages"] = source.facts["stages"]
                options["trained_on"] = source.options.get("trained_on", [])
        self.save(folder, options=options, inputs={}, facts=facts, card=format_copy(config, self.contract))

    @property
    def device(self) -> str:
        """Return the kind of device: cpu, cuda, ..."""
        return str(self.model.device.type)

    @property
    def noise(self) -> float:
        """Return how far what a text is batched with may move a number of its vector, as a share of its largest."""
        return 0.05 if self.device in HALF else 1e-5

    @property
    def fingerprint(self) -> str:
        """Return a hash of weights, tokenizer and contract: equal for models that give equal vectors."""
        tokenizer = getattr(self.model.tokenizer, "backend_tokenizer", None)
        vocabulary = "" if tokenizer is None else _strip_padding(tokenizer.to_str())
        return hash_json([self.hash_weights(), vocabulary, asdict(self.contract)])

    def hash_weights(self) -> str:
        """Return the sha256 over all parameters, by name."""
        return hash_parameters(self.model)

    def tokenize_queries(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokenise questions, prefix included, cut to the contract's length."""
        return self._tokenize(self.contract.form_queries(texts), None, self.contract.query_length)

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[Tokens]:
        """Tokenise passages, prefix included, cut to the contract's length.

        With `title = "segment"` title and text are a pair, cut longest first; else they are one string.
        """
        return self._tokenize(*self.contract.form_passages(passages), self.contract.passage_length)

    def embed(self, tokens: Sequence[Tokens], side: Side | None = None) -> Tensor:
        """Return the [n, D] vectors of one padded forward pass, with their graph if gradients are on.

        For cosine they are normalised, so that an inner product is the similarity.

        Args:
            tokens: the texts.
            side: what they are; tied towers embed both sides alike, in one pass if need be, and may leave it out.

        Raises:
            ValueError: untied towers, and no side.
        """
        if side is None and self.contract.towers == "untied":
            raise ValueError("Untied towers need to know the side of a forward pass.")
        width = max(len(t.input_ids) for t in tokens)
        pad_id = self.model.tokenizer.pad_token_id or 0
        ids = torch.full((len(tokens), width), pad_id, dtype=torch.long)  # [n, width]
        mask = torch.zeros((len(tokens), width), dtype=torch.long)
        types = torch.zeros((len(tokens), width), dtype=torch.long)
        for row, (input_ids, type_ids) in enumerate(tokens):
            ids[row, : len(input_ids)] = torch.tensor(input_ids)
            mask[row, : len(input_ids)] = 1
            types[row, : len(type_ids)] = torch.tensor(type_ids, dtype=torch.long)
        features = {"input_ids": ids, "attention_mask": mask}
        if tokens[0].token_type_ids:
            features["token_type_ids"] = types
        device = self.model.device
        task = "query" if side == "query" else "document"
        found = self.model({name: value.to(device) for name, value in features.items()}, task=task)
        vectors: Tensor = found["sentence_embedding"]
        return vectors

    @torch.inference_mode()
    def encode(
        self, tokens: Sequence[Tokens], tokens_per_batch: int | None = None, side: Side | None = None
    ) -> npt.NDArray[np.float32]:
        """Return [n, D] fp32 vectors without a graph. The batch plan is a function of the texts alone.

        On a GPU products are in bf16 (unmeasured), and lengths are made 1 again in fp32 where they are to be 1.
        """
        self.model.eval()
        device, kind = self.device, HALF.get(self.device)
        budget = tokens_per_batch or TOKENS_PER_BATCH.get(device, TOKENS_PER_BATCH["cpu"])
        vectors = np.empty((len(tokens), self.contract.dimensions), dtype=np.float32)
        for group in plan_forwards([len(t.input_ids) for t in tokens], budget, device):
            with torch.autocast(device, kind, enabled=kind is not None):
                found = self.embed([tokens[i] for i in group], side).float()
            if kind is not None and self.contract.similarity == "cosine":
                found = torch.nn.functional.normalize(found, dim=1)
            vectors[group] = found.cpu().numpy()
        return vectors

    def encode_queries(self, texts: Sequence[str], tokens_per_batch: int | None = None) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of questions."""
        return self.encode(self.tokenize_queries(texts), tokens_per_batch, "query")

    def encode_passages(
        self, passages: Sequence[Passage], tokens_per_batch: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of passages."""
        return self.encode(self.tokenize_passages(passages), tokens_per_batch, "passage")

    def _tokenize(self, first: list[str], second: list[str] | None, length: int) -> list[Tokens]:
        if not first:
            return []
        tokenizer = self.model.tokenizer
        coded = tokenizer(
            first, second, truncation="longest_first", max_length=length, return_attention_mask=False, verbose=False
        )
        types = coded.get("token_type_ids") or [[] for _ in first]
        return [Tokens(*pair) for pair in zip(coded["input_ids"], types, strict=True)]


def hash_parameters(model: torch.nn.Module) -> str:
    """Return the sha256 over all parameters of a model, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def push_model(folder: str | Path, repository: str, *, private: bool = False) -> str:
    """Upload a saved model's folder, card and manifest among it, to the Hugging Face hub, and return its address.

    Raises:
        ArtefactError: no model there.
        UsageError: the hub refused it, or cannot be reached.
    """
    encoder = DualEncoder.open(folder, device="cpu")
    try:
        return encoder.model.push_to_hub(
            repository,
            private=private or None,
            local_model_path=str(folder),
            exist_ok=True,
            commit_message="A model of pairdr",
        )
    except Exception as error:  # of the hub's library and of the one that carries it
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UsageError(
            f"The hub did not take the model: {reason}.",
            path=repository,
            remedy="Check the name, HF_TOKEN and its right to write, and the connection.",
        ) from error


def _strip_padding(tokenizer: str) -> str:
    """Return a tokenizer's JSON without the lengths that a call leaves in it."""
    return json.dumps(
        {key: value for key, value in json.loads(tokenizer).items() if key not in ("truncation", "padding")}
    )
