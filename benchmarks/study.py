"""What pseudo labels add, and what the passage-centric loss: the protocol is docs/study.md.

    PAIRDR_DATA=... python benchmarks/study.py run --work FOLDER [--cells main raw ...] [--seeds 3] [--hours 16]
    python benchmarks/study.py report [--cells ...]

`run` makes one run after the other, and goes on where it stopped; several processes with the same folder share the
runs. None begins a further one once the processor hours of all runs reach --hours. What is found of a run is a small
file in docs/study, which is committed: the work folder may be lost, or another machine go on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from study_runs import RESULTS, HoursSpentError, TakenError, make_all, make_run, write_result
from study_tables import MEASURE, RANKS, print_tables

from pairdr import makers
from pairdr.artefact import read_manifest
from pairdr.collection import Collection, open_collection
from pairdr.config import (
    DataConfig,
    LabelConfig,
    MineConfig,
    ModelConfig,
    RunConfig,
    SearchConfig,
    StageConfig,
    TrainConfig,
    WarmConfig,
    list_stages,
)
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.files import hold_lock, replace_file
from pairdr.formats import write_qrels
from pairdr.lexical import LexicalIndex
from pairdr.measures import measure_run
from pairdr.pipeline import run_steps
from pairdr.progress import quiet_libraries, say
from pairdr.records import Passage, Query, Run, positives_of
from pairdr.search import rank_dense
from pairdr.train import train_model
from pairdr.watch import DevSample
from pairdr.work import Work

ARMS = ("labelled_only", "query_centric", "pair")
SETS = ("en_qa_mix", "vaswani_npl", "cacm", "nq_small")
MEASURES = (MEASURE, "nDCG@10", "R@100")
Below = Literal["s_neg", "positive"]
QUERIES, PASSAGES, DATA_SEED = 10_000, 15_000, 13
STEPS, BATCH, LAYERS = 300, 16, 2
RATES, RATE_SEED, RATE_STEPS = (1e-4, 3e-4, 1e-3), 1000, 150
WARM_RATE = 3e-4
TRIPLES = 2000
MODEL = ModelConfig(start="minilm", layers=LAYERS, query_length=32, passage_length=48, device="cpu")
TRAIN = TrainConfig(
    dropout=0.0, per_device_train_batch_size=BATCH, eval_steps=10**6, eval_queries=100, eval_passages=500
)
DEV = replace(TRAIN, eval_queries=1000, eval_passages=5000, seed=RATE_SEED)


class Cell(NamedTuple):
    """A line of the protocol's table."""

    name: str
    arms: tuple[str, ...] = ARMS
    seeds: tuple[int, ...] = (1, 2, 3)
    start: str = "tuned"
    hidden: float = 0.5
    options: tuple[tuple[str, Any], ...] = ()
    both_stages: bool = False
    warm: bool = False
    below: Below = "s_neg"


CELLS = (
    Cell("main", seeds=(1, 2, 3, 4, 5)),
    Cell("warm", ARMS[1:], warm=True),
    Cell("below_positive", ARMS[1:], below="positive"),
    Cell("raw", start="raw"),
    Cell("few", hidden=0.95),
    Cell("large_batch", ARMS[1:], options=(("per_device_train_batch_size", 4 * BATCH), ("grad_cache", True))),
    Cell("alpha_0.3", ("pair",), options=(("alpha", 0.3),)),
    Cell("samtone", ("query_centric",), options=(("query_negatives", True),)),
    Cell("hard_all", ("pair",), options=(("passage_negatives", "hard_all"),)),
    Cell("both_stages", ("pair",), both_stages=True),
    Cell("unmasked", ARMS[1:], options=(("mask_false_negatives", False),)),
)


def write_sample(folder: Path) -> Path:
    """Write en_qa_mix with 10,000 of its training queries, once."""
    if not (folder / "queries.jsonl").is_file():
        source = Path(os.environ["PAIRDR_DATA"]) / SETS[0]
        data = open_collection(source)
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "qrels").mkdir(parents=True)
        shutil.copy(source / "corpus.jsonl.gz", folder)
        splits = {split: data.labels(split) for split in ("train", "dev", "test")}
        drawn = random.Random(DATA_SEED).sample(sorted(splits["train"]), QUERIES)
        splits["train"] = {query_id: splits["train"][query_id] for query_id in sorted(drawn)}
        for split, qrels in splits.items():
            write_qrels(folder / "qrels" / f"{split}.tsv", qrels)
        ids = [query_id for qrels in splits.values() for query_id in qrels]
        lines = [json.dumps({"_id": query_id, "text": data.query(query_id).text}) + "\n" for query_id in ids]
        replace_file(folder / "queries.jsonl", "".join(lines))
    return folder


