"""A searcher over a store: fusion, filters, folding and reranking, against doing each by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from storing import SMALL, WordEncoder

from pairdr.backends import load_encoder
from pairdr.collection import open_collection
from pairdr.config import EncodeConfig, LexicalConfig, ModelConfig
from pairdr.encode import encode_corpus, upsert_passages, verify_vectors
from pairdr.errors import ArtefactError, UsageError
from pairdr.filters import match_rows
from pairdr.index import build_index
from pairdr.indexes.faiss import FaissIndex
from pairdr.lexical import index_words
from pairdr.records import Passage, Query
from pairdr.searcher import KEPT_FILTERS, Hit, Searcher
from pairdr.store_config import IndexConfig
from pairdr.vectors import VectorStore
from pairdr.versions import compact_store, delete_passages

ENCODER = WordEncoder()
PASSAGES = [
    Passage(f"p{number:02d}", "", f"word{number % 5} town{number % 11} river{number % 3}", f'{{"kind": {number % 4}}}')
    for number in range(40)
]
QUESTION = "word1 town2 river2"


class Reverse:
    """A reranker that likes what comes late in the alphabet; it notes what it is asked."""

    name = "reverse"

    def __init__(self) -> None:
        self.asked: list[int] = []

    def score(self, queries: Sequence[Query], candidates: Sequence[Sequence[Passage]]) -> list[np.ndarray]:
        self.asked += [len(row) for row in candidates]
        return [np.array([float(passage.passage_id[1:]) for passage in row]) for row in candidates]

    def describe(self) -> dict[str, Any]:
        return {}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the passages as data, as vectors, and as words."""
    folder = tmp_path_factory.mktemp("searched")
    write_data(folder / "data", PASSAGES)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(folder / "cache"))
        store = encode_corpus(open_collection(folder / "data"), ENCODER, SMALL, folder / "vectors")
    index_words(store, LexicalConfig(language="none"), folder / "bm25")
    return folder


def write_data(folder: Path, passages: Sequence[Passage]) -> None:
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    rows = [
        {"_id": p.passage_id, "text": p.text, "metadata": json.loads(p.metadata) if p.metadata else None}
        for p in passages
    ]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "queries.jsonl").write_text('{"_id": "q", "text": "word1"}\n', encoding="utf-8")
    (folder / "qrels" / "test.tsv").write_text(f"q\t{passages[0].passage_id}\t1\n", encoding="utf-8")


@pytest.fixture
def searcher(folder: Path) -> Searcher:
    return make_searcher(folder)


def make_searcher(folder: Path, **parts: Any) -> Searcher:
    from pairdr.lexical import LexicalIndex

    return Searcher(VectorStore(folder / "vectors"), ENCODER, words=LexicalIndex(folder / "bm25"), **parts)


def list_ids(hits: Sequence[Hit]) -> list[str]:
    return [hit.passage_id for hit in hits]


def test_reciprocal_ranks_are_fused_by_their_formula(searcher: Searcher) -> None:
    scores: dict[str, float] = {}
    for mode in ("dense", "bm25"):
        for rank, hit in enumerate(searcher.search(QUESTION, k=12, mode=mode), start=1):
            scores[hit.passage_id] = scores.get(hit.passage_id, 0) + 1 / (60 + rank)
    expected = sorted(scores, key=lambda passage_id: (-np.float32(scores[passage_id]), passage_id))
    hits = searcher.search(QUESTION, k=10, depth=12)
    assert list_ids(hits) == expected[:10]
    assert [hit.score for hit in hits] == pytest.approx([scores[passage_id] for passage_id in expected[:10]])


def test_unsaid_fusion_is_weighted_where_there_are_weights(folder: Path, searcher: Searcher) -> None:
    weighted = make_searcher(folder, weights=(1.0, 0.0))
    dense = list_ids(searcher.search(QUESTION, k=5, mode="dense"))
    assert list_ids(weighted.search(QUESTION, k=5)) == dense
    assert weighted.search(QUESTION, k=40, fusion="rrf") == searcher.search(QUESTION, k=40)


