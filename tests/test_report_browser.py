from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qat_lightning.report.content import Report
from qat_lightning.report.page.html import render
from tests import reports
from tests.browser import Browser, browser, executable

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    program = executable()
    if program is None:
        message = "There is no chromium or google-chrome in the PATH to look at the page with."
        if os.environ.get("QAT_REQUIRE_BROWSER") == "1":
            pytest.fail(message)
        pytest.skip(message)
    with browser(program, tmp_path_factory.mktemp("profile")) as page:
        yield page


# Where words in a plot are cut off, or lie on others; the browser's own font counts.
MISPLACED = """
[...document.querySelectorAll('svg')].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const words = [...svg.querySelectorAll('text')]
    .map(text => [text.textContent, text.getBoundingClientRect()]);
  const out = words.filter(([_, box]) => box.left < frame.left - 1 || box.right > frame.right + 1
    || box.top < frame.top - 2 || box.bottom > frame.bottom + 2).map(([text]) => 'cut off: ' + text);
  const over = words.flatMap(([text, a], i) => words.slice(i + 1)
    .filter(([_, b]) => Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1
      && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 3)
    .map(([other]) => text + ' lies on ' + other));
  return [...out, ...over];
})
"""


def _write(folder: Path, report: Report) -> str:
    file = folder / "report.html"
    file.write_text(render(report), encoding="utf-8")
    return file.as_uri()


def _open(page: Browser, url: str) -> None:
    page.open(url)
    page.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")


@pytest.mark.parametrize("make", reports.EVERY, ids=lambda make: make.__name__)
def test_browser_asks_for_nothing_and_has_no_complaint(
    chromium: Browser, tmp_path: Path, make: Callable[[], Report]
) -> None:
    url = _write(tmp_path, make())
    for width in (1400, 800, 400):
        chromium.look(width, "light")
        _open(chromium, url)
        assert chromium.requests() == [url]
        assert chromium.complaints() == []
        assert chromium.evaluate("document.documentElement.scrollWidth") <= width
        assert chromium.evaluate(MISPLACED) == []


def test_browser_would_tell(chromium: Browser, tmp_path: Path) -> None:
    file = tmp_path / "page.html"
    file.write_text('<img src="http://example.invalid/x.png"><script>throw Error("no")</script>')
    chromium.open(file.as_uri())
    assert "http://example.invalid/x.png" in chromium.requests()
    assert len(chromium.complaints()) >= 2


def test_page_is_readable_in_light_and_dark(chromium: Browser, tmp_path: Path) -> None:
    url = _write(tmp_path, reports.realistic())
    brightness = {}
    for width, scheme in product((1400, 400), ("light", "dark")):
        chromium.look(width, scheme)
        _open(chromium, url)
        chromium.screenshot(tmp_path / f"{scheme}.png")
        with Image.open(tmp_path / f"{scheme}.png") as image:
            assert image.width == width
            pixels = np.asarray(image.convert("L"), dtype=float)
        background = np.median(pixels)
        brightness[width, scheme] = background
        drawn = np.abs(pixels - background) > 60
        assert drawn.mean() > 0.02
        # Nowhere is a screen of it blank.
        assert all(part.any() for part in np.array_split(drawn, len(drawn) // 400))
    for (_, scheme), background in brightness.items():
        assert background > 200 if scheme == "light" else background < 60
