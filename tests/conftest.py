"""What the tests share: a cache of their own, a small data set in plain English, and models of a few kilobytes.

Nothing here reaches for the network, and nothing is random without a seed.
"""

from __future__ import annotations

import json
import os
import random
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # models of a few kilobytes are quicker on one thread

import pytest
from hypothesis import HealthCheck, settings
from servers import MissingPackageError, Server, start_server

settings.register_profile(
    "pairdr",
    deadline=None,
    derandomize=True,
    database=None,
    max_examples=50,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
settings.load_profile("pairdr")

if TYPE_CHECKING:
    from pairdr.collection import Collection
    from pairdr.encoder import DualEncoder
    from pairdr.lexical import LexicalIndex
    from pairdr.mine import Candidates
    from pairdr.vectors import VectorStore

Corpus = Mapping[str, str | tuple[str, str]]
Labels = Mapping[str, Mapping[str, Mapping[str, int]]]
WriteBeir = Callable[[Path, Corpus, Mapping[str, str], Labels], Path]


class Parts(NamedTuple):
    """What the stages read; nobody changes it."""

    collection: Collection
    encoder: DualEncoder
    start: Path
    index: LexicalIndex
    store: VectorStore
    candidates: Candidates


SEED = 13
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")

TOWNS = (
    "Ashford", "Birkdale", "Calder", "Dunmore", "Elmstead", "Farleigh", "Garstang", "Hexham", "Ilkley", "Jarrow",
    "Kendal", "Langport", "Marlow", "Norham", "Oakham", "Petworth", "Quorn", "Ryde", "Selby", "Thirsk",
)  # fmt: skip

# attribute: the passage, the question as it is asked in a split, the same asked in other words, the values.
ATTRIBUTES = {
    "river": (
        "The river that runs through {town} is called the {value}. It rises in the hills near {other} and is {n} miles "
        "long. Barges carried coal and timber on it until the railway came.",
        "which river runs through {town}",
        "what is the water called that {town} was built on",
        ("Wharfe", "Severn", "Lune", "Tamar", "Medway", "Stour"),
    ),
    "market": (
        "{town} holds its weekly market on {value}. Farmers from {other} sell cheese and wool there, and {n} stalls "
        "stand on the square on a good day.",
        "on which day is the market of {town} held",
        "when do farmers sell their cheese in {town}",
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"),
    ),
    "founder": (
        "{town} was founded by {value} in the year {n}. The abbey on the hill is older than the town and once belonged "
        "to the bishop of {other}.",
        "who founded the town of {town}",
        "name the person behind the beginnings of {town}",
        ("Edith Harcourt", "Hugh Mortimer", "Alan Percy", "Maud Clifford", "Roger Lacy", "Joan Neville"),
    ),
    "bridge": (
        "The old bridge of {town} was built from {value} and has {n} arches. A flood swept the first one away, and the "
        "road to {other} was closed for a winter.",
        "what is the bridge of {town} built from",
        "which material did the masons of {town} use for the crossing",
        ("granite", "sandstone", "oak", "brick", "iron", "limestone"),
    ),
    "museum": (
        "The museum of {town} shows {value}, given by a collector from {other}. It has {n} rooms and is open from "
        "spring to autumn.",
        "what does the museum of {town} show",
        "what can a visitor see in the rooms of the collection in {town}",
        ("clocks", "paintings", "steam engines", "butterflies", "old maps", "pottery"),
    ),
    "school": (
        "The grammar school of {town} teaches {n} children. Its best known pupil was {value}, whose father kept an inn "
        "at {other}.",
        "who was the best known pupil of the school of {town}",
        "which famous person learned to read and write in {town}",
        ("a poet", "an admiral", "a botanist", "an astronomer", "a composer", "an explorer"),
    ),
}


def write_beir_folder(folder: Path, corpus: Corpus, queries: Mapping[str, str], qrels: Labels) -> Path:
    """Write a BEIR folder: {id: text or (title, text)}, {id: text}, {split: {query id: {passage id: relevance}}}."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    passages = {key: value if isinstance(value, tuple) else ("", value) for key, value in corpus.items()}
    rows = [{"_id": key, "title": title, "text": text} for key, (title, text) in passages.items()]
    write_lines(folder / "corpus.jsonl", (json.dumps(row) for row in rows))
    write_lines(folder / "queries.jsonl", (json.dumps({"_id": key, "text": text}) for key, text in queries.items()))
    for split, labels in qrels.items():
        triples = (f"{q}\t{p}\t{relevance}" for q, judged in labels.items() for p, relevance in judged.items())
        write_lines(folder / "qrels" / f"{split}.tsv", ("query-id\tcorpus-id\tscore", *triples))
    return folder


def write_lines(path: Path, lines: Iterable[str]) -> None:
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Keep converted collections out of the user's cache, those of fixtures of any scope among them."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def servers() -> Iterator[Callable[[str], Server]]:
    """Return what starts each database server, once for all tests, and again where one has killed it."""
    started: dict[str, Server] = {}

    def start(engine: str) -> Server:
        try:
            started[engine] = started.get(engine) or start_server(engine)
        except MissingPackageError as error:
            pytest.skip(str(error))
        started[engine].start()
        return started[engine]

    yield start
    for server in started.values():
        server.stop()


@pytest.fixture(scope="session")
def write_beir() -> WriteBeir:
    """Return `write_beir(folder, corpus, queries, qrels)`, which writes a BEIR folder and returns it."""
    return write_beir_folder


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a BEIR folder about towns: 120 passages; 48 training, 48 dev and 24 test questions, 48 in the pool.

    Each question is answered by one passage. The questions of the pool ask for the passages of the training questions
    in other words.
    """
    draw = random.Random(SEED)
    corpus, asked, reworded = {}, {}, {}
    for town in TOWNS:
        for name, (passage, question, other_question, values) in ATTRIBUTES.items():
            key = f"{town.lower()}-{name}"
            other = draw.choice([t for t in TOWNS if t != town])
            text = passage.format(town=town, other=other, value=draw.choice(values), n=draw.randrange(3, 900))
            corpus[key] = (f"The {name} of {town}", text)
            asked[key] = question.format(town=town)
            reworded[key] = other_question.format(town=town)
    keys = sorted(corpus)
    draw.shuffle(keys)
    parts = {"test": keys[:24], "dev": keys[24:72], "train": keys[72:]}
    queries = {f"q-{key}": asked[key] for key in keys} | {f"u-{key}": reworded[key] for key in parts["train"]}
    qrels = {split: {f"q-{key}": {key: 1} for key in part} for split, part in parts.items()}
    return write_beir_folder(tmp_path_factory.mktemp("toy"), corpus, queries, qrels)


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """Return a Hugging Face folder: a BERT of 2 layers and 32 dimensions that has learned nothing.

    Its WordPiece vocabulary holds the words of the toy data, and letters for all others.
    """
    import torch
    from transformers import BertConfig, BertModel, BertTokenizerFast

    text = "".join((toy / name).read_text(encoding="utf-8") for name in ("corpus.jsonl", "queries.jsonl")).lower()
    letters = "abcdefghijklmnopqrstuvwxyz0123456789"
    words = sorted(set(re.findall(r"[a-z]{2,}", text)))
    vocabulary = [*SPECIAL, *letters, *(f"##{letter}" for letter in letters), *".,:?-_", *words]
    folder = tmp_path_factory.mktemp("bare-model")
    tokenizer = BertTokenizerFast(vocab={word: row for row, word in enumerate(vocabulary)}, model_max_length=160)
    tokenizer.save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        config = BertConfig(vocab_size=len(vocabulary), max_position_embeddings=160, **sizes)
        BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, bare_model: Path) -> Path:
    """Return the bare model as a sentence-transformers folder: mean pooling, normalised, cosine."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer

    transformer = Transformer(str(bare_model))
    pooling = Pooling(transformer.get_embedding_dimension(), "mean")
    folder = tmp_path_factory.mktemp("tiny-model")
    model = SentenceTransformer(modules=[transformer, pooling, Normalize()], device="cpu")
    model.save(str(folder), create_model_card=False)
    return folder


@pytest.fixture(scope="session")
def toy_parts(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Parts:
    """Return the toy data opened, indexed, encoded by the tiny model and mined with it."""
    from pairdr.collection import open_collection
    from pairdr.config import EncodeConfig, LexicalConfig, MineConfig, ModelConfig
    from pairdr.encode import encode_corpus
    from pairdr.encoder import DualEncoder
    from pairdr.lexical import index_words
    from pairdr.mine import mine_candidates

    folder = tmp_path_factory.mktemp("toy-parts")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(folder / "cache"))
        collection = open_collection(toy)
    DualEncoder.load(ModelConfig(start=str(tiny_model))).save(folder / "models" / "start", options={}, inputs={})
    encoder = DualEncoder.open(folder / "models" / "start")
    index = index_words(collection, LexicalConfig(), folder / "bm25")
    store = encode_corpus(collection, encoder, EncodeConfig(), folder / "vectors")
    # Without a margin: to a model that has learned nothing all texts are alike, and every passage too near.
    options = MineConfig(relative_margin=None)
    candidates = mine_candidates(collection, encoder, store, index, options, folder / "candidates")
    return Parts(collection, encoder, folder / "models" / "start", index, store, candidates)
