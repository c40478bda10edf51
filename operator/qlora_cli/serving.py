"""How an adapter is served: what a server needs to know of it, taken from its QLoRAJob."""

from dataclasses import dataclass

from qlora_api.serving import VLLM_RANKS, needed_rank
from qlora_api.v1alpha1 import LoraSpec, QLoRAJobSpec
from qlora_cli.cluster import ClusterError
from qlora_cli.jobs import ClusterJob


@dataclass(frozen=True)
class Served:
    """A base with an adapter on it, or a whole model."""

    name: str
    """What clients ask for."""
    model: str
    """URI of the base, or of the whole model."""
    revision: str | None
    """Commit of a base on the hub."""
    adapter: str | None
    """URI of the adapter; None for a whole model."""
    max_rank: int | None
    """For --max-lora-rank."""
    arguments: tuple[str, ...] = ()
    """What else vLLM must be told."""
    chat_template: bool = False
    """Whether chats follow a template of the adapter's own."""


def find_served(job: ClusterJob) -> Served:
    """Return how a published run is served: its adapter, or its merged model where vLLM cannot load the adapter."""
    output, spec = job.status.output, job.spec()
    if output is None or output.adapter is None:
        raise ClusterError(f"{job.ref.name} is {job.phase} and has published nothing: {job.why}")
    if spec.method == "full":
        return Served(job.ref.name, output.adapter, None, None, None)
    obstacle = find_obstacle(spec.lora)
    if obstacle and output.merged:
        return Served(job.ref.name, output.merged, None, None, None)
    if obstacle:
        raise ClusterError(
            f"vLLM does not load this adapter: {obstacle}; serve it merged with its base: "
            f"qlora merge {output.adapter} --to FOLDER"
        )
    commit = job.status.model.commit if job.status.model and spec.model.uri.startswith("hf://") else None
    return Served(
        name=job.ref.name,
        model=spec.model.uri,
        revision=commit,
        adapter=output.adapter,
        max_rank=needed_rank(published_rank(spec.lora)),
        arguments=base_arguments(spec),
        chat_template=spec.dataset.chat_template is not None,
    )


def published_rank(lora: LoraSpec) -> int:
    """Return the rank of the published matrices; PiSSA's hold the start as well, so that they fit the original base."""
    return lora.rank * 2 if lora.init == "pissa" else lora.rank


def find_obstacle(lora: LoraSpec) -> str | None:
    """Say for which field of the spec vLLM would refuse the adapter, or serve it wrongly."""
    obstacles = (
        (lora.dora, "it is a DoRA adapter (spec.lora.dora)"),
        (bool(lora.modules_to_save), "it replaces whole modules (spec.lora.modulesToSave)"),
        (bool(lora.rank_pattern or lora.alpha_pattern), "its modules differ in rank or alpha (spec.lora.*Pattern)"),
        (needed_rank(published_rank(lora)) is None, f"its rank is above {VLLM_RANKS[-1]} (spec.lora.rank)"),
    )
    return next((sentence for found, sentence in obstacles if found), None)


def base_arguments(spec: QLoRAJobSpec) -> tuple[str, ...]:
    """Return how the base is to be loaded: a LoftQ adapter makes up for what 4 bits take away, and needs them."""
    return ("--quantization=bitsandbytes",) if spec.lora.init == "loftq" else ()
