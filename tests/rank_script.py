"""What tests run in processes of their own: two ranks over gloo, or a training run that is stopped or killed.

`python rank_script.py MODE FOLDER` reads FOLDER/plan.json, which `write_plan` wrote. Rows are made by hand from the
toy data, so that nothing has to be mined or labelled.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from pairdr import artefact, loop
from pairdr import train as training
from pairdr.batches import Batch, collate
from pairdr.collection import Collection, open_collection
from pairdr.config import ModelConfig, StageConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import PairdrError
from pairdr.formats import Examples, write_examples
from pairdr.ranks import average_gradients, count_ranks, find_rank, wait_for_ranks
from pairdr.records import Example, positives_of
from pairdr.tuning import densify_gradients, prepare_model

FEW = {"per_device_train_batch_size": 4, "eval_passages": 10, "eval_queries": 5, "learning_rate": 1e-3}
PAIR = StageConfig("pair", 0.1, ("labelled",))
STAGES = (PAIR, StageConfig("query_centric", 0.0, ("labelled",)))
NEGATIVES = (2, 2, 2, 2, 0, 0, 1, 2)
"""Negatives of the rows of a joint batch: the two ranks do not have equally many, nor equally many rows with any."""
NARROW = {"false_negative_margin": 0.02}
CASES: dict[str, tuple[float, dict[str, Any]]] = {
    "L_Q": (0.0, {}),
    "official": (0.3, {"passage_negatives": "official"}),
    "own": (0.3, {"passage_negatives": "own"}),
    "hard_all": (0.3, {"passage_negatives": "hard_all"}),
    "hard_all_pos": (0.3, {"passage_negatives": "hard_all_pos"}),
    "no masks": (0.3, {"mask_false_negatives": False}),
    "no negatives": (0.3, {"train_negatives": 0}),
    "a margin": (0.3, NARROW),
    "query_negatives": (0.0, {"query_negatives": True}),
    "symmetric": (0.0, {"symmetric": True}),
    "matryoshka": (0.3, {"matryoshka_dims": (8, 16)}),
    "listwise": (0.3, {"distillation": "listwise", "distillation_temperature": 2.0}),
    "margin_mse": (0.3, {"distillation": "margin_mse"}),
    "all at once": (0.3, NARROW | {"query_negatives": True, "symmetric": True, "matryoshka_dims": (8,)}),
    "own batches": (0.3, {"cross_batch_negatives": False}),
    "own batches, own negatives": (0.3, {"cross_batch_negatives": False, "passage_negatives": "own"}),
}


def write_plan(folder: Path, toy: Path, model: Path, **more: Any) -> dict[str, Any]:
    """Write a start model and 46 examples; return the plan that names them."""
    collection = open_collection(toy)
    DualEncoder.load(ModelConfig(start=str(model))).save(folder / "start", options={}, inputs={})
    inputs = {"collection": collection.fingerprint}
    with artefact.publish(folder / "examples", "examples", options={}, inputs=inputs) as staging:
        for source in ("labelled", "plain"):
            write_examples(staging.path / f"{source}.arrow", make_rows(collection, 46))
    return {"toy": str(toy), "start": str(folder / "start"), "examples": str(folder / "examples"), **more}


def make_rows(collection: Collection, count: int, least: int = 0) -> list[Example]:
    """Return examples; what answers every second row's question is also a negative, or the positive, of other rows."""
    draw = random.Random(5)
    labels = collection.qrels("train")
    queries = sorted(labels)[:count]
    answers = [positives_of(labels, query_id)[0] for query_id in queries]
    others = sorted({collection.passages.id_of(row) for row in range(len(collection.passages))} - set(answers))
    negatives = [draw.sample(others, max(least, NEGATIVES[at % len(NEGATIVES)])) for at in range(count)]
    rows = []
    for at, query_id in enumerate(queries):
        known = {answers[at]}
        if at % 2:
            known |= {*negatives[(at + 5) % count][:1], answers[(at + 3) % count]}
        scores = tuple(draw.uniform(-1, 1) for _ in negatives[at])
        taken, known_ids = tuple(negatives[at]), tuple(sorted(known))
        rows.append(Example(query_id, answers[at], taken, known_ids, "labelled", draw.uniform(1, 2), scores))
    return rows


def make_config(**options: Any) -> TrainConfig:
    return TrainConfig(**FEW | options)


def make_batch(rows: list[Example], config: TrainConfig, share: slice | None = None) -> Batch:
    rng = random.Random(0)
    return collate(rows, config.train_negatives, mask=config.mask_false_negatives, rng=rng, share=share)


