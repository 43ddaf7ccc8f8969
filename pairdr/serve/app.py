"""The paths: what each one takes, and who answers it."""

from __future__ import annotations

import asyncio
import json
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import FastAPI, Query, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.routing import Route

from pairdr import __version__
from pairdr.serve import forms
from pairdr.serve.failures import NO_JSON, ApiError, fail_status
from pairdr.serve.guard import Asgi, Guard, Keys
from pairdr.serve.labels import Feedback, Review
from pairdr.serve.measuring import CONTENT_TYPE, Meters
from pairdr.serve.service import Service, list_hits
from pairdr.store_config import Mode, ServeConfig

Answer = TypeVar("Answer")
MOST_SAID = 100
"""Characters of what a client has sent that an error repeats."""
SEARCH_PARAMETERS = {"q", "k", "mode", "rerank", "filter", "fold", "model"}
AUDIT_PARAMETERS = {"start", "count", "kind", "unmarked"}
REPEATED = {"q", "filter"}
"""Parameters that may have several values."""
IN_URL = {"query": "q", "queries": "q", "filters": "filter"}
"""Fields that have another name in a URL."""
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript"}
KEYED = [Security(HTTPBearer(auto_error=False, description="Where the service was started with --api-keys."))]
"""Says in the document what needs a key; `Guard` asks for it."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": forms.ErrorAnswer, "description": text}
    for status, text in {
        400: "No JSON.",
        401: "No key.",
        403: "A wrong key, or writing is off.",
        404: "No such model, or a part that was not started.",
        408: "The body came too slowly.",
        409: "Another writer is at work.",
        413: "The body is too large.",
        415: "Not sent as JSON.",
        421: "Another host's name.",
        422: "A wrong value, or one over a limit, which is named.",
        429: "Too much waits; Retry-After says when to come back.",
        500: "Something went wrong here.",
        503: "The service is stopping.",
        504: "It took too long.",
    }.items()
}


def create_app(
    service: Service, meters: Meters, keys: Keys, *, feedback: Feedback | None = None, review: Review | None = None
) -> Asgi:
    """Return the service as an ASGI application.

    Args:
        service: answers.
        meters: what is counted.
        keys: what opens it; none: it is open, and writing is off.
        feedback: where labels of results go; None: nowhere.
        review: an audit that is marked; None: there is none.
    """

    @asynccontextmanager
    async def live(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await service.stop()
        if feedback is not None:
            feedback.close()

    app = FastAPI(
        title="pairdr",
        version=__version__,
        description="Search, embeddings and reranking.",
        lifespan=live,
        docs_url=None,
        redirect_slashes=False,
        redoc_url=None,
        responses=ERRORS,
    )
    config = service.config
    _add_searching(app, service)
    _add_writing(app, service)
    _add_watching(app, service, meters, keys, feedback, review)
    if feedback is not None:
        _add_feedback(app, service, feedback)
    if review is not None:
        _add_review(app, config, review)
    pages = _add_pages(app)
    _add_errors(app)
    open_paths = frozenset({*pages, "/settings", "/health", "/ready"})
    return Guard(
        app,
        config=config,
        keys=keys,
        open_paths=open_paths,
        key_paths=("/passages",),
        busy_paths=frozenset({"/search", "/v1/embeddings"}),
        is_full=lambda: service.is_full,
        meters=meters,
    )


def _add_searching(app: FastAPI, service: Service) -> None:
    async def answer_search(form: forms.SearchForm) -> Response:
        begin = time.perf_counter()
        search, reranked, found = await _answer_in_time(service.search(form), service.config)
        return _write(
            {
                "model": search.snapshot.name,
                "version": search.snapshot.version,
                "mode": search.mode,
                "reranked": reranked,
                "milliseconds": round(1000 * (time.perf_counter() - begin), 2),
                "results": [
                    {"query": question, "hits": list_hits(hits)}
                    for question, hits in zip(form.questions, found, strict=True)
                ],
            }
        )

    @app.get(
        "/search", response_model=forms.SearchAnswer, summary="Search one question, or several", dependencies=KEYED
    )
    async def get_search(
        request: Request,
        q: Annotated[list[str], Query(description="The question; may be repeated.", min_length=1)],
        k: Annotated[int | None, Query(ge=1, description="Passages; unset: 10.")] = None,
        mode: Annotated[Mode, Query(description=_describe("mode"))] = "auto",
        rerank: Annotated[bool, Query(description=_describe("rerank"))] = False,
        filter: Annotated[list[str], Query(description="FIELD=VALUE of the metadata; may be repeated.")] = [],  # noqa: B006
        fold: Annotated[bool, Query(description=_describe("fold"))] = False,
        model: Annotated[str | None, Query(description=_describe("model"))] = None,
    ) -> Response:
        _require_parameters(request, SEARCH_PARAMETERS)
        questions: dict[str, Any] = {"query": q[0]} if len(q) == 1 else {"queries": q}
        values = {"k": k, "mode": mode, "rerank": rerank, "filters": filter, "fold": fold, "model": model}
        return await answer_search(forms.SearchForm.model_validate(questions | values))

    @app.post(
        "/search", response_model=forms.SearchAnswer, summary="Search one question, or several", dependencies=KEYED
    )
    async def post_search(form: forms.SearchForm) -> Response:
        return await answer_search(form)

    @app.post(
        "/v1/embeddings",
        response_model=forms.EmbeddingAnswer,
        summary="Texts to vectors, in OpenAI's form",
        dependencies=KEYED,
    )
    async def post_embeddings(form: forms.EmbeddingForm) -> Response:
        snapshot, vectors, tokens = await _answer_in_time(service.embed(form), service.config)
        data = [{"object": "embedding", "index": at, "embedding": vector} for at, vector in enumerate(vectors)]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return _write(
            {"object": "list", "data": data, "model": snapshot.name, "version": snapshot.version, "usage": usage}
        )

    @app.post(
        "/v1/rerank",
        response_model=forms.RerankAnswer,
        summary="Order texts, in Cohere's and Jina's form",
        dependencies=KEYED,
    )
    async def post_rerank(form: forms.RerankForm) -> Response:
        name, version, ranked = await _answer_in_time(service.rerank(form), service.config)
        results: list[dict[str, Any]] = [{"index": index, "relevance_score": score} for index, score in ranked]
        if form.return_documents:
            documents = form.passages
            for result in results:
                passage = documents[result["index"]]
                result["document"] = {"title": passage.title, "text": passage.text}
        return _write({"model": name, "version": version, "results": results})

    @app.get(
        "/v1/models",
        response_model=forms.ModelList,
        summary="Models that are served, the default first",
        dependencies=KEYED,
    )
    async def get_models() -> Response:
        return _write(forms.ModelList(data=[forms.ServedModel(id=name) for name in service.shelf.names]).model_dump())


def _add_writing(app: FastAPI, service: Service) -> None:
    @app.post(
        "/passages",
        response_model=forms.WriteAnswer,
        summary="Add passages, or change their text; needs a key",
        dependencies=KEYED,
    )
    async def post_passages(form: forms.UpsertForm) -> Response:
        snapshot = await _answer_in_time(service.upsert(form.passages), service.config)
        return _write({"version": snapshot.version, "passages": snapshot.searcher.store.live})

    @app.post(
        "/passages/delete",
        response_model=forms.WriteAnswer,
        summary="Take passages out; needs a key",
        dependencies=KEYED,
    )
    async def delete_passages(form: forms.DeleteForm) -> Response:
        snapshot = await _answer_in_time(service.delete(form.ids), service.config)
        return _write({"version": snapshot.version, "passages": snapshot.searcher.store.live})


def _add_watching(
    app: FastAPI, service: Service, meters: Meters, keys: Keys, feedback: Feedback | None, review: Review | None
) -> None:
    @app.get("/settings", summary="What the page shows: models, ways, limits")
    async def get_settings() -> Response:
        config = service.config
        limits = {"k": config.most_results, "texts": config.most_texts, "characters": config.most_characters}
        return _write(
            {
                "models": [_describe_model(service, name) for name in service.shelf.names],
                "limits": limits,
                "keys": len(keys) > 0,
                "feedback": feedback is not None,
                "audit": review is not None,
            }
        )

    @app.get("/health", summary="Is the process alive?")
    async def get_health() -> Response:
        return _write({"status": "ok"})

    @app.get("/ready", summary="Does it take requests?")
    async def get_ready() -> Response:
        if service.draining:
            raise ApiError(503, "not_ready", "The service is stopping.")
        return _write({"status": "ready"} | ({"stale": service.shelf.stale} if service.shelf.stale else {}))

    for path, answer in (("/health", get_health), ("/ready", get_ready)):  # load balancers ask so
        app.add_api_route(path, answer, methods=["HEAD"], include_in_schema=False)

    @app.get(
        "/metrics",
        summary="Counters, as Prometheus reads them",
        responses={200: {"content": {"text/plain": {}}}},
        dependencies=KEYED,
    )
    async def get_metrics() -> Response:
        return Response(meters.write(), media_type=CONTENT_TYPE)


def _add_feedback(app: FastAPI, service: Service, feedback: Feedback) -> None:
    @app.post("/feedback", summary="Say whether a passage answers a question", dependencies=KEYED)
    def post_feedback(form: forms.FeedbackForm) -> Response:
        service.require_texts("query", [form.query])
        if form.relevant is not None:
            service.require_passage(form.passage_id)
        return _write({"labels": feedback.label(form.query, form.passage_id, form.relevant)})


def _add_review(app: FastAPI, config: ServeConfig, review: Review) -> None:
    @app.get("/audit", summary="Labels that look wrong, the worst first", dependencies=KEYED)
    def get_audit(
        request: Request,
        start: Annotated[int, Query(ge=0)] = 0,
        count: Annotated[int, Query(ge=1, le=1000)] = 20,
        kind: str | None = None,
        unmarked: bool = False,
    ) -> Response:
        _require_parameters(request, AUDIT_PARAMETERS)
        return _write(review.list(start, count, kind, unmarked))

    @app.post("/audit", summary="Mark one of them", dependencies=KEYED)
    def post_audit(form: forms.MarkForm) -> Response:
        return _write(review.mark(form.query_id, form.passage_id, form.mark))


def _add_pages(app: FastAPI) -> list[str]:
    """Add every file of page/ as a path of its own; what a client asks for is never opened."""
    paths = []
    for file in sorted(files("pairdr.serve").joinpath("page").iterdir(), key=lambda file: file.name):
        name = Path(file.name)
        path = f"/{name}" if name.suffix != ".html" else "/" if name.stem == "index" else f"/{name.stem}"
        answer = Response(
            file.read_bytes(), media_type=f"{TYPES[name.suffix]}; charset=utf-8", headers={"cache-control": "no-cache"}
        )
        app.add_route(path, _answer_with(answer), methods=["GET"], include_in_schema=False)
        paths.append(path)
    return paths


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def answer_error(_: Request, error: ApiError) -> Response:
        return _write(error.body, error.status, error.headers)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(ValidationError)
    async def answer_invalid(_: Request, error: RequestValidationError | ValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            return _write(ApiError(400, "invalid_json", NO_JSON).body, 400)
        if isinstance(error, RequestValidationError):
            loc = first["loc"][1:]  # without body or query
        else:  # of a search by URL
            loc = tuple(IN_URL.get(str(part), part) for part in first["loc"])
        place = ".".join(str(part) for part in loc)[:MOST_SAID]
        what = str(first["msg"]).removeprefix("Value error, ")
        return _write(ApiError(422, "invalid_value", f"{place}: {what}." if place else f"{what}.").body, 422)

    @app.exception_handler(HTTPException)
    async def answer_status(request: Request, error: HTTPException) -> Response:
        cause = error.__cause__  # a body that is too large or too slow fails where it is read
        found = cause if isinstance(cause, ApiError) else fail_status(error.status_code, str(error.detail))
        headers = found.headers | {name.lower(): value for name, value in (error.headers or {}).items()}
        if found.status in (408, 413):
            headers["connection"] = "close"
        if found.status == 405:  # the framework names those of one route, and a path may have more
            path = request.url.path
            methods = [route.methods or () for route in app.routes if isinstance(route, Route) and route.path == path]
            headers["allow"] = ", ".join(sorted(set().union(*methods)))
        return _write(found.body, found.status, headers)

    @app.exception_handler(Exception)
    async def answer_unexpected(_: Request, error: Exception) -> Response:
        body = ApiError(500, "internal", "Something went wrong here; the log says more.").body
        return _write(body, 500, {"connection": "close"})  # the server closes it, and the client has to know


def _require_parameters(request: Request, known: set[str]) -> None:
    """Refuse what would mean nothing: a parameter that is none, and a second value where one counts."""
    for name, count in Counter(name for name, _ in request.query_params.multi_items()).items():
        if name not in known:
            there = ", ".join(sorted(known))
            raise ApiError(422, "invalid_value", f"{name[:MOST_SAID]!r} is no parameter. There are: {there}.")
        if count > 1 and name not in REPEATED:
            raise ApiError(422, "invalid_value", f"{name} is given {count} times. Give it once.")


def _describe(field: str) -> str:
    """Return what a field of a search is: the same in a body and in a URL."""
    return forms.SearchForm.model_fields[field].description or ""


def _describe_model(service: Service, name: str) -> dict[str, Any]:
    snapshot = service.shelf.take(name)
    searcher = snapshot.searcher
    return {
        "id": name,
        "version": snapshot.version,
        "passages": searcher.store.live,
        "dimensions": searcher.store.dimensions,
        "widths": list(snapshot.widths),
        "similarity": searcher.store.similarity,
        "modes": list(searcher.modes),
        "default_mode": searcher.settle().mode,
        "reranker": searcher.reranker is not None,
    }


def _answer_with(answer: Response) -> Any:
    async def answer_page(_: Request) -> Response:
        return answer

    return answer_page


async def _answer_in_time(work: Awaitable[Answer], config: ServeConfig) -> Answer:
    try:
        async with asyncio.timeout(config.request_seconds):
            return await work
    except TimeoutError as error:
        raise ApiError(504, "timeout", f"There was no answer within {config.request_seconds:g} seconds.") from error


def _write(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, headers, media_type="application/json")
