"""Mining: known positives and their copies are never negatives, and every candidate is accounted for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from pairdr import mine as module
from pairdr.artefact import read_manifest
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, EncodeConfig, MineConfig, ModelConfig
from pairdr.encode import encode_corpus
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, DataError
from pairdr.files import hash_file
from pairdr.formats import write_trec_run
from pairdr.mine import (
    choose_negatives,
    jaccard_grams,
    merge_hits,
    mine_candidates,
    open_candidates,
    read_candidates,
)
from pairdr.records import Run, Scored, positives_of

if TYPE_CHECKING:
    from conftest import Parts

ANSWER = "The quick brown fox jumps over the lazy dog"
LONG = [f"word{number}" for number in range(40)]


@pytest.fixture
def make(tmp_path: Path, write_beir: Callable[..., Path]) -> Callable[..., Collection]:
    """Return `make({id: text}, {id: relevance})`: one training query "q" with these labels over these passages."""

    def make_collection(corpus: dict[str, Any], judged: dict[str, int]) -> Collection:
        queries = {"q": "which fox", "d": "which dog"}
        qrels = {"train": {"q": judged}, "dev": {"d": dict.fromkeys(judged, 1)}}
        return open_collection(write_beir(tmp_path / "data", corpus, queries, qrels))

    return make_collection


@pytest.fixture
def plain(make: Callable[..., Collection]) -> Collection:
    """Return a collection of one positive, "p", and 30 passages "n0" to "n29" that have nothing to do with it."""
    return make({"p": ANSWER} | {f"n{number}": f"Passage {number} of another kind" for number in range(30)}, {"p": 1})


def choose(collection: Collection, hits: Iterable[tuple[str, float]], **options: Any) -> tuple[list[str], Counter[str]]:
    """Choose negatives for "q" among hits; without options no margin applies."""
    counts: Counter[str] = Counter()
    config = MineConfig(**{"relative_margin": None} | options)
    run = Run.from_mapping({"q": [Scored(*hit) for hit in hits]})
    return [hit.passage_id for hit in choose_negatives(collection, run, "q", config, counts)], counts


def falling(*ids: str) -> list[tuple[str, float]]:
    """Return hits with falling scores from 0 down."""
    return [(passage_id, -float(rank)) for rank, passage_id in enumerate(ids)]


# --- known positives and copies ---------------------------------------------------------------------------------------


def test_a_known_positive_is_never_a_negative(make: Callable[..., Collection]) -> None:
    data = make({"p": ANSWER, "r": "Another answer", "n": "Nothing", "zero": "Judged"}, {"p": 1, "r": 2, "zero": 0})
    chosen, counts = choose(data, falling("r", "n", "p", "zero"))
    assert chosen == ["n", "zero"]
    assert counts["known positive"] == 2


@pytest.mark.parametrize(
    "other",
    [
        ANSWER.upper(),
        "The quick, brown fox -- jumps over (the lazy) dog!",
        "Ｔｈｅ quick brown fox jumps over the lazy dog",
        ("The quick brown", "fox jumps over the lazy dog"),
    ],
    ids=["case", "punctuation", "NFKC", "title"],
)
def test_the_same_text_in_other_dress_is_never_a_negative(make: Callable[..., Collection], other: Any) -> None:
    data = make({"p": ANSWER, "copy": other, "n": "The slow fox"}, {"p": 1})
    chosen, counts = choose(data, falling("copy", "n"), near_copy=1.0)
    assert chosen == ["n"]
    assert counts["near copy of a positive"] == 1


@pytest.mark.parametrize(("words", "is_copy"), [(24, True), (22, True), (21, False)])
def test_a_jaccard_of_nine_tenths_makes_a_near_copy(make: Callable[..., Collection], words: int, is_copy: bool) -> None:
    # n five-word grams each, all but the last shared: (n - 1) / (n + 1), which is 0.9 at n = 19, that is 23 words.
    text = LONG[: words + 1]
    data = make({"p": " ".join(text), "copy": " ".join([*text[:-1], "other"])}, {"p": 1})
    assert choose(data, falling("copy"))[0] == ([] if is_copy else ["copy"])


def test_the_level_of_a_near_copy_is_an_option(make: Callable[..., Collection]) -> None:
    data = make({"p": " ".join(LONG), "copy": " ".join([*LONG[:20], "x", *LONG[20:]])}, {"p": 1})
    level = jaccard_grams(" ".join(LONG), " ".join([*LONG[:20], "x", *LONG[20:]]))
    assert choose(data, falling("copy"), near_copy=level)[0] == []
    assert choose(data, falling("copy"), near_copy=level + 0.01)[0] == ["copy"]


def test_a_copy_of_any_positive_counts(make: Callable[..., Collection]) -> None:
    data = make({"p": ANSWER, "r": "Another answer", "copy": "another ANSWER"}, {"p": 1, "r": 1})
    assert choose(data, falling("copy"))[0] == []


def test_jaccard_compares_sets_of_five_words() -> None:
    assert jaccard_grams("a b c d e f", "a b c d e f") == 1.0
    assert jaccard_grams("a b c d e f", "a b c d e g") == pytest.approx(1 / 3)
    assert jaccard_grams("a b c", "a b d") == 0.0
    assert jaccard_grams("", "") == 1.0
    assert jaccard_grams("", "a") == 0.0


# --- margins ----------------------------------------------------------------------------------------------------------


def test_the_relative_margin_is_a_share_of_the_positives_score(plain: Collection) -> None:
    hits = [("n0", 9.0), ("p", 8.0), ("n1", 7.0), ("n2", 6.0), ("n3", 5.9)]
    chosen, counts = choose(plain, hits, relative_margin=0.25)
    assert chosen == ["n2", "n3"]
    assert counts["too near the positive's score"] == 2


def test_the_relative_margin_lies_below_a_negative_score_too(plain: Collection) -> None:
    hits = [("p", -8.0), ("n1", -9.0), ("n2", -10.0), ("n3", -11.0)]
    assert choose(plain, hits, relative_margin=0.25)[0] == ["n2", "n3"]


def test_the_absolute_margin_is_a_distance(plain: Collection) -> None:
    hits = [("p", 8.0), ("n1", 6.5), ("n2", 6.0), ("n3", -1.0)]
    assert choose(plain, hits, absolute_margin=2.0)[0] == ["n2", "n3"]


def test_the_stricter_of_two_margins_decides(plain: Collection) -> None:
    hits = [("p", 8.0), ("n1", 7.0), ("n2", 6.0), ("n3", 4.0)]
    assert choose(plain, hits, absolute_margin=1.0, relative_margin=0.5)[0] == ["n3"]
    assert choose(plain, hits, absolute_margin=4.0, relative_margin=0.1)[0] == ["n3"]


def test_no_negative_is_above_the_maximum_score(plain: Collection) -> None:
    assert choose(plain, [("n1", 7.0), ("n2", 6.0), ("p", 5.0), ("n3", 4.0)], max_score=6.0)[0] == ["n2", "n3"]


def test_margins_compare_with_the_best_scored_positive(make: Callable[..., Collection]) -> None:
    data = make({"p": ANSWER, "r": "Another answer", "n": "Nothing"}, {"p": 1, "r": 1})
    assert choose(data, [("r", 8.0), ("n", 6.0), ("p", 1.0)], absolute_margin=2.0)[0] == ["n"]


def test_margins_do_not_apply_where_no_positive_was_found(plain: Collection) -> None:
    assert choose(plain, [("n1", 7.0), ("n2", 6.0)], absolute_margin=2.0, relative_margin=0.5)[0] == ["n1", "n2"]


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_top_sampling_keeps_the_best(plain: Collection) -> None:
    chosen, counts = choose(plain, falling("n3", "n1", "n2"), keep=2)
    assert chosen == ["n3", "n1"]
    assert counts["beyond the number kept"] == 1


def sample(collection: Collection, seed: int, number: int = 0) -> list[str]:
    config = MineConfig(relative_margin=None, sampling="random", keep=8, mine_seed=seed)
    run = Run.from_mapping({"q": falling(*(f"n{place}" for place in range(30)))})
    return [hit.passage_id for hit in choose_negatives(collection, run, "q", config, Counter(), number)]


def test_random_sampling_is_a_function_of_the_seed(plain: Collection) -> None:
    assert sample(plain, 1) == sample(plain, 1)
    assert sample(plain, 1) != sample(plain, 2)
    assert len(set(sample(plain, 1))) == 8


def test_random_sampling_differs_from_query_to_query(plain: Collection) -> None:
    assert sample(plain, 1, number=0) != sample(plain, 1, number=1)


def test_random_samples_stay_in_rank_order(plain: Collection) -> None:
    places = [int(passage_id[1:]) for passage_id in sample(plain, 1)]
    assert places == sorted(places)
    assert places[-1] >= 8


def test_every_candidate_is_counted_once(make: Callable[..., Collection]) -> None:
    corpus = {"p": ANSWER, "copy": ANSWER.upper()} | {f"n{number}": f"Passage {number}" for number in range(6)}
    data = make(corpus, {"p": 1})
    hits = [("n0", 9.0), ("p", 8.0), ("copy", 5.0), ("n1", 5.0), ("n2", 4.0), ("n3", 3.0), ("n4", 2.0)]
    _, counts = choose(data, hits, absolute_margin=2.0, keep=3)
    assert counts == {
        "too near the positive's score": 1,
        "known positive": 1,
        "near copy of a positive": 1,
        "kept": 3,
        "beyond the number kept": 1,
    }


def test_a_query_without_positives_is_refused(make: Callable[..., Collection]) -> None:
    with pytest.raises(DataError, match=r"Query 'q' has no relevant passage\. Remove"):
        choose(make({"p": ANSWER, "n": "Nothing"}, {"p": 0}), falling("n"))


# --- the stage --------------------------------------------------------------------------------------------------------


def mine(parts: Parts, output: Path, **options: Any) -> module.Candidates:
    return mine_candidates(parts.collection, parts.encoder, parts.store, parts.index, MineConfig(**options), output)


def test_every_train_dev_and_pool_query_gets_candidates_to_the_depth(toy_parts: Parts, tmp_path: Path) -> None:
    found = mine(toy_parts, tmp_path / "candidates", depth=7)
    data = toy_parts.collection
    assert set(found.student) == {*data.qrels("train"), *data.qrels("dev"), *data.pool}
    assert set(found.bm25) == set(found.student)
    assert {len(found.student[query_id]) for query_id in found.student} == {7}
    assert max(len(found.bm25[query_id]) for query_id in found.bm25) == 7


def test_test_queries_are_never_mined_for(toy_parts: Parts) -> None:
    asked = set(toy_parts.candidates.student) | set(toy_parts.candidates.bm25) | set(toy_parts.candidates.negatives)
    assert not asked & set(toy_parts.collection.qrels("test"))


def test_candidates_are_the_students_and_bm25s_in_turns_with_the_students_scores(
    toy_parts: Parts, tmp_path: Path
) -> None:
    found = mine(toy_parts, tmp_path / "candidates", depth=9)
    for query_id in found.merged:
        ids = [hit.passage_id for hit in found.merged[query_id]]
        assert ids == merge_hits(found.student[query_id], found.bm25[query_id], 9)
        scores = {hit.passage_id: hit.score for hit in found.student[query_id]}
        for hit in found.merged[query_id]:
            if hit.passage_id in scores:
                assert hit.score == pytest.approx(scores[hit.passage_id], abs=1e-6)


def test_two_rankings_are_merged_in_turns_each_passage_once() -> None:
    first, second = ([Scored(passage_id, 0.0) for passage_id in ids] for ids in ("abcd", "cbx"))
    assert merge_hits(first, second, 9) == ["a", "c", "b", "x", "d"]
    assert merge_hits(first, second, 3) == ["a", "c", "b"]
    assert merge_hits(first, [], 9) == ["a", "b", "c", "d"]


def test_negatives_are_candidates_and_never_known_positives(toy_parts: Parts) -> None:
    train, found = toy_parts.collection.qrels("train"), toy_parts.candidates
    assert list(found.negatives) == list(train)
    assert found.negatives.count_hits() > 0
    for query_id in found.negatives:
        assert set(found.negatives[query_id]) <= set(found.merged[query_id])
        assert not {hit.passage_id for hit in found.negatives[query_id]} & set(positives_of(train, query_id))


def test_the_manifest_accounts_for_every_candidate_of_a_labelled_query(toy_parts: Parts, tmp_path: Path) -> None:
    found = mine(toy_parts, tmp_path / "candidates", depth=60, keep=5, relative_margin=None)
    facts = read_manifest(tmp_path / "candidates", "candidates").facts
    queries = len(toy_parts.collection.qrels("train"))
    assert sum(facts["negatives"].values()) == 60 * queries
    assert facts["negatives"]["kept"] == found.negatives.count_hits() == 5 * queries
    assert (facts["labelled"], facts["pool"], facts["depth"]) == (queries, len(toy_parts.collection.pool), 60)


def test_held_out_passages_are_candidates_of_dev_queries_only(toy_parts: Parts, toy: Path, tmp_path: Path) -> None:
    held_out = [f"ashford-{name}" for name in ("river", "market", "bridge")]
    (tmp_path / "held-out.txt").write_text("\n".join(held_out) + "\n", encoding="utf-8")
    data = open_collection(toy, DataConfig(held_out=tmp_path / "held-out.txt"))
    found = mine(toy_parts._replace(collection=data), tmp_path / "candidates", depth=120)
    for query_id in found.merged:
        ids = {hit.passage_id for hit in found.merged[query_id]}
        assert (ids >= set(held_out)) if query_id in data.qrels("dev") else not ids & set(held_out)


def test_a_relative_margin_does_not_apply_to_unbounded_scores(
    toy_parts: Parts, bare_model: Path, tmp_path: Path
) -> None:
    encoder = DualEncoder.load(ModelConfig(start=str(bare_model)))
    assert encoder.contract.similarity == "dot"
    store = encode_corpus(toy_parts.collection, encoder, EncodeConfig(), tmp_path / "vectors")
    parts = toy_parts._replace(encoder=encoder, store=store)
    strict, loose = (mine(parts, tmp_path / name, relative_margin=margin) for name, margin in (("a", 1.0), ("b", None)))
    assert strict.negatives.count_hits() == loose.negatives.count_hits() > 0


def test_the_same_inputs_give_the_same_candidates(toy_parts: Parts, tmp_path: Path) -> None:
    options = {"sampling": "random", "keep": 5, "relative_margin": None}
    first, second = (mine(toy_parts, tmp_path / name, mine_seed=1, **options) for name in ("a", "b"))
    other = mine(toy_parts, tmp_path / "c", mine_seed=2, **options)
    assert first.fingerprint == second.fingerprint
    assert other.fingerprint != first.fingerprint


def test_what_was_written_is_read_again(toy_parts: Parts, tmp_path: Path) -> None:
    found = mine(toy_parts, tmp_path / "candidates", depth=5)
    again = read_candidates(tmp_path / "candidates")
    assert again.fingerprint == found.fingerprint
    assert [again.student[q] for q in again.student] == [found.student[q] for q in found.student]


def test_queries_are_read_only_as_they_are_searched_for(
    toy_parts: Parts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[str] = []
    lookup = Collection.query
    monkeypatch.setattr(Collection, "query", lambda self, query_id: read.append(query_id) or lookup(self, query_id))

    def watch(name: str) -> None:
        rank = getattr(module, name)

        def ranked(queries: Iterable[Any], *rest: Any) -> Any:
            read.clear()
            stream = iter(queries)
            first = next(stream)
            assert len(read) == 1
            seen.append(name)
            yield from rank([first, *stream], *rest)

        monkeypatch.setattr(module, name, ranked)

    seen: list[str] = []
    watch("rank_dense")
    watch("rank_words")
    mine(toy_parts, tmp_path / "candidates", depth=3)
    assert seen == ["rank_dense", "rank_words"]


def test_vectors_of_another_model_are_refused(toy_parts: Parts, tmp_path: Path) -> None:
    other = copy(toy_parts.encoder)
    other.contract = replace(other.contract, query_prefix="ask: ")
    with pytest.raises(ArtefactError, match="made by encoder"):
        mine(toy_parts._replace(encoder=other), tmp_path / "candidates")
    assert not (tmp_path / "candidates").exists()


# --- a run of another tool --------------------------------------------------------------------------------------------


def test_a_trec_run_of_another_tool_can_stand_in(toy_parts: Parts, tmp_path: Path) -> None:
    data = toy_parts.collection
    train, dev = data.qrels("train"), data.qrels("dev")
    query_id, other_id = next(iter(train)), next(iter(dev))
    positive = positives_of(train, query_id)[0]
    hits = [Scored("ashford-river", 3.0), Scored(positive, 2.0), Scored("ryde-school", 1.0)]
    path = tmp_path / "lucene.trec"
    write_trec_run(path, Run.from_mapping({query_id: hits, other_id: hits}), "lucene")

    found = open_candidates(path, data)

    assert found.student[query_id] == found.merged[query_id] == hits
    assert list(found.negatives) == [query_id]
    assert [hit.passage_id for hit in found.negatives[query_id]] == ["ashford-river", "ryde-school"]
    assert found.fingerprint == hash_file(path)
    found.require_collection(data)


def test_held_out_passages_of_such_a_run_are_dropped_for_training_queries(toy: Path, tmp_path: Path) -> None:
    (tmp_path / "held-out.txt").write_text("ashford-river\n", encoding="utf-8")
    data = open_collection(toy, DataConfig(held_out=tmp_path / "held-out.txt"))
    query_id, pool_id, other_id = next(iter(data.qrels("train"))), data.pool[0], next(iter(data.qrels("dev")))
    hits = [Scored("ashford-river", 3.0), Scored("ryde-school", 1.0)]
    write_trec_run(tmp_path / "x.trec", Run.from_mapping(dict.fromkeys((query_id, pool_id, other_id), hits)), "x")
    found = open_candidates(tmp_path / "x.trec", data)
    assert found.merged[query_id] == found.student[pool_id] == found.negatives[query_id] == hits[1:]
    assert found.merged[other_id] == hits


def test_a_near_copy_of_a_positive_in_such_a_run_is_no_negative(
    make: Callable[..., Collection], tmp_path: Path
) -> None:
    data = make({"p": ANSWER, "copy": ANSWER.upper(), "n": "Nothing"}, {"p": 1})
    write_trec_run(tmp_path / "x.trec", Run.from_mapping({"q": [Scored(p, 1.0) for p in ("copy", "n", "p")]}), "x")
    found = open_candidates(tmp_path / "x.trec", data)
    assert [hit.passage_id for hit in found.negatives["q"]] == ["n"]


def test_candidates_of_other_splits_are_refused(toy_parts: Parts, toy: Path) -> None:
    toy_parts.candidates.require_collection(toy_parts.collection)
    with pytest.raises(ArtefactError, match=r"These candidates were mined from data \w{12}, this is \w{12}\."):
        toy_parts.candidates.require_collection(open_collection(toy, DataConfig(hide_labels=0.5)))


def test_a_folder_of_candidates_is_opened_as_one(toy_parts: Parts, tmp_path: Path) -> None:
    found = mine(toy_parts, tmp_path / "candidates", depth=4)
    assert open_candidates(tmp_path / "candidates", toy_parts.collection).fingerprint == found.fingerprint
