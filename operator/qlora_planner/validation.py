"""Validates a spec beyond its types; pure.

Most rules are CEL rules of the CRD too; here they also cover objects that are older than the rule, and need no cluster.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qlora_api.accelerators import MIG_PREFIX, NVIDIA
from qlora_api.names import CLAIM_SCHEME
from qlora_api.reasons import Reason
from qlora_api.strategies import DDP, SHARDING_OPTIMIZER, SHARDING_WEIGHTS, ZERO2
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_api.v1alpha1.patterns import NO_LOOPBACK
from qlora_planner.placement_rules import cpu_is_positive, memory_is_plausible, tolerations_are_valid
from qlora_planner.sharding_limits import has_shardable_optimizer, needs_unsharded_weights


@dataclass(frozen=True)
class Violation:
    """Why a spec cannot be run."""

    reason: Reason
    message: str


Rule = Callable[[QLoRAJobSpec], str | None]
"""Returns a message with field, cause and fix, or None."""


def method_fits_bits(spec: QLoRAJobSpec) -> str | None:
    """Method qlora needs a quantized base, the others a 16-bit one."""
    quantized = spec.quantization.bits in {4, 8}
    if spec.method == "qlora" and not quantized:
        return "spec.quantization.bits is 16, but method qlora needs 4 or 8; for a 16-bit base set spec.method to lora"
    if spec.method != "qlora" and quantized:
        return (
            f"spec.quantization.bits is {spec.quantization.bits}, but method {spec.method} needs 16; "
            "for a quantized base set spec.method to qlora"
        )
    return None


def micro_batch_divides_batch(spec: QLoRAJobSpec) -> str | None:
    """Micro-batch times processes divides the global batch."""
    micro, global_batch_size, processes = (
        spec.training.micro_batch_size,
        spec.training.global_batch_size,
        spec.resources.processes,
    )
    if micro is None or global_batch_size % (micro * processes) == 0:
        return None
    unit = f"{micro} x {processes} processes" if processes > 1 else f"{micro}"
    return (
        f"spec.training.microBatchSize {unit} does not divide globalBatchSize {global_batch_size}; "
        "leave it out to let the plan choose"
    )


def batch_reaches_every_process(spec: QLoRAJobSpec) -> str | None:
    """Every process gets at least one row per step; without one it would hold its GPU for nothing."""
    global_batch_size, processes = spec.training.global_batch_size, spec.resources.processes
    if global_batch_size >= processes:
        return None
    return (
        f"spec.training.globalBatchSize {global_batch_size} is less than the {processes} processes of spec.resources; "
        "raise it, or ask for fewer nodes or gpusPerNode"
    )


def strategy_has_processes(spec: QLoRAJobSpec) -> str | None:
    """A distribution strategy needs several processes."""
    if spec.distribution == "auto" or spec.resources.processes > 1:
        return None
    return (
        f"spec.distribution is {spec.distribution}, but spec.resources requests only one process; leave it out, or "
        "raise nodes or gpusPerNode"
    )


def partition_is_alone(spec: QLoRAJobSpec) -> str | None:
    """A process can use one MIG partition, and NCCL does not connect several."""
    resources = spec.resources
    if not resources.gpu_resource.startswith(MIG_PREFIX) or resources.nodes * resources.gpus_per_node <= 1:
        return None
    return (
        f"spec.resources.gpuResource is {resources.gpu_resource}, and MIG partitions cannot train together; set nodes "
        f"and gpusPerNode to 1, or gpuResource to {NVIDIA.resource}"
    )


def weights_can_be_sharded(spec: QLoRAJobSpec) -> str | None:
    """ZeRO-3 shards every weight, and some features need unsharded weights."""
    what, strategy = needs_unsharded_weights(spec), spec.distribution
    if strategy not in SHARDING_WEIGHTS or what is None:
        return None
    return f"{what}, and spec.distribution {strategy} shards every weight; set it to {ZERO2.name}"


def optimizer_can_be_sharded(spec: QLoRAJobSpec) -> str | None:
    """DeepSpeed shards the state of AdamW only, not that of 8-bit or paged optimizers."""
    if spec.distribution not in SHARDING_OPTIMIZER or has_shardable_optimizer(spec):
        return None
    optimizer = spec.training.optimizer
    return (
        f"spec.training.optimizer is {optimizer}, but spec.distribution {spec.distribution} can only shard the state "
        f"of AdamW; leave the optimizer out, or set distribution to {DDP.name}"
    )


def all_linear_stands_alone(spec: QLoRAJobSpec) -> str | None:
    """`all-linear` already matches every linear module."""
    if "all-linear" not in spec.lora.targets or len(spec.lora.targets) == 1:
        return None
    return "spec.lora.targets lists all-linear with other names; list it alone, or list module names without it"


def gate_has_answers(spec: QLoRAJobSpec) -> str | None:
    """Gates on answers need generations."""
    gate = spec.evaluation.gate
    if spec.evaluation.generations or (gate.min_exact_match is None and gate.min_rouge_l is None):
        return None
    return "spec.evaluation.generations is 0, but the gate needs answers; set it to 1 or more"


def lora_init_fits_base(spec: QLoRAJobSpec) -> str | None:
    """PiSSA subtracts from 16-bit weights; LoftQ compensates the error of 4-bit ones."""
    init, bits = spec.lora.init, spec.quantization.bits
    if init == "pissa" and bits != 16:
        return (
            "spec.lora.init is pissa, which subtracts singular vectors from a 16-bit base, but spec.quantization.bits "
            f"is {bits}; set spec.method to lora and spec.quantization.bits to 16, or spec.lora.init to loftq"
        )
    if init == "loftq" and bits != 4:
        return f"spec.lora.init is loftq, which is for 4 bits, but spec.quantization.bits is {bits}; leave init out"
    return None


def lora_init_fits_scaling(spec: QLoRAJobSpec) -> str | None:
    """PiSSA and LoftQ do not support DoRA, and PiSSA, whose rank is doubled on export, not rsLoRA either."""
    lora = spec.lora
    if (lora.init in {"pissa", "loftq"} and lora.dora) or (lora.init == "pissa" and lora.rslora):
        return f"spec.lora.init {lora.init} does not work with dora or rslora; leave those false, or leave init out"
    return None


def dataset_has_one_source(spec: QLoRAJobSpec) -> str | None:
    """Rows come from either uri or sources; maxSamples and template must fit them."""
    dataset = spec.dataset
    if (dataset.uri is None) == (dataset.sources is None):
        which = "neither uri nor sources" if dataset.uri is None else "both uri and sources"
        return f"spec.dataset has {which}; give one of them"
    if dataset.sources is not None and dataset.max_samples is not None:
        return "spec.dataset.maxSamples cannot be combined with sources; set maxSamples in each source instead"
    if dataset.template is not None and dataset.format not in {"auto", "instruction"}:
        return (
            f"spec.dataset.template produces instruction rows, but spec.dataset.format is {dataset.format}; leave "
            "format out, or remove the template"
        )
    return None


def early_stopping_has_validation(spec: QLoRAJobSpec) -> str | None:
    """Early stopping and keep: best need validation losses."""
    training = spec.training
    if training.evaluate_every is not None or (training.early_stopping is None and training.keep == "last"):
        return None
    return (
        "spec.training.earlyStopping and keep best need held-out losses; set spec.training.evaluateEvery to a number "
        "of steps"
    )


def full_has_nothing_to_merge(spec: QLoRAJobSpec) -> str | None:
    """Full fine-tuning has no adapter to merge."""
    if spec.method != "full" or spec.output.merged == "none":
        return None
    return "spec.output.merged is for adapters, and method full trains the weights themselves; leave it out"


def loftq_merges_into_its_base(spec: QLoRAJobSpec) -> str | None:
    """A LoftQ adapter compensates the 4-bit base's error, which the original base does not have."""
    if spec.lora.init != "loftq" or spec.output.merged == "none" or spec.output.merge_base == "dequantised":
        return None
    return (
        "spec.output.mergeBase is original, but with spec.lora.init loftq the adapter compensates the error of the "
        "4-bit base, which the original base does not have; set it to dequantised"
    )


