"""Options that several commands have, and what becomes of them."""

from enum import StrEnum
from typing import Annotated, TypeAlias

import typer

from qlora_api.runconfig import Platform, S3Config
from qlora_cli.uris import to_uri


class OutputFormat(StrEnum):
    """How a result is printed."""

    TABLE = "table"
    JSON = "json"
    YAML = "yaml"


HubMirror: TypeAlias = Annotated[
    str | None, typer.Option(help="Folder or URI with a synchronised hub cache; then no hub is asked.")
]
HubEndpoint: TypeAlias = Annotated[str | None, typer.Option(help="URL of the model hub, instead of the public one.")]
S3Endpoint: TypeAlias = Annotated[str | None, typer.Option(help="URL of an S3-compatible server, instead of AWS.")]
OutputOption: TypeAlias = Annotated[OutputFormat, typer.Option("--output", "-o", help="How the result is printed.")]
BaseModel: TypeAlias = Annotated[
    str | None,
    typer.Option(metavar="MODEL", help="Folder or URI of the base, if it is not where the adapter says."),
]


def make_platform(hub_mirror: str | None, hub_endpoint: str | None, s3_endpoint: str | None) -> Platform:
    """Return where hub and object store are."""
    return Platform(
        s3=S3Config(endpoint=s3_endpoint),
        hub_endpoint=hub_endpoint,
        hub_mirror=to_uri(hub_mirror) if hub_mirror else None,
    )
