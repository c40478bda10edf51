"""Parses Node objects, whose labels and taints others write, into what a run is planned with."""

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from qlora_operator.models import Manifest


class _NodeMetadata(BaseModel):
    name: str = ""
    labels: dict[str, str] = {}


class _NodeTaint(BaseModel):
    key: str
    value: str = ""
    effect: str = ""


class _NodeSpec(BaseModel):
    unschedulable: bool = False
    taints: tuple[_NodeTaint, ...] = ()


class _NodeStatus(BaseModel):
    allocatable: dict[str, str] = {}
    capacity: dict[str, str] = {}


class _Node(BaseModel):
    """The fields of a Node that a run is planned with."""

    metadata: _NodeMetadata
    spec: _NodeSpec = _NodeSpec()
    status: _NodeStatus = _NodeStatus()


def parse_node(item: Mapping[str, Any]) -> Manifest:
    """Return name, labels, taints and resources of a Node, with the types that the API promises."""
    return _Node.model_validate(item).model_dump()
