"""Training: a list of stages, one readable loop.

PAIR (section 4.3): stage 1 minimises (1 - alpha) L_Q + alpha L_P, stage 2 minimises L_Q alone. Each stage starts from
the model that the stage before it saved, with a fresh optimizer and schedule; an interrupted call goes on at the
stage that was under way.

The loop knows examples, embeddings and losses. It does not know where examples come from.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow.compute as pc
import torch
from torch import Tensor, nn

from pairdr.artefact import read_manifest
from pairdr.batches import Batch, collate, plan_epoch
from pairdr.collection import Collection
from pairdr.config import StageConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, DataError, MissingExtraError, PairdrError, UsageError
from pairdr.formats import Examples
from pairdr.indexes.exact import search_exact
from pairdr.losses import PairParts, pair_loss
from pairdr.measures import reciprocal_ranks
from pairdr.progress import show_progress
from pairdr.records import Passage, Query, positives_of

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG = "training.jsonl"
LOG_EVERY = 10


class DevSample:
    """A fixed, seeded sample of dev: some queries, their positives, and passages drawn at random beside them.

    Its RR@10 is easier than that over the corpus: it serves to watch training, never to report.
    """

    def __init__(self, collection: Collection, config: TrainConfig) -> None:
        dev = collection.qrels("dev")
        rng = random.Random(config.seed)
        query_ids = sorted(dev)
        query_ids = sorted(rng.sample(query_ids, min(config.eval_queries, len(query_ids))))
        self.queries: list[Query] = [collection.query(query_id) for query_id in query_ids]
        self.positives = [set(positives_of(dev, query_id)) for query_id in query_ids]
        needed = sorted(set().union(*self.positives))
        count = min(max(0, config.eval_passages - len(needed)), len(collection.passages))
        drawn = [collection.passages.id_of(row) for row in rng.sample(range(len(collection.passages)), count)]
        self.passages: list[Passage] = [collection.passage(p) for p in sorted({*needed, *drawn})]

    def measure(self, encoder: DualEncoder) -> float:
        """Return RR@10 over the sample."""
        vectors = encoder.encode_passages(self.passages)  # [n, D]
        queries = encoder.encode_queries([query.text for query in self.queries])  # [Q, D]
        rows, _ = search_exact(queries, [(0, vectors)], np.arange(len(vectors)), 10)
        flags = [
            np.array([row >= 0 and self.passages[row].passage_id in positives for row in ranked], dtype=bool)
            for ranked, positives in zip(rows, self.positives, strict=True)
        ]
        return float(reciprocal_ranks(flags).mean())


@dataclass
class Means:
    """Means between two lines of the log; a value that some steps do not have counts where it is there."""

    values: dict[str, list[float]] = field(default_factory=dict)

    def add(self, **values: float) -> None:
        """Add one step's values."""
        for name, value in values.items():
            self.values.setdefault(name, []).append(value)

    def flush(self) -> dict[str, float]:
        """Return the means and start anew."""
        means = {name: sum(values) / len(values) for name, values in self.values.items()}
        self.values = {}
        return means


def train_model(
    collection: Collection,
    examples: str | Path,
    start: str | Path,
    stages: Sequence[StageConfig],
    config: TrainConfig,
    output: str | Path,
    *,
    device: str | None = None,
    max_steps: int | None = None,
) -> DualEncoder:
    """Train a model through its stages and publish it; the models between stages stand beside it.

    Args:
        collection: texts by id, and dev.
        examples: the folder that `label` wrote.
        start: a model folder that pairdr saved.
        stages: what to minimise on which examples, in order.
        config: batch, optimizer, schedule.
        output: the model's folder; stage 1 of `models/pair` is kept as `models/pair.stage1`.
        device: cpu, cuda, ...; unset picks the best there is.
        max_steps: optimizer steps per stage; unset follows the configuration.

    Returns:
        The trained model.

    Raises:
        DataError: too few examples.
        PairdrError: the loss is no longer finite.
    """
    require_same_data(examples, collection)
    folder = Path(start)
    for number, stage in enumerate(stages, start=1):
        place = Path(output) if number == len(stages) else Path(f"{output}.stage{number}")
        rows = read_stage_examples(examples, stage, config)
        options = config.options_of(stage) | {"max_steps": max_steps or config.max_steps}
        inputs = {
            "collection": collection.fingerprint,
            "start": read_manifest(folder, "model").fingerprint,
            "examples": read_manifest(examples, "examples").fingerprint,
        }
        if not is_trained(place, options, inputs):
            encoder = DualEncoder.open(folder, device=device)
            log = run_stage(
                collection, rows, encoder, stage, config, max_steps or config.max_steps, Path(f"{place}.trackers")
            )
            facts = {"stages": [asdict(s) for s in stages[:number]], "examples": len(rows), "summary": log[-1]}
            encoder.save(place, options=options, inputs=inputs, facts=facts, files={LOG: _to_lines(log)})
        folder = place
    return DualEncoder.open(output, device=device)


