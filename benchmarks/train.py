"""Training speed and loss, side by side with sentence-transformers' trainer, interleaved in one process.

    python benchmarks/train.py speed DATA [--dropout 0.1] [--rounds 5] [--steps 20] [--all] [--device cpu]
    python benchmarks/train.py curves DATA [--steps 200]
    python benchmarks/train.py profile DATA [--dropout 0.1] [--steps 10]

DATA: en_qa_mix (a folder below PAIRDR_DATA), python_docs (built from the installed packages), or words100 (the texts of
en_qa_mix cut into passages of exactly 100 words).

Both train all-MiniLM-L6-v2 whole, B = 32, one hard negative a row (another passage, seeded), texts cut at 128
tokens, AdamW (fused), the same dropout. sentence-transformers: MultipleNegativesRankingLoss, its trainer, its
no-duplicates sampler. The clock starts after two steps and covers everything from ids or texts to updated parameters.
Ratios are of tokens per second, padding not counted. The share of the peak of matrix products counts 6 operations per
weight of a linear layer and token.

profile: where the time of our steps goes, by kinds of operations, and how near the products come to the peak.
With --device cuda, both train in bf16 there; it was never run on one.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss
from train_data import SEED, draw_examples, open_data
from transformers import PrinterCallback, TrainerCallback
from transformers.utils import logging as transformers_logging

from pairdr.collection import Collection
from pairdr.config import ModelConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.formats import Examples
from pairdr.loop import State, backward_batch, read_batches, update_parameters
from pairdr.records import Example
from pairdr.tuning import make_optimizer, prepare_model, seed_step
from pairdr.watch import measure_peak

BATCH, WARM = 32, 2
KINDS = {
    "matrix products": ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm"),
    "attention": (
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    ),
    "GELU": ("aten::gelu", "aten::gelu_backward"),
    "layer norm": ("aten::native_layer_norm", "aten::native_layer_norm_backward"),
    "copies, fills, additions": (
        *("aten::copy_", "aten::fill_", "aten::zero_", "aten::add_", "aten::add", "aten::sum", "aten::cat"),
        *("aten::index_select", "aten::index_add_", "aten::embedding_dense_backward"),
    ),
    "optimizer": ("aten::_fused_adamw_", "aten::_foreach_norm", "aten::_foreach_mul_"),
}
"""Operations of torch by what they are for."""
MODEL = ModelConfig(start="minilm", passage_length=128, query_length=128, device="cpu")
CONFIG = TrainConfig(per_device_train_batch_size=BATCH, alpha=0.1, train_negatives=1, learning_rate=5e-5)


class Ours:
    """pairdr's loop, without dev and log."""

    def __init__(self, data: Collection, examples: Examples, alpha: float, config: TrainConfig, device: str) -> None:
        self.data, self.alpha, self.config = data, alpha, replace(config, bf16=device != "cpu")
        self.encoder = DualEncoder.load(replace(MODEL, device=device))
        self.state = State(batch_size=BATCH)
        self.batches = read_batches(examples, config, self.state)
        self.optimizer = make_optimizer(self.encoder.model, config)
        self.scaler = torch.amp.GradScaler(self.encoder.device, enabled=False)
        self.tokens = self.padded = 0

    def train(self, steps: int) -> float:
        """Take some steps and return the seconds of all but the first two."""
        with prepare_model(self.encoder, self.config) as model:
            model.train()
            for step in range(WARM + steps):
                if step == WARM:
                    _wait(self.encoder.device)
                    begin, self.tokens, self.padded = time.perf_counter(), 0, 0
                seed_step(SEED, step)
                _, groups = backward_batch(
                    self.data, self.encoder, next(self.batches), self.alpha, self.config, self.scaler
                )
                update_parameters(model, self.optimizer, self.scaler, 1e-7, self.config, step + 1)
                self.tokens += sum(map(sum, groups))
                self.padded += sum(len(lengths) * max(lengths) for lengths in groups)
        _wait(self.encoder.device)
        return time.perf_counter() - begin


class Theirs:
    """SentenceTransformerTrainer on the same rows."""

    def __init__(self, data: Collection, examples: Examples, dropout: float, device: str) -> None:
        self.encoder = DualEncoder.load(replace(MODEL, device=device))
        self.model = self.encoder.model
        self.model.max_seq_length = MODEL.passage_length
        _set_dropout(self.model, dropout)
        self.rows = [_texts(data, example) for example in examples]
        self.loss = MultipleNegativesRankingLoss(self.model)
        self.used = self.tokens = 0

    def train(self, steps: int) -> float:
        """Take some steps and return the seconds of all but the first two."""
        count = (WARM + steps) * BATCH
        rows = [self.rows[(self.used + at) % len(self.rows)] for at in range(count + BATCH)]
        self.used += count
        clock = Clock(self.encoder.device)
        run_trainer(
            self.model,
            self.loss,
            rows,
            WARM + steps,
            1e-7,
            clock,
            batch_sampler="no_duplicates",
            bf16=clock.device != "cpu",
        )
        texts = [text for row in rows[WARM * BATCH : count] for text in row]
        self.tokens = sum(len(text.input_ids) for text in self.encoder.tokenize_queries(texts))
        return clock.ended - clock.began


