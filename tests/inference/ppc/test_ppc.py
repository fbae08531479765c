"""`rayvaec check` from end to end: what it writes, its exit code, and what it refuses."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from html import unescape
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from rayvaec.cli import main
from rayvaec.data.prepare.pipeline import PrepareConfig, prepare
from rayvaec.data.store.open import open_store
from rayvaec.datasets import simulate
from rayvaec.errors import ConfigError, ModelError, RayvaecError, StoreError
from rayvaec.inference.bulk import runner
from rayvaec.inference.bulk.worker import RegionWorker
from rayvaec.inference.ppc.config import CheckConfig
from rayvaec.inference.ppc.metrics import FIGURES
from rayvaec.inference.ppc.report import page
from rayvaec.inference.ppc.report.plots import Picture
from rayvaec.inference.ppc.run import check_store
from rayvaec.inference.trained_model import load_model
from rayvaec.model.saved import save_model
from rayvaec.model.vaec import VAEC

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_local")]

FEW = CheckConfig(n_samples=3, seed=4)


class Said(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str


def _command(*words: object) -> Said:
    out, err = io.StringIO(), io.StringIO()
    with redirect_stdout(out), redirect_stderr(err):
        code = main([str(word) for word in words])
    return Said(code, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def said(
    model_path: Path, store_path: Path, ray_local: None, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Said, Path]:
    """What the command says, and the report that it writes, if nothing happens to it."""
    out = tmp_path_factory.mktemp("check") / "report"
    words = ["check", model_path, store_path, "--out", out, "--n-samples", 3, "--seed", 4]
    for threshold in ("gene_mean=0", "elbo=0", "library=2"):
        words += ["--fail-under", threshold]
    return _command(*words), out


@pytest.fixture
def undisturbed(said: tuple[Said, Path]) -> Path:
    return said[1]


@pytest.fixture
def lasting(lasting_actors: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use the processes of the tests before."""
    monkeypatch.setattr(runner, "actors", lasting_actors)


@pytest.fixture
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """They take seconds."""
    picture = Picture("data:,", "")
    monkeypatch.setattr(page, "draw_pictures", lambda model: defaultdict(lambda: picture))


def _report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def _same(one: Path, two: Path) -> None:
    """Assert the same report; pages are functions of it."""
    reports = [_report(folder) | {"thresholds": None} for folder in (one, two)]
    assert reports[0] == reports[1]


def test_the_command_writes_a_report_and_fails_below_thresholds(said: tuple[Said, Path]) -> None:
    (code, out, err), folder = said
    assert code == 1
    report = _report(folder)
    (model,) = report["models"]
    elbo, library = (model["figures"][name]["value"] for name in ("elbo", "library"))
    assert (
        f"below --fail-under: elbo is {elbo:.5g}, under 0; library is {library:.5g}, under 2; "
        f"{folder}/index.html"
    ) in err
    assert model["verdict"]["headline"] in out
    for name, figure in model["figures"].items():
        assert re.search(rf"^  {name} +(\S+ .*{figure['judged']}|-)", out, re.M), name
    met = {name: at["met"] for name, at in report["thresholds"].items()}
    assert met == {"gene_mean": True, "elbo": False, "library": False}
    assert sorted(path.name for path in folder.iterdir()) == ["index.html", "report.json"]
    assert [path.name for path in folder.parent.iterdir()] == ["report"]


