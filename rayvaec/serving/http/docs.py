"""`/docs`: Swagger UI served without another network."""

from __future__ import annotations

from importlib import resources

from fastapi import FastAPI
from fastapi.responses import FileResponse, HTMLResponse, Response

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>rayvaec: docs</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<link rel="stylesheet" href="docs/swagger-ui.css">
<link rel="icon" href="data:,">
</head>
<body>
<form id="token" style="font: 16px sans-serif; margin: 4em auto; max-width: 30em" hidden>
<p>This endpoint needs a token: the requests and answers are described to those who have it.</p>
<input type="password" aria-label="Token" autocomplete="off" size="40"> <button>Show</button>
<p id="refused" role="alert" hidden>This is not the token.</p>
</form>
<div id="swagger"></div>
<script src="docs/swagger-ui-bundle.js"></script>
<script src="docs/start.js"></script>
</body>
</html>
"""

_SCRIPT = """// Shows /openapi.json; a token, where one is needed, is kept in this page alone.
let token = "";
const withToken = (request) => {
  if (token) request.headers = { ...request.headers, Authorization: `Bearer ${token}` };
  return request;
};
const form = document.getElementById("token");
const start = async () => {
  const answer = await fetch("openapi.json", withToken({}));
  form.hidden = answer.status !== 401;
  if (answer.status === 401) {
    document.getElementById("refused").hidden = !token;
    form.querySelector("input").focus();
    return;
  }
  window.SwaggerUIBundle({
    spec: await answer.json(),
    dom_id: "#swagger",
    requestInterceptor: withToken,
    tryItOutEnabled: true,
  });
};
form.addEventListener("submit", (event) => {
  event.preventDefault();
  token = form.querySelector("input").value.trim();
  start();
});
start();
"""

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
}
_FILES = {"swagger-ui-bundle.js": "text/javascript", "swagger-ui.css": "text/css"}


def add_docs(app: FastAPI) -> None:
    """Add the page and its files to an application.

    Parameters
    ----------
    app : FastAPI
        The application, without a /docs of its own.
    """
    static = resources.files("fastapi_offline") / "static"

    @app.get("/docs", include_in_schema=False)
    async def docs() -> Response:
        return HTMLResponse(_PAGE, headers=_HEADERS)

    @app.get("/docs/start.js", include_in_schema=False)
    async def script() -> Response:
        return Response(_SCRIPT, media_type="text/javascript", headers=_HEADERS)

    def add(name: str, kind: str) -> None:
        @app.get(f"/docs/{name}", include_in_schema=False)
        async def file() -> Response:
            return FileResponse(str(static / name), media_type=kind, headers=_HEADERS)

    for name, kind in _FILES.items():
        add(name, kind)
