"""The report page in a real browser."""

from __future__ import annotations

import math
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

from clip_callbacks import GradientClipping, GradientNormMonitor
from clip_callbacks.cli import main
from tests.helpers.browser import needs_browser
from tests.helpers.logs import write_guarded
from tests.helpers.training import Poisoned, Regression, data, make_trainer

pytestmark = needs_browser
of_each_kind = pytest.mark.parametrize(
    ("width", "dark"),
    [
        (1280, False),
        (390, True),
        pytest.param(1280, True, marks=pytest.mark.slow),
        pytest.param(390, False, marks=pytest.mark.slow),
    ],
)
BLOCK_PLOTS = {f"{key}-3" for key in ("blocks", "updates", "weights", "means", "deviations", "zeros", "vanished")}
PLOTS = {"norm", "loss", "loss_limit", "coefficient", "histogram", "what_if", "blocks-1", "blocks-2"} | BLOCK_PLOTS


@pytest.fixture(scope="module")
def logs(tmp_path_factory):
    """Two runs with the same metrics, one of them with bad steps, and one with loss spikes and statistics of gradients."""
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
    write_guarded(folder / "statistics")
    return folder


@pytest.fixture(scope="module")
def page(logs):
    path = logs / "report.html"
    assert main(["report", str(logs), "-o", str(path), "--title", "Three runs"]) == 0
    return path.as_uri()


@pytest.fixture(scope="module")
def wide(opened, page):
    """The page, opened once for all tests that only read it."""
    with opened(page) as it:
        yield it


@pytest.fixture(scope="module")
def narrow(opened, page):
    """The page on a phone, in the dark."""
    with opened(page, width=390, dark=True) as it:
        yield it


@pytest.fixture
def shown(request, opened, page, width, dark):
    """The page on a screen of a given width, light or dark."""
    if (width, dark) in ((1280, False), (390, True)):
        yield request.getfixturevalue("narrow" if dark else "wide")
    else:
        with opened(page, width=width, dark=dark) as it:
            yield it


def cells(opened_page, table):
    return opened_page.page.evaluate(
        """table => [...document.querySelectorAll(`${table} tr`)].map(
            row => [...row.querySelectorAll("th, td")].map(cell => cell.innerText.trim()))""",
        table,
    )


def test_it_renders_without_an_error_and_asks_nobody_for_anything(wide, page):
    assert wide.errors == []
    assert [url for url in wide.requests if not url.startswith("data:")] == [page]
    assert wide.page.title() == "Three runs: clean, poisoned, statistics"
    assert wide.page.query_selector_all("script") == []


def test_the_figures_in_the_table_are_those_of_the_log(wide, logs):
    import pandas as pd

    headings, *rows = cells(wide, "#runs-table")
    assert [row[0] for row in rows] == ["clean", "poisoned", "statistics"]
    for row in rows:
        frame = pd.read_csv(logs / row[0] / "metrics.csv")
        shown = dict(zip((" ".join(heading.split()) for heading in headings), row, strict=True))
        norms = frame["grad/total_norm"].dropna()
        assert shown["steps"] == "80"
        assert shown["logged norms"] == str(len(norms))
        for percent in (50, 90, 99):
            assert shown[f"norm p{percent}"] == f"{np.percentile(norms, percent):.3g}"
        assert shown["largest norm"] == f"{norms.max():.3g}"
        assert shown["last max_norm"] == ("1" if row[0] == "statistics" else "3")
        assert shown["skipped steps"] == f"{frame['grad/skipped_steps'].max():.0f}"
        fractions = frame[frame["grad/clip_fraction"].notna()]  # a skipped step has none: it is counted with the next one
        clipped = np.average(fractions["grad/clip_fraction"], weights=np.diff(fractions["step"], prepend=-1))
        assert shown["clipped steps"] == f"{clipped:.1%}"


