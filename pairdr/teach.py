"""Find a teacher that beats the student, or say that there is none.

Every teacher at hand re-ranks the student's best candidates of labelled dev queries. The one with the best RR@10 is
taken, and only if a paired test says that it beats the student; the p-value is multiplied by the number of teachers
that were tried (Bonferroni). Fusion weights are chosen on one half of the dev
queries and judged on the other, both ways, so the comparison is not flattered by the choice.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from pairdr.artefact import publish
from pairdr.check import find_body
from pairdr.collection import Collection
from pairdr.config import ModelConfig, TeachConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import MissingExtraError, RefusedError
from pairdr.files import write_json
from pairdr.fusion import cross_fit, standardise
from pairdr.lexical import LexicalIndex
from pairdr.measures import compute_p_value
from pairdr.mine import Candidates
from pairdr.records import Passage, Query, positives_of
from pairdr.teachers import (
    RECIPE,
    CrossEncoderTeacher,
    DualEncoderTeacher,
    FusionTeacher,
    LexicalTeacher,
    Teacher,
    load_dual_encoder,
)
from pairdr.vectors import VectorStore

if TYPE_CHECKING:
    from datasets import Dataset

Relevant = list[npt.NDArray[np.bool_]]
Scored = list[list[npt.NDArray[np.float64]]]


@dataclass(frozen=True)
class Verdict:
    """How one teacher did on dev: RR@10 over the student's candidates, and the p-value against the student."""

    name: str
    rr10: float
    p_value: float | None


@dataclass
class TeachResult:
    """All verdicts, and the teacher that was taken, if any."""

    verdicts: list[Verdict]
    teacher: Teacher | None
    queries: int

    @property
    def accepted(self) -> bool:
        """Return whether a teacher beat the student."""
        return self.teacher is not None

    def format(self) -> str:
        """Return the verdicts as text, the taken teacher last."""
        lines = [
            f"  {v.name:48}RR@10 {v.rr10:.4f}" + ("" if v.p_value is None else f"  p = {v.p_value:.4f}")
            for v in self.verdicts
        ]
        return "\n".join([*lines, f"  teacher: {self.teacher.name if self.teacher else 'none beats the student'}"])


def choose_teacher(
    collection: Collection,
    student: DualEncoder,
    student_folder: str | Path,
    index: LexicalIndex,
    candidates: Candidates,
    model: ModelConfig,
    config: TeachConfig,
    output: str | Path,
    *,
    stores: Sequence[VectorStore] = (),
) -> TeachResult:
    """Train or load the teachers, judge them on dev, and publish the recipe of the best one.

    Args:
        collection: the data.
        student: the model that mined.
        student_folder: where it is saved; the body of a cross-encoder that is trained here.
        index: BM25.
        candidates: what mining found.
        model: lengths and prefixes for further dual encoders.
        config: which teachers, and the gate.
        output: the teacher's folder.
        stores: vectors of the corpus that are there; those of a teacher spare encoding it again.

    Returns:
        The verdicts; `teacher` is None where nothing beat the student.
    """
    inputs = {
        "collection": collection.fingerprint,
        "encoder": student.fingerprint,
        "candidates": candidates.fingerprint,
    }
    candidates.require_collection(collection)
    with publish(output, "teacher", options=config.as_dict(), inputs=inputs) as staging:
        base = DualEncoderTeacher(student, "student", _relative(student_folder, output), stores)
        others: list[Teacher] = []
        if config.cross_encoder == "train":
            place = staging.path / "cross_encoder"
            train_cross_encoder(collection, student_folder, candidates, config, place, device=model.device)
            others.append(CrossEncoderTeacher(str(place), "trained cross-encoder", model.device, "cross_encoder"))
        elif config.cross_encoder is not None:
            recorded = _relative(config.cross_encoder, output)
            others.append(CrossEncoderTeacher(config.cross_encoder, "cross-encoder", model.device, recorded))
        if config.dual_encoder is not None:
            larger = load_dual_encoder(config.dual_encoder, model)
            recorded = _relative(config.dual_encoder, output)
            others.append(DualEncoderTeacher(larger, "larger dual encoder", recorded, stores))
        result = judge_teachers(collection, base, LexicalTeacher(index), others, candidates, config)
        write_json(staging.path / RECIPE, result.teacher.describe() if result.teacher else None)
        staging.facts |= {
            "accepted": result.accepted,
            "teacher": result.teacher.name if result.teacher else None,
            "verdicts": [asdict(verdict) for verdict in result.verdicts],
            "dev_queries": result.queries,
        }
    return result


