"""`qlora serve-snippet`: a vLLM command, or a KServe or KubeAI manifest, that serves a published adapter."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Annotated, Final

import typer

from qlora_api.accelerators import NVIDIA
from qlora_api.escapes import escape_line, shell_command
from qlora_api.names import CLAIM_SCHEME
from qlora_api.units import KIB
from qlora_api.untrusted_json import InvalidJsonError, parse_object
from qlora_api.v1alpha1 import LoraSpec, QLoRAJobSpec
from qlora_api.vllm import VLLM_MAX_LORA_RANKS, max_lora_rank_for
from qlora_cli.cluster.client import ClusterError
from qlora_cli.cluster.connection import (
    Context,
    Kubeconfig,
    Namespace,
    ResultName,
    exit_on_cluster_error,
    open_connection,
)
from qlora_cli.cluster.jobs import ClusterJob, get_job
from qlora_cli.console import Console, echo, print_line
from qlora_cli.display.formats import to_yaml
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.local.output_store import OutputError, open_output_store
from qlora_cli.local.published_results import check_listed, find_result, is_result
from qlora_cli.options import S3Endpoint
from qlora_cli.uris import to_display_path

GENERATION_CONFIG: Final = "generation_config.json"
_MAX_GENERATION_CONFIG_BYTES: Final = 64 * KIB
"""It has a dozen numbers; a ConfigMap, which KubeAI makes of it, may have 1 MiB."""
_KSERVE_ADAPTERS: Final = "/mnt/lora"
"""Folder that KServe downloads each adapter of an LLMInferenceService into, by its name."""
_KUBEAI_FOLDER: Final = "/config"


@dataclass(frozen=True)
class ServedModel:
    """A base model with an adapter, or a complete model."""

    name: str
    """Model name in client requests."""
    model: str
    """URI of the base model, or of the complete model."""
    revision: str | None
    """Commit of a base model on the hub."""
    adapter: str | None
    """URI of the adapter; None for a complete model."""
    max_rank: int | None
    """Value of --max-lora-rank."""
    arguments: tuple[str, ...] = ()
    """Additional arguments of vLLM."""
    chat_template: bool = False
    """Whether the adapter has its own chat template."""
    generation_config: str | None = None
    """Content of the adapter's generation_config.json, which has its stop tokens; empty if it has none, and None if it
    cannot be read from this machine."""


def resolve_served_model(job: ClusterJob) -> ServedModel:
    """Return how to serve a published run: its adapter, or its merged model if vLLM cannot load the adapter.

    Raises:
        ClusterError: The run has not published, its status names something else than a result of this run, or vLLM
            cannot load the adapter and there is no merged model.

    """
    output = job.status.output
    if output is None or output.adapter is None:
        raise ClusterError(f"{job.ref.name} is {job.phase} and has not published a result: {job.explanation}")
    check_status(job)
    commit = job.status.model.commit if job.status.model else None
    return make_served_model(job.ref.name, job.spec(), commit, output.adapter, output.merged)


def make_served_model(
    name: str, spec: QLoRAJobSpec, commit: str | None, adapter: str, merged: str | None
) -> ServedModel:
    """Return how to serve a result.

    Args:
        name: Name of the model for clients.
        spec: The spec that it was trained with.
        commit: Commit of the base model, if it is known.
        adapter: URI of the adapter, or of the complete model of method full.
        merged: URI of the merged model; None: there is none.

    Raises:
        ClusterError: vLLM cannot load the adapter, and there is no merged model.

    """
    if spec.method == "full":
        return ServedModel(name, adapter, None, None, None)
    obstacle = find_vllm_obstacle(spec.lora)
    if obstacle and merged:
        return ServedModel(name, merged, None, None, None)
    if obstacle:
        raise ClusterError(
            f"vLLM cannot load this adapter: {obstacle}; merge it with its base and serve the result: "
            f"{shell_command('qlora', 'merge', to_display_path(adapter), '--to', 'FOLDER')}"
        )
    return ServedModel(
        name=name,
        model=spec.model.uri,
        revision=commit if spec.model.uri.startswith("hf://") else None,
        adapter=adapter,
        max_rank=max_lora_rank_for(published_rank(spec.lora)),
        arguments=vllm_base_arguments(spec),
        chat_template=spec.dataset.chat_template is not None,
    )


def check_status(job: ClusterJob) -> None:
    """Check what a status says of the result: whoever can write to the bucket may have chosen it.

    Raises:
        ClusterError: A URI is not that of a result of this run, or the commit is not one.

    """
    prefix = f"{job.spec().output.uri.rstrip('/')}/{job.ref.name}/"
    result = rf"{re.escape(prefix)}[0-9a-f]+(/[A-Za-z0-9_][A-Za-z0-9_.-]*)+"
    output, model = job.status.output, job.status.model
    checks = (
        ("output.adapter", output.adapter if output else None, result, f"a folder of a result below {prefix}"),
        ("output.merged", output.merged if output else None, result, f"a folder of a result below {prefix}"),
        ("model.commit", model.commit if model else None, "[0-9a-f]+", "a commit or a digest in hex"),
    )
    for field, value, pattern, wanted in checks:
        if value is not None and not re.fullmatch(pattern, value):
            raise ClusterError(
                f"status.{field} of {job.ref.name} is {value!r}, and not {wanted}: somebody else may have written to "
                f"the output; check the bucket, and train again with "
                f"{shell_command('qlora', 'rerun', job.ref.name, '--overwrite')}"
            )


def published_rank(lora: LoraSpec) -> int:
    """Return the rank of the published matrices; PiSSA's are doubled, so that they fit the original base."""
    return lora.rank * 2 if lora.init == "pissa" else lora.rank