def test_bad_steps_are_in_their_table(wide):
    rows = cells(wide, "table.bad-steps")
    by_step = {row[0]: row for row in rows}
    assert by_step["4"][1:] == [
        "skipped",
        "-",
        "epoch 0, batch 4, rank 0",
        'stage "loss"; not finite: net.0.weight, net.0.bias, net.2.weight, net.2.bias',
    ]
    assert by_step["30"][1] == "skipped"
    assert by_step["33"][1] == "spike"


@of_each_kind
def test_plots_fit_the_screen_and_can_be_read(shown, width, dark):
    figures = {figure.get_attribute("id"): figure for figure in shown.page.query_selector_all("figure")}
    assert set(figures) == PLOTS
    for figure in figures.values():
        (svg,) = [svg for svg in figure.query_selector_all("svg") if svg.is_visible()]
        assert svg.bounding_box()["width"] > 0.8 * min(width, 1088) - 32
    scrolls = shown.page.evaluate("document.documentElement.scrollWidth > window.innerWidth")
    assert not scrolls, "nothing but tables may be wider than the screen"
    sizes = shown.page.evaluate(
        "[...document.querySelectorAll('figure svg text')].filter(t => t.getClientRects().length)"
        ".map(t => t.getBoundingClientRect().height).filter(h => h > 0)"
    )
    assert min(sizes) >= 8, "in pixels: labels must be readable"
    paper = shown.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert paper == ("rgb(20, 24, 30)" if dark else "rgb(255, 255, 255)")
    ink = shown.page.evaluate("getComputedStyle(document.querySelector('figure svg text')).fill")
    assert ink == ("rgb(230, 234, 240)" if dark else "rgb(28, 36, 48)")


def drawn(it, gid):
    """The element that matplotlib drew under a name, in the wide plot."""
    (element,) = it.page.query_selector_all(f".wide-plot [id$='-{gid}']")
    return element


def points(it, gid):
    """Count the points of a line."""
    path = drawn(it, gid).query_selector("path").get_attribute("d")
    return path.count("M") + path.count("L")


def test_every_logged_point_is_in_the_plots(wide, logs):
    import pandas as pd

    for name in ("clean", "poisoned"):
        frame = pd.read_csv(logs / name / "metrics.csv")
        for key in ("total_norm", "clip_coef", "max_norm"):
            assert points(wide, f"{key}-{name}") == frame[f"grad/{key}"].notna().sum(), (key, name)
        losses = frame["train_loss"].astype(float)
        logged = points(wide, f"loss-{name}: train_loss")
        assert logged == np.isfinite(losses).sum()
        clipped = (frame["grad/clip_coef"] < 1).sum()
        assert len(drawn(wide, f"clipped-{name}").query_selector_all("use")) == clipped > 10
        assert points(wide, f"what_if-{name}") > 50
        assert points(wide, f"histogram-{name}") > 20
        assert points(wide, f"clip_fraction-{name}") > 20
    assert len(drawn(wide, "skips-poisoned").query_selector_all("use")) == 2
    assert wide.page.query_selector_all("[id$='-skips-clean']") == []


def test_losses_are_drawn_with_their_limit_and_their_spikes(wide, logs):
    import pandas as pd

    frame = pd.read_csv(logs / "statistics" / "metrics.csv")
    assert points(wide, "guarded_loss-statistics") == frame["grad/loss"].notna().sum()
    assert points(wide, "loss_limit-statistics") == np.isfinite(frame["grad/loss_limit"]).sum()
    for kind, count in (("skipped_spikes", 1), ("spikes", 2)):
        # the end of another mark's identifier is that of this one, too
        marks = wide.page.query_selector_all(f".wide-plot [id$='wide-{kind}-statistics']")
        assert [len(it.query_selector_all("use")) for it in marks] == [count]


def test_blocks_without_learning_have_a_strip(wide):
    path = drawn(wide, "vanished-middle").query_selector_all("path")
    assert len(path) == 4, "one for each epoch"
    assert wide.page.query_selector_all("[id*='vanished-head'], [id*='vanished-encoder']") == []
    assert wide.page.query_selector_all("#vanished-1, #vanished-2") == [], "the other runs have none"


