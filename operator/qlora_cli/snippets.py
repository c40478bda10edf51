"""`qlora serve-snippet`: a published adapter as a command of vLLM, or as a manifest of KServe or KubeAI."""

import shlex
from collections.abc import Callable, Mapping
from enum import StrEnum
from typing import Annotated, Final

import typer

from qlora_api.accelerators import NVIDIA
from qlora_cli.connection import Context, JobName, Kubeconfig, Namespace, open_connection, reporting_errors
from qlora_cli.jobs import get_job
from qlora_cli.printing import to_yaml
from qlora_cli.serving import Served, find_served


class Server(StrEnum):
    """What serves the adapter."""

    VLLM = "vllm"
    KSERVE = "kserve"
    KUBEAI = "kubeai"


def serve_snippet(
    name: JobName,
    server: Annotated[Server, typer.Option("--for", help="What serves it.")] = Server.VLLM,
    namespace: Namespace = None,
    context: Context = None,
    kubeconfig: Kubeconfig = None,
) -> None:
    """Print how to serve a published run: its base at the commit it was trained on, and a --max-lora-rank that fits."""
    with reporting_errors():
        connection = open_connection(namespace, context, kubeconfig)
        served = find_served(get_job(connection.cluster, connection.ref(name)))
    typer.echo(WRITERS[server](served), nl=False)


def write_vllm(served: Served) -> str:
    """Return commands for a shell: vLLM reads files of its own computer."""
    model, fetched = _local(served.model, "model")
    command = [f"vllm serve {shlex.quote(model)}"]
    command += [f"--revision {served.revision}"] if served.revision else []
    if served.adapter:
        folder, adapter = _local(served.adapter, served.name)
        fetched += adapter
        command += ["--enable-lora", f"--max-lora-rank {served.max_rank}", f"--lora-modules {served.name}={folder}"]
        command += [f"--chat-template {folder}/chat_template.jinja"] if served.chat_template else []
    else:
        command += [f"--served-model-name {served.name}"]
    return "".join(f"{line}\n" for line in (*fetched, " \\\n  ".join((*command, *served.arguments))))


def _local(uri: str, folder: str) -> tuple[str, list[str]]:
    """Return what vLLM calls a model, and the command that brings it here."""
    if uri.startswith("s3://"):
        return f"./{folder}", [f"aws s3 sync {shlex.quote(uri)} ./{folder}"]
    return uri.removeprefix("hf://"), []


def write_kserve(served: Served) -> str:
    """Return an LLMInferenceService, whose storage initializer fetches both."""
    adapters = {"adapters": [{"name": served.name, "uri": served.adapter}], "maxRank": served.max_rank}
    revision = f":{served.revision}" if served.revision else ""
    arguments = {"env": [{"name": "VLLM_ADDITIONAL_ARGS", "value": " ".join(served.arguments)}]}
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
                "template": {"containers": [main | (arguments if served.arguments else {})]},
            },
        }
    )


def write_kubeai(served: Served) -> str:
    """Return a Model; an adapter is asked for as MODEL_ADAPTER."""
    ranks = ["--enable-lora", f"--max-lora-rank={served.max_rank}"] if served.adapter else []
    arguments = [*ranks, *served.arguments, *([f"--revision={served.revision}"] if served.revision else [])]
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
                "resourceProfile": "nvidia-gpu-l4:1",
                "minReplicas": 1,
            },
        }
    )


WRITERS: Final[Mapping[Server, Callable[[Served], str]]] = {
    Server.VLLM: write_vllm,
    Server.KSERVE: write_kserve,
    Server.KUBEAI: write_kubeai,
}
