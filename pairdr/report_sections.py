"""The parts of a work folder's page as HTML. Text of the data goes through `write_text`, always."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import fields

from pairdr.charts import Histogram, Line, Mark, draw_histogram, draw_lines
from pairdr.geometry import SIMILARITIES, Geometry, say_relation
from pairdr.lengths import Lengths
from pairdr.options import Options
from pairdr.origin import OPTIONS_FILE, Origin, format_options
from pairdr.page_style import make_facts, make_table, write_text
from pairdr.report import (
    Absent,
    Change,
    Changes,
    DataFacts,
    Found,
    Report,
    Stage,
    StepFacts,
    Teaching,
)
from pairdr.table import MAIN, TITLES, Table, say_p
from pairdr.watch import DEV

MIB = 2**20
NAMES = TITLES | {"start": "the start model", "whole": "the whole model", "query_centric": "query-centric"}
"""Systems as they are called within a sentence."""
LOSSES = {
    "query_centric": "L_Q, query-centric",
    "passage_centric": "L_P, passage-centric",
    "passage_to_query": "L_Q from passage to question",
    "distillation": "distillation",
}
SCORES = {
    "right": "dev: best candidate, right",
    "wrong": "dev: best candidate, not labelled right",
    "positives": "dev: known positives",
    "pool": "pool: best candidate",
}


def show_verdict(table: Table | Absent) -> str:
    """Return what came out, in one sentence."""
    if isinstance(table, Absent):
        return '<p class="verdict">This run has not ended.</p>'
    rows, measure = {row.system: row for row in table.rows}, next(iter(table.rows[0].means))
    main = rows.pop(MAIN)
    others = [
        f"{NAMES[system]} {row.means[measure]:.4f}" + ("" if row.p_pair is None else f" ({say_p(row.p_pair)})")
        for system, row in rows.items()
    ]
    return (
        f'<p class="verdict">PAIR has {write_text(measure)} {main.means[measure]:.4f} on {table.queries:,} '
        f"{write_text(table.split)} questions; {write_text('; '.join(others))}.</p>"
    )


def show_table(table: Table) -> str:
    """Return the table of all systems."""
    names = list(table.rows[0].means)
    head = ["", *names, "p (PAIR)"]
    rows = [
        [
            write_text(TITLES[row.system]),
            *(f"{row.means[name]:.4f}" for name in names),
            "" if row.p_pair is None else _format_p(row.p_pair),
        ]
        for row in table.rows
    ]
    main = next(at for at, row in enumerate(table.rows) if row.system == MAIN)
    notes = [
        f"{table.queries:,} {table.split} questions; p: two-sided paired randomisation test of {names[0]}, "
        "PAIR against the row.",
        *([] if table.p_fused_bm25 is None else [f"PAIR + BM25 against BM25: {say_p(table.p_fused_bm25)}."]),
        *table.notes,
    ]
    return make_table(head, rows, main=main) + "".join(f"<p>{write_text(note)}</p>" for note in notes)


def show_changes(changes: Changes) -> str:
    """Return the questions that gained and lost most, and the differences of all."""
    against, measure = NAMES[changes.against], changes.measure
    total = changes.better + changes.equal + changes.worse
    counts = (
        f"<p>Against {write_text(against)}: better on {changes.better:,} of {total:,} questions, equal on "
        f"{changes.equal:,}, worse on {changes.worse:,}.</p>"
    )
    title = f"{measure} of PAIR minus that of {against}, where they differ"
    chart = draw_histogram(changes.histogram, title, f"difference in {measure}")
    parts = [counts, f'<div class="charts">{chart}</div>' if changes.equal < total else ""]
    for title, found in (("Largest gains", changes.best), ("Largest losses", changes.worst)):
        parts.append(f"<h3>{title}</h3>")
        parts += [_show_change(change, changes) for change in found] or ['<p class="soft">There are none.</p>']
    return "".join(parts)


def show_stages(stages: tuple[Stage, ...]) -> str:
    """Return the curves of all stages, one after the other, and where each ended."""
    offsets = [sum(stage.lines[-1]["step"] for stage in stages[:number]) for number in range(len(stages))]
    points = [
        (line["step"] + offset, line) for stage, offset in zip(stages, offsets, strict=True) for line in stage.lines
    ]
    marks = [Mark(offset, f"stage {number}") for number, offset in enumerate(offsets, start=1)]

    def lines(names: dict[str, str]) -> list[Line]:
        steps = [step for step, _ in points]
        return [Line(label, steps, [line.get(key) for _, line in points]) for key, label in names.items()]

    dev = "RR@10 on a small sample of dev: to watch, not to report"
    same = {name: name for name in SIMILARITIES}
    charts = [
        draw_lines(
            lines(LOSSES), "Loss, mean of the steps since the point before", "step", "loss", marks=marks, floor=0.0
        ),
        draw_lines(lines(same), "Similarities in the batches", "step", "mean s", marks=marks),
        draw_lines(lines({DEV: DEV}), dev, "step", "RR@10", marks=marks),
        draw_lines(lines({"learning_rate": "learning rate"}), "Learning rate", "step", "rate", marks=marks, floor=0.0),
    ]
    short = {name: label.partition(",")[0] for name, label in LOSSES.items()}
    names = {**short, **same, "alike": "p+ alike", DEV: "RR@10"}
    shown = {key: label for key, label in names.items() if any(key in stage.lines[-1] for stage in stages)}
    rows = [
        [
            f"{number}:&nbsp;{write_text(stage.name)}",
            f"{stage.alpha:g}",
            f"{stage.lines[-1]['step']:,}",
            f"{stage.taken:,}",
            *(f"{stage.lines[-1][key]:.4f}" if key in stage.lines[-1] else "" for key in shown),
        ]
        for number, stage in enumerate(stages, start=1)
    ]
    table = make_table(["at the end of", "alpha", "steps", "taken", *shown.values()], rows)
    note = (
        "taken: the step whose model went on. p+ alike: mean cosine between passages of different questions; near 1 "
        "the model has collapsed."
    )
    return f'<div class="charts">{"".join(charts)}</div>{table}<p class="soft">{note}</p>'


def show_teaching(teaching: Teaching) -> str:
    """Return how the teacher was chosen, its thresholds and scores, and what was labelled."""
    teacher, examples = teaching.teacher, teaching.examples
    taken = teacher["teacher"] if teacher["accepted"] else None
    rows = [
        [write_text(verdict["name"]), f"{verdict['rr10']:.4f}", _format_p(verdict["p_value"])]
        for verdict in teacher["verdicts"]
    ]
    main = next((at for at, verdict in enumerate(teacher["verdicts"]) if verdict["name"] == taken), None)
    head = ["re-ranking the student's candidates", "RR@10", "p (against the student)"]
    parts = [
        f"<p>{teacher['dev_queries']:,} dev questions judged the teachers; "
        f"{'none beat the student' if taken is None else 'taken: ' + write_text(taken)}.</p>",
        make_table(head, rows, main=main),
    ]
    calibration, marks = examples.get("calibration"), []
    if calibration is None:
        parts.append(f'<p class="absent">No pseudo labels: {write_text(examples["note"])}.</p>')
    else:
        marks = [Mark(calibration["s_neg"], "s_neg"), Mark(calibration["s_pos"], "s_pos")]
    if isinstance(teaching.scores, Absent):
        parts.append(f'<p class="absent">No scores to draw. {write_text(teaching.scores.why)}</p>')
    else:
        groups = {label: teaching.scores.counts[name] for name, label in SCORES.items()}
        chart = draw_histogram(Histogram(teaching.scores.edges, groups), "The teacher's scores", "score", marks=marks)
        parts.append(f'<div class="charts">{chart}</div>')
    return "".join([*parts, make_facts(_list_labels(teaching))])


def show_geometry(geometry: Geometry) -> str:
    """Return the similarities of every model, and histograms of the first and of PAIR."""
    rows = [
        [
            write_text(TITLES[row.model]),
            *(f"{row.means[name]:.4f}" for name in SIMILARITIES),
            f"{row.passage_violations:.1%}",
            f"{row.query_violations:.1%}",
        ]
        for row in geometry.models
    ]
    head = ["mean", *SIMILARITIES, "s(q,p+) < s(p+,p-)", "s(q,p+) < s(q,p-)"]
    main = next((at for at, row in enumerate(geometry.models) if row.model == MAIN), None)
    note = (
        f"{geometry.pairs:,} triples of {geometry.queries:,} dev questions, {geometry.similarity}. p+ is a labelled "
        "passage, p- a candidate that is not labelled. Candidates are what BM25 and the model that mined rank highest, "
        "so that model has the hardest ones."
    )
    ends = [row for row in geometry.models if row.model in (geometry.models[0].model, MAIN)]
    charts = [
        draw_histogram(Histogram(geometry.edges, row.counts), TITLES[row.model], geometry.similarity) for row in ends
    ]
    shares = ", ".join(f"{NAMES[row.model]} {row.passage_violations:.1%}" for row in ends)
    said = (
        f"Share of triples in which p+ is nearer to a wrong passage than to its question, s(q,p+) < s(p+,p-): {shares}."
    )
    before = say_relation(geometry.models[0].passage_violations, geometry.pairs)
    return (
        f"<p>{write_text(said)} {write_text(before)}.</p>{make_table(head, rows, main=main)}<p>{write_text(note)}</p>"
        f'<div class="charts">{"".join(charts)}</div>'
    )


def show_data(data: DataFacts) -> str:
    """Return counts, warnings, and the lengths of texts."""
    warnings = "".join(f"<li>{write_text(warning)}</li>" for warning in data.warnings)
    charts = [
        _show_lengths(lengths, what) for lengths, what in ((data.passages, "passages"), (data.queries, "questions"))
    ]
    facts = {
        name: f"{value:.1%}" if name.startswith("share ") else _format_value(value)
        for name, value in data.facts.items()
    }
    return (
        (f"<ul>{warnings}</ul>" if warnings else "<p>The check found nothing to warn of.</p>")
        + make_facts(facts)
        + f'<div class="charts">{"".join(charts)}</div>'
    )


def show_costs(steps: Sequence[StepFacts]) -> str:
    """Return the time and the memory of every step."""
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    kinds = {"memory": [step.memory for step in steps], "GPU memory": [step.device_memory for step in steps]}
    shown = {name: counts for name, counts in kinds.items() if any(count is not None for count in counts)}
    rows = [
        [
            write_text(step.name),
            f'<span class="bar" style="width:{5 * step.seconds / longest:.2f}rem"></span>',
            format_seconds(step.seconds),
            *(_format_bytes(counts[at]) for counts in shown.values()),
        ]
        for at, step in enumerate(steps)
    ]
    total = format_seconds(sum(step.seconds for step in steps))
    said = f"<p>{total} in all, over {len(steps)} steps.</p>"
    if "memory" not in shown:
        said += '<p class="absent">Memory was not recorded by the pairdr of then.</p>'
    return said + make_table(["step", "", "time", *shown], rows, texts=2)


def show_origin(report: Report) -> str:
    """Return options, seeds, data, versions and hashes."""
    parts = [
        _show_options(report.origin)
        if isinstance(report.origin, Origin)
        else f'<p class="absent">The options are not here. {write_text(report.origin.why)}</p>'
    ]
    groups: dict[tuple[tuple[str, str], ...], list[str]] = {}
    for step in report.steps:
        groups.setdefault(tuple((step.environment or {}).items()), []).append(step.name)
    for environment, names in groups.items():
        which = "" if len(groups) == 1 else f" of the steps {', '.join(names)}"
        parts.append(f"<h3>Versions and machine{write_text(which)}</h3>")
        parts.append(
            make_facts(dict(environment), numbers=False) if environment else '<p class="absent">Not recorded.</p>'
        )
    prints = [[write_text(step.name), f"<code>{write_text(step.fingerprint)}</code>"] for step in report.steps]
    weights = [
        [write_text(model), f"<code>{write_text(found.why if isinstance(found, Absent) else found)}</code>"]
        for model, found in report.weights.items()
    ]
    parts.append("<details><summary>Fingerprint of what each step made</summary>")
    parts.append(make_table(["step", "sha256 over its files and facts"], prints, texts=2) + "</details>")
    parts.append("<details><summary>Weights of the models</summary>")
    parts.append(make_table(["model", "sha256"], weights, texts=2) + "</details>")
    return "".join(parts)


def format_seconds(seconds: float) -> str:
    """Return a time as people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def _show_change(change: Change, changes: Changes) -> str:
    values = f"{changes.measure} {change.before:.4f} → {change.after:.4f}"
    kind = "good" if change.after > change.before else "bad"
    if change.texts is None:
        said = f'{write_text(change.query_id)}: <span class="{kind}">{write_text(values)}</span>'
        return f'<article class="change"><p>{said}</p></article>'
    texts = change.texts
    before, after = ("not found" if rank is None else f"rank {rank}" for rank in texts.ranks)
    firsts = [(NAMES[changes.against], texts.before), ("PAIR", texts.after)]
    right = [name for name, found in firsts if found is not None and found.passage_id == texts.wanted.passage_id]
    wanted = "Labelled" + (f", and first with {' and '.join(right)} ✓" if right else "")
    columns = [(wanted, _show_passage(texts.wanted))]
    for name, found in firsts:
        if name not in right:
            also = " (labelled too) ✓" if found is not None and found.is_relevant else ""
            shown = '<p class="soft">nothing</p>' if found is None else _show_passage(found)
            columns.append((f"First with {name}{also}", shown))
    cells = "".join(f"<div><h4>{write_text(title)}</h4>{cell}</div>" for title, cell in columns)
    return (
        f'<article class="change"><h3 dir="auto">{write_text(texts.question)}</h3>'
        f'<p class="soft">{write_text(change.query_id)} · <span class="{kind}">{write_text(values)}</span> · '
        f'first right passage: {before} → {after}</p><div class="columns">{cells}</div></article>'
    )


