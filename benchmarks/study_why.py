"""Where the passage-centric loss gains, or why it cannot: short runs, judged on dev. The protocol is docs/study.md.

    PAIRDR_DATA=... python benchmarks/study_why.py run --work FOLDER [--probes base raw ...] [--alphas 0 0.3]
    python benchmarks/study_why.py report [--probes ...]

The work folder is that of study.py, whose examples are used; what is found goes into docs/study/why.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from study import BATCH, DATA_SEED, MODEL, TRAIN, Below, label_again, list_triples, prepare, save_start
from study_runs import RESULTS, HoursSpentError, make_all, make_run
from study_tables import compare_seeds, judge
from torch.nn.utils import parameters_to_vector

from pairdr.config import StageConfig
from pairdr.encoder import DualEncoder
from pairdr.files import replace_file
from pairdr.losses import passage_centric_loss, query_centric_loss
from pairdr.progress import quiet_libraries, say
from pairdr.records import positives_of
from pairdr.table import say_p
from pairdr.train import train_model
from pairdr.work import Work

FOUND = RESULTS / "why"
SEEDS, STEPS, RATE, PASSAGES, GRADIENTS = (1, 2, 3), 200, 3e-4, 5_000, 8
ALPHAS = (0.0, 0.3)
Floats = npt.NDArray[np.float64]


class Probe(NamedTuple):
    """A line of the protocol's second table."""

    name: str
    alphas: tuple[float, ...] = ALPHAS
    start: str = "tuned"
    temperature: float | None = None
    sources: tuple[str, ...] = ("pseudo", "labelled")
    below: Below = "s_neg"
    steps: int = STEPS
    options: tuple[tuple[str, Any], ...] = ()


