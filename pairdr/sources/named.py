"""Data that are named instead of lying in a folder: `ir:DATASET` of ir_datasets, `hf:REPOSITORY` of the hub.

What is named is converted to a BEIR folder once, in the cache, and then opened as any folder: later openings need
neither the library nor the network.
"""

from __future__ import annotations

import re
from pathlib import Path

from pairdr.artefact import publish, read_manifest
from pairdr.errors import ArtefactError, UsageError
from pairdr.files import hash_json, hold_lock
from pairdr.lines import Place, find_place
from pairdr.progress import say
from pairdr.sources.folder import write_folder
from pairdr.sources.hub import describe_local, read_hub_dataset
from pairdr.sources.ir import read_ir_dataset

READERS = {"ir": read_ir_dataset, "hf": read_hub_dataset}
CONVERSION = 1
"""Raised when the same source would be written otherwise."""


def find_data(name: str | Path, cache: Path) -> Place:
    """Return the BEIR folder that is named.

    Args:
        name: a folder, or its URL; or `ir:NAME` or `hf:NAME`, with `,SPLIT=SUBSET` for each split where not what goes
            by convention is wanted: `ir:msmarco-passage,train=train,test=dev/small`.
        cache: where converted data stand.

    Raises:
        UsageError: a name that nothing has; the error says what there is.
        MissingExtraError: ir_datasets is not installed.
        DataError: it cannot be read.
    """
    kind, colon, rest = str(name).partition(":")
    if not colon or kind not in READERS:
        return find_place(name)
    source, splits = _parse_name(rest, str(name))
    local = describe_local(source) if kind == "hf" else []
    title = Path(source).resolve().name if local else source.partition("@")[0]
    readable = re.sub(r"[^\w.-]+", "-", title).strip("-.") or "data"  # the collection's name
    place = cache / "sources" / hash_json([CONVERSION, kind, rest, local])[:24] / readable
    if _is_there(place):
        return place
    with hold_lock(cache / "sources"):
        if not _is_there(place):
            say(f"reading {name} ...")
            parts = READERS[kind](source, splits)
            with publish(place, "beir", options={"source": str(name)}, inputs=parts.versions) as staging:
                staging.facts |= write_folder(staging.path, parts)
            say(f"{name} is now in {place}")
    return place


def name_data(place: Place) -> str:
    """Return what data are called where others may have them.

    Args:
        place: what `find_data` gave.

    Returns:
        `ir:NAME` or `hf:NAME` as it was given, a URL without its password, or the name of a folder.
    """
    if not isinstance(place, Path):
        return str(place)
    try:
        given = str(read_manifest(place, "beir").options.get("source", ""))
    except ArtefactError:
        given = ""
    kind, _, name = given.partition(":")
    is_local = Path(name.partition(",")[0]).is_absolute() or Path(name.partition(",")[0]).exists()
    return given if kind in READERS and not is_local else place.resolve().name


def _parse_name(text: str, whole: str) -> tuple[str, dict[str, str]]:
    """Return the data set's name, and split to subset."""
    source, *assignments = text.split(",")
    if not source:
        raise UsageError(f"{whole!r} names no data set.", remedy="Write ir:beir/scifact, or hf:BeIR/scifact.")
    splits = {}
    for assignment in assignments:
        split, _, subset = assignment.partition("=")
        if not re.fullmatch(r"\w[\w.-]*", split) or not subset:
            raise UsageError(
                f"{assignment!r} in {whole!r} names no split.",
                remedy="Write SPLIT=SUBSET: ir:NAME,test=dev/small.",
            )
        splits[split] = subset
    return source, splits


def _is_there(place: Path) -> bool:
    try:
        read_manifest(place, "beir")
    except ArtefactError:
        return False
    return True
