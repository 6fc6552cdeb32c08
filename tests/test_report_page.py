"""The report page in a real browser."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from clip_callbacks import GradientClipping, GradientNormMonitor
from clip_callbacks.cli import main
from tests.browser import needs_browser, opened
from tests.conftest import Poisoned, Regression, data, make_trainer

pytestmark = needs_browser
PICTURES = {"norm", "loss", "coefficient", "histogram", "what_if", "blocks-1", "blocks-2"}


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs, one with bad steps, of the same names of metrics."""
    folder = tmp_path_factory.mktemp("logs")
    for name, module in (("clean", Regression()), ("poisoned", Poisoned({4: math.nan, 30: math.inf, 33: 1e4}))):
        torch.manual_seed(0)
        logger = CSVLogger(folder, "", version=name)
        callbacks = [GradientClipping(3.0), GradientNormMonitor()]
        trainer = make_trainer(folder, *callbacks, logger=logger, log_every_n_steps=1, max_epochs=4)
        if name == "clean":
            trainer.fit(module, data(20))
        else:
            with pytest.warns(RuntimeWarning, match="Non-finite"):
                trainer.fit(module, data(20))
    return folder


@pytest.fixture(scope="module")
def page(logs):
    path = logs / "report.html"
    assert main(["report", str(logs), "-o", str(path), "--title", "Two runs"]) == 0
    return path.as_uri()


def cells(opened_page, table):
    rows = opened_page.page.query_selector_all(f"{table} tr")
    return [[cell.inner_text().strip() for cell in row.query_selector_all("th, td")] for row in rows]


def test_it_renders_without_an_error_and_asks_nobody_for_anything(page):
    with opened(page) as it:
        assert it.errors == []
        assert [url for url in it.requests if not url.startswith("data:")] == [page]
        assert it.page.title() == "Two runs: clean, poisoned"
        assert it.page.query_selector_all("script") == []


def test_the_figures_in_the_table_are_those_of_the_log(page, logs):
    import pandas as pd

    with opened(page) as it:
        headings, *rows = cells(it, "#runs-table")
    assert [row[0] for row in rows] == ["clean", "poisoned"]
    for row in rows:
        frame = pd.read_csv(logs / row[0] / "metrics.csv")
        shown = dict(zip(headings, row, strict=True))
        norms = frame["grad/total_norm"].dropna()
        assert shown["steps"] == "80"
        assert shown["norms logged"] == str(len(norms))
        for percent in (50, 90, 99):
            assert shown[f"p{percent}"] == f"{np.percentile(norms, percent):.3g}"
        assert shown["largest"] == f"{norms.max():.3g}"
        assert shown["max_norm"] == "3"
        assert shown["skipped"] == f"{frame['grad/skipped_steps'].max():.0f}"
        clipped = (frame["grad/clip_coef"].dropna() < 1).sum() / (frame["step"].max() + 1)
        assert float(shown["clipped"].rstrip("%")) == pytest.approx(100 * clipped, abs=2.0)  # skipped steps count for neither


def test_bad_steps_are_in_their_table(page):
    with opened(page) as it:
        rows = cells(it, "table.bad-steps")
    by_step = {row[0]: row for row in rows}
    assert by_step["4"][1:] == [
        "skipped",
        "-",
        "epoch 0, batch 4, rank 0",
        "loss: net.0.weight, net.0.bias, net.2.weight, net.2.bias",
    ]
    assert by_step["30"][1] == "skipped"
    assert by_step["33"][1] == "spike"


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, False), (1280, True), (390, True)])
def test_pictures_are_not_empty_and_fit_the_screen(page, width, dark, tmp_path):
    from PIL import Image

    with opened(page, width=width, dark=dark) as it:
        shown = {figure.get_attribute("id"): figure for figure in it.page.query_selector_all("figure")}
        assert set(shown) == PICTURES
        for name, figure in shown.items():
            (svg,) = [svg for svg in figure.query_selector_all("svg") if svg.is_visible()]
            box = svg.bounding_box()
            assert box["width"] > 0.8 * min(width, 1088) - 32
            path = tmp_path / f"{name}.png"
            svg.screenshot(path=path)
            with Image.open(path) as picture:
                colors = picture.convert("RGB").getcolors(1 << 22)
            assert len(colors) > 30, name
            most = max(count for count, _ in colors) / sum(count for count, _ in colors)
            assert most < 0.985, f"{name} is almost all background"
        scrolls = it.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
        assert not scrolls, "nothing but tables may be wider than the screen"
        sizes = it.page.evaluate(
            "[...document.querySelectorAll('figure svg text')].filter(t => t.getClientRects().length)"
            ".map(t => t.getBoundingClientRect().height).filter(h => h > 0)"
        )
        assert min(sizes) >= 8, "in pixels: labels must be readable"
        paper = it.page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert paper == ("rgb(20, 24, 30)" if dark else "rgb(255, 255, 255)")


def drawn_points(it, gid):
    """Ends of the segments of a line of the picture, in its own coordinates."""
    path = it.page.query_selector(f".wide-picture [id$='{gid}'] path").get_attribute("d")
    return path.count("M") + path.count("L")


def test_every_logged_norm_is_in_the_picture(page, logs):
    import pandas as pd

    with opened(page) as it:
        for name in ("clean", "poisoned"):
            norms = pd.read_csv(logs / name / "metrics.csv")["grad/total_norm"].dropna()
            # matplotlib leaves out points that lie on the line between their neighbours
            assert len(norms) * 0.8 <= drawn_points(it, f"total_norm-{name}") <= len(norms)


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (1280, True), (390, False), (390, True)])
def test_it_passes_an_accessibility_check(page, width, dark):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    with opened(page, width=width, dark=dark) as it:
        for details in it.page.query_selector_all("details > summary"):
            details.click()
        results = axe.Axe().run(it.page)
        assert results.violations_count == 0, results.generate_report()
        checked = {check["id"] for check in results.response["passes"]}
        assert {"color-contrast", "heading-order", "page-has-heading-one", "html-has-lang", "scope-attr-valid"} <= checked
        pictures = it.page.query_selector_all("[role=img]")
        assert all(picture.get_attribute("aria-label") for picture in pictures)


def test_the_keyboard_reaches_what_scrolls(page):
    with opened(page, width=390) as it:
        reached = set()
        for _ in range(60):
            it.page.keyboard.press("Tab")
            label = it.page.evaluate("document.activeElement.getAttribute('aria-label')")
            reached.add(label)
        assert "Table of runs" in reached
        assert "Bad steps of poisoned" in reached
