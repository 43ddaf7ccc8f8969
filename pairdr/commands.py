"""What each command does. Each imports only what it needs; options come from config.py and store_config.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from pairdr.artefact import read_manifest
from pairdr.config import (
    DataConfig,
    EncodeConfig,
    EvaluateConfig,
    LabelConfig,
    LexicalConfig,
    MineConfig,
    ModelConfig,
    OnDuplicate,
    RunConfig,
    SearchConfig,
    TeachConfig,
    TrainArm,
    TrainConfig,
    WarmConfig,
    list_stages,
)
from pairdr.errors import UsageError
from pairdr.progress import print_facts, print_text, quiet_libraries
from pairdr.store_config import QueryConfig, RayConfig, WorkersConfig

if TYPE_CHECKING:
    from pairdr.collection import Collection
    from pairdr.encoder import DualEncoder
    from pairdr.lexical import LexicalIndex
    from pairdr.pipeline import RunResult

FLAT = Parameter(name="*")
ONE_EACH = Parameter(name="*", consume_multiple=False)
"""As FLAT, for options that may be repeated and take one value each: what follows may be an argument."""
OUTPUT = Parameter(name=["--output", "-o"], help="Folder to write.")
ON_DUPLICATE = Annotated[OnDuplicate, Parameter(help="Which passage or query of an id that occurs twice is taken.")]
ARMS = Parameter(help="Models to train: pair, labelled_only, query_centric, or all.")


def run(
    data: Path,
    *,
    output: Annotated[Path, OUTPUT],
    config: Annotated[Path | None, Parameter(help="A TOML file of options; those given here win.")] = None,
    dry_run: Annotated[bool, Parameter(help="Say what would run, with predicted time and memory.")] = False,
    arms: Annotated[tuple[str, ...], ARMS] = ("pair",),
    rounds: Annotated[int, Parameter(help="Times to mine, label and train, each with the model before.")] = 1,
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    lexical: Annotated[LexicalConfig, FLAT] = LexicalConfig(),
    warm: Annotated[WarmConfig, FLAT] = WarmConfig(),
    mine: Annotated[MineConfig, FLAT] = MineConfig(),
    teach: Annotated[TeachConfig, FLAT] = TeachConfig(),
    label: Annotated[LabelConfig, FLAT] = LabelConfig(),
    train: Annotated[TrainConfig, FLAT] = TrainConfig(),
    encode: Annotated[EncodeConfig, FLAT] = EncodeConfig(),
    search: Annotated[SearchConfig, FLAT] = SearchConfig(),
    evaluate: Annotated[EvaluateConfig, FLAT] = EvaluateConfig(),
) -> None:
    """Walk the whole way from a BEIR folder to a measured retriever; skip what is done.

    Parameters
    ----------
    data
        BEIR folder: corpus.jsonl, queries.jsonl, qrels/*.tsv.
    """
    del config  # read before the options are parsed: see main
    sections = (data_options, model, lexical, warm, mine, teach, label, train, encode, search, evaluate)
    options = RunConfig(*sections, arms, rounds)
    from pairdr.pipeline import format_plan, plan_run, run_pipeline

    quiet_libraries()
    if dry_run:
        print_text(format_plan(plan_run(data, output, options)))
    else:
        _print_result(run_pipeline(data, output, options))


def demo(
    *,
    output: Annotated[Path, OUTPUT] = Path("demo"),
    arms: Annotated[tuple[str, ...], ARMS] = ("labelled_only", "pair"),
) -> None:
    """Walk the whole way on the documentation of Python and its libraries: offline, minutes on a laptop."""
    from pairdr.pipeline import run_demo

    quiet_libraries()
    result = run_demo(output, arms)
    _print_result(result)
    print_text(f'Try it: pairdr search {result.work} "how do I fit a straight line to points"')


def check(
    data: Path,
    *,
    output: Annotated[Path | None, OUTPUT] = None,
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
) -> int:
    """Report what is wrong with a data set; end with 1 on what would corrupt training."""
    from pairdr.check import check_collection
    from pairdr.collection import open_collection

    report = check_collection(open_collection(data, data_options, strict=False), model, output)
    print_facts(report.facts)
    print_text(
        "\n".join([*(f"warning: {text}" for text in report.warnings), *(f"error: {text}" for text in report.errors)])
        or "sound"
    )
    return 1 if report.errors else 0


def mine(
    data: Path,
    *,
    output: Annotated[Path, OUTPUT],
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    lexical: Annotated[LexicalConfig, FLAT] = LexicalConfig(),
    encode: Annotated[EncodeConfig, FLAT] = EncodeConfig(),
    options: Annotated[MineConfig, FLAT] = MineConfig(),
) -> None:
    """Find candidates for every query with the student (--start) and BM25, and hard negatives for the labelled ones."""
    from pairdr.encode import encode_corpus
    from pairdr.geometry import describe_relation
    from pairdr.mine import mine_candidates

    collection, encoder, index = _open_parts(data, data_options, model, lexical, output)
    store = encode_corpus(collection, encoder, encode, _beside(output, "vectors"))
    found = mine_candidates(collection, encoder, store, index, options, output)
    print_facts(read_manifest(output).facts)
    print_text(describe_relation(collection, found.merged, encoder, store))


def teach(
    data: Path,
    candidates: Path,
    *,
    output: Annotated[Path, OUTPUT],
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    lexical: Annotated[LexicalConfig, FLAT] = LexicalConfig(),
    options: Annotated[TeachConfig, FLAT] = TeachConfig(),
) -> None:
    """Train or load teachers, judge them on dev, keep the best; end with 1 if none beats the student.

    Parameters
    ----------
    candidates
        What `pairdr mine` wrote, or a TREC run of the student.
    """
    from pairdr.mine import open_candidates
    from pairdr.teach import choose_teacher, require_accepted

    collection, encoder, index = _open_parts(data, data_options, model, lexical, output)
    student = _beside(output, "student")
    encoder.save_copy(student, model)
    result = choose_teacher(
        collection, encoder, student, index, open_candidates(candidates, collection), model, options, output
    )
    print_text(result.format())
    require_accepted(result)


def label(
    data: Path,
    candidates: Path,
    teacher: Path,
    *,
    output: Annotated[Path, OUTPUT],
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    lexical: Annotated[LexicalConfig, FLAT] = LexicalConfig(),
    options: Annotated[LabelConfig, FLAT] = LabelConfig(),
    ray: Annotated[RayConfig, FLAT] = RayConfig(),
) -> None:
    """Turn a teacher's scores into training examples: pseudo positives, denoised negatives.

    Parameters
    ----------
    candidates
        What `pairdr mine` wrote, or a TREC run.
    teacher
        What `pairdr teach` wrote.
    """
    from pairdr.collection import open_collection
    from pairdr.label import label_examples
    from pairdr.label_ray import open_spread
    from pairdr.lexical import index_words
    from pairdr.mine import open_candidates
    from pairdr.teach import refuse_verdicts
    from pairdr.teachers import load_teacher, read_recipe

    quiet_libraries()
    collection = open_collection(data, data_options)
    recipe = read_recipe(teacher)
    if recipe is None:
        refuse_verdicts(read_manifest(teacher).facts["verdicts"])
    index = index_words(collection, lexical, _beside(output, "bm25"))
    judge = load_teacher(recipe, teacher, index, model)
    fingerprint = read_manifest(teacher).fingerprint
    found = open_candidates(candidates, collection)
    with open_spread(ray, collection, found.merged, options.label_depth, recipe, teacher, index, model) as spread:
        facts = label_examples(
            collection, found, judge, options, output, teacher_fingerprint=fingerprint, spread=spread
        )
    print_facts(facts)


def train(
    data: Path,
    rows: Path,
    *,
    output: Annotated[Path, OUTPUT],
    arm: Annotated[TrainArm, Parameter(help="Which stages to run.")] = "pair",
    data_options: Annotated[DataConfig, FLAT] = DataConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    options: Annotated[TrainConfig, FLAT] = TrainConfig(),
) -> None:
    """Train a model through PAIR's stages.

    Parameters
    ----------
    data
        BEIR folder.

    Examples:
        What `pairdr label` wrote.
    """
    from pairdr.card import write_train_cards
    from pairdr.ranks import find_rank
    from pairdr.train import prepare_training, train_model

    quiet_libraries()
    start, stages = _beside(output, "start"), list_stages(arm, options)
    collection = prepare_training(data, data_options, model, options, start)
    train_model(collection, rows, start, stages, options, output, device=model.device)
    if find_rank() == 0:
        write_train_cards(output, start, collection, rows, stages, arm, (data_options, model, options))
        print_facts(read_manifest(output).facts["summary"])


def encode(
    data: Path,
    *,
    output: Annotated[Path, OUTPUT],
    on_duplicate: ON_DUPLICATE = "error",
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    options: Annotated[EncodeConfig, FLAT] = EncodeConfig(),
    ray: Annotated[RayConfig, FLAT] = RayConfig(),
) -> None:
    """Encode a corpus with a model (--start); an interrupted call goes on where it stopped."""
    from pairdr.collection import open_collection
    from pairdr.encode_ray import encode_collection

    quiet_libraries()
    collection = open_collection(data, DataConfig(on_duplicate=on_duplicate))
    store = encode_collection(collection, model, options, ray, output)
    print_text(f"{store.count} vectors of {store.dimensions} dimensions in {output}")


def search(
    place: Path,
    question: str | None = None,
    *,
    k: Annotated[int, Parameter(name=["-k", "--k"], help="Passages per question.")] = 10,
    as_json: Annotated[
        bool, Parameter(name="--json", negative="", help="One JSON object a line, for machines.")
    ] = False,
    words: Annotated[Path | None, Parameter(help="BM25 by `pairdr index-words`; a work folder has its own.")] = None,
    index: Annotated[
        str | None, Parameter(help="Index by `pairdr index`, or the URL of a database; unset: exact search.")
    ] = None,
    reranker: Annotated[
        str | None, Parameter(help="'teacher' for that of a work folder; else a cross-encoder's folder or hub name.")
    ] = None,
    queries: Annotated[Path | None, Parameter(help="Questions (.jsonl, or one a line) to write a run of.")] = None,
    data: Annotated[Path | None, Parameter(help="BEIR folder whose --split to write a run of.")] = None,
    split: Annotated[str, Parameter(help="Queries of this split.")] = "test",
    on_duplicate: ON_DUPLICATE = "error",
    output: Annotated[Path | None, OUTPUT] = None,
    options: Annotated[QueryConfig, ONE_EACH] = QueryConfig(),
    workers: Annotated[WorkersConfig, FLAT] = WorkersConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
) -> None:
    """Answer a question, or write a TREC run for many, from a work folder or from vectors and their model (--start).

    Parameters
    ----------
    place
        A work folder of `pairdr run`, or vectors of `pairdr encode`.
    """
    from pairdr.ask import answer_questions
    from pairdr.collection import open_collection
    from pairdr.searcher import Searcher

    quiet_libraries()
    if (question is None) == (output is None):
        raise UsageError("Name a question; or --output, and --queries or --data, to write a run.")
    searcher = Searcher.open(place, model, words=words, index=index, reranker=reranker, workers=workers)
    changes = {name: value for name, value in vars(options).items() if value != getattr(QueryConfig(), name)}
    if question is None and output is not None:
        collection = None if data is None else open_collection(data, DataConfig(on_duplicate=on_duplicate))
        found = answer_questions(searcher, output, k, queries=queries, collection=collection, split=split, **changes)
        print_text(f"{len(found)} queries in {output}/run.trec")
        return
    for rank, hit in enumerate(searcher.search(question or "", k, **changes), start=1):
        if as_json:
            fields = {"rank": rank, "passage_id": hit.passage_id, "score": hit.score}
            texts = {"title": hit.passage.title, "text": hit.passage.text}
            print_text(json.dumps(fields | texts | {"metadata": json.loads(hit.passage.metadata or "{}")}))
        else:
            text = " ".join(hit.passage.text.split())
            print_text(
                f"{rank:3}  {hit.score:8.4f}  {hit.passage_id}  {hit.passage.title}\n"
                f"     {text[:160]}{'...' if len(text) > 160 else ''}"
            )


def evaluate(
    place: Annotated[Path, Parameter(help="The run; or vectors or a work folder, to be searched.")],
    qrels: Annotated[Path | None, Parameter(help="The labels.")] = None,
    *,
    answers: Annotated[Path | None, Parameter(help="Accepted answers, in place of labels; needs --data.")] = None,
    data: Annotated[Path | None, Parameter(help="BEIR folder: its passages hold --answers; or it is searched.")] = None,
    queries: Annotated[Path | None, Parameter(help="Questions that --data lacks, for answers without ids.")] = None,
    split: Annotated[
        str | None, Parameter(help="Only questions of this split count; unset: all; test where vectors are searched.")
    ] = None,
    answer_mode: Annotated[Literal["dpr", "rocketqa"], Parameter(help="Whose rules read --answers.")] = "dpr",
    on_duplicate: ON_DUPLICATE = "error",
    output: Annotated[Path | None, OUTPUT] = None,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="For machines.")] = False,
    index: Annotated[str | None, Parameter(help="Of a search: as `pairdr search` takes it.")] = None,
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
    options: Annotated[EvaluateConfig, FLAT] = EvaluateConfig(),
) -> None:
    """Measure a run (TREC, or our Arrow form) against labels (BEIR or TREC), or against answers in its passages.

    Of vectors (with --start) or a work folder, search --split of --data, and measure that.
    """
    from pairdr.ask import can_be_asked, measure_searcher
    from pairdr.collection import open_collection
    from pairdr.evaluate import AnswerFiles, evaluate_files
    from pairdr.measures import mean_measures
    from pairdr.searcher import Searcher

    files = AnswerFiles(answers, data, queries, split, answer_mode, on_duplicate)
    if can_be_asked(place):
        if data is None or qrels is not None or files != AnswerFiles(data=data, split=split, on_duplicate=on_duplicate):
            raise UsageError(
                "A search is measured by the labels of a split of --data.",
                path=place,
                remedy="Name --data, and leave labels, --answers and --queries out.",
            )
        quiet_libraries()
        collection = open_collection(data, DataConfig(on_duplicate=on_duplicate))
        searcher = Searcher.open(place, model, index=index)
        values = measure_searcher(searcher, collection, split or "test", options, output)
    else:
        if index is not None or model != ModelConfig():
            raise UsageError("A run has been searched already.", path=place, remedy="Leave --index and --start out.")
        values = evaluate_files(place, qrels, files, options, output)
    means = mean_measures(values)
    print_text(json.dumps(means) if as_json else "\n".join(f"{name:20}{value:.4f}" for name, value in means.items()))


def _open_parts(
    data: Path, options: DataConfig, model: ModelConfig, lexical: LexicalConfig, output: Path
) -> tuple[Collection, DualEncoder, LexicalIndex]:
    from pairdr.collection import open_collection
    from pairdr.encoder import DualEncoder
    from pairdr.lexical import index_words

    quiet_libraries()
    collection = open_collection(data, options)
    return collection, DualEncoder.load(model), index_words(collection, lexical, _beside(output, "bm25"))


def _beside(output: Path, name: str) -> Path:
    """Return the place of a part that a command makes on its way."""
    return output.parent / f"{output.name}.{name}"


def _print_result(result: RunResult) -> None:
    print_text(result.table.format())
    done = f"{len(result.steps_run)} steps ran." if result.steps_run else "Nothing to do: everything is up to date."
    print_text(f"\n{done} The work folder is {result.work}.")
