"""The model card: what a model is made of, what it was measured to do, and what it is for.

A card is the README.md of a model's folder, in the form that the Hugging Face hub shows. It is nobody's input and may
be edited: the manifest does not name it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairdr.artefact import UNSEALED, Manifest, read_manifest
from pairdr.collection import Collection
from pairdr.config import EvaluateConfig
from pairdr.encoder import describe_use, is_edited, sign_card
from pairdr.files import replace_file
from pairdr.measures import PerQuery, find_interval
from pairdr.sources.minilm import HUB_NAME
from pairdr.table import TITLES, Table, read_table, read_values, say_p
from pairdr.tokens import Contract

_LIMITS = """## Intended use and limits

To find the passages of a corpus like the one above that answer a question. It was measured on questions of that data
set alone: other domains, languages and longer texts need a measurement of their own (`pairdr evaluate`, `pairdr
compare`). It finds passages; whether they are true, it does not know. Biases of the start model and of the data remain.
"""
_TAGS = ("sentence-transformers", "sentence-similarity", "feature-extraction", "dense-retrieval", "pairdr")


@dataclass(frozen=True)
class Measured:
    """What was measured of a model.

    Attributes:
        system: the model's row of the table.
        table: every system on the same queries.
        intervals: system to measure to the 95 % bootstrap interval of its mean.
    """

    system: str
    table: Table
    intervals: dict[str, dict[str, tuple[float, float]]]


def write_card(model: str | Path, start: str | Path, collection: Collection, measured: Measured | None = None) -> None:
    """Write the card of a trained model into its folder.

    One that somebody edited stays as it is, and so does one of the same weights where nothing was measured anew.

    Args:
        model: the model's folder.
        start: the folder of the model that it was trained from.
        collection: the data it was trained on.
        measured: what is known of its quality; None says that nothing was measured.

    Raises:
        ArtefactError: no model there.
    """
    manifest = read_manifest(model, "model")
    base = str(read_manifest(start, "model").options.get("start", ""))
    text = sign_card(format_card(manifest, _name_start(base), collection, measured))
    path = Path(model) / UNSEALED
    present = path.read_text(encoding="utf-8") if path.is_file() else ""
    is_known = measured is None and manifest.facts["weights_sha256"] in present
    if not is_known and not (present and is_edited(present)):
        replace_file(path, text)


def read_measured(report: str | Path, system: str, config: EvaluateConfig) -> Measured:
    """Read a published table, and find the interval of each mean from the values per query."""
    table = read_table(report)
    intervals = {row.system: _find_intervals(read_values(report, row.system), config) for row in table.rows}
    return Measured(system, table, intervals)


def format_card(manifest: Manifest, base: str, collection: Collection, measured: Measured | None) -> str:
    """Return a card as Markdown."""
    facts = manifest.facts
    contract = Contract(**facts["contract"])
    score = "cosine" if contract.similarity == "cosine" else "inner product"
    way = "the PAIR way (Ren et al., Findings of ACL 2021), " if any(s["alpha"] for s in facts["stages"]) else ""
    parts = [
        _format_header(base),
        f"# A dense passage retriever, trained by pairdr {manifest.pairdr_version}",
        f"It turns questions and passages into vectors of {contract.dimensions} numbers; the passages that answer a "
        f"question are those with the highest {score}. It was trained {way}on the data set `{collection.name}`, from "
        f"`{base or 'a model without a name'}`.",
        describe_use(contract),
        _format_results(measured),
        _format_training(facts),
        _format_data(collection),
        _LIMITS.rstrip(),
        _format_origin(manifest),
    ]
    return "\n\n".join(part for part in parts if part)


def _name_start(start: str) -> str:
    """Return what a start model is called elsewhere: a folder's place on this machine is nobody's business."""
    if start == "minilm":
        return HUB_NAME
    return Path(start).name if Path(start).exists() or start.count("/") > 1 else start


def _format_header(base: str) -> str:
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    if base.count("/") == 1:  # organisation/name of the hub
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "---"])


def _format_results(measured: Measured | None) -> str:
    if measured is None:
        return "## Results\n\nNot measured yet: `pairdr run` and `pairdr evaluate` do."
    table = measured.table
    names = list(table.rows[0].means)
    lines = [
        "## Results",
        "",
        f"{table.queries} {table.split} queries; 95 % bootstrap intervals over queries in brackets.",
        "",
        "| | " + " | ".join(names) + " |",
        "|---|" + "---|" * len(names),
    ]
    for row in table.rows:
        cells = []
        for name in names:
            low, high = measured.intervals[row.system][name]
            cells.append(f"{row.means[name]:.4f} ({low:.4f} to {high:.4f})")
        title = f"**{TITLES[row.system]}** (this model)" if row.system == measured.system else TITLES[row.system]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    if measured.system == "pair":
        tests = [f"{TITLES[row.system]}: {say_p(row.p_pair)}" for row in table.rows if row.p_pair is not None]
        lines += [
            "",
            f"This model against the others, two-sided paired randomisation test of {names[0]}: {'; '.join(tests)}.",
        ]
    return "\n".join([*lines, "", *(f"- {note}" for note in table.notes)])


def _format_training(facts: dict[str, Any]) -> str:
    lines = ["## Training", ""]
    for number, stage in enumerate(facts["stages"], start=1):
        loss = f"(1 - {stage['alpha']:g}) L_Q + {stage['alpha']:g} L_P" if stage["alpha"] else "L_Q"
        lines.append(
            f"{number}. {stage['name'].replace('_', '-')}: {loss}, on the {' and '.join(stage['sources'])} rows"
        )
    last = facts["summary"]
    lines += [
        "",
        f"The last stage saw {facts['examples']} rows in {last['step']} steps and ended at a loss of "
        f"{last['loss']:.4f}. `training.jsonl` beside this card has its whole log.",
    ]
    return "\n".join(lines)


def _format_data(collection: Collection) -> str:
    licence = collection.config.licence or "not given; ask who made the data"
    labelled = len(collection.qrels("train"))
    return (
        f"## Data\n\n`{collection.name}`: {len(collection.passages)} passages, {labelled} labelled training queries, "
        f"{len(collection.pool)} unlabelled ones. Licence of the data: {licence}. "
        f"Fingerprint `{collection.fingerprint[:16]}`."
    )


def _format_origin(manifest: Manifest) -> str:
    content = {"options": manifest.options, "inputs": manifest.inputs, "weights": manifest.facts["weights_sha256"]}
    return (
        "## How it was made\n\nOptions of the last stage, fingerprints of what it read, and the sha256 of the weights; "
        "`manifest.json` has them all.\n\n```json\n" + json.dumps(content, indent=1) + "\n```"
    )


def _find_intervals(values: PerQuery, config: EvaluateConfig) -> dict[str, tuple[float, float]]:
    return {
        name: find_interval(list(by_query.values()), resamples=config.resamples, seed=config.test_seed)
        for name, by_query in values.items()
    }