PROBES = (
    Probe("base", alphas=(0.0, 0.1, 0.3, 0.6, 1.0)),
    Probe("raw", start="raw"),
    Probe("labelled", sources=("labelled",)),
    Probe("pseudo", sources=("pseudo",)),
    Probe("plain", sources=("plain",)),
    Probe("plain_pseudo", alphas=(0.0,), sources=("pseudo", "plain")),
    Probe("below_positive", alphas=(0.0,), sources=("labelled",), below="positive"),
    Probe("below_positive_pseudo", alphas=(0.0,), below="positive"),
    Probe("temperature_0.01", temperature=0.01),
    Probe("temperature_0.2", temperature=0.2),
    Probe("batch_4", steps=4 * STEPS, options=(("per_device_train_batch_size", BATCH // 4),)),
    Probe("batch_64", steps=STEPS // 4, options=(("per_device_train_batch_size", 4 * BATCH), ("grad_cache", True))),
    Probe("hard_all", options=(("passage_negatives", "hard_all"),)),
    Probe("paper_schedule", options=(("lr_schedule", "paper"),)),
    Probe("no_decay", options=(("weight_decay", 0.0),)),
)
PARTS = (
    ("labelled", "plain", "the teacher's choice of negatives"),
    ("base", "plain_pseudo", "the same, with pseudo-labelled rows"),
    ("base", "labelled", "pseudo-labelled rows"),
    ("plain_pseudo", "plain", "the same, with negatives as mined"),
    ("below_positive", "labelled", "negatives below the positive, not s_neg"),
    ("below_positive", "plain", "the same, against all that were mined"),
    ("below_positive_pseudo", "base", "negatives below the positive, not s_neg, with pseudo-labelled rows"),
    ("below_positive_pseudo", "plain_pseudo", "the same, against all that were mined"),
)
"""Pairs of probes that differ by one thing, without the passage-centric loss."""


class Dev:
    """Dev queries, a triple of each, and a sample of passages that holds all theirs.

    Attributes:
        quarters: for each query, the quarter it is in by a property of its triple at the tuned start: `margin` is
            s(q,p+) - s(p+,p-), `likeness` s(p+,p-); 0 is the smallest.
        sources: for each query, the data set that it came from.
    """

    def __init__(self, work: Work) -> None:
        self.triples = list_triples(work, "dev")
        qrels, data = work.collection.qrels("dev"), work.collection
        positives = [positives_of(qrels, query.query_id) for query, _, _ in self.triples]
        drawn = random.Random(DATA_SEED).sample(range(len(data.passages)), PASSAGES)
        needed = {p for row in positives for p in row} | {negative.passage_id for _, _, negative in self.triples}
        ids = sorted(needed | {data.passages.id_of(row) for row in drawn})
        places = {passage_id: place for place, passage_id in enumerate(ids)}
        self.passages = [data.passage(passage_id) for passage_id in ids]
        self.positives = [[places[p] for p in row] for row in positives]
        self.pairs = np.array([[places[one.passage_id], places[two.passage_id]] for _, one, two in self.triples])
        self.sources = np.array([query.query_id.partition(":")[0] for query, _, _ in self.triples])
        start = DualEncoder.open(work.path("models", "start"), device="cpu")
        margin, likeness = self.compare(*self.encode(start))
        self.quarters = {"margin": _rank_quarters(margin), "likeness": _rank_quarters(likeness)}

    def encode(self, encoder: DualEncoder) -> tuple[Floats, Floats]:
        """Return [Q, D] and [n, D]."""
        queries = encoder.encode_queries([query.text for query, _, _ in self.triples])
        return queries.astype(float), encoder.encode_passages(self.passages).astype(float)

    def compare(self, queries: Floats, passages: Floats) -> tuple[Floats, Floats]:
        """Return s(q,p+) - s(p+,p-) and s(p+,p-), [Q] each."""
        positive, negative = passages[self.pairs[:, 0]], passages[self.pairs[:, 1]]
        likeness = (positive * negative).sum(1)
        return (queries * positive).sum(1) - likeness, likeness

    def measure(self, encoder: DualEncoder) -> dict[str, Any]:
        """Return RR@10 in points, over all, by quarters and by source, violated triples and gradients."""
        queries, passages = self.encode(encoder)
        scores = queries @ passages.T  # [Q, n]
        values = np.zeros(len(queries))
        for row, positives in enumerate(self.positives):
            rank = 1 + int((scores[row] > scores[row, positives].max()).sum())
            values[row] = 100 / rank if rank <= 10 else 0
        margin, _ = self.compare(queries, passages)
        quarters = {
            name: [float(values[quarter == at].mean()) for at in range(4)] for name, quarter in self.quarters.items()
        }
        sources = {name: float(values[self.sources == name].mean()) for name in sorted(set(self.sources.tolist()))}
        violated = float((margin <= 0).mean())
        measured = {"RR@10": float(values.mean()), "violated": violated, "quarters": quarters, "sources": sources}
        return measured | {"gradients": self.compare_gradients(encoder)}

    def compare_gradients(self, encoder: DualEncoder) -> dict[str, float]:
        """Return the cosine of the gradients of L_Q and L_P and the ratio of their lengths, means over some batches."""
        encoder.model.eval()  # no dropout
        parameters = [one for one in encoder.model.parameters() if one.requires_grad]
        drawn = random.Random(DATA_SEED).sample(self.triples, GRADIENTS * BATCH)
        found = []
        for at in range(0, len(drawn), BATCH):
            queries, positives, negatives = zip(*drawn[at : at + BATCH], strict=True)
            query = encoder.embed(encoder.tokenize_queries([one.text for one in queries]), "query")  # [B, D]
            positive, negative = (
                encoder.embed(encoder.tokenize_passages(ps), "passage") for ps in (positives, negatives)
            )
            by_query, by_passage = (
                parameters_to_vector(
                    torch.autograd.grad(
                        loss(query, positive, negative[:, None], temperature=encoder.temperature),
                        parameters,
                        retain_graph=True,
                        allow_unused=True,
                        materialize_grads=True,
                    )
                )
                for loss in (query_centric_loss, passage_centric_loss)
            )
            lengths = by_query.norm(), by_passage.norm()
            found.append([float(by_query @ by_passage / (lengths[0] * lengths[1])), float(lengths[1] / lengths[0])])
        cosine, ratio = np.mean(found, axis=0)
        return {"cosine": float(cosine), "ratio": float(ratio)}


def make_probe(
    folder: Path, dev: Dev, work: Work, probe: Probe, alpha: float, seed: int, place: Path
) -> dict[str, Any]:
    """Train and measure one run in a folder of its own."""
    say(f"{probe.name}, alpha {alpha:g}, seed {seed}")
    config = replace(TRAIN, learning_rate=RATE, seed=seed, alpha=alpha or TRAIN.alpha, **dict(probe.options))
    start = save_start(work, folder, probe.start, seed)
    if probe.temperature is not None:
        options = replace(MODEL, temperature=probe.temperature)
        start = place / "start"
        DualEncoder.load(options).save(start, options=options.as_dict(), inputs={})
    stage = StageConfig("pair" if alpha else "query_centric", alpha, probe.sources)
    examples, model = label_again(folder, work, probe.below), place / "model"
    encoder = train_model(work.collection, examples, start, [stage], config, model, device="cpu", max_steps=probe.steps)
    return dev.measure(encoder) | {"before": measure_start(folder, dev, start, probe, seed)}


def measure_start(folder: Path, dev: Dev, start: Path, probe: Probe, seed: int) -> dict[str, Any]:
    """Measure what a probe starts from, once for each start."""
    name = f"raw-{seed}" if probe.start == "raw" else f"{probe.start}-{probe.temperature or 'own'}"
    place = folder / "dev" / f"{name}.json"
    if not place.is_file():
        place.parent.mkdir(parents=True, exist_ok=True)
        replace_file(place, json.dumps(dev.measure(DualEncoder.open(start, device="cpu"))))
    found: dict[str, Any] = json.loads(place.read_text(encoding="utf-8"))
    return found


def print_probes(probes: Sequence[Probe]) -> None:
    """Print, for each probe, RR@10 at every alpha, and the paired difference to alpha 0."""
    for probe in probes:
        found = {alpha: _read_runs(probe, alpha) for alpha in probe.alphas}
        print(f"\n## {probe.name}")
        starts = [run["before"] for run in found[0.0].values()]
        if starts:
            print(f"{'start':12}{_describe(starts)}")
        for alpha, runs in found.items():
            print(f"alpha {alpha:<6g}" + (_describe(list(runs.values())) if runs else "not run"))
            if alpha:
                print_difference(runs, found[0.0])


def print_pooled(probes: Sequence[Probe]) -> None:
    """Print alpha 0.3 against alpha 0, as the mean over all probes of the tuned start that have both, by seed."""
    pooled = [probe for probe in probes if probe.start == "tuned" and all(_read_runs(probe, a) for a in ALPHAS)]
    if len(pooled) > 1:
        print(f"\n## alpha 0.3 - alpha 0, mean over {', '.join(probe.name for probe in pooled)}")
        print_difference(*(_average_runs([_read_runs(probe, alpha) for probe in pooled]) for alpha in ALPHAS[::-1]))


def print_parts() -> None:
    """Print what two parts of the pipeline do, from probes that differ by nothing else."""
    named = {probe.name: probe for probe in PROBES}
    for one, other, title in PARTS:
        print(f"\n## {title}: {one} - {other}, alpha 0")
        print_difference(_read_runs(named[one], 0.0), _read_runs(named[other], 0.0))


def print_difference(mine: dict[int, Any], theirs: dict[int, Any]) -> None:
    """Print the paired difference over seeds, by quarters of the queries, and by source."""
    pairs = [(mine[seed], theirs[seed]) for seed in sorted(mine.keys() & theirs.keys())]
    if len(pairs) < 2:
        print(f"{'':12}fewer than two seeds")
        return
    mean, low, high, p_value, detectable = compare_seeds([one["RR@10"] - other["RR@10"] for one, other in pairs])
    print(f"{'':12}{mean:+.2f} ({low:+.2f} to {high:+.2f}), {say_p(p_value)}: {judge(mean, low, high, detectable)}")
    for name in ("margin", "likeness"):
        gaps = np.array([np.subtract(one["quarters"][name], other["quarters"][name]) for one, other in pairs])  # [n, 4]
        quarters = "  ".join(_say_gap(gaps[:, at]) for at in range(4))
        print(f"{'':12}by {name} at the start, low to high: {quarters}  high - low {_say_gap(gaps[:, 3] - gaps[:, 0])}")
    print(f"{'':12}by source: " + "  ".join(_compare_source(name, pairs) for name in pairs[0][0]["sources"]))


def _average_runs(found: Sequence[dict[int, Any]]) -> dict[int, Any]:
    """Return for each seed that all have the means of their runs."""
    return {
        seed: {
            "RR@10": np.mean([runs[seed]["RR@10"] for runs in found]),
            "quarters": {
                name: np.mean([runs[seed]["quarters"][name] for runs in found], axis=0)
                for name in found[0][seed]["quarters"]
            },
            "sources": {
                name: np.mean([runs[seed]["sources"][name] for runs in found]) for name in found[0][seed]["sources"]
            },
        }
        for seed in sorted(set.intersection(*(set(runs) for runs in found)))
    }


def _compare_source(name: str, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    return f"{name} {_say_gap([one['sources'][name] - other['sources'][name] for one, other in pairs])}"


def _say_gap(gaps: Sequence[float]) -> str:
    mean, _, _, p_value, _ = compare_seeds(gaps)
    return f"{mean:+.2f} ({say_p(p_value)})"


def _describe(found: Sequence[dict[str, Any]]) -> str:
    mean, violated = (np.mean([run[name] for run in found]) for name in ("RR@10", "violated"))
    cosine, ratio = (np.mean([run["gradients"][name] for run in found]) for name in ("cosine", "ratio"))
    gradients = f"gradients of L_Q and L_P: cosine {cosine:.2f}, |L_P| / |L_Q| {ratio:.2f}"
    return f"RR@10 {mean:.2f}, violated {violated:.1%}, {gradients}, {len(found)} seeds"


def _read_runs(probe: Probe, alpha: float) -> dict[int, Any]:
    places = {seed: _name(probe, alpha, seed) for seed in SEEDS}
    return {seed: json.loads(place.read_text(encoding="utf-8")) for seed, place in places.items() if place.is_file()}


def _name(probe: Probe, alpha: float, seed: int) -> Path:
    return FOUND / f"{probe.name}-{alpha:g}-{seed}.json"


def _rank_quarters(values: Floats) -> npt.NDArray[np.int64]:
    return 4 * values.argsort().argsort() // len(values)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("run", "report"))
    parser.add_argument("--work", type=Path, help="where runs are made")
    parser.add_argument("--probes", nargs="*", default=[probe.name for probe in PROBES])
    parser.add_argument("--alphas", nargs="*", type=float, help="these alone of a probe's")
    parser.add_argument("--hours", type=float, default=8.0, help="processor hours in all")
    options = parser.parse_args()
    probes = [probe for probe in PROBES if probe.name in options.probes]
    if options.what == "report":
        print_probes(probes)
        print_pooled(probes)
        print_parts()
        return
    if options.work is None:
        parser.error("run wants --work")
    quiet_libraries()
    work = prepare(options.work, 0.5)
    dev = Dev(work)

    def run(probe: Probe, alpha: float, seed: int) -> dict[str, Any]:
        result = _name(probe, alpha, seed)
        make = partial(make_probe, options.work, dev, work, probe, alpha, seed)
        return make_run(result, options.work / "runs" / f"why-{result.stem}", make, options.hours)

    try:
        make_all(FOUND, [partial(run, *one) for one in list_runs(probes, options.alphas)])
    except HoursSpentError:
        say("the hours are spent")


def list_runs(probes: Sequence[Probe], alphas: Sequence[float] | None) -> list[tuple[Probe, float, int]]:
    """Return the runs, probe by probe and seed by seed; of some alphas alone where they are given."""
    return [
        (probe, alpha, seed)
        for probe in probes
        for seed in SEEDS
        for alpha in probe.alphas
        if alphas is None or alpha in alphas
    ]


if __name__ == "__main__":
    main()
