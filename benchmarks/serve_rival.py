"""What `benchmarks/serve.py` measures pairdr beside: a plain service of FastAPI and sentence-transformers, no batches.

    python benchmarks/serve_rival.py MODEL FOLDER [--threads 2]

FOLDER holds vectors.npy [N, D] and passages.jsonl, a line a row. Each request is answered by a thread of the server's
pool, which encodes its one text in fp32 and multiplies the question with all vectors.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from sentence_transformers import SentenceTransformer


class Question(BaseModel):
    """A search."""

    query: str
    k: int = 10


class Text(BaseModel):
    """A text to be encoded."""

    input: str


def create_app(model: SentenceTransformer, vectors: torch.Tensor, passages: list[dict[str, Any]]) -> FastAPI:
    """Return the service over [N, D] normalised vectors and the passages in their order."""
    app = FastAPI()

    def encode(text: str) -> torch.Tensor:
        return model.encode(text, normalize_embeddings=True, convert_to_tensor=True, show_progress_bar=False)

    @app.get("/ready")
    def get_ready() -> dict[str, str]:
        return {"status": "ready"}

    @app.post("/search")
    def search(question: Question) -> dict[str, Any]:
        scores, rows = torch.topk(vectors @ encode(question.query), question.k)
        hits = [passages[row] | {"score": score} for score, row in zip(scores.tolist(), rows.tolist(), strict=True)]
        return {"model": "rival", "results": [{"query": question.query, "hits": hits}]}

    @app.post("/v1/embeddings")
    def embed(text: Text) -> dict[str, Any]:
        data = [{"object": "embedding", "index": 0, "embedding": encode(text.input).tolist()}]
        return {"object": "list", "data": data, "model": "rival"}

    return app


def main() -> None:
    """Load everything and serve it on a free port of loopback."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--threads", type=int, default=2, help="of a request")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    lines = (options.folder / "passages.jsonl").read_text(encoding="utf-8").split("\n")
    passages = [json.loads(line) for line in lines if line]
    vectors = torch.from_numpy(np.load(options.folder / "vectors.npy"))
    app = create_app(SentenceTransformer(options.model, device="cpu"), vectors, passages)
    uvicorn.run(app, host="127.0.0.1", port=0, http="httptools", access_log=False)


if __name__ == "__main__":
    main()
