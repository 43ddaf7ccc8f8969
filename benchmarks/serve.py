"""`pairdr serve` under load on loopback, beside a plain service of FastAPI and sentence-transformers without batches.

    python benchmarks/serve.py load --model MODEL --export EXPORT [--passages 100000] [--clients 1 8 32 128]
    python benchmarks/serve.py overload --model MODEL --export EXPORT
    python benchmarks/serve.py memory --model MODEL --export EXPORT [--requests 50000]
    python benchmarks/serve.py ready --model MODEL --export EXPORT

MODEL is a model that pairdr saved, EXPORT its export, which encodes the passages once, into --work; all three search
these vectors, since only answering is measured. With PAIRDR_DATA the passages are those of en_qa_mix, and then of
debian_packages and pycode, and the questions are theirs; else both are synthetic.

load: pairdr with the export, pairdr with the model, and the rival (serve_rival.py) with the model take turns, round by
round, while the others are idle. Clients ask again as soon as they are answered (serve_load.py), a text a request. The
rival has the threads with which it did best at 32 clients. ms: medians of the rounds' percentiles; "work" is processor
time per request; the load's own comes on top of it.

overload: ten times the clients at which the rate is within 5 % of its best, at least 1000, which ask again at once,
also after 429. Ends with 1 where an answer was neither 200 nor 429, a connection broke, or it is not itself afterwards.

memory: RssAnon every tenth of the requests, /search and /v1/embeddings in turn by 32 clients. Ends with 1 where the
most of the last third is over 4 MiB more than the most of the third before.

ready: from the start of the process until /ready answers 200.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import platform
import random
import resource
import signal
import statistics
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from drawing import SEED
from memory import WORDS, write_corpus
from serve_load import Measured, Service, ask_once, form_request, load
from startup import run_command

CORPORA = ("en_qa_mix", "debian_packages", "pycode")
PATHS = ("/search", "/v1/embeddings")
RIVAL = "rival"
TEXTS, CHECKED = 5000, 100
MOST_CHARACTERS = 20_000  # of a text, which is pairdr's own limit
LEAST_SHARED, MOST_GROWTH = 0.8, 4.0  # of the first ten; MiB


class Place(NamedTuple):
    """What the services need, and the texts that they are sent."""

    export: list[str]
    model: list[str]
    rival: list[str]
    questions: list[str]
    texts: list[str]
    logs: Path

    def start(self, name: str, *more: str) -> Service:
        """Start a service."""
        command = {"export": self.export, "model": self.model, RIVAL: self.rival}[name]
        return Service([sys.executable, *command, *more], self.logs / f"{name}{''.join(more)}.log")

    def form_requests(self, *paths: str) -> Iterator[bytes]:
        """Yield requests without end: to the paths in turn, another text each time."""
        bodies: dict[str, list[Any]] = {
            "/search": [{"query": text, "k": 10} for text in self.questions],
            "/v1/embeddings": [{"input": text} for text in self.texts],
        }
        rows = zip(*([form_request("POST", path, body) for body in bodies[path]] for path in paths), strict=False)
        return itertools.cycle([request for row in rows for request in row])


# --- passages and vectors ---------------------------------------------------------------------------------------------


def prepare(work: Path, model: str, export: str, count: int, kind: str) -> Place:
    """Write, encode and hand over the passages; what is there already is kept."""
    folder = work / str(count)
    os.environ["PAIRDR_CACHE"] = str(folder / "cache")
    data = folder / "data"
    if not (data / "qrels" / "test.tsv").is_file():
        write_real(data, count) if "PAIRDR_DATA" in os.environ else write_drawn(data, count)
    stores = {name: folder / name for name in ("export", "model")}
    if not (stores["export"] / "manifest.json").is_file():
        seconds = run_command("encode", str(data), "--start", export, "-o", str(stores["export"]))
        print(f"encoded {count} passages with the export in {seconds:.0f} s", flush=True)
    copy_store(stores["export"], stores["model"], model)
    write_rival(stores["export"], folder / "rival")

    def serve(name: str, start: str) -> list[str]:
        return ["-m", "pairdr", "serve", str(stores[name]), "--start", start, "--port", "0"]

    script = str(Path(__file__).with_name("serve_rival.py"))
    rival = [script, model, str(folder / "rival")]
    questions = read_texts(data / "queries.jsonl")
    texts = questions if kind == "questions" else read_texts(data / "corpus.jsonl")
    return Place(serve("export", export), serve("model", model), rival, questions, texts, folder)


def write_real(folder: Path, count: int) -> None:
    """Write passages of the data sets, the first ones of each, and questions of the same sets, in BEIR form."""
    from pairdr.collection import open_collection

    questions: list[str] = []
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    left = count
    with (folder / "corpus.jsonl").open("w", encoding="utf-8") as corpus:
        for name in CORPORA:
            found = open_collection(Path(os.environ["PAIRDR_DATA"]) / name)
            for passage in itertools.islice(itertools.chain.from_iterable(found.read_passages()), left):
                row = {"_id": f"{name} {passage.passage_id}", "title": passage.title, "text": passage.text}
                corpus.write(json.dumps(row) + "\n")
                left -= 1
            questions += [text for block in found.queries.read_blocks(("text",)) for (text,) in block]
            if not left:
                break
        else:
            raise SystemExit(f"PAIRDR_DATA has only {count - left} passages.")
    write_questions(folder, random.Random(SEED).sample(questions, TEXTS))


def write_drawn(folder: Path, count: int) -> None:
    """Write synthetic passages and questions."""
    write_corpus(folder, count, words=12)
    rng = random.Random(SEED)
    write_questions(folder, [" ".join((str(rng.randrange(count)), *rng.choices(WORDS, k=6))) for _ in range(TEXTS)])


def write_questions(folder: Path, questions: list[str]) -> None:
    """Write questions, and what makes it a data set."""
    lines = [json.dumps({"_id": f"q{at}", "text": text}) + "\n" for at, text in enumerate(questions)]
    (folder / "queries.jsonl").write_text("".join(lines), encoding="utf-8")
    first = json.loads((folder / "corpus.jsonl").open(encoding="utf-8").readline())["_id"]
    (folder / "qrels" / "test.tsv").write_text(f"q0\t{first}\t1\n", encoding="utf-8")


def read_texts(path: Path) -> list[str]:
    """Return texts that are sent, drawn of those of a file."""
    with path.open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in stream]
    texts = [f"{row.get('title', '')} {row['text']}".strip() for row in rows]
    texts = [text for text in texts if len(text) <= MOST_CHARACTERS]
    random.Random(SEED).shuffle(texts)
    return texts[:TEXTS]


def copy_store(store: Path, folder: Path, model: str) -> None:
    """Write the same vectors and passages in the name of another model, so that they are served with it."""
    from pairdr.backends import open_encoder
    from pairdr.vectors import VectorStore
    from pairdr.versions import write_store

    encoder, opened = open_encoder(Path(model), "cpu"), VectorStore(store)
    with write_store(folder, opened.dtype, encoder.fingerprint) as writer:
        if writer.base is not None and writer.base.passages_fingerprint == opened.passages_fingerprint:
            return
        for (_, vectors), passages in zip(opened.read_blocks(), opened.read_passages(), strict=True):
            name = writer.name_shard(passages)
            writer.write_shard(name, passages, vectors)
            writer.shards.append((name, len(passages)))
        writer.publish(opened.passages_fingerprint, opened.dimensions, opened.similarity, {})


def write_rival(store: Path, folder: Path) -> None:
    """Write what the rival reads: the same vectors and passages."""
    from pairdr.vectors import VectorStore

    if (folder / "vectors.npy").is_file():
        return
    folder.mkdir(parents=True, exist_ok=True)
    opened = VectorStore(store)
    with (folder / "passages.jsonl").open("w", encoding="utf-8") as stream:
        for passage in itertools.chain.from_iterable(opened.read_passages()):
            row = {"id": passage.passage_id, "title": passage.title, "text": passage.text}
            stream.write(json.dumps(row) + "\n")
    np.save(folder / "vectors.npy", np.concatenate([vectors for _, vectors in opened.read_blocks()]))


# --- load -------------------------------------------------------------------------------------------------------------


class Cell(NamedTuple):
    """What one load of one service has shown."""

    found: Measured
    work: float  # processor milliseconds a request


def compare(place: Place, clients: list[int], rounds: int, seconds: float) -> None:
    """Measure all in turn and print how they compare."""
    threads = choose_threads(place, seconds)
    cells: dict[tuple[str, int, str], list[Cell]] = defaultdict(list)
    with ExitStack() as stack:
        services = {}
        for name in ("export", "model", RIVAL):
            more = ("--threads", str(threads)) if name == RIVAL else ()
            services[name] = stack.enter_context(place.start(name, *more))
            services[name].wait_until_ready()
        compare_answers(place, services)
        for path in PATHS:
            for service in services.values():  # warm
                load(service.port, place.form_requests(path), 8, 1)
        for _, path, count, name in itertools.product(range(rounds), PATHS, clients, services):
            cells[path, count, name].append(measure(services[name], place.form_requests(path), count, seconds))
    print_cells(cells, rounds, threads)


def measure(service: Service, requests: Iterator[bytes], clients: int, seconds: float) -> Cell:
    """Measure one cell: some seconds, and at least four answers for each client."""
    before = service.read_work()
    found = load(service.port, requests, clients, seconds, 4 * clients)
    return Cell(found, 1000 * (service.read_work() - before) / max(1, found.statuses.total()))


def choose_threads(place: Place, seconds: float) -> int:
    """Return the threads a request with which the rival answers most, over both paths, at 32 clients."""
    rates = {}
    for threads in (1, 2):
        with place.start(RIVAL, "--threads", str(threads)) as service:
            service.wait_until_ready()
            for path in PATHS:
                load(service.port, place.form_requests(path), 8, 1)
            found = [load(service.port, place.form_requests(path), 32, seconds, 128).rate for path in PATHS]
        rates[threads] = statistics.geometric_mean(found)
        said = ", ".join(f"{path} {rate:.1f}/s" for path, rate in zip(PATHS, found, strict=True))
        print(f"rival with {threads} torch threads a request, 32 clients: {said}", flush=True)
    return max(rates, key=rates.__getitem__)


def compare_answers(place: Place, services: dict[str, Service]) -> None:
    """Print how much of the rival's first ten the others find, and how near their vectors are; stop where it is off."""

    def ask(name: str, path: str) -> list[Any]:
        requests = itertools.islice(place.form_requests(path), CHECKED)
        answers = [asyncio.run(ask_once(services[name].port, request)) for request in requests]
        if any(status != 200 for status, _ in answers):
            raise SystemExit(f"{name} does not answer {path}.")
        return [json.loads(body) for _, body in answers]

    found = {name: [{hit["id"] for hit in a["results"][0]["hits"]} for a in ask(name, PATHS[0])] for name in services}
    vectors = {name: np.array([a["data"][0]["embedding"] for a in ask(name, PATHS[1])]) for name in services}
    for name in services:
        shared = statistics.mean(len(a & b) / 10 for a, b in zip(found[name], found[RIVAL], strict=True))
        cosine = float((vectors[name] * vectors[RIVAL]).sum(1).min())
        if name != RIVAL:
            print(f"{name}: {shared:.3f} of the rival's first ten, least cosine {cosine:.4f}, {CHECKED} texts")
        if shared < LEAST_SHARED:
            raise SystemExit(f"{name} does not find what the rival finds.")


