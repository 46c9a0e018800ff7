"""The page of a bench in a real browser: it is drawn, it fits, it can be read, and it asks for nothing."""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from specvlm.bench.grid import Grid
from specvlm.bench.page import PageSheet, write_page
from specvlm.bench.plots import COLOURS, STAGE_COLOURS
from tests.bench_reports import BATCHED, FULL, HOSTILE, hostile, made
from tests.browser import chromium

PROGRAM = chromium.find()
pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; apt-get install chromium, for one")

# Labels as long as they come, more lines than a plot takes, values close to each other.
AWKWARD = Grid(
    num_frames=(None, 4, 5, 768),
    pruners=("specvlm", "attention", "none"),
    prune_ratios=(0.0, 0.01, 0.98, 0.999),
    trees=("dynamic",),
)
REPORTS = {
    "quick": made(),
    "full": made(FULL),
    "awkward": made(AWKWARD),
    "hostile": hostile(),
    "batches": made(BATCHED),
    "without stock": made(Grid(("plain", "sd"))),
    "stock alone": made(Grid(("stock",))),
}


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Write each report's page when it is first asked for."""
    folder = tmp_path_factory.mktemp("pages")

    def path(name: str) -> Path:
        file = folder / f"{name}.html"
        if not file.exists():
            write_page(
                REPORTS[name], file, [PageSheet(HOSTILE if name == "hostile" else "clip-1.mp4", picture())]
            )
        return file

    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[chromium.Browser]:
    assert PROGRAM is not None
    with chromium.started(PROGRAM) as browser:
        yield browser


def picture() -> bytes:
    """A PNG of a colour that the page has nowhere else."""
    png = io.BytesIO()
    Image.new("RGB", (1200, 700), (1, 250, 99)).save(png, "PNG")
    return png.getvalue()


def written(folder: Path, text: str) -> Path:
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    return path


def is_silent(browser: chromium.Browser, path: Path) -> bool:
    """Say whether a page loaded nothing but itself and what it carries, and nothing was refused or complained of."""
    browser.open(path)
    browser.settle()
    foreign = [url for url in browser.requests if url != path.as_uri() and not url.startswith("data:")]
    return not foreign and not browser.complaints


# --- it asks for nothing ---


