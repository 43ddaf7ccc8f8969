"""The page of a work folder: it stands alone, shows text as text, and says the numbers that the folder has."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import fields, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from manifests import rewrite_manifest

from pairdr.artefact import read_manifest, verify_artefact
from pairdr.charts import Axis, Histogram, Line, Mark, draw_histogram, draw_lines, format_number, list_ticks
from pairdr.cli import main
from pairdr.collection import Collection, open_collection
from pairdr.config import DataConfig, EvaluateConfig, MineConfig, ModelConfig, RunConfig, TeachConfig, TrainConfig
from pairdr.encoder import DualEncoder
from pairdr.errors import ArtefactError, DataError, UsageError
from pairdr.files import describe_file
from pairdr.formats import read_run
from pairdr.geometry import SIMILARITIES, describe_relation, draw_triples, say_relation
from pairdr.label import count_scores
from pairdr.lengths import count_lengths
from pairdr.mine import read_candidates
from pairdr.page_style import POLICY, write_text
from pairdr.pipeline import run_pipeline
from pairdr.records import Run, positives_of
from pairdr.report import Absent, Report, gather_report, read_stages
from pairdr.report_page import format_page, write_report
from pairdr.report_sections import format_seconds
from pairdr.store_config import ReportConfig
from pairdr.table import read_table
from pairdr.vectors import VectorStore

pytestmark = pytest.mark.slow

HOSTILE = """<script>alert('x')</script> "quoted" & <img src=http://evil.example/x onerror=alert(1)> </p></td>"""
TITLE = " <b onclick='x'>"
SECTIONS = ("results", "changes", "training", "teacher", "geometry", "data", "cost", "reproduce")


