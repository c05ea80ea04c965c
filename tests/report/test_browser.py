"""Reports in a browser: nothing is fetched, nothing fails, nothing is cut off.

Needs playwright and a Chromium (`apt install chromium`, or `$CHROMIUM`); skipped without.
"""

import os
import shutil

import pytest
from support import run_folders

playwright = pytest.importorskip(
    "playwright.sync_api", reason="no playwright: the reports are not opened in a browser"
)
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no chromium: the reports are not opened in a browser"
)
#: Elements whose text is wider than they are, and not shown by scrolling.
CUT_OFF = """() => [...document.querySelectorAll('*')]
  .filter(e => e.clientWidth && e.scrollWidth > e.clientWidth)
  .map(e => e.tagName + ' ' + e.textContent.trim().slice(0, 60))"""


@pytest.fixture(scope="module")
def browser():
    # Without its sandbox it starts for root too, as in containers; it opens our own files alone.
    with playwright.sync_playwright() as driver:
        found = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.mark.parametrize("kind", run_folders.KINDS)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_report_opens_by_itself_and_shows_all_of_its_text(folders, browser, kind, scheme, width):
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said, asked = [], []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    address = (folders[kind] / "report.html").as_uri()
    page.goto(address)
    assert said == []
    assert [url for url in asked if not url.startswith("data:")] == [address]
    assert page.evaluate(CUT_OFF) == []
    sizes = page.evaluate("[...document.images].map(i => [i.naturalWidth, i.clientWidth])")
    assert sizes and all(natural > 400 and shown > 200 for natural, shown in sizes)
    # Text against its ground: light on dark in the dark.
    ink, ground = page.evaluate(
        "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
    )
    light, dark = (sum(map(int, c[4:-1].split(","))) for c in (ink, ground))
    assert light - dark > 400 if scheme == "dark" else dark - light > 400
    page.close()
