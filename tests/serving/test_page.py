"""The page in a browser, against the endpoint behind a real server."""

from __future__ import annotations

import csv
import re
import shutil
import threading
import time
from importlib.resources import files

import anndata
import numpy as np
import pytest
import uvicorn

from rayvaec.inference import posterior
from rayvaec.kernels.rng import cell_keys
from rayvaec.serving import page
from rayvaec.serving.engine.engine import Engine, Threads
from rayvaec.serving.engine.summary import summary_answer
from rayvaec.serving.http.app import create_app
from rayvaec.serving.middleware.auth import digest
from rayvaec.serving.middleware.limits import Limits

TOKEN = "0123456789abcdef0123"
PHONE, DESK = (360, 740), (1280, 900)

TOO_CLOSE = """
const found = [];
for (const figure of document.querySelectorAll("#figures svg")) {
  const texts = [...figure.querySelectorAll("text")];
  const boxes = texts.map((text) => [text.textContent, text.getBoundingClientRect()]);
  boxes.forEach(([name, a], i) => boxes.slice(i + 1).forEach(([other, b]) => {
    const beside = Math.max(a.left, b.left) - 3 < Math.min(a.right, b.right);
    const level = Math.max(a.top, b.top) < Math.min(a.bottom, b.bottom);
    if (beside && level) found.push([name, other]);
  }));
}
return found;
"""
"""Names in the figures that overlap, or stand less than 3 pixels from each other in a line."""


def test_its_files_are_confined_and_name_nothing_outside(serve_with):
    closed = serve_with(digest(TOKEN))
    for path in page.PATHS:
        answer = closed.get(path)
        assert answer.status_code == 200, f"{path} needs no token"
        assert "default-src 'none'; script-src 'self'" in answer.headers["Content-Security-Policy"]
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        named = set(re.findall(r"https?://[^\s\"'`]+", answer.text))
        assert named <= {"http://www.w3.org/2000/svg"}, path
    text = closed.get("/").text
    assert not re.findall(r"<script(?![^>]*src)|<style|\son\w+=|\sstyle=", text)


def test_every_file_of_the_page_is_served():
    names = {entry.name for entry in files(page).iterdir() if not entry.name.startswith("__")}
    assert names == {path.rpartition("/")[2] or "index.html" for path in page.PATHS}