def test_spikes_of_the_loss_are_in_the_table_of_bad_steps(wide):
    rows = {row[0]: row[1:] for row in cells(wide, "[aria-label='Bad steps of statistics'] table")}
    assert rows["40"] == [
        "skipped as a spike",
        "90",
        "epoch 2, batch 0, rank 0",
        "loss 9.5 above its limit 3.25; largest gradients: head.weight",
    ]
    assert rows["41"][0] == "spike, reported, not skipped"
    assert rows["41"][3] == "loss 6.5 above its limit 3.25; norm 1 within its limit 5; largest gradients: head.weight"
    assert rows["60"][0] == "loss spike"


def test_heat_maps_show_the_norms_of_the_blocks(wide, logs):
    import base64
    import io

    import pandas as pd
    from PIL import Image

    image = wide.page.query_selector("figure#blocks-1 .wide-plot image[id*='blocks-1-image'], figure#blocks-1 .wide-plot image")
    encoded = image.get_attribute("xlink:href") or image.get_attribute("href")
    with Image.open(io.BytesIO(base64.b64decode(encoded.partition(",")[2]))) as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(float)
    frame = pd.read_csv(logs / "clean" / "metrics.csv")
    # viridis is bright where norms are large: rows of blocks, in the order of their names
    for row, block in enumerate(("net.0", "net.2")):
        norms = np.log(frame[f"grad_norm/{block}"].dropna().to_numpy())
        height, width = pixels.shape[:2]
        line = pixels[int((row + 0.5) * height / 2), ((np.arange(len(norms)) + 0.5) * width / len(norms)).astype(int)].sum(1)
        assert np.corrcoef(norms, line)[0, 1] > 0.8


def test_a_run_has_one_color_in_all_plots_and_tables(wide):
    for place, name in enumerate(("clean", "poisoned")):
        swatch = wide.page.query_selector_all("#runs-table .swatch")[place].evaluate("e => getComputedStyle(e).backgroundColor")
        for gid in (f"total_norm-{name}", f"clip_coef-{name}", f"what_if-{name}"):
            path = drawn(wide, gid).query_selector("path")
            assert path.evaluate("e => getComputedStyle(e).stroke") == swatch, gid


@contextmanager
def without_drawings(page):
    """Take out what is hidden from assistive technology: axe visits each of its elements, though no rule is about them."""
    inside = page.evaluate(
        """() => {
            const focusable = "a, button, input, select, textarea, summary, [tabindex], [contenteditable]";
            window.drawings = [...document.querySelectorAll("svg[aria-hidden=true]")].map(svg => {
                const inside = new DocumentFragment();
                const found = svg.querySelectorAll(focusable).length;
                inside.append(...svg.childNodes);
                return {svg, inside, found};
            });
            return window.drawings.map(each => each.found);
        }"""
    )
    assert inside == [0] * 2 * len(PLOTS), "what is hidden cannot have the focus"
    yield
    page.evaluate("() => window.drawings.forEach(({svg, inside}) => svg.append(inside))")


@of_each_kind
def test_it_passes_an_accessibility_check(shown):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright")
    for details in shown.page.query_selector_all("details:not([open]) > summary"):
        details.click()
    with without_drawings(shown.page):
        results = axe.Axe().run(shown.page)
    assert results.violations_count == 0, results.generate_report()
    checked = {check["id"] for check in results.response["passes"]}
    assert {"color-contrast", "heading-order", "page-has-heading-one", "html-has-lang", "scope-attr-valid"} <= checked
    pictures = shown.page.query_selector_all("[role=img]")
    assert all(picture.get_attribute("aria-label") for picture in pictures)


def test_the_keyboard_reaches_what_scrolls(narrow):
    scroll = {"Table of runs", "Bad steps of poisoned"}
    reached = set()
    for _ in range(60):
        narrow.page.keyboard.press("Tab")
        reached.add(narrow.page.evaluate("document.activeElement.getAttribute('aria-label')"))
        if scroll <= reached:
            break
    assert scroll <= reached