@pytest.mark.usefixtures("no_pictures", "lasting")
def test_the_command_succeeds_above_thresholds_and_replaces_only_when_asked(
    model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    out = tmp_path / "report"
    words = ["check", model_path, store_path, "--out", out, "--n-samples", 2, "--max-cells", 30]
    words += ["--split", "train"]
    wrong = _command(*words, "--fail-under", "gene_mena=0.9")
    assert wrong.code == 2
    assert all(name in wrong.err for name in ("gene_mena", *FIGURES))
    assert not list(tmp_path.iterdir())
    out.mkdir()
    (out / "precious").touch()
    again = _command(*words)
    assert again.code == 2
    assert "exists already" in again.err
    assert (out / "precious").exists()
    assert _command(*words, "--overwrite", "--fail-under", "elbo=-1e9").code == 0
    assert not (out / "precious").exists()
    assert "These cells were not held out" in (out / "index.html").read_text()
    report = _report(out)
    assert report["cells"]["n_cells"] == 30
    # Thirty cells say little, and the report does not pretend otherwise.
    assert report["models"][0]["figures"]["correlation"]["judged"] == "unclear"


def test_the_report_has_all_genes_labels_and_cells(
    undisturbed: Path, store_path: Path, model_path: Path
) -> None:
    report, store = _report(undisturbed), open_store(store_path)
    (model,) = report["models"]
    held_out = store.rows("validation")
    assert report["cells"]["n_cells"] == len(held_out) == 120
    assert report["store"]["hash"] == store.hash
    assert list(model["figures"]) == list(FIGURES)
    assert model["genes"]["names"] == list(store.registry.genes)
    assert {label["label"] for label in model["labels"]} == set(store.registry.labels)
    assert sum(label["n_cells"] for label in model["labels"]) == 120
    rows = store.read(held_out.start, held_out.stop)
    assert sum(model["genes"]["observed_mean"]) == pytest.approx(rows.counts.sum() / 120, rel=1e-4)
    trained = load_model(model_path)
    assert model["hash"] == trained.hash
    assert len(model["latent"]["points"]["label"]) == 120
    error = model["figures"]["reconstruction"]["value"] - model["figures"]["elbo"]["value"]
    assert error >= 0  # the divergence from the prior


def test_the_page_needs_nothing_else(undisturbed: Path) -> None:
    html = (undisturbed / "index.html").read_text()
    assert not re.findall(r"https?://|<script|<link|@import|url\(", html)
    sources = re.findall(r'src="([^"]*)"', html)
    assert len(sources) == 10
    assert all(source.startswith("data:image/svg+xml;base64,") for source in sources)
    assert len(re.findall(r'alt="[^"]{20,}"', html)) == 10
    for name in FIGURES:
        assert f"<code>{name}</code>" in html
    for finding in _report(undisturbed)["models"][0]["verdict"]["findings"]:
        assert finding["sentence"] in unescape(html)
    assert _report(undisturbed)["models"][0]["verdict"]["headline"] in html


def test_names_cannot_break_the_page(undisturbed: Path) -> None:
    report = _report(undisturbed)
    (model,) = report["models"]
    bad = "<script>alert(1)</script> $x$ \x00\x07\u202e\ud800"
    model["labels"][0]["label"] = bad
    model["genes"]["names"][0] = bad
    model["genes"]["worst"]["mean"] = [bad]
    html = page.render_page(report)
    assert "<script" not in html
    assert "&lt;script&gt;" in html
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202e\ud800]", html)


def _save(path: Path, genes: list[str], labels: list[str], seed: int = 0) -> Path:
    registry = {"genes": genes, "labels": labels, "labels_key": "cell_type"}
    registry |= {"batches": [], "batch_key": None}
    torch.manual_seed(seed)
    save_model(path, VAEC(len(genes), len(labels), n_hidden=8), registry, {})
    return path


@pytest.mark.usefixtures("lasting")
def test_two_models_are_compared_on_the_same_cells(
    undisturbed: Path, model_path: Path, store_path: Path, tmp_path: Path
) -> None:
    """The second knows the genes in another order and starts from nothing."""
    registry = open_store(store_path).registry
    other = _save(tmp_path / "other", list(registry.genes)[::-1], list(registry.labels))
    report = check_store(model_path, store_path, tmp_path / "both", FEW, against=other)
    first, second = report["models"]
    assert first == _report(undisturbed)["models"][0]
    assert second["genes"]["names"] == list(registry.genes)[::-1]
    assert second["genes"]["observed_mean"] == first["genes"]["observed_mean"][::-1]
    for name, found in report["comparison"]["figures"].items():
        ours, theirs = (model["figures"][name]["value"] for model in report["models"])
        if ours is not None and theirs is not None:
            assert found["difference"] == pytest.approx(ours - theirs, rel=1e-3, abs=1e-4)
    better = report["comparison"]["figures"]["elbo"]
    assert better["difference"] > 2 * better["error"] > 0
    assert set(report["comparison"]["elbo_per_label"]) == set(registry.labels)
    html = (tmp_path / "both" / "index.html").read_text()
    assert "<b>A is better</b>" in html
    assert len(re.findall(r'src="data:image/svg', html)) == 20


