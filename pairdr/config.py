"""Every option of every stage: its name, default, unit, range and help.

A stage's options are one frozen dataclass. The commands, the TOML files and the Python functions all read these
classes, so an option is spelled the same everywhere. `RunConfig` holds one of each and is what a recipe file fills.
What is done with finished models and vectors has its options in store_config.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from pairdr.errors import UsageError
from pairdr.options import Options as Options
from pairdr.options import find_broken_range, option

ARMS = ("labelled_only", "query_centric", "pair")
"""The models that `run` can train, in the order of the table's rows."""

TrainArm = Literal["labelled_only", "query_centric", "pair", "pair_stage1"]
"""What `train` can train: those, and stage 1 of PAIR alone, which another start or other examples may follow."""


OnDuplicate = Literal["error", "first", "last"]
"""What becomes of an id that occurs twice."""


@dataclass(frozen=True)
class DataConfig(Options):
    """How a data set is opened."""

    unlabelled: tuple[Path, ...] = option((), "Files of further questions without labels (.jsonl[.gz], or .txt).")
    labelled: tuple[Path, ...] = option(
        (), "Folders of further labelled training questions (queries.jsonl, qrels/train.tsv), as `serve` collects them."
    )
    hide_labels: float = option(0.0, "Share of the labelled training queries moved into the pool.", low=0, high=0.99)
    held_out: Path | None = option(None, "File of passage ids, one a line, that training never sees.")
    on_duplicate: OnDuplicate = option("error", "Which passage or query of an id that occurs twice is taken.")
    dev_queries: int = option(500, "Training queries set aside as dev where the data has no dev split.", low=1)
    data_seed: int = option(13, "Seed of the hidden labels and of a made dev split.", low=0)
    licence: str | None = option(None, "Licence of the data, for the card of a model that is trained on them.")


@dataclass(frozen=True)
class ModelConfig(Options):
    """The start model and the contract of the encoder."""

    start: str = option(
        "sentence-transformers/all-MiniLM-L6-v2",
        "Start model: a folder or a hub name; 'minilm' is all-MiniLM-L6-v2 from the demo extra.",
    )
    layers: int | None = option(None, "Keep only the first layers of the start model; unset keeps all.", low=1)
    pooling: Literal["auto", "cls", "mean"] = option(
        "auto", "auto keeps a sentence-transformers folder's own; cls otherwise."
    )
    similarity: Literal["auto", "cosine", "dot"] = option(
        "auto", "auto keeps a sentence-transformers folder's own; dot otherwise."
    )
    towers: Literal["tied", "untied"] = option(
        "tied", "untied: queries and passages get an encoder each, begun from the same weights."
    )
    temperature: float | None = option(
        None, "Divides the scores in the losses; unset: 0.05 for cosine, 1.0 for dot.", low=1e-4
    )
    title: Literal["join", "segment"] = option(
        "join", "join: 'title text' as one string; segment: a pair, cut longest first."
    )
    query_prefix: str | None = option(None, "Put before each query; unset keeps the model's own.")
    passage_prefix: str | None = option(None, "Put before each passage; unset keeps the model's own.")
    query_length: int = option(32, "Most tokens of a query, special tokens included.", low=3)
    passage_length: int = option(128, "Most tokens of a passage, special tokens included.", low=3)
    device: str | None = option(None, "cpu, cuda, cuda:1, ...; unset picks the best there is.")


@dataclass(frozen=True)
class LexicalConfig(Options):
    """BM25."""

    k1: float = option(1.5, "Term frequency saturation.", low=0)
    b: float = option(0.75, "Length normalisation.", low=0, high=1)
    language: str = option("english", "Language of stemmer and stop words; 'none' uses neither.")
    split_names: bool = option(False, "Split identifiers at _ . and CamelCase, for code.")


@dataclass(frozen=True)
class WarmConfig(Options):
    """Query-centric training of the model that mines, where the start is not yet a retriever."""

    warm: Literal["auto", "always", "never"] = option("auto", "auto: only for a bare encoder.")
    warm_steps: int = option(200, "Optimizer steps.", low=1)


