"""Vectors in Milvus, a server's or a local file's (Milvus Lite): one collection a load, an alias for the published one.

A collection has two partitions: the rows, and the state, whose rows are the facts and a note of each shard, as JSON in
their `id`. Searches look into the first alone. Both go one way through the server (a collection has one shard), so who
has seen the note of a shard also sees its rows, though a search does not wait for the newest writes.
"""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import numpy as np

from pairdr.errors import ArtefactError, DataError, MissingExtraError, ServerError
from pairdr.indexes.address import Address
from pairdr.indexes.engine import Facts, Held, Marks, MovedError, make_keys
from pairdr.indexes.exact import Rows, Scores
from pairdr.vectors import Dtype

ROWS, STATE = "_default", "state"
_LEAST_VERSION = (2, 3, 2)  # arrays
_WIDTH = 100  # of the queue in which a graph's neighbours are looked for while it is built
_FACTS = -(2**62)  # key of the facts; a shard's note has the key -1 - number
_MOST_FOUND = 16384  # rows of an answer
_MOST_MARKS = 4096
_MOST_ID = 65535  # bytes
_MESSAGE = 8 * 2**20  # bytes of a request, about; servers refuse large ones
_ASKED = 64  # queries of a request
_WAIT = 10.0  # seconds for a connection, and for an answer to a search
_RETRIES = 8  # of a call that writes, over ten seconds in all
_STALL = 60.0  # seconds without progress after which a graph is no longer waited for


