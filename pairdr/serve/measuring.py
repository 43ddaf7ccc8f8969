"""What Prometheus reads: requests, the time of stages, queues, batches, the version of what is served."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
disable_created_metrics()  # a series more for each, which nobody reads
TEXTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


class Meters:
    """The counters of one service."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        PlatformCollector(registry=registry)
        self._requests = Counter(
            "pairdr_requests", "Requests that were answered.", ("path", "status"), registry=registry
        )
        self._seconds = Histogram(
            "pairdr_request_seconds", "Until the answer.", ("path",), buckets=SECONDS, registry=registry
        )
        self._stages = Histogram(
            "pairdr_stage_seconds",
            "Of a batch: encode; search, its encoding included; rerank. Of a request: queue.",
            ("stage",),
            buckets=SECONDS,
            registry=registry,
        )
        self._batches = Histogram(
            "pairdr_batch_texts", "Texts, or questions, of a batch.", ("queue",), buckets=TEXTS, registry=registry
        )
        self._queue = Gauge("pairdr_queue_texts", "Texts, or questions, that wait.", ("queue",), registry=registry)
        self._version = Gauge("pairdr_index_version", "Version of the vectors.", ("model",), registry=registry)
        self._passages = Gauge("pairdr_index_passages", "Passages that are searched.", ("model",), registry=registry)
        self._info = Gauge("pairdr_index_info", "What is served.", ("model", "version"), registry=registry)
        self._stale = Gauge("pairdr_stale_models", "Models whose newest version does not fit yet.", registry=registry)
        self._served: dict[str, str] = {}

    def write(self) -> bytes:
        """Return everything as Prometheus reads it."""
        return generate_latest(self._registry)

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Note the seconds of a stage, which is the block."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._stages.labels(stage).observe(time.perf_counter() - begin)

    def note_request(self, path: str, status: int, seconds: float) -> None:
        """Note an answer."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def note_batch(self, queue: str, items: int, waited: Sequence[float]) -> None:
        """Note a batch, and how long each of its requests has waited."""
        self._batches.labels(queue).observe(items)
        for seconds in waited:
            self._stages.labels("queue").observe(seconds)

    def watch_queue(self, queue: str, count: Callable[[], int]) -> None:
        """Read how many items wait whenever somebody asks."""
        self._queue.labels(queue).set_function(count)

    def note_version(self, model: str, version: str, number: int, passages: int) -> None:
        """Note which version of a model is served."""
        old = self._served.get(model)
        if old not in (None, version):
            self._info.remove(model, old)
        self._served[model] = version
        self._info.labels(model, version).set(1)
        self._version.labels(model).set(number)
        self._passages.labels(model).set(passages)

    def note_stale(self, count: int) -> None:
        """Note how many models have a newer version that does not fit."""
        self._stale.set(count)