def print_cells(cells: dict[tuple[str, int, str], list[Cell]], rounds: int, threads: int) -> None:
    """Print a line for each path, number of clients and service."""
    print_machine(f"{rounds} rounds, the rival with {threads} torch threads a request")
    head = "".join(f"{name + ', range':>21}" for name in ("p50 ms", "p95 ms", "p99 ms"))
    print(f"{'':16}{'clients':>7}  {'':8}{'requests/s, range':>22}{head}{'work ms':>9}{'x rival, range':>20}  errors")
    for (path, clients, name), found in cells.items():
        rates = [cell.found.rate for cell in found]
        ratios = [a / b.found.rate for a, b in zip(rates, cells[path, clients, RIVAL], strict=True)]
        waits = "".join(
            f"{say_median([cell.found.percentile(share) for cell in found], '.1f'):>21}" for share in (50, 95, 99)
        )
        work = statistics.median(cell.work for cell in found)
        errors = sum(c.found.broken + c.found.statuses.total() - c.found.statuses[200] for c in found)
        print(
            f"{path:16}{clients:7}  {name:8}{say_median(rates, '.1f'):>22}{waits}{work:9.2f}"
            f"{say_median(ratios, '.2f'):>20}{errors:8}"
        )


def say_median(values: list[float], form: str) -> str:
    """Return the median and the range."""
    return f"{statistics.median(values):{form}} {min(values):{form}}-{max(values):{form}}"