# From here on with a browser.


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """Chromium without a window."""
    webdriver = pytest.importorskip("selenium.webdriver")
    programs = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in programs:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = programs[0]
    for flag in (
        *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run"),
        *("disable-background-networking", "disable-component-update", "disable-sync"),
        f"user-data-dir={tmp_path_factory.mktemp('chromium')}",
    ):
        options.add_argument(f"--{flag}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options, webdriver.ChromeService(programs[1]))
    yield Browser(driver, tmp_path_factory.mktemp("downloads"))
    driver.quit()


class Browser:
    """What a person does and sees."""

    def __init__(self, driver, downloads):
        self.driver, self.downloads = driver, downloads
        self.cdp("Browser.setDownloadBehavior", behavior="allow", downloadPath=str(downloads))

    def cdp(self, command, **arguments):
        return self.driver.execute_cdp_cmd(command, arguments)

    def open(self, url, size=DESK, **media):
        """Open an address on a screen of a size, with media features such as colour scheme."""
        mobile = size == PHONE
        self.cdp(
            "Emulation.setDeviceMetricsOverride",
            **{"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": mobile},
        )
        features = [{"name": name.replace("_", "-"), "value": to} for name, to in media.items()]
        self.cdp("Emulation.setEmulatedMedia", features=features)
        self.driver.get(url)

    def script(self, code, *arguments):
        return self.driver.execute_script(code, *arguments)

    def find(self, selector):
        return self.driver.find_element("css selector", selector)

    def every(self, selector):
        return self.driver.find_elements("css selector", selector)

    def text(self, selector):
        # In one go: the page may replace an element between finding and reading it.
        found = "const e = document.querySelector(arguments[0]); return e && e.innerText.trim()"
        return self.script(found, selector) or ""

    def until(self, condition, seconds=30):
        end = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < end, self.text("body")
            time.sleep(0.02)

    def ready(self):
        self.until(lambda: self.every("#figures svg") or "stand alone" in self.text("#results"))

    def drawn(self):
        self.until(lambda: "drawn in" in self.text("#status"))
        self.until(lambda: self.every("#figures svg"))

    def press(self, *keys):
        from selenium.webdriver import ActionChains

        for key in keys:
            ActionChains(self.driver, duration=0).send_keys(key).perform()

    def scatter(self, values):
        """Show a scatter of some values in place of the first figure."""
        code = (
            "const [values, done] = arguments; import('/page/charts.js').then(({scatter}) => {"
            "const given = {training: values, drawn: values, log: true, name: 'mean', words: 'w'};"
            "document.querySelector('#figures svg').replaceWith(scatter(given)); done(); });"
        )
        self.driver.execute_async_script(code, values)

    def focused(self):
        return self.driver.switch_to.active_element

    def tab_to(self, condition):
        """Press Tab until the focus is where it shall be; on the way it is always to be seen."""
        from selenium.webdriver import Keys

        for _ in range(60):
            self.press(Keys.TAB)
            here = self.focused()
            shown = self.script(
                "const e = arguments[0].matches('#tabs input') ? arguments[0].nextSibling"
                ": arguments[0]; return getComputedStyle(e).outlineStyle",
                here,
            )
            assert shown == "solid", here.get_attribute("outerHTML")[:200]
            if condition(here):
                return here
        raise AssertionError("the keyboard does not get there")

    def complaints(self):
        """What the browser's console says, but for the statuses of refusals."""
        return [entry for entry in self.driver.get_log("browser") if entry["source"] != "network"]


@pytest.fixture(scope="module")
def serve():
    """Serve models from a port of their own; returns the address."""
    servers = []

    def start(models, token_digest=None):
        limits = Limits()
        threads = Threads(limits)
        services = {name: Engine(model, limits, threads) for name, model in models.items()}
        app = create_app(services, limits, token_digest)
        config = uvicorn.Config(app, port=0, log_level="error", lifespan="off")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, daemon=True)
        thread.start()
        servers.append((server, thread, threads))
        while not server.started:
            time.sleep(0.01)
        return f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"

    yield start
    for server, thread, threads in servers:
        server.should_exit = True
        thread.join(30)
        threads.close()


@pytest.fixture(scope="module")
def url(serve, summarised, trained):
    """Two models, the second of which knows nothing of its training data."""
    return serve({"atlas": summarised, "bare": trained})


def table(browser):
    """The table of means: {gene: [[drawn, training] of each label]}."""
    return {
        row.find_element("tag name", "th").text: [
            [float(word.replace(",", "")) for word in cell.text.split()]
            for cell in row.find_elements("tag name", "td")
        ]
        for row in browser.every("#figures tbody tr")
    }


def drawn_here(model, labels, n_cells, seed):
    """Draw what the page asks for: as many cells of each label, with its training libraries."""
    at = (np.arange(n_cells) + 0.5) / n_cells
    codes = [model.registry.labels.index(label) for label in labels]
    told = summary_answer(model).labels
    libraries = np.concatenate([np.quantile(told[code].library, at) for code in codes])
    draws = posterior.generate(
        model.module,
        np.repeat(codes, n_cells),
        np.floor(libraries + 0.5).astype(np.float32),
        cell_keys([f"{label} {i + 1}" for label in labels for i in range(n_cells)]),
        1,
        seed,
    )
    counts = np.zeros((len(draws.indptr) - 1, model.registry.n_genes), np.int32)
    counts[np.repeat(range(len(counts)), np.diff(draws.indptr)), draws.indices] = draws.counts
    return counts


