"""What a run reads and where its result goes: model, dataset, output."""

from typing import Literal

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.v1alpha1.types import IN_CLUSTER, S3_SHAPE, ObjectName, OutputUri, SecretRef, Uri, cel


class ModelSpec(ApiModel):
    """The base model."""

    model_config = cel(
        (IN_CLUSTER, "file:// works with 'qlora run' only; upload the model and use s3://, or use hf://"),
        (
            "!self.uri.startsWith('hf://') || self.uri.matches('^hf://[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$')",
            "write hf://organisation/name; the revision goes into spec.model.revision",
        ),
        S3_SHAPE,
    )

    uri: Uri = Field(
        description=(
            "Where the base model is: hf://organisation/name (the hub, or its mirror where the platform has one), "
            "s3://bucket/prefix (a folder in the Hugging Face format), or file:///folder (with `qlora run` only). "
            "Weights must be safetensors."
        ),
        examples=["hf://HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    revision: str = Field(
        default="main",
        min_length=1,
        max_length=255,
        description="Branch, tag or commit of an hf:// model; status.model.commit has what it was resolved to.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with HF_TOKEN for the hub, or AWS_* keys for s3://. Default: output.secretRef for s3://.",
    )


class EvaluationSplit(ApiModel):
    """The held-out rows, on which base model and adapter are compared."""

    model_config = cel(
        (
            "!has(self.uri) || !self.uri.startsWith('file://')",
            "file:// works with 'qlora run' only; upload the rows and use s3://",
        ),
    )

    fraction: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="Share of the rows that is held out, chosen by a hash of each row. Unused where uri is set.",
    )
    uri: Uri | None = Field(default=None, description="A dataset of held-out rows, in the format of the training rows.")


class DatasetSpec(ApiModel):
    """The rows to learn from."""

    model_config = cel(
        (IN_CLUSTER, "file:// works with 'qlora run' only; upload the dataset and use s3://"),
        S3_SHAPE,
    )

    uri: Uri = Field(
        description="Object with one JSON object a line (.jsonl): s3://bucket/key, hf://datasets/name/file or file://.",
        examples=["s3://data/support/train.jsonl"],
    )
    format: Literal["auto", "instruction", "completion"] = Field(
        default="auto",
        description=(
            "instruction: fields instruction, input (optional) and output or response; completion: fields prompt and "
            "completion; auto: told by the fields of the first row."
        ),
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret with AWS_* keys or HF_TOKEN for the dataset. Default: output.secretRef."
    )
    evaluation: EvaluationSplit = Field(default=EvaluationSplit(), description="The held-out rows.")
    max_samples: int | None = Field(
        default=None, ge=2, le=100_000_000, description="Use only the first rows, this many: a quick trial of a run."
    )


class OutputSpec(ApiModel):
    """Where the result goes."""

    model_config = cel(
        (IN_CLUSTER, "file:// works with 'qlora run' only; use s3://bucket/prefix"),
        S3_SHAPE,
    )

    uri: OutputUri = Field(
        description="Prefix for the result, s3://bucket/prefix; the adapter lands in <uri>/<name>/<digest>/adapter.",
        examples=["s3://adapters/team-a"],
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_REGION, AWS_ENDPOINT_URL if needed.",
    )
    service_account_name: ObjectName | None = Field(
        default=None, description="ServiceAccount of the pods, for workload identity instead of a Secret."
    )
    if_exists: Literal["Skip", "Fail"] = Field(
        default="Skip", description="When the same result is published already: succeed without a GPU, or fail."
    )
