"""The QLoRAClass resource: what an installation keeps for a group of runs; its CRD is generated from the models."""

from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.pod_names import MAX_ENTRIES, LabelKey, LabelValue, NodeSelector
from qlora_api.pod_profile import PodProfile
from qlora_api.v1alpha1.patterns import CPU, SUBDOMAIN, WHOLE_BYTES
from qlora_api.v1alpha1.types import ClassName, Duration, Quantity, cel

MAX_NAMESPACES: Final = 256
"""Namespaces that a class lists at most; for more, there is a selector."""

_OptionalName = Annotated[str, Field(pattern=f"^({SUBDOMAIN})?$", max_length=63)]
_Cores = Annotated[Quantity, CPU.rule]
_Bytes = Annotated[Quantity, WHOLE_BYTES.rule]


class LabelRequirement(ApiModel):
    """An expression of a label selector."""

    model_config = cel(
        (
            "self.operator in ['In', 'NotIn'] ? (has(self.values) && size(self.values) > 0) : "
            "(!has(self.values) || size(self.values) == 0)",
            "In and NotIn need values, Exists and DoesNotExist have none; add or remove values",
        )
    )

    key: LabelKey = Field(description="Label key.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(description="How the values are compared.")
    values: Annotated[tuple[LabelValue, ...], Field(max_length=MAX_ENTRIES)] = Field(
        default=(), description="Label values, for In and NotIn."
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether labels satisfy it, as a selector of Kubernetes."""
        present = self.key in labels
        match self.operator:
            case "In":
                return present and labels[self.key] in self.values
            case "NotIn":
                return not present or labels[self.key] not in self.values
            case "Exists":
                return present
        return not present


class LabelSelector(ApiModel):
    """A label selector; an empty one matches everything."""

    match_labels: NodeSelector = Field(default_factory=dict, description="Labels with their values.")
    match_expressions: Annotated[tuple[LabelRequirement, ...], Field(max_length=16)] = Field(
        default=(), description="Expressions, all of which have to hold."
    )

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Return whether labels satisfy all of it."""
        return all(labels.get(key) == value for key, value in self.match_labels.items()) and all(
            requirement.matches(labels) for requirement in self.match_expressions
        )


class ClassNamespaces(ApiModel):
    """The namespaces that may use a class: those that are listed, and those that the selector matches."""

    names: Annotated[tuple[ClassName, ...], Field(max_length=MAX_NAMESPACES)] = Field(
        default=(), description="Names of namespaces."
    )
    selector: LabelSelector | None = Field(default=None, description="Labels of namespaces.")

    def allow(self, namespace: str, labels: Mapping[str, str]) -> bool:
        """Return whether a namespace with such labels may use the class; without names and selector, every one may."""
        if not self.names and self.selector is None:
            return True
        return namespace in self.names or (self.selector is not None and self.selector.matches(labels))


class ClassQueue(ApiModel):
    """The Kueue queue of runs that set none."""

    name: _OptionalName = Field(default="", description="Name of a LocalQueue in the namespace of the run.")
    priority_class: _OptionalName = Field(
        default="",
        description="Name of a WorkloadPriorityClass, for runs that set no queue; empty: the queue's default.",
    )
    required: bool = Field(default=False, description="Whether a run without any queue waits until it has one.")


class PrepareResources(ApiModel):
    """What a prepare pod requests, and may use at most."""

    cpu: _Cores | None = Field(default=None, examples=["2"], description="CPU request.")
    memory: _Bytes | None = Field(default=None, examples=["16Gi"], description="Memory request and limit.")
    ephemeral_storage: _Bytes | None = Field(
        default=None,
        examples=["200Gi"],
        description="Request and limit of the node's disk, which has the dataset and its token rows.",
    )


class ClassResources(ApiModel):
    """Resources of pods whose size no QLoRAJob sets."""

    prepare: PrepareResources = Field(default=PrepareResources(), description="Of the prepare pod.")


class ClassSettings(ApiModel):
    """What of a class reaches the runs that use it."""

    pods: PodProfile = Field(
        default=PodProfile(),
        description="Fields of the pods, in the words of the chart's value pods, which they add to.",
    )
    queue: ClassQueue = Field(default=ClassQueue(), description="The queue of runs that set none.")
    resources: ClassResources = Field(default=ClassResources(), description="Resources of prepare pods.")
    ttl: Duration | None = Field(
        default=None, description="spec.ttl of runs that set none; absent: what the installation says."
    )


class QLoRAClassSpec(ClassSettings):
    """Settings for the runs of some namespaces, which pick it with spec.className."""

    namespaces: ClassNamespaces = Field(
        default=ClassNamespaces(), description="The namespaces that may use the class; empty: all."
    )


def settings_of(spec: QLoRAClassSpec) -> dict[str, Any]:
    """Return what of a class reaches its runs, as it is recorded in their status: only what it sets."""
    return spec.model_dump(mode="json", by_alias=True, exclude_none=True, exclude_defaults=True, exclude={"namespaces"})
