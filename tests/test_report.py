"""The report's pictures show the figures, and its page opens by itself and looks whole."""

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from hybridk2.benchmark.figures import PHASES, Benchmark
from hybridk2.report import svg, tables
from hybridk2.report.page import page
from tests.browser import CHROMIUM, Chromium, Page
from tests.measured_steps import HIDDEN_SHARE, STEP_MS, benchmark, step

HOSTILE = '<img src=x onerror="alert(1)"> & </title>'

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed")


def bars(picture: str) -> list[tuple[str, dict[str, float]]]:
    """The parts that have a tooltip of a figure: the tooltip, and where they stand."""
    namespace = {"svg": "http://www.w3.org/2000/svg"}
    found = []
    for rectangle in ET.fromstring(picture).iterfind("svg:rect", namespace):
        tip = rectangle.find("svg:title", namespace)
        if tip is not None and tip.text and re.search(r"\d", tip.text):
            sides = {name: float(rectangle.get(name, "")) for name in ("x", "y", "width", "height")}
            found.append((tip.text, sides))
    return found


def test_a_steps_bar_is_divided_as_its_time_is() -> None:
    rows = [(f"{row.context_tokens}", row.decode) for row in benchmark(contexts=(128,)).frontiers]
    parts = bars(svg.steps_by_context(rows))
    total = sum(side["width"] for _, side in parts)
    widths = {tip.split(":")[1].split()[0]: side["width"] for tip, side in parts}
    assert widths["attention"] / total == pytest.approx(6 / STEP_MS, abs=1e-3)
    assert widths["head"] / total == pytest.approx(5 / STEP_MS, abs=1e-3)


def test_every_layer_stacks_its_phases_and_has_the_workers_beside_them() -> None:
    (frontier,) = benchmark(contexts=(128,)).frontiers
    parts = bars(svg.phases_by_layer(frontier.decode))
    second = [(tip, side) for tip, side in parts if tip.startswith("layer 1:")]
    stack = [side for tip, side in second if "host experts" not in tip]
    (host,) = (side for tip, side in second if "host experts" in tip)
    for below, above in pairwise(stack):
        assert above["y"] + above["height"] == pytest.approx(below["y"], abs=0.02)
    height = sum(side["height"] for side in stack)
    assert host["height"] / height == pytest.approx(4 / 9, abs=1e-3)
    assert host["x"] > stack[0]["x"] + stack[0]["width"]


def test_the_overlap_shows_both_sides_on_one_clock() -> None:
    parts = bars(svg.overlap(step()))
    for layer in (1, 2):
        (shared,) = (side for tip, side in parts if tip.startswith(f"layer {layer}: shared"))
        (host,) = (side for tip, side in parts if tip.startswith(f"layer {layer}: host"))
        # The workers begin a quarter into the shared expert, and take as long.
        assert host["width"] == pytest.approx(shared["width"], abs=0.02)
        assert host["x"] - shared["x"] == pytest.approx(shared["width"] / 4, abs=0.02)
        assert host["y"] > shared["y"] + shared["height"]


def test_the_rates_stand_beside_their_share_of_the_roof() -> None:
    heads, rows = tables.rates(benchmark())
    assert heads == ("context", "128", "2,048")
    cells = {row[0]: row[1] for row in rows}
    assert cells["decode tok/s"].startswith("28.4 ± ")
    assert cells["experts GB/s"].endswith("(45%)")  # 1 GB/s, 1.1 times slower, of 2
    assert "%" not in cells["experts TFLOP/s"]  # these kernels have no roof of their own


def test_every_phase_has_its_colours_and_its_meaning() -> None:
    assert set(svg.COLOURS) == set(tables.MEANINGS) == {*PHASES, svg.HOST}


def test_numbers_have_three_digits_and_no_exponent() -> None:
    found = [tables.number(value) for value in (1919.8, 123456.0, 99.94, 0.012345, 7.0)]
    assert found == ["1,920", "123,456", "99.9", "0.0123", "7"]


