"""Pure builders of the child objects: values in, one complete Kubernetes object out, one kind per file."""

from qlora_operator.resources.config_map import build_prepare_config, build_resumption, build_run_config
from qlora_operator.resources.event import build_event, build_installation_event, build_quarantine_event
from qlora_operator.resources.job import (
    build_avoided_nodes,
    build_deadline,
    build_job_identity,
    build_prepare_job,
    build_queue_labels,
    build_train_job,
)
from qlora_operator.resources.metadata import Installation, Owner
from qlora_operator.resources.profile import merge_profiles, training_placement
from qlora_operator.resources.service import build_service

__all__ = [
    "Installation",
    "Owner",
    "build_avoided_nodes",
    "build_deadline",
    "build_event",
    "build_installation_event",
    "build_job_identity",
    "build_prepare_config",
    "build_prepare_job",
    "build_quarantine_event",
    "build_queue_labels",
    "build_resumption",
    "build_run_config",
    "build_service",
    "build_train_job",
    "merge_profiles",
    "training_placement",
]
