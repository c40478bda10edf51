"""Every reason has one section: what happened, where to look, what becomes of GPUs and of the run; pages agree."""

import re
from pathlib import Path
from typing import Final

import pytest

from qlora_api.guidance import GUIDANCE
from qlora_api.names import UNTROUBLED, Reason
from qlora_operator.circumstances import CIRCUMSTANCES, MOMENTS, Moment, follows
from qlora_operator.recovery.retries import DISRUPTIONS, REMEDIES

DOCS: Final = Path(__file__).parents[2] / "docs"
SECTIONS: Final = re.findall(
    r"^## (\w+)\n(.*?)(?=^## |\Z)",
    (DOCS / "reference/reasons.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
SHORTEST: Final = 40
"""Characters below which a sentence about what lies behind a reason says nothing."""


def test_every_reason_has_one_section() -> None:
    assert sorted(name for name, _ in SECTIONS) == sorted(Reason)


@pytest.mark.parametrize(("name", "section"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_a_section_has_all_parts(name: str, section: str) -> None:
    reason = Reason(name)
    sentence, remedy = GUIDANCE[reason]
    moments, behind = CIRCUMSTANCES[reason]
    assert len(behind) > SHORTEST
    assert behind.endswith(".")
    assert moments
    lines = [f"{sentence} {behind}", *(f"- **{moment}:** {MOMENTS[moment]}" for moment in moments)]
    lines += [f"- **Tried again:** {follows(reason)}", f"- **What to do:** {remedy}"]
    assert [line for line in section.splitlines() if line] == lines


@pytest.mark.parametrize("reason", Reason)
def test_what_follows_is_what_the_operator_does(reason: Reason) -> None:
    told = follows(reason)
    assert ("somebody has to act" in told) == (reason not in {*REMEDIES, *UNTROUBLED, Reason.POD_LOST, *_WAITS})
    assert ("not count against" in told) == (reason in DISRUPTIONS)
    assert reason not in REMEDIES or Moment.TRAINING in CIRCUMSTANCES[reason].moments


_WAITS: Final = {Reason.UNSCHEDULABLE, Reason.POD_REJECTED}
"""Neither the end of a run nor an attempt's, as long as nothing else ends it."""


def test_troubleshooting_leads_to_every_trouble() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\[`(\w+)`\]\(reference/reasons\.md#(\w+)\)", page))
    assert [name for name, anchor in linked if name.lower() != anchor] == []
    assert set(Reason) - UNTROUBLED - {name for name, _ in linked} == set()


def test_the_page_about_attempts_names_every_end_that_another_attempt_follows() -> None:
    page = (DOCS / "attempts.md").read_text(encoding="utf-8")
    assert [reason for reason in {*REMEDIES, *DISRUPTIONS} if f"`{reason}`" not in page] == []