@dataclass(frozen=True)
class MineConfig(Options):
    """Candidates and hard negatives."""

    depth: int = option(200, "Candidates per query.", low=1)
    keep: int = option(50, "Negatives kept per labelled query.", low=1)
    absolute_margin: float | None = option(
        None, "Keep a negative only if its score is this far below the positive's.", low=0
    )
    relative_margin: float | None = option(
        0.05, "Keep a negative only if its score is below (1 - this) x the positive's.", low=0, high=1
    )
    max_score: float | None = option(None, "Keep a negative only if its score is at most this.")
    sampling: Literal["top", "random"] = option("top", "Which of the surviving candidates are kept.")
    near_copy: float = option(
        0.9, "Word-5-gram Jaccard from which a passage is a near copy of a positive.", low=0, high=1
    )
    mine_seed: int = option(13, "Seed of random sampling.", low=0)


@dataclass(frozen=True)
class TeachConfig(Options):
    """Teachers, and the gate that one has to pass."""

    cross_encoder: str | None = option(None, "'train' trains one here; a folder or hub name uses a ready one.")
    dual_encoder: str | None = option(None, "A larger dual encoder as a teacher: a folder or a hub name.")
    fusion: bool = option(True, "Also try weighted fusions with the student and with BM25.")
    rerank_depth: int = option(50, "Candidates of the student that a teacher re-ranks on dev.", low=2)
    gate_queries: int = option(500, "Most labelled dev queries that judge the teachers.", low=2)
    gate_level: float = option(
        0.05, "A teacher has to beat the student with a smaller p-value than this.", low=0, high=1
    )
    cross_encoder_steps: int = option(300, "Optimizer steps of the cross-encoder.", low=1)
    cross_encoder_negatives: int = option(4, "Negatives per positive for the cross-encoder.", low=1)
    cross_encoder_batch: int = option(32, "Query-passage pairs per step of the cross-encoder.", low=2)
    cross_encoder_learning_rate: float = option(5e-5, "Learning rate of the cross-encoder.", low=0)
    cross_encoder_length: int = option(160, "Most tokens of a query with its passage.", low=8)
    teach_seed: int = option(13, "Seed of the cross-encoder's data and weights.", low=0)


@dataclass(frozen=True)
class LabelConfig(Options):
    """Pseudo positives for the pool, denoised negatives for all."""

    label_depth: int = option(20, "Candidates per query that the teacher scores.", low=2)
    s_pos: float | None = option(None, "A pseudo positive scores above this; unset calibrates it on dev.")
    s_neg: float | None = option(None, "A denoised negative scores below this; unset calibrates it on dev.")
    target_precision: float = option(0.8, "Calibration: wanted share of right pseudo positives.", low=0, high=1)
    false_negatives: float = option(
        0.05, "Calibration: accepted share of positives that score below s_neg.", low=0, high=1
    )
    negatives_below: Literal["s_neg", "positive"] = option(
        "s_neg", "positive: a labelled query also keeps negatives that score below its own positive."
    )
    negatives: int = option(4, "Denoised negatives stored per query.", low=1)