class Page(HTMLParser):
    """A page taken apart: its tags with their attributes, and its text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, str] = {"head": ""}
        self._section = "head"
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "section":
            self._section = str(dict(attrs)["id"])
            self.texts[self._section] = ""

    def handle_data(self, data: str) -> None:
        self.texts[self._section] += data + " "

    def count(self, tag: str) -> int:
        return sum(name == tag for name, _ in self.tags)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory, toy: Path) -> Path:
    """Return the toy data with markup in every text."""
    folder = Path(shutil.copytree(toy, tmp_path_factory.mktemp("report") / "data"))
    for name in ("corpus.jsonl", "queries.jsonl"):
        path = folder / name
        rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        marked = [row | {"text": f"{row['text']} {HOSTILE}", "title": f"{row.get('title')}{TITLE}"} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in marked), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def config(tiny_model: Path) -> RunConfig:
    return RunConfig(
        data=DataConfig(hide_labels=0.25),
        model=ModelConfig(start=str(tiny_model)),
        mine=MineConfig(depth=40, relative_margin=None),
        teach=TeachConfig(rerank_depth=40),
        train=TrainConfig(
            max_steps=30,
            learning_rate=2e-3,
            per_device_train_batch_size=16,
            eval_passages=20,
            eval_queries=5,
            eval_steps=15,
        ),
        evaluate=EvaluateConfig(resamples=200),
        arms=("labelled_only", "pair"),
    )


@pytest.fixture(scope="module")
def work(data: Path, config: RunConfig) -> Path:
    """Return a finished work folder; tests that change it take a copy."""
    return run_pipeline(data, data.parent / "work", config).work


@pytest.fixture(scope="module")
def collection(data: Path, config: RunConfig) -> Collection:
    return open_collection(data, config.data)


@pytest.fixture(scope="module")
def report(work: Path) -> Report:
    return gather_report(work, ReportConfig())


@pytest.fixture(scope="module")
def text(report: Report) -> str:
    return format_page(report)


@pytest.fixture
def copy(work: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(work, tmp_path / "copy"))


def read_page(work: Path, **options: Any) -> Page:
    return Page(write_report(work, config=ReportConfig(**options)).read_text(encoding="utf-8"))


# --- the page as a whole ----------------------------------------------------------------------------------------------


def test_nothing_is_run_and_nothing_is_fetched(text: str) -> None:
    page = Page(text)
    names = {tag for tag, _ in page.tags}
    assert not names & {"script", "link", "img", "iframe", "object", "embed", "form", "base", "audio", "video", "use"}
    policies = [attrs["content"] for tag, attrs in page.tags if "http-equiv" in attrs]
    assert policies == [POLICY]
    assert POLICY.startswith("default-src 'none'; style-src 'unsafe-inline';")
    for _, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on")
            assert name not in ("src", "srcset", "action", "data", "poster", "xlink:href", "xmlns")
            assert name != "href" or str(value).startswith("#")
            assert name != "style" or re.fullmatch(r"width:\d+\.\d\drem", str(value))
    (style,) = re.findall("<style>(.*?)</style>", text, re.DOTALL)
    assert "url(" not in style
    assert "@import" not in style


def test_every_section_is_there_with_a_sentence_that_says_how_to_read_it(text: str) -> None:
    page = Page(text)
    assert tuple(page.texts) == ("head", *SECTIONS)
    assert [attrs["href"] for tag, attrs in page.tags if tag == "a"] == [f"#{name}" for name in SECTIONS]
    assert sum(attrs.get("class") == "how" for _, attrs in page.tags) == len(SECTIONS)
    assert [attrs for _, attrs in page.tags if attrs.get("class") == "absent"] == []


def test_the_page_is_for_phones_too(text: str) -> None:
    assert '<meta name="viewport" content="width=device-width, initial-scale=1">' in text
    assert "prefers-color-scheme: dark" in text
    inside = re.sub(r'<div class="scroll">.*?</table></div>', "", text, flags=re.DOTALL)
    assert "<table" not in inside  # a wide table scrolls by itself


def test_tags_are_closed_in_their_order(text: str) -> None:
    stack = []
    for name, closing in re.findall(r"<(/?[a-z][a-z0-9]*)[^>]*?(/?)>", text):
        if name.startswith("/"):
            assert stack.pop() == name[1:]
        elif not closing and name not in ("meta", "br"):
            stack.append(name)
    assert stack == []


def test_markup_in_the_data_is_text(text: str, work: Path) -> None:
    assert "<script" not in text
    assert "<img" not in text
    assert "<b" not in text.split("<body>")[1]
    shown = Page(text).texts["changes"]
    assert shown.count(HOSTILE) > 10
    assert shown.count(TITLE) > 5


def test_the_same_folder_gives_the_same_page_and_stays_as_it_was(work: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in work.rglob("*.json")}
    place = write_report(work)
    assert place == work / "report.html"
    again = write_report(work, tmp_path / "new" / "page.html")
    assert again.read_bytes() == place.read_bytes()
    assert {path: path.read_bytes() for path in work.rglob("*.json")} == before
    for manifest in work.rglob("manifest.json"):
        verify_artefact(manifest.parent)


def test_after_the_page_a_run_has_nothing_to_do(work: Path, data: Path, config: RunConfig) -> None:
    write_report(work)
    assert run_pipeline(data, work, config).steps_run == ()


@given(st.text())
def test_any_text_is_shown_literally(shown: str) -> None:
    page = Page(f'<p title="{write_text(shown)}">{write_text(shown)}</p>')
    expected = re.sub("[\ud800-\udfff]", "?", re.sub("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f]", "\ufffd", shown))
    assert [(tag, attributes["title"]) for tag, attributes in page.tags] == [("p", expected)]
    assert page.texts["head"] == (f"{expected} " if expected else "")


# --- what it says -----------------------------------------------------------------------------------------------------


def test_the_numbers_are_those_of_the_table(text: str, work: Path) -> None:
    table, shown = read_table(work / "report"), Page(text).texts["results"]
    assert [row.system for row in table.rows] == ["bm25", "start", "labelled_only", "pair", "pair_bm25"]
    numbers = re.findall(r"(?<![\d.])\d\.\d{4}(?!\d)", shown.split("24 test questions")[0])
    assert numbers == [f"{value:.4f}" for row in table.rows for value in row.means.values()]
    assert all(note in shown for note in table.notes)
    head = Page(text).texts["head"]
    assert f"PAIR has RR@10 {next(r for r in table.rows if r.system == 'pair').means['RR@10']:.4f} on 24 test" in head


@pytest.mark.parametrize("against", ["start", "bm25", "labelled_only"])
def test_the_queries_that_change_most_are_shown_with_their_texts(
    work: Path, collection: Collection, against: Any
) -> None:
    options = ReportConfig(against=against, shown_queries=3)
    changes = gather_report(work, options).changes
    assert not isinstance(changes, Absent)
    values = {name: json.loads((work / f"report/{name}.json").read_text())["RR@10"] for name in (against, "pair")}
    gains = {query_id: values["pair"][query_id] - values[against][query_id] for query_id in values["pair"]}
    assert (changes.better, changes.equal, changes.worse) == tuple(
        sum(np.sign(gain) == sign for gain in gains.values()) for sign in (1, 0, -1)
    )
    assert sum(changes.histogram.counts["queries"]) == changes.better + changes.worse
    assert [change.after - change.before for change in changes.best] == sorted(
        (gain for gain in gains.values() if gain > 0), reverse=True
    )[:3]
    assert [change.after - change.before for change in changes.worst] == sorted(
        gain for gain in gains.values() if gain < 0
    )[:3]
    runs = [read_run(work / f"runs/test/{name}/run.arrow") for name in (against, "pair")]
    for change in (*changes.best, *changes.worst):
        texts = change.texts
        assert texts is not None
        (wanted,) = positives_of(collection.qrels("test"), change.query_id)
        assert texts.question == collection.query(change.query_id).text
        assert (texts.wanted.passage_id, texts.wanted.text) == (wanted, collection.passage(wanted).text)
        tops = [run[change.query_id][0].passage_id for run in runs]
        assert [found.passage_id for found in (texts.before, texts.after) if found] == tops
        ranks = [[hit.passage_id for hit in run[change.query_id]] for run in runs]
        assert texts.ranks == tuple(ids.index(wanted) + 1 if wanted in ids else None for ids in ranks)


def test_no_query_need_be_shown_and_long_texts_are_cut(work: Path) -> None:
    page = read_page(work, shown_queries=0, against="bm25")
    assert page.count("article") == 0
    assert "There are none." in page.texts["changes"]
    changes = gather_report(work, ReportConfig(shown_characters=40, against="bm25")).changes
    assert not isinstance(changes, Absent)
    texts = [change.texts for change in changes.worst if change.texts]
    assert texts
    assert all(len(shown.question) <= 40 and shown.question.endswith("…") for shown in texts)
    assert all(len(shown.wanted.text) <= 40 and shown.wanted.text.endswith("…") for shown in texts)


def test_the_stages_are_drawn_one_after_the_other(report: Report, text: str, work: Path) -> None:
    assert not isinstance(report.stages, Absent)
    assert [(stage.name, stage.alpha, len(stage.lines)) for stage in report.stages] == [
        ("pair", 0.1, 5),
        ("query_centric", 0.0, 5),
    ]
    section = text.split('<section id="training">')[1].split("</section>")[0]
    loss, similarities, dev, rate = re.findall("<figure>.*?</figure>", section, re.DOTALL)
    points = [len(line.split()) for line in re.findall('<polyline class="l[01]" points="([^"]*)"', loss)]
    assert points == [8, 4]  # L_Q in both stages, L_P in the first: at steps 10, 15, 20, 30
    assert [name in loss for name in ("L_Q, query-centric", "L_P, passage-centric", "stage 2")] == [True] * 3
    assert all(write_text(name) in similarities for name in SIMILARITIES)
    assert (len(re.findall("<circle", dev)), len(re.findall("<circle", rate))) == (6, 8)  # dev at 0, 15 and 30
    last = read_manifest(work / "models/pair").facts["summary"]
    assert f"{last['query_centric']:.4f}" in Page(text).texts["training"]


def test_the_step_that_was_taken_is_said_and_is_no_point_of_the_curves(copy: Path) -> None:
    place = copy / "models/pair.stage1"
    line = {"step": 15, "stage": "pair", "dev_RR@10": 0.5, "chosen": True}
    with (place / "training.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(line) + "\n")
    size = {"training.jsonl": describe_file(place / "training.jsonl")}
    rewrite_manifest(place, lambda content: content["files"].update(size))
    first, second = read_stages(copy)
    assert (first.taken, [line["step"] for line in first.lines]) == (15, [0, 10, 15, 20, 30])
    assert second.taken == 30
    assert "1:\xa0pair 0.1 30 15 " in read_page(copy).texts["training"]


def test_the_teachers_scores_are_counted_where_they_were_given(report: Report, text: str, work: Path) -> None:
    assert not isinstance(report.teaching, Absent)
    scores = report.teaching.scores
    assert not isinstance(scores, Absent)
    facts = read_manifest(work / "examples").facts
    totals = {name: sum(counts) for name, counts in scores.counts.items()}
    assert totals["right"] + totals["wrong"] == facts["calibration"]["queries"] == 48
    assert totals["pool"] == facts["pool"] == 60
    assert 0 < totals["positives"] <= 48
    ends = np.array(scores.edges[1:])
    assert facts["pseudo"] <= sum(np.array(scores.counts["pool"])[ends > facts["calibration"]["s_pos"]]) < 60
    shown = Page(text).texts["teacher"]
    assert f"{facts['calibration']['s_pos']:.4f}" in shown
    assert f"{facts['hidden']['right']} of {facts['hidden']['checked']}" in shown
    assert facts["teacher"] in shown


@given(
    st.lists(st.tuples(st.floats(-9, 9), st.booleans()), max_size=30),
    st.lists(st.floats(-9, 9), max_size=30),
    st.lists(st.floats(-9, 9), max_size=30),
)
def test_every_score_is_counted_once(tops: list[tuple[float, bool]], positives: list[float], pool: list[float]) -> None:
    found = count_scores(tops, positives, pool)
    right = sum(is_right for _, is_right in tops)
    totals = {name: sum(counts) for name, counts in found.items() if name != "edges"}
    assert totals == {"right": right, "wrong": len(tops) - right, "positives": len(positives), "pool": len(pool)}
    assert json.loads(json.dumps(found)) == found


def test_lengths_are_those_of_the_tokenizer(work: Path, collection: Collection) -> None:
    encoder = DualEncoder.open(work / "models/start", device="cpu")
    tokenizer = encoder.model.tokenizer
    for side, texts, limit in (
        ("passage", [p.joined for block in collection.read_passages() for p in block], 128),
        ("query", [row[0] for block in collection.queries.read_blocks(("text",)) for row in block], 32),
    ):
        wanted = [len(ids) for ids in tokenizer(texts, truncation=False, verbose=False)["input_ids"]]
        found = count_lengths(collection, side, work / "models/start", ReportConfig())
        assert (found.texts, found.limit, found.longest) == (len(texts), limit, max(wanted))
        assert found.median == np.median(wanted)
        assert found.cut == np.mean(np.array(wanted) > limit)
        assert sum(found.histogram.counts["texts"]) == len(texts)
    few = [
        count_lengths(collection, "query", work / "models/start", ReportConfig(report_texts=9, report_seed=s))
        for s in (1, 2)
    ]
    assert [found.texts for found in few] == [9, 9]
    assert few[0] != few[1]


def test_costs_are_those_that_were_recorded(report: Report, text: str, work: Path) -> None:
    state = json.loads((work / "state.json").read_text(encoding="utf-8"))
    assert [step.name for step in report.steps] == list(state)
    assert all(step.memory is not None and step.memory > 2**24 for step in report.steps)
    assert [step.memory for step in report.steps] == sorted(step.memory or 0 for step in report.steps)
    shown = Page(text).texts["cost"]
    assert all(f" {step.name} " in shown for step in report.steps)
    assert f"over {len(state)} steps" in shown
    assert f"{(report.steps[-1].memory or 0) / 2**20:,.0f} MiB" in shown


def test_what_a_step_takes_does_not_decide_whether_it_is_done(copy: Path, data: Path, config: RunConfig) -> None:
    path = copy / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for record in state.values():
        record |= {"seconds": 9e9, "memory": 1, "environment": {"torch": "0.1"}}
    path.write_text(json.dumps(state), encoding="utf-8")
    assert run_pipeline(data, copy, config).steps_run == ()


def test_versions_seeds_hashes_and_options_are_there(report: Report, text: str, work: Path, tiny_model: Path) -> None:
    shown = Page(text).texts["reproduce"]
    import torch

    assert torch.__version__ in shown
    assert all(step.fingerprint in shown for step in report.steps)
    assert read_manifest(work / "models/pair").facts["weights_sha256"] in shown
    assert f'start = "{tiny_model}"' in shown
    assert "hide_labels = 0.25" in shown
    assert all(f"{name}_seed" in shown for name in ("data", "mine", "teach", "test"))
    assert (work / "run.toml").read_text(encoding="utf-8").strip() in text.replace("&quot;", '"')


# --- geometry ---------------------------------------------------------------------------------------------------------


def test_the_geometry_is_that_of_the_models_on_the_same_triples(
    report: Report, work: Path, collection: Collection, text: str
) -> None:
    geometry = report.geometry
    assert not isinstance(geometry, Absent)
    triples = draw_triples(collection, read_candidates(work / "candidates").merged, ReportConfig())
    assert [row.model for row in geometry.models] == ["start", "labelled_only", "pair"]
    assert (geometry.queries, geometry.pairs, geometry.similarity) == (48, 240, "cosine")
    for row in geometry.models:
        encoder = DualEncoder.open(work / "models" / row.model, device="cpu")
        found = []
        for query_id, positive_id, negative_ids in triples:
            query = encoder.encode_queries([collection.query(query_id).text])[0]
            passages = encoder.encode_passages([collection.passage(p) for p in (positive_id, *negative_ids)])
            found += [(query @ passages[0], query @ other, passages[0] @ other) for other in passages[1:]]
        values = np.array(found)
        np.testing.assert_allclose([row.means[name] for name in SIMILARITIES], values.mean(0), atol=1e-5)
        assert row.passage_violations == pytest.approx((values[:, 0] < values[:, 2]).mean(), abs=2.5 / 240)
        assert row.query_violations == pytest.approx((values[:, 0] < values[:, 1]).mean(), abs=2.5 / 240)
        assert all(sum(counts) == 240 for counts in row.counts.values())
        assert f"{row.passage_violations:.1%}" in Page(text).texts["geometry"]


def test_what_is_said_before_training_is_what_the_page_says(
    report: Report, work: Path, collection: Collection, text: str
) -> None:
    assert not isinstance(report.geometry, Absent)
    encoder = DualEncoder.open(work / "models" / "start", device="cpu")
    ranked, store = read_candidates(work / "candidates").merged, VectorStore(work / "vectors" / "start")
    said = describe_relation(collection, ranked, encoder, store)
    assert said == say_relation(report.geometry.models[0].passage_violations, 240)
    assert said in Page(text).texts["geometry"]
    assert "cannot be looked at" in describe_relation(collection, Run.from_mapping({}), encoder, store)


@pytest.mark.parametrize(("share", "promise"), [(0.1, "little is left for"), (0.101, "has work to do")])
def test_the_share_of_failing_triples_says_what_the_loss_has_to_do(share: float, promise: str) -> None:
    said = say_relation(share, 1234)
    assert said.startswith(f"s(q,p+) > s(p+,p-) fails in {share:.1%} of 1,234 dev triples before training: ")
    assert promise in said


def test_a_triple_is_a_label_and_candidates_that_are_none(work: Path, collection: Collection) -> None:
    ranked = read_candidates(work / "candidates").merged
    for query_id, positive_id, negative_ids in draw_triples(collection, ranked, ReportConfig(report_negatives=7)):
        known = positives_of(collection.qrels("dev"), query_id)
        assert positive_id == known[0]
        assert len(negative_ids) == 7
        assert not set(negative_ids) & set(known)
        assert list(negative_ids) == [hit.passage_id for hit in ranked[query_id] if hit.passage_id not in known][:7]


def test_the_sample_of_dev_is_seeded_and_bounded(work: Path, collection: Collection) -> None:
    ranked = read_candidates(work / "candidates").merged

    def draw(seed: int) -> list[str]:
        config = ReportConfig(report_queries=10, report_seed=seed)
        return [triple.query_id for triple in draw_triples(collection, ranked, config)]

    assert len(draw(1)) == 10
    assert draw(1) == draw(1) != draw(2)


# --- what is missing --------------------------------------------------------------------------------------------------


def test_a_run_without_a_teacher_says_so(copy: Path, data: Path, config: RunConfig) -> None:
    teach = replace(config.teach, fusion=False, gate_level=0.0)
    run_pipeline(data, copy, replace(config, teach=teach, arms=("pair",)))
    page = read_page(copy)
    assert "none beat the student" in page.texts["teacher"]
    assert "No pseudo labels: No teacher beat the student." in page.texts["teacher"]
    assert "No scores to draw." in page.texts["teacher"]
    assert read_manifest(copy / "examples").facts["teacher"] is None
    assert "labelled only" not in page.texts["geometry"]  # trained by the run before, and not in this table


def test_a_run_without_a_pool_says_so(toy: Path, config: RunConfig, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(toy, tmp_path / "data"))
    path = folder / "queries.jsonl"
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if '"q-' in line]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = replace(config, data=DataConfig(), arms=("pair",))
    page = read_page(run_pipeline(folder, tmp_path / "work", options).work)
    assert "0: there are no unlabelled questions" in page.texts["teacher"]
    assert "pool: best candidate" not in page.texts["teacher"]


def test_an_interrupted_run_has_a_page_of_what_there_is(copy: Path) -> None:
    for name in ("report", "models/pair", "models/pair.stage1", "examples", "vectors/pair"):
        shutil.rmtree(copy / name)
    (copy / "run.toml").unlink()
    page = read_page(copy)
    assert "This run has not ended." in page.texts["head"]
    for section in ("results", "changes", "training", "teacher", "geometry"):
        assert "Not here. " in page.texts[section], section
    assert "run.toml is missing: no run has ended here." in page.texts["reproduce"]
    assert " bm25 " in page.texts["cost"]
    assert "share of passages cut" in page.texts["data"]


def test_a_run_that_was_interrupted_in_stage_2_shows_stage_1(copy: Path) -> None:
    shutil.rmtree(copy / "models/pair")
    (copy / "models/pair.checkpoints").mkdir()
    shown = read_page(copy).texts["training"]
    assert ("1:\xa0pair" in shown, "2:\xa0query_centric" in shown) == (True, False)


@pytest.mark.parametrize("name", ["models/pair/training.jsonl", "report/pair.json", "check/report.json"])
def test_a_damaged_file_costs_its_part_of_the_page(copy: Path, name: str) -> None:
    path = copy / name
    path.write_text("{" + path.read_text(encoding="utf-8")[1:].replace("}", " "), encoding="utf-8")
    page = read_page(copy)
    absent = [section for section, shown in page.texts.items() if "A file of this part cannot be read." in shown]
    assert absent == [{"models": "training", "report": "changes", "check": "data"}[name.split("/")[0]]]


def test_a_log_without_lines_costs_its_part_of_the_page(copy: Path) -> None:
    for path in copy.glob("models/*/training.jsonl"):
        path.write_text("", encoding="utf-8")
    page = read_page(copy)
    assert HOSTILE not in page.texts["training"]
    assert page.texts["geometry"]


def test_a_folder_of_an_earlier_pairdr_has_a_page(copy: Path, data: Path) -> None:
    path = copy / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    for record in state.values():
        del record["memory"], record["environment"]
    path.write_text(json.dumps(state), encoding="utf-8")
    for name in ("run.toml", "run.json"):
        (copy / name).unlink()
    page = read_page(copy)
    assert "Memory was not recorded" in page.texts["cost"]
    assert "Not recorded." in page.texts["reproduce"]
    assert "Where the data are was not recorded. Name their folder as --data." in page.texts["geometry"]
    assert page.count("article") > 0
    assert HOSTILE not in page.texts["changes"]
    page = Page(write_report(copy, data=data).read_text(encoding="utf-8"))
    assert HOSTILE in page.texts["changes"]


def test_data_that_are_gone_or_others_leave_their_parts_out(copy: Path, data: Path, toy: Path) -> None:
    path = copy / "run.json"
    facts = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps(facts | {"data": str(copy / "nowhere")}), encoding="utf-8")
    assert "There is no such folder." in read_page(copy).texts["geometry"]
    path.write_text(json.dumps(facts | {"data": str(toy)}), encoding="utf-8")
    page = read_page(copy)
    assert "The data are not those of this run any more." in page.texts["geometry"]
    assert "No lengths of passages." in page.texts["data"]
    assert HOSTILE not in page.texts["changes"]
    assert HOSTILE in Page(write_report(copy, data=data).read_text(encoding="utf-8")).texts["changes"]
    with pytest.raises(DataError, match="The data are not those of this run any more"):
        write_report(copy, data=toy)


def test_a_run_in_several_environments_names_them(copy: Path) -> None:
    path = copy / "state.json"
    state = json.loads(path.read_text(encoding="utf-8"))
    state["mine"]["environment"]["torch"] = "0.0.1"
    path.write_text(json.dumps(state), encoding="utf-8")
    shown = read_page(copy).texts["reproduce"]
    assert "Versions and machine of the steps mine" in shown
    assert "0.0.1" in shown


# --- refusals and the command -----------------------------------------------------------------------------------------


def test_what_is_no_work_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtefactError, match="This is no work folder of pairdr run"):
        write_report(tmp_path)


@pytest.mark.parametrize("name", ["page.txt", "state.json", "page"])
def test_a_page_has_the_name_of_a_page(work: Path, tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match=r"This is no name of a page\. Let it end in \.html"):
        write_report(work, tmp_path / name)


def test_a_system_that_is_not_in_the_table_is_refused_with_those_that_are(work: Path) -> None:
    with pytest.raises(UsageError, match=r"query_centric is not in this table\. --against can be: bm25, start, label"):
        write_report(work, config=ReportConfig(against="query_centric"))


def test_the_command_prints_where_the_page_is(
    work: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], data: Path
) -> None:
    place = tmp_path / "page.html"
    options = (
        "--against",
        "labelled_only",
        "--shown-queries",
        "1",
        "--shown-characters",
        "50",
        "--report-queries",
        "9",
    )
    options += ("--report-negatives", "2", "--report-texts", "30", "--report-seed", "5", "--data", str(data))
    with pytest.raises(SystemExit) as end:
        main(["report", str(work), "-o", str(place), *options])
    assert not end.value.code
    assert capsys.readouterr().out == f"{place}\n"
    page = Page(place.read_text(encoding="utf-8"))
    assert page.count("article") == 2
    assert "Against labelled only: " in page.texts["changes"]
    assert "18 triples of 9 dev questions" in page.texts["geometry"]
    assert "Length of 30 passages" in page.texts["data"]


def test_every_option_stands_in_its_page() -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "report.md").read_text(encoding="utf-8")
    assert [spec.name for spec in fields(ReportConfig) if f"`{spec.name}`" not in text] == []


# --- charts -----------------------------------------------------------------------------------------------------------

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@given(FINITE, FINITE)
def test_ticks_are_few_round_and_inside(one: float, other: float) -> None:
    low, high = sorted((one, other))
    assume(high - low > 1e-6 * max(1.0, abs(high), abs(low)))
    ticks = list_ticks(low, high)
    assert 1 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    slack = 1e-6 * (high - low)
    assert low - slack <= ticks[0] <= ticks[-1] <= high + slack


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0.0, "0"), (0.25, "0.25"), (-0.5, "−0.5"), (2e-5, "2e−5"), (12345.0, "12,345"), (192.0, "192"), (-0.0, "0")],
)
def test_numbers_on_an_axis_are_short(value: float, shown: str) -> None:
    assert format_number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.31, "0.3 s"), (59.9, "59.9 s"), (197.2, "3 min 17 s"), (3725.0, "1 h 02 min")]
)
def test_times_read_as_people_say_them(seconds: float, shown: str) -> None:
    assert format_seconds(seconds) == shown


def read_points(figure: str) -> Iterator[tuple[float, float]]:
    for points in re.findall('<polyline class="l0" points="([^"]*)"', figure):
        yield from (tuple(map(float, pair.split(","))) for pair in points.split())  # type: ignore[misc]


def test_a_line_leaves_out_what_has_no_value_and_keeps_inside() -> None:
    figure = draw_lines([Line("a", [0, 5, 10], [1.0, None, 3.0]), Line("b", [0], [None])], "t", "x", "y", floor=0.0)
    (first, last) = read_points(figure)
    assert first[0] < last[0]
    assert first[1] > last[1]  # up is less in SVG
    assert figure.count("<polyline") == 1
    assert "legend" not in figure
    assert draw_lines([], "t", "x", "y").count("<polyline") == 0


def test_very_many_points_are_put_together() -> None:
    figure = draw_lines([Line("a", range(10_000), [float(x % 5) for x in range(10_000)])], "t", "x", "y", floor=1.0)
    points = list(read_points(figure))
    assert len(points) == 400
    assert len({y for _, y in points}) == 1
    assert "<circle" not in figure


def test_a_histogram_shows_shares_of_each_group() -> None:
    histogram = Histogram([0.0, 1.0, 2.0], {"a": [1, 3], "b": [300, 100], "none": [0, 0]})
    figure = draw_histogram(histogram, "t", "x", marks=[Mark(1.5, "here")])
    heights = [y for _, y in read_points(figure)]
    up = Axis([0.0, 75.0], 0.0, 1.0)
    bottom, top = max(heights), min(heights)
    assert (bottom - heights[1]) / (bottom - top) == pytest.approx(up.place(25.0) / up.place(75.0), abs=0.05)
    assert figure.count("<polyline") == 2
    assert ">none<" not in figure
    assert ">here</text>" in figure


def test_names_in_a_chart_are_escaped() -> None:
    lines = [Line(name, [0, 1], [0.0, 1.0]) for name in ("<b>", '"')]
    figure = draw_lines(lines, HOSTILE, HOSTILE, HOSTILE, marks=[Mark(0.5, HOSTILE)])
    with suppress(ValueError):
        Page(figure)
    assert "<script" not in figure
    assert "<b>" not in figure
    assert figure.count("&lt;script&gt;") == 5


def test_equal_values_have_an_axis_too() -> None:
    axis = Axis([3.0, 3.0], 0.0, 100.0)
    assert axis.place(3.0) == 50.0
    assert Axis([], 0.0, 1.0).ticks
