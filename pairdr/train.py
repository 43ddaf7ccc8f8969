"""Training: a list of stages, each of them one call of the loop.

PAIR (section 4.3): stage 1 minimises (1 - alpha) L_Q + alpha L_P, stage 2 minimises L_Q alone. Each stage starts from
the model that the stage before it saved, with a fresh optimizer and schedule. An interrupted stage goes on at its
newest checkpoint, to the weights of a run that nobody interrupted.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.compute as pc
import torch

from pairdr.artefact import read_manifest
from pairdr.checkpoint import Checkpoints, require_ranks
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, ModelConfig, StageConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, MissingExtraError, UsageError
from pairdr.formats import Examples
from pairdr.label import require_same_data
from pairdr.loop import run_stage
from pairdr.progress import say
from pairdr.ranks import (
    begin_together,
    count_ranks,
    explain_lost_ranks,
    find_rank,
    require_alike,
    take_from_first,
    wait_for_ranks,
)
from pairdr.watch import DEV

if TYPE_CHECKING:
    from accelerate import Accelerator

LOG = "training.jsonl"
SPEEDS = ("tokens_per_second", "gemm_share")
"""What differs between two runs that make the same model: shown and tracked, and not kept with the model."""


@explain_lost_ranks()
def prepare_training(
    data: str | Path, data_options: DataConfig, model: ModelConfig, config: TrainConfig, start: Path
) -> Collection:
    """Open the data and write the start model; under torchrun the first rank does both before the others do.

    Args:
        data: as `open_collection` takes it.
        data_options: splits and pool.
        model: what training starts from.
        config: says which trackers and precision are wanted.
        start: where the start model is written, beside the output.

    Raises:
        UsageError: a rank does not see what the first one has written.
        PairdrError: what a rank has found wrong, or that another one has.
    """
    device = start_accelerator(model.device, config).device
    with begin_together(device, first_ahead=True):
        collection = open_collection(data, data_options)
        if find_rank() == 0:
            DualEncoder.load(model).save_copy(start, model)
        elif not start.is_dir():
            raise UsageError(
                "The first rank's output is not here.", path=start, remedy="Give all machines one shared output folder."
            )
    return collection


@explain_lost_ranks()
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
        UsageError: the ranks have not the same data, examples, start or options, or are another number than those
            that made what is there.
        PairdrError: the loss is no longer finite.
    """
    accelerator = start_accelerator(device, config, Path(f"{output}.trackers"))
    device = device if count_ranks() == 1 else str(accelerator.device)

    def track(line: dict[str, Any]) -> None:
        values = {f"stage {number}/{name}": value for name, value in line.items() if isinstance(value, float)}
        accelerator.log(values, step=line["step"] + before)  # trackers want steps that rise

    folder, before, start_dev = Path(start), 0, None
    for number, stage in enumerate(stages, start=1):
        place = list_places(output, stages)[number - 1]
        with begin_together(accelerator.device):
            fingerprint, begun = require_same_data(examples, collection), read_manifest(folder, "model")
            rows = read_stage_examples(examples, stage, config)
        steps = max_steps or count_steps(len(rows), config)
        options = config.options_of(stage) | {"max_steps": max_steps or config.max_steps}
        inputs = {"collection": collection.fingerprint, "start": begun.fingerprint, "examples": fingerprint}
        require_alike({**inputs, "options": options}, accelerator.device)
        checkpoints = Checkpoints(Path(f"{place}.checkpoints"), options, inputs, config.save_total_limit)
        names = dict.fromkeys([*begun.options.get("trained_on", []), collection.given_name])
        options |= {"ranks": count_ranks(), "trained_on": [*names]}
        with begin_together(accelerator.device):
            found = is_trained(place, options, inputs)
        if not take_from_first(float(found), accelerator.device):
            encoder = DualEncoder.open(folder, device=device)
            _warn_of_two_spaces(encoder, stage)
            log = run_stage(collection, rows, encoder, stage, config, steps, checkpoints, track, start_dev)
            lines = [{name: value for name, value in line.items() if name not in SPEEDS} for line in log]
            passed = [*begun.facts.get("stages", []), asdict(stage)]
            facts = {"stages": passed, "examples": len(rows), "summary": lines[-1]}
            if find_rank() == 0:
                encoder.save(place, options=options, inputs=inputs, facts=facts, files={LOG: _to_lines(lines)})
        checkpoints.remove()
        wait_for_ranks()
        with begin_together(accelerator.device):
            if start_dev is None:
                start_dev = json.loads((place / LOG).read_text(encoding="utf-8").splitlines()[0])[DEV]
        folder, before = place, before + steps
    for tracker in accelerator.trackers:  # end_training would destroy the process group
        tracker.finish()
    return DualEncoder.open(output, device=device)


