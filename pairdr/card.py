"""The model card: what a model is made of, what it was measured to do, and what it is for.

A card is the README.md of a model's folder, in the form that the Hugging Face hub shows. It is nobody's input and may
be edited: the manifest does not name it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pairdr.artefact import UNSEALED, Manifest, read_manifest
from pairdr.collection import Collection
from pairdr.config import EvaluateConfig, StageConfig
from pairdr.files import replace_file
from pairdr.measures import PerQuery, find_interval
from pairdr.options import Options
from pairdr.readme import describe_use, format_command, is_edited, name_start, sign_card
from pairdr.table import TITLES, Table, read_table, read_values, say_p
from pairdr.tokens import Contract
from pairdr.train import list_places

_LIMITS = """## Intended use and limits

To find the passages of a corpus like the one above that answer a question. Measures, where there are any, are of
questions of that data set alone: other domains, languages and longer texts need a measurement of their own (`pairdr
evaluate`, `pairdr compare`). It finds passages; whether they are true, it does not know. Biases of the start model and
of the data remain.
"""
_UNMEASURED = "Not measured yet"
_PAIR = "(Ren et al., Findings of ACL 2021)"
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


def write_card(
    model: str | Path, start: str | Path, collection: Collection, command: str, measured: Measured | None = None
) -> None:
    """Write the card of a trained model into its folder.

    One that somebody edited stays as it is. Where nothing was measured anew, the results of the same weights stay.

    Args:
        model: the model's folder.
        start: the folder of the model that it was trained from.
        collection: the data it was trained on.
        command: what makes it again, as a shell takes it.
        measured: what is known of its quality; None says that nothing was measured anew.

    Raises:
        ArtefactError: no model there.
    """
    manifest = read_manifest(model, "model")
    present = _read_card(model)
    if present and is_edited(present):
        return
    results = _format_results(measured)
    if measured is None and manifest.facts["weights_sha256"] in present:
        results = _cut_results(present)
    text = sign_card(format_card(manifest, read_manifest(start, "model"), collection, command, results))
    if text != present:
        replace_file(Path(model) / UNSEALED, text)


def write_train_cards(
    output: Path,
    start: Path,
    collection: Collection,
    examples: Path,
    stages: Sequence[StageConfig],
    arm: str,
    options: Sequence[Options],
) -> None:
    """Write the cards of what `pairdr train` has trained.

    Args:
        output: the folder of the last stage's model.
        start: the folder of the model that training began from.
        collection: the data.
        examples: the folder of the examples.
        stages: those that ran.
        arm: what they are called together.
        options: of data, model and training.

    Raises:
        ArtefactError: a model is not there, or is broken.
    """
    names = (collection.given_name, examples.resolve().name, "-o", output.resolve().name, "--arm", arm)
    command = format_command(["pairdr", "train", *names], *options)
    for place in list_places(output, stages):
        write_card(place, start, collection, f"{command}  # makes {place.resolve().name}")


def lacks_results(model: str | Path) -> bool:
    """Return whether a model's card is as pairdr wrote it, and has no measures of these weights."""
    present = _read_card(model)
    weights = read_manifest(model, "model").facts["weights_sha256"]
    return not (present and is_edited(present)) and (weights not in present or _UNMEASURED in present)


def read_measured(report: str | Path, system: str, config: EvaluateConfig) -> Measured:
    """Read a published table, and find the interval of each mean from the values per query."""
    table = read_table(report)
    intervals = {row.system: _find_intervals(read_values(report, row.system), config) for row in table.rows}
    return Measured(system, table, intervals)


