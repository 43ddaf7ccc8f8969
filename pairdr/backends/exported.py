"""An exported model: a graph, a tokenizer and the contract, run without torch.

Texts are tokenised a window at a time by a thread of their own while the window before is computed. A window's texts
are grouped by length into passes of about a thousand tokens, which stay in a core's cache, and every core computes
passes of its own on one thread: none waits for another, and a pass gives the same bytes whatever the number of cores.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pairdr.artefact import Manifest, read_whole
from pairdr.backends.texts import Arrays, TextReader, pad_tokens
from pairdr.errors import ArtefactError, PairdrError
from pairdr.files import hash_file, hash_json
from pairdr.records import Passage
from pairdr.tokens import TOKENS_PER_BATCH, Contract, Tokens, plan_forwards

TOKENIZER = "tokenizer.json"
WINDOW = 4096
"""Texts that are tokenised and planned together."""

WIDTH = 8
"""A pass is padded to a multiple of these tokens: OpenVINO keeps kernels and weights of every shape it has seen."""

Vectors = npt.NDArray[np.float32]
Forward = Callable[[Arrays], Vectors]
"""Computes one pass, [n, width] to [n, D], on one thread."""


class Graph(NamedTuple):
    """How a backend's file is read."""

    file: str
    load: Callable[[Path, int], list[Forward]]
    """Returns as many forward passes, to be computed at the same time, as it is asked for."""


class ExportedEncoder:
    """An exported model, opened for use on a CPU.

    Attributes:
        device: always cpu.
        contract: prefixes, lengths, pooling, similarity.
        fingerprint: hash of graph, tokenizer and contract.
    """

    device = "cpu"

    @property
    def noise(self) -> float:
        """Return how far what a text is batched with may move a number of its vector, of its largest."""
        return 0.05 if self._quantised else 1e-5

    def __init__(self, folder: Path, facts: dict[str, Any], threads: int | None = None) -> None:
        self.contract = Contract(**facts["contract"])
        self.fingerprint = str(facts["encoder"])
        self._pad_id = int(facts["pad_id"])
        self._quantised = facts["precision"] == "int8"
        text = (folder / TOKENIZER).read_text(encoding="utf-8")
        self._reader = TextReader(text, self.contract, bool(facts["token_types"]))
        graph = find_graph(facts["backend"])
        self._idle: SimpleQueue[Forward] = SimpleQueue()  # each is used by one thread at a time
        self._cores = threads or count_cores()
        for forward in graph.load(folder / graph.file, self._cores):
            self._idle.put(forward)

    @classmethod
    def open(cls, folder: str | Path, threads: int | None = None) -> ExportedEncoder:
        """Open a model that `pairdr export` wrote.

        Args:
            folder: where it stands.
            threads: with which it computes; unset: one for each core.

        Raises:
            ArtefactError: the folder is missing, broken or of another kind.
            MissingExtraError: the package that runs it is not installed.
        """
        place = Path(folder)

        def read(manifest: Manifest) -> ExportedEncoder:
            if hash_file(place / TOKENIZER) != manifest.files[TOKENIZER]["sha256"]:
                raise ValueError(f"{TOKENIZER} is not the file that was written")
            return cls(place, manifest.facts, threads)

        try:
            return read_whole(place, "exported", read)
        except PairdrError:
            raise
        except Exception as error:  # each library that reads a part has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise ArtefactError(
                f"The exported model cannot be opened: {reason}.", path=folder, remedy="Run pairdr export again."
            ) from error

    def tokenize_queries(self, texts: Sequence[str]) -> list[Tokens]:
        """Return the tokens of questions, prefix included, cut to the contract's length."""
        return self._reader.tokenize_queries(texts)

    def tokenize_passages(self, passages: Sequence[Passage]) -> list[Tokens]:
        """Return the tokens of passages, prefix included, cut to the contract's length."""
        return self._reader.tokenize_passages(passages)

    def encode_queries(self, texts: Sequence[str], tokens_per_batch: int | None = None) -> Vectors:
        """Return the [n, D] vectors of questions."""
        return self._encode(texts, self.tokenize_queries, tokens_per_batch)

    def encode_passages(self, passages: Sequence[Passage], tokens_per_batch: int | None = None) -> Vectors:
        """Return the [n, D] vectors of passages."""
        return self._encode(passages, self.tokenize_passages, tokens_per_batch)

    def _encode(
        self, texts: Sequence[Any], tokenize: Callable[[Sequence[Any]], list[Tokens]], tokens_per_batch: int | None
    ) -> Vectors:
        vectors = np.empty((len(texts), self.contract.dimensions), dtype=np.float32)
        budget = tokens_per_batch or TOKENS_PER_BATCH["cpu"]

        def plan(tokens: list[Tokens]) -> list[list[int]]:
            return plan_forwards([len(t.input_ids) for t in tokens], budget)

        def compute(tokens: list[Tokens], into: Vectors, group: list[int]) -> None:
            forward = self._idle.get()
            try:
                into[group] = forward(pad_tokens([tokens[place] for place in group], self._pad_id, WIDTH))
            finally:
                self._idle.put(forward)

        tokens = tokenize(texts[:WINDOW])
        groups = plan(tokens)
        if len(texts) <= WINDOW and len(groups) < 2:  # a question, say: threads would cost more than they bring
            for group in groups:
                compute(tokens, vectors, group)
            return vectors
        with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(self._cores) as cores:
            try:
                for start in range(0, len(texts), WINDOW):
                    coming = reader.submit(tokenize, texts[start + WINDOW : start + 2 * WINDOW])
                    window = vectors[start : start + WINDOW]
                    for done in [cores.submit(compute, tokens, window, group) for group in groups]:
                        done.result()
                    tokens = coming.result()
                    groups = plan(tokens)
            finally:
                cores.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what is waiting is not computed
        return vectors


def find_graph(backend: str) -> Graph:
    """Return how a backend reads its file, importing that backend alone."""
    if backend == "onnx":
        from pairdr.backends.onnx import FILE, load_forwards
    elif backend == "openvino":
        from pairdr.backends.openvino import FILE, load_forwards
    else:
        raise ValueError(f"this pairdr has no backend {backend!r}")
    return Graph(FILE, load_forwards)


def fingerprint_export(folder: Path, contract: dict[str, Any]) -> str:
    """Return a hash of all files of an export and its contract: equal for exports that give equal vectors."""
    files = sorted(path.name for path in folder.iterdir() if path.is_file())
    return hash_json([[(name, hash_file(folder / name)) for name in files], contract])


def count_cores() -> int:
    """Return how many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
