"""What cannot be sharded among processes: validation rejects it, and the planner does not choose it."""

from qlora_api.optimizers import SHARDABLE
from qlora_api.precision import ComputeDtype
from qlora_api.strategies import Strategy
from qlora_api.v1alpha1 import QLoRAJobSpec


def needs_unsharded_weights(spec: QLoRAJobSpec) -> str | None:
    """Return what in a spec needs unsharded weights, or None."""
    if spec.method == "full":
        return "spec.method full publishes the full model"
    if spec.lora.modules_to_save:
        return "spec.lora.modulesToSave trains full modules"
    if spec.lora.init == "pissa":
        return "spec.lora.init pissa restores the base weights to compare with the base"
    if spec.lora.dora and spec.quantization.bits == 4:
        return "spec.lora.dora needs the norms of unsharded 4-bit weights"
    return None


def has_shardable_optimizer(spec: QLoRAJobSpec) -> bool:
    """Return whether DeepSpeed can shard the optimizer state: that of AdamW in fp32, and no other."""
    return spec.training.optimizer in {"auto", *SHARDABLE}


def supports_strategy(spec: QLoRAJobSpec, strategy: Strategy) -> bool:
    """Return whether a spec can be trained with a strategy."""
    if strategy.shards_optimizer and not has_shardable_optimizer(spec):
        return False
    return not strategy.shards_weights or needs_unsharded_weights(spec) is None


def supports_dtype(strategy: Strategy, dtype: ComputeDtype | None) -> bool:
    """Return whether a strategy can compute in a dtype; the trainer scales losses in float16, DeepSpeed does not."""
    return dtype != "float16" or strategy.launcher != "deepspeed"