def format_card(manifest: Manifest, start: Manifest, collection: Collection, command: str, results: str) -> str:
    """Return a card as Markdown.

    Args:
        manifest: of the model.
        start: of the model that it was trained from.
        collection: the data it was trained on.
        command: what makes it again.
        results: the section of what was measured.
    """
    facts = manifest.facts
    contract = Contract(**facts["contract"])
    score = "cosine" if contract.similarity == "cosine" else "inner product"
    base = name_start(str(start.options.get("start", "")))
    before = ", which pairdr had trained before" if start.facts.get("stages") else ""
    parts = [
        _format_header(base),
        f"# A dense passage retriever, trained by pairdr {manifest.pairdr_version}",
        f"It turns questions and passages into vectors of {contract.dimensions} numbers; the passages that answer a "
        f"question are those with the highest {score}. It was trained {_describe_way(facts['stages'])}on the data set "
        f"`{collection.given_name}`, from `{base or 'a model without a name'}`{before}.",
        describe_use(contract),
        results,
        _format_training(facts, start, base),
        _format_data(collection, start, base),
        _LIMITS.rstrip(),
        _format_origin(manifest, command),
    ]
    return "\n\n".join(part for part in parts if part)


def _read_card(model: str | Path) -> str:
    path = Path(model) / UNSEALED
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _cut_results(card: str) -> str:
    """Return the section of results that a card has."""
    return "## Results" + card.partition("## Results")[2].partition("\n\n## ")[0]


def _describe_way(stages: list[dict[str, Any]]) -> str:
    if not any(stage["alpha"] for stage in stages):
        return ""
    if stages[-1]["alpha"]:
        return f"in the first of the two stages of PAIR {_PAIR} "
    return f"the PAIR way {_PAIR}, "


def _format_header(base: str) -> str:
    lines = ["---", "library_name: sentence-transformers", "pipeline_tag: sentence-similarity", "tags:"]
    lines += [f"- {tag}" for tag in _TAGS]
    if base.count("/") == 1:  # organisation/name of the hub
        lines.append(f"base_model: {json.dumps(base)}")
    return "\n".join([*lines, "---"])


def _format_results(measured: Measured | None) -> str:
    if measured is None:
        return f"## Results\n\n{_UNMEASURED}: `pairdr run` measures the models of its table, `pairdr evaluate` any."
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


def _format_training(facts: dict[str, Any], start: Manifest, base: str) -> str:
    lines = ["## Training", ""]
    before = len(start.facts.get("stages", []))
    for number, stage in enumerate(facts["stages"], start=1):
        loss = f"(1 - {stage['alpha']:g}) L_Q + {stage['alpha']:g} L_P" if stage["alpha"] else "L_Q"
        rows = f"{' and '.join(stage['sources'])} rows" + (f", in `{base}`" if number <= before else "")
        lines.append(f"{number}. {stage['name'].replace('_', '-')}: {loss}, on the {rows}")
    last = facts["summary"]
    lines += [
        "",
        f"The last stage saw {facts['examples']} rows in {last['step']} steps and ended at a loss of "
        f"{last['loss']:.4f}. `training.jsonl` beside this card has its whole log.",
    ]
    return "\n".join(lines)


def _format_data(collection: Collection, start: Manifest, base: str) -> str:
    labelled = len(collection.qrels("train"))
    text = (
        f"## Data\n\n`{collection.given_name}`: {len(collection.passages)} passages, {labelled} labelled training "
        f"queries, {len(collection.pool)} unlabelled ones. Licence of the data: {collection.licence}. "
        f"Fingerprint `{collection.fingerprint[:16]}`."
    )
    if start.facts.get("stages"):
        names = " and ".join(f"`{name}`" for name in start.options.get("trained_on", [])) or "data not recorded here"
        text += f"\n\nThe stages of `{base}` were trained on {names}; its own card says more of them."
    return text


def _format_origin(manifest: Manifest, command: str) -> str:
    ranks = manifest.options.get("ranks", 1)
    launcher = f"torchrun --nproc_per_node {ranks} -m -- " if ranks > 1 else ""
    content = {"options": manifest.options, "inputs": manifest.inputs, "weights": manifest.facts["weights_sha256"]}
    return (
        f"## How it was made\n\n```sh\n{launcher}{command}\n```\n\n"
        "Options of the last stage, fingerprints of what it read, and the sha256 of the weights; "
        "`manifest.json` has them all.\n\n```json\n" + json.dumps(content, indent=1) + "\n```"
    )


def _find_intervals(values: PerQuery, config: EvaluateConfig) -> dict[str, tuple[float, float]]:
    return {
        name: find_interval(list(by_query.values()), resamples=config.resamples, seed=config.test_seed)
        for name, by_query in values.items()
    }