@dataclass(frozen=True)
class TrainConfig(Options):
    """The training loop. Names follow Hugging Face's TrainingArguments."""

    alpha: float = option(0.1, "Weight of the passage-centric loss in stage 1 (PAIR, section 4).", low=0, high=1)
    passage_negatives: Literal["official", "own", "hard_all", "hard_all_pos"] = option(
        "official", "Candidates of the passage-centric loss."
    )
    mask_false_negatives: bool = option(True, "Known positives are never negatives in a batch.")
    train_negatives: int = option(1, "Hard negatives per row (K); fewer where an example has fewer.", low=0)
    per_device_train_batch_size: int = option(32, "Rows per batch and process (B).", low=2)
    gradient_accumulation_steps: int = option(1, "Batches per optimizer step.", low=1)
    num_train_epochs: float = option(1.0, "Passes over the examples, per stage.", low=0)
    max_steps: int | None = option(None, "Optimizer steps per stage; overrides num_train_epochs.", low=1)
    learning_rate: float = option(5e-5, "Peak learning rate.", low=0)
    warmup_steps: float = option(0.1, "Linear warm-up: steps, or a share of all steps when below 1.", low=0)
    weight_decay: float = option(0.01, "AdamW's decay of weight matrices.", low=0)
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm; 0 clips nothing.", low=0)
    dropout: float | None = option(
        None, "Dropout of hidden states and attention; unset keeps the model's own.", low=0, high=0.9
    )
    optimizer: Literal["adamw", "lamb"] = option("adamw", "lamb is that of the paper's runs of batch 4,096.")
    lr_schedule: Literal["linear", "paper"] = option("linear", "Form of the way down; see docs/training.md.")
    query_negatives: bool = option(False, "L_Q also parts a query from the other queries (SamToNe).")
    symmetric: bool = option(False, "L_Q is the mean of both directions, query to passage and back.")
    false_negative_margin: float | None = option(
        None, "Leave out candidates more similar than the positive by more than this; unset keeps all."
    )
    distillation: Literal["none", "listwise", "margin_mse"] = option("none", "Learn from the teacher's scores too.")
    distillation_weight: float = option(1.0, "Weight of the distillation loss.", low=0)
    distillation_temperature: float = option(1.0, "Divides the teacher's scores, listwise; below 1 sharpens.", low=1e-3)
    matryoshka_dims: tuple[int, ...] = option((), "Train the first so many dimensions as vectors of their own too.")
    cross_batch_negatives: bool = option(True, "Under torchrun, the other ranks' rows are candidates too.")
    grad_cache: bool = option(False, "Hold the graph of one forward pass at a time: any batch in little memory.")
    tokens_per_forward: int | None = option(
        None, "Most padded tokens of a forward pass; unset: 2048 on a CPU, 32768 on a GPU.", low=16
    )
    bf16: bool = option(False, "Autocast to bfloat16; logits and losses stay fp32.")
    fp16: bool = option(False, "Autocast to float16 with a scaled loss, on a GPU.")
    attn_implementation: Literal["auto", "eager", "sdpa", "flash_attention_2", "flex_attention"] = option(
        "auto", "transformers' attention in training; auto keeps the model's."
    )
    gradient_checkpointing: bool = option(False, "Recompute activations in the backward pass.")
    lora_rank: int | None = option(None, "Train low-rank additions (LoRA) of this rank, merged at the end.", low=1)
    save_steps: int = option(500, "Steps between two checkpoints.", low=1)
    save_total_limit: int = option(2, "Newest checkpoints that are kept.", low=1)
    resume_from_checkpoint: bool = option(True, "Go on from the newest valid checkpoint.")
    load_best_model_at_end: bool = option(False, "Keep the step that was best on dev, not the last one.")
    eval_steps: int = option(100, "Steps between two looks at dev.", low=1)
    eval_passages: int = option(1000, "Passages in the dev sample, the dev positives among them.", low=1)
    eval_queries: int = option(200, "Most dev queries in the dev sample.", low=1)
    logging_steps: int = option(10, "Steps between two lines of the log.", low=1)
    report_to: str | None = option(None, "A tracker of accelerate: tensorboard, wandb, ...")
    seed: int = option(13, "Seed of order and dropout.", low=0)

    def __post_init__(self) -> None:
        """Check ranges, and that a loss over hard negatives gets some."""
        super().__post_init__()
        if self.distillation != "none" and self.train_negatives == 0:
            raise UsageError(f"Option distillation is {self.distillation!r}, which needs train_negatives above 0.")
        if self.attn_implementation == "flash_attention_2" and not (self.bf16 or self.fp16):
            raise UsageError("Option attn_implementation is 'flash_attention_2', which needs bf16 or fp16.")
        if self.bf16 and self.fp16:
            raise UsageError("Options bf16 and fp16 exclude each other.")
        if self.passage_negatives in ("own", "hard_all") and self.train_negatives == 0:
            raise UsageError(
                f"Option passage_negatives is {self.passage_negatives!r}, which needs train_negatives of at least 1."
            )

    def options_of(self, stage: StageConfig) -> dict[str, Any]:
        """Return the options that decide a stage's model; those of a loss that is not computed do not count."""
        unused = {"save_steps", "save_total_limit", "resume_from_checkpoint", "logging_steps", "report_to"}
        if stage.alpha == 0:
            unused |= {"alpha", "passage_negatives"}
        if self.distillation == "none":
            unused |= {"distillation_weight", "distillation_temperature"}
        return {name: value for name, value in self.as_dict().items() if name not in unused} | stage.as_dict()


@dataclass(frozen=True)
class StageConfig(Options):
    """One stage of training."""

    name: str
    alpha: float
    sources: tuple[str, ...]
    """Example files that it reads: labelled, pseudo, plain."""


