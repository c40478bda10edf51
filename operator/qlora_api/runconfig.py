"""Input of the trainer, from the operator or `qlora run`: one JSON file, validated by one model."""

from typing import Literal

from qlora_api.base import ApiModel
from qlora_api.prepared import Prepared
from qlora_api.v1alpha1 import Checkpoint, ManifestRef, Plan, QLoRAJobSpec


class S3Config(ApiModel):
    """How to reach the object store; keys of a mounted Secret (AWS_ENDPOINT_URL, AWS_REGION) take precedence."""

    endpoint: str | None = None
    """URL of an S3-compatible server; None: AWS."""
    region: str | None = None
    addressing: Literal["auto", "path", "virtual"] = "auto"
    checksums: Literal["when_supported", "when_required"] = "when_supported"
    """when_required is for S3-compatible servers that reject boto3's default CRC32."""


class Platform(ApiModel):
    """Settings of an installation, the same for every QLoRAJob."""

    s3: S3Config = S3Config()
    hub_endpoint: str | None = None
    """HF_ENDPOINT; None: the public hub."""
    hub_mirror: str | None = None
    """s3:// or file:// prefix with a copy of a hub cache (models--organization--name/…), used instead of the hub."""


Published = tuple[ManifestRef, ...] | None
"""The manifests that earlier attempts of the run reported: only they are believed to be results of it.

None: any in the output is believed, since no attempt came before, none was heard of, or there is no operator.
"""


class PrepareConfig(ApiModel):
    """prepare.json."""

    namespace: str
    job: str
    uid: str = ""
    """Uid of the QLoRAJob; empty without a cluster."""
    spec: QLoRAJobSpec
    published: Published = None
    platform: Platform = Platform()


class RunConfig(ApiModel):
    """run.json."""

    namespace: str
    job: str
    uid: str = ""
    """Uid of the QLoRAJob; empty without a cluster."""
    attempt: int
    spec: QLoRAJobSpec
    plan: Plan
    prepared: Prepared
    checkpoint: Checkpoint | None = None
    """The newest checkpoint that an earlier attempt reported: only it, and those that its manifest names, are resumed
    from. None if the operator knows of none, and without an operator: any in the output is."""
    published: Published = None
    platform: Platform = Platform()
