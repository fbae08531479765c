from __future__ import annotations

import pytest

from rayvaec.errors import ConfigError
from rayvaec.serving.middleware.auth import (
    arrived_on_loopback,
    authorized,
    check_bind,
    digest,
    is_loopback,
    token_digest,
)

TOKEN = "0123456789abcdef0123"


@pytest.fixture(autouse=True)
def _no_token_set(monkeypatch):
    monkeypatch.delenv("RAYVAEC_TOKEN", raising=False)


def test_the_token_comes_from_file_or_environment(monkeypatch, tmp_path):
    assert token_digest() is None
    monkeypatch.setenv("RAYVAEC_TOKEN", TOKEN)
    assert token_digest() == digest(TOKEN)
    file = tmp_path / "token"
    file.write_text("another token's characters".replace(" ", "-") + "\n")
    assert token_digest(file) == digest("another-token's-characters")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "holds 0 characters, a token needs 16"),
        ("short", "holds 5 characters"),
        ("two words that are long", "holds spaces"),
        ("umlauts-äöü-umlauts-äöü", "other than plain characters"),
    ],
)
def test_a_bad_token_is_refused(tmp_path, text, words):
    file = tmp_path / "token"
    file.write_text(text)
    with pytest.raises(ConfigError, match=words) as caught:
        token_digest(file)
    assert text.strip() == "" or text not in str(caught.value)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read the token file .*nowhere"):
        token_digest(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("header", "right"),
    [
        (f"Bearer {TOKEN}", True),
        (f"bearer  {TOKEN} ", True),
        (f"Basic {TOKEN}", False),
        (TOKEN, False),
        (f"Bearer {TOKEN}x", False),
        ("Bearer \udcff\udcfe", False),
        ("", False),
        (None, False),
    ],
)
def test_only_the_token_opens(header, right):
    assert authorized(header, digest(TOKEN)) is right


@pytest.mark.parametrize(
    ("host", "own"),
    [
        ("127.0.0.1", True),
        ("127.8.0.1", True),
        ("::1", True),
        ("localhost", True),
        ("::ffff:127.0.0.1", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.0.2.1", False),
    ],
)
def test_loopback_addresses_are_told_apart(host, own):
    assert is_loopback(host) is own
    if own:
        check_bind(host, has_token=False)
    else:
        with pytest.raises(ConfigError, match="no token is set.*RAYVAEC_TOKEN"):
            check_bind(host, has_token=False)
    check_bind(host, has_token=True)


@pytest.mark.parametrize(
    ("server", "own"),
    [
        (("127.0.0.1", 8000), True),
        (("192.0.2.1", 8000), False),
        (("localhost", 8000), False),
        (("/run/socket", None), False),
        (None, False),
    ],
)
def test_unknown_ends_of_a_connection_are_not_trusted(server, own):
    assert arrived_on_loopback(server) is own