def require_accepted(result: TeachResult) -> None:
    """Refuse a teacher that does not win.

    Raises:
        RefusedError: naming both numbers.
    """
    if not result.accepted:
        refuse_verdicts([asdict(verdict) for verdict in result.verdicts])


def refuse_verdicts(verdicts: Sequence[dict[str, Any]]) -> NoReturn:
    """Say that no teacher beats the student, with both numbers.

    Args:
        verdicts: as the teacher's manifest keeps them, the student first.

    Raises:
        RefusedError: always.
    """
    student, *others = verdicts
    best = max(others, key=lambda verdict: verdict["rr10"])
    raise RefusedError(
        f"No teacher beats the student on dev: the student has RR@10 {student['rr10']:.4f}, the best teacher, "
        f"{best['name']}, has {best['rr10']:.4f} (p = {best['p_value']:.3f}).",
        remedy="Name a stronger one with --cross-encoder or --dual-encoder, or train without pseudo labels.",
    )


def judge_teachers(
    collection: Collection,
    student: Teacher,
    lexical: Teacher,
    others: Sequence[Teacher],
    candidates: Candidates,
    config: TeachConfig,
) -> TeachResult:
    """Score every teacher on dev and take the best one if it beats the student."""
    query_ids = sample_ids(collection.qrels("dev"), config.gate_queries, config.teach_seed)
    queries = [collection.query(query_id) for query_id in query_ids]
    run, depth = candidates.student, config.rerank_depth
    hits = [run[query_id][:depth] if query_id in run else [] for query_id in query_ids]
    rows = [[collection.passage(hit.passage_id) for hit in row] for row in hits]
    relevant: Relevant = [
        np.array([p.passage_id in positives_of(collection.qrels("dev"), q) for p in row], dtype=bool)
        for q, row in zip(query_ids, rows, strict=True)
    ]
    single = {teacher.name: (teacher, _standardised(teacher, queries, rows)) for teacher in (student, lexical, *others)}
    systems: list[tuple[Teacher | None, list[Teacher], Scored]] = [
        (teacher, [teacher], [[s] for s in scores]) for teacher, scores in single.values()
    ]
    if config.fusion:
        for names in _list_fusions([teacher.name for teacher in others], student.name, lexical.name):
            scores = [list(per_query) for per_query in zip(*(single[name][1] for name in names), strict=True)]
            systems.append((None, [single[name][0] for name in names], scores))
    baseline: dict[str, float] | None = None
    judged: list[tuple[Verdict, Teacher]] = []
    for teacher, members, scores in systems:
        values, weights = cross_fit(scores, relevant)
        by_query = dict(zip(query_ids, values.tolist(), strict=True))
        judge = teacher or FusionTeacher(members, weights)
        p_value = None if baseline is None else compute_p_value(by_query, baseline, seed=config.teach_seed)
        baseline = baseline or by_query
        judged.append((Verdict(judge.name, float(values.mean()), p_value), judge))
    verdicts = [verdict for verdict, _ in judged]
    best, teacher = max(judged[1:], key=lambda pair: pair[0].rr10)
    wins = (
        best.rr10 > verdicts[0].rr10
        and best.p_value is not None
        and best.p_value * (len(judged) - 1) < config.gate_level
    )
    return TeachResult(verdicts, teacher if wins else None, len(query_ids))