def print_machine(said: str) -> None:
    """Print the day, the machine, and something more."""
    lines = Path("/proc/cpuinfo").read_text(encoding="ascii").splitlines()
    model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), platform.machine())
    print(f"{time.strftime('%Y-%m-%d')}, {len(os.sched_getaffinity(0))} processors, {model}; {said}", flush=True)


# --- overload, memory, ready ------------------------------------------------------------------------------------------


def overload(place: Place, clients: list[int], seconds: float) -> bool:
    """Ask far more than can be answered, and return whether nothing but 429 came of it."""
    print_machine("the export, /search and /v1/embeddings in turn")
    with place.start("export") as service:
        service.wait_until_ready()
        load(service.port, place.form_requests(*PATHS), 8, 1)
        rates = {n: load(service.port, place.form_requests(*PATHS), n, seconds).rate for n in clients}
        print("answers a second: " + ", ".join(f"{n} clients {rate:.0f}" for n, rate in rates.items()))
        crowd = max(1000, 10 * min(n for n, rate in rates.items() if rate >= 0.95 * max(rates.values())))
        calm = load(service.port, place.form_requests(*PATHS), 1, 1)
        found = load(service.port, place.form_requests(*PATHS), crowd, 4 * seconds)
        print(
            f"{crowd} clients for {found.seconds:.0f} s: {dict(found.statuses)}, {found.broken} broken connections; "
            f"{found.rate:.0f} a second with 200, p50 {found.percentile(50):.0f} ms, p99 {found.percentile(99):.0f} ms"
        )
        after = load(service.port, place.form_requests(*PATHS), 1, 1)
        print(
            f"1 client before: p50 {calm.percentile(50):.1f} ms, {dict(calm.statuses)}; "
            f"after: p50 {after.percentile(50):.1f} ms, {dict(after.statuses)}"
        )
    broken = found.broken + calm.broken + after.broken
    return set(found.statuses) <= {200, 429} and set(after.statuses) == {200} and not broken


