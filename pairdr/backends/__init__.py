"""Texts to vectors, by whatever runs the model: one contract, a few implementations.

| kind of folder | implementation | runs |
|---|---|---|
| model | `pairdr.encoder.DualEncoder` | torch, on any device: the reference that all others are measured against |
| exported, onnx | `exported.ExportedEncoder` over `onnx` | onnxruntime, on a CPU |
| exported, openvino | `exported.ExportedEncoder` over `openvino` | OpenVINO, on a CPU |

The exported ones load neither torch nor transformers. This module holds the contract alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pairdr.artefact import MANIFEST, read_manifest
from pairdr.config import ModelConfig
from pairdr.errors import ArtefactError, UsageError
from pairdr.records import Passage
from pairdr.tokens import Contract, Tokens, require_contract

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class Encoder(Protocol):
    """What encodes texts: equal fingerprints mean equal vectors.

    `tokens_per_batch` is the most padded tokens of a forward pass; None leaves it to the implementation.
    """

    @property
    def contract(self) -> Contract:
        """Return prefixes, lengths, pooling, similarity, dimensions D."""

    @property
    def device(self) -> str:
        """Return the kind of device that it runs on: cpu, cuda, ..."""

    @property
    def noise(self) -> float:
        """Return how far what a text is batched with may move a number of its vector, as a share of its largest."""

    @property
    def fingerprint(self) -> str:
        """Return a hash of all that decides the vectors."""

    def tokenize_queries(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of questions, prefix included, cut to the contract's length."""

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[Tokens]:
        """Return the tokens of passages, prefix included, cut to the contract's length."""

    def encode_queries(self, texts: Sequence[str], tokens_per_batch: int | None = None) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of questions."""

    def encode_passages(
        self, passages: Sequence[Passage], tokens_per_batch: int | None = None
    ) -> npt.NDArray[np.float32]:
        """Return the [n, D] vectors of passages."""


def open_encoder(folder: str | Path, device: str | None = None, threads: int | None = None) -> Encoder:
    """Open a model that pairdr saved or exported.

    Args:
        folder: where it stands.
        device: cpu, cuda, ...; unset picks the best there is. An exported model runs on a CPU.
        threads: of an exported model; unset: one for each core.

    Raises:
        ArtefactError: the folder is missing, broken or holds something else.
        UsageError: an exported model and another device.
        MissingExtraError: the package that runs an exported model is not installed.
    """
    kind = read_manifest(folder).kind
    if kind == "model":
        from pairdr.encoder import DualEncoder

        return DualEncoder.open(folder, device=device)
    if kind != "exported":
        raise ArtefactError(f"This folder holds {kind!r}, not a model.", path=folder, remedy="Name a model's folder.")
    if device not in (None, "cpu"):
        raise UsageError(
            f"An exported model runs on a CPU, not on {device!r}.",
            path=folder,
            remedy="Leave --device out, or name the model that it was exported from.",
        )
    from pairdr.backends.exported import ExportedEncoder

    return ExportedEncoder.open(folder, threads)


def load_encoder(config: ModelConfig, threads: int | None = None) -> Encoder:
    """Load the model that options name: an exported folder, or whatever `DualEncoder.load` takes.

    Args:
        config: names it.
        threads: with which this process computes from now on; unset: as many as its library likes.

    Raises:
        UsageError: no model there, or options that it was not made with.
        ArtefactError: an exported folder that is broken.
    """
    if not is_exported(config.start):
        from pairdr.encoder import DualEncoder

        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        return DualEncoder.load(config)
    encoder = open_encoder(config.start, config.device, threads)
    temperature = read_manifest(config.start).facts["temperature"]
    require_contract(encoder.contract, temperature, config, config.start)
    return encoder


def open_stand_in(start: str, model: str | Path, device: str | None = None) -> Encoder:
    """Open an export that answers for the model that it was made of: their vectors are equal, to rounding.

    Args:
        start: the export.
        model: the folder of a model that pairdr saved.
        device: only cpu; unset is the same.

    Raises:
        UsageError: no export of this model, an int8 one, or another device.
        ArtefactError: a folder that is broken.
    """
    from pairdr.backends.exported import ExportedEncoder

    known = read_manifest(model, "model").facts["encoder"]
    facts = read_manifest(start, "exported").facts if is_exported(start) else {}
    if facts.get("source_encoder") != known:
        raise UsageError(
            f"{start!r} is no export of the model that made the vectors.",
            path=model,
            remedy="Name what pairdr export made of it, or leave --start out.",
        )
    if facts["precision"] == "int8":
        raise UsageError(
            "In int8 a model's vectors are others.",
            path=start,
            remedy="Run pairdr encode with it and name those vectors, or an export in fp32.",
        )
    encoder = open_encoder(start, device)
    assert isinstance(encoder, ExportedEncoder)
    encoder.fingerprint = known
    return encoder


def is_exported(start: str) -> bool:
    """Return whether a start model is an exported one, which needs no torch."""
    return (Path(start) / MANIFEST).is_file() and read_manifest(start).kind == "exported"