def test_without_words_unsaid_mode_is_dense(folder: Path, searcher: Searcher) -> None:
    bare = Searcher(VectorStore(folder / "vectors"), ENCODER)
    assert bare.search(QUESTION) == searcher.search(QUESTION, mode="dense")


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
@pytest.mark.parametrize("where", [("kind=1",), ("kind=1", "kind=3")])
def test_a_filtered_search_is_the_whole_one_without_the_others(
    searcher: Searcher, mode: str, where: tuple[str, ...]
) -> None:
    kinds = {int(condition[-1]) for condition in where}
    whole = searcher.search(QUESTION, k=40, mode=mode)
    expected = [hit for hit in whole if json.loads(hit.passage.metadata)["kind"] in kinds]
    found = searcher.search(QUESTION, k=5, mode=mode, where=where)
    assert len(found) == 5
    if mode == "hybrid":  # fusion standardises what was found, so only the members are the same
        assert set(list_ids(found)) <= set(list_ids(expected))
    else:
        assert found == expected[:5]


def test_the_rows_of_a_filter_are_found_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        "pairdr.searcher.match_rows", lambda metadata, filters: asked.append(filters) or match_rows(metadata, filters)
    )
    searcher = make_searcher(folder)
    first = searcher.search(QUESTION, mode="hybrid", where=("kind=1",))
    assert searcher.search(QUESTION, mode="hybrid", where=("kind=1",)) == first
    assert len(asked) == 2  # of the vectors, and of the words
    for number in range(2 * KEPT_FILTERS):
        searcher.search(QUESTION, mode="dense", where=("kind=2", f"kind={number}"))
    assert len(searcher._matches) <= KEPT_FILTERS
    assert searcher.search(QUESTION, mode="hybrid", where=("kind=1",)) == first


def test_fewer_than_k_are_found_where_a_filter_leaves_fewer(searcher: Searcher) -> None:
    assert len(searcher.search(QUESTION, k=30, mode="dense", where=("kind=2",))) == 10


