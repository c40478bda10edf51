"""What all processes of a run must have in common: the settings that hardware decides, and the start weights."""

import hashlib

from qlora_api.reasons import Reason
from qlora_trainer.distributed.world import World
from qlora_trainer.errors import RunError
from qlora_trainer.model.base_model import TrainableModel
from qlora_trainer.model.runtime_settings import RuntimeSettings


def agree_on_settings(world: World, settings: RuntimeSettings, device: str) -> RuntimeSettings:
    """Return the settings that all processes train with; each has chosen its own by the hardware of its pod.

    Args:
        world: All processes.
        settings: What this process has chosen.
        device: The name of its device, for messages.

    Raises:
        RunError: INVALID_SPEC if they would compute differently, such as in fp16 beside bf16.

    """
    choices = world.all_gather((device, settings.dtype_name, settings.attention))
    if len({choice[1:] for choice in choices}) > 1:
        found = "; ".join(dict.fromkeys(f"{name}: {dtype}, {kernel}" for name, dtype, kernel in choices))
        raise RunError(
            Reason.INVALID_SPEC,
            f"spec.resources.gpuProduct: the pods of this run have different GPUs, which compute differently "
            f"({found}); name one product, so that all pods get it",
        )
    (checkpointing,) = world.all_reduce_any(settings.gradient_checkpointing)
    if checkpointing == settings.gradient_checkpointing:
        return settings
    return settings.with_gradient_checkpointing("on: another process of the run has less free memory")


def check_same_start(world: World, trainable: TrainableModel) -> None:
    """Check that all processes start from the same adapter; each has initialized its own.

    Raises:
        RunError: TRAINER_ERROR.

    """
    if len(set(world.all_gather(digest_of_weights(trainable)))) > 1:
        raise RunError(
            Reason.TRAINER_ERROR,
            "spec.lora.init: the processes of this run initialized different adapters; set it to default, and report "
            "this with the log",
        )


def digest_of_weights(trainable: TrainableModel) -> str:
    """Return the SHA-256 of the trainable weights."""
    digest = hashlib.sha256()
    for name, weight in trainable.named_parameters():
        digest.update(name.encode())
        digest.update(weight.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
