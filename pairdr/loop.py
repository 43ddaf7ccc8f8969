"""The training loop of one stage: batches in, parameters moved, checkpoints and a log out.

It knows examples, embeddings and losses. It does not know where examples come from.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pairdr.batches import Batch, collate, plan_epoch
from pairdr.checkpoint import Checkpoints, catch_termination
from pairdr.collection import Collection
from pairdr.config import StageConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import DataError, PairdrError, StoppedError, UsageError
from pairdr.formats import Examples
from pairdr.gradcache import backward_cached
from pairdr.objective import compute_loss
from pairdr.progress import say, show_progress
from pairdr.ranks import agree, average_gradients, count_ranks, find_rank, take_from_first
from pairdr.tokens import Side, plan_forwards
from pairdr.tuning import densify_gradients, make_optimizer, prepare_model, schedule_rate, seed_step, set_rate
from pairdr.watch import DEV, DevSample, Means, Meter, find_alarms, measure_peak, measure_similarities

TOKENS_PER_FORWARD = {"cpu": 2048, "cuda": 32768}


@dataclass
class State:
    """Where a stage stands: all of it goes into a checkpoint, as JSON."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    """Batches of this epoch that were used."""
    batch_size: int = 0
    """Rows of a joint batch: fewer than asked for where the examples do not fill one."""
    best_step: int = 0
    best_dev: float = -1.0
    log: list[dict[str, Any]] = field(default_factory=list)
    means: dict[str, list[float]] = field(default_factory=dict)


def run_stage(
    collection: Collection,
    examples: Examples,
    encoder: DualEncoder,
    stage: StageConfig,
    config: TrainConfig,
    steps: int,
    checkpoints: Checkpoints | None = None,
    track: Callable[[dict[str, Any]], None] = lambda line: None,
    start_dev: float | None = None,
) -> list[dict[str, Any]]:
    """Train one stage in place and return its log: loss parts, learning rate, similarities, speed, dev RR@10.

    Args:
        collection: texts by id, and dev.
        examples: the stage's rows.
        encoder: what is trained.
        stage: its loss.
        config: batch, optimizer, schedule.
        steps: optimizer steps in all.
        checkpoints: where to save and to go on from; unset: neither.
        track: gets every line of the log.
        start_dev: the start model's measure on dev, which an alarm compares with; unset: that of `encoder` as it is.

    Raises:
        StoppedError: SIGTERM came; the newest checkpoint has all that was done.
        PairdrError: a gradient is no number any more.
    """
    dev = DevSample(collection, config)
    device = encoder.model.device
    scaler = torch.amp.GradScaler(device.type, enabled=config.fp16)
    with prepare_model(encoder, config) as model, catch_termination() as stopped:
        optimizer = make_optimizer(model, config)
        state = _restore(checkpoints, model, optimizer, scaler) if config.resume_from_checkpoint else None
        if state is None:
            state = State(batch_size=config.per_device_train_batch_size * count_ranks())
            sample = {"dev_queries": len(dev.queries), "dev_passages": len(dev.passages)}
            state.log.append({"step": 0, "stage": stage.name, **sample, DEV: _measure_dev(dev, encoder, config)})
        means = Means(state.means)
        towers = 1 if encoder.contract.towers == "tied" else 2
        meter = Meter(model, measure_peak(device, autocast_type(config) or torch.float32), towers)
        batches = read_batches(examples, config, state)
        with show_progress(f"train: {stage.name}", steps) as advance:
            advance(state.step)
            for step in range(state.step + 1, steps + 1):
                seed_step(config.seed, step)
                model.train()
                for _ in range(config.gradient_accumulation_steps):
                    found, groups = backward_batch(collection, encoder, next(batches), stage.alpha, config, scaler)
                    means.add(**found)
                    meter.add(groups)
                rate = config.learning_rate * schedule_rate(step - 1, steps, config)
                update_parameters(model, optimizer, scaler, rate, config, step)
                state.step = step
                looks = step % config.eval_steps == 0 or step == steps
                if looks or step % config.logging_steps == 0:
                    line = {"step": step, "stage": stage.name, "learning_rate": rate, **means.flush(), **meter.flush()}
                    if looks:
                        line[DEV] = _measure_dev(dev, encoder, config)
                    _write_line(line, state, start_dev, track)
                    advance(0, note=_note(line))
                    meter.flush()
                state.means = means.values
                advance(1)
                ends = agree(stopped.is_set(), device)
                is_best = config.load_best_model_at_end and _note_best(state)
                if checkpoints is not None and (ends or is_best or (step % config.save_steps == 0 and step < steps)):
                    saved = asdict(state) | {"scaler": scaler.state_dict()}
                    checkpoints.save(step, model, optimizer, saved, state.best_step)
                if ends:
                    raise StoppedError(
                        f"Stopped after step {step} of {steps} of stage {stage.name}.",
                        remedy="The same command goes on from there." if checkpoints is not None else None,
                    )
        _choose_best(checkpoints, model, state, steps)
    if stopped.is_set():  # it came after the last step
        raise StoppedError(f"Stopped at the end of stage {stage.name}.", remedy="The same command goes on from there.")
    return state.log


def backward_batch(
    collection: Collection,
    encoder: DualEncoder,
    batch: Batch,
    alpha: float,
    config: TrainConfig,
    scaler: torch.amp.GradScaler | None = None,
) -> tuple[dict[str, float], list[list[int]]]:
    """Embed a batch, each text once, and add its loss's gradients to the parameters.

    Returns:
        The loss parts and similarities by name, and the lengths of the texts of each forward pass.
    """
    passages = [collection.passage(passage_id) for passage_id in batch.passage_ids]
    tokens = encoder.tokenize_queries([collection.query(q).text for q in batch.query_ids])
    tokens += encoder.tokenize_passages(passages)
    device = encoder.model.device
    lengths = [len(text.input_ids) for text in tokens]
    budget = config.tokens_per_forward or TOKENS_PER_FORWARD.get(device.type, 2048)
    queries = len(batch.query_ids)
    sides: list[tuple[Side | None, range]] = [(None, range(len(tokens)))]  # tied towers: both in one forward pass
    if encoder.contract.towers == "untied":
        sides = [("query", range(queries)), ("passage", range(queries, len(tokens)))]
    groups = [
        (side, [texts[place] for place in group])
        for side, texts in sides
        for group in plan_forwards([lengths[text] for text in texts], budget, device.type)
    ]
    place = torch.tensor([text for _, group in groups for text in group]).argsort().to(device)
    kind = autocast_type(config)

    def embed(part: tuple[Side | None, Sequence[int]]) -> Tensor:
        side, group = part
        with torch.autocast(device.type, kind, enabled=kind is not None):
            return encoder.embed([tokens[text] for text in group], side).float()

    def backward(vectors: Tensor) -> dict[str, float]:
        query, passage = vectors[place].split([queries, len(passages)])
        positive, negative = passage[batch.positive.to(device)], passage[batch.negative.to(device)]  # [b, D], [b, K, D]
        parts = compute_loss(query, positive, negative, batch, alpha, config, encoder)
        loss = parts["loss"] / config.gradient_accumulation_steps
        (loss if scaler is None else scaler.scale(loss)).backward()
        similarities = measure_similarities(query, positive, negative, batch.negative_valid[batch.rows])
        return {name: float(value.detach()) for name, value in parts.items()} | similarities

    if config.grad_cache:
        found = backward_cached(groups, embed, backward)
    else:
        found = backward(torch.cat([embed(part) for part in groups]))
    return found, [[lengths[text] for text in group] for _, group in groups]


def update_parameters(
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    rate: float,
    config: TrainConfig,
    step: int,
) -> None:
    """Take one optimizer step with the gradients of all ranks, clipped, and forget them.

    Raises:
        PairdrError: a gradient is no number, on whichever rank. A scaled one may overflow: then the step is left out,
            and the scale halved; below 1 it is no overflow.
    """
    densify_gradients(model)
    average_gradients(model.parameters())
    scaler.unscale_(optimizer)
    trained = [p for p in model.parameters() if p.requires_grad]
    norm = float(torch.nn.utils.clip_grad_norm_(trained, config.max_grad_norm or math.inf))
    if not scaler.is_enabled() and not math.isfinite(norm):
        raise PairdrError(
            f"The gradient is {norm} at step {step}.",
            remedy="Lower learning_rate, or check the start model; nothing was overwritten.",
        )
    set_rate(optimizer, rate)
    scaler.step(optimizer)
    scaler.update()
    if scaler.is_enabled() and scaler.get_scale() < 1:
        raise PairdrError(
            f"The gradient is no number at step {step}, however little the loss is scaled.",
            remedy="Train with bf16, lower learning_rate, or check the start model; nothing was overwritten.",
        )
    optimizer.zero_grad()


def read_batches(examples: Examples, config: TrainConfig, state: State) -> Iterator[Batch]:
    """Yield this rank's batches for ever, epoch after epoch, and count them in `state`.

    The order is a function of the seed; a state that was saved goes on where it was.

    Raises:
        DataError: no batch of two rows a rank can be made.
    """
    ranks, rank = count_ranks(), find_rank()
    while True:
        used = state.batches
        plan = plan_epoch(examples, state.batch_size, config.seed, state.epoch)
        for rows in islice(plan, used, None):
            rng = random.Random(f"{config.seed}/{state.epoch}/{state.batches}")
            own = len(rows) // ranks
            share = slice(rank * own, (rank + 1) * own)
            state.batches += 1
            if not config.cross_batch_negatives:
                rows, share = rows[share], slice(0, own)
            yield collate(
                examples.take(rows),
                config.train_negatives,
                mask=config.mask_false_negatives,
                rng=rng,
                share=share,
            )
        if state.batches:
            left = len(examples) - state.batches * state.batch_size
            if state.epoch == 0 and left >= state.batch_size:  # fewer are no batch anyway
                say(f"pairdr: {left} of {len(examples)} rows share a query or a positive with too many others")
            state.epoch, state.batches = state.epoch + 1, 0
        elif state.batch_size == 2 * ranks:
            raise DataError(
                f"{len(examples)} examples make no batch of {2 * ranks} rows with different queries and positives.",
                remedy="Give more labelled queries.",
            )
        else:
            state.batch_size = max(2, state.batch_size // ranks // 2) * ranks
            say(f"pairdr: the examples fill no larger batch than {state.batch_size} rows, or less")


def autocast_type(config: TrainConfig) -> torch.dtype | None:
    """Return the type of the encoder's products, or None for fp32; logits and losses are always fp32."""
    return torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None


