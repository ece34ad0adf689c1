"""The report page in headless Chromium: no request is refused, nothing overflows the page, all text has enough contrast.

STEPDISTILL_SCREENSHOTS names a folder for screenshots.
"""

import base64
import os
import shutil
from pathlib import Path

import pytest

pytest.importorskip("selenium")
from selenium import webdriver
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service

from stepdistill.report.build import build_report
from tests.browser.synthetic_run import make_run, write_training

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(not (BROWSER and DRIVER), reason="no Chromium with its driver")

# The contrast (WCAG 2.2, 1.4.3) of every text node that is shown, against the first opaque background behind it.
CONTRASTS = """
const channel = c => (c /= 255) <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4;
const luminance = ([r, g, b]) => .2126 * channel(r) + .7152 * channel(g) + .0722 * channel(b);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const found = [];
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
  const element = walker.currentNode.parentElement;
  if (!walker.currentNode.data.trim() || !element.checkVisibility()) continue;
  let behind = element, back = [0, 0, 0, 0];
  while (behind && (back = parse(getComputedStyle(behind).backgroundColor)).length === 4 && back[3] === 0)
    behind = behind.parentElement;
  if (!behind) back = [255, 255, 255];
  const pair = [luminance(parse(getComputedStyle(element).color)), luminance(back)].sort((a, b) => b - a);
  found.push([(pair[0] + .05) / (pair[1] + .05), walker.currentNode.data.trim().slice(0, 40)]);
}
return found;
"""
IMAGES = "return [...document.images].map(i => [i.complete && i.naturalWidth, i.alt, i.src.slice(0, 30)]);"


@pytest.fixture(scope="module")
def browser():
    options = Options()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """A finished run, one in training, one with large images, and a comparison."""
    base = tmp_path_factory.mktemp("runs")
    finished = make_run(base / "letters-adversarial", config="tests/assets/letters_adversarial.yaml")
    large = make_run(base / "large", size=300)
    write_training(base / "training", updates=300, finished=(32,))
    folders = {
        "finished": build_report(finished, grid_columns=4),
        "large": build_report(large, grid_columns=4),
        "training": build_report(base / "training"),
        "comparison": build_report([finished, large], grid_columns=4),
    }
    return {name: folder / "index.html" for name, folder in folders.items()}


@pytest.mark.parametrize("width", [390, 1440])
@pytest.mark.parametrize("name", ["finished", "large", "training", "comparison"])
def test_the_page_renders_without_errors_overflow_or_low_contrast(browser, pages, tmp_path, name, width):
    size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    browser.get(pages[name].as_uri())
    browser.execute_script("document.querySelectorAll('details').forEach(d => { d.open = true; })")
    assert browser.get_log("browser") == []
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    images = browser.execute_script(IMAGES)
    assert len(images) >= 3
    assert [image for image in images if not image[0] or not image[1].strip()] == []
    contrasts = browser.execute_script(CONTRASTS)
    assert len(contrasts) > 40
    assert [contrast for contrast in contrasts if contrast[0] < 4.5] == []
    screenshot(browser, tmp_path, f"{name}-{width}")


def test_the_page_checks_detect_faults(browser, pages, tmp_path):
    text = pages["training"].read_text(encoding="utf-8")
    wrong = '<p style="color: red">red</p><img src="https://localhost/x.png" alt="elsewhere"></main>'
    (tmp_path / "wrong.html").write_text(text.replace("</main>", wrong), encoding="utf-8")
    browser.get((tmp_path / "wrong.html").as_uri())
    refused = " ".join(entry["message"] for entry in browser.get_log("browser"))
    assert "style-src" in refused
    assert "https://localhost/x.png" in refused
    assert [image for image in browser.execute_script(IMAGES) if not image[0]]
    browser.execute_script(
        "Object.assign(document.querySelector('h1').style, {color: '#999', width: '9000px'})"
    )
    assert [contrast for contrast in browser.execute_script(CONTRASTS) if contrast[0] < 4.5]
    assert not browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")


def screenshot(browser, tmp_path, name):
    folder = Path(os.environ.get("STEPDISTILL_SCREENSHOTS", tmp_path))
    folder.mkdir(parents=True, exist_ok=True)
    shot = browser.execute_cdp_cmd("Page.captureScreenshot", {"captureBeyondViewport": True})
    (folder / f"{name}.png").write_bytes(base64.b64decode(shot["data"]))
