"""Configuration of `accelerate launch` and DeepSpeed for a run with several processes; files of its ConfigMap."""

from typing import Any, Final

from qlora_api.accelerators import accelerator_of
from qlora_api.names import DEEPSPEED_FILE
from qlora_api.strategies import STRATEGIES, StrategyName
from qlora_api.v1alpha1 import Plan

MAIN_PORT: Final = 29500
"""Port at which the main process waits for the others: torch's default."""
BUCKET_NUMBERS: Final = 50_000_000
"""Elements per all-gather or reduce bucket of DeepSpeed: 200 MB in fp32; DeepSpeed's default is ten times that."""


def accelerate_config(plan: Plan) -> dict[str, Any]:
    """Return the file for `accelerate launch --config_file`; each node adds its rank and the main process's address."""
    uses_deepspeed = STRATEGIES[plan.strategy].launcher == "deepspeed"
    several = "MULTI_CPU" if plan.device == "cpu" else accelerator_of(plan.device).launch_type
    deepspeed = {"deepspeed_config_file": DEEPSPEED_FILE, "deepspeed_multinode_launcher": "standard"}
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": "DEEPSPEED" if uses_deepspeed else several,
        "num_machines": plan.nodes,
        "num_processes": plan.processes,
        "main_process_port": MAIN_PORT,
        "same_network": True,
        "rdzv_backend": "static",
        "use_cpu": plan.device == "cpu",
        "mixed_precision": "no",
        **({"deepspeed_config": deepspeed} if uses_deepspeed else {}),
    }


def deepspeed_config(strategy: StrategyName, max_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's configuration.

    Batch size 1 and accumulation 1 are placeholders: the training loop itself handles micro-batches, gradient
    accumulation and the dtype.

    Args:
        strategy: A strategy whose launcher is DeepSpeed.
        max_norm: Global norm to which gradients are clipped (spec.training.maxGradNorm).

    """
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": max_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": STRATEGIES[strategy].zero_stage,
            "overlap_comm": False,
            "contiguous_gradients": True,
            "reduce_bucket_size": BUCKET_NUMBERS,
            "allgather_bucket_size": BUCKET_NUMBERS,
        },
    }
