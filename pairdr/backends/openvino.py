"""OpenVINO: computes an exported graph on a CPU, in fp32 or with int8 products."""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from pairdr.errors import MissingExtraError

if TYPE_CHECKING:
    import numpy.typing as npt

    from pairdr.backends.exported import Forward
    from pairdr.backends.texts import Arrays

FILE = "model.xml"
SETTINGS = {
    "INFERENCE_PRECISION_HINT": "f32",  # on some processors bf16 is the default
    "CPU_RUNTIME_CACHE_CAPACITY": 64,  # kernels of shapes: memory grows until so many are kept, and each keeps weights
    "ENABLE_CPU_PINNING": False,  # two processes would share one core while another rests
}
"""How a graph is compiled, whatever the number of threads."""


def import_openvino() -> Any:
    """Import OpenVINO without its telemetry, which reports to its makers by default.

    OpenVINO and NNCF look for the package openvino_telemetry and send nothing where they do not find it; its other
    switch, `opt_in_out --opt_out`, is a file in the user's home, which is not ours to write.

    Raises:
        MissingExtraError: it is not installed.
    """
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    try:
        import openvino
    except ImportError as error:
        raise MissingExtraError("openvino", "openvino") from error
    return openvino


@functools.cache
def open_core() -> Any:
    """Return the process's one `openvino.Core`, which stays until its end.

    Each core gives the thread that first compiles with it a stack for signals, and takes it away in its destructor,
    putting back the one it found: of two cores, the second puts back what the first has freed, and the next signal
    ends the process.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    return import_openvino().Core()


def load_forwards(path: Path, count: int) -> list[Forward]:
    """Return passes over one graph, each on a thread of its own.

    Args:
        path: the graph.
        count: how many run at the same time.

    Raises:
        MissingExtraError: OpenVINO is not installed.
    """
    settings = SETTINGS | {"NUM_STREAMS": count, "INFERENCE_NUM_THREADS": count}
    compiled = open_core().compile_model(str(path), "CPU", settings)
    names = [entry.any_name for entry in compiled.inputs]

    def prepare() -> Forward:
        request = compiled.create_infer_request()

        def forward(arrays: Arrays) -> npt.NDArray[np.float32]:
            found = request.infer({name: arrays[name] for name in names}, share_inputs=True)
            return np.asarray(found[0], dtype=np.float32)

        return forward

    return [prepare() for _ in range(count)]