class MilvusDatabase:
    """What one URL names in Milvus; as `Database`."""

    links, longest = 16, 4096

    def __init__(self, address: Address) -> None:
        try:
            import pymilvus
        except ImportError as error:
            raise MissingExtraError("pymilvus", "milvus") from error
        if address.scheme == "milvus-lite":
            try:
                import milvus_lite  # noqa: F401
            except ImportError as error:
                raise MissingExtraError("milvus-lite", "milvus") from error
        for name in ("pymilvus", "milvus_lite", "grpc"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # what they raise is said by us
        self._pymilvus, self._address = pymilvus, address
        self.place, self.name = address.shown, address.name
        self._dimensions: dict[str, int] = {}
        self._loaded: set[str] = set()
        self._is_loading = False
        token = address.token or os.environ.get("MILVUS_TOKEN", "")
        if token:
            self._address = replace(address, secrets=(*address.secrets, token, token.partition(":")[2] or token))
        with self._ask():
            self._client = pymilvus.MilvusClient(uri=address.target, token=token, timeout=_WAIT)
            version = str(self._client.get_server_version(timeout=_WAIT))
        numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:3])
        if address.scheme == "milvus" and numbers < _LEAST_VERSION:
            raise ServerError(
                f"Milvus {version} is too old: arrays came with {'.'.join(map(str, _LEAST_VERSION))}.",
                path=self.place,
                remedy="Install a newer one.",
            )

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Wait as long as it takes while the block runs. Milvus has no locks: others of this name are not kept out."""
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False

    def find_load(self) -> str | None:
        """Return the load that the name holds, or None."""
        with self._ask():
            load = self._resolve()
            taken = load is None and self._client.has_collection(self.name, timeout=_WAIT)
        if taken or (load is not None and not re.fullmatch(f"{self.name}__[0-9a-f]{{12}}_[01]", load)):
            raise ArtefactError(
                f"The name {self.name!r} is taken by a collection that pairdr did not write.",
                path=self.place,
                remedy="Choose another name.",
            )
        if load is not None and load not in self._loaded:
            with self._ask():
                # Milvus Lite has let go of it where its file was closed, a server where it was started again.
                self._client.load_collection(load, **self._patience)
            self._loaded.add(load)
        return load

    def list_halves(self) -> list[str]:
        """Return loads of this name that were begun and never published."""
        published = self.find_load()
        with self._ask():
            names = self._client.list_collections(timeout=_WAIT)
        pattern = re.compile(f"{self.name}__[0-9a-f]{{12}}_[01]")
        return sorted(name for name in names if pattern.fullmatch(name) and name != published)

    def create(self, load: str, dimensions: int, similarity: str, dtype: Dtype) -> None:
        """Make the collection of a load, or what a killed process has not made of it."""
        kinds = self._pymilvus.DataType
        with self._ask():
            client = self._client
            if not client.has_collection(load):
                schema = client.create_schema(auto_id=False)
                schema.add_field("key", kinds.INT64, is_primary=True)
                schema.add_field("id", kinds.VARCHAR, max_length=_MOST_ID)
                schema.add_field("vector", kinds.FLOAT_VECTOR, dim=dimensions)
                schema.add_field("marks", kinds.ARRAY, element_type=kinds.INT64, max_capacity=_MOST_MARKS)
                client.create_collection(load, schema=schema, num_shards=1, consistency_level="Bounded")
            if not client.has_partition(load, STATE):
                client.create_partition(load, STATE)
            if not client.list_indexes(load):
                metric = {"cosine": "COSINE", "dot": "IP"}[similarity]
                params = client.prepare_index_params()
                build = {"M": self.links, "efConstruction": _WIDTH}
                params.add_index("vector", index_type="HNSW", metric_type=metric, params=build)
                client.create_index(load, params)
            client.load_collection(load)

    def read_facts(self, load: str, *, fresh: bool = True) -> Facts | None:
        """Return the facts of a load, None where there are none yet."""
        rows = self._query(load, f"key == {_FACTS}", STATE, ["id"], fresh=fresh)
        return json.loads(rows[0]["id"]) if rows else None

    def write_facts(self, load: str, facts: Facts) -> None:
        """Replace the facts of a load."""
        self._write_state(load, _FACTS, facts)

    def read_shards(self, load: str) -> list[Held]:
        """Return the notes of shards."""
        return [Held(**json.loads(row["id"])) for row in self._read_notes(load, -(2**31), -1)]

    def note_shard(self, load: str, held: Held) -> None:
        """Write or replace the note of a shard."""
        self._write_state(load, -1 - held.number, held._asdict())

    def forget_shard(self, load: str, number: int) -> None:
        """Remove the note of a shard."""
        with self._ask():
            self._client.delete(load, filter=f"key in [{-1 - number}]", partition_name=STATE, retry_times=_RETRIES)

    def list_keys(self, load: str, number: int, count: int) -> Rows:
        """Return the keys [n] of a shard's rows that are there, in order."""
        found: list[int] = []
        for start in range(0, count, _MOST_FOUND):
            low, high = make_keys(number, np.array([start, min(start + _MOST_FOUND, count)])).tolist()
            rows = self._query(load, f"key >= {low} and key < {high}", ROWS, ["key"])
            found += [row["key"] for row in rows]
        return np.unique(np.array(found, dtype=np.int64))

    def add(self, load: str, keys: Rows, ids: Sequence[str], vectors: Scores, marks: Marks) -> None:
        """Add rows."""
        for passage_id, row_marks in zip(ids, marks, strict=True):
            self._require_fit(passage_id, len(row_marks))
        size = max(1, _MESSAGE // (4 * vectors.shape[1] + 1024))
        for at in range(0, len(keys), size):
            part = slice(at, at + size)
            rows = [
                {"key": key, "id": passage_id, "vector": vector, "marks": list(row_marks)}
                for key, passage_id, vector, row_marks in zip(
                    keys[part].tolist(), ids[part], vectors[part], marks[part], strict=True
                )
            ]
            with self._ask():
                # Not insert: a call that is tried again, or another load, may have sent the same rows.
                added = self._client.upsert(load, rows, partition_name=ROWS, retry_times=_RETRIES)["upsert_count"]
            if added != len(rows):
                raise ServerError(
                    f"The server took {added} of {len(rows)} rows.", path=self.place, remedy="Run it again."
                )

    def remove(self, load: str, keys: Rows) -> None:
        """Remove rows."""
        for at in range(0, len(keys), 4096):
            with self._ask():
                chosen = keys[at : at + 4096].tolist()
                self._client.delete(load, filter=f"key in {chosen}", partition_name=ROWS, retry_times=_RETRIES)

    def finish(self, load: str, memory: int | None) -> None:
        """Write what is in the server's memory to its disk, and wait until the graph is built."""
        with self._ask():
            self._client.flush(load)
            left, since = -1, time.monotonic()
            while time.monotonic() - since < _STALL:
                pending = int(self._client.describe_index(load, "vector").get("pending_index_rows", 0))
                if pending == 0:
                    return
                if pending != left:
                    left, since = pending, time.monotonic()
                time.sleep(0.2)
        raise ServerError(
            f"The server has built nothing of its graph for {_STALL:.0f} seconds; {left} rows are left.",
            path=self.place,
            remedy="Look into its log, and run it again: it goes on where it stopped.",
        )

    def publish(self, load: str) -> None:
        """Let the name hold this load, and drop the one that it held."""
        old = self.find_load()
        with self._ask():
            if old is None:
                self._client.create_alias(load, self.name)
            else:
                self._client.alter_alias(load, self.name)
        if old is not None and old != load:
            self.drop(old)

    def drop(self, load: str) -> None:
        """Remove a load."""
        with self._ask():
            if self._resolve() == load:
                self._client.drop_alias(self.name)
            if self._client.has_collection(load):
                self._client.drop_collection(load)

    def search(self, load: str, queries: Scores, depth: int, queue: int, filters: Marks) -> Rows:
        """Return the keys [Q, c] that are found, -1 is none."""
        depth = min(depth, _MOST_FOUND)
        wanted = " and ".join(f"array_contains_any(marks, {list(marks)})" for marks in filters)
        found = np.full((len(queries), depth), -1, dtype=np.int64)
        for at in range(0, len(queries), _ASKED):
            with self._ask():
                hits = self._client.search(
                    load,
                    np.ascontiguousarray(queries[at : at + _ASKED], dtype=np.float32),
                    filter=wanted,
                    limit=depth,
                    output_fields=["key"],  # none at all means every field to Milvus Lite
                    search_params={"params": {"ef": max(queue, depth)}},
                    partition_names=[ROWS],
                    consistency_level="Bounded",
                    **self._patience,
                )
                for line, ids in enumerate((one.ids for one in hits), start=at):
                    found[line, : len(ids)] = ids
        return found

    def count(self, load: str) -> int:
        """Return how many rows there are."""
        rows = self._query(load, "key >= 0", ROWS, ["count(*)"])
        return int(rows[0]["count(*)"])

    def measure_size(self, load: str) -> int | None:
        """Return None: Milvus does not tell."""
        return None

    def close(self) -> None:
        """Close the connection."""
        self._client.close()

    @property
    def _patience(self) -> dict[str, Any]:
        """Return how long an answer is waited for. Nobody waits for the searches that a load is tuned by."""
        return {"retry_times": _RETRIES} if self._is_loading else {"timeout": _WAIT}

    def _resolve(self) -> str | None:
        try:
            return str(self._client.describe_alias(self.name, timeout=_WAIT)["collection_name"])
        except self._pymilvus.MilvusException as error:
            if error.code in (100, 1600) or "not found" in str(error) or "does not exist" in str(error):
                return None
            raise

    def _query(self, load: str, wanted: str, partition: str, fields: list[str], *, fresh: bool = True) -> list[Any]:
        limit = {} if fields == ["count(*)"] else {"limit": _MOST_FOUND}
        with self._ask():
            return list(
                self._client.query(
                    load,
                    filter=wanted,
                    output_fields=fields,
                    partition_names=[partition],
                    consistency_level="Strong" if fresh else "Bounded",
                    **self._patience,
                    **limit,
                )
            )

    def _read_notes(self, load: str, low: int, high: int) -> list[Any]:
        """Return the rows of the state with keys from low to high, as many as there are."""
        rows = self._query(load, f"key >= {low} and key <= {high}", STATE, ["id"])
        if len(rows) < _MOST_FOUND:
            return rows
        middle = (low + high) // 2
        return self._read_notes(load, low, middle) + self._read_notes(load, middle + 1, high)

    def _write_state(self, load: str, key: int, value: Facts) -> None:
        with self._ask():
            if load not in self._dimensions:
                fields = self._client.describe_collection(load)["fields"]
                (self._dimensions[load],) = [f["params"]["dim"] for f in fields if f["name"] == "vector"]
            size = int(self._dimensions[load])
            vector = [1.0] + [0.0] * (size - 1)  # a collection's rows need one
            row = {"key": key, "id": json.dumps(value), "vector": vector, "marks": []}
            self._client.upsert(load, [row], partition_name=STATE, retry_times=_RETRIES)

    def _require_fit(self, passage_id: str, marks: int) -> None:
        if len(passage_id.encode(errors="surrogatepass")) > _MOST_ID:
            raise DataError(
                f"Milvus keeps ids of at most {_MOST_ID} bytes; {passage_id[:40]!r}... is longer.",
                path=self.place,
                remedy="Give such passages shorter ids.",
            )
        if marks > _MOST_MARKS:
            raise DataError(
                f"Milvus keeps at most {_MOST_MARKS} values to filter by; passage {passage_id!r} has {marks}.",
                path=self.place,
                remedy="Give it less metadata.",
            )

    @contextmanager
    def _ask(self) -> Iterator[None]:
        """Turn what the server says into errors of ours."""
        import grpc

        try:
            yield
        except self._pymilvus.MilvusException as error:
            raise self._explain(error, str(error.message or error)) from error
        except (grpc.RpcError, OSError) as error:
            raise self._explain(error, _describe(error)) from error

    def _explain(self, error: BaseException, said: str) -> Exception:
        refusal, code = _find_refusal(error), getattr(error, "code", None)
        lines = self._address.hide(refusal or said).strip().splitlines()
        said = lines[0].rstrip(".") if lines else type(error).__name__
        if refusal or re.search(r"(?i)auth check fail|permission deny|not authenticated", said):
            what, remedy = "The server refuses this user or password", "Look at the URL and MILVUS_TOKEN"
        elif re.search(r"(?i)quota|disk|memory limit|no space|deny to write|resource insufficient", said):
            what, remedy = "The server is full", "Free some space there, and run it again: it goes on where it stopped"
        elif re.search(r"(?i)not (fully )?loaded|on recovering|loading collection timeout", said):
            self._loaded.clear()  # asked for again at the next look
            return ServerError(
                "The server is still loading these vectors.", path=self.place, remedy="Wait until it has them."
            )
        elif code == 100 or re.search(r"(?i)(collection|alias) .*(not found|not exist)", said):
            return MovedError("The load is gone.", path=self.place, remedy="Run pairdr index again.")
        elif "Open local milvus failed" in said:
            what, remedy = "The file cannot be opened", "Milvus Lite serves one process: another may have it open"
        elif re.search(r"(?i)connect|unavailable|deadline|timeout|retry run out|rpc", said):
            what, remedy = "The server does not answer", "Look whether it runs, and at host and port"
        else:
            what, remedy = "The server refuses", "Look into its log"
        return ServerError(f"{what}: {said}.", path=self.place, remedy=f"{remedy}.")


def _find_refusal(error: BaseException | None) -> str:
    """Return what the server said to somebody whom it does not let in, or "".

    pymilvus says only that there is no connection; the answer itself stands behind that, as the cause.
    """
    import grpc

    seen = None
    while error is not None and error is not seen:  # pymilvus also raises errors from themselves
        if isinstance(error, grpc.RpcError) and error.code() == grpc.StatusCode.UNAUTHENTICATED:
            return _describe(error)
        seen, error = error, error.__cause__
    return ""


def _describe(error: BaseException) -> str:
    details = getattr(error, "details", None)
    return str(details() if callable(details) else error)
