"""Reads the claims of a pod's token without verifying it, so that the API server is asked about plausible ones only."""

import base64
import re
from datetime import datetime
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field

from qlora_api import names
from qlora_api.units import KIB
from qlora_operator.cluster.interface import PodIdentity

MAX_TOKEN: Final = 8 * KIB
"""Maximum length of a token; a kubelet's has about 1 KiB, and aiohttp accepts no longer header."""
LEEWAY_SECONDS: Final = 60.0
"""How long after its expiry a token is still reviewed: the API server's clock decides, with go-jose's leeway."""

_Text = Annotated[str, Field(min_length=1, max_length=2048)]


class _Header(BaseModel):
    alg: _Text


class _Pod(BaseModel):
    name: _Text
    uid: _Text


class _Kubernetes(BaseModel):
    namespace: _Text
    pod: _Pod


class _Claims(BaseModel):
    """Claims of a bound service account token."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)

    iss: _Text
    aud: str | list[str]
    exp: float
    kubernetes: _Kubernetes = Field(alias="kubernetes.io")


def read_claims(token: str, now: datetime) -> PodIdentity | None:
    """Return the pod that an unverified token claims to be; None if it cannot be a valid token for the operator."""
    if not 0 < len(token) <= MAX_TOKEN:
        return None
    try:
        header, payload, _ = map(_decode_segment, token.split("."))
        _Header.model_validate_json(header)
        claims = _Claims.model_validate_json(payload)
    except ValueError:
        return None
    audiences = [claims.aud] if isinstance(claims.aud, str) else claims.aud
    expired = claims.exp + LEEWAY_SECONDS < now.timestamp()
    if expired or names.TOKEN_AUDIENCE not in audiences:
        return None
    pod = claims.kubernetes.pod
    return PodIdentity(claims.kubernetes.namespace, pod.name, pod.uid)


def _decode_segment(text: str) -> bytes:
    """Decode base64url without padding; ValueError if it is anything else."""
    if not re.fullmatch(r"[A-Za-z0-9_-]+", text):
        raise ValueError("not base64url")
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
