"""What tests of broken or old folders share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pairdr.artefact import MANIFEST
from pairdr.files import hash_json


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a manifest and seal it anew, as if a pairdr had written it so."""
    path = folder / MANIFEST
    content = json.loads(path.read_text(encoding="utf-8"))
    content.pop("seal", None)
    change(content)
    path.write_text(json.dumps(content | {"seal": hash_json(content)}), encoding="utf-8")
