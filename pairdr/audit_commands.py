"""What the two commands around suspicious labels do. Each imports only what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter

from pairdr.artefact import read_manifest
from pairdr.commands import FLAT, OUTPUT
from pairdr.config import DataConfig, LexicalConfig, ModelConfig
from pairdr.errors import UsageError
from pairdr.progress import print_text, quiet_libraries
from pairdr.store_config import AuditConfig

if TYPE_CHECKING:
    from pairdr.collection import Collection

DATA = Parameter(help="BEIR folder; a work folder knows its own, unless that was moved.")


def audit(
    place: Path,
    *,
    output: Annotated[Path, OUTPUT],
    data: Annotated[Path | None, DATA] = None,
    candidates: Annotated[Path | None, Parameter(help="What `pairdr mine` wrote, or a TREC run.")] = None,
    teacher: Annotated[Path | None, Parameter(help="What `pairdr teach` wrote.")] = None,
    run: Annotated[Path | None, Parameter(help="The final model's run of training and pool queries.")] = None,
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    lexical: Annotated[LexicalConfig, FLAT] = LexicalConfig(),
    options: Annotated[AuditConfig, FLAT] = AuditConfig(),
) -> None:
    """List training labels that look wrong in OUTPUT/audit.tsv, for `pairdr apply-audit` once they are marked.

    Parameters
    ----------
    place
        A work folder of `pairdr run`; or what `pairdr label` wrote, with --data, and --candidates, --teacher and --run
        as far as they are there.
    """
    from pairdr.audit import audit_labels, format_audit
    from pairdr.evidence import open_sources
    from pairdr.findings import AUDIT_FILE

    quiet_libraries()
    collection = _open_data(place, data, data_options)
    parts = {"candidates": candidates, "teacher": teacher, "run": run}
    words = output.parent / f"{output.name}.bm25"
    sources = open_sources(place, collection, parts, model=model, lexical=lexical, words=words)
    audit_labels(collection, sources, options, output)
    print_text(format_audit(read_manifest(output).facts))
    print_text(f"Write accept, relabel or drop into the column mark of {output / AUDIT_FILE}")


def apply_audit(
    marked: Path,
    place: Path | None = None,
    *,
    output: Annotated[Path, OUTPUT],
    data: Annotated[Path | None, DATA] = None,
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
) -> None:
    """Write the marks of an audit back: as new labels in OUTPUT, and as new training examples in OUTPUT.examples.

    Parameters
    ----------
    marked
        The marked audit.tsv, or the folder it stands in.
    place
        The work folder or the examples that were audited; without it, with --data alone, only labels are written.
    """
    from pairdr.relabel import apply_audit as apply_marks

    collection = _open_data(place, data, data_options)
    examples = place / "examples" if place is not None and _is_work(place) else place
    facts = apply_marks(collection, marked, output, examples=examples)
    for name, counts in facts.items():
        print_text(f"{name + ':':10}" + ", ".join(f"{count} {what}" for what, count in counts.items()))


def _open_data(place: Path | None, data: Path | None, options: DataConfig) -> Collection:
    """Open the data: of a work folder, as the run opened them; else as the options say."""
    from pairdr.collection import open_collection
    from pairdr.origin import read_origin
    from pairdr.parts import require_no_begun_work

    if place is not None:
        require_no_begun_work(place)
    if place is not None and _is_work(place):
        if options != DataConfig():
            raise UsageError("A work folder has its own options of the data.", path=place, remedy="Leave them out.")
        origin = read_origin(place)
        return open_collection(data or origin.data, origin.config.data)
    if data is None:
        raise UsageError("This does not say which data it is of.", path=place, remedy="Name them as --data.")
    return open_collection(data, options)


def _is_work(place: Path) -> bool:
    from pairdr.parts import is_work_folder

    return is_work_folder(place)
