"""Everything about a run that can be checked without a GPU, the cheapest check first."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from qlora_api import __version__
from qlora_api.names import Reason
from qlora_api.prepared import Prepared
from qlora_api.report import Manifest
from qlora_api.runconfig import PrepareConfig
from qlora_api.v1alpha1 import DataStatus, ModelStatus, QLoRAJobSpec
from qlora_trainer.digest import result_digest
from qlora_trainer.errors import RunError
from qlora_trainer.gate import can_judge, check_gate, describe_rejected
from qlora_trainer.output import find_manifest, find_rejected, open_output, point_latest, put_manifest
from qlora_trainer.rows import Example, RowFormat, digest_of, load_examples, split, without
from qlora_trainer.secrets import Secrets, load_secrets
from qlora_trainer.snapshot import Places, Snapshot, text_files, weight_files
from qlora_trainer.store import DATASET, HELD_OUT, MODEL, Store
from qlora_trainer.tokens import Tokenised, tokenise
from qlora_trainer.work import default_work

Note = Callable[[str], None]


def _silent(_: str) -> None:
    """Say nothing."""


def prepare(
    config: PrepareConfig, note: Note = _silent, *, secrets: Secrets | None = None, work: Path | None = None
) -> Prepared:
    """Check a run, leave its token rows in the output, and return the facts; RunError says what is wrong."""
    spec, work = config.spec, work or default_work()
    places = Places(config.platform, secrets or load_secrets(spec, config.namespace))
    output = open_output(places, spec, config.job)
    prove_writable(output)
    note(f"{output.root} can be written")
    row_format, training, held_out = load_rows(spec, places, work)
    note(f"{len(training)} {row_format} rows to train on, {len(held_out)} held out")
    snapshot = places.resolve(spec.model.uri, spec.model.revision, MODEL)
    note(f"{spec.model.uri} is at {snapshot.commit}")
    model, tokenizer = inspect_model(spec, snapshot, work)
    note(f"{model.architecture} with {model.parameters:,} weights")
    learned, examined = tokenise_rows(spec, tokenizer, training, held_out, note)
    dataset = describe_rows(row_format, digest_of(training, held_out), learned, examined)
    prepared = _name_result(output, spec, model, dataset)
    if prepared.published is None:
        store_rows(output, prepared, learned, examined)
    else:
        point_latest(output, prepared.digest, prepared.prefix)
    note(f"prepared {prepared.prefix}")
    return prepared


def prove_writable(output: Store) -> None:
    """Write and remove an object, so that a missing permission shows now and not after the training."""
    probe = f".probe-{uuid4().hex}"
    output.put(probe, b"Written to prove that the output can be written.\n")
    output.delete(probe)


def load_rows(spec: QLoRAJobSpec, places: Places, work: Path) -> tuple[RowFormat, list[Example], list[Example]]:
    """Return the format, the rows to learn from and the held-out rows."""
    file = places.one_file(spec.dataset.uri, DATASET, work)
    row_format, examples = load_examples(file, DATASET, spec.dataset.format, spec.dataset.max_samples)
    uri = spec.dataset.evaluation.uri
    if uri is None:
        return row_format, *split(examples, spec.dataset.evaluation.fraction, DATASET)
    _, held_out = load_examples(places.one_file(uri, HELD_OUT, work), HELD_OUT, row_format, None)
    return row_format, without(examples, held_out, DATASET), held_out


def inspect_model(spec: QLoRAJobSpec, snapshot: Snapshot, work: Path) -> tuple[ModelStatus, Any]:
    """Return the model's facts and its tokenizer, from its small files alone."""
    weight_files(snapshot.files, MODEL)
    if "config.json" not in snapshot.files:
        raise RunError(
            Reason.MODEL_UNSUPPORTED, "spec.model.uri: there is no config.json; give a model in the Hugging Face format"
        )
    folder = snapshot.fetch(text_files(snapshot.files), work)
    # torch and transformers take seconds to import; what fails before this line fails at once.
    from qlora_trainer.architecture import load_architecture, load_tokenizer  # noqa: PLC0415
    from qlora_trainer.modules import check_modules  # noqa: PLC0415

    architecture = load_architecture(folder)
    check_modules(architecture, spec)
    status = ModelStatus(
        uri=spec.model.uri,
        commit=snapshot.commit,
        architecture=architecture.name,
        parameters=architecture.parameters,
    )
    return status, load_tokenizer(folder)


