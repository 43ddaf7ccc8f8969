"""Vectors in PostgreSQL with pgvector: a table of rows, a table of shards, the facts as the first one's comment.

The published load has the tables NAME and NAME__shards. Another load is made in tables beside them, which are renamed
in the transaction that drops the old ones. A search reads the load's comment in its own transaction, so it knows that
what it has found is of the load that it meant.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from pairdr.errors import ArtefactError, BusyError, DataError, RefusedError, ServerError
from pairdr.indexes.address import Address
from pairdr.indexes.engine import Facts, Held, Marks, MovedError, key_range
from pairdr.indexes.exact import Rows, Scores
from pairdr.indexes.postgres import PostgresServer
from pairdr.vectors import Dtype

if TYPE_CHECKING:
    from psycopg import Connection
    from psycopg.sql import Composed

_PATIENCE, _PATIENCE_EACH = 5.0, 0.2  # seconds for an answer, and more for each question of a search
_SILENCE = 60.0  # seconds in which a load wants an answer, and ten times that for rows; a graph may take any time
_WIDTH = 100  # of the queue in which a graph's neighbours are looked for while it is built
_MOST_SINGLE, _MOST_HALF = 2000, 4000  # dimensions of fp32 and of fp16 vectors that pgvector indexes
_OPERATORS = {"cosine": ("<=>", "cosine_ops"), "dot": ("<#>", "ip_ops")}


class _Form(NamedTuple):
    """How a load keeps vectors: the type of the column, the operator of its order, its class for an index."""

    column: str
    operator: str
    operators: str


class PostgresDatabase:
    """What one URL names in PostgreSQL; as `Database`."""

    links, longest = 16, 1000

    def __init__(self, address: Address) -> None:
        self.place, self.name = address.shown, address.name
        self._server = PostgresServer(address)
        self._ask = self._server.ask
        self._published: str | None = None
        self._forms: dict[str, _Form] = {}
        self._is_loading = False

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Keep other loads of this name out while the block runs."""
        key = f"pairdr:{self.name}"
        with self._ask(within=_SILENCE) as connection:
            row = connection.execute("SELECT pg_try_advisory_lock(hashtextextended(%s, 0))", (key,)).fetchone()
        if row is None or not row[0]:
            raise BusyError(self.place)
        self._is_loading = True
        try:
            yield
        finally:
            self._is_loading = False
            with contextlib.suppress(ServerError), self._ask(within=_SILENCE) as connection:
                connection.execute("SELECT pg_advisory_unlock(hashtextextended(%s, 0))", (key,))

    def find_load(self) -> str | None:
        """Return the load that the name holds, or None."""
        with self._ask(within=_PATIENCE) as connection:
            found = _read_comment(connection, self.name)
        if found is None:
            self._published = None
            return None
        load = _read_facts(found[0]).get("load")
        if load is None:
            raise ArtefactError(
                f"The name {self.name!r} is taken by a table that pairdr did not write.",
                path=self.place,
                remedy="Choose another with ?name=NAME.",
            )
        self._published = str(load)
        return self._published

    def list_halves(self) -> list[str]:
        """Return loads of this name that were begun and never published."""
        with self._ask(within=_SILENCE) as connection:
            rows = connection.execute(
                "SELECT relname FROM pg_class WHERE relnamespace = current_schema()::regnamespace AND relkind = 'r' "
                "AND relname ~ %s ORDER BY 1",
                (f"^{self.name}__[0-9a-f]{{12}}_[01]$",),
            ).fetchall()
            comments = [(name, _read_comment(connection, name)) for (name,) in rows]
        return [name for name, found in comments if found is not None and _read_facts(found[0]).get("load") == name]

    def create(self, load: str, dimensions: int, similarity: str, dtype: Dtype) -> None:
        """Make the tables of a load; those that are there are kept."""
        kind = "vector" if dtype == "float32" and dimensions <= _MOST_SINGLE else "halfvec"
        if dimensions > _MOST_HALF:
            raise RefusedError(
                f"pgvector indexes at most {_MOST_HALF} dimensions; these vectors have {dimensions}.",
                remedy="Cut them with a Matryoshka model, or use Milvus.",
            )
        with self._ask(within=_SILENCE) as connection, connection.transaction():
            if _read_comment(connection, self._table(load)) is not None:
                return
            connection.execute(
                self._say(
                    "CREATE TABLE {table} (key bigint PRIMARY KEY, id text NOT NULL, vector "
                    + f"{kind}({dimensions}) NOT NULL, marks bigint[] NOT NULL)",
                    load,
                )
            )
            connection.execute(
                self._say(
                    "CREATE TABLE {shards} (number bigint PRIMARY KEY, name text NOT NULL, rows bigint NOT NULL, "
                    "kept bigint NOT NULL, digest text NOT NULL, whole boolean NOT NULL)",
                    load,
                )
            )
            self._comment(connection, load, {"load": load, "similarity": similarity})

    def read_facts(self, load: str, *, fresh: bool = True) -> Facts | None:
        """Return the facts of a load, None where there are none yet."""
        with self._ask(within=_PATIENCE) as connection:
            found = _read_comment(connection, self._table(load))
        facts = {} if found is None else _read_facts(found[0])
        return facts if facts.get("load") == load and "format" in facts else None

    def write_facts(self, load: str, facts: Facts) -> None:
        """Replace the facts of a load."""
        with self._ask(within=_SILENCE) as connection:
            self._comment(connection, load, {"load": load} | facts)

    def read_shards(self, load: str) -> list[Held]:
        """Return the notes of shards."""
        with self._ask(within=_PATIENCE) as connection:
            query = self._say("SELECT number, name, rows, kept, digest, whole FROM {shards} ORDER BY number", load)
            return [Held(*row) for row in connection.execute(query).fetchall()]

    def note_shard(self, load: str, held: Held) -> None:
        """Write or replace the note of a shard."""
        with self._ask(within=_SILENCE) as connection:
            connection.execute(
                self._say(
                    "INSERT INTO {shards} VALUES (%s, %s, %s, %s, %s, %s) ON CONFLICT (number) DO UPDATE SET "
                    "kept = excluded.kept, digest = excluded.digest, whole = excluded.whole",
                    load,
                ),
                held,
            )

    def forget_shard(self, load: str, number: int) -> None:
        """Remove the note of a shard."""
        with self._ask(within=_SILENCE) as connection:
            connection.execute(self._say("DELETE FROM {shards} WHERE number = %s", load), (number,))

    def list_keys(self, load: str, number: int, count: int) -> Rows:
        """Return the keys [n] of a shard's rows that are there, in order."""
        with self._ask(within=10 * _SILENCE) as connection:
            query = self._say("SELECT key FROM {table} WHERE key >= %s AND key < %s ORDER BY key", load)
            rows = connection.execute(query, key_range(number)).fetchall()
        return np.array(rows, dtype=np.int64).reshape(-1)

    def add(self, load: str, keys: Rows, ids: Sequence[str], vectors: Scores, marks: Marks) -> None:
        """Add rows."""
        column = self._find_form(load).column
        within = 10 * _SILENCE  # rows also go into the graph, where there is one
        with self._ask(within) as connection, connection.transaction(), connection.cursor() as cursor:
            with np.errstate(over="ignore"):
                numbers = vectors.astype(">f2" if column == "halfvec" else ">f4")
            if not np.isfinite(numbers).all():
                raise DataError(
                    "A vector has numbers beyond 65504, the most of fp16.",
                    path=self.place,
                    remedy="Load a float32 store of at most 2000 dimensions.",
                )
            head = vectors.shape[1].to_bytes(2, "big") + b"\0\0"
            with cursor.copy(self._say("COPY {table} (key, id, vector, marks) FROM STDIN (FORMAT binary)", load)) as to:
                to.set_types(["int8", "text", "bytea", "int8[]"])  # a vector's bytes are sent as they are
                for key, passage_id, vector, row_marks in zip(keys.tolist(), ids, numbers, marks, strict=True):
                    if "\0" in passage_id:
                        raise DataError(
                            f"PostgreSQL keeps no NUL character; the id {passage_id!r} has one.", path=self.place
                        )
                    to.write_row((key, passage_id, head + vector.tobytes(), list(row_marks)))

    def remove(self, load: str, keys: Rows) -> None:
        """Remove rows."""
        with self._ask(within=10 * _SILENCE) as connection:  # as many as a shard has
            connection.execute(self._say("DELETE FROM {table} WHERE key = ANY(%s)", load), (keys.tolist(),))

    def finish(self, load: str, memory: int | None) -> None:
        """Build the graph and the index of marks where they are not there; at most so many MiB."""
        form = self._find_form(load)
        with self._ask() as connection, connection.transaction():
            if memory is not None:
                connection.execute("SELECT set_config('maintenance_work_mem', %s, true)", (f"{memory}MB",))
            connection.execute(
                self._say(
                    f"CREATE INDEX IF NOT EXISTS {{graph}} ON {{table}} USING hnsw (vector {form.operators}) "
                    f"WITH (m = {self.links}, ef_construction = {_WIDTH})",
                    load,
                )
            )
            connection.execute(self._say("CREATE INDEX IF NOT EXISTS {marked} ON {table} USING gin (marks)", load))
        with self._ask() as connection:
            connection.execute(self._say("ANALYZE {table}", load))

    def publish(self, load: str) -> None:
        """Let the name hold this load, in one transaction, and drop the one that it held."""
        old = self.find_load()
        with self._ask() as connection, connection.transaction():  # it waits for readers, as long as they read
            if old is not None:
                for kind in ("", "__shards"):
                    _copy_grants(connection, self._table(old) + kind, load + kind)
                connection.execute(self._say("DROP TABLE {table}, {shards}", old))
            connection.execute(self._say("ALTER TABLE {table} RENAME TO {name}", load))
            connection.execute(self._say("ALTER TABLE {shards} RENAME TO {name_shards}", load))
        self._published = load

    def drop(self, load: str) -> None:
        """Remove a load."""
        with self._ask(within=_SILENCE) as connection:
            connection.execute(self._say("DROP TABLE IF EXISTS {table}, {shards}", load))

    def search(self, load: str, queries: Scores, depth: int, queue: int, filters: Marks) -> Rows:
        """Return the keys [Q, c] that are found, -1 is none."""
        form, table = self._find_form(load), self._table(load)
        settings = {
            "hnsw.ef_search": str(min(self.longest, max(queue, depth))),
            "hnsw.iterative_scan": "relaxed_order",  # the store puts them in order
            "hnsw.max_scan_tuples": str(max(20000, 8 * depth)),
        }
        wanted = " AND ".join(["c.marks && %s::bigint[]"] * len(filters)) or "true"
        query = self._say(
            # Materialized: else every comparison of a plain scan would read the question's text again.
            f"WITH q AS MATERIALIZED (SELECT number, text::{form.column} AS vector "
            "FROM unnest(%s::text[]) WITH ORDINALITY AS u (text, number)) "
            "SELECT q.number, c.key FROM q CROSS JOIN LATERAL (SELECT c.key FROM {table} c "
            f"WHERE {wanted} ORDER BY c.vector {form.operator} q.vector LIMIT %s) c",
            load,
        )
        texts = ["[" + ",".join(map(str, vector)) + "]" for vector in queries.tolist()]
        # Nobody waits for the search that a load is tuned by, and a new graph may be slow.
        seconds = None if self._is_loading else _PATIENCE + _PATIENCE_EACH * len(queries)
        with self._ask(within=seconds) as connection, connection.transaction():
            connection.execute(
                "SELECT " + ", ".join(["set_config(%s, %s, true)"] * len(settings)),
                [part for pair in settings.items() for part in pair],
            )
            rows = connection.execute(query, [texts, *map(list, filters), depth], binary=True).fetchall()
            found = _read_comment(connection, table)  # after the search, whose lock keeps the table what it was
        if found is None or _read_facts(found[0]).get("load") != load:
            raise MovedError("Another load has been published.", path=self.place)
        return _to_lines(np.array(rows, dtype=np.int64).reshape(-1, 2), len(queries))

    def count(self, load: str) -> int:
        """Return how many rows there are."""
        with self._ask(within=_SILENCE) as connection:
            row = connection.execute(self._say("SELECT count(*) FROM {table}", load)).fetchone()
        return int(row[0]) if row else 0

    def measure_size(self, load: str) -> int | None:
        """Return bytes on the server's disk."""
        with self._ask(within=_SILENCE) as connection:
            row = connection.execute("SELECT pg_total_relation_size(%s)", (f'"{self._table(load)}"',)).fetchone()
        return int(row[0]) if row else None

    def close(self) -> None:
        """Close the connection."""
        self._server.close()

    def _table(self, load: str) -> str:
        return self.name if load == self._published else load

    def _say(self, text: str, load: str) -> Composed:
        """Return SQL with the names of a load's tables in it."""
        from psycopg import sql

        table = self._table(load)
        names = {
            "table": table,
            "shards": f"{table}__shards",
            "graph": f"{load}__graph",
            "marked": f"{load}__marks",
            "name": self.name,
            "name_shards": f"{self.name}__shards",
        }
        return sql.SQL(text).format(**{key: sql.Identifier(name) for key, name in names.items()})

    def _comment(self, connection: Connection[Any], load: str, facts: Facts) -> None:
        from psycopg import sql

        text = sql.Literal(json.dumps(facts))
        connection.execute(sql.SQL("COMMENT ON TABLE {} IS {}").format(sql.Identifier(self._table(load)), text))

    def _find_form(self, load: str) -> _Form:
        if load not in self._forms:
            query = (
                "SELECT format_type(atttypid, NULL) FROM pg_attribute WHERE attname = 'vector' AND attrelid = "
                "to_regclass(%s)"
            )
            table = self._table(load)
            with self._ask(within=_PATIENCE) as connection:
                row = connection.execute(query, (f'"{table}"',)).fetchone()
                found = _read_comment(connection, table)
            facts = {} if found is None else _read_facts(found[0])
            if row is None or facts.get("load") != load:
                raise MovedError("Another load has been published.", path=self.place)
            operator, operators = _OPERATORS[facts["similarity"]]
            column = str(row[0]).rpartition(".")[2]
            self._forms[load] = _Form(column, operator, f"{column}_{operators}")
        return self._forms[load]