def write_test_set(folder: Path) -> Path:
    """Write the test queries of en_qa_mix over a sample of its passages that holds all of theirs, once."""
    place = folder / "test"
    if not (place / "queries.jsonl").is_file():
        data = open_collection(folder / "data")
        qrels = data.labels("test")
        needed = {passage_id for labels in qrels.values() for passage_id in labels}
        others = sorted({data.passages.id_of(row) for row in range(len(data.passages))} - needed)
        drawn = random.Random(DATA_SEED).sample(others, PASSAGES - len(needed))
        (place / "qrels").mkdir(parents=True, exist_ok=True)
        write_qrels(place / "qrels" / "test.tsv", qrels)
        passages = [data.passage(passage_id) for passage_id in sorted({*needed, *drawn})]
        lines = [json.dumps({"_id": one.passage_id, "title": one.title, "text": one.text}) for one in passages]
        replace_file(place / "corpus.jsonl", "\n".join(lines) + "\n")
        lines = [json.dumps({"_id": query_id, "text": data.query(query_id).text}) for query_id in qrels]
        replace_file(place / "queries.jsonl", "\n".join(lines) + "\n")
    return place


def prepare(folder: Path, hidden: float, *, warm: bool = False) -> Work:
    """Mine, teach and label for a share of hidden labels, once, and return the work folder.

    Args:
        folder: of the study.
        hidden: share of the labels.
        warm: let the start be trained on the labels before it mines and teaches.
    """
    config = RunConfig(
        data=DataConfig(hide_labels=hidden),
        model=MODEL,
        warm=WarmConfig(warm="always" if warm else "auto", warm_steps=STEPS),
        mine=MineConfig(depth=100),
        label=LabelConfig(label_depth=20, negatives_below="s_neg"),
        train=replace(TRAIN, learning_rate=WARM_RATE),
    )
    with hold_lock(folder):
        data = open_collection(write_sample(folder / "data"), config.data)
        write_test_set(folder)
        work = Work(folder / f"prepared-{hidden:g}{'-warm' * warm}", data, config)
        run_steps(work, last="label")
    return work


def label_again(folder: Path, work: Work, below: Below) -> Path:
    """Return the examples whose labelled rows keep negatives below a limit, made once."""
    if below == work.config.label.negatives_below:
        return work.path("examples")
    place = f"examples-below-{below}"
    with hold_lock(folder):
        if not work.path(place).is_dir():
            options = replace(work.config.label, negatives_below=below)
            other = Work(work.folder, work.collection, replace(work.config, label=options))
            makers.label(other, work.student, "candidates", "teacher", place)
    return work.path(place)


def save_start(work: Work, folder: Path, kind: str, seed: int) -> Path:
    """Return the start model: that of the work folder, or one whose upper layers are drawn anew."""
    if kind == "tuned":
        return work.path("models", "start")
    place, bare = folder / "starts" / f"raw-{seed}", folder / "starts" / f"bare-{seed}"
    if not place.exists():
        tuned = DualEncoder.load(MODEL).model[0]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for layer in tuned.model.encoder.layer[1:]:
                layer.apply(tuned.model._init_weights)
        for part in (tuned.model, tuned.tokenizer):
            part.save_pretrained(bare)
        options = replace(MODEL, start=str(bare), layers=None)  # a bare encoder: cls, dot product, temperature 1
        DualEncoder.load(options).save(place, options=options.as_dict(), inputs={})
    return place


def make_stages(arm: str, cell: Cell, config: TrainConfig) -> tuple[StageConfig, ...]:
    """Return the stages of an arm in a cell."""
    stages = list_stages(arm, config)
    return (stages[0], replace(stages[0], name="pair_again")) if cell.both_stages else stages


def find_run(
    folder: Path, cell: Cell, arm: str, seed: int, rate: float, hours: float, *, only_dev: bool = False
) -> dict[str, Any]:
    """Make a run of a cell, or read what was found; raises as `make_run` does."""
    name = f"{cell.name}-{arm}-{seed}" + (f"-{rate:g}" if only_dev else "")

    def make(place: Path) -> dict[str, Any]:
        return train_and_measure(folder, cell, arm, seed, rate, place, only_dev=only_dev)

    return make_run(RESULTS / f"{name}.json", folder / "runs" / name, make, hours)


