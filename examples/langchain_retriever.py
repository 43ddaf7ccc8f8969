"""A pairdr service, or a saved folder, as a LangChain retriever.

```
pip install langchain-core
pairdr serve work &
python examples/langchain_retriever.py http://127.0.0.1:8000 "how do I parse a date?"
python examples/langchain_retriever.py work "how do I parse a date?"          # no service: the folder itself
```
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any
from urllib.request import Request, urlopen

from langchain_core.callbacks import CallbackManagerForRetrieverRun
from langchain_core.documents import Document
from langchain_core.retrievers import BaseRetriever
from pydantic import Field

import pairdr


class ServiceRetriever(BaseRetriever):
    """Asks a service that `pairdr serve` started.

    Attributes:
        url: where it listens.
        k: documents per question.
        key: where it was started with --api-keys.
        options: further fields of POST /search, such as {"mode": "dense", "filters": ["language=en"]}.
    """

    url: str = "http://127.0.0.1:8000"
    k: int = 4
    key: str | None = None
    options: dict[str, Any] = Field(default_factory=dict)

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        body = json.dumps({"query": query, "k": self.k} | self.options).encode()
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        with urlopen(Request(f"{self.url.rstrip('/')}/search", body, headers), timeout=60) as answer:
            hits = json.load(answer)["results"][0]["hits"]
        return [make_document(hit["id"], hit["text"], hit["title"], hit["score"], hit["metadata"]) for hit in hits]


class FolderRetriever(BaseRetriever):
    """Searches a work folder in this process.

    Attributes:
        searcher: an opened `pairdr.Searcher`.
        k: documents per question.
    """

    searcher: Any
    k: int = 4

    def _get_relevant_documents(self, query: str, *, run_manager: CallbackManagerForRetrieverRun) -> list[Document]:
        return [
            make_document(found, passage.text, passage.title, score, json.loads(passage.metadata or "{}"))
            for found, score, passage in self.searcher.search(query, k=self.k)
        ]


def make_document(passage_id: str, text: str, title: str, score: float, metadata: dict[str, Any]) -> Document:
    """Return a found passage as LangChain's document."""
    return Document(text, id=passage_id, metadata=metadata | {"title": title, "score": score})


def main(place: str, question: str) -> None:
    """Print what is found."""
    retriever: BaseRetriever = (
        ServiceRetriever(url=place, key=os.environ.get("PAIRDR_KEY"))
        if place.startswith("http")
        else FolderRetriever(searcher=pairdr.Searcher.open(place))
    )
    for document in retriever.invoke(question):
        print(f"{document.metadata['score']:8.4f}  {document.id}  {document.page_content[:100]!r}")


if __name__ == "__main__":
    main(*sys.argv[1:])
