"""What the commands between other tools and pairdr do. Each imports only what it needs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pairdr.commands import FLAT, OUTPUT
from pairdr.config import DataConfig
from pairdr.progress import print_facts, print_text
from pairdr.store_config import ExportDataConfig, ImportDataConfig, SourceFormat, TargetFormat


def import_data(
    sources: Annotated[tuple[str, ...], Parameter(negative="")],
    *,
    source_format: Annotated[SourceFormat, Parameter(name="--from", help="What the files are.")],
    output: Annotated[Path, OUTPUT],
    corpus: Annotated[
        Path | None,
        Parameter(help="Passages by id: psgs_w100.tsv, collection.tsv, or JSON lines with docid or _id."),
    ] = None,
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    options: Annotated[ImportDataConfig, FLAT] = ImportDataConfig(),
) -> None:
    """Turn files of another tool into a BEIR folder, and training files into examples, OUTPUT.examples.

    Parameters
    ----------
    sources
        One or more of FILE (for training) or SPLIT=FILE; or the folder of a collection (msmarco, rocketqa).
    """
    from pairdr.exchange.imports import import_data as import_sources
    from pairdr.exchange.imports import parse_sources

    facts = import_sources(parse_sources(sources), source_format, data_options, options, output, corpus)
    print_facts(facts)
    if "examples" in facts:
        print_text(f"\nTrain on it: pairdr train {output} {output}.examples --output MODEL")


def export_data(
    data: Path,
    examples: Annotated[
        Path | None,
        Parameter(help="What `pairdr label` or `import-data` wrote; without, the labels, which have no negatives."),
    ] = None,
    *,
    target_format: Annotated[TargetFormat, Parameter(name="--to", help="What is written.")],
    output: Annotated[Path, OUTPUT],
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    options: Annotated[ExportDataConfig, FLAT] = ExportDataConfig(),
) -> None:
    """Write a BEIR folder, and training examples, as another tool reads them.

    Parameters
    ----------
    data
        BEIR folder.
    """
    from pairdr.collection import open_collection
    from pairdr.exchange.exports import export_data as export_collection

    print_facts(export_collection(open_collection(data, data_options), target_format, options, output, examples))
