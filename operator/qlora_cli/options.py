"""Options that several commands have in common."""

from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

from qlora_api.runconfig import Platform, S3Config
from qlora_cli.hub_cache import offline_hub_cache
from qlora_cli.uris import to_uri


class OutputFormat(StrEnum):
    """Values of --output."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


HubMirror: TypeAlias = Annotated[
    str | None,
    typer.Option(
        help="Folder or URI with a copy of a hub cache, used instead of the hub; HF_HUB_OFFLINE=1: the hub cache."
    ),
]
HubEndpoint: TypeAlias = Annotated[str | None, typer.Option(help="URL of the model hub; default: the public one.")]
S3Endpoint: TypeAlias = Annotated[str | None, typer.Option(help="URL of an S3-compatible server; default: AWS.")]
OutputOption: TypeAlias = Annotated[OutputFormat, typer.Option("--output", "-o", help="Output format.")]
BaseModel: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Folder or URI of the base model; default: the one recorded with the adapter."),
]


def make_platform(hub_mirror: str | None, hub_endpoint: str | None, s3_endpoint: str | None) -> Platform:
    """Return the settings of hub and object store; offline, the hub's cache is the mirror."""
    mirror = hub_mirror or offline_hub_cache()
    mirror_uri = to_uri(mirror, "--hub-mirror") if mirror else None
    return Platform(
        s3=S3Config(endpoint=s3_endpoint),
        hub_endpoint=hub_endpoint,
        hub_mirror=mirror_uri,
    )