def find_vllm_obstacle(lora: LoraSpec) -> str | None:
    """Return why vLLM would reject the adapter or serve it incorrectly, with the field of the spec, or None."""
    obstacles = (
        (lora.dora, "it is a DoRA adapter (spec.lora.dora)"),
        (bool(lora.modules_to_save), "it replaces entire modules (spec.lora.modulesToSave)"),
        (bool(lora.rank_pattern or lora.alpha_pattern), "its modules differ in rank or alpha (spec.lora.*Pattern)"),
        (
            max_lora_rank_for(published_rank(lora)) is None,
            f"its rank is above {VLLM_MAX_LORA_RANKS[-1]} (spec.lora.rank)",
        ),
    )
    return next((sentence for found, sentence in obstacles if found), None)


def vllm_base_arguments(spec: QLoRAJobSpec) -> tuple[str, ...]:
    """Return how vLLM must load the base: a LoftQ adapter compensates the error of 4 bits, so it needs them."""
    return ("--quantization=bitsandbytes",) if spec.lora.init == "loftq" else ()


class Server(StrEnum):
    """Values of --for."""

    VLLM = "vllm"
    KSERVE = "kserve"
    KUBEAI = "kubeai"


def serve_snippet(  # noqa: PLR0913, PLR0917 (an option each)
    name: ResultName,
    server: Annotated[Server, typer.Option("--for", help="Model server.")] = Server.VLLM,
    s3_endpoint: S3Endpoint = None,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print how to serve a published run, with the base model's commit and the right --max-lora-rank."""
    listed: Mapping[str, str] | None = None
    with exit_on_cluster_error() as console:
        if is_result(name):
            served, listed = _resolve_in_folder(name, s3_endpoint, console)
        else:
            connection = open_connection(namespace, context, kubeconfig)
            served = resolve_served_model(get_job(connection.cluster, connection.ref(name)))
        if server is not Server.VLLM and (path := _local_path(served)):
            raise ClusterError(
                f"{path} is on this machine, which no pod can read; upload it and give its s3:// URI, or use --for vllm"
            )
    if served.adapter:
        try:
            served = replace(served, generation_config=read_generation_config(served.adapter, s3_endpoint, listed))
        except OutputError as error:
            echo(f"{escape_line(str(error))}; {_UNKNOWN_STOPS[server]}", err=True)
    echo(WRITERS[server](served), nl=False)


def _resolve_in_folder(text: str, endpoint: str | None, console: Console) -> tuple[ServedModel, Mapping[str, str]]:
    """Return how to serve a result in a folder or a bucket, and the SHA-256 of the files that its manifest lists."""
    try:
        result = find_result(text, endpoint, lambda note: print_line(console, note))
    except OutputError as error:
        exit_error_without_remedy(console, None, escape_line(str(error)))
    report = result.report
    commit = report.prepared.model.commit
    return make_served_model(report.job, report.spec, commit, result.adapter, result.merged), result.digests


def _local_path(served: ServedModel) -> str | None:
    """Return the first local path that a server would need."""
    uris = [uri for uri in (served.model, served.adapter) if uri and uri.startswith("file://")]
    return to_display_path(uris[0]) if uris else None


def read_generation_config(adapter: str, endpoint: str | None, listed: Mapping[str, str] | None = None) -> str:
    """Return an adapter's generation_config.json as one line of JSON; empty if there is none, as in older results.

    Raises:
        OutputError: The adapter cannot be read from this machine, or the file is not the one of its manifest.

    """
    if adapter.startswith(CLAIM_SCHEME):
        raise OutputError(f"{adapter} is in a volume of the cluster")
    with open_output_store(adapter, endpoint) as files:
        if not any(file.path == GENERATION_CONFIG for file in files.list(on_refused=lambda _: None)):
            return ""
        content = files.read(GENERATION_CONFIG, _MAX_GENERATION_CONFIG_BYTES)
    if listed:
        check_listed(listed, f"adapter/{GENERATION_CONFIG}", content)
    try:
        return json.dumps(parse_object(content, _MAX_GENERATION_CONFIG_BYTES))
    except InvalidJsonError as error:
        raise OutputError(f"{GENERATION_CONFIG} of {adapter} {error}") from error


def write_vllm(served: ServedModel) -> str:
    """Return shell commands; vLLM needs local files, so objects in S3 are downloaded first."""
    model, fetched = _local(served.model, "model")
    options: list[tuple[str, ...]] = [("vllm", "serve", model)]
    options += [_option("--revision", served.revision)] if served.revision else []
    if served.adapter:
        folder, adapter = _local(served.adapter, served.name)
        fetched += adapter
        options += [("--enable-lora",), ("--max-lora-rank", str(served.max_rank))]
        options += [_option("--lora-modules", _lora_module(served.name, folder))]
        # It has the adapter's stop tokens, which the base may not have.
        options += [_option("--generation-config", folder)] if served.generation_config != "" else []
        options += [("--chat-template", f"{folder}/chat_template.jinja")] if served.chat_template else []
    else:
        options += [_option("--served-model-name", served.name)]
    options += [(argument,) for argument in served.arguments]
    return "".join(f"{line}\n" for line in (*fetched, " \\\n  ".join(shell_command(*words) for words in options)))


def _option(name: str, value: str) -> tuple[str, ...]:
    """Return the words of an option; a value that starts with a hyphen must not become another one."""
    return (f"{name}={value}",) if value.startswith("-") else (name, value)


def _lora_module(name: str, folder: str) -> str:
    """Return a value of --lora-modules: name=path, or JSON, as vLLM reads whatever has a comma."""
    is_simple = re.fullmatch("[A-Za-z0-9_.-]+", name) and set(",=").isdisjoint(folder)
    return f"{name}={folder}" if is_simple else json.dumps({"name": name, "path": folder})


def _local(uri: str, folder: str) -> tuple[str, list[str]]:
    """Return a model's local path or hub name, and the command that downloads it."""
    if uri.startswith("s3://"):
        return f"./{folder}", [shell_command("aws", "s3", "sync", uri, f"./{folder}")]
    path = to_display_path(uri).removeprefix("hf://")
    return f"./{path}" if path.startswith("-") else path, []


def write_kserve(served: ServedModel) -> str:
    """Return an LLMInferenceService, whose storage initializer downloads base and adapter."""
    adapters = {"adapters": [{"name": served.name, "uri": served.adapter}], "maxRank": served.max_rank}
    revision = f":{served.revision}" if served.revision else ""
    stops = served.adapter and served.generation_config != ""
    words = (*([f"--generation-config={_KSERVE_ADAPTERS}/{served.name}"] if stops else []), *served.arguments)
    arguments = {"env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": shell_command(*words)}]}
    main = {"name": "main", "resources": {"limits": {NVIDIA.resource: "1"}}}
    return to_yaml(
        {
            "apiVersion": "serving.kserve.io/v1alpha2",
            "kind": "LLMInferenceService",
            "metadata": {"name": served.name},
            "spec": {
                "model": {
                    "uri": served.model + revision,
                    "name": served.model.removeprefix("hf://") if served.adapter else served.name,
                    **({"lora": adapters} if served.adapter else {}),
                },
                "replicas": 1,
                "router": {"scheduler": {}, "route": {}, "gateway": {}},
                "template": {"containers": [main | (arguments if words else {})]},
            },
        }
    )


