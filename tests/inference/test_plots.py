"""Labels that matplotlib, SVG or HTML would take for something else than text."""

from __future__ import annotations

import base64
from typing import Any
from xml.etree import ElementTree

import pytest

from rayvaec.inference.ppc.report import plots

ODD = {
    "_hidden": "_hidden",
    "__": "__",
    "$x^2$": "$x^2$",
    "cost $": "cost $",
    r"\$5 \alpha": r"\$5 \alpha",
    "bell\x07 and\nline": "bell\ufffd and\ufffdline",
    "nul\x00": "nul\ufffd",
    "turned \u202etxet": "turned \ufffdtxet",
    "half \ud800": "half \ufffd",
    "no XML \ufffe": "no XML \ufffd",
    "<b>&amp;\"'": "<b>&amp;\"'",
    "a name of more than $24$ letters": "a name of more than $2…",
}
"""What a label is, and what is shown of it."""


def _texts(picture: plots.Picture) -> list[str]:
    svg = base64.b64decode(picture.uri.partition(",")[2]).decode()
    found = ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    return ["".join(element.itertext()) for element in found]


def _model(names: list[str]) -> dict[str, Any]:
    labels = [{"label": name, "n_cells": 9, "coverage": {"0.8": 0.7}} for name in names]
    points = {"label": names * 2, "position": [[i, -i] for i in range(2 * len(names))]}
    latent = {"points": points, "share_between_labels": 0.5, "share_of_variance": [0.6, 0.3]}
    return {"labels": labels, "latent": latent}


@pytest.mark.parametrize("name", ODD, ids=ascii)
@pytest.mark.parametrize("picture", ["labels", "latent"])
def test_a_label_is_shown_as_text(picture: str, name: str) -> None:
    draw = {"labels": plots._labels, "latent": plots._latent}[picture]
    shown = plots._picture(draw, _model([name, "T cells"]), picture)
    texts = [text.strip() for text in _texts(shown)]
    assert texts.count(ODD[name]) == 1, texts
    assert texts.count("T cells") == 1, texts
    assert shown.alt == shown.alt.encode(errors="replace").decode()