def _show_passage(found: Found) -> str:
    title = f'<p dir="auto"><strong>{write_text(found.title)}</strong></p>' if found.title else ""
    name = f'<p class="soft"><code>{write_text(found.passage_id)}</code></p>' if found.title != found.passage_id else ""
    return f'{title}<p dir="auto">{write_text(found.text)}</p>{name}'


def _show_lengths(lengths: Lengths | Absent, what: str) -> str:
    if isinstance(lengths, Absent):
        return f'<p class="absent">No lengths of {what}. {write_text(lengths.why)}</p>'
    end = lengths.histogram.edges[-1]
    title = (
        f"Length of {lengths.texts:,} {what}: median {lengths.median:g}, longest {lengths.longest:,}, "
        f"{lengths.cut:.1%} cut"
    )
    beyond = "" if lengths.longest <= end else f"; the last bin holds all from {end:g} on"
    marks = [Mark(lengths.limit, f"limit {lengths.limit}")]
    return draw_histogram(lengths.histogram, title, f"tokens{beyond}", marks=marks, whole=True)


def _list_labels(teaching: Teaching) -> dict[str, str]:
    """Return the counts of what was labelled, and what calibration promised of it."""
    examples, calibration = teaching.examples, teaching.examples.get("calibration")
    facts: dict[str, str] = {}
    if calibration is not None:
        facts |= {"s_pos": f"{calibration['s_pos']:.4f}", "s_neg": f"{calibration['s_neg']:.4f}"}
        if calibration["precision"] is not None:
            facts["pseudo positives right, expected from dev"] = f"{calibration['precision']:.1%}"
            facts["share labelled, expected from dev"] = f"{calibration['yield_share']:.1%}"
        facts["pool"] = f"{examples['pool']:,}" if examples["pool"] else "0: there are no unlabelled questions"
    if examples.get("hidden"):
        hidden = examples["hidden"]
        facts["pseudo positives right, by hidden labels"] = f"{hidden['right']:,} of {hidden['checked']:,}"
    facts |= {"pseudo-labelled rows": f"{examples['pseudo']:,}", "labelled rows": f"{examples['labelled']:,}"}
    facts |= {what: f"{count:,}" for what, count in examples.get("counts", {}).items()}
    return facts | {f"mined: {what}": f"{count:,}" for what, count in teaching.negatives.items()}


