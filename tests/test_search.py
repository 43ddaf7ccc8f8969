"""Search against brute force: exact top k with ties, BM25 against its formula, fusion by hand, the vector store."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pairdr.artefact import verify_artefact
from pairdr.collection import Collection, open_collection
from pairdr.config import EncodeConfig, LexicalConfig, ModelConfig, SearchConfig
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, UsageError
from pairdr.formats import read_run
from pairdr.fusion import cross_fit, fuse_runs, list_weights, standardise, tune_run_weights, tune_weights
from pairdr.lexical import LexicalIndex, Tokenizer, index_words
from pairdr.records import Query, Run
from pairdr.search import rank_dense, rank_words, write_search
from pairdr.searcher import Searcher
from pairdr.store_config import QueryConfig


def sort_by_hand(scores: np.ndarray, id_rank: np.ndarray, k: int) -> list[int]:
    return sorted(range(len(scores)), key=lambda row: (-scores[row], id_rank[row]))[:k]


# --- BM25 -------------------------------------------------------------------------------------------------------------

PLAIN = LexicalConfig(language="none")
TEXTS = st.lists(st.sampled_from(["ab", "cd", "ef", "gh"]), min_size=1, max_size=6).map(" ".join)
WriteBeir = Callable[..., Path]


@pytest.fixture
def index(tmp_path_factory: pytest.TempPathFactory, write_beir: WriteBeir) -> Callable[..., LexicalIndex]:
    """Return `index(texts, config)`, which indexes passages with the ids z, y, x, ..."""

    def build(texts: Sequence[str], config: LexicalConfig = PLAIN) -> LexicalIndex:
        folder = tmp_path_factory.mktemp("bm25")
        corpus = {chr(ord("z") - row): text for row, text in enumerate(texts)}
        return index_words(open_collection(write_beir(folder / "data", corpus, {}, {})), config, folder / "bm25")

    return build


def score_by_formula(texts: Sequence[str], query: str, config: LexicalConfig) -> list[float]:
    """Score with Lucene's BM25: idf x tf / (tf + k1 (1 - b + b x length / mean length))."""
    documents = [Counter(text.split()) for text in texts]
    average = sum(map(Counter.total, documents)) / len(documents)
    scores = []
    for document in documents:
        norm = config.k1 * (1 - config.b + config.b * document.total() / average)
        score = 0.0
        for word in query.split():
            holding = sum(word in other for other in documents)
            idf = math.log(1 + (len(documents) - holding + 0.5) / (holding + 0.5))
            score += idf * document[word] / (document[word] + norm)
        scores.append(score)
    return scores


@pytest.mark.parametrize("config", [PLAIN, LexicalConfig(k1=0.9, b=0.4, language="none")], ids=["default", "other"])
@settings(max_examples=20)
@given(data=st.data())
def test_bm25_scores_by_lucenes_formula(
    index: Callable[..., LexicalIndex], config: LexicalConfig, data: st.DataObject
) -> None:
    texts, query = data.draw(st.lists(TEXTS, min_size=1, max_size=6)), data.draw(TEXTS)
    assert index(texts, config).score_all(query) == pytest.approx(score_by_formula(texts, query, config), rel=1e-5)


@settings(max_examples=25)
@given(st.lists(TEXTS, min_size=1, max_size=8), TEXTS, st.integers(1, 10))
def test_bm25_returns_the_best_that_share_a_word_with_ties_by_id(
    index: Callable[..., LexicalIndex], texts: list[str], query: str, k: int
) -> None:
    built = index(texts)
    scores = built.score_all(query)
    backwards = np.arange(len(texts))[::-1]  # the ids run from z down
    rows, found = built.search(query, k)
    assert rows.tolist() == [row for row in sort_by_hand(scores, backwards, k) if scores[row] > 0]
    assert found.tolist() == scores[rows].tolist()


def test_copies_are_ordered_by_their_ids(index: Callable[..., LexicalIndex]) -> None:
    rows, scores = index(["ab cd", "ef", "ab cd", "ab cd"]).search("cd", 2)
    assert rows.tolist() == [3, 2]
    assert scores[0] == scores[1]


