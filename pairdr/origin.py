"""What a run came from: all its options, its data, and the machine and versions it ran on.

A finished work folder holds `run.toml`, the options, which `--config` reads too, and `run.json`, where the data stood
and what they were. Neither is an artefact: both say how artefacts came about, and change no fingerprint.
"""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from pairdr.backends.exported import count_cores
from pairdr.collection import Collection
from pairdr.config import RunConfig, change_options
from pairdr.errors import ArtefactError, UsageError
from pairdr.files import replace_file
from pairdr.options import Options

OPTIONS_FILE, DATA_FILE = "run.toml", "run.json"
LIBRARIES = ("torch", "transformers", "sentence-transformers", "numpy", "pyarrow", "bm25s")
"""Versions that can change what comes out."""
_PLACES = (("model", "start"), ("teach", "cross_encoder"), ("teach", "dual_encoder"))
"""Options that name a hub's model or a folder."""


@dataclass(frozen=True)
class Origin:
    """What a work folder came from.

    Attributes:
        config: all options.
        data: the folder of the data, as it stood then.
        collection: fingerprint of the data as they were opened.
        passages: fingerprint of the corpus alone.
    """

    config: RunConfig
    data: Path
    collection: str
    passages: str


def write_origin(folder: Path, config: RunConfig, collection: Collection) -> None:
    """Keep what a finished run came from; a file that says the same already is left alone."""
    facts = {
        "data": str(collection.source.resolve()),
        "collection": collection.fingerprint,
        "passages": collection.passages_fingerprint,
    }
    options = make_absolute(replace(config, data=collection.config))
    contents = {OPTIONS_FILE: format_options(options), DATA_FILE: json.dumps(facts, indent=1) + "\n"}
    for name, text in contents.items():
        path = folder / name
        if not path.is_file() or path.read_text(encoding="utf-8") != text:
            replace_file(path, text)


def read_origin(folder: Path) -> Origin:
    """Read what a finished run came from.

    Raises:
        ArtefactError: it is not there, or cannot be read.
        UsageError: this pairdr does not have one of its options.
    """
    remedy = "Run pairdr run with its options once more: what is done is skipped."
    for name in (OPTIONS_FILE, DATA_FILE):
        if not (folder / name).is_file():
            raise ArtefactError(f"{name} is missing: no run has ended here.", path=folder, remedy=remedy)
    try:
        facts = json.loads((folder / DATA_FILE).read_text(encoding="utf-8"))
        place = Path(facts["data"]), str(facts["collection"]), str(facts["passages"])
        config = parse_options((folder / OPTIONS_FILE).read_text(encoding="utf-8"))
    except UsageError as error:
        raise UsageError(error.what, path=folder / OPTIONS_FILE, remedy=error.remedy) from error
    except (ValueError, TypeError, KeyError) as error:
        raise ArtefactError("What the run came from cannot be read.", path=folder, remedy=remedy) from error
    return Origin(config, *place)


def format_options(config: RunConfig, *, changed_only: bool = False) -> str:
    """Return options as TOML that `--config` reads.

    Args:
        config: the options.
        changed_only: leave out those that have their default.
    """
    plain = RunConfig()
    blocks = [_list_options(config, plain, changed_only)]
    for spec in fields(config):
        options, defaults = getattr(config, spec.name), getattr(plain, spec.name)
        if isinstance(options, Options):
            lines = _list_options(options, defaults, changed_only)
            blocks.append([f"[{spec.name}]", *lines] if lines else [])
    return "\n\n".join("\n".join(lines) for lines in blocks if lines) + "\n"


def parse_options(text: str) -> RunConfig:
    """Return the options that `format_options` wrote.

    Raises:
        UsageError: an option that does not exist.
        ValueError: no TOML.
    """
    content = tomllib.loads(text)
    plain: dict[str, Any] = {name: content.pop(name) for name in ("arms", "rounds") if name in content}
    if "arms" in plain:
        plain["arms"] = tuple(plain["arms"])
    return change_options(replace(RunConfig(), **plain), content)


def describe_environment() -> dict[str, str]:
    """Return the versions and the machine that results depend on."""
    from pairdr import __version__

    found = {"pairdr": __version__, "python": platform.python_version(), **_list_versions()}
    found |= {"system": f"{platform.system()} {platform.machine()}", "cpu": _name_cpu(), "cores": str(count_cores())}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        found["gpu"] = str(torch.cuda.get_device_name())
    return found


def measure_memory() -> dict[str, int]:
    """Return the most bytes that this process has held so far: of memory, and of a GPU's where one was used."""
    import resource

    unit = 1 if sys.platform == "darwin" else 1024
    found = {"memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        found["device_memory"] = int(torch.cuda.max_memory_allocated())
    return found


def _list_options(options: Any, defaults: Any, changed_only: bool) -> list[str]:
    lines = []
    for spec in fields(options):
        value, default = getattr(options, spec.name), getattr(defaults, spec.name)
        if isinstance(value, Options) or (value is None and default is None) or (changed_only and value == default):
            continue
        lines.append(f"{spec.name} = {_to_toml(value)}")
    return lines


def _to_toml(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{', '.join(map(_to_toml, value))}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    text = "none" if value is None else str(value)
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def make_absolute(config: RunConfig) -> RunConfig:
    """Return the options with the files and folders they name as absolute paths, so that they hold anywhere."""
    data = config.data
    held_out = data.held_out.resolve() if data.held_out else None
    unlabelled, labelled = (tuple(path.resolve() for path in paths) for paths in (data.unlabelled, data.labelled))
    data = replace(data, unlabelled=unlabelled, labelled=labelled, held_out=held_out)
    changes: dict[str, dict[str, Any]] = {}
    for section, name in _PLACES:
        value = getattr(getattr(config, section), name)
        if value is not None and Path(value).is_dir():
            changes.setdefault(section, {})[name] = str(Path(value).resolve())
    return change_options(replace(config, data=data), changes)


@cache
def _list_versions() -> Mapping[str, str]:
    found = {}
    for name in LIBRARIES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


@cache
def _name_cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
