"""What README.md says in the folders of models: how one is used, what it came from, which command makes it.

A card ends with a line, unseen where it is shown, by which one sees whether anybody edited it. Of files and folders it
has the names alone: their place on this machine is nobody's business.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from pairdr.config import ModelConfig
from pairdr.files import hash_json
from pairdr.options import Options
from pairdr.sources.minilm import HUB_NAME
from pairdr.tokens import Contract

WIDTH = 100
"""Characters of a line of a command."""
_MODELS = ("start", "cross_encoder", "dual_encoder")
"""Options that name a hub's model or a folder."""


def sign_card(text: str) -> str:
    """Return a card with a line at its end, unseen where it is shown, by which one sees whether anybody edited it."""
    return f"{text}\n\n<!-- written by pairdr {hash_json(text)[:16]} -->\n"


def is_edited(card: str) -> bool:
    """Return whether a card is not as it was written."""
    text, _, _ = card.rpartition("\n\n<!--")
    return card != sign_card(text)


def describe_use(contract: Contract) -> str:
    """Return how a model is used, and its contract, as Markdown."""
    lines = [
        "## Use",
        "",
        "```python",
        "from sentence_transformers import SentenceTransformer",
        "",
        'model = SentenceTransformer("path/to/this/folder")',
        'queries = model.encode_query(["how do I parse a date?"])',
        'passages = model.encode_document(["datetime.strptime parses a date from a string"])',
        "print(model.similarity(queries, passages))",
        "```",
        "",
        format_contract(contract),
    ]
    if contract.title == "segment":
        lines += [
            "",
            "Titles are a segment of their own: give sentence-transformers (title, text) pairs; a joined string gives "
            "other vectors.",
        ]
    return "\n".join(lines)


def format_contract(contract: Contract) -> str:
    """Return a contract as a Markdown table."""
    rows = (f"| {key.replace('_', ' ')} | {json.dumps(value)} |" for key, value in asdict(contract).items())
    return "\n".join(["| contract | value |", "|---|---|", *rows])


def quote_card(card: str) -> str:
    """Return a card as part of another: without its header and its signature, with lower headings."""
    if card.startswith("---\n"):
        card = card.split("\n---\n", 1)[-1]
    lines, is_code = [], False
    for line in card.partition("\n\n<!-- written by pairdr")[0].strip().splitlines():
        is_code ^= line.startswith("```")
        lines.append(f"##{line}" if line.startswith("#") and not is_code else line)
    return "\n".join(lines)


def format_copy(config: ModelConfig, contract: Contract) -> str:
    """Return the card of a start model as pairdr keeps it, beside what is trained from it."""
    cut = "" if config.layers is None else f", cut after layer {config.layers}"
    return "\n\n".join(
        [
            f"# A copy of `{name_start(config.start)}`",
            f"These are the weights of `{name_start(config.start)}`{cut}, not trained here, with the contract below. "
            "Licence, data and limits are those of that model: its own card has them.",
            describe_use(contract),
        ]
    )


def name_start(start: str) -> str:
    """Return what a start model is called elsewhere."""
    return HUB_NAME if start == "minilm" else name_place(start)


def name_place(place: str) -> str:
    """Return the name of a folder, or that of the hub as it is."""
    return Path(place).resolve().name if Path(place).exists() or place.count("/") > 1 else place


def format_command(words: Sequence[str], *options: Options) -> str:
    """Return a command as a shell takes it, with those options that are not the default.

    Args:
        words: the command and its arguments.
        options: of all sections.
    """
    lines = [shlex.join(words)]
    for flag in (flag for section in options for flag in _list_flags(section)):
        if len(lines[-1]) + len(flag) < WIDTH:
            lines[-1] += f" {flag}"
        else:
            lines.append(f"    {flag}")
    return " \\\n".join(lines)


def _list_flags(options: Options) -> Iterator[str]:
    for spec in fields(options):
        value = getattr(options, spec.name)
        if isinstance(value, Options):
            yield from _list_flags(value)
        elif value != spec.default:
            yield _format_flag(spec.name, value)


def _format_flag(name: str, value: Any) -> str:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return f"--{flag}" if value else f"--no-{flag}"
    values = value if isinstance(value, tuple) else (value,)
    return shlex.join([f"--{flag}", *(_format_value(name, item) for item in values)])


def _format_value(name: str, value: Any) -> str:
    if isinstance(value, Path):
        return value.name
    return "none" if value is None else name_place(value) if name in _MODELS else str(value)
