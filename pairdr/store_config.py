"""The options of what is done with finished models, vectors and runs; those of training are in config.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from pairdr.options import Options, option

Mode = Literal["auto", "dense", "bm25", "hybrid"]


@dataclass(frozen=True)
class QueryConfig(Options):
    """How a question is answered."""

    mode: Mode = option("auto", "auto: what won on dev, or hybrid where there is BM25, else dense.")
    fusion: Literal["auto", "weighted", "rrf"] = option(
        "auto", "Of hybrid; auto: weighted where dev has chosen weights, else reciprocal ranks (rrf)."
    )
    depth: int = option(100, "Passages of each system that hybrid fuses.", low=1)
    rerank: int | None = option(
        None, "Best passages that the reranker puts into a new order; unset: 50 where there is a reranker.", low=0
    )
    where: tuple[str, ...] = option((), "FIELD=VALUE of the metadata that passages must have; may be repeated.")
    fold: bool = option(False, "Show passages with the same words once.")


@dataclass(frozen=True)
class ClusterConfig(Options):
    """Where work is done: here, or on a Ray cluster."""

    on: Literal["here", "ray"] = option("here", "ray: workers of a cluster, or of Ray on this machine, do the work.")
    ray_address: str | None = option(
        None, "host:port of a cluster, or auto; unset: RAY_ADDRESS, else Ray on this machine alone."
    )


@dataclass(frozen=True)
class RayConfig(ClusterConfig):
    """Workers that do a stage's work, each with a model of its own."""

    workers: int | None = option(None, "Processes that hold the model; unset: as many as have room.", low=1)
    cpus_per_worker: int = option(2, "CPUs of a worker, and the threads it computes with.", low=1)
    gpus_per_worker: float = option(0, "GPUs of a worker: 1, a share of one, or none.", low=0, high=1)


@dataclass(frozen=True)
class WorkersConfig(ClusterConfig):
    """Workers that share exact search, each with a part of the vectors; on Ray, all nodes have to see their folder."""

    search_workers: int | None = option(
        None, "Workers that share exact search; unset: none here, one for each node on Ray.", low=1
    )
    search_threads: int | None = option(None, "Threads of each; unset: the processors, shared out.", low=1)

    @property
    def are_wanted(self) -> bool:
        """Return whether there are to be workers."""
        return self.search_workers is not None or self.on == "ray"


@dataclass(frozen=True)
class IndexConfig(Options):
    """Vectors to an index; see docs/search.md for what is chosen where nothing is said."""

    index_kind: Literal["auto", "flat", "ivf", "hnsw"] = option(
        "auto", "flat is exact search; auto: flat for a small corpus, else ivf."
    )
    quantiser: Literal["auto", "sq8", "pq"] = option("auto", "auto: sq8, or pq where that needs too much memory.")
    wanted_recall: float = option(0.95, "Share of the exact results that has to be found.", low=0.1, high=1)
    recall_depth: int = option(100, "Results per query of which that share is meant.", low=1)
    memory_limit: int | None = option(None, "Most MiB of the index; unset: half of the machine's memory.", low=1)
    tuning_queries: int = option(256, "Most queries that the index is tuned and judged by.", low=10)
    rebuild_share: float = option(
        0.2, "Share of new and deleted vectors from which the index should be built anew.", low=0, high=1
    )
    index_threads: int | None = option(None, "Threads; unset: all. A graph (hnsw) is always built by one.", low=1)
    index_seed: int = option(13, "Seed of the vectors that the index is trained on and judged by.", low=0)
    rebuild: bool = option(False, "Of a database: load everything anew, beside what is there, and not what changed.")


@dataclass(frozen=True)
class CompareConfig(Options):
    """Systems on the same queries: intervals, tests, a verdict."""

    measures: tuple[str, ...] = option(("RR@10", "nDCG@10", "R@100"), "Measures; the first one is tested.")
    level: float = option(
        0.05, "A difference is shown below this p-value, after Holm's correction.", low=1e-6, high=0.5
    )
    power: float = option(0.8, "Share of cases in which the detectable difference would be shown.", low=0.5, high=0.999)
    resamples: int = option(10000, "Resamples of tests and intervals.", low=100)
    compare_seed: int = option(13, "Seed of these.", low=0)


@dataclass(frozen=True)
class AuditConfig(Options):
    """Training labels that look wrong."""

    most: int = option(100, "Most rows of each kind that are listed, the worst first.", low=1)
    most_per_query: int = option(3, "Most rows of a kind that one query has among them.", low=1)
    most_queries: int = option(
        1000, "Most labelled queries, and most pseudo-labelled ones, that are looked at; of more a sample.", low=1
    )
    scored_depth: int = option(20, "Candidates per query that the teacher scores.", low=1)
    audit_depth: int = option(100, "Passages of a system that count as found, and are compared with positives.", low=1)
    agree_depth: int = option(10, "The final model agrees with a pseudo positive that it has among so many.", low=1)
    copy_level: float = option(
        0.5, "Share of common five-word grams from which a candidate is nearly a positive.", low=0, high=1
    )
    audit_seed: int = option(13, "Seed of the samples.", low=0)


