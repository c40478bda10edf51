"""Whatever the order of events, lists and answers: a watch that delivers is never overdue, and one that does not is."""

from dataclasses import dataclass, field
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.job_ref import JobRef
from qlora_operator.controller.watch_health import OVERDUE_SECONDS, Versions, WatchHealth

NAMES = ("a", "b", "c")


@dataclass
class World:
    """An API server, a watch that delivers late, and the operator's lists and writes."""

    now: float = 0.0
    version: int = 0
    objects: dict[JobRef, int] = field(default_factory=dict)
    undelivered: list[tuple[str, JobRef, int]] = field(default_factory=list)
    writes: list[tuple[JobRef, int]] = field(default_factory=list)
    """Status writes whose answers are under way."""
    deleted_while_active: set[JobRef] = field(default_factory=set)
    lists: list[tuple[Versions, dict[JobRef, str]]] = field(default_factory=list)
    """Lists whose answers are under way."""

    def __post_init__(self) -> None:
        self.health = WatchHealth(lambda: self.now)

    def change(self, ref: JobRef) -> None:
        self.version += 1
        self.objects[ref] = self.version
        self.undelivered.append(("MODIFIED", ref, self.version))

    def write(self, ref: JobRef) -> None:
        if ref in self.objects:
            self.change(ref)
            self.writes.append((ref, self.version))

    def delete(self, ref: JobRef) -> None:
        if self.objects.pop(ref, None):
            self.version += 1
            self.undelivered.append(("DELETED", ref, self.version))

    def deliver(self, _: JobRef) -> None:
        if not self.undelivered:
            return
        kind, ref, version = self.undelivered.pop(0)
        if kind == "DELETED":
            self.health.on_delete(ref, str(version))
            if any(written == ref for written, _ in self.writes):
                self.deleted_while_active.add(ref)
        else:
            self.health.on_event(ref, str(version))

    def answer_write(self, _: JobRef) -> None:
        if not self.writes:
            return
        ref, version = self.writes.pop(0)
        self.health.expect_version(ref, str(version))
        if ref in self.deleted_while_active and ref not in self.objects:
            self.health.forget(ref)  # the reconcile is repeated, and finds it gone

    def start_list(self, _: JobRef) -> None:
        before = self.health.known_versions("")
        self.lists.append((before, {ref: str(version) for ref, version in self.objects.items()}))

    def answer_list(self, _: JobRef) -> None:
        if self.lists:
            self.health.on_list(*self.lists.pop(0))

    def settle(self) -> None:
        ref = JobRef("ml", "a")
        while self.undelivered or self.writes or self.lists:
            self.deliver(ref)
            self.answer_write(ref)
            self.answer_list(ref)


STEPS: Any = st.lists(
    st.tuples(
        st.sampled_from(["change", "write", "delete", "deliver", "answer_write", "start_list", "answer_list"]),
        st.sampled_from([JobRef("ml", name) for name in NAMES]),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(steps=STEPS)
def test_watch_that_delivers_is_never_overdue(steps: list[tuple[str, JobRef]]) -> None:
    world = World()
    for step, ref in steps:
        getattr(world, step)(ref)
    world.settle()
    world.now += OVERDUE_SECONDS + 1
    assert world.health.overdue() == ()


@given(steps=STEPS)
def test_two_lists_leave_no_entries_of_deleted_qlorajobs(steps: list[tuple[str, JobRef]]) -> None:
    world = World()
    for step, ref in steps:
        getattr(world, step)(ref)
    for name in NAMES:
        world.delete(JobRef("ml", name))
    world.settle()
    for _ in range(2):
        world.start_list(JobRef("ml", "a"))
        world.settle()
    assert world.health.known_versions("") == {}


@given(steps=STEPS)
def test_watch_that_stops_is_overdue_after_the_next_list(steps: list[tuple[str, JobRef]]) -> None:
    world = World()
    for step, ref in steps:
        getattr(world, step)(ref)
    world.settle()
    ref = JobRef("ml", "new")
    world.change(ref)
    world.undelivered.clear()
    world.start_list(ref)
    world.settle()
    world.now += OVERDUE_SECONDS + 1
    assert world.health.overdue() == (ref,)
