"""What `pairdr serve` does."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import Parameter

from pairdr.commands import FLAT, ONE_EACH
from pairdr.config import ModelConfig
from pairdr.errors import MissingExtraError
from pairdr.progress import quiet_libraries
from pairdr.store_config import ServeConfig, WorkersConfig


def serve(
    place: Path,
    *,
    words: Annotated[Path | None, Parameter(help="BM25 by `pairdr index-words`; a work folder has its own.")] = None,
    index: Annotated[
        str | None, Parameter(help="Index by `pairdr index`, or the URL of a database; unset: exact search.")
    ] = None,
    reranker: Annotated[
        str | None, Parameter(help="'teacher' for that of a work folder; else a cross-encoder's folder or hub name.")
    ] = None,
    api_keys: Annotated[
        Path | None, Parameter(help="File of keys, one a line, that requests need; or PAIRDR_API_KEYS=KEY,KEY.")
    ] = None,
    feedback: Annotated[Path | None, Parameter(help="Folder for what people say of results; unset: not asked.")] = None,
    audit: Annotated[Path | None, Parameter(help="What `pairdr audit` wrote, to be marked on the page.")] = None,
    options: Annotated[ServeConfig, ONE_EACH] = ServeConfig(),
    workers: Annotated[WorkersConfig, FLAT] = WorkersConfig(),
    model: Annotated[ModelConfig, FLAT] = ModelConfig(),
) -> None:
    """Serve a search page and an API from a work folder, or from vectors and their model (--start).

    Of a work folder, --start names an export of its model, which then answers in its place.

    Parameters
    ----------
    place
        A work folder of `pairdr run`, or vectors of `pairdr encode`.
    """
    try:
        from pairdr.serve.app import create_app
        from pairdr.serve.run import bind_address, serve_app
    except ModuleNotFoundError as error:
        if error.name is None or error.name.startswith("pairdr"):
            raise
        raise MissingExtraError(error.name, "serve") from error
    from pairdr.serve.guard import Keys
    from pairdr.serve.labels import Feedback, Review
    from pairdr.serve.measuring import Meters
    from pairdr.serve.service import Service
    from pairdr.serve.shelf import Shelf

    quiet_libraries()
    with bind_address(options) as listener:
        # What can be wrong at once is said before a model is loaded.
        keys, meters = Keys.read(api_keys), Meters()
        labels = None if feedback is None else Feedback(feedback)
        review = None if audit is None else Review(audit)
        shelf = Shelf(
            place,
            model,
            options.models,
            words=words,
            index=index,
            reranker=reranker,
            workers=workers,
            writes=len(keys) > 0,
            batch_texts=options.batch_texts,
            clock=meters.clock,
        )
        service = Service(shelf, options, meters)
        app = create_app(service, meters, keys, feedback=labels, review=review)
        serve_app(app, service, keys, listener)