def test_cells_are_drawn_beside_the_training_data_and_downloaded(browser, url, summarised):
    registry, summary = summarised.registry, summarised.summary
    browser.open(url)
    browser.ready()
    assert "Nothing drawn yet" in browser.text("#status")
    assert not browser.every("#figures rect.drawn")
    first = sorted(range(4), key=lambda code: -summary.cells[code])[:3]
    labels = [registry.labels[code] for code in sorted(first)]
    chosen = [box.get_attribute("value") for box in browser.every("#labels input:checked")]
    assert chosen == labels
    browser.find("#seed").send_keys("7")
    browser.find("#draw").click()
    browser.drawn()
    assert "600 cells drawn" in browser.text("#status")
    assert "with seed 7" in browser.text("#status")
    assert browser.every("#figures rect.drawn")
    assert browser.every("#figures .dots")
    assert len(browser.every("#tabs input")) == 3

    browser.find("#download-csv").click()
    file = browser.downloads / "drawn-7.csv"
    browser.until(file.exists)
    with file.open() as lines:
        head, *rows = csv.reader(lines)
    assert head == ["cell", "label", *registry.genes]
    assert [row[1] for row in rows] == [label for label in labels for _ in range(200)]
    counts = np.array([row[2:] for row in rows], np.int32)
    assert np.array_equal(counts, drawn_here(summarised, labels, 200, seed=7))
    browser.find("#download-h5ad").click()
    file = browser.downloads / "drawn-7.h5ad"
    browser.until(file.exists)
    adata = anndata.read_h5ad(file)
    assert adata.obs_names.tolist() == [row[0] for row in rows]
    assert adata.var_names.tolist() == list(registry.genes)
    layer = adata.layers["sample_0"]
    assert np.array_equal(layer.toarray(), counts)
    shown = table(browser)
    for gene in (registry.genes[i] for i in summary.telling_genes(6)):
        column = registry.genes.index(gene)
        means = counts.reshape(3, 200, -1).mean(1)[:, column]
        drawn, training = np.array(shown[gene]).T
        np.testing.assert_allclose(drawn, means, rtol=0.06)
        np.testing.assert_allclose(training, summary.mean[column, sorted(first)], rtol=0.06)
    assert browser.complaints() == []


def test_the_keyboard_is_enough(browser, url, summarised):
    from selenium.webdriver import Keys

    browser.open(url)
    browser.ready()
    gene = summarised.registry.genes[-1]
    browser.tab_to(lambda e: e.get_attribute("type") == "checkbox")
    browser.press(Keys.SPACE)  # the first label is taken out, or joins
    chosen = [box.get_attribute("value") for box in browser.every("#labels input:checked")]
    browser.tab_to(lambda e: e.get_attribute("id") == "n-cells")  # which selects what is in it
    browser.press(*"25")
    browser.tab_to(lambda e: e.get_attribute("id") == "library-data")
    browser.press(Keys.ARROW_DOWN)
    assert browser.find("#library-same").is_selected()
    browser.tab_to(lambda e: e.get_attribute("id") == "library")
    browser.press(*"900")
    browser.tab_to(lambda e: e.get_attribute("id") == "gene")
    browser.press(*"nothing", Keys.ENTER)
    assert "no gene nothing" in browser.text("#gene-hint")
    browser.press(*[Keys.BACKSPACE] * len("nothing"), *gene, Keys.ENTER)
    assert browser.text("#genes li") == gene
    browser.tab_to(lambda e: e.accessible_name == f"Remove {gene}")
    browser.tab_to(lambda e: e.get_attribute("id") == "draw")
    browser.press(Keys.ENTER)
    browser.drawn()
    assert f"{25 * len(chosen)} cells drawn" in browser.text("#status")
    assert browser.text("#figures h2") == chosen[0]
    browser.tab_to(lambda e: e.get_attribute("name") == "tab")
    browser.press(Keys.ARROW_RIGHT)
    browser.until(lambda: browser.text("#figures h2") == chosen[1])
    assert browser.focused().get_attribute("value") == chosen[1]
    assert browser.complaints() == []


