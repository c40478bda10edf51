"""Lists of QLoRAClasses: shared by many runs, never older than a run, and refused without harm."""

import asyncio
from datetime import timedelta
from typing import Any

import pytest
from kubernetes.aio import client

from qlora_operator.cluster import class_reader
from qlora_operator.cluster.class_reader import ClassReader
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.interface import ClusterBusyError
from qlora_operator.models import Classes

OLD = timedelta(days=1)
NEW = timedelta(0)


def item(name: str, **metadata: Any) -> dict[str, Any]:
    created = {"creationTimestamp": "2026-03-01T12:00:00Z", "generation": 3}
    return {"metadata": {"name": name, **created, **metadata}, "spec": {"ttl": "1h"}}


class Answers(Api):
    """Answers every request alike, and counts them."""

    def __init__(self, answer: dict[str, Any] | Exception) -> None:
        super().__init__(client.Configuration())
        self.answer = answer
        self.paths: list[str] = []

    async def request(self, _: str, path: str, *__: Any, **___: Any) -> dict[str, Any]:
        self.paths.append(path)
        await asyncio.sleep(0)
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


async def test_classes_are_listed_in_the_cluster_with_what_makes_one_the_default() -> None:
    api = Answers({"items": [
        item("a"), item("b", annotations={"qlora.dev/is-default-class": "true"}),
        item("c", annotations={"qlora.dev/is-default-class": "false"}), item("d", generation="three"),
    ]})  # fmt: skip
    classes = await ClassReader(api).list_classes(OLD)
    assert api.paths == ["/apis/qlora.dev/v1alpha1/qloraclasses"]
    assert [(known.name, known.generation, known.is_default) for known in classes.items] == [
        ("a", 3, False), ("b", 3, True), ("c", 3, False),
    ]  # fmt: skip
    await api.close()


async def test_one_list_serves_all_runs_that_are_older() -> None:
    api = Answers({"items": []})
    reader = ClassReader(api)
    for _ in range(100):
        await reader.list_classes(OLD)
    assert len(api.paths) == 1
    await api.close()


async def test_run_that_is_newer_than_the_list_has_a_new_one() -> None:
    api = Answers({"items": []})
    reader = ClassReader(api)
    await reader.list_classes(OLD)
    api.answer = {"items": [item("a")]}
    assert [known.name for known in (await reader.list_classes(NEW)).items] == ["a"]
    await api.close()


async def test_runs_that_ask_at_the_same_time_share_a_list() -> None:
    api = Answers({"items": []})
    reader = ClassReader(api)
    await asyncio.gather(*(reader.list_classes(NEW) for _ in range(50)))
    assert len(api.paths) <= 2
    await api.close()


async def test_old_list_is_read_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(class_reader, "MAX_AGE", timedelta(0))
    api = Answers({"items": []})
    reader = ClassReader(api)
    await reader.list_classes(OLD)
    await reader.list_classes(OLD)
    assert len(api.paths) == 2
    await api.close()


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (ApiError(403, "Forbidden", "no"), "has no right to list QLoRAClasses"),
        (NotFoundError(404, "NotFound", "no"), "install the CRD qloraclasses.qlora.dev"),
        (ApiError(406, "NotAcceptable", "what is that"), "what is that"),
    ],
)
async def test_refused_list_says_why(error: Exception, words: str) -> None:
    api = Answers(error)
    classes = await ClassReader(api).list_classes(OLD)
    assert classes.items == ()
    assert words in classes.unreadable
    await api.close()


async def test_busy_api_server_is_no_answer_and_is_asked_again() -> None:
    api = Answers(ClusterBusyError("503"))
    reader = ClassReader(api)
    with pytest.raises(ClusterBusyError):
        await reader.list_classes(OLD)
    api.answer = {"items": []}
    assert await reader.list_classes(OLD) == Classes()
    await api.close()


async def test_labels_of_a_namespace_that_may_not_be_read_are_unknown() -> None:
    api = Answers({"metadata": {"name": "ml", "labels": {"team": "a"}}})
    reader = ClassReader(api)
    assert await reader.namespace_labels("ml", OLD) == {"team": "a"}
    api.answer = ApiError(403, "Forbidden", "no")
    assert await reader.namespace_labels("ml", OLD) == {"team": "a"}
    assert await reader.namespace_labels("other", OLD) is None
    assert api.paths == ["/api/v1/namespaces/ml", "/api/v1/namespaces/other"]
    await api.close()