def list_places(output: str | Path, stages: Sequence[StageConfig]) -> list[Path]:
    """Return where the models of the stages stand, the last one's at `output`."""
    return [*(Path(f"{output}.stage{number}") for number in range(1, len(stages))), Path(output)]


def is_trained(folder: Path, options: dict[str, Any], inputs: dict[str, str]) -> bool:
    """Return whether a stage's model is there already, made with these options from these inputs.

    Raises:
        UsageError: it is, but made by another number of ranks.
    """
    try:
        manifest = read_manifest(folder, "model")
    except ArtefactError:
        return False
    kept = manifest.options | {"trained_on": []}  # names decide nothing
    wanted = json.loads(json.dumps(options)) | {"trained_on": [], "ranks": kept.get("ranks")}
    if kept != wanted or manifest.inputs != inputs:
        return False
    require_ranks(kept["ranks"], folder, stale=folder)
    return True


def read_stage_examples(folder: str | Path, stage: StageConfig, config: TrainConfig) -> Examples:
    """Open the example files of a stage as one.

    Where each row's own hard negatives are its only candidates (`own`), rows without any are left out.
    """
    examples = Examples.open(*(Path(folder) / f"{source}.arrow" for source in stage.sources))
    if stage.alpha > 0 and config.passage_negatives == "own":
        return examples.keep(pc.list_value_length(examples.table["negative_ids"]).to_numpy() > 0)
    return examples


def count_steps(examples: int, config: TrainConfig) -> int:
    """Return the optimizer steps of one stage over so many examples; a last short batch counts as one."""
    if config.max_steps is not None:
        return config.max_steps
    rows = config.per_device_train_batch_size * config.gradient_accumulation_steps * count_ranks()
    return max(1, math.ceil(examples * config.num_train_epochs / rows))


def start_accelerator(device: str | None, config: TrainConfig, trackers: Path | None = None) -> Accelerator:
    """Return accelerate's view of the processes; with a folder for `trackers`, start those that were asked for.

    Raises:
        MissingExtraError: accelerate is not installed.
        UsageError: fp16 without a GPU.
    """
    try:
        from accelerate import Accelerator
    except ImportError as error:
        raise MissingExtraError("accelerate", "train") from error
    on_cpu = device == "cpu" or not torch.cuda.is_available()
    if config.fp16 and on_cpu:
        raise UsageError("fp16 needs a GPU.", remedy="Use bf16, or neither.")
    accelerator = Accelerator(cpu=on_cpu, log_with=config.report_to, project_dir=trackers)
    if config.report_to is not None and trackers is not None:
        accelerator.init_trackers("pairdr", config=None)
    return accelerator


def _warn_of_two_spaces(encoder: DualEncoder, stage: StageConfig) -> None:
    if stage.alpha > 0 and encoder.contract.towers == "untied" and find_rank() == 0:
        say(
            f"pairdr: {stage.name}: with untied towers the passage-centric loss compares scores between two passages "
            "with scores between passage and query, from two spaces that training has to bring together; PAIR ties "
            "the towers for that reason (Ren et al. 2021, section 4)"
        )


def _to_lines(log: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(line) + "\n" for line in log)
