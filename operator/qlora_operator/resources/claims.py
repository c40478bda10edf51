"""Persistent volume claims that a spec reads from; mounted read-only, and only those that it names."""

from typing import Any

from qlora_api import names
from qlora_api.v1alpha1 import QLoRAJobSpec


def claims_of(spec: QLoRAJobSpec) -> tuple[str, ...]:
    """Return the distinct names of the claims."""
    uris = (uri for uri in spec.input_uris.values() if uri.startswith(names.CLAIM_SCHEME))
    return tuple(dict.fromkeys(uri.removeprefix(names.CLAIM_SCHEME).partition("/")[0] for uri in uris))


def build_claim_volumes(spec: QLoRAJobSpec) -> list[dict[str, Any]]:
    """Return a volume per claim; numbered, since a claim's name may be too long for a volume's."""
    return [
        {"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim, "readOnly": True}}
        for number, claim in enumerate(claims_of(spec))
    ]


def build_claim_mounts(spec: QLoRAJobSpec) -> list[dict[str, Any]]:
    """Return the volume mount of each claim."""
    return [
        {"name": f"claim-{number}", "mountPath": f"{names.CLAIMS_MOUNT}/{claim}", "readOnly": True}
        for number, claim in enumerate(claims_of(spec))
    ]