def test_copies_are_folded_and_deeper_passages_move_up(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
    copies = [Passage(f"c{number:02d}", "", f"{QUESTION}{'!' * (number % 3)}") for number in range(30)]
    write_data(tmp_path / "data", [*copies, *PASSAGES])
    collection = open_collection(tmp_path / "data")

    class Lenient(WordEncoder):
        def encode_passages(self, passages: Any, tokens_per_batch: int | None = None) -> np.ndarray:
            return self.encode_queries([passage.joined.replace("!", "") for passage in passages])

    store = encode_corpus(collection, Lenient(), SMALL, tmp_path / "vectors")
    words = index_words(store, LexicalConfig(language="none"), tmp_path / "bm25")
    searcher = Searcher(store, Lenient(), words=words)
    for mode in ("dense", "bm25", "hybrid"):
        assert list_ids(searcher.search(QUESTION, k=3, mode=mode)) == ["c00", "c01", "c02"]
        folded = list_ids(searcher.search(QUESTION, k=8, mode=mode, fold=True))
        assert (folded[0], len(folded), len(set(folded))) == ("c00", 8, 8)
        assert not any(passage_id.startswith("c") for passage_id in folded[1:])
    assert len(searcher.search(QUESTION, k=70, mode="dense", fold=True)) == 41


def test_a_reranker_orders_the_best_anew(folder: Path) -> None:
    reranker = Reverse()
    searcher = make_searcher(folder, reranker=reranker)
    first = list_ids(searcher.search(QUESTION, k=12, mode="dense", rerank=0))
    assert reranker.asked == []
    found = searcher.search(QUESTION, k=5, mode="dense", rerank=12)
    assert list_ids(found) == sorted(first, reverse=True)[:5]
    assert [hit.score for hit in found] == [float(hit.passage_id[1:]) for hit in found]
    searcher.search(QUESTION, k=5, mode="dense")
    searcher.search(QUESTION, k=20, mode="dense", rerank=3)
    assert reranker.asked == [12, 40, 20]  # unsaid: 50, of which there are 40; never fewer than k


def test_many_questions_are_answered_as_each_alone(searcher: Searcher) -> None:
    questions = [QUESTION, "town7", QUESTION, "nothing of this"]
    for options in ({}, {"fold": True}, {"where": ("kind=1",)}, {"mode": "bm25"}):
        many = searcher.search_many(questions, 6, **options)
        assert [list_ids(hits) for hits in many] == [list_ids(searcher.search(q, 6, **options)) for q in questions]
    blocks = list(searcher.rank((Query(f"q{number}", QUESTION) for number in range(300)), 3))
    assert [len(ids) for ids, _ in blocks] == [256, 44]


def test_an_index_answers_in_place_of_exact_search(folder: Path, searcher: Searcher, tmp_path: Path) -> None:
    store = VectorStore(folder / "vectors")
    config = IndexConfig(index_kind="hnsw", wanted_recall=1.0, recall_depth=5, quantiser="sq8")
    build_index(store, config, tmp_path / "index")
    asked: list[int] = []

    class Watched(FaissIndex):
        def search(self, queries: Any, k: int, allowed: Any = None, filters: Any = None) -> Any:
            asked.append(k)
            return super().search(queries, k, allowed, filters)

    indexed = make_searcher(folder, index=Watched.open(tmp_path / "index", store))
    for where in ((), ("kind=1",)):
        options: dict[str, Any] = {"mode": "dense", "where": where}
        found = indexed.search(QUESTION, 5, **options)
        assert list_ids(found) == list_ids(searcher.search(QUESTION, 5, **options))
    assert asked == [5, 5]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "bm25"}, r"no BM25 here\. Give --words"),
        ({"mode": "hybrid"}, r"no BM25 here\. Give --words"),
        ({"fusion": "weighted"}, r"No weights were chosen for these vectors\. Use --fusion rrf"),
        ({"rerank": 5}, r"nothing to rerank with\. Give --reranker"),
        ({"where": ("colour=red",)}, r"No passage has the metadata field 'colour'\. There are: kind"),
        ({"depth": 0}, "Option depth is 0; it must be at least 1"),
    ],
)
def test_what_needs_a_part_that_is_not_here_is_refused(folder: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Searcher(VectorStore(folder / "vectors"), ENCODER).search(QUESTION, **options)


def test_parts_that_do_not_fit_each_other_are_refused(folder: Path, tmp_path: Path) -> None:
    from pairdr.lexical import LexicalIndex

    with pytest.raises(ArtefactError, match="made by encoder"):
        Searcher(VectorStore(folder / "vectors"), WordEncoder("other"))
    other = [passage._replace(text="other") for passage in PASSAGES]
    store = upsert_passages(other[:1], ENCODER, SMALL, copy_store(folder, tmp_path))
    with pytest.raises(ArtefactError, match="have changed since their words were indexed"):
        Searcher(store, ENCODER, words=LexicalIndex(folder / "bm25"))


def test_an_index_over_another_version_is_refused(folder: Path, tmp_path: Path) -> None:
    place = copy_store(folder, tmp_path)
    index = build_index(VectorStore(place), IndexConfig(index_kind="flat"), tmp_path / "index")
    changed = delete_passages(place, ["p01"])
    with pytest.raises(ArtefactError, match="over another version of these vectors"):
        Searcher(changed, ENCODER, index=index)


def test_an_old_index_says_that_it_should_be_built_anew(
    tmp_path: Path, tiny_model: Path, toy: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = ModelConfig(start=str(tiny_model), device="cpu")
    encoder = load_encoder(model)
    store = encode_corpus(open_collection(toy), encoder, EncodeConfig(), tmp_path / "v")
    build_index(store, IndexConfig(index_kind="ivf", quantiser="sq8", wanted_recall=0.5), tmp_path / "index")
    Searcher.open(tmp_path / "v", model, index=tmp_path / "index")
    assert "run pairdr index again" not in capsys.readouterr().err
    upsert_passages(PASSAGES, encoder, SMALL, tmp_path / "v")
    Searcher.open(tmp_path / "v", model, index=tmp_path / "index")
    assert "25% of the vectors changed since" in capsys.readouterr().err


def test_words_that_are_replaced_while_they_are_read_are_read_anew(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pairdr import lexical

    store, config = VectorStore(copy_store(folder, tmp_path)), LexicalConfig(language="none")
    index_words(store, config, tmp_path / "bm25")
    fewer = delete_passages(tmp_path / "vectors", [p.passage_id for p in PASSAGES[:20]])
    load = lexical.bm25s.BM25.load
    replaced: list[int] = []

    def load_late(*arguments: Any, **options: Any) -> Any:
        if not replaced:
            replaced.append(1)
            index_words(fewer, config, tmp_path / "bm25")
        return load(*arguments, **options)

    monkeypatch.setattr(lexical.bm25s.BM25, "load", load_late)
    words = lexical.LexicalIndex(tmp_path / "bm25")
    assert words.count == 20
    words.require_passages(fewer.passages_fingerprint)
    assert words.ids_of(words.search("word1", 40)[0]) == ["p21", "p26", "p31", "p36"]


def copy_store(folder: Path, target: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder / "vectors", target / "vectors"))


def test_words_of_a_changed_store_are_those_of_its_live_passages(folder: Path, tmp_path: Path) -> None:
    place = copy_store(folder, tmp_path)
    upsert_passages([Passage("new", "A title", "unheard")], ENCODER, SMALL, place)
    store = delete_passages(place, ["p01"])
    words = index_words(store, LexicalConfig(language="none"), tmp_path / "bm25")
    found = Searcher(store, ENCODER, words=words).search("unheard title word1", k=60, mode="bm25")
    assert list_ids(found)[0] == "new"
    assert set(list_ids(found)) == {"new"} | {p.passage_id for p in PASSAGES[6::5]}
    words.require_passages(compact_store(place).passages_fingerprint)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8"])
def test_changed_metadata_is_found_and_nothing_is_encoded_for_it(folder: Path, tmp_path: Path, dtype: Any) -> None:
    import dataclasses

    config = dataclasses.replace(SMALL, dtype=dtype)
    encoder = WordEncoder()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PAIRDR_CACHE", str(tmp_path / "cache"))
        before = encode_corpus(open_collection(folder / "data"), encoder, config, tmp_path / "vectors")
        encoder.encoded = []
        changed = [passage._replace(metadata='{"kind": 9}') for passage in PASSAGES[3:9]]
        write_data(tmp_path / "data", [*PASSAGES[:3], *changed[:3], *PASSAGES[6:], Passage("new", "", "word1")])
        corpus = open_collection(tmp_path / "data")
        encode_corpus(corpus, encoder, config, tmp_path / "vectors")
    after = upsert_passages(changed[3:], encoder, config, tmp_path / "vectors")
    assert encoder.encoded == ["new"]
    ids = [passage.passage_id for passage in changed]
    np.testing.assert_allclose(after.take_passages(ids), before.take_passages(ids), rtol=1e-6)
    found = Searcher(after, encoder).search(QUESTION, k=40, where=("kind=9",))
    assert sorted(list_ids(found)) == ids
    assert all(hit.passage.metadata == '{"kind": 9}' for hit in found)


def test_vectors_are_compared_with_fresh_ones(folder: Path, tmp_path: Path) -> None:
    store = VectorStore(folder / "vectors")
    assert verify_vectors(store, WordEncoder()) == 40
    assert verify_vectors(store, encoder := WordEncoder(), sample=7) == len(set(encoder.encoded)) == 7

    class Wrong(WordEncoder):
        def encode_passages(self, passages: Any, tokens_per_batch: int | None = None) -> np.ndarray:
            found = super().encode_passages(passages)
            found[[p.passage_id == "p17" for p in passages], 0] += 1e-3
            return found

    with pytest.raises(ArtefactError, match=r"The vector of passage 'p17' is not that of its text \(1 of 40 here\)"):
        verify_vectors(store, Wrong())
    with pytest.raises(ArtefactError, match="made by encoder"):
        verify_vectors(store, WordEncoder("other"))
    lenient = Wrong()
    lenient.noise = 0.05
    assert verify_vectors(store, lenient) == 40


def test_vectors_are_opened_with_their_model(toy: Path, tiny_model: Path, tmp_path: Path) -> None:
    from pairdr.encoder import DualEncoder

    model = ModelConfig(start=str(tiny_model), device="cpu")
    data = open_collection(toy)
    store = encode_corpus(data, DualEncoder.load(model), EncodeConfig(), tmp_path / "vectors")
    index_words(data, LexicalConfig(), tmp_path / "bm25")
    searcher = Searcher.open(tmp_path / "vectors", model, words=tmp_path / "bm25")
    assert searcher.store.fingerprint == store.fingerprint
    assert "kendal-river" in list_ids(searcher.search("which river runs through kendal", k=10, mode="bm25"))
    with pytest.raises(ArtefactError, match=r"No teacher was accepted here\. Name a cross-encoder's folder"):
        Searcher.open(tmp_path / "vectors", model, reranker="teacher")