def test_everything_has_a_name_for_those_who_do_not_see_it(browser, url):
    browser.open(url)
    browser.ready()
    browser.find("#draw").click()
    browser.drawn()
    for control in browser.every("input, select, button, summary, [tabindex='0']"):
        if control.is_displayed():
            assert control.accessible_name, control.get_attribute("outerHTML")
    for figure in browser.every("svg"):
        assert figure.aria_role in ("img", "image")
        assert re.search("in type_[0-3]", figure.accessible_name)


@pytest.mark.parametrize("size", [PHONE, DESK], ids=["phone", "desk"])
def test_it_fits_its_screen(browser, url, size):
    browser.open(url, size)
    browser.ready()
    browser.find("#draw").click()
    browser.drawn()
    assert browser.script("return document.documentElement.scrollWidth") <= size[0]
    assert browser.script(TOO_CLOSE) == []
    for least in (0.001, 0.02, 0.1):
        for most in (1, 30, 120, 1000, 1500, 9000, 2e5):
            browser.scatter([least, most])
            assert browser.script(TOO_CLOSE) == [], (least, most)
    assert (
        browser.script("return arguments[0].getBoundingClientRect().top", browser.find("#status"))
        < size[1] / 2
    )


def test_it_is_dark_and_still_where_that_is_wished(browser, url):
    colour = "return getComputedStyle(document.body).backgroundColor"
    moving = (
        "const e = document.getElementById('status'); e.className = 'working';"
        "return getComputedStyle(e, '::before').animationName"
    )
    browser.open(url, prefers_color_scheme="light", prefers_reduced_motion="no-preference")
    assert (browser.script(colour), browser.script(moving)) == ("rgb(251, 250, 247)", "turn")
    browser.open(url, prefers_color_scheme="dark", prefers_reduced_motion="reduce")
    assert (browser.script(colour), browser.script(moving)) == ("rgb(19, 21, 23)", "none")


def test_refusals_are_shown_with_what_to_do(browser, url):
    browser.open(url)
    browser.ready()
    browser.find("#library").clear()
    browser.find("#library").send_keys("1e12")
    browser.find("#draw").click()
    browser.until(lambda: browser.text("#problem"))
    assert "library[0] is 1e+12" in browser.text("#problem")
    assert "up to 1e+09" in browser.text("#problem")
    assert "Nothing drawn yet" in browser.text("#status")
    browser.find("#library-data").click()
    browser.find("#draw").click()
    browser.drawn()
    assert browser.text("#problem") == ""


def test_a_model_without_a_summary_says_so_and_draws(browser, url):
    browser.open(url)
    browser.ready()
    browser.find("#model option[value=bare]").click()
    browser.until(lambda: browser.text("#facts").startswith("bare"))
    browser.until(lambda: "no summary of its training data" in browser.text("#results"))
    assert not browser.find("#library-data").is_enabled()
    browser.find("#draw").click()
    browser.drawn()
    assert not browser.every("#figures .training")
    assert browser.every("#figures rect.drawn")
    assert browser.complaints() == []


def test_a_token_is_asked_for_and_kept_in_the_tab(browser, serve, summarised):
    browser.open(serve({"atlas": summarised}, digest(TOKEN)))
    browser.until(lambda: browser.find("#token").is_displayed())
    assert browser.focused().get_attribute("id") == "token"
    for token in ("a wrong token of some length", TOKEN):
        browser.find("#token").send_keys(token)
        browser.find("#token-form button").click()
        if token != TOKEN:
            browser.until(lambda: "a wrong token" in browser.text("#problem"))
    browser.ready()
    assert not browser.find("#token").is_displayed()
    assert not browser.find("#model").is_displayed(), "there is one model alone"
    assert browser.text("#problem") == ""
    kept = "return [Object.values(sessionStorage), localStorage.length, document.cookie]"
    assert browser.script(kept) == [[TOKEN], 0, ""]
    browser.driver.refresh()
    browser.ready()
    browser.find("#draw").click()
    browser.drawn()
