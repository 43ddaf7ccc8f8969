"""What tests of exports share."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from pairdr import export
from pairdr.encoder import DualEncoder


def share_graphs(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """Write the graph of a model once: that takes the most time, and all exports of a model begin with the same."""
    write_graph = export._write_graph

    def write_once(model: DualEncoder, path: Path) -> None:
        kept = folder / f"{model.fingerprint}.onnx"
        if not kept.exists():
            write_graph(model, kept)
        shutil.copyfile(kept, path)

    patch.setattr(export, "_write_graph", write_once)