@pytest.mark.parametrize("query", ["zz yy", "", "?!", "the of", "a"])
def test_a_question_without_a_known_word_finds_nothing(index: Callable[..., LexicalIndex], query: str) -> None:
    rows, scores = index(["ab cd", "ef"], LexicalConfig()).search(query, 5)
    assert (len(rows), len(scores)) == (0, 0)


def test_unknown_words_beside_known_ones_change_nothing(index: Callable[..., LexicalIndex]) -> None:
    built = index(["ab cd", "ef"])
    assert built.score_all("ab unheard").tolist() == built.score_all("ab").tolist()


def test_empty_passages_are_never_found(index: Callable[..., LexicalIndex]) -> None:
    assert index(["ab", "", "?"]).search("ab", 5)[0].tolist() == [0]


def test_words_are_stemmed_and_stop_words_dropped() -> None:
    assert Tokenizer(LexicalConfig())("The Rivers and the running") == ["river", "run"]


def test_without_a_language_words_stay_as_they_are() -> None:
    assert Tokenizer(PLAIN)("The Rivers, were running!") == ["the", "rivers", "were", "running"]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("parse_date", ["parse", "date"]),
        ("os.path.joinAll", ["os", "path", "join", "all"]),
        ("HTTPServer", ["http", "server"]),
        ("utf8Decoder", ["utf", "8", "decoder"]),
        ("plain", ["plain"]),
        ("naïve", ["naïve"]),
    ],
)
def test_names_are_split_where_asked(name: str, parts: list[str]) -> None:
    assert Tokenizer(LexicalConfig(language="none", split_names=True))(name) == parts


def test_names_stay_whole_where_not_asked() -> None:
    assert Tokenizer(PLAIN)("parse_date HTTPServer") == ["parse_date", "httpserver"]


def test_an_unknown_language_is_refused_with_those_that_exist() -> None:
    with pytest.raises(UsageError, match=r"No stemmer for 'klingon'.*english"):
        Tokenizer(LexicalConfig(language="klingon"))


def test_an_index_is_opened_with_the_options_it_was_made_with(index: Callable[..., LexicalIndex]) -> None:
    made = index(["parse_date", "other"], LexicalConfig(language="none", split_names=True))
    opened = LexicalIndex(made.folder)
    assert opened.config == made.config
    assert opened.score_all("date").tolist() == made.score_all("date").tolist()
    assert opened.score_all("date")[0] > 0


# --- fusion -----------------------------------------------------------------------------------------------------------


def test_standardised_scores_have_mean_zero_and_deviation_one() -> None:
    assert standardise([1, 2, 3]) == pytest.approx([-math.sqrt(1.5), 0, math.sqrt(1.5)])


@pytest.mark.parametrize("scores", [[], [5.0], [2.0, 2.0, 2.0]])
def test_equal_scores_are_standardised_to_zero(scores: list[float]) -> None:
    assert standardise(scores).tolist() == [0.0] * len(scores)


def test_weights_are_all_tenths_that_sum_to_one() -> None:
    assert len(list_weights(2)) == 11
    assert len(list_weights(3)) == 66
    assert all(sum(weights) == pytest.approx(1) for weights in list_weights(3))
    assert list_weights(1) == [(1.0,)]


DENSE = Run.from_mapping({"q": [("a", 0.9), ("b", 0.5), ("c", 0.1)], "only dense": [("z", 1.0), ("y", 0.0)]})
WORDS = Run.from_mapping({"q": [("c", 30.0), ("d", 10.0)], "only words": [("x", 4.0)]})


