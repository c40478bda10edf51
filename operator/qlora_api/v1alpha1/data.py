"""Inputs and output of a run: spec.model, spec.dataset, spec.output."""

from typing import Annotated, Literal

from pydantic import Field

from qlora_api.base import ApiModel
from qlora_api.v1alpha1.patterns import REVISION
from qlora_api.v1alpha1.types import (
    PLACEHOLDER,
    DatasetUri,
    MergeBase,
    ModelUri,
    ObjectName,
    OutputUri,
    SecretRef,
    cel,
)


class ModelSpec(ApiModel):
    """The base model."""

    uri: ModelUri = Field(
        description=(
            "Where the base model is: hf://organization/name (the hub, or the platform's mirror of it), "
            "s3://bucket/prefix or pvc://claim/path (a folder in the Hugging Face format), or file:///folder (with "
            "`qlora run` only). "
            "Weights must be safetensors."
        ),
        examples=["hf://HuggingFaceTB/SmolLM2-135M-Instruct"],
    )
    revision: Annotated[str, REVISION] = Field(
        default="main",
        min_length=1,
        max_length=255,
        description="Branch, tag or commit of an hf:// model; status.model.commit has the resolved commit.",
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with HF_TOKEN for the hub, or AWS_* keys for s3://. Default: output.secretRef for s3://.",
    )


class EvaluationSplit(ApiModel):
    """The held-out rows, on which base model and adapter are compared."""

    fraction: float = Field(
        default=0.05,
        gt=0,
        le=0.5,
        description="Share of the rows to hold out, chosen by a hash of each row. Ignored if uri is set.",
    )
    uri: DatasetUri | None = Field(
        default=None, description="A separate dataset of held-out rows, read like the training rows."
    )


RowFormat = Literal["instruction", "chat", "completion", "text"]
"""Row formats; qlora_trainer.data.row_formats has the fields that identify each, and its parser."""
RowFormatName = Literal["auto", RowFormat]


class RowTemplate(ApiModel):
    """How a row becomes a prompt and an answer; {field} is replaced by the row's field."""

    prompt: str = Field(
        pattern=PLACEHOLDER, max_length=8192, description="Prompt for the model.", examples=["Q: {question}\nA:"]
    )
    answer: str = Field(
        pattern=PLACEHOLDER,
        max_length=8192,
        description="Answer that the model is trained to give.",
        examples=[" {answer}"],
    )


class DataSource(ApiModel):
    """One of several datasets."""

    uri: DatasetUri = Field(
        description="One data file, or a prefix that ends with '/': every data file below it, sorted by name."
    )
    format: RowFormatName = Field(default="auto", description="Format of its rows; see spec.dataset.format.")
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description=(
            "How often each training row occurs per epoch: 2 is twice; 0.5 uses the half with the lowest content "
            "hashes. Held-out rows are not repeated."
        ),
    )
    max_samples: int | None = Field(
        default=None, ge=1, le=100_000_000, description="Use only this many rows, the first ones."
    )


class DatasetSpec(ApiModel):
    """The training data."""

    model_config = cel(
        ("has(self.uri) != has(self.sources)", "give either uri or sources"),
        (
            "!has(self.sources) || !has(self.maxSamples)",
            "with sources, set maxSamples in each source instead",
        ),
        (
            "!has(self.template) || self.format in ['auto', 'instruction']",
            "a template produces instruction rows; leave format out, or remove the template",
        ),
    )

    uri: DatasetUri | None = Field(
        default=None,
        description=(
            "One data file (.jsonl, .json, .csv, .tsv, also with .gz or .zst; .parquet; .arrow): s3://bucket/key, "
            "hf://datasets/organization/name/file, pvc://claim/path or file://. With wildcards (part-*.jsonl): every "
            "file that matches. With a trailing '/': every such file below it, sorted by name, but none that its name "
            "says to be of a test or validation split if others are of a train split."
        ),
        examples=["s3://data/support/train.jsonl"],
    )
    sources: Annotated[tuple[DataSource, ...], Field(min_length=1, max_length=16)] | None = Field(
        default=None, description="Several datasets instead of one uri, each with a weight."
    )
    format: RowFormatName = Field(
        default="auto",
        description=(
            "instruction: fields instruction, input or context (optional) and output or response; chat: messages "
            "(role, content) or conversations (from, value); completion: prompt and completion; text: text; auto: "
            "detected from the fields of the first row."
        ),
    )
    template: RowTemplate | None = Field(
        default=None, description="Custom prompt and answer instead of the built-in ones for instruction rows."
    )
    chat_template: str | None = Field(
        default=None,
        min_length=1,
        max_length=32_768,
        description="Jinja chat template to use instead of the model's own; published with the adapter.",
    )
    on_invalid_row: Literal["refuse", "drop"] = Field(
        default="refuse",
        description=(
            "What happens to rows that cannot be used, such as those without an answer: refuse the run, or drop them, "
            "up to one row in ten."
        ),
    )
    secret_ref: SecretRef | None = Field(
        default=None, description="Secret with AWS_* keys or HF_TOKEN for the dataset. Default: output.secretRef."
    )
    evaluation: EvaluationSplit = Field(default=EvaluationSplit(), description="The held-out rows.")
    max_samples: int | None = Field(
        default=None, ge=2, le=100_000_000, description="Use only this many rows, the first ones: for a quick trial."
    )

    @property
    def sources_by_field(self) -> tuple[tuple[str, DataSource], ...]:
        """Return every source with the path of its field; a single uri is a source too."""
        if self.uri is not None:
            source = DataSource(uri=self.uri, format=self.format, max_samples=self.max_samples)
            return (("spec.dataset.uri", source),)
        return tuple((f"spec.dataset.sources[{index}].uri", source) for index, source in enumerate(self.sources or ()))

    @property
    def source_uris(self) -> str:
        """Return the URIs of all sources, separated by commas, for people."""
        return ", ".join(source.uri for _, source in self.sources_by_field)


class OutputSpec(ApiModel):
    """Where the result goes."""

    uri: OutputUri = Field(
        description="Prefix for the result, s3://bucket/prefix; the adapter is in <uri>/<name>/<digest>/adapter.",
        examples=["s3://adapters/team-a"],
    )
    secret_ref: SecretRef | None = Field(
        default=None,
        description="Secret with AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY; AWS_REGION, AWS_ENDPOINT_URL if needed.",
    )
    service_account_name: ObjectName | None = Field(
        default=None, description="ServiceAccount of the pods, for workload identity instead of a Secret."
    )
    if_exists: Literal["Skip", "Fail", "Overwrite"] = Field(
        default="Skip",
        description=(
            "If the same result is already published: succeed without a GPU, fail, or train again and replace it."
        ),
    )
    merged: Literal["none", "bf16"] = Field(
        default="none",
        description=(
            "bf16: also publish the merged model, in <prefix>/merged/<mergeBase>. Needs memory for the base in bf16. "
            "Not part of the result's digest: if set later, the published adapter is merged."
        ),
    )
    merge_base: MergeBase = Field(
        default="original",
        description=(
            "What the adapter is merged into: original weights, or dequantised: the quantized ones it was trained on."
        ),
    )