def write_kubeai(served: ServedModel) -> str:
    """Return a Model; clients request an adapter as MODEL_ADAPTER."""
    ranks = ["--enable-lora", f"--max-lora-rank={served.max_rank}"] if served.adapter else []
    arguments = [*ranks, *served.arguments, *([f"--revision={served.revision}"] if served.revision else [])]
    # KubeAI loads adapters into a running vLLM, so that the file has to come with the Model.
    files = [{"path": f"{_KUBEAI_FOLDER}/{GENERATION_CONFIG}", "content": served.generation_config}]
    if served.generation_config:
        arguments.append(f"--generation-config={_KUBEAI_FOLDER}")
    return to_yaml(
        {
            "apiVersion": "kubeai.org/v1",
            "kind": "Model",
            "metadata": {"name": f"{served.name}-base" if served.adapter else served.name},
            "spec": {
                "features": ["TextGeneration"],
                "engine": "VLLM",
                "url": served.model,
                **({"adapters": [{"name": served.name, "url": served.adapter}]} if served.adapter else {}),
                **({"args": arguments} if arguments else {}),
                **({"files": files} if served.generation_config else {}),
                "resourceProfile": "nvidia-gpu-l4:1",
                "minReplicas": 1,
            },
        }
    )


_OLDER: Final = "leave --generation-config out if the adapter has none, as those of older trainers"
_UNKNOWN_STOPS: Final[Mapping[Server, str]] = {
    Server.VLLM: _OLDER,
    Server.KSERVE: _OLDER,
    Server.KUBEAI: f"add the adapter's {GENERATION_CONFIG} to files, and --generation-config={_KUBEAI_FOLDER} to args, "
    "so that answers end where they did in the evaluation",
}
"""What to do by hand if the adapter's files cannot be read from this machine."""
WRITERS: Final[Mapping[Server, Callable[[ServedModel], str]]] = {
    Server.VLLM: write_vllm,
    Server.KSERVE: write_kserve,
    Server.KUBEAI: write_kubeai,
}
