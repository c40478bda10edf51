"""Pure checks of a spec: what its types cannot say.

Most are CEL rules of the CRD too; here they hold for objects that are older than the rule, and without a cluster.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final

from qlora_api.names import CLAIM_SCHEME
from qlora_api.reasons import Reason
from qlora_api.strategies import DDP, SHARDING_OPTIMIZER, SHARDING_WEIGHTS, ZERO2
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_api.v1alpha1.patterns import NO_LOOPBACK
from qlora_planner.sharding_limits import has_plain_optimizer, needs_whole_weights


@dataclass(frozen=True)
class Violation:
    """Why a spec cannot be run."""

    reason: Reason
    message: str


Rule = Callable[[QLoRAJobSpec], str | None]
"""Returns the sentence that names field, cause and fix, or nothing."""


def method_fits_bits(spec: QLoRAJobSpec) -> str | None:
    """Qlora is on a quantised base, the others are not."""
    quantised = spec.quantization.bits in {4, 8}
    if spec.method == "qlora" and not quantised:
        return "spec.quantization.bits is 16, but method qlora needs 4 or 8; for a 16-bit base set spec.method to lora"
    if spec.method != "qlora" and quantised:
        return (
            f"spec.quantization.bits is {spec.quantization.bits}, but method {spec.method} needs 16; "
            "for a quantized base set spec.method to qlora"
        )
    return None


def micro_batch_divides_batch(spec: QLoRAJobSpec) -> str | None:
    """Every process takes whole micro-batches."""
    micro, whole, processes = spec.training.micro_batch_size, spec.training.global_batch_size, spec.resources.processes
    if micro is None or whole % (micro * processes) == 0:
        return None
    unit = f"{micro} x {processes} processes" if processes > 1 else f"{micro}"
    return (
        f"spec.training.microBatchSize {unit} does not divide globalBatchSize {whole}; "
        "leave it out to let the plan choose"
    )


def batch_reaches_every_process(spec: QLoRAJobSpec) -> str | None:
    """A process without a row would hold its GPU for nothing."""
    whole, processes = spec.training.global_batch_size, spec.resources.processes
    if whole >= processes:
        return None
    return (
        f"spec.training.globalBatchSize {whole} is less than the {processes} processes of spec.resources; raise it, or "
        "ask for fewer nodes or gpusPerNode"
    )


def division_has_parts(spec: QLoRAJobSpec) -> str | None:
    """ZeRO divides among processes."""
    if spec.distribution == "auto" or spec.resources.processes > 1:
        return None
    return (
        f"spec.distribution is {spec.distribution}, but spec.resources requests only one process; leave it out, or "
        "raise nodes or gpusPerNode"
    )


def weights_can_be_divided(spec: QLoRAJobSpec) -> str | None:
    """ZeRO-3 has no weight whole in any process, and some things need one."""
    what, asked = needs_whole_weights(spec), spec.distribution
    if asked not in SHARDING_WEIGHTS or what is None:
        return None
    return f"{what}, and spec.distribution {asked} shards every weight; set it to {ZERO2.name}"


def optimizer_can_be_divided(spec: QLoRAJobSpec) -> str | None:
    """DeepSpeed divides what would be 8-bit or paged otherwise."""
    if spec.distribution not in SHARDING_OPTIMIZER or has_plain_optimizer(spec):
        return None
    optimizer = spec.training.optimizer
    return (
        f"spec.training.optimizer is {optimizer}, but spec.distribution {spec.distribution} can only shard the state "
        f"of AdamW; leave the optimizer out, or set distribution to {DDP.name}"
    )


def all_linear_stands_alone(spec: QLoRAJobSpec) -> str | None:
    """The word all-linear names every module already."""
    if "all-linear" not in spec.lora.targets or len(spec.lora.targets) == 1:
        return None
    return "spec.lora.targets lists all-linear with other names; list it alone, or list module names without it"


def gate_has_answers(spec: QLoRAJobSpec) -> str | None:
    """A gate cannot look at answers that nobody asked for."""
    gate = spec.evaluation.gate
    if spec.evaluation.generations or (gate.min_exact_match is None and gate.min_rouge_l is None):
        return None
    return "spec.evaluation.generations is 0, but the gate needs answers; set it to 1 or more"


def lora_init_fits_base(spec: QLoRAJobSpec) -> str | None:
    """PiSSA takes from the base's weights, LoftQ makes up for their 4 bits."""
    start, bits = spec.lora.init, spec.quantization.bits
    if start == "pissa" and bits != 16:
        return (
            "spec.lora.init is pissa, which subtracts singular vectors from a 16-bit base, but spec.quantization.bits "
            f"is {bits}; set spec.method to lora and spec.quantization.bits to 16, or spec.lora.init to loftq"
        )
    if start == "loftq" and bits != 4:
        return f"spec.lora.init is loftq, which is for 4 bits, but spec.quantization.bits is {bits}; leave init out"
    return None


