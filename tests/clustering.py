"""What workers of the Ray tests run; workers import this module."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import ray

from pairdr.encode_ray import OpenEncoder
from pairdr.errors import ArtefactError
from pairdr.records import Passage
from pairdr.vectors import Vectors


@dataclass(frozen=True)
class Note:
    """Reads a block as it is described, and notes the node in a file."""

    log: Path
    size: int = 0

    def __call__(self, number: int) -> tuple[int, bytes]:
        with self.log.open("a") as stream:
            stream.write(f"{ray.get_runtime_context().get_node_id()}\n")
        return number, bytes(self.size)


@dataclass(frozen=True)
class Slowly:
    """Opens work that takes its time, notes each block it ends, and says where it was done."""

    log: Path
    seconds: float = 0.2

    def __call__(self) -> Callable[[tuple[int, bytes]], tuple[int, str, bytes]]:
        def work(block: tuple[int, bytes]) -> tuple[int, str, bytes]:
            time.sleep(self.seconds)
            with self.log.open("a") as stream:
                stream.write(f"{block[0]}\n")
            return block[0] * 2, ray.get_runtime_context().get_node_id(), block[1]

        return work


class OpenSlowEncoder(OpenEncoder):
    """Loads a model that takes its time."""

    def __call__(self) -> Callable[[list[Passage]], Vectors]:
        work = super().__call__()

        def encode(passages: list[Passage]) -> Vectors:
            time.sleep(0.3)
            return work(passages)

        return encode


def open_broken() -> Callable[[object], object]:
    raise ArtefactError("The model is broken.", path="model", remedy="Make it again.")


def open_clumsy() -> Callable[[object], float]:
    return lambda block: 1 / 0


def open_deadly() -> Callable[[object], None]:
    return lambda block: os._exit(1)