def _read_comment(connection: Connection[Any], table: str) -> tuple[str | None] | None:
    """Return the comment of a table or view in a tuple; None where there is none of this name."""
    row = connection.execute(
        "SELECT obj_description(oid, 'pg_class') FROM pg_class WHERE oid = to_regclass(%s)", (f'"{table}"',)
    ).fetchone()
    return None if row is None else (row[0],)


def _copy_grants(connection: Connection[Any], old: str, new: str) -> None:
    """Let those read, or whatever else they may, a new table who may the old one."""
    from psycopg import sql

    rows = connection.execute(
        "SELECT grantee, pg_get_userbyid(grantee), privilege_type FROM pg_class, aclexplode(relacl) "
        "WHERE pg_class.oid = to_regclass(%s)",
        (f'"{old}"',),
    ).fetchall()
    for number, role, right in rows:
        who = sql.Identifier(role) if number else sql.SQL("PUBLIC")
        connection.execute(sql.SQL("GRANT {} ON {} TO {}").format(sql.SQL(right), sql.Identifier(new), who))


def _read_facts(comment: str | None) -> Facts:
    try:
        found = json.loads(comment or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _to_lines(pairs: Rows, lines: int) -> Rows:
    """Return the keys [Q, c] of (number from 1, key) pairs, -1 where a line has fewer."""
    order = np.argsort(pairs[:, 0], kind="stable")
    line, keys = pairs[order, 0] - 1, pairs[order, 1]
    counts = np.bincount(line, minlength=lines)
    found = np.full((lines, int(counts.max(initial=0))), -1, dtype=np.int64)
    found[line, np.arange(len(line)) - np.repeat(np.cumsum(counts) - counts, counts)] = keys
    return found