def lora_init_fits_scaling(spec: QLoRAJobSpec) -> str | None:
    """What starts from the base's weights knows no magnitudes, and PiSSA's rank is doubled in the end."""
    lora = spec.lora
    if (lora.init in {"pissa", "loftq"} and lora.dora) or (lora.init == "pissa" and lora.rslora):
        return f"spec.lora.init {lora.init} does not work with dora or rslora; leave those false, or leave init out"
    return None


def dataset_has_one_source(spec: QLoRAJobSpec) -> str | None:
    """Rows come from a uri or from sources; maxSamples and a template belong to what they fit."""
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
    """Early stopping, and the best adapter, are chosen by held-out losses."""
    training = spec.training
    if training.evaluate_every is not None or (training.early_stopping is None and training.keep == "last"):
        return None
    return (
        "spec.training.earlyStopping and keep best need held-out losses; set spec.training.evaluateEvery to a number "
        "of steps"
    )


def full_has_nothing_to_merge(spec: QLoRAJobSpec) -> str | None:
    """Without an adapter the result is one model already."""
    if spec.method != "full" or spec.output.merged == "none":
        return None
    return "spec.output.merged is for adapters, and method full trains the weights themselves; leave it out"


def loftq_merges_into_its_base(spec: QLoRAJobSpec) -> str | None:
    """What a LoftQ adapter adds for the 4-bit base, the original base has already."""
    if spec.lora.init != "loftq" or spec.output.merged == "none" or spec.output.merge_base == "dequantised":
        return None
    return (
        "spec.output.mergeBase is original, but with spec.lora.init loftq the adapter compensates the error of the "
        "4-bit base, which the original base does not have; set it to dequantised"
    )


def dora_fits_base(spec: QLoRAJobSpec) -> str | None:
    """What peft 0.21 dequantises for DoRA, bitsandbytes 0.50 cannot use again in 8 bits."""
    if not spec.lora.dora or spec.quantization.bits != 8:
        return None
    return "spec.lora.dora is true, which fails on an 8-bit base; set spec.quantization.bits to 4, or leave dora out"


def local_run_is_one_process(spec: QLoRAJobSpec) -> str | None:
    """Several processes need a launcher, which pods have."""
    processes = spec.resources.processes
    if processes == 1:
        return None
    return (
        f"spec.resources requests {processes} processes, and 'qlora run' trains in one; add --set resources.nodes=1 "
        "--set resources.gpusPerNode=1, or apply the manifest to a cluster"
    )


def uris_are_reachable(spec: QLoRAJobSpec) -> str | None:
    """A pod sees no file of the user's computer."""
    return _first_uri_with(
        {**spec.input_uris, "spec.output.uri": spec.output.uri},
        "file://",
        "file:// works with 'qlora run' only; upload it and use s3://",
    )


def trackers_are_not_loopback(spec: QLoRAJobSpec) -> str | None:
    """A pod's own address leads to no tracking server."""
    return next(
        (
            f"{field} is {url}, and {NO_LOOPBACK.message}"
            for field, url in spec.tracker_urls.items()
            if not NO_LOOPBACK.matches(url)
        ),
        None,
    )


def local_run_has_no_claims(spec: QLoRAJobSpec) -> str | None:
    """The user's computer sees no claim of a cluster."""
    return _first_uri_with(
        spec.input_uris, CLAIM_SCHEME, "only a cluster can mount a PVC; copy the files and give their path with --set"
    )


def _first_uri_with(uris: Mapping[str, str], scheme: str, why: str) -> str | None:
    return next((f"{field} is {uri}, and {why}" for field, uri in uris.items() if uri.startswith(scheme)), None)


COMMON_RULES: Final[tuple[Rule, ...]] = (
    method_fits_bits,
    micro_batch_divides_batch,
    batch_reaches_every_process,
    division_has_parts,
    all_linear_stands_alone,
    early_stopping_has_validation,
    gate_has_answers,
    full_has_nothing_to_merge,
    loftq_merges_into_its_base,
    dora_fits_base,
    lora_init_fits_base,
    lora_init_fits_scaling,
    weights_can_be_divided,
    optimizer_can_be_divided,
    dataset_has_one_source,
)
"""Rules for `qlora run` and for a cluster."""
CLUSTER_RULES: Final[tuple[Rule, ...]] = (*COMMON_RULES, uris_are_reachable, trackers_are_not_loopback)
LOCAL_RULES: Final[tuple[Rule, ...]] = (*COMMON_RULES, local_run_has_no_claims, local_run_is_one_process)


def check(spec: QLoRAJobSpec, rules: tuple[Rule, ...] = CLUSTER_RULES) -> tuple[Violation, ...]:
    """Return every violation, in the order of the rules."""
    return tuple(Violation(Reason.INVALID_SPEC, sentence) for rule in rules if (sentence := rule(spec)))