def test_runs_are_fused_by_the_weighted_sum_of_standardised_scores() -> None:
    # Over a, b, c, d a run's own worst score stands in for what it did not find.
    dense = dict(zip("abcd", standardise(np.float32([0.9, 0.5, 0.1, 0.1])), strict=True))
    words = dict(zip("abcd", standardise([10.0, 10.0, 30.0, 10.0]), strict=True))
    fused = {key: 0.3 * dense[key] + 0.7 * words[key] for key in "abcd"}
    found = fuse_runs([DENSE, WORDS], (0.3, 0.7), 10)["q"]
    assert [hit.passage_id for hit in found] == ["c", "a", "b", "d"]
    assert [hit.score for hit in found] == pytest.approx([fused[hit.passage_id] for hit in found], abs=1e-6)


def test_fused_ties_are_ordered_by_id_and_cut_at_k() -> None:
    tied = Run.from_mapping({"q": [("b", 1.0), ("c", 1.0), ("a", 1.0)]})
    assert [hit.passage_id for hit in fuse_runs([tied, tied], (0.5, 0.5), 2)["q"]] == ["a", "b"]


def test_a_question_of_one_run_alone_is_ranked_by_that_run() -> None:
    fused = fuse_runs([DENSE, WORDS], (0.5, 0.5), 10)
    assert [hit.passage_id for hit in fused["only dense"]] == ["z", "y"]
    assert [hit.passage_id for hit in fused["only words"]] == ["x"]


def test_tuning_finds_the_system_that_is_right() -> None:
    right, wrong = np.array([-1.0, 0.0, 1.0]), np.array([1.0, 0.0, -1.0])
    relevant = np.array([False, False, True])
    weights = tune_weights([[right, wrong]], [relevant])
    assert weights[0] > weights[1]
    assert tune_weights([[wrong, right]], [relevant]) == weights[::-1]


def test_of_equally_good_weights_the_most_even_are_taken() -> None:
    right = np.array([1.0, 0.0])
    assert tune_weights([[right, right]], [np.array([True, False])]) == (0.5, 0.5)


def test_tuning_uses_two_systems_where_only_both_together_are_right() -> None:
    # Each alone puts another passage first; the sum puts the relevant one first.
    first, second = np.array([2.0, 3.0, -3.0]), np.array([2.0, -3.0, 3.0])
    weights = tune_weights([[first, second]], [np.array([True, False, False])])
    assert min(weights) > 0


def test_tuning_runs_counts_unanswered_questions_as_wrong() -> None:
    qrels = {"q": {"a": 1}, "only words": {"x": 1}, "nobody": {"a": 1}}
    weights, mean = tune_run_weights([DENSE, WORDS], qrels)
    fused = fuse_runs([DENSE, WORDS], weights, 10)
    assert fused["q"][0].passage_id == "a"
    assert 0 < mean < 1


def test_a_fusion_is_judged_on_queries_that_did_not_choose_its_weights() -> None:
    right, wrong = np.array([-1.0, 1.0]), np.array([1.0, -1.0])
    truth = [np.array([False, True])] * 2
    # The first system is right on the first query alone, the second on the second: each half chooses the wrong one.
    values, _ = cross_fit([[right, wrong], [wrong, right]], truth)
    assert values.tolist() == [0.5, 0.5]


# --- ranked questions -------------------------------------------------------------------------------------------------


class Parts:
    """The toy data, encoded by the tiny model, with its words indexed."""

    def __init__(self, folder: Path, toy: Path, model: Path) -> None:
        self.data: Collection = open_collection(toy)
        self.encoder = DualEncoder.load(ModelConfig(start=str(model), device="cpu"))
        self.store = encode_corpus(self.data, self.encoder, EncodeConfig(shard_size=50), folder / "vectors")
        self.index = index_words(self.data, LexicalConfig(), folder / "bm25")
        self.queries = [self.data.query(query_id) for query_id in self.data.qrels("test")]

    def searcher(self) -> Searcher:
        return Searcher(
            self.store, self.encoder, words=self.index, weights=(0.2, 0.8), config=QueryConfig(mode="dense")
        )


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory, toy: Path, tiny_model: Path) -> Parts:
    """Return what a search needs."""
    return Parts(tmp_path_factory.mktemp("parts"), toy, tiny_model)


