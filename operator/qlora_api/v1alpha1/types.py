"""Field types: bounded strings, CEL rules for the API server, references to Secrets."""

import re
from datetime import timedelta
from typing import Annotated, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, JsonValue

from qlora_api.base import ApiModel
from qlora_api.units import SECONDS
from qlora_api.v1alpha1.patterns import (
    BUCKET,
    CLAIM_NAME,
    HUB_DATASET,
    HUB_MODEL,
    LABEL,
    LABEL_KEY,
    LABEL_PREFIX,
    NO_FILE_URI,
    NO_IP_BUCKET,
    NO_PATH_TRAVERSAL,
    PRINTABLE,
    QUANTITY,
    SUBDOMAIN,
    VALIDATIONS,
    PatternMessage,
)

MAX_URI: Final = 1024
"""Maximum length of an object key in S3, in bytes."""


def _validate_duration(text: str) -> str:
    if not re.fullmatch(r"[1-9][0-9]*(s|m|h|d)", text):
        raise ValueError("write a number and one unit: 90s, 30m, 24h or 7d")
    return text


def to_timedelta(duration: str) -> timedelta:
    """Convert a duration such as `30m`."""
    return timedelta(seconds=int(duration[:-1]) * SECONDS[duration[-1]])


def cel(*rules: tuple[str, str]) -> ConfigDict:
    """Return a model config with CEL rules.

    Args:
        rules: Pairs of an expression that must hold, and the message that says how to fix it.

    """
    validations: list[JsonValue] = [{"rule": rule, "message": message} for rule, message in rules]
    return ConfigDict(json_schema_extra={VALIDATIONS: validations})


PLACEHOLDER: Final = r"\{[^{}]+\}"
"""Matches text with at least one {field}."""

Duration = Annotated[
    str, Field(pattern=r"^[1-9][0-9]*(s|m|h|d)$", max_length=8, examples=["30m"]), AfterValidator(_validate_duration)
]
_Uri = Annotated[
    str,
    Field(pattern=f"^((hf|s3|file)://.+|pvc://{SUBDOMAIN}/.*)$", max_length=MAX_URI),
    PRINTABLE,
    CLAIM_NAME,
    NO_PATH_TRAVERSAL,
    BUCKET,
    NO_IP_BUCKET,
    NO_FILE_URI,
]
ModelUri = Annotated[
    _Uri, PatternMessage("write hf://organization/name, s3://bucket/prefix or pvc://claim/path"), HUB_MODEL
]
DatasetUri = Annotated[
    _Uri,
    PatternMessage("write s3://bucket/file, hf://datasets/organization/name/file or pvc://claim/path"),
    HUB_DATASET,
]
OutputUri = Annotated[
    str,
    Field(pattern=r"^(s3|file)://.+$", max_length=MAX_URI),
    PatternMessage("write s3://bucket/prefix; results are published to a bucket"),
    PRINTABLE,
    NO_PATH_TRAVERSAL,
    BUCKET,
    NO_IP_BUCKET,
    NO_FILE_URI,
]
MergeBase = Literal["original", "dequantised"]
ObjectName = Annotated[str, Field(pattern=f"^{SUBDOMAIN}$", max_length=253, examples=["s3-credentials"])]
ClassName = Annotated[str, Field(pattern=f"^{SUBDOMAIN}$", max_length=63, examples=["team-a"])]
"""Also the value of a label, which has 63 characters at most."""
Quantity = Annotated[str, Field(pattern=QUANTITY, max_length=16)]
ModuleName = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.\-]+$", max_length=128)]
TaskName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.:\-]*$", max_length=128)]
LabelKey = Annotated[str, Field(max_length=317), LABEL_KEY, LABEL_PREFIX]
LabelValue = Annotated[str, Field(max_length=63), LABEL]


class SecretRef(ApiModel):
    """A Secret in the QLoRAJob's namespace; it is mounted into pods, and the operator never reads it."""

    name: ObjectName = Field(description="Name of the Secret.")
