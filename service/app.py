"""The application: made from settings, with nothing read, loaded or started before its lifespan begins."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.metadata import version

from fastapi import FastAPI
from starlette.middleware.cors import CORSMiddleware

from dsg.service import operations, pages, routes
from dsg.service.devices import LoadPredictor
from dsg.service.middleware import RequestMiddleware
from dsg.service.models import loader
from dsg.service.openapi import describe
from dsg.service.problems import install_problem_handlers
from dsg.service.settings import Settings
from dsg.service.state import Service


def create_app(settings: Settings, load_predictor: LoadPredictor | None = None) -> FastAPI:
    """Make the application of a server.

    Args:
        settings: all numbers and names.
        load_predictor: (name or path, device or None) -> Predictor; called for each model and device when the
            lifespan begins, and for each reload, on a thread or in a process of its own. None loads checkpoints and
            exported files as the settings say.

    Returns:
        an ASGI application. Its lifespan loads and warms the models, and fails with the loader's own error.

    Raises:
        ValueError: the settings name devices or tracing that are not there.
    """
    service = Service(settings, load_predictor or loader(settings))

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
        docs_url=None,
        redoc_url=None,
    )
    app.state.service = service
    for module in (routes, operations, pages):
        app.include_router(module.router)
    if settings.origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.origins,
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-API-Key", "X-Request-Id", "X-Timeout-Ms"],
            expose_headers=["Retry-After", "Server-Timing", "X-Request-Id"],
        )
    app.add_middleware(RequestMiddleware, service=service)
    install_problem_handlers(app)
    describe(app, needs_key=bool(settings.keys))
    return app
