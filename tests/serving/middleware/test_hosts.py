"""DNS rebinding and requests of other sites: which Host and Origin headers are answered."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx
import pytest
from starlette.datastructures import Headers

from rayvaec.errors import ConfigError, RequestError
from rayvaec.serving.middleware.auth import digest
from rayvaec.serving.middleware.hosts import AllowedHosts, host_name
from rayvaec.serving.page import PATHS as PAGE_PATHS

TOKEN = "0123456789abcdef0123"
NEW = {"label": "type_1", "library": 50, "seed": 3}

OWN = [
    "localhost",
    "localhost:8000",
    "LOCALHOST:1",
    "localhost.",
    "LocalHost.:65535",
    "localhost:",
    "127.0.0.1",
    "127.0.0.1:8000",
    "127.1.2.3:80",
    "[::1]",
    "[::1]:8000",
    "[0:0:0:0:0:0:0:1]:8000",
    "[::ffff:127.0.0.1]",
]
FOREIGN = [
    "evil.example",
    "evil.example:8000",
    "localhost.evil.example",
    "127.0.0.1.evil.example",
    "evil-localhost",
    "xlocalhost",
    "localhost..",
    "localhost:8000:8000",
    "localhost@evil.example",
    "evil.example/localhost",
    "localhost evil.example",
    "localhost,evil.example",
    "192.0.2.1",
    "0.0.0.0:8000",
    "2130706433",
    "0x7f000001",
    "127.1",
    "[::2]:8000",
    "[::]",
    "::1",
    "[::1%25eth0]",
    "[localhost]",
    "[::1",
    ":8000",
    ".",
    "",
]
NOT_HOSTS = [
    "",
    "*",
    "*.*.example",
    "a b",
    "https://draws.example",
    "draws.example:8000",
    "a/b",
    "-a",
]


def status(hosts: AllowedHosts, *pairs: tuple[str, str], path: str = "/v1/model") -> int:
    """Return what is answered: 200 where the request is let through."""
    raw = [(name.encode(), value.encode()) for name, value in pairs]
    try:
        hosts.check(path, Headers(raw=raw))
    except RequestError as error:
        return error.status
    return 200


@pytest.mark.parametrize("host", OWN)
def test_loopback_is_answered_under_every_spelling_and_port(host):
    for listed in ([], ["draws.example"]):
        assert status(AllowedHosts(listed, has_token=False), ("host", host)) == 200
        assert status(AllowedHosts(listed, has_token=True), ("host", host)) == 200


@pytest.mark.parametrize("host", FOREIGN)
def test_other_hosts_are_answered_only_with_a_token(host):
    assert status(AllowedHosts([], has_token=False), ("host", host)) == 421
    assert status(AllowedHosts(["draws.example"], has_token=False), ("host", host)) == 421
    assert status(AllowedHosts(["draws.example"], has_token=True), ("host", host)) == 421
    assert status(AllowedHosts([], has_token=True), ("host", host)) == 200


@pytest.mark.parametrize("has_token", [True, False])
@pytest.mark.parametrize(
    ("listed", "host", "allowed"),
    [
        ("draws.example", "draws.example", True),
        ("Draws.Example.", "DRAWS.example:443", True),
        ("draws.example", "x.draws.example", False),
        ("draws.example", "xdraws.example", False),
        ("*.draws.example", "a.b.draws.example:1", True),
        ("*.draws.example", "draws.example", False),
        ("*.draws.example", "xdraws.example", False),
        ("192.0.2.7", "192.0.2.7:8000", True),
        ("192.0.2.7", "192.0.2.70", False),
        ("[2001:DB8::0:1]", "[2001:db8::1]:8000", True),
        ("2001:db8::1", "[2001:db8:0::1]", True),
    ],
)
def test_listed_hosts_are_answered_with_any_port(listed, host, allowed, has_token):
    hosts = AllowedHosts([listed], has_token)
    assert status(hosts, ("host", host)) == (200 if allowed else 421)


@pytest.mark.parametrize("name", NOT_HOSTS)
def test_what_is_not_a_host_name_cannot_be_listed(name):
    with pytest.raises(ConfigError, match="`allowed_hosts` .* is not a host name"):
        AllowedHosts([name], has_token=True)


@pytest.mark.parametrize(("given", "name"), [("https://a.example/x", "a.example"), ("b:80", "b")])
def test_the_name_in_a_url_or_before_a_port_is_proposed(given, name):
    with pytest.raises(ConfigError, match=f"give the name alone: {name}$"):
        AllowedHosts([given], has_token=True)


@pytest.mark.parametrize("pairs", [[], [("host", "localhost")] * 2])
def test_a_request_has_one_host_header(pairs):
    assert status(AllowedHosts([], has_token=False), *pairs) == 400
    assert status(AllowedHosts([], has_token=True), *pairs) == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_probes_may_name_the_address_of_a_pod(path):
    for pairs in ([("host", "10.0.0.7:8000")], [], [("host", "a"), ("host", "b")]):
        assert status(AllowedHosts([], has_token=False), *pairs, path=path) == 200
    assert status(AllowedHosts([], False), ("host", "a"), path=f"{path}/x") == 421


@pytest.mark.parametrize(
    ("origin", "answer"),
    [
        ("http://localhost:8000", 200),
        ("HTTP://LOCALHOST:8000", 200),
        ("https://hub.example", 200),
        ("http://localhost:3000", 403),
        ("http://localhost", 403),
        ("http://evil.example", 403),
        ("http://evil.example:8000", 403),
        ("http://hub.example.evil.example", 403),
        ("null", 403),
        ("", 403),
    ],
)
def test_pages_of_other_origins_are_refused_without_a_token(origin, answer):
    pairs = [("host", "localhost:8000"), ("origin", origin)]
    assert status(AllowedHosts(["hub.example"], has_token=False), *pairs) == answer
    assert status(AllowedHosts(["hub.example"], has_token=True), *pairs) == 200


def test_every_path_but_the_probes_is_guarded(http: Any):
    paths = [
        *PAGE_PATHS,
        "/docs",
        "/openapi.json",
        "/metrics",
        "/v1/model",
        "/v1/models",
        "/nowhere",
    ]
    requests = [("GET", path, {"headers": {"Host": "evil.example"}}) for path in paths]
    requests.append(("POST", "/v1/generate", {"json": NEW, "headers": {"Host": "evil.example"}}))
    for answer in http.together(*requests):
        assert answer.status_code == 421, answer.request.url
        said = answer.json()
        assert said["error"] == "misdirected"
        assert "'evil.example'" in said["detail"]
        assert "--allowed-host" in said["fix"]
    for path in ("/healthz", "/readyz"):
        assert http.get(path, headers={"Host": "10.0.0.7"}).status_code == 200


SIMPLE = [
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    None,
]


@pytest.mark.parametrize("kind", [*SIMPLE, "text/plain; application/json"])
def test_a_form_of_another_site_is_not_worked_on(http: Any, kind):
    headers = {"Content-Type": kind} if kind else {}
    plain = http.post("/v1/generate", content=b'{"label": "type_1"}', headers=headers)
    assert plain.status_code == 415
    crossed = {**headers, "Origin": "http://evil.example"}
    assert http.post("/v1/generate", content=b"{}", headers=crossed).status_code == 403
    assert "Access-Control-Allow-Origin" not in plain.headers


def test_no_site_is_given_permission(http: Any):
    asked = {"Origin": "http://localhost:8000", "Access-Control-Request-Method": "POST"}
    answer = http.together(("OPTIONS", "/v1/generate", {"headers": asked}))[0]
    assert answer.status_code in (403, 405)
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_hosts_of_an_endpoint_with_a_token(serve_with: Any):
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": "draws.example"}
    assert serve_with(digest(TOKEN)).get("/v1/model", headers=headers).status_code == 200
    bound = serve_with(digest(TOKEN), allowed_hosts=["other.example"])
    assert bound.get("/v1/model", headers=headers).status_code == 421
    assert bound.get("/v1/model", headers={"Host": "draws.example"}).status_code == 401
    headers["Host"] = "other.example:8000"
    assert bound.get("/v1/model", headers=headers).status_code == 200


def test_a_websocket_is_closed_whatever_its_host(http: Any):
    async def go() -> list[Any]:
        sent: list[Any] = []
        scope = {
            "type": "websocket",
            "path": "/v1/model",
            "headers": [(b"host", b"localhost")],
            "subprotocols": [],
            "query_string": b"",
        }

        async def receive() -> Any:
            return {"type": "websocket.connect"}

        async def send(message: Any) -> None:
            sent.append(message)

        await http.app(scope, receive, send)
        return sent

    assert [message["type"] for message in asyncio.run(go())] == ["websocket.close"]


@pytest.mark.parametrize(
    ("authority", "name"), [("A.b.:1", "a.b"), ("[::1]:8", "::1"), ("a:b", None), ("[::1]x", None)]
)
def test_the_host_of_an_authority(authority, name):
    assert host_name(authority) == name


GETS = ["/", "/healthz", "/readyz", "/v1/model", "/v1/models", "/metrics", "/docs", "/page/csv.js"]


@pytest.mark.parametrize("path", GETS)
def test_head_is_answered_wherever_get_is(http: Any, path):
    got, head = http.together(("GET", path, {}), ("HEAD", path, {}))
    assert got.status_code == head.status_code == 200
    assert head.content == b""
    same = {"content-type", "x-rayvaec-model", "content-security-policy"}
    assert {n: head.headers.get(n) for n in same} == {n: got.headers.get(n) for n in same}


@pytest.mark.parametrize(
    ("method", "path", "allow"),
    [
        ("POST", "/healthz", {"GET", "HEAD"}),
        ("DELETE", "/", {"GET", "HEAD"}),
        ("OPTIONS", "/v1/model", {"GET", "HEAD"}),
        ("HEAD", "/v1/sample", {"POST"}),
        ("GET", "/v1/generate", {"POST"}),
        ("BREW", "/v1/generate", {"POST"}),
    ],
)
def test_other_methods_are_told_which_are_allowed(http: Any, method, path, allow):
    answer: httpx.Response = http.together((method, path, {}))[0]
    assert answer.status_code == 405
    assert {name.strip() for name in answer.headers["Allow"].split(",")} == allow


def test_head_needs_the_token_as_get_does(serve_with: Any):
    http = serve_with(digest(TOKEN))
    head = http.together(("HEAD", "/v1/model", {}), ("HEAD", "/healthz", {}))
    assert [answer.status_code for answer in head] == [401, 200]
