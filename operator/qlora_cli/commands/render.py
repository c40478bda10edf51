"""`qlora render`: a QLoRAJob with all defaults, and the objects of its first attempt, rendered offline."""

from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Annotated, Any, Final

import typer

from qlora_api import __version__
from qlora_api.job_ref import JobRef
from qlora_api.pod_profile import DEFAULT_PROFILE, PodProfile
from qlora_api.prepared import Prepared
from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec, QLoRAJobStatus
from qlora_cli.commands.submit import load_manifests
from qlora_cli.console import Console, echo
from qlora_cli.display.formats import to_yaml
from qlora_cli.errors import exit_error_without_remedy
from qlora_cli.manifests.chart_values import read_pods
from qlora_cli.manifests.classes import is_class, parse_class, to_raw_class
from qlora_cli.manifests.loader import ManifestError, is_qlorajob, parse_manifest
from qlora_cli.manifests.yaml_documents import Document, YamlError
from qlora_operator.controller.run_settings import apply_class
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.lifecycle.class_choice import ClassNotReadyError, choose_class
from qlora_operator.models import AttemptInputs, Classes, Job, Manifest
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
NO_TIME: Final = datetime.min.replace(tzinfo=UTC)
FIRST_ATTEMPT: Final = 1
NO_CLASSES: Final = Classes()


def render(  # noqa: PLR0913, PLR0917 (an option each)
    files: Annotated[list[str], typer.Argument(help="Manifests; - reads standard input.", metavar="FILE...")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", metavar="PATH=VALUE", help="Change a field, such as lora.rank=8.")
    ] = None,
    children: Annotated[
        bool,
        typer.Option(help="Also render the ConfigMaps, Jobs and Services of preparation and of the first attempt."),
    ] = True,
    image: Annotated[str, typer.Option(help="Trainer image.")] = f"qlora-trainer:{__version__}",
    class_files: Annotated[
        list[str] | None,
        typer.Option("--class", metavar="FILE", help="QLoRAClasses, besides those in the files of the manifests."),
    ] = None,
    values: Annotated[
        str | None, typer.Option(metavar="FILE", help="Values of the chart, for what an installation sets in pods.")
    ] = None,
) -> None:
    """Print QLoRAJobs with all defaults, and the objects that the operator would create for them, as YAML.

    Values that are known only in a cluster are zeros: uid, digest, commit of the model, number of rows.
    """
    console = Console(stderr=True)
    documents = load_manifests(files, changes or [], console)
    if not any(map(is_qlorajob, documents)):
        exit_error_without_remedy(console, None, f"{files[0]}: contains no QLoRAJob, only classes; pass a run with it")
    classes = read_classes([*documents, *load_manifests(class_files or [], [], console)], console)
    installation = Installation(image, pods=load_pods(values, console))
    for document in filter(is_qlorajob, documents):
        try:
            manifests = list(render_document(document, installation if children else None, classes))
        except DoesNotFitError as error:
            exit_error_without_remedy(console, None, f"does not fit: {error}")
        except ClassNotReadyError as error:
            exit_error_without_remedy(console, None, f"{error}; qlora render --class FILE reads one")
        for manifest in manifests:
            echo("---")
            echo(to_yaml(manifest), nl=False)


def load_pods(values: str | None, console: Console) -> PodProfile:
    """Return what the chart sets in pods with such values, or by default; exit if they are wrong."""
    try:
        return read_pods(values) if values else DEFAULT_PROFILE
    except YamlError as error:
        exit_error_without_remedy(console, None, str(error))


def read_classes(documents: list[Document], console: Console) -> Classes:
    """Return the QLoRAClasses among documents; exit with every problem of one that is wrong."""
    try:
        return Classes(
            tuple(to_raw_class(parse_class(found), found.value["spec"]) for found in documents if is_class(found))
        )
    except ManifestError as error:
        exit_error_without_remedy(console, None, str(error))


def render_document(
    document: Document, installation: Installation | None, classes: Classes = NO_CLASSES
) -> Iterator[Manifest]:
    """Yield a QLoRAJob with all defaults, and its children if an installation is given."""
    manifest = parse_manifest(document, CLUSTER_RULES)
    spec = manifest.spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    yield {**document.value, "spec": spec}
    if installation:
        ref = JobRef(manifest.metadata.namespace, manifest.metadata.name)
        job = Job(ref, UNKNOWN_UID, 1, NO_TIME, manifest.spec, QLoRAJobStatus())
        used = choose_class(job, classes, {})
        job, installation, _ = apply_class(used, job, installation, ReconcileContext(NO_TIME))
        yield from render_children(job, installation)


def render_children(job: Job, installation: Installation) -> Iterator[Manifest]:
    """Yield the children of preparation and of the first attempt."""
    spec = job.spec
    owner = Owner(job.ref, job.uid)
    yield build_prepare_config(owner, spec, installation)
    yield build_prepare_job(owner, spec, installation)
    prepared = placeholder_prepared(spec, job.ref.name)
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