def train_cross_encoder(
    collection: Collection,
    body: str | Path,
    candidates: Candidates,
    config: TeachConfig,
    output: Path,
    *,
    device: str | None = None,
) -> None:
    """Train a cross-encoder on the labelled queries, with negatives sampled from the student's mined candidates.

    sentence-transformers' CrossEncoderTrainer with binary cross-entropy (RocketQA, section 3.3: [CLS] q [SEP] p [SEP]).
    """
    try:
        from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
        from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
    except ImportError as error:
        raise MissingExtraError("datasets", "train") from error
    from transformers.utils import logging

    logging.disable_progress_bar()
    import torch

    torch.manual_seed(config.teach_seed)
    model = CrossEncoder(str(find_body(body)), num_labels=1, max_length=config.cross_encoder_length, device=device)
    arguments = CrossEncoderTrainingArguments(
        output_dir=str(output),
        max_steps=config.cross_encoder_steps,
        per_device_train_batch_size=config.cross_encoder_batch,
        learning_rate=config.cross_encoder_learning_rate,
        warmup_steps=0.1,
        seed=config.teach_seed,
        save_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device == "cpu",
        dataloader_pin_memory=torch.cuda.is_available(),
    )
    positives_share = config.cross_encoder_negatives
    loss = BinaryCrossEntropyLoss(model, pos_weight=torch.tensor(float(positives_share)))
    rows = _make_pairs(collection, candidates, config)
    CrossEncoderTrainer(model=model, args=arguments, train_dataset=rows, loss=loss).train()
    model.save_pretrained(str(output))


def sample_ids(query_ids: Sequence[str] | dict[str, Any], count: int, seed: int) -> list[str]:
    """Return a seeded sample of ids, sorted; all of them where there are no more."""
    ordered = sorted(query_ids)
    return ordered if len(ordered) <= count else sorted(random.Random(seed).sample(ordered, count))


def _make_pairs(collection: Collection, candidates: Candidates, config: TeachConfig) -> Dataset:
    from datasets import Dataset

    def read() -> Iterator[dict[str, Any]]:
        rng = random.Random(config.teach_seed)
        query_ids = list(candidates.negatives)
        rng.shuffle(query_ids)
        needed = config.cross_encoder_steps * config.cross_encoder_batch // (1 + config.cross_encoder_negatives) + 1
        for query_id in query_ids[:needed]:
            text = collection.query(query_id).text
            positive = rng.choice(positives_of(collection.qrels("train"), query_id))
            hits = candidates.negatives[query_id]
            chosen = rng.sample(hits, min(config.cross_encoder_negatives, len(hits)))
            yield {"query": text, "passage": collection.passage(positive).joined, "label": 1.0}
            for hit in chosen:
                yield {"query": text, "passage": collection.passage(hit.passage_id).joined, "label": 0.0}

    return Dataset.from_list(list(read()))


def _standardised(
    teacher: Teacher, queries: Sequence[Query], rows: list[list[Passage]]
) -> list[npt.NDArray[np.float64]]:
    return [standardise(scores) for scores in teacher.score(queries, rows)]


def _list_fusions(others: Sequence[str], student: str, lexical: str) -> list[tuple[str, ...]]:
    pairs = [
        (student, lexical),
        *((student, other) for other in others),
        *((student, lexical, other) for other in others),
    ]
    return pairs


def _relative(source: str | Path, output: str | Path) -> str:
    """Return a folder's path as seen from the teacher's folder, so that a work folder can be moved.

    A folder outside the work folder keeps its full path, a hub name is returned as it is.
    """
    if not Path(source).exists():
        return str(source)
    place, home = Path(source).resolve(), Path(output).resolve()
    return os.path.relpath(place, home) if place.is_relative_to(home.parent) else str(place)