def _show_options(origin: Origin) -> str:
    config = origin.config
    sections = [getattr(config, spec.name) for spec in fields(config)]
    seeds = {
        spec.name: str(getattr(section, spec.name))
        for section in sections
        if isinstance(section, Options)
        for spec in fields(section)
        if spec.name == "seed" or spec.name.endswith("_seed")
    }
    again = "pairdr reproduce WORK -o NEW"
    longer = f"pairdr run {shlex.quote(str(origin.data))} -o NEW --config WORK/{OPTIONS_FILE}"
    changed = format_options(config, changed_only=True).strip()
    facts = {"data": str(origin.data), "fingerprint of the data": origin.collection, "of the corpus": origin.passages}
    return (
        f"<pre>{write_text(again)}\n{write_text(longer)}</pre>{make_facts(facts, numbers=False)}"
        f"<h3>Options that are not the default</h3><pre>{write_text(changed or '# none')}</pre>"
        f"<h3>Seeds</h3>{make_facts(seeds)}"
        f"<details><summary>All options</summary><pre>{write_text(format_options(config))}</pre></details>"
    )


def _format_p(value: float | None) -> str:
    return "" if value is None else "&lt; 0.001" if value < 0.001 else f"{value:.3f}"


def _format_value(value: float) -> str:
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def _format_bytes(count: int | None) -> str:
    return "" if count is None else f"{count / MIB:,.0f} MiB"
