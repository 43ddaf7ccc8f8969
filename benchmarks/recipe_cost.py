"""What the paper's recipes cost, by arithmetic: hours, disk, memory of a card.

    python benchmarks/recipe_cost.py [recipes/msmarco.toml recipes/nq.toml]
    python benchmarks/recipe_cost.py --train 60000 --cross 80000 --encode 250000 --score 250000 --search 4e13

Speeds are tokens/s of one device with the recipe's own encoder, a body like BERT-base: what the log of training says
(`tokens_per_second`), tokens of texts by the seconds that encoding or scoring them took; and operations/s of search.
Unset, they are what docs/results.md measured on a processor with all-MiniLM-L6-v2, divided by how many times more
weights the larger body has. Texts count as full, so real ones cost less. Hours are of one device.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pairdr.config import RunConfig
from pairdr.origin import parse_options

ROOT = Path(__file__).resolve().parents[1]
MINILM_WEIGHTS = 6 * (4 * 384 * 384 + 2 * 384 * 1536)
HIDDEN, LAYERS, PARAMETERS = 768, 12, 110e6
WEIGHTS = LAYERS * (4 * HIDDEN * HIDDEN + 2 * HIDDEN * 4 * HIDDEN)
TIMES = WEIGHTS / MINILM_WEIGHTS
MILLION, ROUND_SPEED = 10**6, 100_000
BYTES_A_TOKEN = 5  # of English text, blanks included
ACTIVATION_BYTES = 34  # a token, layer and dimension in half precision (Korthikanti et al., arXiv 2205.05198)
TOKENS_PER_FORWARD = 32768


@dataclass(frozen=True)
class Sizes:
    """Of a data set, as RocketQAv2's table 1 counts it."""

    passages: int
    queries: int
    searched: int


@dataclass(frozen=True)
class Speeds:
    """Tokens/s of one device; operations/s of search."""

    train: float
    cross: float
    encode: float
    score: float
    search: float


@dataclass(frozen=True)
class Line:
    """One step: what it does, its tokens or operations, and how many of them a device does in a second."""

    what: str
    amount: float
    speed: float
    is_search: bool = False

    @property
    def hours(self) -> float:
        """Return the hours of one device."""
        return self.amount / self.speed / 3600


SIZES = {"msmarco": Sizes(8_841_823, 502_939, 6_980), "nq": Sizes(21_015_324, 58_812, 3_610)}
# docs/results.md: training with GradCache and without, 86 passages/s of 104 tokens, 1,189 queries/s of 100,000 vectors.
MEASURED = Speeds(
    train=1879 / TIMES,
    cross=2505 / TIMES,
    encode=86 * 104 / TIMES,
    score=86 * 104 / TIMES,
    search=1189.3 * 100_000 * 2 * 384,
)


def list_lines(config: RunConfig, sizes: Sizes, speeds: Speeds) -> Iterator[Line | str]:
    """Yield the steps, and headings between them; of PAIR alone, in one round."""
    train, model = config.train, config.model
    row = model.query_length + (1 + train.train_negatives) * model.passage_length  # tokens
    epochs, pair = train.num_train_epochs, config.teach.cross_encoder_length
    corpus = Line("encode the corpus once", sizes.passages * model.passage_length, speeds.encode)
    products = 2 * HIDDEN * sizes.passages  # operations of one query
    warm = config.warm.warm_steps * train.per_device_train_batch_size
    cross = config.teach.cross_encoder_steps * config.teach.cross_encoder_batch
    depth = config.label.label_depth
    yield "from the official training files"
    yield Line("train, labelled queries", sizes.queries * epochs * row, speeds.train)
    yield Line("train, a million pseudo-labelled ones", MILLION * epochs * row, speeds.train)
    yield corpus
    yield Line("search for the measured queries", sizes.searched * products, speeds.search, True)
    yield "the whole way has besides"
    yield Line("train the first model", warm * row, speeds.train)
    yield Line("encode the corpus twice more", 2 * corpus.amount, speeds.encode)
    yield Line("mine, labelled queries", sizes.queries * products, speeds.search, True)
    yield Line("mine, a million of the pool", MILLION * products, speeds.search, True)
    yield Line("train the cross-encoder", cross * pair, speeds.cross)
    yield Line("score, labelled queries", sizes.queries * depth * pair, speeds.score)
    yield Line("score, a million of the pool", MILLION * depth * pair, speeds.score)
    # Above, stage 1 reads the pseudo-labelled rows and stage 2 the labelled ones, as theirs; in `run` both read both.
    yield Line("train, labelled, in the other stage", sizes.queries * epochs * row, speeds.train)
    yield Line("train, a million, in the other stage", MILLION * epochs * row, speeds.train)