@pytest.mark.parametrize("contexts", [(128,), (128, 512, 2048)])
def test_the_page_asks_for_nothing_and_runs_nothing(contexts: tuple[int, ...]) -> None:
    text = page(benchmark(contexts=contexts))
    assert not re.findall(r"<(?:script|link|img|iframe|object)\b|@import|\burl\(", text)
    assert set(re.findall(r"(?:https?:)?//[\w.]+", text)) <= {"http://www.w3.org"}  # a namespace


def test_a_models_name_cannot_write_into_the_page() -> None:
    text = page(benchmark(HOSTILE))
    assert "<img" not in text
    assert "&lt;img" in text


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    browser = Chromium(tmp_path_factory.mktemp("chromium"))
    yield browser
    browser.close()


def opened(chromium: Chromium, folder: Path, shown: Benchmark) -> Page:
    file = folder / "report.html"
    file.write_text(page(shown), encoding="utf-8")
    return chromium.open(file.as_uri())


@needs_chromium
def test_a_browser_shows_speeds_tables_and_pictures(chromium: Chromium, tmp_path: Path) -> None:
    view = opened(chromium, tmp_path, benchmark())
    assert view.text("h1") == "a model"
    assert "28.4 tok/s decode" in view.text(".card")
    assert view.count(".card") == 2
    assert f"{HIDDEN_SHARE:.0%} of the workers" in view.text("body")
    # Of two contexts the longer is open; the pictures of the other can be opened.
    visible = "[...document.querySelectorAll('svg')].filter(s => s.checkVisibility()).length"
    assert (view.evaluate(visible), view.count("svg")) == (6, 10)
    view.click("details:nth-last-of-type(2) > summary")
    assert view.evaluate(visible) == 10
    assert view.complaints() == []
    view.close()


@needs_chromium
@pytest.mark.parametrize("width", [390, 1280])
def test_the_page_fits_its_window(chromium: Chromium, tmp_path: Path, width: int) -> None:
    view = opened(chromium, tmp_path, benchmark(model="a" * 300, contexts=(128, 512, 2048)))
    view.call(
        "Emulation.setDeviceMetricsOverride",
        **{"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False},
    )
    assert view.evaluate("document.documentElement.scrollWidth <= innerWidth")
    view.close()


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(
    chromium: Chromium, tmp_path: Path, scheme: str
) -> None:
    view = opened(chromium, tmp_path, benchmark())
    view.call(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-color-scheme", "value": scheme}],
    )
    lightness = """(selector, property) => {
      const colour = getComputedStyle(document.querySelector(selector))[property];
      const [red, green, blue] = colour.match(/[\\d.]+/g).map(Number);
      return (0.2126 * red + 0.7152 * green + 0.0722 * blue) / 255;
    }"""
    page_lightness = view.evaluate(f"({lightness})('body', 'backgroundColor')")
    assert (page_lightness > 0.5) == (scheme == "light")
    for selector, colour in (("body", "color"), ("svg text", "fill"), ("figcaption", "color")):
        assert abs(view.evaluate(f"({lightness})('{selector}', '{colour}')") - page_lightness) > 0.4
    picture = view.evaluate(f"({lightness})('svg > rect', 'fill')")
    assert picture == pytest.approx(page_lightness, abs=0.01)
    view.close()


@needs_chromium
def test_a_saved_picture_is_the_picture(chromium: Chromium, tmp_path: Path) -> None:
    view = opened(chromium, tmp_path, benchmark())
    names = view.evaluate("[...document.querySelectorAll('a[download]')].map(a => a.download)")
    assert len(names) == len(set(names)) == view.count("svg")
    assert all(name.endswith(".svg") for name in names)
    saved = view.evaluate("atob(document.querySelector('a[download]').href.split(',')[1])")
    assert ET.fromstring(saved.encode("latin-1")).tag.endswith("svg")
    view.close()
