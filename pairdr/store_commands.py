"""What the commands around finished models and stores do. Each imports only what it needs."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators

from pairdr.artefact import MANIFEST, read_manifest, verify_artefact
from pairdr.commands import FLAT, ON_DUPLICATE, OUTPUT
from pairdr.config import DataConfig, EncodeConfig, LexicalConfig, ModelConfig, OnDuplicate
from pairdr.errors import DataError, UsageError
from pairdr.progress import print_facts, print_text, quiet_libraries
from pairdr.store_config import CompareConfig, ExportConfig, IndexConfig, Target

if TYPE_CHECKING:
    from pairdr.indexes.exact import Scores
    from pairdr.measures import PerQuery
    from pairdr.vectors import VectorStore


def export(
    model: Path,
    *,
    to: Annotated[Target, Parameter(help="What runs it, and in which precision.")],
    output: Annotated[Path, OUTPUT],
    data: Annotated[
        Path | None, Parameter(help="BEIR folder that calibrates and judges the export; int8 needs one.")
    ] = None,
    on_duplicate: ON_DUPLICATE = "error",
    options: Annotated[ExportConfig, FLAT] = ExportConfig(),
) -> None:
    """Write a model as onnxruntime or OpenVINO runs it; end with 1, and write nothing, if it loses too much.

    Parameters
    ----------
    model
        A model of `pairdr train` or `pairdr run`.
    """
    from pairdr.collection import open_collection
    from pairdr.export import export_model

    quiet_libraries()
    collection = None if data is None else open_collection(data, DataConfig(on_duplicate=on_duplicate))
    export_model(model, output, to=to, collection=collection, config=options)
    print_facts(read_manifest(output).facts["gate"])


def index(
    vectors: Path,
    *,
    output: Annotated[str, Parameter(name=["--output", "-o"], help="Folder to write, or URL of a database.")],
    data: Annotated[
        Path | None, Parameter(help="BEIR folder whose training and unlabelled queries tune and judge the index.")
    ] = None,
    on_duplicate: ON_DUPLICATE = "error",
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    options: Annotated[IndexConfig, FLAT] = IndexConfig(),
) -> None:
    """Build an index of vectors, tuned to the recall that is wanted; end with 1 if it cannot be reached.

    With the URL of a database as --output, load the vectors there, or what has changed since the last time.

    Parameters
    ----------
    vectors
        What `pairdr encode` wrote.
    """
    from pairdr.index import build_index
    from pairdr.indexes.address import is_url
    from pairdr.vectors import VectorStore

    store = VectorStore(vectors)
    queries = None if data is None else _encode_questions(data, on_duplicate, model, store, options)
    if is_url(output):
        from pairdr.load import describe_database, load_database

        load_database(store, output, options, queries)
        facts = describe_database(output)
    else:
        if options.rebuild:
            raise UsageError("An index in a folder is always built anew.", remedy="Leave --rebuild out.")
        build_index(store, options, output, queries)
        facts = read_manifest(output).facts
    print_facts({name: value for name, value in facts.items() if name not in ("shards", "options", "load")})


def compare(
    systems: Annotated[tuple[str, ...], Parameter(negative="")],
    *,
    qrels: Annotated[Path | None, Parameter(help="Labels (BEIR or TREC) by which runs are measured.")] = None,
    output: Annotated[Path | None, OUTPUT] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="For machines.")] = False,
    options: Annotated[CompareConfig, FLAT] = CompareConfig(),
) -> None:
    """Compare systems on the same queries with the first one: did it help, and could these queries have shown it?

    Parameters
    ----------
    systems
        Two or more of PLACE, NAME=PLACE or NAME=PLACE,PLACE (seeds of one system). A place is a run, an evaluation, or
        a work folder, of which PAIR is taken.
    """
    from pairdr.compare import compare_values, read_system
    from pairdr.formats import read_qrels

    labels = None if qrels is None else read_qrels(qrels)
    values: dict[str, list[PerQuery]] = {}
    for text in systems:
        name, seeds = read_system(text, labels, options.measures)
        if name in values:
            raise UsageError(f"Two systems are named {name!r}.", remedy="Write NAME=PLACE.")
        values[name] = seeds
    found = compare_values(values, options, output)
    print_text(json.dumps(asdict(found)) if as_json else found.format())


def push(
    model: Path,
    repository: str,
    *,
    private: Annotated[bool, Parameter(negative="", help="Make a new repository private.")] = False,
) -> None:
    """Upload a model with its card to the Hugging Face hub; HF_TOKEN, or `hf auth login`, says as whom.

    Parameters
    ----------
    model
        A model of `pairdr train` or `pairdr run`.
    repository
        Its name there, such as organisation/name; made where there is none.
    """
    quiet_libraries()
    verify_artefact(model)
    from pairdr.encoder import push_model

    print_text(push_model(model, repository, private=private))


def upsert(
    vectors: Path,
    corpus: Path,
    *,
    on_duplicate: ON_DUPLICATE = "error",
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    options: Annotated[EncodeConfig, FLAT] = EncodeConfig(),
) -> None:
    """Add passages to vectors, or change their text, as one new version; what is unchanged is not encoded again.

    Parameters
    ----------
    vectors
        What `pairdr encode` wrote.
    corpus
        The passages, in the form of corpus.jsonl.
    """
    from pairdr.backends import load_encoder
    from pairdr.encode import settle_duplicates, upsert_passages
    from pairdr.formats import read_passages

    quiet_libraries()
    passages = settle_duplicates(list(read_passages(corpus)), on_duplicate)
    store = upsert_passages(passages, load_encoder(model), options, vectors)
    print_facts({"version": store.version, "passages": store.live})


def delete(vectors: Path, passage_ids: Annotated[tuple[str, ...], Parameter(negative="")]) -> None:
    """Take passages out of vectors by their ids, as one new version.

    Parameters
    ----------
    vectors
        What `pairdr encode` wrote.
    passage_ids
        The ids.
    """
    from pairdr.versions import delete_passages

    store = delete_passages(vectors, passage_ids)
    print_facts({"version": store.version, "passages": store.live})


def compact(vectors: Path) -> None:
    """Drop the rows of deleted and changed passages from vectors, as one new version.

    Parameters
    ----------
    vectors
        What `pairdr encode` wrote.
    """
    from pairdr.versions import compact_store

    store = compact_store(vectors)
    print_facts({"version": store.version, "passages": store.live})


def index_words(
    source: Path,
    *,
    output: Annotated[Path, OUTPUT],
    on_duplicate: ON_DUPLICATE = "error",
    options: Annotated[LexicalConfig, FLAT] = LexicalConfig(),
) -> None:
    """Index words for BM25, for search in both ways.

    Parameters
    ----------
    source
        What `pairdr encode` wrote, whose passages of now are taken, or a BEIR folder.
    """
    from pairdr.collection import open_collection
    from pairdr.lexical import index_words as index_source
    from pairdr.vectors import VectorStore

    is_store = (source / MANIFEST).is_file()
    passages = VectorStore(source) if is_store else open_collection(source, DataConfig(on_duplicate=on_duplicate))
    index_source(passages, options, output)
    print_facts(read_manifest(output).facts)


def verify(
    folder: Path,
    *,
    sample: Annotated[
        int | None,
        Parameter(
            help="Passages that --start encodes again, drawn at random; unset: all.", validator=validators.Number(gte=1)
        ),
    ] = None,
    model: Annotated[ModelConfig | None, FLAT] = None,
) -> None:
    """Check an output folder: every file's sha256; of vectors, that they are finite, and that an id has one row.

    With --start, vectors are also compared with those that this model makes of the passages now.

    Parameters
    ----------
    folder
        What any command wrote.
    """
    if sample is not None and model is None:
        raise UsageError("--sample says how many passages --start encodes again.", remedy="Name the model as --start.")
    manifest = verify_artefact(folder)
    print_text(f"{len(manifest.files)} files are as they were written ({manifest.kind}, {manifest.fingerprint[:12]})")
    if manifest.kind != "vectors":
        if model is not None:
            raise UsageError("Only vectors are compared with a model.", path=folder, remedy="Leave --start out.")
        return
    from pairdr.versions import verify_store

    verify_store(folder)
    if model is not None:
        from pairdr.backends import load_encoder
        from pairdr.encode import verify_vectors
        from pairdr.vectors import VectorStore

        quiet_libraries()
        count = verify_vectors(VectorStore(folder), load_encoder(model), sample)
        print_text(f"{count} vectors are those of their passages")


def _encode_questions(
    data: Path, on_duplicate: OnDuplicate, model: ModelConfig, store: VectorStore, options: IndexConfig
) -> Scores:
    """Return the vectors [Q, D] of some questions that no dev or test split names."""
    import random

    from pairdr.backends import load_encoder
    from pairdr.collection import open_collection

    quiet_libraries()
    collection = open_collection(data, DataConfig(on_duplicate=on_duplicate))
    labelled = collection.qrels("train") if collection.labels("train") else {}
    ids = sorted({*labelled, *collection.pool})
    if not ids:
        raise DataError(
            "There are no training and no unlabelled queries.",
            path=data,
            remedy="Leave --data out: vectors of the corpus then judge the index.",
        )
    encoder = load_encoder(model)
    store.require_encoder(encoder.fingerprint)
    chosen = random.Random(options.index_seed).sample(ids, min(options.tuning_queries, len(ids)))
    return encoder.encode_queries([collection.query(query_id).text for query_id in chosen])