def _restore(
    checkpoints: Checkpoints | None,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> State | None:
    """Load the newest valid checkpoint, if there is one."""
    saved = checkpoints.load_newest(model, optimizer) if checkpoints is not None else None
    step = 0 if saved is None else int(saved["step"])
    device = next(model.parameters()).device
    if agree(step != take_from_first(step, device), device):
        raise UsageError("The ranks find different checkpoints.", remedy="Give all of them one shared output folder.")
    if saved is None:
        return None
    scaler.load_state_dict(saved.pop("scaler"))
    state = State(**saved)
    say(f"pairdr: going on after step {state.step}")
    return state


def _choose_best(checkpoints: Checkpoints | None, model: torch.nn.Module, state: State, steps: int) -> None:
    """Load the step that was best on dev, where one was noted and is not the last."""
    if checkpoints is None or state.best_step in (0, steps):
        return
    if checkpoints.load_model(state.best_step, model):
        stage = state.log[0]["stage"]
        state.log.append({"step": state.best_step, "stage": stage, DEV: state.best_dev, "chosen": True})


def _measure_dev(dev: DevSample, encoder: DualEncoder, config: TrainConfig) -> float:
    """Return the first rank's measure on dev, in the precision of training, on every rank: all decide alike."""
    device, kind = encoder.model.device, autocast_type(config)
    with torch.autocast(device.type, kind, enabled=kind is not None):
        return take_from_first(dev.measure(encoder), device)


def _write_line(
    line: dict[str, Any], state: State, start_dev: float | None, track: Callable[[dict[str, Any]], None]
) -> None:
    state.log.append(line)
    for alarm in find_alarms(line, state.log[0][DEV] if start_dev is None else start_dev):
        say(f"pairdr: {line['stage']}, step {line['step']}: {alarm}")
    track(line)


def _note_best(state: State) -> bool:
    """Note this step where its measure on dev is the best one yet, and say whether it is."""
    line = state.log[-1]
    if line["step"] != state.step or line.get(DEV, -1.0) <= state.best_dev:
        return False
    state.best_step, state.best_dev = state.step, line[DEV]
    return True


def _note(line: dict[str, Any]) -> str:
    names = [name for name in ("query_centric", "passage_centric", DEV) if name in line]
    return "  ".join([*(f"{name} {line[name]:.3f}" for name in names), f"{line['tokens_per_second']:.0f} tokens/s"])
