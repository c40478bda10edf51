"""Prepares a run up to its first step, with the stages of a pod; import it after configure_libraries."""

from dataclasses import dataclass
from pathlib import Path

from qlora_api.runconfig import PrepareConfig, RunConfig
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner import make_plan
from qlora_trainer import stages
from qlora_trainer.distributed.world import World, join_planned_world
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.runtime_settings import RuntimeSettings
from qlora_trainer.prepare import prepare
from qlora_trainer.storage.credentials import load_secrets
from qlora_trainer.storage.results import open_output
from qlora_trainer.storage.snapshots import SourceResolver
from qlora_trainer.storage.store import Store
from qlora_trainer.training.loop import TrainingLoop


@dataclass(frozen=True)
class PreparedRun:
    """State of a run before its first step."""

    config: RunConfig
    output: Store
    folder: Path
    data: stages.Data
    trainable: TrainableModel
    settings: RuntimeSettings
    world: World
    loop: TrainingLoop


def prepare_run(spec: QLoRAJobSpec, work: Path) -> PreparedRun:
    """Prepare, plan and load a job."""
    prepared = prepare(PrepareConfig(namespace="benchmark", job="ours", spec=spec), work=work)
    config = RunConfig(
        namespace="benchmark", job="ours", attempt=1, spec=spec, plan=make_plan(spec, prepared), prepared=prepared
    )
    resolver = SourceResolver(config.platform, load_secrets(spec, config.namespace))
    output = open_output(resolver, spec, config.job)
    data = stages.load_data(output, config, work)
    folder = stages.fetch_model(resolver, config, work)
    world = join_planned_world(config.plan)
    trainable, settings = stages.load_model(config, folder, world)
    loop = stages.make_training_loop(trainable, data, config, settings, world)
    return PreparedRun(config, output, folder, data, trainable, settings, world, loop)
