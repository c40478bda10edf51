"""The namespace and name of a QLoRAJob."""

from typing import NamedTuple


class JobRef(NamedTuple):
    """Namespace and name of a QLoRAJob; the key of the work queue."""

    namespace: str
    name: str