def collect(blocks: object) -> dict[str, list[tuple[str, float]]]:
    return {query: list(hits) for ids, ranked in blocks for query, hits in zip(ids, ranked, strict=True)}  # type: ignore[attr-defined]


def test_dense_ranking_is_that_of_the_inner_products(parts: Parts) -> None:
    config = SearchConfig(k=7, query_block=4, passage_block=16)
    found = collect(rank_dense(parts.queries, parts.encoder, parts.store, config))
    vectors = parts.store.take(np.arange(parts.store.count)).astype(np.float64)
    assert list(found) == [query.query_id for query in parts.queries]
    for query in parts.queries:
        scores = vectors @ parts.encoder.encode_queries([query.text])[0]
        hits = found[query.query_id]
        assert [score for _, score in hits] == pytest.approx(sorted(scores, reverse=True)[:7], abs=1e-5)
        rows = [parts.data.passages.row_of(passage_id) for passage_id, _ in hits]
        assert [score for _, score in hits] == pytest.approx(scores[rows].tolist(), abs=1e-5)


def test_a_dense_ranking_deeper_than_the_corpus_holds_each_passage_once(parts: Parts) -> None:
    found = collect(rank_dense(parts.queries[:1], parts.encoder, parts.store, SearchConfig(k=1000)))
    (hits,) = found.values()
    everything = parts.data.passages.ids_of(np.arange(120))
    assert sorted(passage_id for passage_id, _ in hits) == sorted(everything)


def test_bm25_finds_the_passages_of_the_toy_data(parts: Parts) -> None:
    found = collect(rank_words(parts.queries, parts.index, SearchConfig(k=10)))
    right = [found[query][0][0] in judged for query, judged in parts.data.qrels("test").items()]
    assert sum(right) > 0.8 * len(right)


def test_a_published_search_reads_the_same_in_both_forms(parts: Parts, tmp_path: Path) -> None:
    config = SearchConfig(k=5)
    run = write_search(
        rank_words(parts.queries, parts.index, config), config, tmp_path / "runs" / "bm25",
        total=len(parts.queries), inputs={"index": parts.index.fingerprint}, options={"system": "bm25"},
    )  # fmt: skip
    manifest = verify_artefact(tmp_path / "runs" / "bm25")
    trec = read_run(tmp_path / "runs" / "bm25" / "run.trec")
    assert {query: trec[query] for query in trec} == {query: run[query] for query in run}
    assert manifest.facts == {"queries": len(parts.queries), "hits": run.count_hits()}
    assert manifest.options["system"] == "bm25"


@pytest.mark.parametrize("mode", ["dense", "bm25", "hybrid"])
def test_a_searcher_returns_the_k_best_with_their_passages(parts: Parts, mode: str) -> None:
    hits = parts.searcher().search("which river runs through Ashford", k=3, mode=mode)
    assert len(hits) == 3
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert all(hit.passage == parts.data.passage(hit.passage_id) for hit in hits)
    if mode != "dense":
        assert hits[0].passage_id == "ashford-river"


@pytest.mark.parametrize(
    ("text", "k", "mode", "message"),
    [
        (" ", 10, "auto", "question is empty"),
        ("x", 0, "auto", "Option k is 0; it must be at least 1"),
        ("x", 1, "fuzzy", "Option mode is 'fuzzy'; it must be one of auto, dense, bm25, hybrid"),
    ],
)
def test_a_searcher_refuses_what_cannot_be(parts: Parts, text: str, k: int, mode: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parts.searcher().search(text, k, mode=mode)


def test_an_unfinished_work_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match=r"no vectors, and no finished work folder.*pairdr run"):
        Searcher.open(tmp_path)


def test_queries_are_ranked_in_their_order_whatever_the_block(parts: Parts) -> None:
    queries = [Query(f"q{number}", "market") for number in range(5)]
    for block in (1, 2, 5, 9):
        found = collect(rank_words(queries, parts.index, SearchConfig(query_block=block)))
        assert list(found) == [query.query_id for query in queries]