class Clock(TrainerCallback):
    """Starts after the warm steps, stops with the last one."""

    def __init__(self, device: str) -> None:
        self.device = device

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the time."""
        if state.global_step in (WARM, state.max_steps):
            _wait(self.device)
        if state.global_step == WARM:
            self.began = time.perf_counter()
        self.ended = time.perf_counter()


class InOrder(SentenceTransformerTrainer):
    """Takes the rows as they come, and keeps every step's loss."""

    losses: list[float]

    def get_batch_sampler(self, dataset: Any, batch_size: int, drop_last: bool, **options: Any) -> Any:
        """Return batches in the order of the rows."""
        return _Sequential(len(dataset), batch_size)

    def compute_loss(self, *arguments: Any, **options: Any) -> Any:
        """Return the loss, and remember it."""
        found = super().compute_loss(*arguments, **options)
        self.losses.append(float(found[0] if isinstance(found, tuple) else found))
        return found


class _Sequential(torch.utils.data.BatchSampler):
    def __init__(self, count: int, size: int) -> None:
        self.count, self.batch_size, self.drop_last = count, size, True

    def __len__(self) -> int:
        return self.count // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        return (list(range(at, at + self.batch_size)) for at in range(0, len(self) * self.batch_size, self.batch_size))

    def set_epoch(self, epoch: int) -> None:
        pass


def run_trainer(
    model: Any,
    loss: Any,
    rows: list[tuple[str, str, str]],
    steps: int,
    rate: float,
    *callbacks: TrainerCallback,
    kind: Any = SentenceTransformerTrainer,
    **options: Any,
) -> Any:
    """Run sentence-transformers' trainer over rows of (query, positive, negative)."""
    columns = dict(zip(("query", "positive", "negative"), map(list, zip(*rows, strict=True)), strict=True))
    with tempfile.TemporaryDirectory() as folder:
        arguments = SentenceTransformerTrainingArguments(
            output_dir=folder,
            max_steps=steps,
            per_device_train_batch_size=BATCH,
            learning_rate=rate,
            weight_decay=CONFIG.weight_decay,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=model.device.type == "cpu",
            seed=SEED,
            dataloader_pin_memory=False,
            **options,
        )
        trainer = kind(
            model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=loss, callbacks=list(callbacks)
        )
        if kind is InOrder:
            trainer.losses = []
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer


def measure_speed(name: str, dropout: float, rounds: int, steps: int, everything: bool, device: str) -> None:
    """Print seconds per step of all contenders, interleaved round by round; `everything` adds PAIR and GradCache."""
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(name, Path(folder))
        examples = draw_examples(data, 100_000, Path(folder) / "examples.arrow")
        config = replace(CONFIG, dropout=dropout)
        contenders: dict[str, Any] = {
            "sentence-transformers": Theirs(data, Examples(examples.table.slice(0, 8192)), dropout, device),
            "pairdr, query-centric": Ours(data, examples, 0.0, config, device),
        }
        if everything:
            contenders |= {
                "pairdr, PAIR": Ours(data, examples, 0.1, config, device),
                "pairdr, PAIR, GradCache": Ours(data, examples, 0.1, replace(config, grad_cache=True), device),
            }
        seconds: dict[str, list[float]] = {title: [] for title in contenders}
        speeds: dict[str, list[float]] = {title: [] for title in contenders}  # tokens/s
        peaks = []
        for _ in range(rounds):
            numbers = torch.float32 if device == "cpu" else torch.bfloat16
            peaks.append(measure_peak.__wrapped__(torch.device(device), numbers))
            for title, contender in contenders.items():
                seconds[title].append(contender.train(steps) / steps)
                speeds[title].append(contender.tokens / steps / seconds[title][-1])
        ours = contenders["pairdr, query-centric"]
        weights = sum(m.weight.numel() for m in ours.encoder.model.modules() if isinstance(m, torch.nn.Linear))
        peak = statistics.median(peaks)
        threads = torch.get_num_threads()
        padding = 1 - ours.tokens / ours.padded
        print(f"{name}, dropout {dropout}, B={BATCH}, {rounds} rounds of {steps} steps, {threads} threads")
        count, rate = ours.tokens / steps, peak / 1e9
        print(f"{count:.0f} tokens a step, padding {padding:.3f}; peak of matrix products {rate:.0f} GFLOP/s")
        print(f"{'':26}{'s/step':>8}{'range':>16}{'ratio':>8}{'range':>16}{'tokens/s':>10}{'of peak':>9}")
        rival = speeds["sentence-transformers"]
        for title, found in seconds.items():
            speed = statistics.median(speeds[title])
            ratios = [mine / theirs for mine, theirs in zip(speeds[title], rival, strict=True)]
            print(
                f"{title:26}{statistics.median(found):8.2f}{min(found):9.2f}-{max(found):.2f}"
                f"{statistics.median(ratios):10.2f}{min(ratios):11.2f}-{max(ratios):.2f}"
                f"{speed:10.0f}{6 * weights * speed / peak:9.0%}"
            )