def train_and_measure(
    folder: Path, cell: Cell, arm: str, seed: int, rate: float, place: Path, *, only_dev: bool
) -> dict[str, Any]:
    """Train one run in a folder of its own, and return what is measured of it."""
    say(f"{cell.name} {arm}, seed {seed}, learning rate {rate:g}{', for dev alone' if only_dev else ''}")
    work = prepare(folder, cell.hidden, warm=cell.warm)
    config = replace(TRAIN, learning_rate=rate, seed=seed, **dict(cell.options))
    stages = make_stages(arm, cell, config)
    rows = (RATE_STEPS if only_dev else STEPS) * BATCH
    steps = rows // config.per_device_train_batch_size * (2 if len(stages) == 1 else 1)
    start = save_start(work, folder, cell.start, seed)
    examples = label_again(folder, work, cell.below)
    encoder = train_model(
        work.collection, examples, start, stages, config, place / "model", device="cpu", max_steps=steps
    )
    facts = read_manifest(place / "model", "model").facts
    found = {
        "learning_rate": rate,
        "examples": read_manifest(examples, "examples").fingerprint,
        "last": facts["summary"],
    }
    if only_dev:
        return found | {"dev": DevSample(work.collection, DEV).measure(encoder)}
    return found | measure_model(folder, work, encoder, place / "vectors", measure_before(work, start, folder))


def measure_model(
    folder: Path, work: Work, encoder: DualEncoder, vectors: Path, before: Mapping[str, Sequence[float]] | None
) -> dict[str, Any]:
    """Return what is measured of a model: all sets, and the relation that L_P asks for beside that of its start."""
    values = {name: measure_set(folder, encoder, name, vectors / name) for name in SETS}
    after = measure_margins(work, encoder)
    return {
        "sets": {name: pack_measures(found) for name, found in values.items()},
        "relation": describe_relation(after if before is None else before, after, values[SETS[0]][MEASURE]),
    }


def pack_measures(values: Mapping[str, Mapping[str, float]]) -> dict[str, Any]:
    """Return a set's measures in little room: RR@10 as the ranks of its queries, by id, the others as means."""
    ranks = [0 if value == 0 else round(1 / value) for _, value in sorted(values[MEASURE].items())]
    means = {name: round(float(np.mean(list(values[name].values()))), 6) for name in MEASURES[1:]}
    return {"ranks": "".join(RANKS[rank] for rank in ranks), **means}


def describe_relation(
    before: Mapping[str, Sequence[float]], after: Mapping[str, Sequence[float]], scores: Mapping[str, float]
) -> dict[str, Any]:
    """Return how often s(q,p+) <= s(p+,p-), and RR@10 of the queries for which it was so before, and of the others."""
    was = {query_id: own <= cross for query_id, (own, _, cross) in before.items()}
    groups = {flag: [scores[q] for q in was if was[q] == flag] for flag in (True, False)}
    return {
        "triples": len(was),
        "violated_before": float(np.mean(list(was.values()))),
        "violated_after": float(np.mean([own <= cross for own, _, cross in after.values()])),
        "means_before": np.mean(list(before.values()), axis=0).round(4).tolist(),
        "means_after": np.mean(list(after.values()), axis=0).round(4).tolist(),
        "scores": {
            str(flag).lower(): round(float(np.mean(found)), 6) if found else None for flag, found in groups.items()
        },
    }


def open_set(folder: Path, name: str) -> Collection:
    """Open a test set."""
    return open_collection(folder / "test" if name == SETS[0] else Path(os.environ["PAIRDR_DATA"]) / name)


def measure_set(folder: Path, encoder: DualEncoder, name: str, place: Path) -> dict[str, dict[str, float]]:
    """Return the measures per query of a test set."""
    data = open_set(folder, name)
    store = encode_corpus(data, encoder, RunConfig().encode, place / name)
    qrels = data.qrels("test")
    queries = [data.query(query_id) for query_id in qrels]
    ranked = {}
    for ids, hits in rank_dense(queries, encoder, store, SearchConfig(k=100)):
        ranked |= dict(zip(ids, hits, strict=True))
    return measure_run(Run.from_mapping(ranked), qrels, MEASURES)


