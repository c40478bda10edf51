"""The report of a run, as a browser shows it: on a desktop and on a phone, in light and in dark."""

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
LEAST_CONTRAST: Final = 4.5
"""Of text (WCAG 2.2, 1.4.3, level AA)."""
SIZES: Final = """
[...document.querySelectorAll("main *:not(style)")]
  .filter((each) => [...each.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim()))
  .map((each) => parseFloat(getComputedStyle(each).fontSize)
    * (each instanceof SVGElement ? Math.hypot(each.getScreenCTM().a, each.getScreenCTM().b) : 1))
"""
"""Sizes of all letters as they are shown, in CSS pixels."""
LEAST_LETTER: Final = 14
"""CSS pixels, on a phone."""
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
    "Choices by model and hardware",
    "Recipe",
    "Data",
    "Loading",
    "Lineage",
    "Versions",
]
STEPS: Final = 24
ANSWERED: Final = 6
"""Held-out rows with an answer: more than are seen at once."""
ENDLESS: Final = "unbroken" * 40
"""Wider than any screen."""


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run on a tiny model, with what a plan says for a GPU, a benchmark, and a word without an end."""
    folder = tmp_path_factory.mktemp("page")
    spec = write_job(folder, training={"evaluateEvery": 8, "epochs": STEPS / 4}, evaluation={"generations": ANSWERED})
    prepared = prepare(prepare_config(spec), work=folder)
    sized = make_plan(spec, prepared, (GpuPool("NVIDIA-A10", memory=23_028 << 20, capability=(8, 6)),))
    said = {"total_steps": STEPS, "peak_bytes": sized.peak_bytes, "reasons": sized.reasons}
    run(run_config(spec, prepared, **said), RecordingSink(), work=folder)
    place = Path(prepared.prefix.removeprefix("file://")) / "report"
    report = RunReport.model_validate_json((place / "report.json").read_text())
    rows = [EvaluatedRow.model_validate_json(line) for line in (place / "evaluation.jsonl").read_text().splitlines()]
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
def look(page: Path, browser: Browser, request: pytest.FixtureRequest) -> Iterator[OpenPage]:
    screen: Screen = request.param
    with open_page(browser, page, screen) as opened:
        yield opened


def test_page_makes_no_requests_and_logs_no_errors(look: OpenPage, page: Path):
    assert (look.requests, look.console_errors) == ([page.as_uri()], [])


def test_page_shows_every_section(look: OpenPage):
    PICTURES.mkdir(parents=True, exist_ok=True)
    look.page.screenshot(path=PICTURES / f"{look.screen.name}.png", full_page=True)
    headings = look.page.locator("section > h2")
    assert headings.all_inner_texts() == SECTIONS
    assert all(heading.is_visible() for heading in headings.all())
    boxes = look.evaluate("[...document.querySelectorAll('section')].map(each => each.getBoundingClientRect().height)")
    assert min(boxes) > 60


def test_page_does_not_scroll_sideways(look: OpenPage):
    width = look.evaluate("document.documentElement.clientWidth")
    assert width == look.screen.width
    assert look.evaluate("document.documentElement.scrollWidth") <= width
    rights = look.evaluate("[...document.querySelectorAll('main *')].map(each => each.getBoundingClientRect().right)")
    assert max(rights) <= width
    wider = "[...document.querySelectorAll('main *')].filter(each => each.scrollWidth > each.clientWidth + 1 && "
    assert look.evaluate(f"{wider}getComputedStyle(each).overflowX !== 'visible').length") == 0


def test_text_has_enough_contrast(look: OpenPage):
    found = look.page.evaluate(CONTRAST, LEAST_CONTRAST)
    assert found["texts"] > 200
    assert found["pale"] == []


def test_low_contrast_is_detected(look: OpenPage):
    look.evaluate("document.querySelector('h1').style.color = 'color-mix(in srgb, currentColor 45%, var(--page))'")
    try:
        assert len(look.page.evaluate(CONTRAST, LEAST_CONTRAST)["pale"]) == 1
    finally:
        look.evaluate("document.querySelector('h1').removeAttribute('style')")


def test_font_sizes_are_large_enough(look: OpenPage):
    found = look.evaluate(SIZES)
    assert len(found) > 200
    # Of three pictures side by side a desktop shows more than a phone of one, in smaller letters.
    assert min(found) >= (LEAST_LETTER if look.screen.width == PHONE else 12)


def test_plots_have_a_size_and_an_aria_label(look: OpenPage):
    pictures = look.page.get_by_role("img").all()
    assert len(pictures) == 6
    for picture in pictures:
        box = picture.bounding_box()
        assert box is not None
        assert min(box["width"], box["height"]) > 150
        assert len(picture.get_attribute("aria-label") or "") > 20


def test_axe_finds_no_violations(look: OpenPage):
    found = Axe().run(look.page)
    assert found.response["testEngine"]["name"] == "axe-core"
    assert [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found.response["violations"]] == []
    passed = {each["id"] for each in found.response["passes"]}
    assert {"html-has-lang", "heading-order", "svg-img-alt", "color-contrast", "scope-attr-valid"} <= passed


def test_tables_stay_tables_where_they_are_stacked(look: OpenPage):
    table = look.page.get_by_role("table").first
    assert table.get_by_role("rowheader").all_inner_texts()[0] == "loss, nats per token"
    assert table.get_by_role("row").count() == 6
    assert table.get_by_role("cell").count() == 3 * 5


def test_memory_bars_are_proportional(look: OpenPage):
    lengths = [box["width"] for bar in look.page.locator(".bar").all() if (box := bar.bounding_box())]
    assert look.page.locator(".bars th").all_inner_texts() == ["predicted", "measured"]
    figures = [float(text.split()[0]) for text in look.page.locator(".bars td:nth-child(2)").all_inner_texts()]
    assert lengths[1] / lengths[0] == pytest.approx(figures[1] / figures[0], rel=0.05)


def test_plan_shows_its_reasons(look: OpenPage):
    plan = look.page.locator("section", has=look.page.get_by_role("heading", name="Plan", exact=True))
    reasons = plan.get_by_role("listitem").all_inner_texts()
    assert reasons[0] == "1 x NVIDIA-A10 on 1 node: as spec.resources asks"
    assert [reason for reason in reasons if reason.startswith("peak ") and "context 0.5" in reason]


def test_further_answers_unfold(look: OpenPage):
    last = look.page.get_by_text(f"Prompt {ANSWERED}", exact=True)
    assert not last.is_visible()
    look.page.get_by_text("2 more", exact=True).click()
    try:
        assert last.is_visible()
        assert look.evaluate("document.documentElement.scrollWidth") <= look.screen.width
    finally:
        look.page.get_by_text("2 more", exact=True).click()


def test_print_is_complete_and_dark_on_white(look: OpenPage):
    look.page.emulate_media(media="print")
    try:
        assert look.page.get_by_text(f"Prompt {ANSWERED}", exact=True).is_visible()
        colours = "[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]"
        assert look.evaluate(colours) == ["rgb(28, 36, 48)", "rgba(0, 0, 0, 0)"]
    finally:
        look.page.emulate_media(media="screen")


def test_unescaped_markup_is_blocked_by_the_content_policy(page: Path, browser: Browser):
    hostile = (
        "<script>document.title = 'taken'</script><img src='http://127.0.0.1:9/pixel' onerror='document.title = 1'>"
    )
    broken = page.with_name("broken.html")
    broken.write_text(page.read_text(encoding="utf-8").replace("</h1>", f"</h1>{hostile}", 1), encoding="utf-8")
    with open_page(browser, broken, SCREENS[0]) as look:
        refused = [complaint for complaint in look.console_errors if "Content Security Policy" in complaint]
        assert (look.page.title(), look.answers, len(refused)) == ("colours · fine-tuning report", [broken.as_uri()], 3)
