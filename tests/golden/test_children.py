"""Every child as YAML, byte for byte; `QLORA_WRITE_GOLDEN=1 pytest tests/golden` writes the files anew."""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Final

import pytest
import yaml

from qlora_api.pod_profile import PodProfile
from qlora_api.qlora_class import PrepareResources
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources import (
    build_prepare_config,
    build_prepare_job,
    build_run_config,
    build_service,
    build_train_job,
    merge_profiles,
)
from qlora_planner import make_plan
from tests.make import INSTALLATION, OWNER, make_prepared, make_spec

FOLDER: Final = Path(__file__).parent
CPU: Final = make_spec()
GPU: Final = make_spec(
    model={"uri": "hf://meta-llama/Llama-3.2-3B", "secretRef": {"name": "hf-token"}},
    dataset={"secretRef": {"name": "data-credentials"}},
    resources={
        "gpusPerNode": 1,
        "gpuProduct": "NVIDIA-A100-SXM4-80GB",
        "nodeSelector": {"pool": "train"},
        "tolerations": [{"key": "team", "value": "ml", "effect": "NoSchedule"}],
    },
    output={"secretRef": None, "serviceAccountName": "trainer"},
    tracking={"wandb": {"project": "bots", "secretRef": {"name": "wandb-key"}}},
    deadlines={"total": "12h"},
)
CLAIMS: Final = make_spec(
    model={"uri": "pvc://models/llama-3.2-3b"},
    dataset={"uri": None, "sources": [{"uri": "pvc://rows.team-a/chats/"}, {"uri": "pvc://models/rows.csv"}]},
)
PRIVATE: Final = replace(INSTALLATION, pull_secrets=("registry", "mirror"))
"""An installation whose image needs credentials."""
GANG: Final = make_spec(
    resources={"nodes": 2, "gpusPerNode": 4}, distribution="zero3", training={"globalBatchSize": 64}
)
"""Two pods with four processes each."""


SIZED: Final = {
    "gpu_product": "NVIDIA-A10",
    "gpu_products": ("NVIDIA-A10", "NVIDIA-L40S", "NVIDIA-A100-SXM4-80GB"),
    "min_gpu_memory": 23_028 << 20,
}
"""What a plan says about GPUs after it was sized, where there is a smaller one of the same name."""
CLASSED: Final = replace(
    INSTALLATION,
    pods=merge_profiles(
        INSTALLATION.pods,
        PodProfile.model_validate({"labels": {"cost-center": "42"}, "train": {"runtimeClassName": "nvidia"}}),
    ),
    prepare_resources=PrepareResources(cpu="4", memory="64Gi", ephemeral_storage="400Gi"),
    used_class="team-a",
)
"""An installation for a run with a QLoRAClass."""
QUEUED: Final = make_spec(queue={"name": "gpus", "priorityClass": "nightly"})


def run_of(spec: QLoRAJobSpec, attempt: int = 1, avoided: tuple[str, ...] = ()) -> AttemptInputs:
    return AttemptInputs(attempt, make_plan(spec, make_prepared()), make_prepared(), avoided)


def sized_run_of(spec: QLoRAJobSpec) -> AttemptInputs:
    run = run_of(spec, 2, ("gpu-1",))
    return replace(run, plan=run.plan.model_copy(update=SIZED), disliked_nodes=("gpu-2",))


RUN: Final = run_of(CPU)
ONE_GPU: Final = make_spec(resources={"gpusPerNode": 1})

CHILDREN: Final[dict[str, Callable[[], Manifest]]] = {
    "prepare-job-cpu": lambda: build_prepare_job(OWNER, CPU, INSTALLATION),
    "prepare-job-gpu": lambda: build_prepare_job(OWNER, GPU, PRIVATE),
    "prepare-job-class": lambda: build_prepare_job(OWNER, CPU, CLASSED),
    "train-job-class": lambda: build_train_job(OWNER, CPU, RUN, CLASSED),
    "prepare-job-claims": lambda: build_prepare_job(OWNER, CLAIMS, INSTALLATION),
    "train-job-claims": lambda: build_train_job(OWNER, CLAIMS, run_of(CLAIMS), INSTALLATION),
    "train-job-cpu": lambda: build_train_job(OWNER, CPU, RUN, INSTALLATION),
    "train-job-gpu": lambda: build_train_job(OWNER, GPU, run_of(GPU, 2), PRIVATE),
    "prepare-config": lambda: build_prepare_config(OWNER, CPU, INSTALLATION),
    "run-config": lambda: build_run_config(OWNER, CPU, RUN, INSTALLATION),
    "train-job-queued": lambda: build_train_job(OWNER, QUEUED, run_of(QUEUED), INSTALLATION),
    "train-job-elsewhere": lambda: build_train_job(OWNER, GANG, run_of(GANG, 2, ("gpu-1", "gpu-7")), INSTALLATION),
    "train-job-products": lambda: build_train_job(OWNER, ONE_GPU, sized_run_of(ONE_GPU), INSTALLATION),
    "train-job-gang-products": lambda: build_train_job(OWNER, GANG, sized_run_of(GANG), INSTALLATION),
    "train-job-gang": lambda: build_train_job(OWNER, GANG, run_of(GANG), INSTALLATION),
    "run-config-gang": lambda: build_run_config(OWNER, GANG, run_of(GANG), INSTALLATION),
    "service-gang": lambda: build_service(OWNER, 1),
}


@pytest.mark.parametrize("name", CHILDREN)
def test_child_matches_golden_file(name: str) -> None:
    path = FOLDER / f"{name}.yaml"
    text = yaml.safe_dump(CHILDREN[name](), sort_keys=False, width=120)
    if os.environ.get("QLORA_WRITE_GOLDEN"):
        path.write_text(text, encoding="utf-8")
    assert text == path.read_text(encoding="utf-8")
