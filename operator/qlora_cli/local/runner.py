"""Runs a manifest locally: the same preparation, plan and training as in a cluster, in one process."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qlora_api.prepared import Prepared
from qlora_api.reasons import Reason
from qlora_api.report import TerminationMessage
from qlora_api.result import Result
from qlora_api.runconfig import Platform, PrepareConfig, RunConfig
from qlora_api.v1alpha1 import Plan, Progress
from qlora_cli.local.trainer_libraries import NoGpuError, find_gpus, set_up_libraries
from qlora_cli.manifests.loader import JobManifest
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import GpuInventory

ATTEMPT = 1
STOPPING = "stopping after this step and saving a checkpoint; press Ctrl-C again to stop immediately"


class Screen(Protocol):
    """Shows the progress of a run."""

    def note(self, text: str) -> None:
        """Show a progress message."""

    def show_plan(self, plan: Plan) -> None:
        """Show the reasons of the plan."""

    def report(self, progress: Progress) -> None:
        """Show a progress report."""


@dataclass(frozen=True)
class Trainer:
    """The functions of the trainer that a run needs; they import torch, so they are loaded late."""

    find_gpus: Callable[[], GpuInventory]
    prepare: Callable[[PrepareConfig, Callable[[str], None]], Prepared]
    run: Callable[[RunConfig, Screen], Result]


def load_trainer() -> Trainer:
    """Return the trainer, with the same library settings as in a pod; each part is imported when it is needed."""
    set_up_libraries()
    from qlora_trainer.prepare import prepare  # noqa: PLC0415 (its libraries read their settings when imported)

    return Trainer(find_gpus, prepare, _run)


def _run(config: RunConfig, screen: Screen) -> Result:
    from qlora_trainer.run import run  # noqa: PLC0415 (takes seconds)
    from qlora_trainer.runtime.shutdown import StopFlag  # noqa: PLC0415 (part of the optional trainer)

    stop = StopFlag()
    with stop.handling_keyboard_interrupt(lambda: screen.note(STOPPING)):
        result = run(config, screen, stop=stop)
    assert result is not None  # noqa: S101 (a local run is a single process, which has the result)
    return result


def run_locally(manifest: JobManifest, platform: Platform, trainer: Trainer, screen: Screen) -> TerminationMessage:
    """Prepare, plan, train, evaluate and publish; a result that is already published is reused."""
    inventory = find_gpu_inventory(manifest, trainer)
    job, namespace, spec = manifest.metadata.name, manifest.metadata.namespace, manifest.spec
    prepared = trainer.prepare(PrepareConfig(namespace=namespace, job=job, spec=spec, platform=platform), screen.note)
    if prepared.published is not None:
        return TerminationMessage(reason=Reason.ALREADY_PUBLISHED, prepared=prepared, result=prepared.published)
    plan = make_plan(spec, prepared, inventory)
    screen.show_plan(plan)
    config = RunConfig(
        namespace=namespace, job=job, attempt=ATTEMPT, spec=spec, plan=plan, prepared=prepared, platform=platform
    )
    result = trainer.run(config, screen)
    return TerminationMessage(reason=Reason.PUBLISHED, step=result.steps, prepared=prepared, result=result)


def find_gpu_inventory(manifest: JobManifest, trainer: Trainer) -> GpuInventory:
    """Return the local GPUs, or none if the run requests none.

    Raises:
        NoGpuError: The run requests a GPU, but there is no CUDA device.

    """
    requested = manifest.spec.resources.gpus_per_node
    inventory = trainer.find_gpus() if requested else ()
    if requested and not inventory:
        raise NoGpuError(
            f"spec.resources.gpusPerNode is {requested}, but PyTorch finds no CUDA device on this machine; "
            "to train on the CPU add --set resources.gpusPerNode=0"
        )
    return inventory