def list_places(config: RunConfig, sizes: Sizes) -> Iterator[tuple[str, float]]:
    """Yield what lies on the disk, then what one card holds in training, in bytes; formulas of docs/training.md."""
    train, model = config.train, config.model
    texts = sizes.passages * model.passage_length * BYTES_A_TOKEN
    yield "disk: texts, in three forms", 3 * texts
    yield "disk: vectors of one model", sizes.passages * HIDDEN * 4
    yield "disk: candidates of a million queries", 3 * MILLION * config.mine.depth * 16
    yield "disk: checkpoints", (train.save_total_limit + 1) * 3 * 4 * PARAMETERS
    rows = train.per_device_train_batch_size
    tokens = rows * (model.query_length + (1 + train.train_negatives) * model.passage_length)
    forward = min(tokens, TOKENS_PER_FORWARD)
    held = ACTIVATION_BYTES * HIDDEN * forward * LAYERS
    if not train.grad_cache:
        held *= tokens / forward
    if train.gradient_checkpointing:  # each layer's input, and one layer at a time in full
        held = 2 * HIDDEN * LAYERS * tokens + ACTIVATION_BYTES * HIDDEN * forward
    scores = 8 * 4 * rows * rows * (1 + train.train_negatives)
    yield "card: weights, gradients, two moments", 16 * PARAMETERS
    yield "card: activations", held
    yield "card: vectors, scores, their gradients", 2 * 4 * HIDDEN * rows * (2 + train.train_negatives) + scores


def print_costs(path: Path, speeds: Speeds) -> None:
    """Print the table of one recipe."""
    config = parse_options(path.read_text(encoding="utf-8"))
    sizes = SIZES[path.stem]
    print(f"{path.name:40}{'tokens':>10}{'hours':>10}{f'at {ROUND_SPEED:,}/s':>16}")
    for line in list_lines(config, sizes, speeds):
        if isinstance(line, str):
            print(line)
            continue
        tokens = "" if line.is_search else f"{line.amount:.2e}"
        again = "" if line.is_search else f"{line.amount / ROUND_SPEED / 3600:.1f}"
        print(f"  {line.what:38}{tokens:>10}{line.hours:10.1f}{again:>16}".rstrip())
    print(f"{'':40}{'GB':>10}")
    for what, size in list_places(config, sizes):
        print(f"  {what:38}{size / 1e9:10.1f}")
    print()


def main() -> None:
    """Read speeds and recipes, print a table each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipes", nargs="*", type=Path)
    for name, default in vars(MEASURED).items():
        parser.add_argument(f"--{name}", type=float, default=default)
    options = parser.parse_args()
    unknown = next((path for path in options.recipes if path.stem not in SIZES), None)
    if unknown is not None:
        known = " and ".join(f"{name}.toml" for name in SIZES)
        parser.error(f"{unknown}: how large its data are is not known here, only those of {known}")
    speeds = Speeds(**{name: getattr(options, name) for name in vars(MEASURED)})
    print(f"tokens/s: {speeds.train:.0f} training, {speeds.cross:.0f} training the cross-encoder, ", end="")
    print(f"{speeds.encode:.0f} encoding, {speeds.score:.0f} scoring")
    print(f"operations/s: {speeds.search:.2e} searching\n")
    for path in options.recipes or [ROOT / "recipes" / f"{name}.toml" for name in SIZES]:
        print_costs(path, speeds)


if __name__ == "__main__":
    main()