Target = Literal["onnx", "openvino", "openvino-int8"]
"""What runs an exported model, and in which precision."""


@dataclass(frozen=True)
class ExportConfig(Options):
    """A model as another library runs it, and the gate that an export has to pass."""

    allowed_loss: float = option(
        0.005,
        "Most nDCG@10 that an export may lose on dev against the model, absolute; else nothing is written.",
        low=0,
    )
    export_queries: int = option(1000, "Most dev queries that judge an export.", low=1)
    export_passages: int = option(
        5000, "Passages that these are searched in: their positives, and others drawn at random.", low=1
    )
    calibration_texts: int = option(
        300, "int8: passages and training queries that set the ranges of activations.", low=2
    )
    export_seed: int = option(13, "Seed of these samples and of the confidence interval.", low=0)


@dataclass(frozen=True)
class ReportConfig(Options):
    """What the page of a work folder shows."""

    against: Literal["bm25", "start", "whole", "labelled_only", "query_centric", "pair_bm25"] = option(
        "start", "System that PAIR is compared with, query by query."
    )
    shown_queries: int = option(5, "Queries shown of those that gain most, and of those that lose most.", low=0)
    shown_characters: int = option(600, "Most characters shown of a text.", low=20)
    report_queries: int = option(500, "Most dev queries whose similarities are measured.", low=1)
    report_negatives: int = option(5, "Candidates of such a query that stand for wrong passages.", low=1)
    report_texts: int = option(2000, "Most passages, and most queries, whose lengths are counted.", low=1)
    report_seed: int = option(13, "Seed of these samples.", low=0)


SourceFormat = Literal["msmarco", "dpr", "tevatron", "flagembedding", "rocketqa"]
"""Whose files are read; Tevatron's by either keys, RocketQA's of either encoder."""
TargetFormat = Literal["msmarco", "dpr", "tevatron", "tevatron-old", "flagembedding", "rocketqa", "rocketqa-cross"]
"""Whose files are written."""


@dataclass(frozen=True)
class ImportDataConfig(Options):
    """What is taken from other tools' files."""

    scores: Literal["auto", "keep", "drop"] = option(
        "auto", "Whether a file's scores count as a teacher's; auto: all but DPR's, which are BM25's in its own files."
    )


@dataclass(frozen=True)
class ExportDataConfig(Options):
    """What is written for other tools."""

    rows: Literal["all", "labelled", "pseudo", "plain"] = option(
        "all", "Which examples: denoised labelled ones, pseudo-labelled ones, both (all), or those without a teacher."
    )


@dataclass(frozen=True)
class ServeConfig(Options):
    """The service: where it listens, what it does together, what it allows."""

    host: str = option("127.0.0.1", "Address to listen on; the default is reached from this machine alone.")
    port: int = option(8000, "Port; 0 takes a free one.", low=0, high=65535)
    models: tuple[str, ...] = option(
        (), "A model of a work folder; may be repeated, the default first; unset: trained and start."
    )
    batch_texts: int = option(64, "Texts, or pairs that are reranked, from which a batch is full.", low=1)
    batch_wait: float = option(2.0, "Milliseconds that an idle batch waits for company.", low=0, high=1000)
    queue_texts: int = option(512, "Most texts, or pairs, that wait; past it the answer is 429.", low=1)
    most_results: int = option(100, "Largest k.", low=1)
    most_hits: int = option(
        2000, "Most results of a request, all its questions together; reranked, the passages that are judged.", low=1
    )
    most_texts: int = option(256, "Most texts, passages or filters of a request.", low=1)
    most_characters: int = option(20000, "Most characters of a text, its title and its metadata among them.", low=1)
    most_bytes: int = option(4_000_000, "Most bytes of a body; past it the answer is 413.", low=1)
    request_seconds: float = option(30.0, "Until a request's answer is 504; as long it may take to be read.", low=0.01)
    body_seconds: float = option(
        10.0, "Until a request's head, and then its body, has to have come; past it the answer is 408.", low=0.01
    )
    drain_seconds: float = option(30.0, "After SIGTERM, for what is under way.", low=0)
    watch_seconds: float = option(1.0, "Between looks for newly published versions.", low=0.01)
    cors_origins: tuple[str, ...] = option((), "Other sites whose pages may ask; none unless named.")
    hosts: tuple[str, ...] = option(
        (), "Names by which the service is called, beside this machine's own; unset: any, where it listens to others."
    )
