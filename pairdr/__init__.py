"""pairdr: dense passage retrievers trained, evaluated, indexed and served the PAIR way.

Every name below is imported when it is first used, so that `import pairdr` costs nothing.
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "AuditConfig": "store_config",
    "Collection": "collection",
    "DataConfig": "config",
    "DualEncoder": "encoder",
    "EncodeConfig": "config",
    "Encoder": "backends",
    "EvaluateConfig": "config",
    "ExportConfig": "store_config",
    "FaissIndex": "indexes.faiss",
    "IndexConfig": "store_config",
    "LabelConfig": "config",
    "LexicalConfig": "config",
    "MineConfig": "config",
    "ModelConfig": "config",
    "PairLoss": "losses",
    "PairdrError": "errors",
    "ReportConfig": "store_config",
    "RunConfig": "config",
    "SearchConfig": "config",
    "Searcher": "searcher",
    "TeachConfig": "config",
    "TrainConfig": "config",
    "VectorStore": "vectors",
    "apply_audit": "relabel",
    "audit_labels": "audit",
    "build_index": "index",
    "check_collection": "check",
    "choose_teacher": "teach",
    "compact_store": "versions",
    "delete_passages": "versions",
    "encode_corpus": "encode",
    "evaluate_answers": "evaluate",
    "evaluate_run": "evaluate",
    "export_data": "exchange.exports",
    "export_model": "export",
    "import_data": "exchange.imports",
    "index_words": "lexical",
    "label_examples": "label",
    "mine_candidates": "mine",
    "open_collection": "collection",
    "open_encoder": "backends",
    "pair_loss": "losses",
    "passage_centric_loss": "losses",
    "plan_run": "pipeline",
    "query_centric_loss": "losses",
    "read_answers": "answers",
    "read_audit": "findings",
    "read_run": "formats",
    "reproduce_run": "reproduce",
    "run_pipeline": "pipeline",
    "train_model": "train",
    "upsert_passages": "encode",
    "write_marks": "findings",
    "write_report": "report_page",
}
__all__ = [*sorted(_HOME)]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'pairdr' has no attribute {name!r}")
    return getattr(import_module(f"pairdr.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted(_HOME)
