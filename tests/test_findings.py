"""The table of findings: what is written is read, what a spreadsheet saves too, and what is broken is named."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
from auditing import KEYS, write_table
from hypothesis import given
from hypothesis import strategies as st

from pairdr.errors import DataError, UsageError
from pairdr.findings import (
    AUDIT_FILE,
    KINDS,
    LABELS,
    MARKS,
    MOST_CHARACTERS,
    Finding,
    read_audit,
    shorten_text,
    write_audit,
    write_marks,
)

# --- the table --------------------------------------------------------------------------------------------------------

ids = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\t\n\r"), min_size=1, max_size=12)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=60).map(shorten_text)
numbers = st.none() | st.floats(-1e6, 1e6).map(lambda value: float(f"{value:.6g}"))
ranks = st.none() | st.integers(1, 1000)
rows = st.builds(
    Finding,
    mark=st.sampled_from(["", *MARKS]),
    kind=st.sampled_from(KINDS),
    label=st.sampled_from(LABELS),
    query_id=ids,
    passage_id=ids,
    **dict.fromkeys(("query", "passage", "other_id", "other", "suggestion"), texts),
    **dict.fromkeys(("teacher_score", "other_teacher_score", "model_score", "jaccard"), numbers),
    **dict.fromkeys(("rank", "model_rank", "other_model_rank", "student_rank", "bm25_rank"), ranks),
)
findings = st.lists(rows, max_size=5, unique_by=lambda found: found.pair)


@given(findings)
def test_what_is_written_is_read(tmp_path: Path, written: list[Finding]) -> None:
    path = tmp_path / AUDIT_FILE
    write_audit(path, written)
    assert read_audit(path) == read_audit(tmp_path) == written


@given(findings, st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL]), st.randoms(use_true_random=False))
def test_what_a_spreadsheet_saves_is_read(tmp_path: Path, written: list[Finding], quoting: Any, random: Any) -> None:
    path = tmp_path / AUDIT_FILE
    write_audit(path, written)
    with path.open(encoding="utf-8", newline="") as stream:
        table = list(csv.reader(stream, "excel-tab"))
    columns = random.sample(range(len(table[0])), len(table[0]))
    shuffled = [table[0], *random.sample(table[1:], len(table) - 1), [""] * len(columns)]
    with path.open("w", encoding="utf-8-sig", newline="") as stream:
        writer = csv.writer(stream, "excel-tab", quoting=quoting, lineterminator="\r\n")
        writer.writerows([row[at] for at in columns] for row in shuffled)
    assert {found.pair: found for found in read_audit(path)} == {found.pair: found for found in written}


formulas = st.from_regex(r"'{0,3}[=+@\t\r-]?[a-z0-9='\t]{1,4}", fullmatch=True)


@given(
    st.builds(
        Finding,
        kind=st.just("near_copy"),
        label=st.just("negative"),
        query_id=formulas,
        passage_id=formulas,
        **dict.fromkeys(("query", "passage", "other_id", "other", "suggestion"), formulas),
    )
)
def test_what_looks_like_a_formula_is_none_in_the_file_and_is_read_exactly(tmp_path: Path, written: Finding) -> None:
    path = tmp_path / AUDIT_FILE
    write_audit(path, [written])
    assert read_audit(path) == [written]
    with path.open(encoding="utf-8", newline="") as stream:
        (_, row) = csv.reader(stream, "excel-tab")
    assert not any(cell.startswith(("=", "+", "-", "@", "\t", "\r")) for cell in row)
    assert write_marks(path, {written.pair: "drop"}) == [replace(written, mark="drop")]


def test_an_id_without_the_apostrophe_is_read_as_it_is(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv", "drop\tnear_copy\tnegative\t-1\t'p'")
    (found,) = read_audit(path)
    assert found.pair == ("-1", "'p'")


@given(st.text(max_size=600))
def test_a_text_is_one_cell(text: str) -> None:
    short = shorten_text(text)
    assert len(short) <= MOST_CHARACTERS
    assert short.split() == short.split(" ") or not short


def test_only_five_columns_are_needed_and_marks_are_read_as_people_write_them(tmp_path: Path) -> None:
    path = write_table(tmp_path / "a.tsv", " Drop \tnear_copy\tnegative\tq1\tp1", "", "\tcontradicted\tpseudo\tq2\tp2")
    assert [(found.mark, found.pair) for found in read_audit(path)] == [("drop", ("q1", "p1")), ("", ("q2", "p2"))]


def test_a_line_break_within_a_cell_counts_as_a_line(tmp_path: Path) -> None:
    row = 'drop\tnear_copy\tnegative\tq1\tp1\t"a note\nof two lines"'
    header = "mark\tkind\tlabel\tquery_id\tpassage_id\tnote"
    path = write_table(tmp_path / "a.tsv", row, "later\tnear_copy\tnegative\tq1\tp2\t", header=header)
    with pytest.raises(DataError, match=r"a\.tsv:4: 'later' is no mark\. There are: accept, relabel, drop\."):
        read_audit(path)


def test_numbers_that_a_spreadsheet_changed_do_not_matter(tmp_path: Path) -> None:
    header = "mark\tkind\tlabel\tquery_id\tpassage_id\tteacher_score\tjaccard\tmodel_rank"
    path = write_table(tmp_path / "a.tsv", "drop\tnear_copy\tnegative\tq1\tp1\t0,83\t01. Mai\t#REF!", header=header)
    (found,) = read_audit(path)
    assert (found.teacher_score, found.jaccard, found.model_rank) == (0.83, None, None)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("keep\tnear_copy\tnegative\tq1\tp1", "'keep' is no mark. There are: accept, relabel, drop."),
        ("drop\tfar_copy\tnegative\tq1\tp1", f"'far_copy' is no kind. There are: {', '.join(KINDS)}."),
        ("drop\tnear_copy\tbad\tq1\tp1", f"'bad' is no label. There are: {', '.join(LABELS)}."),
        ("drop\tnear_copy\tnegative\tq1", "There is no passage_id. If a spreadsheet changed it, import"),
        ("drop\tnear_copy\tnegative\tq1\tp1\tmore", "6 cells stand under 5 columns."),
        ('drop\tnear_copy\tnegative\tq1\t"p1', "A row cannot be read: unexpected end of data."),
        ("drop\tnear_copy\tnegative\tq0\tp0", "The same query and passage stand in line 2 with another mark."),
    ],
)
def test_a_broken_row_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    path = write_table(tmp_path / "a.tsv", "accept\tnear_copy\tnegative\tq0\tp0", line)
    with pytest.raises(DataError) as refused:
        read_audit(path)
    assert str(refused.value).startswith(f"{path}:3: {message}")


def test_other_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"b\.csv:1: The column 'kind' is missing\. Save it as tab-separated"):
        read_audit(write_table(tmp_path / "b.csv", header="mark\tquery_id,passage_id"))
    (tmp_path / "c.tsv").write_text("mark\tkind", encoding="utf-16")
    with pytest.raises(DataError, match=r"c\.tsv: Not UTF-8\. Save it as"):
        read_audit(tmp_path / "c.tsv")
    with pytest.raises(DataError, match=r"e\.tsv:1: Two columns are named 'mark'\. Give one of them another name"):
        read_audit(write_table(tmp_path / "e.tsv", header="mark\tkind\tlabel\tquery_id\tpassage_id\tmark"))
    (tmp_path / "d.tsv").write_text("", encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.tsv:1: The column 'mark' is missing"):
        read_audit(tmp_path / "d.tsv")
    with pytest.raises(UsageError, match=r"audit\.tsv: There is no such file\. Name what pairdr audit wrote"):
        read_audit(tmp_path)


columns = st.dictionaries(
    texts.filter(lambda name: name not in {spec.name for spec in fields(Finding)}),
    st.lists(st.text("a =\"'\t\n\r\0é", max_size=8), min_size=5, max_size=5),
    max_size=3,
)


@given(findings, columns, st.sampled_from(["", *MARKS]), st.randoms(use_true_random=False))
def test_marking_leaves_every_other_cell_as_it_is(
    tmp_path: Path, written: list[Finding], added: dict[str, list[str]], mark: str, random: Any
) -> None:
    path = tmp_path / AUDIT_FILE
    write_audit(path, written)
    with path.open(encoding="utf-8", newline="") as stream:
        header, *table = csv.reader(stream, "excel-tab")
    header = [*header, *added]
    table = [[*row, *(cells[at] for cells in added.values())] for at, row in enumerate(table)]
    order = random.sample(range(len(header)), len(header))
    before = [[row[at] for at in order] for row in (header, *table)]
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, "excel-tab", quoting=csv.QUOTE_ALL).writerows(before)
    marked = {found.pair for found in written if random.random() < 0.5}

    found = write_marks(path, dict.fromkeys(marked, mark))
    assert found == [replace(one, mark=mark) if one.pair in marked else one for one in written] == read_audit(path)
    with path.open(encoding="utf-8", newline="") as stream:
        after = list(csv.reader(stream, "excel-tab"))
    place = before[0].index("mark")
    assert [row[:place] + row[place + 1 :] for row in after] == [row[:place] + row[place + 1 :] for row in before]


def test_rows_that_are_too_short_are_marked_too(tmp_path: Path) -> None:
    header = "kind\tlabel\tquery_id\tpassage_id\tnote\tmark"
    path = write_table(tmp_path / "a.tsv", "near_copy\tnegative\tq1\tp1", "", header=header)
    write_marks(path, {("q1", "p1"): "drop"})
    assert path.read_text(encoding="utf-8") == f"{header}\nnear_copy\tnegative\tq1\tp1\t\tdrop\n"


def test_marks_are_set_and_taken_away_and_nothing_else_changes(tmp_path: Path) -> None:
    written = [Finding(**KEYS, suggestion='say "what"'), Finding(**KEYS | {"passage_id": "p2"}, mark="accept")]
    write_audit(tmp_path / AUDIT_FILE, written)
    marked = write_marks(tmp_path, {("q1", "p1"): "relabel", ("q1", "p2"): ""})
    assert marked == [replace(written[0], mark="relabel"), replace(written[1], mark="")] == read_audit(tmp_path)
    with pytest.raises(UsageError, match="'yes' is no mark"):
        write_marks(tmp_path, {("q1", "p1"): "yes"})
    with pytest.raises(UsageError, match="There is no finding for query 'q1' and passage 'p9'"):
        write_marks(tmp_path, {("q1", "p9"): "drop"})
    assert read_audit(tmp_path) == marked


def test_who_marks_at_once_loses_nothing(tmp_path: Path) -> None:
    rows = [Finding(kind="near_copy", label="negative", query_id=f"q{at}", passage_id="p") for at in range(40)]
    write_audit(tmp_path / AUDIT_FILE, rows)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda row: write_marks(tmp_path, {row.pair: "drop"}), rows))
    assert [finding.mark for finding in read_audit(tmp_path)] == ["drop"] * 40