def tokenise_rows(
    spec: QLoRAJobSpec, tokenizer: Any, training: list[Example], held_out: list[Example], note: Note
) -> tuple[Tokenised, Tokenised]:
    """Tokenise both sides; a side on which no answer survives the cut is refused."""
    limit, loss = spec.training.max_length, spec.training.loss
    sides = tokenise(training, tokenizer, limit, loss), tokenise(held_out, tokenizer, limit, loss)
    for side, name in zip(sides, ("training", "held-out"), strict=True):
        if side.dropped:
            note(f"{side.dropped} {name} rows are left out: their prompt alone fills {limit} tokens")
        if not side.rows:
            raise RunError(
                Reason.DATASET_EMPTY,
                f"spec.training.maxLength: every {name} row's prompt alone fills {limit} tokens, so that nothing of "
                f"an answer is left (the longest row has {side.longest}); raise maxLength or shorten the prompts",
            )
    return sides


def describe_rows(row_format: RowFormat, digest: str, learned: Tokenised, examined: Tokenised) -> DataStatus:
    """Return the facts of the dataset; the lengths are over both sides."""
    return DataStatus(
        digest=digest,
        format=row_format,
        training_rows=len(learned.rows),
        evaluation_rows=len(examined.rows),
        training_tokens=learned.tokens,
        truncated_rows=learned.truncated + examined.truncated,
        longest_row_tokens=max(learned.longest, examined.longest),
    )


def _name_result(output: Store, spec: QLoRAJobSpec, model: ModelStatus, dataset: DataStatus) -> Prepared:
    digest = result_digest(spec, model, dataset)
    prefix = f"{output.root}/{digest}"
    published = find_manifest(output, digest)
    if published is not None and spec.output.if_exists == "Fail":
        raise RunError(
            Reason.OUTPUT_EXISTS,
            f"spec.output.ifExists: {prefix} was published at {published.created_at:%Y-%m-%d %H:%M} UTC; set Skip to "
            "use it, or change the seed to train again",
        )
    if published is not None:
        whereabouts = f"It was published as {published.result.adapter} by a run whose gate let it pass."
        check_gate(spec.evaluation.gate, published.result.evaluation, whereabouts)
    manifest = published or _accept_rejected(output, spec, digest)
    return Prepared(
        digest=digest,
        prefix=prefix,
        model=model,
        dataset=dataset,
        trainer_version=__version__,
        published=manifest.result if manifest else None,
    )


def _accept_rejected(output: Store, spec: QLoRAJobSpec, digest: str) -> Manifest | None:
    """Publish what another gate refused and this one lets pass: nothing is trained twice."""
    rejected = find_rejected(output, digest)
    if rejected is None or not can_judge(spec.evaluation.gate, rejected.result.evaluation):
        return None
    check_gate(spec.evaluation.gate, rejected.result.evaluation, describe_rejected(rejected.result))
    return put_manifest(output, rejected)


def store_rows(output: Store, prepared: Prepared, learned: Tokenised, examined: Tokenised) -> None:
    """Write the token rows, and the facts last."""
    from qlora_trainer import shards  # noqa: PLC0415 (pyarrow is slow to import)

    output.put(f"{prepared.digest}/{shards.TRAINING}", shards.to_parquet(learned.rows, with_text=False))
    output.put(f"{prepared.digest}/{shards.EVALUATION}", shards.to_parquet(examined.rows, with_text=True))
    facts = prepared.model_dump_json(by_alias=True, indent=2)
    output.put(f"{prepared.digest}/{shards.FACTS}", facts.encode())