def require_same_data(examples: str | Path, collection: Collection) -> None:
    """Refuse examples that were labelled on other data, or other splits of it.

    Raises:
        ArtefactError: naming both fingerprints.
    """
    found = read_manifest(examples, "examples").inputs.get("collection", "")
    if found != collection.fingerprint:
        raise ArtefactError(
            f"These examples were made from data {found[:12]}, this is {collection.fingerprint[:12]}.",
            path=examples,
            remedy="Use the same data and the same --hide-labels, --unlabelled and --data-seed, or label again.",
        )


def is_trained(folder: Path, options: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Return whether a stage's model is there already, made with these options from these inputs."""
    try:
        manifest = read_manifest(folder, "model")
    except ArtefactError:
        return False
    return manifest.options == json.loads(json.dumps(options)) and manifest.inputs == inputs


def read_stage_examples(folder: str | Path, stage: StageConfig, config: TrainConfig) -> Examples:
    """Open the example files of a stage as one.

    Where each row's own hard negatives are its only candidates (`own`), rows without any are left out.
    """
    examples = Examples.open(*(Path(folder) / f"{source}.arrow" for source in stage.sources))
    if stage.alpha > 0 and config.passage_negatives == "own":
        return Examples(examples.table.filter(pc.greater(pc.list_value_length(examples.table["negative_ids"]), 0)))
    return examples


def count_steps(examples: int, config: TrainConfig) -> int:
    """Return the optimizer steps of one stage over so many examples; a last short batch counts as one."""
    if config.max_steps is not None:
        return config.max_steps
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return max(1, math.ceil(examples * config.num_train_epochs / rows))


def run_stage(
    collection: Collection,
    examples: Examples,
    encoder: DualEncoder,
    stage: StageConfig,
    config: TrainConfig,
    max_steps: int | None = None,
    trackers: Path = Path("trackers"),
) -> list[dict[str, Any]]:
    """Train one stage in place and return its log: loss parts, learning rate, similarities, dev RR@10.

    A tracker, if one is chosen, writes below `trackers`.
    """
    steps = max_steps or count_steps(len(examples), config)
    accelerator = _make_accelerator(encoder, config, trackers)
    torch.manual_seed(config.seed)
    encoder.set_dropout(config.dropout)
    optimizer = make_optimizer(encoder.model, config)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: schedule_rate(step, steps, config.warmup_steps)
    )
    dev = DevSample(collection, config)
    sample = {"dev_queries": len(dev.queries), "dev_passages": len(dev.passages)}
    log: list[dict[str, Any]] = [{"step": 0, "stage": stage.name, **sample, "dev_RR@10": dev.measure(encoder)}]
    batches = read_batches(examples, config)
    means = Means()
    with show_progress(f"train: {stage.name}", steps) as advance:
        for step in range(1, steps + 1):
            encoder.model.train()
            for _ in range(config.gradient_accumulation_steps):
                parts, similarities = compute_loss(collection, encoder, next(batches), stage.alpha, config)
                accelerator.backward(parts.loss / config.gradient_accumulation_steps)
                means.add(**_name_parts(parts), **similarities)
            if config.max_grad_norm > 0:
                accelerator.clip_grad_norm_(encoder.model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            looks = step % config.eval_steps == 0 or step == steps
            if looks or step % LOG_EVERY == 0:
                line = {"step": step, "stage": stage.name, "learning_rate": rate, **means.flush()}
                _require_finite(line, step)
                if looks:
                    line["dev_RR@10"] = dev.measure(encoder)
                log.append(line)
                accelerator.log({key: value for key, value in line.items() if isinstance(value, float)}, step=step)
                advance(0, note=_note(line))
            advance(1)
    accelerator.end_training()
    return log


def compute_loss(
    collection: Collection, encoder: DualEncoder, batch: Batch, alpha: float, config: TrainConfig
) -> tuple[PairParts, dict[str, float]]:
    """Embed a batch, each text once, and return the loss with the three mean similarities."""
    passages = [collection.passage(passage_id) for passage_id in batch.passage_ids]
    tokens = encoder.tokenize_queries([collection.query(q).text for q in batch.query_ids])
    vectors = encoder.embed([*tokens, *encoder.tokenize_passages(passages)])  # [B + P, D]
    device = vectors.device
    count = len(batch.query_ids)
    query, passage = vectors[:count], vectors[count:]
    positive, negative = passage[batch.positive.to(device)], passage[batch.negative.to(device)]  # [B, D], [B, K, D]
    masks = None if batch.masks is None else type(batch.masks)(*(mask.to(device) for mask in batch.masks))
    parts = pair_loss(
        query,
        positive,
        negative,
        alpha=alpha,
        passage_negatives=config.passage_negatives,
        temperature=encoder.temperature,
        negative_valid=batch.negative_valid.to(device),
        masks=masks,
    )
    return parts, measure_similarities(query.detach(), positive.detach(), negative.detach(), batch.negative_valid)


def measure_similarities(query: Tensor, positive: Tensor, negative: Tensor, valid: Tensor) -> dict[str, float]:
    """Return mean s(q,p+), s(q,p-), s(p+,p-) of a batch: what the passage-centric loss is meant to move."""
    pairs = valid.to(query.device)
    found = {"s(q,p+)": (query * positive).sum(-1).mean()}
    if pairs.any():
        found["s(q,p-)"] = torch.einsum("bd,bkd->bk", query, negative)[pairs].mean()
        found["s(p+,p-)"] = torch.einsum("bd,bkd->bk", positive, negative)[pairs].mean()
    return {name: float(value) for name, value in found.items()}


def read_batches(examples: Examples, config: TrainConfig) -> Iterator[Batch]:
    """Yield batches for ever, epoch after epoch; the order is a function of the seed.

    Raises:
        DataError: no batch of two rows can be made.
    """
    size = config.per_device_train_batch_size
    epoch = 0
    while True:
        made = 0
        for rows in plan_epoch(examples, size, config.seed, epoch):
            made += 1
            rng = random.Random(f"{config.seed}/{epoch}/{made}")
            yield collate(
                [examples[row] for row in rows], config.train_negatives, mask=config.mask_false_negatives, rng=rng
            )
        if not made:
            if size == 2:
                raise DataError(
                    f"{len(examples)} examples do not make a batch of two rows with different queries and positives.",
                    remedy="Give more labelled queries.",
                )
            size = max(2, size // 2)
        else:
            epoch += 1


def make_optimizer(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """Return AdamW; biases and normalisation weights are not decayed."""
    decayed = [p for p in model.parameters() if p.requires_grad and p.dim() > 1]
    others = [p for p in model.parameters() if p.requires_grad and p.dim() <= 1]
    groups = [{"params": decayed, "weight_decay": config.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=config.learning_rate)


def schedule_rate(step: int, steps: int, warmup: float) -> float:
    """Return the factor of the learning rate: linear up over the warm-up, then linear down to 0."""
    rise = math.ceil(warmup * steps) if warmup < 1 else int(warmup)
    if step < rise:
        return (step + 1) / (rise + 1)
    return max(0.0, (steps - step) / max(1, steps - rise))


def _make_accelerator(encoder: DualEncoder, config: TrainConfig, trackers: Path) -> Accelerator:
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    accelerator = Accelerator(cpu=encoder.model.device.type == "cpu", log_with=config.report_to, project_dir=trackers)
    if accelerator.num_processes > 1:
        raise UsageError("Training runs in one process so far.", remedy="Start it without torchrun.")
    if config.report_to is not None:
        accelerator.init_trackers("pairdr", config=None)
    return accelerator


def _name_parts(parts: PairParts) -> dict[str, float]:
    found = {"loss": parts.loss, "query_centric": parts.query_centric, "passage_centric": parts.passage_centric}
    return {name: float(value.detach()) for name, value in found.items() if value is not None}


def _require_finite(line: dict[str, Any], step: int) -> None:
    if not math.isfinite(line["loss"]):
        raise PairdrError(
            f"The loss is {line['loss']} within 10 steps before step {step}.",
            remedy="Lower learning_rate, or check the start model; nothing was overwritten.",
        )


def _note(line: dict[str, Any]) -> str:
    names = [name for name in ("query_centric", "passage_centric", "dev_RR@10") if name in line]
    return "  ".join(f"{name} {line[name]:.3f}" for name in names)


def _to_lines(log: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in log)
