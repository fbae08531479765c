"""Static files of the endpoint's web page, and their security headers.

The page asks the endpoint for everything that it shows, as any client does, so its files tell
nothing about the model and need no token.
"""

from __future__ import annotations

from importlib.resources import files

from fastapi import FastAPI, Response

_FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page/icon.svg": ("icon.svg", "image/svg+xml"),
    **{
        f"/page/{name}.js": (f"{name}.js", "text/javascript; charset=utf-8")
        for name in ("api", "charts", "csv", "download", "draws", "form", "page", "results")
    },
}
PATHS = frozenset(_FILES)
"""Where the page's files are."""

_HEADERS = {
    # Scripts and styles are the endpoint's own files; requests go to the endpoint alone.
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


def add_page(app: FastAPI) -> None:
    """Add the page's files to an application.

    Parameters
    ----------
    app : FastAPI
        The endpoint.
    """
    for path, (name, media_type) in _FILES.items():
        content = files(__name__).joinpath(name).read_bytes()
        _add_file(app, path, content, media_type)


def _add_file(app: FastAPI, path: str, content: bytes, media_type: str) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(content, media_type=media_type, headers=_HEADERS)
