"""What the operator (or `qlora run`) hands to the trainer: one JSON file that one model validates."""

from typing import Literal

from qlora_api.base import ApiModel
from qlora_api.prepared import Prepared
from qlora_api.v1alpha1 import Plan, QLoRAJobSpec


class S3Config(ApiModel):
    """How to reach the object store; keys of a mounted Secret (AWS_ENDPOINT_URL, AWS_REGION) come first."""

    endpoint: str | None = None
    """URL of an S3-compatible server; none means AWS."""
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """when_required is for S3-compatible servers that refuse boto3's default CRC32."""


class Platform(ApiModel):
    """What is the same for every job of an installation."""

    s3: S3Config = S3Config()
    hub_endpoint: str | None = None
    """HF_ENDPOINT; none means the public hub."""
    hub_mirror: str | None = None
    """s3:// or file:// prefix with a synchronised hub cache (models--organisation--name/…): then no hub is asked."""


class PrepareConfig(ApiModel):
    """prepare.json."""

    namespace: str
    job: str
    uid: str = ""
    """Of the QLoRAJob; empty without a cluster."""
    spec: QLoRAJobSpec
    platform: Platform = Platform()


class RunConfig(ApiModel):
    """run.json."""

    namespace: str
    job: str
    uid: str = ""
    """Of the QLoRAJob; empty without a cluster."""
    attempt: int
    spec: QLoRAJobSpec
    plan: Plan
    prepared: Prepared
    platform: Platform = Platform()
