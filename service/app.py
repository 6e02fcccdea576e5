"""The application: made from settings, with nothing read, loaded or started before its lifespan begins."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI

from dsg.service.middleware import RequestMiddleware
from dsg.service.models import LoadPredictor, load_predictor
from dsg.service.problems import install_problem_handlers
from dsg.service.routes import router
from dsg.service.settings import Settings
from dsg.service.state import Service


def create_app(settings: Settings, load_predictor: LoadPredictor = load_predictor) -> FastAPI:
    """Make the application of a server.

    Args:
        settings: all numbers and names.
        load_predictor: (name or path, device or None) -> Predictor; called for each model when the lifespan
            begins, and for each reload, on a thread of its own.

    Returns:
        an ASGI application. Its lifespan loads and warms the models, and fails with the loader's own error.
    """
    service = Service(settings, load_predictor)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            await service.start()
            yield
        finally:
            await service.stop()

    app = FastAPI(
        title="DSG",
        version=version("dsg"),
        description="Instance segmentation: pictures in, COCO instance masks out.",
        lifespan=lifespan,
        redirect_slashes=False,
        redoc_url=None,
    )
    app.state.service = service
    app.include_router(router)
    app.add_middleware(RequestMiddleware, service=service)
    install_problem_handlers(app)
    _describe_key(app)
    return app


def _describe_key(app: FastAPI) -> None:
    """Tell the OpenAPI document what the reload key is, for the /docs page's Authorize button."""
    plain = app.openapi

    def described() -> dict[str, Any]:
        document = plain()
        schemes = document.setdefault("components", {}).setdefault("securitySchemes", {})
        schemes["reload key"] = {"type": "http", "scheme": "bearer"}
        return document

    app.openapi = described  # type: ignore[method-assign]
