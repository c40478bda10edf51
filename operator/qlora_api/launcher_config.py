"""What `accelerate launch` and DeepSpeed are told about a run with several processes; the files of its ConfigMap."""

from typing import Any, Final

from qlora_api.names import DEEPSPEED_FILE
from qlora_api.strategies import STRATEGIES, StrategyName
from qlora_api.v1alpha1 import Plan

MAIN_PORT: Final = 29500
"""Where the first process waits for the others: torch's usual port."""
BUCKET_NUMBERS: Final = 50_000_000
"""Numbers that DeepSpeed collects or adds up at once: 200 MB in fp32; its own default is ten times that."""


def accelerate_config(plan: Plan) -> dict[str, Any]:
    """Return the file for `accelerate launch --config_file`; each node adds its rank and the first one's address."""
    divided = STRATEGIES[plan.strategy].launcher == "deepspeed"
    kind = "DEEPSPEED" if divided else "MULTI_CPU" if plan.device == "cpu" else "MULTI_GPU"
    standard = {"deepspeed_config_file": DEEPSPEED_FILE, "deepspeed_multinode_launcher": "standard"}
    return {
        "compute_environment": "LOCAL_MACHINE",
        "distributed_type": kind,
        "num_machines": plan.nodes,
        "num_processes": plan.processes,
        "main_process_port": MAIN_PORT,
        "same_network": True,
        "rdzv_backend": "static",
        "use_cpu": plan.device == "cpu",
        "mixed_precision": "no",
        **({"deepspeed_config": standard} if divided else {}),
    }


def deepspeed_config(strategy: StrategyName, max_norm: float) -> dict[str, Any]:
    """Return DeepSpeed's settings; micro-batches, their number and the dtype are the training loop's business."""
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