def dora_fits_base(spec: QLoRAJobSpec) -> str | None:
    """DoRA fails on 8-bit bases: peft 0.21 dequantizes the weights in a way that bitsandbytes 0.50 cannot reuse."""
    if not spec.lora.dora or spec.quantization.bits != 8:
        return None
    return "spec.lora.dora is true, which fails on an 8-bit base; set spec.quantization.bits to 4, or leave dora out"


def local_run_is_one_process(spec: QLoRAJobSpec) -> str | None:
    """A local run is one process: only pods have the launcher."""
    processes = spec.resources.processes
    if processes == 1:
        return None
    return (
        f"spec.resources requests {processes} processes, and 'qlora run' trains in one; add --set resources.nodes=1 "
        "--set resources.gpusPerNode=1, or apply the manifest to a cluster"
    )


def uris_are_reachable(spec: QLoRAJobSpec) -> str | None:
    """A pod cannot read files of the user's computer."""
    return _first_uri_with(
        {**spec.input_uris, "spec.output.uri": spec.output.uri},
        "file://",
        "file:// works with 'qlora run' only; upload it and use s3://",
    )


def trackers_are_not_loopback(spec: QLoRAJobSpec) -> str | None:
    """A loopback address in a pod does not reach a tracking server."""
    return next(
        (
            f"{field} is {url}, and {NO_LOOPBACK.message}"
            for field, url in spec.tracker_urls.items()
            if not NO_LOOPBACK.matches(url)
        ),
        None,
    )


def local_run_has_no_claims(spec: QLoRAJobSpec) -> str | None:
    """A local run cannot read PVCs of a cluster."""
    return _first_uri_with(
        spec.input_uris, CLAIM_SCHEME, "only a cluster can mount a PVC; copy the files and give their path with --set"
    )


def _first_uri_with(uris: Mapping[str, str], scheme: str, why: str) -> str | None:
    return next((f"{field} is {uri}, and {why}" for field, uri in uris.items() if uri.startswith(scheme)), None)


COMMON_RULES: Final[tuple[Rule, ...]] = (
    method_fits_bits,
    micro_batch_divides_batch,
    batch_reaches_every_process,
    strategy_has_processes,
    partition_is_alone,
    all_linear_stands_alone,
    early_stopping_has_validation,
    gate_has_answers,
    full_has_nothing_to_merge,
    loftq_merges_into_its_base,
    dora_fits_base,
    lora_init_fits_base,
    lora_init_fits_scaling,
    weights_can_be_sharded,
    optimizer_can_be_sharded,
    dataset_has_one_source,
    cpu_is_positive,
    memory_is_plausible,
    tolerations_are_valid,
)
"""Rules for both `qlora run` and a cluster."""
CLUSTER_RULES: Final[tuple[Rule, ...]] = (*COMMON_RULES, uris_are_reachable, trackers_are_not_loopback)
LOCAL_RULES: Final[tuple[Rule, ...]] = (*COMMON_RULES, local_run_has_no_claims, local_run_is_one_process)


def check(spec: QLoRAJobSpec, rules: tuple[Rule, ...] = CLUSTER_RULES) -> tuple[Violation, ...]:
    """Return every violation of a spec, in the order of the rules."""
    return tuple(Violation(Reason.INVALID_SPEC, sentence) for rule in rules if (sentence := rule(spec)))
