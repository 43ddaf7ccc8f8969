"""A plan on paper: what each stage costs for a large corpus, by arithmetic from measured rates.

    python benchmarks/scale.py [--passages 8841823 21015324 100000000] [--machines 4] [--cores 16] ...
    python benchmarks/rates.py                       # measures the rates of this machine, to be given here

Every number that goes in is an option; `--help` says where each default was measured. Rates are of one core unless
they say otherwise, and taken to grow with cores and machines: no run of several machines was measured. Nothing was
measured on a GPU: its rates are given, or derived (marked ~) as operations/s x share / operations of a token, which
are 2 for each weight forward and 6 in training. Hours are those of the machines that are given; a stage that runs on
one core or one machine, whatever is given, says so.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

from recipe_cost import BYTES_A_TOKEN, MEASURED, MINILM_WEIGHTS, SIZES, TIMES

from pairdr.config import TeachConfig
from pairdr.index import plan_index
from pairdr.store_config import IndexConfig

WORDS_A_TOKEN = 0.75  # of English text
BYTES = {"float32": 4, "float16": 2, "int8": 1}
ROW_BYTES = 24  # of a store: hash, row and rank of an id
SORT_BYTES = 40  # a passage, while ids are sorted: hashes, their order, the ids' order, rows, ranks
GB, HOUR = 1e9, 3600
TRAINED_PER_LIST = 64  # vectors that centres are found from, as pairdr/index.py has it
PASSAGES = (SIZES["msmarco"].passages, SIZES["nq"].passages, 100_000_000)


def given(default: Any, help: str) -> Any:
    """Define one number that goes in."""
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class Inputs:
    """All numbers that go in, but the passages."""

    tokens: float = given(128, "of a passage")
    query_tokens: float = given(32, "of a query")
    dimensions: int = given(384, "of a vector")
    dtype: str = given("float32", "of the stored vectors: float32, float16 or int8")
    body: float = given(1.0, "weights of the encoder's layers in those of all-MiniLM-L6-v2; BERT-base: 8")
    queries: int = given(100_000, "training queries that are mined, labelled and trained on")
    depth: int = given(20, "candidates of a query that the teacher scores")
    negatives: int = given(1, "of a training row")
    epochs: float = given(1.0, "of each of the two stages")
    k: int = given(100, "passages of a query")
    machines: int = given(4, "machines")
    cores: int = given(16, "of a machine")
    memory: float = given(64.0, "GB of a machine")
    disk: float = given(1.0, "GB/s that a machine reads from its disk")
    network: float = given(10.0, "Gbit/s of a machine")
    gpus: int = given(0, "of a machine")
    core_price: float | None = given(None, "of a core for an hour; unset: no prices")
    gpu_price: float | None = given(None, "of a GPU for an hour")
    # results.md, "Rates for a plan".
    convert: float = given(8.4e6, "words/s that a core converts")
    bm25_index: float = given(5.0e5, "words/s that a core indexes for BM25")
    bm25_memory: float = given(36.0, "bytes a word that indexing them holds")
    bm25_disk: float = given(6.9, "bytes a word of that index")
    bm25_search: float = given(8.9e7, "passages/s that BM25 scores for one question")
    batch: float | None = given(None, "operations/s of a core in exact search of many queries; unset: by dtype")
    single: float | None = given(None, "GB/s of vectors that a machine looks at for one query; unset: by dtype")
    # results.md: "Encoding speed" (openvino-int8, torch), "Training speed" (GradCache, direct), two cores each.
    encode: float = given(226 * 104 / 2, "tokens/s that a core encodes, of all-MiniLM-L6-v2 in int8")
    score: float = given(MEASURED.score * TIMES / 2, "tokens/s that a core scores with a cross-encoder of that body")
    train: float = given(MEASURED.train * TIMES / 2, "tokens/s that a core trains, of that body")
    cross: float = given(MEASURED.cross * TIMES / 2, "tokens/s that a core trains a cross-encoder, of that body")
    # results.md, "Kinds of index on real vectors": 125,292 vectors of 384 dimensions, two cores.
    ivf: float = given(125_292 * 1024 * 2 * 384 / 5.6 / 2, "operations/s of a core that builds an ivf index")
    hnsw: float = given(125_292 / 30.3, "vectors/s that the one thread adds to a graph of 125,292")
    gpu_operations: float = given(1e14, "of a GPU in half precision in a second: a round number")
    gpu_share: float = given(0.3, "of these that encoding and training reach: a guess")
    gpu_encode: float | None = given(None, "tokens/s of a GPU, of your body; unset: derived")
    gpu_score: float | None = given(None, "tokens/s of a GPU; unset: derived")
    gpu_train: float | None = given(None, "tokens/s of a GPU; unset: derived")
    # results.md, "Vectors in databases": server and loader on the same two cores.
    milvus_load: float = given(125_292 / 33.4, "vectors/s that Milvus takes, of 384 dimensions")
    pgvector_load: float = given(125_292 / 56.1, "vectors/s that PostgreSQL takes, likewise")


# results.md, "Rates for a plan".
BATCH = {"float32": 1.13e11, "float16": 9.2e10, "int8": 1.04e11}
SINGLE = {"float32": 23.3, "float16": 2.5, "int8": 2.5}


@dataclass(frozen=True)
class Work:
    """What a stage costs.

    Attributes:
        what: the stage.
        core: seconds of one core.
        on: what it can be shared among: core, machine or all.
        gpu: seconds of one GPU; None where none is used.
        disk: bytes that it leaves there.
        memory: bytes of each machine.
        network: bytes that cross it, where the data lie elsewhere.
    """

    what: str
    core: float
    on: str
    gpu: float | None = None
    disk: float = 0
    memory: float = 0
    network: float = 0


def list_work(count: int, inputs: Inputs) -> Iterator[Work]:
    """Yield what grows with the corpus, then what grows with the training queries."""
    i = inputs
    tokens = count * i.tokens
    texts, words, vectors = tokens * BYTES_A_TOKEN, tokens * WORDS_A_TOKEN, find_vector_bytes(count, i)
    bm25 = words * i.bm25_disk
    yield Work("check and convert", words / i.convert, "core", disk=2 * texts, memory=count * SORT_BYTES, network=texts)
    yield Work("BM25: index", words / i.bm25_index, "core", disk=bm25, memory=words * i.bm25_memory, network=texts)
    encode = tokens * i.body / i.encode
    stored = texts + vectors + ROW_BYTES * count
    yield Work("encode", encode, "all", tokens / find_gpu_rate(i, "encode"), stored, count * SORT_BYTES, texts + stored)
    for kind in ("ivf", "hnsw"):
        yield plan_build(count, kind, i)
    products = 2.0 * i.queries * count * i.dimensions
    ask = i.queries * i.query_tokens * i.body / i.encode
    found, everywhere = i.queries * i.k * 16, vectors * i.machines  # each machine reads all, for its own queries
    yield Work("mine: exact", products / find_batch(i) + ask, "all", disk=found, network=everywhere)
    bm25_seconds = i.queries * count / i.bm25_search
    yield Work("mine: BM25", bm25_seconds, "all", disk=found, memory=bm25, network=bm25 * i.machines)
    teach = TeachConfig()
    pair, row = teach.cross_encoder_length, i.query_tokens + (1 + i.negatives) * i.tokens
    steps = teach.cross_encoder_steps * teach.cross_encoder_batch * pair
    yield Work("teach a cross-encoder", steps * i.body / i.cross, "machine", steps / find_gpu_rate(i, "train"))
    pairs = i.queries * i.depth * pair
    yield Work("label", pairs * i.body / i.score, "all", pairs / find_gpu_rate(i, "score"))
    rows = 2 * i.queries * i.epochs * row
    yield Work("train, two stages", rows * i.body / i.train, "all", rows / find_gpu_rate(i, "train"))


def plan_build(count: int, kind: str, inputs: Inputs) -> Work:
    """Return what building an index costs: of sizes that `pairdr index` chooses."""
    i = inputs
    plan = plan_index(count, i.dimensions, IndexConfig(index_kind=kind, quantiser="sq8", memory_limit=2**40))
    if kind == "hnsw":  # each vector walks a path that grows with the logarithm
        seconds = count / i.hnsw * max(1.0, math.log(count) / math.log(125_292)) * i.dimensions / 384
        return Work("index: hnsw, sq8", seconds, "core", disk=plan.size, memory=plan.size)
    seconds = count * plan.lists * 2.0 * i.dimensions / i.ivf
    trained = min(count, TRAINED_PER_LIST * plan.lists) * i.dimensions * 4
    return Work(f"index: ivf, {plan.lists} lists, sq8", seconds, "machine", disk=plan.size, memory=plan.size + trained)


def find_vector_bytes(count: int, inputs: Inputs) -> float:
    """Return the bytes of stored vectors; int8 ones have a scale each."""
    return count * (inputs.dimensions * BYTES[inputs.dtype] + 4 * (inputs.dtype == "int8"))


def find_batch(inputs: Inputs) -> float:
    """Return operations/s of one core in exact search of many queries."""
    return inputs.batch or BATCH[inputs.dtype]


def find_gpu_rate(inputs: Inputs, what: str) -> float:
    """Return tokens/s of a GPU: given, or derived from its operations."""
    rate: float | None = getattr(inputs, f"gpu_{what}")
    operations = (6 if what == "train" else 2) * MINILM_WEIGHTS * inputs.body
    return rate or inputs.gpu_operations * inputs.gpu_share / operations


def find_hours(work: Work, inputs: Inputs) -> float:
    """Return the hours of a stage on the processors that it can use."""
    share = {"core": 1, "machine": inputs.cores, "all": inputs.cores * inputs.machines}
    return work.core / HOUR / share[work.on]


def print_stages(count: int, inputs: Inputs) -> None:
    """Print the table of stages."""
    i, priced = inputs, inputs.core_price is not None
    mark = "" if i.gpu_encode and i.gpu_score and i.gpu_train else "~"
    gpus = i.gpus * i.machines
    columns = [("core-hours", 11), ("hours", 9), ("on", 12), ("disk GB", 9), ("memory GB", 11), ("network GB", 12)]
    columns += [(f"{mark}GPU-hours", 12)] if gpus else []
    columns += [("price", 10)] if priced else []
    columns += [("GPU price", 11)] if priced and gpus and i.gpu_price is not None else []
    print(f"{'':30}" + "".join(f"{name:>{width}}" for name, width in columns))
    for work in list_work(count, i):
        said = {
            "core-hours": f"{work.core / HOUR:,.2f}",
            "hours": f"{find_hours(work, i):,.2f}",
            "on": {"core": "1 core", "machine": "1 machine", "all": "all"}[work.on],
            "disk GB": _say(work.disk),
            "memory GB": _say(work.memory) + ("!" if work.memory > i.memory * GB else ""),
            "network GB": _say(work.network),
            f"{mark}GPU-hours": "" if work.gpu is None else f"{work.gpu / HOUR:,.2f}",
            "price": f"{work.core / HOUR * (i.core_price or 0):,.2f}",
            "GPU price": "" if work.gpu is None else f"{work.gpu / HOUR * (i.gpu_price or 0):,.2f}",
        }
        print(f"  {work.what:28}" + "".join(f"{said[name]:>{width}}" for name, width in columns).rstrip())


def print_search(count: int, inputs: Inputs) -> None:
    """Print what answering costs: exact search on one machine and on more, and what else holds the vectors."""
    i, vectors = inputs, find_vector_bytes(count, inputs)
    needed = max(1, math.ceil(vectors / (0.8 * i.memory * GB)))
    print(f"{'':30}{'GB each':>11}{'many, q/s':>11}{'one, ms':>9}{'KB a query':>12}")
    for machines in sorted({1, i.machines, needed}):
        each = vectors / machines
        speed = (i.single or SINGLE[i.dtype]) if each <= 0.8 * i.memory * GB else i.disk
        rate = machines * i.cores * find_batch(i) / (2.0 * count * i.dimensions)
        sent = 0.0 if machines == 1 else machines * (4 * i.dimensions + 12 * i.k)
        one = each / speed / GB + 8 * sent / (i.network * 1e9)
        mark = "" if each <= 0.8 * i.memory * GB else "!"
        what = f"exact, {machines} machine{'s' * (machines > 1)}"
        print(f"  {what:28}{_say(each) + mark:>11}{rate:>11,.1f}{1e3 * one:>9,.0f}{sent / 1e3:>12,.1f}")
    for kind in ("ivf", "hnsw"):
        work = plan_build(count, kind, i)
        what = work.what.removeprefix("index: ")
        print(f"  {what:28}{_say(work.disk) + ('!' if work.disk > i.memory * GB else ''):>11}")
    links = 16  # of a node, both databases' default
    for name, each, load in (
        ("~Milvus, HNSW", 4 * i.dimensions + 4 * 2 * links, i.milvus_load),
        ("~pgvector, HNSW and table", 2 * 4 * i.dimensions + 6 * 2 * links + 64, i.pgvector_load),
    ):
        held = float(count * each)
        mark = "!" if held > i.memory * GB else ""
        print(f"  {name:28}{_say(held) + mark:>11}   loading: {count / load / HOUR:,.1f} h")


def print_plan(count: int, inputs: Inputs) -> None:
    """Print both tables for one corpus."""
    i = inputs
    body = "all-MiniLM-L6-v2" if i.body == 1 else f"a body of {i.body:g} times its weights"
    print(f"{count:,} passages of {i.tokens:g} tokens; {i.dimensions} dimensions, {i.dtype}; {body}")
    print_stages(count, i)
    print_search(count, i)
    print()


def read_inputs(arguments: list[str] | None = None) -> tuple[list[int], Inputs]:
    """Return the sizes and all other numbers that the command line gives."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, nargs="+", default=list(PASSAGES))
    for spec in fields(Inputs):
        kind = str if spec.name == "dtype" else int if type(spec.default) is int else float
        said = spec.metadata["help"] + (
            "" if spec.default is None else f" ({spec.default:g})" if kind is not str else ""
        )
        choices = tuple(BYTES) if spec.name == "dtype" else None
        name = f"--{spec.name.replace('_', '-')}"
        parser.add_argument(name, type=kind, default=spec.default, help=said, choices=choices, metavar=None)
    options = vars(parser.parse_args(arguments))
    return options.pop("passages"), Inputs(**options)


def _say(size: float) -> str:
    return "" if size == 0 else f"{size / GB:,.1f}"


if __name__ == "__main__":
    sizes, numbers = read_inputs()
    print(
        f"{numbers.machines} machines of {numbers.cores} cores, {numbers.memory:g} GB, {numbers.network:g} Gbit/s",
        end="",
    )
    print(f", {numbers.gpus} GPUs each" if numbers.gpus else "")
    print(f"{numbers.queries:,} training queries; ! does not fit the memory of a machine\n")
    for size in sizes:
        print_plan(size, numbers)