def list_triples(work: Work, split: str = "test") -> list[tuple[Query, Passage, Passage]]:
    """Return up to 2,000 queries with a positive and BM25's best passage that is not relevant."""
    data, index = work.collection, LexicalIndex(work.path("bm25"))
    qrels = data.qrels(split)
    triples = []
    for query_id in sorted(random.Random(DATA_SEED).sample(sorted(qrels), min(TRIPLES, len(qrels)))):
        positives, query = positives_of(qrels, query_id), data.query(query_id)
        found = index.ids_of(index.search(query.text, 10 + len(positives))[0])
        negative = next((passage_id for passage_id in found if passage_id not in positives), None)
        if positives and negative is not None:
            triples.append((query, data.passage(positives[0]), data.passage(negative)))
    return triples


def measure_margins(work: Work, encoder: DualEncoder) -> dict[str, list[float]]:
    """Return, per query, s(q,p+), s(q,p-) and s(p+,p-)."""
    triples = list_triples(work)
    query = encoder.encode_queries([triple[0].text for triple in triples])
    positive, negative = (encoder.encode_passages([triple[at] for triple in triples]) for at in (1, 2))
    pairs = [(query, positive), (query, negative), (positive, negative)]
    values = np.round(np.array([np.einsum("nd,nd->n", one, other) for one, other in pairs]), 5)
    return {triple[0].query_id: row for triple, row in zip(triples, values.T.tolist(), strict=True)}


def measure_before(work: Work, start: Path, folder: Path) -> dict[str, list[float]]:
    """Return the margins of a start model, measured once for each share of hidden labels."""
    place = folder / "before" / f"{work.folder.name}-{start.name}.json"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, json.dumps(measure_margins(work, DualEncoder.open(start, device="cpu"))))
    margins: dict[str, list[float]] = json.loads(place.read_text(encoding="utf-8"))
    return margins


def measure_start(folder: Path) -> None:
    """Measure the start itself, once, unless another process does so."""
    result = RESULTS / "start.json"
    work = prepare(folder, 0.5)
    with suppress(BlockingIOError), hold_lock(folder / "start", wait=False):
        if not result.is_file():
            encoder = DualEncoder.open(work.path("models", "start"), device="cpu")
            write_result(result, measure_model(folder, work, encoder, folder / "start", None))
            shutil.rmtree(folder / "start")


def choose_rate(folder: Path, cell: Cell, arm: str, hours: float) -> float:
    """Return the learning rate that is best on dev for an arm; cells with another start have one of their own.

    Raises:
        TakenError: another process has not yet ended a run that counts.
    """
    judged = next(other for other in CELLS if other.start == cell.start)
    found = {}
    for rate in RATES:
        with suppress(TakenError):
            found[rate] = find_run(folder, judged, arm, RATE_SEED, rate, hours, only_dev=True)["dev"]
    if len(found) < len(RATES):
        raise TakenError
    return max(found, key=lambda rate: found[rate])


def find_best_run(folder: Path, cell: Cell, arm: str, seed: int, hours: float) -> dict[str, Any]:
    """Make a run at its arm's learning rate, which is chosen before, or read what was found."""
    return find_run(folder, cell, arm, seed, choose_rate(folder, cell, arm, hours), hours)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--work", type=Path, help="where runs are made")
    parser.add_argument("--cells", nargs="*", default=[cell.name for cell in CELLS])
    parser.add_argument("--seeds", type=int, default=5, help="at most so many of a cell")
    parser.add_argument("--hours", type=float, default=8.0 * (os.cpu_count() or 1), help="processor hours in all")
    options = parser.parse_args()
    cells = [cell for cell in CELLS if cell.name in options.cells]
    if options.what == "report":
        print_tables(RESULTS, cells, CELLS[0])
        return
    if options.work is None:
        parser.error("run wants --work")
    quiet_libraries()
    measure_start(options.work)
    # Seed by seed, so that an unfinished cell has all arms of some seeds.
    runs = [
        partial(find_best_run, options.work, cell, arm, seed, options.hours)
        for cell in cells
        for seed in cell.seeds[: options.seeds]
        for arm in cell.arms
    ]
    try:
        make_all(RESULTS, runs)
    except HoursSpentError:
        say("the hours are spent")


if __name__ == "__main__":
    main()
