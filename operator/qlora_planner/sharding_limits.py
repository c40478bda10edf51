"""What cannot be divided among processes: the rules refuse it, and the plan does not choose it."""

from qlora_api.optimizers import SHARDABLE
from qlora_api.strategies import Strategy
from qlora_api.v1alpha1 import QLoRAJobSpec


def needs_whole_weights(spec: QLoRAJobSpec) -> str | None:
    """Say what of a spec needs weights that no process has whole once they are divided."""
    if spec.method == "full":
        return "spec.method full publishes the full model"
    if spec.lora.modules_to_save:
        return "spec.lora.modulesToSave trains full modules"
    if spec.lora.init == "pissa":
        return "spec.lora.init pissa restores the base weights to compare with the base"
    if spec.lora.dora and spec.quantization.bits == 4:
        return "spec.lora.dora needs the norms of unsharded 4-bit weights"
    return None


def has_plain_optimizer(spec: QLoRAJobSpec) -> bool:
    """Return whether DeepSpeed can divide the optimizer's state: AdamW's in fp32, and no other."""
    return spec.training.optimizer in {"auto", *SHARDABLE}


def can_be_shared(spec: QLoRAJobSpec, strategy: Strategy) -> bool:
    """Return whether processes can share a run by a strategy."""
    if strategy.shards_optimizer and not has_plain_optimizer(spec):
        return False
    return not strategy.shards_weights or needs_whole_weights(spec) is None