def test_what_does_not_fit_is_refused(model_path: Path, store_path: Path, tmp_path: Path) -> None:
    registry = open_store(store_path).registry
    genes, labels = list(registry.genes), list(registry.labels)
    out = tmp_path / "report"
    other = _save(tmp_path / "more", [*genes, "NOT_THERE"], labels)
    with pytest.raises(ModelError, match="lacks 1 of the model's 121 genes: NOT_THERE"):
        check_store(other, store_path, out)
    other = _save(tmp_path / "labels", genes, labels[1:])
    with pytest.raises(ModelError, match=rf"1 labels that the model does not know: {labels[0]};"):
        check_store(model_path, store_path, out, against=other)
    fewer = _save(tmp_path / "fewer", genes[2:], labels)
    with pytest.raises(ModelError, match=rf"differ in 2 genes: {genes[0]}, {genes[1]}; compare"):
        check_store(model_path, store_path, out, against=fewer)
    for options, message in (
        ({"num_workers": 0}, "num_workers=0"),
        ({"num_workers": 99}, "99 workers need 99 CPUs and Ray has 2"),
        ({"use_gpu": True}, "1 worker needs 1 GPU"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_store(model_path, store_path, out, **options)
    assert not list(tmp_path.glob("report*"))


def test_a_store_without_held_out_cells_is_refused(tmp_path: Path) -> None:
    simulate(n_cells=60, n_genes=20, n_labels=2, seed=1).write_h5ad(tmp_path / "a.h5ad")
    config = PrepareConfig(labels_key="cell_type", val_fraction=0)
    prepare([tmp_path / "a.h5ad"], tmp_path / "store", config)
    registry = open_store(tmp_path / "store").registry
    model = _save(tmp_path / "model", list(registry.genes), list(registry.labels))
    out = tmp_path / "report"
    with pytest.raises(StoreError, match=r"no validation cells; .*`split='train'`.*`val_fraction="):
        check_store(model, tmp_path / "store", out)
    assert not list(tmp_path.glob("report*"))


class _Disturbed(RegionWorker):
    """Finds the disk full at one region until that is mended; then dies after another, once."""

    def call(self, method: str, *arguments: Any) -> dict[str, Any]:
        (number,) = arguments
        folder = Path(self.work.parts).parents[2]
        mended, died = folder / "mended", folder / "died"
        if number == 3 and not mended.exists():
            raise OSError(errno.ENOSPC, "No space left on device")
        (folder / f"measured {number}").touch()
        record = super().call(method, number)
        if mended.exists() and number > 8 and not died.exists():
            died.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return record


def _no_space(*_: object) -> str:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.usefixtures("no_pictures")
def test_full_disks_and_killed_workers_leave_no_part_of_a_report_and_count_no_cell_twice(
    undisturbed: Path,
    model_path: Path,
    store_path: Path,
    tmp_path: Path,
    lasting_actors: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(runner, "RegionWorker", _Disturbed)
    out = tmp_path / "report"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "actors", lasting_actors)
        with pytest.raises(RayvaecError, match=r"no space .* finished regions are kept in"):
            check_store(model_path, store_path, out, FEW)
    assert not out.exists()
    first = {path.name for path in tmp_path.glob("measured *")}
    assert first == {"measured 0", "measured 1", "measured 2", "measured 4"}

    # Two workers do what is missing, one of them twice; then the page finds no space.
    for name in first:
        (tmp_path / name).unlink()
    (tmp_path / "mended").touch()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "render_page", _no_space)
        with pytest.raises(RayvaecError, match=r"no space is left for the output"):
            check_store(model_path, store_path, out, FEW, num_workers=2)
    assert (tmp_path / "died").exists()
    assert not out.exists()
    again = {path.name for path in tmp_path.glob("measured *")}
    assert again == {f"measured {number}" for number in range(20)} - first

    # Every region is there.
    (tmp_path / "mended").unlink()
    monkeypatch.setattr(runner, "actors", lasting_actors)
    check_store(model_path, store_path, out, FEW)
    _same(undisturbed, out)
    assert not (tmp_path / "report.partial").exists()
