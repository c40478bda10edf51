"""The HTML report in a browser: on a desktop and on a phone, in light and in dark mode."""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser

from qlora_api.report import EvaluatedRow, RunReport, TaskScore
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import GpuPool
from qlora_trainer.prepare import prepare
from qlora_trainer.publishing.html_report import render_html
from qlora_trainer.publishing.plots import draw_plots
from qlora_trainer.run import run
from tests.browser.browser import OpenPage, Screen, open_browser, open_page
from tests.unit.trainer.conftest import THIRD_PARTY_WARNINGS
from tests.unit.trainer.tiny import RecordingSink, prepare_config, run_config, write_job

pytestmark = [pytest.mark.filterwarnings(warning) for warning in THIRD_PARTY_WARNINGS]

PICTURES: Final = Path(__file__).parents[2] / "out/report"
CONTRAST: Final = Path(__file__).with_name("contrast.js").read_text()
MIN_CONTRAST: Final = 4.5
"""Minimum contrast of text (WCAG 2.2, 1.4.3, level AA)."""
SIZES: Final = """
[...document.querySelectorAll("main *:not(style)")]
  .filter((each) => [...each.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
  .map((each) => parseFloat(getComputedStyle(each).fontSize)
    * (each instanceof SVGElement ? Math.hypot(each.getScreenCTM().a, each.getScreenCTM().b) : 1))
"""
"""Font sizes of all texts as rendered, in CSS pixels."""
MIN_FONT_SIZE: Final = 14
"""Minimum font size on a phone, in CSS pixels."""
DESKTOP, PHONE = 1280, 390
SCREENS: Final = [
    Screen(f"{name}-{scheme}", width, scheme)
    for name, width in (("desktop", DESKTOP), ("phone", PHONE))
    for scheme in ("light", "dark")
]
SECTIONS: Final = [
    "Held-out rows: base model and adapter",
    "Public benchmarks",
    "Loss",
    "Each held-out row",
    "Held-out loss",
    "Learning rate",
    "Gradient norm",
    "Tokens per second",
    "Answers to held-out prompts",
    "Training rows, as the model sees them",
    "Plan",
    "Memory, predicted and measured",
    "Settings chosen for this model and hardware",
    "Training settings",
    "Data",
    "Loading",
    "Lineage",
    "Versions",
]
STEPS: Final = 24
ANSWERED: Final = 6
"""Held-out rows with an answer: more than the page shows at first."""
ENDLESS: Final = "unbroken" * 40
"""Wider than any screen."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run on a tiny model, with the plan for a GPU, a benchmark, and a very long word."""
    folder = tmp_path_factory.mktemp("page")
    spec = write_job(folder, training={"evaluateEvery": 8, "epochs": STEPS / 4}, evaluation={"generations": ANSWERED})
    prepared = prepare(prepare_config(spec), work=folder)
    sized = make_plan(spec, prepared, (GpuPool("NVIDIA-A10", memory=23_028 << 20, capability=(8, 6)),))
    plan = {"total_steps": STEPS, "peak_bytes": sized.peak_bytes, "reasons": sized.reasons}
    run(run_config(spec, prepared, **plan), RecordingSink(), work=folder)
    report_folder = Path(prepared.prefix.removeprefix("file://")) / "report"
    report = RunReport.model_validate_json((report_folder / "report.json").read_text())
    rows = [
        EvaluatedRow.model_validate_json(line) for line in (report_folder / "evaluation.jsonl").read_text().splitlines()
    ]
    score = TaskScore(task="arc_easy", metric="acc", base=0.25, base_error=0.125, adapter=0.5, adapter_error=None)
    samples = tuple(sample.model_copy(update={"adapter": ENDLESS}) for sample in report.samples)
    shown = report.model_copy(update={"tasks": (score,), "samples": samples})
    path = folder / "report.html"
    path.write_text(render_html(shown, draw_plots(shown, rows)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with open_browser() as opened:
        yield opened


@pytest.fixture(scope="module", params=SCREENS, ids=lambda screen: screen.name)
def opened(page: Path, browser: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    screen: Screen = request.param
    with open_page(browser, page, screen) as opened:
        yield opened


def test_page_makes_no_requests_and_logs_no_errors(opened: OpenPage, page: Path):
    assert (opened.requests, opened.console_errors) == ([page.as_uri()], [])


def test_page_shows_every_section(opened: OpenPage):
    PICTURES.mkdir(parents=True, exist_ok=True)
    opened.page.screenshot(path=PICTURES / f"{opened.screen.name}.png", full_page=True)
    headings = opened.page.locator("section > h2")
    assert headings.all_inner_texts() == SECTIONS
    assert all(heading.is_visible() for heading in headings.all())
    boxes = opened.evaluate(
        "[...document.querySelectorAll('section')].map(each => each.getBoundingClientRect().height)"
    )
    assert min(boxes) > 60


def test_page_does_not_scroll_sideways(opened: OpenPage):
    width = opened.evaluate("document.documentElement.clientWidth")
    assert width == opened.screen.width
    assert opened.evaluate("document.documentElement.scrollWidth") <= width
    rights = opened.evaluate("[...document.querySelectorAll('main *')].map(each => each.getBoundingClientRect().right)")
    assert max(rights) <= width
    wider = "[...document.querySelectorAll('main *')].filter(each => each.scrollWidth > each.clientWidth + 1 && "
    assert opened.evaluate(f"{wider}getComputedStyle(each).overflowX !== 'visible').length") == 0


def test_text_has_enough_contrast(opened: OpenPage):
    found = opened.page.evaluate(CONTRAST, MIN_CONTRAST)
    assert found["texts"] > 200
    assert found["pale"] == []


def test_low_contrast_is_detected(opened: OpenPage):
    opened.evaluate("document.querySelector('h1').style.color = 'color-mix(in srgb, currentColor 45%, var(--page))'")
    try:
        assert len(opened.page.evaluate(CONTRAST, MIN_CONTRAST)["pale"]) == 1
    finally:
        opened.evaluate("document.querySelector('h1').removeAttribute('style')")


def test_font_sizes_are_large_enough(opened: OpenPage):
    found = opened.evaluate(SIZES)
    assert len(found) > 200
    # A desktop shows three plots side by side, with smaller text than the single plot of a phone.
    assert min(found) >= (MIN_FONT_SIZE if opened.screen.width == PHONE else 12)


def test_plots_have_a_size_and_an_aria_label(opened: OpenPage):
    pictures = opened.page.get_by_role("img").all()
    assert len(pictures) == 6
    for picture in pictures:
        box = picture.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 150
        assert len(picture.get_attribute("aria-label") or "") > 20


def test_axe_finds_no_violations(opened: OpenPage):
    found = Axe().run(opened.page)
    assert found.response["testEngine"]["name"] == "axe-core"
    assert [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found.response["violations"]] == []
    passed = {each["id"] for each in found.response["passes"]}
    assert {"html-has-lang", "heading-order", "svg-img-alt", "color-contrast", "scope-attr-valid"} <= passed


def test_stacked_tables_keep_their_table_roles(opened: OpenPage):
    table = opened.page.get_by_role("table").first
    assert table.get_by_role("rowheader").all_inner_texts()[0] == "loss, nats per token"
    assert table.get_by_role("row").count() == 6
    assert table.get_by_role("cell").count() == 3 * 5


def test_memory_bars_are_proportional(opened: OpenPage):
    lengths = [box["width"] for bar in opened.page.locator(".bar").all() if (box := bar.bounding_box())]
    assert opened.page.locator(".bars th").all_inner_texts() == ["predicted", "measured"]
    figures = [float(text.split()[0]) for text in opened.page.locator(".bars td:nth-child(2)").all_inner_texts()]
    assert lengths[1] / lengths[0] == pytest.approx(figures[1] / figures[0], rel=0.05)


def test_plan_shows_its_reasons(opened: OpenPage):
    plan = opened.page.locator("section", has=opened.page.get_by_role("heading", name="Plan", exact=True))
    reasons = plan.get_by_role("listitem").all_inner_texts()
    assert reasons[0] == "1 x NVIDIA-A10 on 1 node: as spec.resources asks"
    assert [reason for reason in reasons if reason.startswith("peak ") and "context 0.5" in reason]


def test_further_answers_can_be_expanded(opened: OpenPage):
    last = opened.page.get_by_text(f"Prompt {ANSWERED}", exact=True)
    assert not last.is_visible()
    opened.page.get_by_text("2 more", exact=True).click()
    try:
        assert last.is_visible()
        assert opened.evaluate("document.documentElement.scrollWidth") <= opened.screen.width
    finally:
        opened.page.get_by_text("2 more", exact=True).click()


def test_print_is_complete_and_dark_on_white(opened: OpenPage):
    opened.page.emulate_media(media="print")
    try:
        assert opened.page.get_by_text(f"Prompt {ANSWERED}", exact=True).is_visible()
        colors = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        assert opened.evaluate(colors) == ["rgb(28, 36, 48)", "rgba(0, 0, 0, 0)"]
    finally:
        opened.page.emulate_media(media="screen")


def test_unescaped_markup_is_blocked_by_the_content_policy(page: Path, browser: Browser):
    hostile = (
        "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/pixel' onerror='document.title = 1'>"
    )
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text(encoding="utf-8").replace("</h1>", f"</h1>{hostile}", 1), encoding="utf-8")
    with open_page(browser, broken, SCREENS[0]) as opened:
        blocked = [error for error in opened.console_errors if "Content Security Policy" in error]
        assert (opened.page.title(), opened.answers, len(blocked)) == (
            "colours · fine-tuning report",
            [broken.as_uri()],
            3,
        )
