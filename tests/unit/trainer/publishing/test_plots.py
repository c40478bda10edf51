"""The plots of the page: colors, size limits and captions."""

from itertools import pairwise
from xml.etree import ElementTree

import pytest

from qlora_api.report import EvaluatedRow, RowScore
from qlora_trainer.publishing.plots import describe_rows, exponential_moving_average, subsample, to_inline_svg

SVG = """<?xml version="1.0" encoding="utf-8" standalone="no"?>
<!DOCTYPE svg PUBLIC "-//W3C//DTD SVG 1.1//EN" "http://www.w3.org/Graphics/SVG/1.1/DTD/svg11.dtd">
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="288pt" height="194pt" viewBox="0 0 288 194" version="1.1">
<metadata><a>http://elsewhere</a></metadata>
<g id="figure_1"><path id="m12" style="stroke: #030201"/><text style="fill: #010203">1</text></g></svg>"""


def row(base: float, adapter: float) -> EvaluatedRow:
    return EvaluatedRow(
        tokens=2,
        prompt="",
        reference="",
        base=RowScore(loss=base, correct=0),
        adapter=RowScore(loss=adapter, correct=0),
    )


def test_inline_svg_takes_size_and_colors_from_the_page():
    picture = to_inline_svg(SVG, "Loss. It fell.")
    assert picture.startswith('<svg viewBox="0 0 288 194" ')
    (group,) = ElementTree.fromstring(picture)
    path, text = group
    assert (group.attrib, path.attrib) == ({}, {"id": "m12", "style": "stroke: var(--line)"})
    assert (text.attrib["style"], text.text) == ("fill: currentColor", "1")
    assert 'role="img" aria-label="Loss. It fell."' in picture
    assert "elsewhere" not in picture


@pytest.mark.parametrize(
    ("rows", "caption"),
    [
        ([row(2, 1)] * 3 + [row(1, 1)], "3 of 4 rows (75%) have a lower loss, below the line."),
        ([row(2, 1)] * 2500, "2,500 of 2,500 rows (100%) have a lower loss, below the line. 1,000 of them are drawn."),
    ],
)
def test_caption_counts_improved_rows_over_all_rows(rows, caption):
    assert describe_rows(rows) == caption


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 123_456])
def test_subsample_is_bounded_and_even(count):
    drawn = subsample(range(count))
    assert len(drawn) == min(count, 1000)
    assert (drawn[0], drawn[-1]) == (0, count - 1)
    steps = [after - before for before, after in pairwise(drawn)]
    assert not steps or max(steps) - min(steps) <= 1


def test_moving_average_is_unbiased_at_the_start():
    assert exponential_moving_average([4.0, 4.0]) == pytest.approx([4.0, 4.0])
    assert exponential_moving_average([4.0, 2.0])[1] == pytest.approx((0.09 * 4 + 0.1 * 2) / 0.19)