def test_the_page_asks_for_nothing(browser: chromium.Browser, pages: Callable[[str], Path]) -> None:
    assert is_silent(browser, pages("full"))
    foreign = "script, link, iframe, object, embed, form, [onload], [onerror], [src^=http], [href^=http]"
    assert browser.run(f"document.querySelectorAll('{foreign}').length") == 0


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, list[str]]]:
    """An address of this machine, and what was asked for there."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        thread = threading.Thread(target=listening.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{listening.server_port}", asked
        listening.shutdown()
        thread.join()


FETCHES = (
    '<img src="{}/x.png">',
    '<script src="{}/x.js"></script>',
    '<link rel="stylesheet" href="{}/x.css">',
    "<style>body{{background:url({}/x.png)}}</style>",
    "<script>setTimeout(() => fetch('{}/'), 50)</script>",
    "<svg><image href='{}/x.png' width=9 height=9 /></svg>",
)


@pytest.mark.parametrize("fetch", FETCHES)
@pytest.mark.parametrize("policy", [True, False])
def test_a_page_that_would_fetch_is_noticed(
    browser: chromium.Browser, server: tuple[str, list[str]], tmp_path: Path, pages: Callable[[str], Path],
    fetch: str, policy: bool,
) -> None:  # fmt: skip
    address, asked = server
    asked.clear()
    text = pages("quick").read_text()
    if not policy:
        text = text.replace("Content-Security-Policy", "Nothing")
    assert is_silent(browser, written(tmp_path, text))
    assert not is_silent(
        browser, written(tmp_path, text.replace("</main>", f"{fetch.format(address)}</main>"))
    )
    assert any(url.startswith(address) for url in browser.sent()) is not policy
    assert bool(asked) is not policy  # the policy keeps the browser from asking at all


def test_text_from_outside_is_text(browser: chromium.Browser, pages: Callable[[str], Path]) -> None:
    assert is_silent(browser, pages("hostile"))
    text = browser.run("document.body.textContent")
    assert text.count('<script>fetch("https://example.invalid/x")</script>') > 20
    assert not set(text) & set("\x1b\u202e\ud800")


# --- it is drawn ---


class Palette:
    """How many pixels of a picture have each colour."""

    def __init__(self, picture: NDArray[np.uint8]) -> None:
        packed = picture.astype(np.int32) @ np.array([1 << 16, 1 << 8, 1], np.int32)
        colours, self._counts = np.unique(packed, return_counts=True)
        self._colours = colours[:, None] >> np.array([16, 8, 0]) & 255

    def seen(self, colour: str) -> int:
        """Count pixels of a colour."""
        wanted = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)])
        return int(self._counts[np.abs(self._colours - wanted).max(axis=-1) <= 3].sum())


def areas(browser: chromium.Browser) -> dict[str, NDArray[np.uint8]]:
    """Cut every plot and sheet out of the page as it is drawn."""
    boxes = browser.run("""Object.fromEntries([...document.querySelectorAll('.plot, .sheet')].map(one => {
        const box = one.getBoundingClientRect();
        return [one.closest('section').id, [box.left, box.top + scrollY, box.right, box.bottom + scrollY]];
    }))""")
    picture = browser.picture()
    return {
        name: picture[round(top) : round(bottom), round(left) : round(right)]
        for name, (left, top, right, bottom) in boxes.items()
    }


EXPECTED = {  # at least what belongs to each plot
    "plot-speedup": COLOURS[:2],
    "plot-ratio": COLOURS[:6],
    "plot-frames": COLOURS[:8],
    "plot-stages": [STAGE_COLOURS[name] for name in ("read_s", "vision_s", "target_prefill_s", "prefill_s", "draft_s",
                                                     "verify_s", "steps_s")],
    "plot-depth": COLOURS[:8],
    "sheet-1": ["#01fa63"],
}  # fmt: skip


@pytest.mark.parametrize("dark", [False, True])
def test_plots_and_sheets_are_drawn(
    browser: chromium.Browser, pages: Callable[[str], Path], dark: bool
) -> None:
    browser.open(pages("full"), dark=dark)
    drawn = areas(browser)
    assert drawn.keys() == EXPECTED.keys()
    for name, colours in EXPECTED.items():
        assert drawn[name].shape[0] > 200
        palette = Palette(drawn[name])
        for colour in colours:
            assert palette.seen(colour) > 40, (name, colour)
    browser.run(
        "document.querySelectorAll('.plot svg, .sheet img').forEach(one => one.style.visibility = 'hidden')"
    )
    blank = {name: Palette(area) for name, area in areas(browser).items()}
    assert all(blank[name].seen(colour) == 0 for name, colours in EXPECTED.items() for colour in colours)


def test_lengths_of_bars_are_the_figures(browser: chromium.Browser, pages: Callable[[str], Path]) -> None:
    browser.open(pages("quick"))
    drawn = areas(browser)["plot-speedup"][60:].astype(np.int16)  # below the legend
    decoding = np.array([0x2B, 0x83, 0xC6], np.int16)
    rows = (np.abs(drawn - decoding).max(axis=-1) <= 3).sum(axis=1)
    assert COLOURS[0] == "#2b83c6"
    bars = [
        int(longest)
        for longest in map(np.median, np.split(rows, np.flatnonzero(np.diff(rows > 40)) + 1))
        if longest
    ]
    expected = [found.decode or 0.0 for one in REPORTS["quick"].summaries if (found := one.speedup("stock"))]
    assert len(bars) == len(expected) == 4
    assert [bar / max(bars) for bar in bars] == pytest.approx(
        [one / max(expected) for one in expected], abs=0.02
    )


# --- it fits, and can be read ---


@pytest.mark.parametrize("width", [1280, 360])
def test_nothing_makes_the_page_wider_than_the_window(
    browser: chromium.Browser, pages: Callable[[str], Path], width: int
) -> None:
    for name in ("awkward", "hostile"):
        browser.open(pages(name), width)
        assert browser.run("document.documentElement.scrollWidth") <= width
    browser.run(
        "document.querySelector('main').insertAdjacentHTML('beforeend', '<pre>' + 'x'.repeat(400) + '</pre>')"
    )
    assert browser.run("document.documentElement.scrollWidth") > width


def test_on_a_narrow_screen_tables_and_plots_scroll_by_themselves(
    browser: chromium.Browser, pages: Callable[[str], Path]
) -> None:
    browser.open(pages("full"), 360)
    wide = browser.run(
        "[...document.querySelectorAll('.scroll')].map(one => [one.scrollWidth, one.clientWidth])"
    )
    assert len(wide) == 9
    assert all(inner > outer for inner, outer in wide)
    assert browser.run("getComputedStyle(document.querySelector('.scroll')).overflowX") == "auto"


TEXTS = """[...document.querySelectorAll('.plot svg')].map(svg => {
    const plain = box => [box.left, box.top, box.right, box.bottom];
    return [svg.closest('section').id, plain(svg.getBoundingClientRect()),
            [...svg.querySelectorAll('text')].map(one => [one.textContent, ...plain(one.getBoundingClientRect())])];
})"""


def overlapping(texts: list[Any]) -> list[tuple[str, str]]:
    """Return texts that stand on each other, by more than the empty rims of their boxes."""
    found = []
    for one, other in combinations(texts, 2):
        wide = min(one[3], other[3]) - max(one[1], other[1])
        tall = min(one[4], other[4]) - max(one[2], other[2])
        if wide > 1 and tall > 4:
            found.append((one[0], other[0]))
    return found


@pytest.mark.parametrize("name", list(REPORTS))
def test_no_text_of_a_plot_is_cut_or_covered(
    browser: chromium.Browser, pages: Callable[[str], Path], name: str
) -> None:
    browser.open(pages(name))
    plots = browser.run(TEXTS)
    assert plots
    for plot, (left, top, right, bottom), texts in plots:
        assert len(texts) > 5
        for text in texts:
            inside = (
                left - 1 <= text[1] and text[3] <= right + 1 and top - 1 <= text[2] and text[4] <= bottom + 1
            )
            assert inside, (plot, text[0])
        assert overlapping(texts) == [], plot


def luminance(colour: list[int]) -> float:
    """As in WCAG 2.2."""
    parts = [value / 255 for value in colour]
    red, green, blue = (
        value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in parts
    )
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


COLOURS_OF_TEXT = """(() => {
    const numbers = text => text.match(/[0-9.]+/g).slice(0, 3).map(Number);
    const of = (where, what) => numbers(getComputedStyle(document.querySelector(where))[what]);
    return [of('body', 'backgroundColor'), of('body', 'color'), of('dt', 'color'), of('.plot svg text', 'fill'),
            of('td.not-run', 'color')];
})()"""


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_by_day_and_by_night(
    browser: chromium.Browser, pages: Callable[[str], Path], dark: bool
) -> None:
    browser.open(pages("hostile"), dark=dark)
    paper, *others = browser.run(COLOURS_OF_TEXT)
    assert (luminance(paper) < 0.1) is dark
    for other in others:
        low, high = sorted((luminance(paper), luminance(other)))
        assert (high + 0.05) / (low + 0.05) >= 4.5
