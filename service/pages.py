"""Pages for people: one to try the service on, one that shows its endpoints. Nothing in them comes from elsewhere."""

from functools import cache
from importlib.resources import files

from fastapi import APIRouter
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import HTMLResponse
from starlette.responses import Response

router = APIRouter(include_in_schema=False)
PROBED = ["GET", "HEAD"]
"""Methods of what load balancers and people look at."""
# The pages run what is in them and talk to this server; nothing else may come in.
_POLICY = (
    "default-src 'none'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
# Swagger's files as a package brings them; FastAPI's own page would fetch them from a CDN.
_ASSETS = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}
_A_DAY = {"Cache-Control": "public, max-age=86400"}


@router.api_route("/", methods=PROBED, response_class=HTMLResponse)
def try_it() -> HTMLResponse:
    """A page to try the service."""
    return HTMLResponse(_read("dsg.service", "page/index.html"), headers={"Content-Security-Policy": _POLICY})


@router.api_route("/docs", methods=PROBED, response_class=HTMLResponse)
def docs() -> HTMLResponse:
    """The endpoints, to be tried."""
    page = get_swagger_ui_html(
        openapi_url="openapi.json",
        title="DSG: endpoints",
        swagger_js_url="docs/swagger-ui-bundle.js",
        swagger_css_url="docs/swagger-ui.css",
        swagger_favicon_url="data:,",
    )
    return HTMLResponse(page.body, headers={"Content-Security-Policy": _POLICY})


def _asset(name: str) -> None:
    @router.get(f"/docs/{name}")
    def send() -> Response:
        return Response(_read("fastapi_offline", f"static/{name}"), media_type=_ASSETS[name], headers=_A_DAY)


for _name in _ASSETS:
    _asset(_name)


@cache
def _read(package: str, path: str) -> bytes:
    return files(package).joinpath(path).read_bytes()
