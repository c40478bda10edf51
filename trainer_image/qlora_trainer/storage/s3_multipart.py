"""Multipart uploads of files that are too large for one request."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from s3transfer.utils import ReadFileChunk

from qlora_api.units import GIB, MIB
from qlora_trainer.runtime.liveness import LIVENESS

SINGLE_PUT_BYTES: Final = 4 * GIB
"""Largest file that is uploaded in one request; S3 accepts up to 5 GiB."""
_PART_BYTES: Final = 64 * MIB
"""Minimum part size, which is what a retry sends again; S3 requires at least 5 MiB."""
_MAX_PARTS: Final = 10_000
"""Limit of S3."""


def upload_in_parts(
    client: Any, source: Path, target: Mapping[str, str], *, start: Mapping[str, Any], end: Mapping[str, Any]
) -> None:
    """Upload a file part by part, as boto3's upload_file would if it knew If-None-Match.

    Args:
        client: boto3's client for S3.
        source: The file.
        target: Bucket and Key.
        start: Additional arguments of CreateMultipartUpload, such as Metadata and ChecksumAlgorithm.
        end: Additional arguments of CompleteMultipartUpload, such as IfNoneMatch.

    """
    size = source.stat().st_size
    part_bytes = max(_PART_BYTES, math.ceil(size / _MAX_PARTS))
    upload = {**target, "UploadId": client.create_multipart_upload(**target, **start)["UploadId"]}
    checksum = {name: value for name, value in start.items() if name == "ChecksumAlgorithm"}
    try:
        parts = []
        for number, offset in enumerate(range(0, size, part_bytes), start=1):
            with ReadFileChunk.from_filename(str(source), offset, part_bytes, [lambda **_: LIVENESS.tick()]) as body:
                response = client.upload_part(**upload, **checksum, PartNumber=number, Body=body)
            checksums = {name: value for name, value in response.items() if name in {"ETag", "ChecksumSHA256"}}
            parts.append({"PartNumber": number, **checksums})
        client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts}, **end)
    except BaseException:
        client.abort_multipart_upload(**upload)
        raise
