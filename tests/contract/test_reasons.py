"""Every reason has one section: what happened, the cause, the fix, and the terms that people search for."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest

from qlora_api.reasons import NORMAL_REASONS, REASONS, Domain, Moment, Reason, ReasonRecord, Topic
from qlora_codegen.references import MOMENTS, TOPICS, describe, describe_outcome

DOCS: Final = Path(__file__).parents[2] / "docs"
SECTIONS: Final = re.findall(
    r"^## (\w+)\n(.*?)(?=^## |\Z)",
    (DOCS / "reference/reasons.md").read_text(encoding="utf-8"),
    re.MULTILINE | re.DOTALL,
)
SHORTEST: Final = 40
"""Minimum characters of a useful sentence about the cause of a reason."""
SEARCHES: Final = {
    "OOMKilled": Reason.HOST_OUT_OF_MEMORY,
    "exit code 137": Reason.HOST_OUT_OF_MEMORY,
    "MemoryError": Reason.HOST_OUT_OF_MEMORY,
    "CUDA out of memory": Reason.CUDA_OUT_OF_MEMORY,
    "torch.OutOfMemoryError": Reason.CUDA_OUT_OF_MEMORY,
    "CrashLoopBackOff": Reason.RETRIES_EXHAUSTED,
    "ImagePullBackOff": Reason.IMAGE_PULL_FAILED,
    "ErrImagePull": Reason.IMAGE_PULL_FAILED,
    "pod stuck in Pending": Reason.SCHEDULING,
    "FailedScheduling": Reason.UNSCHEDULABLE,
    "Insufficient nvidia.com/gpu": Reason.UNSCHEDULABLE,
    "FailedMount": Reason.STARTUP_DEADLINE_EXCEEDED,
    "exceeded quota": Reason.POD_REJECTED,
    "NCCL timeout": Reason.COLLECTIVE_TIMEOUT,
    "watchdog caught collective operation timeout": Reason.COLLECTIVE_TIMEOUT,
    "training hangs": Reason.HEARTBEAT_LOST,
    "403 AccessDenied": Reason.S3_DENIED,
    "SignatureDoesNotMatch": Reason.S3_DENIED,
    "401 GatedRepoError": Reason.GATED_MODEL_NO_ACCESS,
    "NoSuchBucket": Reason.DATASET_NOT_FOUND,
    "RepositoryNotFoundError": Reason.MODEL_NOT_FOUND,
    "SlowDown": Reason.S3_UNAVAILABLE,
    "429 Too Many Requests": Reason.HUB_RATE_LIMITED,
    "air-gapped": Reason.HUB_UNAVAILABLE,
    "HF_HUB_OFFLINE": Reason.HUB_UNAVAILABLE,
    "exit code 143": Reason.INTERRUPTED,
    "SIGTERM": Reason.INTERRUPTED,
    "spot interruption": Reason.INTERRUPTED,
    "kubectl drain": Reason.INTERRUPTED,
    "DiskPressure": Reason.EVICTED,
    "NodeNotReady": Reason.NODE_LOST,
    "No CUDA GPUs are available": Reason.ACCELERATOR_MISSING,
    "uncorrectable ECC error": Reason.ACCELERATOR_FAILED,
    "Xid": Reason.ACCELERATOR_FAILED,
    "NaN loss": Reason.NON_FINITE_LOSS,
    "loss diverged": Reason.LOSS_DIVERGED,
    "resume training": Reason.SUSPENDED_BY_USER,
    "target_modules not found": Reason.MODEL_UNSUPPORTED,
    "invalid JSONL": Reason.DATASET_INVALID,
}
"""Search terms of operators on call, and the reason whose section must contain them."""


def _of(name: str) -> ReasonRecord:
    return REASONS[Reason(name)]


def test_every_reason_has_one_record() -> None:
    assert list(REASONS) != []
    assert set(REASONS) == set(Reason)


def test_every_reason_has_one_section() -> None:
    assert sorted(name for name, _ in SECTIONS) == sorted(Reason)


@pytest.mark.parametrize(("name", "section"), SECTIONS, ids=[name for name, _ in SECTIONS])
def test_a_section_has_all_parts(name: str, section: str) -> None:
    record = _of(name)
    assert len(record.background) > SHORTEST
    assert record.background.endswith(".")
    assert record.moments
    lines = [
        describe(record),
        *_aliases(record),
        *(f"- **{moment}:** {MOMENTS[moment]}" for moment in record.moments),
        f"- **Retried:** {describe_outcome(Reason(name))}",
        f"- **What to do:** {record.remedy}",
    ]
    assert [line for line in section.splitlines() if line] == lines


def _aliases(record: ReasonRecord) -> Iterator[str]:
    if record.also_known_as:
        yield f"Also known as: {', '.join(f'`{words}`' for words in record.also_known_as)}."


def test_figures_of_the_operator_are_filled_in() -> None:
    assert [name for name, section in SECTIONS if re.search(r"[{}]", section)] == []


@pytest.mark.parametrize(("search", "reason"), SEARCHES.items())
def test_a_search_finds_the_section_of_one_reason(search: str, reason: Reason) -> None:
    words = re.compile(rf"(?<!\w){re.escape(search.lower())}(?!\w)")
    assert [name for name, section in SECTIONS if words.search(_searchable(name, section))] == [reason]


def _searchable(name: str, section: str) -> str:
    """Return the line with other names, and not what a section says about other reasons."""
    known = re.search(r"^Also known as: .*$", section, re.MULTILINE)
    return f"{name} {known[0] if known else ''}".lower()


def test_words_that_people_search_belong_to_one_reason() -> None:
    words = [alias.lower() for record in REASONS.values() for alias in record.also_known_as]
    assert sorted({alias for alias in words if words.count(alias) > 1}) == []


def test_every_failure_has_search_terms() -> None:
    assert [reason for reason in set(Reason) - NORMAL_REASONS if not REASONS[reason].also_known_as] == []


@pytest.mark.parametrize("reason", Reason)
def test_the_outcome_is_what_the_operator_does(reason: Reason) -> None:
    record = REASONS[reason]
    outcome = describe_outcome(reason)
    goes_on = record.retry is not None or record.normal or reason in {Reason.POD_LOST, *_WAITS}
    assert ("somebody has to fix" in outcome) == (not goes_on)
    assert (record.domain is None) == record.normal
    assert ("spec.retries.maxAttempts" in outcome) == (record.domain is Domain.RUN)
    assert record.retry is None or {Moment.TRAINING, Moment.STARTING, Moment.WAITING} & set(record.moments)


_WAITS: Final = {Reason.UNSCHEDULABLE, Reason.POD_REJECTED, Reason.DOES_NOT_FIT}
"""Reasons that end neither a run nor an attempt by themselves."""


def test_troubleshooting_links_every_failure_reason() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    linked = set(re.findall(r"\[`(\w+)`\]\(reference/reasons\.md#(\w+)\)", page))
    assert [name for name, anchor in linked if name.lower() != anchor] == []
    assert set(Reason) - NORMAL_REASONS - {name for name, _ in linked} == set()


def test_every_topic_has_its_row() -> None:
    assert sorted(topic for topics in TOPICS.values() for topic in topics) == sorted(Topic)
    assert {record.topic for record in REASONS.values()} - {None} == set(Topic)


def test_attempts_page_lists_every_retried_reason() -> None:
    page = (DOCS / "attempts.md").read_text(encoding="utf-8")
    followed = [reason for reason, record in REASONS.items() if record.retry]
    assert [reason for reason in followed if f"`{reason}`" not in page] == []
