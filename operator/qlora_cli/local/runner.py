"""One run on this computer: the same prepare, plan and training as in a cluster, in one process."""

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
STOPPING = "stopping after this step, with a checkpoint; press Ctrl-C again to stop at once"


class Screen(Protocol):
    """Where a person watches the run."""

    def note(self, text: str) -> None:
        """Show a sentence about what is going on."""

    def show_plan(self, plan: Plan) -> None:
        """Show what was decided, and why."""

    def report(self, progress: Progress) -> None:
        """Show how far the run is."""


@dataclass(frozen=True)
class Trainer:
    """The parts of the trainer that a run needs; they come with torch, so they are loaded late."""

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
    from qlora_trainer.runtime.shutdown import StopFlag  # noqa: PLC0415 (part of another installation)

    stop = StopFlag()
    with stop.handling_keyboard_interrupt(lambda: screen.note(STOPPING)):
        result = run(config, screen, stop=stop)
    assert result is not None  # noqa: S101 (a computer's run is one process, which has the result)
    return result


def run_locally(manifest: JobManifest, platform: Platform, trainer: Trainer, screen: Screen) -> TerminationMessage:
    """Prepare, plan, train, evaluate and publish; what was published before is not done again."""
    offer = find_gpu_inventory(manifest, trainer)
    job, namespace, spec = manifest.metadata.name, manifest.metadata.namespace, manifest.spec
    prepared = trainer.prepare(PrepareConfig(namespace=namespace, job=job, spec=spec, platform=platform), screen.note)
    if prepared.published is not None:
        return TerminationMessage(reason=Reason.ALREADY_PUBLISHED, prepared=prepared, result=prepared.published)
    plan = make_plan(spec, prepared, offer)
    screen.show_plan(plan)
    config = RunConfig(
        namespace=namespace, job=job, attempt=ATTEMPT, spec=spec, plan=plan, prepared=prepared, platform=platform
    )
    result = trainer.run(config, screen)
    return TerminationMessage(reason=Reason.PUBLISHED, step=result.steps, prepared=prepared, result=result)


def find_gpu_inventory(manifest: JobManifest, trainer: Trainer) -> GpuInventory:
    """Return the GPUs of this computer where a run wants any; refuse at once what could only fail later."""
    wanted = manifest.spec.resources.gpus_per_node
    offer = trainer.find_gpus() if wanted else ()
    if wanted and not offer:
        raise NoGpuError(
            f"spec.resources.gpusPerNode is {wanted}, and PyTorch finds no CUDA device on this computer; "
            "to train on the CPU add --set resources.gpusPerNode=0"
        )
    return offer