def profile_steps(name: str, dropout: float, steps: int) -> None:
    """Print the share of each kind of operation in the time of our steps, and the rate of the products."""
    from torch.profiler import ProfilerActivity, profile

    with tempfile.TemporaryDirectory() as folder:
        data = open_data(name, Path(folder))
        examples = draw_examples(data, 100_000, Path(folder) / "examples.arrow")
        ours = Ours(data, examples, 0.0, replace(CONFIG, dropout=dropout), "cpu")
        peak = measure_peak.__wrapped__(torch.device("cpu"), torch.float32)
        ours.train(1)
        with profile(activities=[ProfilerActivity.CPU]) as found:
            seconds = ours.train(steps)
    spent = dict.fromkeys((*KINDS, "other operations"), 0.0)
    for event in found.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key in names), "other operations")
        spent[kind] += event.self_cpu_time_total / 1e6
    whole = seconds * (WARM + steps) / steps  # the profile also holds the warm steps
    weights = sum(m.weight.numel() for m in ours.encoder.model.modules() if isinstance(m, torch.nn.Linear))
    rate = 6 * weights * ours.tokens / steps * (WARM + steps) / spent["matrix products"]
    print(f"{name}, dropout {dropout}, {steps} steps of {seconds / steps:.2f} s; peak {peak / 1e9:.0f} GFLOP/s")
    for kind, time_spent in sorted(spent.items(), key=lambda pair: -pair[1]):
        print(f"{kind:40}{time_spent / whole:8.1%}")
    print(f"{'outside of operations':40}{1 - sum(spent.values()) / whole:8.1%}")
    print(f"products run at {rate / peak:.0%} of the peak")


def compare_curves(name: str, steps: int) -> None:
    """Print both losses over some steps at dropout 0, with the same rows in the same order."""
    with tempfile.TemporaryDirectory() as folder:
        data = open_data(name, Path(folder))
        examples = draw_examples(data, (steps + 8) * BATCH, Path(folder) / "examples.arrow")
        config = replace(CONFIG, dropout=0.0, mask_false_negatives=False, warmup_steps=0.0)
        encoder = DualEncoder.load(MODEL)
        rival = DualEncoder.load(MODEL).model
        rival.max_seq_length = MODEL.passage_length
        _set_dropout(rival, 0.0)
        batches = read_batches(examples, config, State(batch_size=BATCH))
        rows: list[tuple[str, str, str]] = []
        mine: list[float] = []
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        with prepare_model(encoder, config) as model:
            optimizer = make_optimizer(model, config)
            model.train()
            for step in range(steps):
                batch = next(batches)
                found, _ = backward_batch(data, encoder, batch, 0.0, config, scaler)
                update_parameters(model, optimizer, scaler, config.learning_rate * (1 - step / steps), config, step + 1)
                mine.append(found["loss"])
                for at, query_id in enumerate(batch.query_ids):
                    ids = batch.passage_ids[batch.positive[at]], batch.passage_ids[batch.negative[at, 0]]
                    rows.append((data.query(query_id).text, *(data.passage(i).joined for i in ids)))
        loss = MultipleNegativesRankingLoss(rival, scale=1 / encoder.temperature)
        theirs = run_trainer(rival, loss, rows, steps, config.learning_rate, kind=InOrder).losses
        print(f"{name}, dropout 0, learning rate {config.learning_rate}, {steps} steps: step, pairdr, rival, gap")
        for at in [0, 1, 2, 4, 9, *range(19, steps, 20)]:
            print(f"{at + 1:6}{mine[at]:12.6f}{theirs[at]:12.6f}{abs(mine[at] - theirs[at]):12.1e}")
        gaps = [abs(one - other) for one, other in zip(mine, theirs, strict=True)]
        print(f"largest gap {max(gaps):.1e}, mean {statistics.mean(gaps):.1e}; mean loss {statistics.mean(mine):.4f}")


def _texts(data: Collection, example: Example) -> tuple[str, str, str]:
    return (
        data.query(example.query_id).text,
        data.passage(example.positive_id).joined,
        data.passage(example.negative_ids[0]).joined,
    )


def _wait(device: str) -> None:
    """Wait until the device has done what it was told."""
    if device != "cpu":
        torch.cuda.synchronize()


def _set_dropout(model: torch.nn.Module, p: float) -> None:
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = p


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "curves", "profile"))
    parser.add_argument("data", choices=("en_qa_mix", "python_docs", "words100"))
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--device", default="cpu")
    options = parser.parse_args()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    if options.what == "speed":
        measure_speed(options.data, options.dropout, options.rounds, options.steps or 20, options.all, options.device)
    elif options.what == "profile":
        profile_steps(options.data, options.dropout, options.steps or 10)
    else:
        compare_curves(options.data, options.steps or 200)


if __name__ == "__main__":
    main()