def take_gradients(
    collection: Collection, encoder: DualEncoder, batch: Batch, alpha: float, config: TrainConfig
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Return the loss parts of one batch, and the parameters' gradients, averaged over ranks."""
    with prepare_model(encoder, config) as model:
        model.train()
        model.zero_grad()
        found, _ = loop.backward_batch(collection, encoder, batch, alpha, config)
        densify_gradients(model)
        average_gradients(model.parameters())
        gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
    return found, gradients


def list_cases() -> Iterator[tuple[str, float, TrainConfig, int]]:
    """Yield name, alpha, configuration and the least negatives of a row, each with and without a gradient cache."""
    for name, (alpha, options) in CASES.items():
        for cached in (False, True):
            more = {"train_negatives": 2, "dropout": 0.0, "tokens_per_forward": 128, "grad_cache": cached}
            config = make_config(**more | options)
            yield f"{name}, cached" if cached else name, alpha, config, int(config.passage_negatives == "own")


def start_ranks(folder: Path, count: int = 2) -> None:
    """Run `check` on some ranks until all have ended well."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    children = [start_child("check", folder, RANK=str(r), LOCAL_RANK=str(r), **common) for r in range(count)]
    said = [child.communicate(timeout=300)[1] for child in children]
    assert [child.returncode for child in children] == [0] * count, "\n".join(said)


def start_child(mode: str, folder: Path, **environment: str) -> subprocess.Popen[str]:
    """Start this file in a process of its own."""
    paths = {"PYTHONPATH": str(Path(__file__).resolve().parents[1]), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, __file__, mode, str(folder)],
        env=os.environ | paths | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def train_plan(plan: dict[str, Any], output: str | Path, **options: Any) -> DualEncoder:
    """Train both stages, or the first one alone, as a plan says."""
    config = make_config(**plan.get("options", {}) | options)
    stages = STAGES if plan.get("both") else STAGES[:1]
    return training.train_model(
        open_collection(plan["toy"]), plan["examples"], plan["start"], stages, config, output, device="cpu"
    )


def wrap(module: Any, name: str, before: Callable[..., None]) -> None:
    """Call something before every call of a module's function."""
    function = getattr(module, name)

    def wrapped(*parts: Any, **options: Any) -> Any:
        before(*parts, **options)
        return function(*parts, **options)

    setattr(module, name, wrapped)


def check_ranks(plan: dict[str, Any], folder: Path) -> None:
    """Write what this rank finds: gradients and losses of all cases, LoRA and LAMB, a stopped run, whole ones."""
    training.start_accelerator("cpu", make_config(), folder)
    rank, collection = find_rank(), open_collection(plan["toy"])
    encoder = DualEncoder.open(plan["start"], device="cpu")
    report: dict[str, Any] = {"losses": {}, "published": {}, "batches": [], "weights": []}
    gradients: dict[str, Tensor] = {}
    for name, alpha, config, least in list_cases():
        rows, share = make_rows(collection, 8, least), slice(4 * rank, 4 * rank + 4)
        if not config.cross_batch_negatives:
            rows, share = rows[share], slice(0, 4)
        found, taken = take_gradients(collection, encoder, make_batch(rows, config, share), alpha, config)
        report["losses"][name] = found
        gradients |= {f"{name}/{parameter}": value for parameter, value in taken.items()}
    if rank == 0:
        save_file(gradients, str(folder / "gradients.safetensors"))

    for options in ({"lora_rank": 2}, {"optimizer": "lamb"}):  # dropout draws other masks on each rank
        torch.manual_seed(rank)
        examples = Examples.open(Path(plan["examples"]) / "labelled.arrow")
        fresh = DualEncoder.open(plan["start"], device="cpu")
        loop.run_stage(collection, examples, fresh, PAIR, make_config(max_steps=2, **options), 2)
        report["weights"].append(fresh.hash_weights())

    written: list[str] = []
    wrap(artefact, "_seal", lambda staging, *rest: written.append(staging.name))
    wrap(loop, "backward_batch", lambda *rest: report["batches"].append(count_ranks()))
    if rank == 1:  # one rank alone is told to stop
        wrap(loop, "update_parameters", count_calls({2: lambda: os.kill(os.getpid(), signal.SIGTERM)}))
    try:
        train_plan(plan, folder / "stopped", **plan["joint"])
    except PairdrError as error:
        report["stopped"] = [error.exit_code, error.what]
    for name in ("joint", "again"):
        if count_ranks() == 2:  # else the ranks would write the same files at once
            written.clear()
            train_plan(plan, folder / name, **plan["joint"])
            report["published"][name] = list(written)
    if count_ranks() == 2:
        go_on_and_break(plan, folder, report)
    (folder / f"rank{rank}.json").write_text(json.dumps(report), encoding="utf-8")


def go_on_and_break(plan: dict[str, Any], folder: Path, report: dict[str, Any]) -> None:
    """Resume the stopped run in another place; then train with one gradient that is no number, on one rank."""
    if find_rank() == 0:
        shutil.copytree(folder / "stopped.stage1.checkpoints", folder / "resumed.stage1.checkpoints")
    wait_for_ranks()
    train_plan(plan, folder / "resumed", **plan["joint"])
    if find_rank() == 1:  # one rank alone has a gradient that is no number
        wrap(loop, "update_parameters", break_gradient)
    try:
        train_plan(plan, folder / "broken", **plan["joint"])
    except PairdrError as error:
        report["broken"] = error.what


def break_gradient(model: torch.nn.Module, *rest: Any) -> None:
    next(p.grad for p in model.parameters() if p.grad is not None and not p.grad.is_sparse).fill_(torch.nan)


def count_calls(actions: dict[int, Callable[[], None]]) -> Callable[..., None]:
    """Return a function that acts at its first, second, ... call."""
    calls: list[int] = []

    def count(*rest: Any) -> None:
        calls.append(1)
        actions.get(len(calls), lambda: None)()

    return count


def run_command(plan: dict[str, Any], folder: Path) -> None:
    """Run `pairdr`; wait at one batch for the file `go`, having written the file `paused`."""
    from pairdr.cli import main

    def pause() -> None:
        (folder / "paused").touch()
        while not (folder / "go").exists():
            time.sleep(0.01)

    wrap(loop, "backward_batch", count_calls({plan["pause_at"]: pause}))
    sys.argv = ["pairdr", *plan["command"]]
    main()


if __name__ == "__main__":
    mode, place = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    loop.measure_peak = lambda *rest: 1.0
    what = json.loads((place / "plan.json").read_text(encoding="utf-8"))
    if mode == "check":
        check_ranks(what, place)
    elif mode == "command":
        run_command(what, place)
    else:
        steps = (place / "steps").open("ab", buffering=0)
        wrap(loop, "update_parameters", lambda *rest: steps.write(b"."))
        train_plan(what, place / "model")
