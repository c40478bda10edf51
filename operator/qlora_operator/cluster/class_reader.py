"""Reads QLoRAClasses and the labels of namespaces: few objects that many runs share, so one read serves them all.

They are read when a Job is about to be created, as nodes are when a plan is made; no watch, which would have to be kept
apart from those without which nothing is served, and no right to a watch.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from http import HTTPStatus
from typing import Final, Generic, TypeVar

from qlora_api import names
from qlora_operator.cluster.http import Api, ApiError, NotFoundError
from qlora_operator.cluster.parse import labels_of, parse_class
from qlora_operator.cluster.tolerant import parse_or_skip
from qlora_operator.models import Classes

_log = logging.getLogger(__name__)

MAX_AGE: Final = timedelta(seconds=10)
"""How long a copy serves; people change a class a few times a year."""
CREATED_PRECISION: Final = timedelta(seconds=1)
"""Of metadata.creationTimestamp, which is rounded down."""
_PATH: Final = f"/apis/{names.GROUP}/{names.VERSION}/{names.CLASS_PLURAL}"
_NO_RIGHT: Final = (
    "the operator has no right to list QLoRAClasses, which are cluster-scoped; bind the ClusterRole of the chart, or "
    "create the QLoRAJob without className"
)
_NO_CRD: Final = "the cluster has no QLoRAClasses; install the CRD qloraclasses.qlora.dev, or leave className out"

Value = TypeVar("Value")


@dataclass
class SharedRead(Generic[Value]):
    """A value that is read again once it is older than MAX_AGE, or than what it is for; concurrent readers share it."""

    read: Callable[[], Awaitable[Value]]
    _value: list[Value] = field(default_factory=list)
    """The value, once it was read."""
    _begun: float = float("-inf")
    """When the read of the value began, on the monotonic clock."""
    _lock: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def get(self, age: timedelta) -> Value:
        """Return a value that is younger than what it is for, and at most MAX_AGE old."""
        asked = time.monotonic()
        async with self._lock:
            newest = min(MAX_AGE, age - CREATED_PRECISION).total_seconds()
            if self._begun < asked and asked - self._begun >= newest:
                begun = time.monotonic()
                self._value = [await self.read()]
                self._begun = begun
            return self._value[0]


class ClassReader:
    """The QLoRAClasses of one API server, and the labels of namespaces."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._classes: SharedRead[Classes] = SharedRead(self._list)
        self._labels: dict[str, SharedRead[Mapping[str, str] | None]] = {}
        self._refused = ""

    async def list_classes(self, age: timedelta) -> Classes:
        """Return all classes that can be read, or why they cannot be listed."""
        return await self._classes.get(age)

    async def namespace_labels(self, namespace: str, age: timedelta) -> Mapping[str, str] | None:
        """Return the labels of a namespace; None if the operator may not read it."""
        if namespace not in self._labels:
            self._labels[namespace] = SharedRead(partial(self._read_labels, namespace))
        return await self._labels[namespace].get(age)

    async def _list(self) -> Classes:
        try:
            items = (await self._api.request("GET", _PATH)).get("items") or ()
        except NotFoundError:
            return Classes(unreadable=_NO_CRD)
        except ApiError as error:
            self._warn(str(error))
            return Classes(unreadable=_NO_RIGHT if error.status == HTTPStatus.FORBIDDEN else str(error))
        return Classes(tuple(found for item in items if (found := parse_or_skip(names.CLASS_KIND, parse_class, item))))

    async def _read_labels(self, namespace: str) -> Mapping[str, str] | None:
        try:
            return labels_of(await self._api.request("GET", f"/api/v1/namespaces/{namespace}"))
        except ApiError as error:
            self._warn(str(error))
            return None

    def _warn(self, error: str) -> None:
        if error != self._refused:
            _log.warning("QLoRAClasses, or whom they are for, cannot be read, so runs may lack one: %s", error)
        self._refused = error
