"""A real S3 server over a folder, with conditional writes: versitygw."""

import secrets
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import boto3
from botocore.config import Config

from tests.cluster.host.addresses import free_ports
from tests.cluster.host.paths import ensure_folder
from tests.cluster.host.processes import Processes
from tests.cluster.programs.binaries import binary

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

REGION: Final = "us-east-1"
"""The region that clients must name; the server has only this one."""


@dataclass(frozen=True)
class S3:
    """Where the S3 server is and how to speak to it."""

    endpoint: str
    access_key: str
    secret_key: str

    def client(self) -> "S3Client":
        """Return a boto3 client; path style, since no DNS name exists for buckets."""
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint,
            aws_access_key_id=self.access_key,
            aws_secret_access_key=self.secret_key,
            region_name=REGION,
            config=Config(s3={"addressing_style": "path"}),
        )

    def make_bucket(self, name: str) -> str:
        """Create a bucket and return its name; three characters are the least."""
        client = self.client()
        try:
            client.create_bucket(Bucket=name)
        finally:
            client.close()
        return name

    def environment(self) -> dict[str, str]:
        """Return what an AWS client needs in its environment, or in a Secret, to use this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": REGION,
        }

    def values(self) -> dict[str, str]:
        """Return the fields, to be written down and read again."""
        return asdict(self)


def start_s3(folder: Path, processes: Processes, address: str) -> S3:
    """Serve a folder on the given address, on a free port, with keys of its own."""
    [port] = free_ports(1)
    s3 = S3(f"http://{address}:{port}", "test-access-key", secrets.token_hex(16))
    argv = [binary("versitygw"), "--port", f"{address}:{port}", "posix", ensure_folder(folder / "s3")]
    # The server reads the same names as a client does; inherited ones would be stale.
    keys = {"ROOT_ACCESS_KEY_ID": s3.access_key, "ROOT_SECRET_ACCESS_KEY": s3.secret_key}
    processes.start("versitygw", argv, {**keys, "VGW_REGION": REGION, "VGW_QUIET": "true"})
    processes.wait_for_port("versitygw", address, port)
    return s3
