"""`qlora render`: a QLoRAJob with all defaults, and the objects of its first attempt, rendered offline."""

from collections.abc import Iterator
from typing import Annotated, Any, Final

import typer

from qlora_api import __version__
from qlora_api.job_ref import JobRef
from qlora_api.prepared import Prepared
from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec
from qlora_cli.commands.submit import load_documents
from qlora_cli.console import Console, echo
from qlora_cli.display.formats import to_yaml
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.manifests.loader import JobManifest, parse_manifest
from qlora_cli.manifests.yaml_documents import Document
from qlora_operator.models import AttemptInputs, Manifest
from qlora_operator.resources import (
    Installation,
    Owner,
    build_prepare_config,
    build_prepare_job,
    build_run_config,
    build_service,
    build_train_job,
)
from qlora_planner import make_plan
from qlora_planner.sizing import DoesNotFitError
from qlora_planner.validation import CLUSTER_RULES

UNKNOWN_UID: Final = "00000000-0000-0000-0000-000000000000"
UNKNOWN_DIGEST: Final = "0" * 16
UNKNOWN_COMMIT: Final = "0" * 40
"""Placeholders for what only the API server or preparation can know."""
FIRST_ATTEMPT: Final = 1


def render(
    files: Annotated[list[str], typer.Argument(help="Manifests; - reads standard input.", metavar="FILE...")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8.")
    ] = None,
    children: Annotated[
        bool,
        typer.Option(help="Also render the ConfigMaps, Jobs and Services of preparation and of the first attempt."),
    ] = True,
    image: Annotated[str, typer.Option(help="Trainer image.")] = f"qlora-trainer:{__version__}",
) -> None:
    """Print QLoRAJobs with all defaults, and the objects that the operator would create for them, as YAML.

    Values that are known only in a cluster are zeros: uid, digest, commit of the model, number of rows.
    """
    console = Console(stderr=True)
    for document in load_documents(files, changes or [], console):
        try:
            manifests = list(render_document(document, Installation(image) if children else None))
        except DoesNotFitError as error:
            exit_error_without_remedy(console, None, f"does not fit: {error}")
        for manifest in manifests:
            echo("---")
            echo(to_yaml(manifest), nl=False)


def render_document(document: Document, installation: Installation | None) -> Iterator[Manifest]:
    """Yield a QLoRAJob with all defaults, and its children if an installation is given."""
    job = parse_manifest(document, CLUSTER_RULES)
    spec = job.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    yield {**document.value, "spec": spec}
    if installation:
        yield from render_children(job, installation)


def render_children(job: JobManifest, installation: Installation) -> Iterator[Manifest]:
    """Yield the children of preparation and of the first attempt."""
    spec = job.spec
    owner = Owner(JobRef(job.metadata.namespace, job.metadata.name), UNKNOWN_UID)
    yield build_prepare_config(owner, spec, installation)
    yield build_prepare_job(owner, spec, installation)
    prepared = placeholder_prepared(spec, job.metadata.name)
    run = AttemptInputs(FIRST_ATTEMPT, make_plan(spec, prepared), prepared)
    yield build_run_config(owner, spec, run, installation)
    if run.plan.nodes > 1:
        yield build_service(owner, FIRST_ATTEMPT)
    yield build_train_job(owner, spec, run, installation)


def placeholder_prepared(spec: QLoRAJobSpec, name: str) -> Prepared:
    """Return placeholder results of preparation; the objects do not depend on them."""
    data: dict[str, Any] = dict.fromkeys(("evaluation_rows", "training_tokens", "truncated_rows"), 0)
    return Prepared(
        digest=UNKNOWN_DIGEST,
        prefix=f"{spec.output.uri}/{name}/{UNKNOWN_DIGEST}",
        model=ModelStatus(uri=spec.model.uri, commit=UNKNOWN_COMMIT, architecture="", parameters=0),
        dataset=DataStatus(
            digest="", format=spec.dataset.format, training_rows=spec.training.global_batch_size,
            longest_row_tokens=spec.training.max_length, **data,
        ),
        trainer_version=__version__,
    )  # fmt: skip
