"""What the steps of `pairdr run` do: each takes the parts it needs from the work folder and calls one stage."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import partial

from pairdr.artefact import publish, read_manifest
from pairdr.card import Measured, lacks_results, read_measured, write_card
from pairdr.check import check_collection, require_sound
from pairdr.config import ARMS, TeachConfig, list_stages
from pairdr.encoder import DualEncoder
from pairdr.errors import RefusedError
from pairdr.formats import write_run, write_trec_run
from pairdr.fusion import fuse_runs, tune_run_weights
from pairdr.geometry import describe_relation
from pairdr.label import label_examples
from pairdr.measures import mean_measures, measure_run
from pairdr.mine import mine_candidates, read_candidates
from pairdr.origin import OPTIONS_FILE
from pairdr.progress import say
from pairdr.readme import format_command
from pairdr.records import positives_of
from pairdr.search import rank_dense, rank_words, write_search
from pairdr.table import MAIN, compare_systems, describe_fusion, describe_labels
from pairdr.teach import choose_teacher
from pairdr.teachers import load_teacher, read_recipe
from pairdr.train import count_steps, read_stage_examples, train_model
from pairdr.warm import warm_student
from pairdr.work import Work

FUSED = "pair_bm25"


def check(work: Work) -> None:
    """Check the data, print the warnings, and stop where it would corrupt training."""
    report = check_collection(work.collection, work.config.model, work.path("check"))
    for warning in report.warnings:
        say(f"  {warning}")
    require_sound(report, work.collection.name)


def save_start(work: Work, name: str, layers: int | None) -> None:
    """Save the start model, or the whole one that it is cut from."""
    config = replace(work.config.model, layers=layers)
    DualEncoder.load(config).save_copy(work.path("models", name), config)


def warm(work: Work) -> None:
    """Train the model that mines."""
    config = work.config
    places = work.path("models", "start"), config.warm, config.train, work.path("models", "student")
    warm_student(work.collection, work.index, *places, device=config.model.device)
    write_cards(work, "student")


def mine(work: Work, student: str, place: str) -> None:
    """Mine candidates with a model and BM25, and say why the others were not kept."""
    output = work.path(place)
    mine_candidates(work.collection, work.encoder(student), work.store(student), work.index, work.config.mine, output)
    counts = read_manifest(output).facts["negatives"]
    say("  negatives: " + ", ".join(f"{count} {what}" for what, count in counts.items()))
    ranked = read_candidates(output).merged
    say(f"  {describe_relation(work.collection, ranked, work.encoder('start'), work.store('start'))}")


def find_teacher(work: Work, config: TeachConfig, student: str, candidates: str, place: str) -> None:
    """Judge the teachers at hand against a student."""
    result = choose_teacher(
        work.collection,
        work.encoder(student),
        work.path("models", student),
        work.index,
        read_candidates(work.path(candidates)),
        work.config.model,
        config,
        work.path(place),
        stores=work.stores(student),
    )
    say(result.format())


def label(work: Work, student: str, candidates: str, teacher: str, place: str) -> None:
    """Label with the accepted teacher; without one, or where it cannot be calibrated, train on the labels alone."""
    config, data = work.config, work.collection
    folder = work.path(teacher)
    recipe = read_recipe(folder)
    note = "" if recipe else "No teacher beat the student"
    label_with = partial(
        label_examples,
        data,
        read_candidates(work.path(candidates)),
        config=config.label,
        output=work.path(place),
        teacher_fingerprint=read_manifest(folder).fingerprint,
    )
    if recipe is not None:
        judge = load_teacher(recipe, folder, work.index, config.model, work.stores(student))
        try:
            facts = label_with(teacher=judge)
        except RefusedError as error:
            note = error.what.rstrip(".")
        else:
            say(
                f"  {facts['labelled']} labelled and {facts['pseudo']} pseudo-labelled rows; "
                f"{json.dumps(facts['calibration'])}"
            )
            return
    say(f"  {note}: no pseudo labels, margin-filtered negatives.")
    label_with(teacher=None, note=note)


def train(work: Work, arm: str, examples_place: str, place: str) -> None:
    """Train one arm from the start model."""
    config = work.config
    examples = work.path(examples_place)
    stages = list_stages(arm, config.train)
    # Labelled only takes as many steps in its one stage as PAIR in its two.
    rows = len(read_stage_examples(examples, list_stages("pair", config.train)[1], config.train))
    steps = count_steps(rows, config.train) * (2 if len(stages) == 1 else 1)
    start, output = work.path("models", "start"), work.path("models", place)
    train_model(
        work.collection, examples, start, stages, config.train, output, device=config.model.device, max_steps=steps
    )
    write_cards(work, place)


def search(work: Work, split: str, system: str) -> None:
    """Rank the passages for all queries of a split."""
    config, data = work.config.search, work.collection
    queries = (data.query(query_id) for query_id in data.qrels(split))
    blocks = (
        rank_words(queries, work.index, config)
        if system == "bm25"
        else rank_dense(queries, work.encoder(system), work.store(system), config)
    )
    write_search(
        blocks,
        config,
        work.path("runs", split, system),
        total=len(data.qrels(split)),
        inputs={"collection": data.fingerprint},
        options={"split": split, "system": system},
    )


def fuse(work: Work, split: str) -> None:
    """Fuse PAIR and BM25 with the weights that dev chooses."""
    config, data = work.config.search, work.collection
    runs = [work.run("dev", system) for system in ("pair", "bm25")]
    dev = data.qrels("dev")
    weights, fused = tune_run_weights(runs, dev)
    dense = mean_measures(measure_run(runs[0], dev, ["RR@10"]))["RR@10"]
    output = work.path("runs", split, FUSED)
    with publish(output, "run", options=config.as_dict() | {"weights": list(weights)}, inputs={}) as staging:
        run = fuse_runs([work.run(split, system) for system in ("pair", "bm25")], weights, config.k)
        with write_run(staging.path / "run.arrow") as add:
            add(list(run), [run[query_id] for query_id in run])
        write_trec_run(staging.path / "run.trec", run, FUSED)
        staging.facts |= {
            "weights": list(weights),
            "dev_RR@10": {"fused": fused, "dense": dense},
            "mode": "hybrid" if fused > dense else "dense",
        }


def evaluate(work: Work, split: str, systems: list[str]) -> None:
    """Compare all systems and publish the table."""
    runs = {system: work.run(split, system) for system in systems}
    examples, teacher = (
        read_manifest(work.path(name), kind).facts for name, kind in (("examples", "examples"), ("teacher", "teacher"))
    )
    fusion = read_manifest(work.path("runs", split, FUSED), "run").facts
    notes = [*describe_labels(examples, teacher), describe_fusion(fusion)]
    if split == "dev":
        notes.append("There is no test split: these are dev queries, on which weights and thresholds were chosen.")
    compare_systems(
        runs,
        work.collection.qrels(split),
        split,
        work.config.evaluate,
        tuple(notes),
        work.path("report"),
        inputs={"collection": work.collection.fingerprint},
    )
    measured = read_measured(work.path("report"), MAIN, work.config.evaluate)
    for arm in set(systems) & set(ARMS):
        write_cards(work, arm, replace(measured, system=arm))


def write_cards(work: Work, name: str, measured: Measured | None = None) -> None:
    """Write the card of a model that was trained here, and that of the one between its stages."""
    for place in (f"{name}.stage1", name):
        model = work.path("models", place)
        if model.is_dir():
            found = measured if place == name else None
            write_card(model, work.path("models", "start"), work.collection, _format_command(work, place), found)


def renew_cards(work: Work, names: list[str]) -> None:
    """Let the cards say what holds now: a licence may be given later, and a model made again is measured already."""
    bare = [name for name in names if name in ARMS and lacks_results(work.path("models", name))]
    measured = read_measured(work.path("report"), MAIN, work.config.evaluate) if bare else None
    for name in names:
        write_cards(work, name, replace(measured, system=name) if measured and name in bare else None)


def _format_command(work: Work, place: str) -> str:
    """Return what makes a model of `models/` again."""
    words = ["pairdr", "run", work.collection.given_name, "-o", "WORK"]
    by_file = format_command([*words, "--config", f"WORK/{OPTIONS_FILE}"])
    by_options = format_command(words, replace(work.config, data=work.collection.config))
    return f"{by_file}  # makes WORK/models/{place}\n# or, without that file:\n{by_options}"


def table_split(work: Work) -> str:
    """Return the split of the table: test, or dev where there is none."""
    return (
        "test" if any(positives_of(labels, q) for labels in [work.collection.labels("test")] for q in labels) else "dev"
    )