def watch_memory(place: Place, requests: int) -> bool:
    """Print the memory while requests are answered, and return whether it is flat."""
    print_machine("the export, /search and /v1/embeddings in turn, 32 clients")
    seen, answered, statuses, broken = [], [], Counter[int](), 0
    begin = time.perf_counter()
    with place.start("export") as service:
        service.wait_until_ready()
        asked = place.form_requests(*PATHS)
        for _ in range(10):
            found = load(service.port, asked, 32, least=requests // 10)
            statuses, broken = statuses + found.statuses, broken + found.broken
            answered.append(statuses.total())
            seen.append(service.read_memory())
            print(f"{answered[-1]:8} requests{seen[-1]:9.1f} MiB{time.perf_counter() - begin:8.0f} s", flush=True)
    late = slice(-6, None)
    slope = np.polyfit(np.array(answered[late]) / 10_000, seen[late], 1)[0]
    growth = max(seen[-3:]) - max(seen[-6:-3])
    print(f"{dict(statuses)}, {broken} broken connections")
    print(f"the last six: {slope:+.2f} MiB in 10,000 requests; the last third: {growth:+.2f} MiB")
    return growth <= MOST_GROWTH and set(statuses) == {200} and not broken


def time_readiness(place: Place, rounds: int) -> None:
    """Print the seconds from the start of the process until it is ready."""
    print_machine(f"{rounds} rounds after one that is not counted, in turn")
    found: dict[str, list[float]] = defaultdict(list)
    for _, name in itertools.product(range(rounds + 1), ("export", "model")):
        with place.start(name) as service:
            found[name].append(service.wait_until_ready())
    for name, seconds in found.items():
        print(f"ready with the {name}: {say_median(seconds[1:], '.2f')} s")


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("load", "overload", "memory", "ready"))
    parser.add_argument("--model", required=True)
    parser.add_argument("--export", required=True)
    parser.add_argument("--work", type=Path, default=Path("build/serve"), help="where passages and vectors are kept")
    parser.add_argument("--passages", type=int, default=100_000)
    parser.add_argument("--texts", choices=("questions", "passages"), default="questions", help="of /v1/embeddings")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32, 128])
    parser.add_argument("--seconds", type=float, default=4, help="of a cell; four answers a client at least")
    parser.add_argument("--requests", type=int, default=50_000, help="of memory")
    parser.add_argument("--rounds", type=int, help="3 of load, 5 of ready")
    options = parser.parse_args()
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))  # a connection takes one, here and in the service
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda found, _: sys.exit(128 + found))  # so that the services end too
    place = prepare(options.work, options.model, options.export, options.passages, options.texts)
    is_good = True
    if options.what == "load":
        compare(place, options.clients, options.rounds or 3, options.seconds)
    elif options.what == "overload":
        is_good = overload(place, options.clients, options.seconds)
    elif options.what == "memory":
        is_good = watch_memory(place, options.requests)
    else:
        time_readiness(place, options.rounds or 5)
    sys.exit(0 if is_good else 1)


if __name__ == "__main__":
    main()
