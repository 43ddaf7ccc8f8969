"""Checkpoints: what training needs to go on exactly, in folders that are whole or absent.

A checkpoint is an artefact: written beside, hashed, fsynced, renamed. On resuming every byte is checked against its
hash; a broken newest one is named and the one before it is used. No random state is kept, since every step seeds the
generators from its number; no pickle is written.
"""

from __future__ import annotations

import json
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, load_model, save_file, save_model
from torch import nn

from pairdr.artefact import Manifest, publish, read_manifest, verify_artefact
from pairdr.errors import ArtefactError, UsageError
from pairdr.files import write_json
from pairdr.progress import say
from pairdr.ranks import count_ranks, find_rank, wait_for_ranks

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class Checkpoints:
    """The checkpoints of one stage: `<folder>/step-00000100` and so on.

    Args:
        folder: where they stand.
        options: what the stage is trained with; checkpoints of other options are not resumed.
        inputs: fingerprints of what it is trained from, likewise.
        keep: how many are kept, beside the best on dev.
    """

    def __init__(self, folder: Path, options: Mapping[str, Any], inputs: Mapping[str, str], keep: int) -> None:
        self.folder, self.keep = folder, keep
        self.options, self.inputs = json.loads(json.dumps(dict(options))), dict(inputs)

    def save(
        self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], best: int
    ) -> None:
        """Write a checkpoint and delete those that are no longer kept.

        Args:
            step: optimizer steps that are done.
            model: its parameters and buffers are kept.
            optimizer: its state is kept.
            state: what else the loop needs, as JSON.
            best: the step of the best checkpoint on dev, which stays.
        """
        if find_rank() == 0:
            place = self._place(step)
            for given_up in self._list():  # newer ones: damaged, or of a run that was begun anew
                if given_up >= place:
                    shutil.rmtree(given_up)
            with publish(place, "checkpoint", options=self.options, inputs=self.inputs) as staging:
                staging.facts |= {"step": step, "ranks": count_ranks()}
                save_model(model, str(staging.path / MODEL))
                tensors, rest = _flatten(optimizer)
                save_file(tensors, str(staging.path / OPTIMIZER))
                write_json(staging.path / STATE, state | {"optimizer": rest})
            fitting = [found for found in self._list() if self._fits(found)]
            kept = {*fitting[: self.keep], self._place(best)}
            for stale in set(self._list()) - kept:
                shutil.rmtree(stale, ignore_errors=True)
        wait_for_ranks()

    def load_newest(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
        """Load the newest checkpoint whose bytes are those that were written; return its state, or None.

        Raises:
            UsageError: it was written by another number of ranks.
        """
        for begun in sorted(self.folder.glob(".step-*.partial")):
            say(f"pairdr: {begun}: only begun, by a call that was ended; the checkpoint before it is used.")
        for place in self._list():
            if not self._fits(place, warn=True):
                continue
            require_ranks(read_manifest(place).facts["ranks"], place, stale=self.folder)
            load_model(model, str(place / MODEL))
            state: dict[str, Any] = json.loads((place / STATE).read_text(encoding="utf-8"))
            tensors = load_file(str(place / OPTIMIZER), device=str(next(model.parameters()).device))
            optimizer.load_state_dict(_unflatten(tensors, state.pop("optimizer")))
            return state
        return None

    def load_model(self, step: int, model: nn.Module) -> bool:
        """Load the parameters of one checkpoint if every byte is right; else say so, and return False."""
        if not self._fits(self._place(step), warn=True):
            return False
        load_model(model, str(self._place(step) / MODEL))
        return True

    def remove(self) -> None:
        """Delete all checkpoints: the stage is done."""
        if find_rank() == 0:
            shutil.rmtree(self.folder, ignore_errors=True)

    def _place(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _list(self) -> list[Path]:
        """Return the checkpoint folders, newest first."""
        return sorted(self.folder.glob("step-*"), reverse=True) if self.folder.is_dir() else []

    def _fits(self, place: Path, *, warn: bool = False) -> bool:
        """Return whether a checkpoint is whole and of this training; with `warn` every byte is checked."""
        try:
            manifest: Manifest = verify_artefact(place) if warn else read_manifest(place, "checkpoint")
        except ArtefactError as error:
            if warn:
                say(f"pairdr: {error.path}: {error.what} The checkpoint before it is used, if there is one.")
            return False
        wanted, found = ({"inputs": self.inputs} | self.options, {"inputs": manifest.inputs} | manifest.options)
        other = sorted(name for name in {*wanted, *found} if wanted.get(name) != found.get(name))
        if other and warn:
            say(f"pairdr: {place}: made with other {', '.join(other)}; it is not used, and the next one replaces it.")
        return not other


def require_ranks(begun: int, place: Path, *, stale: Path) -> None:
    """Refuse to go on with another number of ranks than a training was begun with.

    Args:
        begun: that number.
        place: what it has made.
        stale: what has to go before the training can begin anew.

    Raises:
        UsageError: there are more ranks now, or fewer.
    """
    if begun != count_ranks():
        raise UsageError(
            f"This training was begun with {begun} ranks and cannot go on exactly with {count_ranks()}.",
            path=place,
            remedy=f"Start {begun} ranks, or delete {stale} to begin anew.",
        )


@contextmanager
def catch_termination() -> Iterator[threading.Event]:
    """Turn SIGTERM into an event while the block runs, so that a step can end and be saved."""
    stopped = threading.Event()
    if threading.current_thread() is not threading.main_thread():  # only the main thread may handle signals
        yield stopped
        return
    before = signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGTERM, before)


def _flatten(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Split an optimizer's state into tensors by name and the rest, which is JSON."""
    found = optimizer.state_dict()
    tensors: dict[str, torch.Tensor] = {}
    rest: dict[str, dict[str, Any]] = {}
    for number, values in found["state"].items():
        for name, value in values.items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().contiguous()
            else:
                rest.setdefault(str(number), {})[name] = value
    return tensors, {"state": rest, "param_groups": found["param_groups"]}


def _unflatten(tensors: Mapping[str, torch.Tensor], rest: Mapping[str, Any]) -> dict[str, Any]:
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in rest["state"].items()}
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}
