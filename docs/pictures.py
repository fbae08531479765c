"""Draw docs/img anew: run the tutorial's first commands, and look at the endpoint's page.

Needs chromium, chromedriver and the extra `test`; takes some minutes. `make pictures` runs it.
"""

from __future__ import annotations

import base64
import io
import re
import shlex
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image
from selenium import webdriver
from selenium.webdriver.support.ui import WebDriverWait

DOCS = Path(__file__).resolve().parent
IMAGES = DOCS / "img"
VERBS = ("simulate", "prepare", "train", "inspect")
SIZE = (1280, 860)


def main() -> None:
    """Write every picture."""
    IMAGES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        for words in tutorial_commands():
            subprocess.run([sys.executable, "-m", "rayvaec", *words], cwd=folder, check=True)
        (IMAGES / "curves.png").write_bytes((Path(folder) / "run" / "curves.png").read_bytes())
        command = [sys.executable, "-m", "rayvaec", "serve", "run/model", "--port", "0"]
        server = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True)
        try:
            picture = Image.open(io.BytesIO(page_after_a_draw(url_of(server))))
            # It has few colours; as many bytes for each would make the file twice as large.
            few = picture.convert("RGB").quantize(256, dither=Image.Dither.NONE)
            few.save(IMAGES / "page.png", optimize=True)
        finally:
            server.send_signal(signal.SIGINT)
            server.wait(timeout=120)


def tutorial_commands() -> list[list[str]]:
    """Return the tutorial's commands up to the trained and inspected run."""
    blocks = re.findall(r"```sh\n(.*?)```", (DOCS / "tutorial.md").read_text(), flags=re.DOTALL)
    lines = [shlex.split(line) for block in blocks for line in block.splitlines()]
    return [words[1:] for words in lines if words[1] in VERBS]


def url_of(server: subprocess.Popen[str]) -> str:
    """Return the address that a server names once it is ready."""
    for line in server.stdout or ():
        if line.startswith("ready: "):
            return line.split()[1]
    raise SystemExit("the server ended before it was ready")


def page_after_a_draw(url: str) -> bytes:
    """Draw on the page; return a PNG of what a screen then shows."""
    options = webdriver.ChromeOptions()
    for flag in ("headless", "no-sandbox", "disable-gpu"):
        options.add_argument(f"--{flag}")
    driver = webdriver.Chrome(options, webdriver.ChromeService("/usr/bin/chromedriver"))
    try:
        screen = {"width": SIZE[0], "height": SIZE[1], "deviceScaleFactor": 1, "mobile": False}
        driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        driver.get(url)
        wait = WebDriverWait(driver, 60)
        wait.until(lambda here: here.find_elements("css selector", "#figures svg"))
        driver.find_element("id", "seed").send_keys("0")
        driver.find_element("id", "draw").click()
        wait.until(lambda here: here.find_elements("css selector", "#figures .dots"))
        driver.execute_script("scrollTo(0, 0); document.activeElement.blur()")
        picture = driver.execute_cdp_cmd("Page.captureScreenshot", {"format": "png"})
    finally:
        driver.quit()
    return base64.b64decode(picture["data"])


if __name__ == "__main__":
    main()