def list_stages(arm: str, config: TrainConfig) -> tuple[StageConfig, ...]:
    """Return the stages that make a model.

    Args:
        arm: `pair` is both relations, then the query-centric one; `query_centric` the same data and steps without
            the passage-centric loss; `labelled_only` the labels alone, with mined negatives and no teacher;
            `pair_stage1` the first stage of `pair`.
        config: the weight of the passage-centric loss.

    Raises:
        UsageError: an unknown arm.
    """
    known = get_args(TrainArm)
    if arm not in known:
        raise UsageError(f"Unknown arm {arm!r}.", remedy=f"There are: {', '.join(known)}.")
    if arm == "labelled_only":
        return (StageConfig("query_centric", 0.0, ("plain",)),)
    both = ("pseudo", "labelled")
    alpha = 0.0 if arm == "query_centric" else config.alpha
    first = StageConfig("pair" if alpha else "query_centric", alpha, both)
    return (first,) if arm == "pair_stage1" else (first, StageConfig("query_centric", 0.0, both))


@dataclass(frozen=True)
class EncodeConfig(Options):
    """Texts to vectors."""

    tokens_per_batch: int | None = option(
        None, "Most padded tokens of a forward pass; unset: 1024 on a CPU, 32768 on a GPU.", low=16
    )
    shard_size: int = option(8192, "Passages per shard: what a killed process can lose.", low=1)
    dtype: Literal["float32", "float16", "int8"] = option("float32", "Numbers of the stored vectors.")


@dataclass(frozen=True)
class SearchConfig(Options):
    """Vectors to ranked passages."""

    k: int = option(100, "Passages per query.", low=1)
    query_block: int = option(256, "Queries per block.", low=1)
    passage_block: int = option(16384, "Passages per block.", low=1)


@dataclass(frozen=True)
class EvaluateConfig(Options):
    """Measures and tests."""

    measures: tuple[str, ...] = option(("RR@10", "nDCG@10", "R@100"), "Measures by the names of ir_measures.")
    resamples: int = option(10000, "Resamples of the paired randomisation test.", low=100)
    test_seed: int = option(13, "Seed of the test.", low=0)


@dataclass(frozen=True)
class RunConfig(Options):
    """All stages of `pairdr run`."""

    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    lexical: LexicalConfig = field(default_factory=LexicalConfig)
    warm: WarmConfig = field(default_factory=WarmConfig)
    mine: MineConfig = field(default_factory=MineConfig)
    teach: TeachConfig = field(default_factory=TeachConfig)
    label: LabelConfig = field(default_factory=LabelConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    encode: EncodeConfig = field(default_factory=EncodeConfig)
    search: SearchConfig = field(default_factory=SearchConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    arms: tuple[str, ...] = option(("pair",), "Models to train: pair, labelled_only, query_centric, or all.")
    rounds: int = option(1, "Times to mine, label and train, each with the model of the time before.", low=1)

    def __post_init__(self) -> None:
        """Check what no section checks."""
        wanted = find_broken_range(self.rounds, 1, None, fractions=False)
        if wanted is not None:
            raise UsageError(f"Option rounds is {self.rounds!r}; it must be {wanted}.")


def change_options(config: RunConfig, changes: Mapping[str, Mapping[str, Any]]) -> RunConfig:
    """Return a configuration with some options changed.

    Args:
        config: where to start from.
        changes: section name to {option: value}, as a TOML file holds them.

    Raises:
        UsageError: an unknown section or option, naming those that exist.
    """
    sections: dict[str, Any] = {}
    for name, values in changes.items():
        section = getattr(config, name, None)
        if not isinstance(section, Options) or not isinstance(values, Mapping):
            known = [spec.name for spec in fields(config) if isinstance(getattr(config, spec.name), Options)]
            raise UsageError(f"Unknown section [{name}].", remedy=f"There are: {', '.join(known)}.")
        options = {spec.name: spec for spec in fields(section)}
        unknown = next((key for key in values if key not in options), None)
        if unknown is not None:
            raise UsageError(f"Unknown option {unknown} in [{name}].", remedy=f"There are: {', '.join(options)}.")
        hints = get_type_hints(type(section))
        sections[name] = replace(section, **{key: _from_toml(value, hints[key]) for key, value in values.items()})
    return replace(config, **sections)


def _from_toml(value: Any, hint: Any) -> Any:
    """Return a value as an option of that type holds it; "none" unsets an option that is a number or nothing."""
    kinds = {*get_args(hint)} or {hint}
    if isinstance(value, list):
        return tuple(Path(item) if Path in kinds else item for item in value)
    if value == "none" and type(None) in kinds and not kinds.isdisjoint({int, float}):
        return None
    return Path(value) if Path in kinds and isinstance(value, str) else value
