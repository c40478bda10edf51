"""The headless Service that gives the pods of a training attempt DNS names, before they are ready."""

from qlora_api.launcher_config import MAIN_PORT
from qlora_api.names import gang_service_name
from qlora_operator.models import Manifest
from qlora_operator.resources.metadata import Owner, build_labels, build_metadata, train_workload


def build_service(owner: Owner, attempt: int) -> Manifest:
    """Return the Service of an attempt with several pods."""
    workload = train_workload(owner, attempt)
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": build_metadata(workload) | {"name": gang_service_name(owner.ref.name, attempt)},
        "spec": {
            "clusterIP": "None",
            # The processes rendezvous before any pod is ready.
            "publishNotReadyAddresses": True,
            "selector": build_labels(workload),
            "ports": [{"name": "rendezvous", "port": MAIN_PORT}],
        },
    }
