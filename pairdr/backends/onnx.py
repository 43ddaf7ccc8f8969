"""onnxruntime: computes an exported graph on a CPU in fp32."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pairdr.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pairdr.backends.exported import Forward
    from pairdr.backends.texts import Arrays

FILE = "model.onnx"


def load_forwards(path: Path, count: int) -> list[Forward]:
    """Return passes over one graph, each on the thread that calls it.

    Args:
        path: the graph.
        count: how many run at the same time.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx") from error
    onnxruntime.disable_telemetry_events()
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.enable_mem_pattern = False  # passes are of many shapes
    options.log_severity_level = 3  # errors, which it raises too
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]

    def forward(arrays: Arrays) -> npt.NDArray[np.float32]:
        (vectors,) = session.run(None, {name: arrays[name] for name in names})
        return np.asarray(vectors, dtype=np.float32)

    return [forward] * count
