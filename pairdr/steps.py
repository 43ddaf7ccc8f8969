"""The steps of `pairdr run`: what each makes, from what, with which options.

Read `list_steps` first: it is the table of contents of the package. What a step does stands in makers.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pairdr import makers
from pairdr.check import fingerprint_start
from pairdr.config import ARMS, RunConfig, StageConfig, TrainConfig, list_stages
from pairdr.costs import Cost, CostModel
from pairdr.encode import encode_corpus
from pairdr.errors import UsageError
from pairdr.lexical import index_words
from pairdr.makers import FUSED, table_split
from pairdr.train import count_steps
from pairdr.work import Work

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
    """Return all steps of a run in order.

    Each round mines and labels with the model of the round before (RocketQA, section 3.2) and trains from the start
    model; the last round's artefacts have plain names, an earlier round's end in its number.
    """
    steps = _list_preparation(work)
    student = work.student
    for number in range(1, work.config.rounds + 1):
        last = number == work.config.rounds
        suffix = "" if last else f".{number}"
        steps += _list_labelling(work, student, suffix)
        steps += _list_training(work, list_arms(work.config) if last else ["pair"], suffix)
        student = f"pair{suffix}"
    return steps + _list_comparison(work)


def list_trained(work: Work) -> list[str]:
    """Return the names of the models that a run trains, in order."""
    earlier = [f"pair.{number}" for number in range(1, work.config.rounds)]
    return [*(["student"] if work.student == "student" else []), *earlier, *list_arms(work.config)]


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
        Step("check", "check", model, ("collection",), partial(makers.check, work)),
        Step("start", "models/start", model, (), partial(makers.save_start, work, "start", config.model.layers)),
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
            Step("whole", "models/whole", model, (), partial(makers.save_start, work, "whole", None)),
            _encode_step(work, "whole"),
        ]
    if work.student == "student":
        read = replace(config.train, max_steps=None, num_train_epochs=1.0)  # warm_steps stands for both
        warm = read.options_of(StageConfig("warm", 0.0, ("plain",)))
        steps += [
            Step(
                "student",
                "models/student",
                [config.warm.as_dict(), warm],
                ("collection", "start", "bm25"),
                partial(makers.warm, work),
                lambda costs: _train_cost(costs, config.warm.warm_steps, config.train),
            ),
            _encode_step(work, "student"),
        ]
    return steps


def _list_labelling(work: Work, student: str, suffix: str) -> list[Step]:
    config, data = work.config, work.collection
    gate = teaching = config.teach
    if config.model.layers is not None and teaching.dual_encoder is None:
        # The whole model that the start was cut from is a larger dual encoder, and at hand.
        teaching = replace(teaching, dual_encoder=str(work.path("models", "whole")))
    candidates, teacher, examples = f"candidates{suffix}", f"teacher{suffix}", f"examples{suffix}"
    mine, teach, model = f"mine{suffix}", f"teach{suffix}", _model_step(student)
    queries = _count_training(work)
    return [
        Step(
            mine,
            candidates,
            config.mine.as_dict(),
            ("collection", f"encode {student}", "bm25"),
            partial(makers.mine, work, student, candidates),
            lambda costs: costs.search(queries, len(data.passages)),
        ),
        Step(
            teach,
            teacher,
            [gate.as_dict(), *(fingerprint_start(name) for name in (gate.cross_encoder, gate.dual_encoder) if name)],
            ("collection", mine, model, "bm25", *(("whole",) if config.model.layers else ())),
            partial(makers.find_teacher, work, teaching, student, candidates, teacher),
            lambda costs: costs.encode(min(len(data.passages), gate.gate_queries * gate.rerank_depth)),
        ),
        Step(
            f"label{suffix}",
            examples,
            config.label.as_dict(),
            ("collection", mine, teach),
            partial(makers.label, work, student, candidates, teacher, examples),
            lambda costs: costs.encode(min(len(data.passages), queries * config.label.label_depth)),
        ),
    ]


def _list_training(work: Work, arms: list[str], suffix: str) -> list[Step]:
    config = work.config
    steps = []
    for arm in arms:
        name = f"{arm}{suffix}"
        steps += [
            Step(
                _model_step(name),
                f"models/{name}",
                [config.train.options_of(stage) for stage in list_stages(arm, config.train)],
                ("collection", f"label{suffix}", "start"),
                partial(makers.train, work, arm, f"examples{suffix}", name),
                lambda costs: _train_cost(costs, 2 * count_steps(_count_rows(work), config.train), config.train),
            ),
            _encode_step(work, name),
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
        partial(makers.fuse, work, split),
    )
    last = Step(
        "evaluate",
        "report",
        config.evaluate.as_dict(),
        ("collection", "teach", "label", *(step.name for step in steps), "fuse"),
        partial(makers.evaluate, work, split, ["bm25", *models, FUSED]),
    )
    return [*steps, fused, last]


def _encode_step(work: Work, name: str) -> Step:
    config, data = work.config.encode, work.collection
    return Step(
        f"encode {name}",
        f"vectors/{name}",
        config.as_dict(),
        ("passages", _model_step(name)),
        lambda: encode_corpus(data, work.encoder(name), config, work.path("vectors", name)),
        lambda costs: costs.encode(len(data.passages)),
    )


def _search_step(work: Work, split: str, system: str) -> Step:
    data = work.collection
    return Step(
        f"search {split}/{system}",
        f"runs/{split}/{system}",
        work.config.search.as_dict(),
        ("collection", "bm25" if system == "bm25" else f"encode {system}"),
        partial(makers.search, work, split, system),
        lambda costs: costs.search(len(data.qrels(split)), len(data.passages)),
    )


def _model_step(name: str) -> str:
    """Return the step that makes a model: those that are trained on examples are named so."""
    return name if name in ("start", "whole", "student") else f"train {name}"


def _count_training(work: Work) -> int:
    return len(work.collection.qrels("train")) + len(work.collection.pool)


def _count_rows(work: Work) -> int:
    return len(work.collection.qrels("train")) + round(POOL_SHARE * len(work.collection.pool))


def _train_cost(costs: CostModel, steps: int, config: TrainConfig) -> Cost:
    return costs.train(
        steps * config.gradient_accumulation_steps, config.per_device_train_batch_size, config.train_negatives
    )
