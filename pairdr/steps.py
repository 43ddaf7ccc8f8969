"""The steps of `pairdr run`: what each makes, from what, with which options.

Read `list_steps` first: it is the table of contents of the package.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pairdr.artefact import publish, read_manifest
from pairdr.check import check_collection, fingerprint_start, require_sound
from pairdr.config import ARMS, RunConfig, TrainConfig, list_stages
from pairdr.costs import Cost, CostModel
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.errors import RefusedError, UsageError
from pairdr.formats import write_run, write_trec_run
from pairdr.fusion import fuse_runs, tune_run_weights
from pairdr.label import label_examples
from pairdr.lexical import index_words
from pairdr.measures import mean_measures, measure_run
from pairdr.mine import mine_candidates
from pairdr.progress import say
from pairdr.records import positives_of
from pairdr.search import rank_dense, rank_words, write_search
from pairdr.table import compare_systems, describe_fusion, describe_labels
from pairdr.teach import choose_teacher, read_recipe
from pairdr.teachers import load_teacher
from pairdr.train import count_steps, read_stage_examples, train_model
from pairdr.warm import warm_student
from pairdr.work import Work

FUSED = "pair_bm25"
NO_PASSAGE_CENTRIC: dict[str, Any] = {"alpha": 0.0, "passage_negatives": "official"}  # options that are not read then
POOL_SHARE = 0.5
"""Share of the pool that is taken to get a pseudo label when costs are predicted."""


@dataclass(frozen=True)
class Step:
    """One line of the table.

    Attributes:
        name: what the user reads.
        output: the artefact's folder, below the work folder.
        options: what it is made with.
        inputs: names of the steps whose artefacts it reads.
        make: makes the artefact.
        cost: predicts time and memory.
    """

    name: str
    output: str
    options: Any
    inputs: tuple[str, ...]
    make: Callable[[], Any]
    cost: Callable[[CostModel], Cost] = lambda _: Cost(1.0)


def list_steps(work: Work) -> list[Step]:
    """Return all steps of a run in order."""
    return [*_list_preparation(work), *_list_labelling(work), *_list_training(work), *_list_comparison(work)]


def list_arms(config: RunConfig) -> list[str]:
    """Return the models to train, PAIR last.

    Raises:
        UsageError: an unknown arm.
    """
    unknown = [arm for arm in config.arms if arm not in (*ARMS, "all")]
    if unknown:
        raise UsageError(f"Unknown arm {unknown[0]!r}.", remedy=f"There are: {', '.join(ARMS)}, all.")
    return [arm for arm in ARMS if "all" in config.arms or arm in config.arms or arm == "pair"]


def _list_preparation(work: Work) -> list[Step]:
    config, data = work.config, work.collection
    model = config.model.as_dict() | {"fingerprint": fingerprint_start(config.model.start)}
    steps = [
        Step("check", "check", model, ("collection",), partial(_check, work)),
        Step("start", "models/start", model, (), partial(_save_start, work, "start", config.model.layers)),
        Step(
            "bm25",
            "bm25",
            config.lexical.as_dict(),
            ("passages",),
            lambda: index_words(data, config.lexical, work.path("bm25")),
        ),
        _encode_step(work, "start"),
    ]
    if config.model.layers is not None:
        steps += [
            Step("whole", "models/whole", model, (), partial(_save_start, work, "whole", None)),
            _encode_step(work, "whole"),
        ]
    if work.student == "student":
        read = replace(config.train, **NO_PASSAGE_CENTRIC, num_train_epochs=1.0, max_steps=None)

        def warm() -> None:
            warm_student(
                data,
                work.index,
                work.path("models", "start"),
                config.warm,
                config.train,
                work.path("models", "student"),
                device=config.model.device,
            )

        steps += [
            Step(
                "student",
                "models/student",
                [config.warm.as_dict(), read.as_dict()],
                ("collection", "start", "bm25"),
                warm,
                lambda costs: _train_cost(costs, config.warm.warm_steps, config.train),
            ),
            _encode_step(work, "student"),
        ]
    return steps


def _list_labelling(work: Work) -> list[Step]:
    config, data, student = work.config, work.collection, work.student
    teaching = config.teach
    if config.model.layers is not None and teaching.dual_encoder is None:
        # The whole model that the start was cut from is a larger dual encoder, and at hand.
        teaching = replace(teaching, dual_encoder=str(work.path("models", "whole")))
    vectors = f"encode {student}"

    def mine() -> None:
        mine_candidates(
            data, work.encoder(student), work.store(student), work.index, config.mine, work.path("candidates")
        )
        counts = read_manifest(work.path("candidates")).facts["negatives"]
        say("  negatives: " + ", ".join(f"{count} {what}" for what, count in counts.items()))

    def find_teacher() -> None:
        result = choose_teacher(
            data,
            work.encoder(student),
            work.path("models", student),
            work.index,
            work.candidates,
            config.model,
            teaching,
            work.path("teacher"),
            store=work.store(student),
        )
        say(result.format())

    gate = config.teach
    queries = _count_training(work)
    return [
        Step(
            "mine",
            "candidates",
            config.mine.as_dict(),
            ("collection", vectors, "bm25"),
            mine,
            lambda costs: costs.search(queries, len(data.passages)),
        ),
        Step(
            "teach",
            "teacher",
            [gate.as_dict(), *(fingerprint_start(name) for name in (gate.cross_encoder, gate.dual_encoder) if name)],
            ("collection", "mine", student, "bm25", *(("whole",) if config.model.layers else ())),
            find_teacher,
            lambda costs: costs.encode(min(len(data.passages), gate.gate_queries * gate.rerank_depth)),
        ),
        Step(
            "label",
            "examples",
            config.label.as_dict(),
            ("collection", "mine", "teach"),
            partial(_label, work),
            lambda costs: costs.encode(min(len(data.passages), queries * config.label.label_depth)),
        ),
    ]


def _list_training(work: Work) -> list[Step]:
    config = work.config
    steps = []
    for arm in list_arms(config):
        read = config.train if arm == "pair" else replace(config.train, **NO_PASSAGE_CENTRIC)
        steps += [
            Step(
                f"train {arm}",
                f"models/{arm}",
                [read.as_dict(), arm],
                ("collection", "label", "start"),
                partial(_train, work, arm),
                lambda costs: _train_cost(costs, 2 * count_steps(_count_rows(work), config.train), config.train),
            ),
            _encode_step(work, arm, f"train {arm}"),
        ]
    return steps


def _list_comparison(work: Work) -> list[Step]:
    config = work.config
    split = table_split(work)
    models = ["start", *(["whole"] if config.model.layers is not None else []), *list_arms(config)]
    pairs = [(split, "bm25"), *((split, model) for model in models), ("dev", "bm25"), ("dev", "pair")]
    steps = [_search_step(work, at, system) for at, system in dict.fromkeys(pairs)]
    fused = Step(
        "fuse",
        f"runs/{split}/{FUSED}",
        config.search.as_dict(),
        tuple(dict.fromkeys(f"search {at}/{system}" for at in ("dev", split) for system in ("bm25", "pair"))),
        partial(_fuse, work, split),
    )
    last = Step(
        "evaluate",
        "report",
        config.evaluate.as_dict(),
        ("collection", "teach", "label", *(step.name for step in steps), "fuse"),
        partial(_evaluate, work, split, ["bm25", *models, FUSED]),
    )
    return [*steps, fused, last]


def _encode_step(work: Work, name: str, model_step: str | None = None) -> Step:
    config, data = work.config.encode, work.collection
    return Step(
        f"encode {name}",
        f"vectors/{name}",
        config.as_dict(),
        ("passages", model_step or name),
        lambda: encode_corpus(data, work.encoder(name), config, work.path("vectors", name)),
        lambda costs: costs.encode(len(data.passages)),
    )


def _search_step(work: Work, split: str, system: str) -> Step:
    config, data = work.config.search, work.collection

    def make() -> None:
        queries = (data.query(query_id) for query_id in data.qrels(split))
        blocks = (
            rank_words(queries, data, work.index, config)
            if system == "bm25"
            else rank_dense(queries, work.encoder(system), work.store(system), config)
        )
        write_search(
            blocks,
            config,
            work.path("runs", split, system),
            total=len(data.qrels(split)),
            inputs={"collection": data.fingerprint},
            options={"split": split, "system": system},
        )

    source = "bm25" if system == "bm25" else f"encode {system}"
    return Step(
        f"search {split}/{system}",
        f"runs/{split}/{system}",
        config.as_dict(),
        ("collection", source),
        make,
        lambda costs: costs.search(len(data.qrels(split)), len(data.passages)),
    )


def _check(work: Work) -> None:
    report = check_collection(work.collection, work.config.model, work.path("check"))
    for warning in report.warnings:
        say(f"  {warning}")
    require_sound(report, work.collection.name)


def _save_start(work: Work, name: str, layers: int | None) -> None:
    config = replace(work.config.model, layers=layers)
    DualEncoder.load(config).save(work.path("models", name), options=config.as_dict(), inputs={})


def _label(work: Work) -> None:
    """Label with the accepted teacher; without one, or where it cannot be calibrated, train on the labels alone."""
    config, data = work.config, work.collection
    folder = work.path("teacher")
    recipe = read_recipe(folder)
    note = "" if recipe else "No teacher beat the student"
    label = partial(
        label_examples,
        data,
        work.candidates,
        config=config.label,
        output=work.path("examples"),
        teacher_fingerprint=read_manifest(folder).fingerprint,
    )
    if recipe is not None:
        teacher = load_teacher(recipe, folder, data, work.index, config.model, work.store(work.student))
        try:
            facts = label(teacher=teacher)
        except RefusedError as error:
            note = error.what.rstrip(".")
        else:
            say(
                f"  {facts['labelled']} labelled and {facts['pseudo']} pseudo-labelled rows; "
                f"{json.dumps(facts['calibration'])}"
            )
            return
    say(f"  {note}: no pseudo labels, margin-filtered negatives.")
    label(teacher=None, note=note)


def _train(work: Work, arm: str) -> None:
    config = work.config
    examples = work.path("examples")
    stages = list_stages(arm, config.train)
    # Labelled only takes as many steps in its one stage as PAIR in its two.
    rows = len(read_stage_examples(examples, list_stages("pair", config.train)[1], config.train))
    steps = count_steps(rows, config.train) * (2 if len(stages) == 1 else 1)
    train_model(
        work.collection,
        examples,
        work.path("models", "start"),
        stages,
        config.train,
        work.path("models", arm),
        device=config.model.device,
        max_steps=steps,
    )


def _fuse(work: Work, split: str) -> None:
    """Fuse PAIR and BM25 with the weights that dev chooses."""
    config, data = work.config.search, work.collection
    runs = [work.run("dev", system) for system in ("pair", "bm25")]
    dev = data.qrels("dev")
    weights, fused = tune_run_weights(runs, dev)
    dense = mean_measures(measure_run(runs[0], dev, ["RR@10"]))["RR@10"]
    output = work.path("runs", split, FUSED)
    with publish(output, "run", options=config.as_dict() | {"weights": list(weights)}, inputs={}) as staging:
        run = fuse_runs([work.run(split, system) for system in ("pair", "bm25")], weights, config.k)
        with write_run(staging.path / "run.arrow") as add:
            add(list(run), [run[query_id] for query_id in run])
        write_trec_run(staging.path / "run.trec", run, FUSED)
        staging.facts |= {
            "weights": list(weights),
            "dev_RR@10": {"fused": fused, "dense": dense},
            "mode": "hybrid" if fused > dense else "dense",
        }


def _evaluate(work: Work, split: str, systems: list[str]) -> None:
    runs = {system: work.run(split, system) for system in systems}
    examples, teacher = (
        read_manifest(work.path(name), kind).facts for name, kind in (("examples", "examples"), ("teacher", "teacher"))
    )
    fusion = read_manifest(work.path("runs", split, FUSED), "run").facts
    notes = [*describe_labels(examples, teacher), describe_fusion(fusion)]
    if split == "dev":
        notes.append("There is no test split: these are dev queries, on which weights and thresholds were chosen.")
    compare_systems(
        runs,
        work.collection.qrels(split),
        split,
        work.config.evaluate,
        tuple(notes),
        work.path("report"),
        inputs={"collection": work.collection.fingerprint},
    )


def table_split(work: Work) -> str:
    """Return the split of the table: test, or dev where there is none."""
    return (
        "test" if any(positives_of(labels, q) for labels in [work.collection.labels("test")] for q in labels) else "dev"
    )


def _count_training(work: Work) -> int:
    return len(work.collection.qrels("train")) + len(work.collection.pool)


def _count_rows(work: Work) -> int:
    return len(work.collection.qrels("train")) + round(POOL_SHARE * len(work.collection.pool))


def _train_cost(costs: CostModel, steps: int, config: TrainConfig) -> Cost:
    return costs.train(
        steps * config.gradient_accumulation_steps, config.per_device_train_batch_size, config.train_negatives
    )
