"""The model card has the metadata of base, data and method, as read by huggingface_hub."""

from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard, metadata_load
from huggingface_hub.utils import validate_repo_id

from qlora_api.prepared import Prepared
from qlora_api.report import Confidence, Interval, Intervals, RunReport, ServingCheck
from qlora_api.v1alpha1 import DataStatus, ModelStatus, Plan
from qlora_trainer.publishing.model_card import CARD_FILE, write_card
from tests.make import DIGEST, NOW, make_result, make_spec

HUB_FILE = "hf://datasets/org/questions/train.jsonl"
SAME = Interval(low=1, high=2)
ALIKE = Intervals(loss=SAME, perplexity=SAME, token_accuracy=SAME)
ON_THE_HUB = {
    "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
    "library_name": "peft",
    "pipeline_tag": "text-generation",
    "tags": ["lora", "qlora", "qlora-operator"],
}


def make_report(**spec: Any) -> RunReport:
    job_spec = make_spec(**spec)
    return RunReport(
        job="support-bot",
        namespace="ml",
        digest=DIGEST,
        spec=job_spec,
        plan=Plan(device="cpu", nodes=1, gpus_per_node=0, micro_batch_size=4, gradient_accumulation=2, total_steps=1),
        prepared=Prepared(
            digest=DIGEST,
            prefix=f"s3://adapters/team-a/support-bot/{DIGEST}",
            model=ModelStatus(
                uri=job_spec.model.uri, commit="c0ffee" + "0" * 34, architecture="LlamaForCausalLM", parameters=1
            ),
            dataset=DataStatus(
                digest="d" * 64,
                format="instruction",
                training_rows=9,
                evaluation_rows=1,
                training_tokens=90,
                truncated_rows=0,
                longest_row_tokens=10,
            ),
            trainer_version="0.1.0",
        ),
        choices={},
        history=(),
        adapter_step=0,
        evaluation=make_result().evaluation,
        confidence=Confidence(level=0.95, resamples=1, seed=0, base=ALIKE, adapter=ALIKE, change=ALIKE),
        samples=(),
        serving=ServingCheck(vllm=True, max_lora_rank=16),
        started_at=NOW,
        finished_at=NOW,
        training_seconds=1,
        tokens_per_second=1,
        peak_memory_bytes=1,
        versions={},
    )


@pytest.mark.parametrize(
    ("spec", "metadata"),
    [
        pytest.param({}, ON_THE_HUB, id="hub-model-own-rows"),
        pytest.param({"dataset": {"uri": HUB_FILE}}, ON_THE_HUB | {"datasets": ["org/questions"]}, id="hub-rows"),
        pytest.param(
            {
                "dataset": {
                    "uri": None,
                    "sources": [{"uri": HUB_FILE}, {"uri": "s3://data/a.jsonl"}, {"uri": f"{HUB_FILE[:-6]}/"}],
                }
            },
            ON_THE_HUB | {"datasets": ["org/questions"]},
            id="several-sources",
        ),
        pytest.param(
            {"method": "lora", "quantization": {"bits": 16}},
            ON_THE_HUB | {"tags": ["lora", "qlora-operator"]},
            id="lora",
        ),
        pytest.param(
            {"method": "full", "quantization": {"bits": 16}},
            ON_THE_HUB | {"library_name": "transformers", "tags": ["qlora-operator"]},
            id="full",
        ),
        pytest.param(
            {"model": {"uri": "s3://models/own"}},
            {name: value for name, value in ON_THE_HUB.items() if name != "base_model"},
            id="own-model",
        ),
    ],
)
def test_card_metadata_has_base_data_and_method(tmp_path: Path, spec, metadata):
    write_card(make_report(**spec), tmp_path)
    assert metadata_load(tmp_path / CARD_FILE) == metadata
    card = ModelCard.load(tmp_path / CARD_FILE)
    assert card.data.to_dict() == metadata
    assert card.text.lstrip().startswith("# support-bot\n")
    named = [card.data.base_model, *(card.data.datasets or ())]
    for name in filter(None, named):
        validate_repo_id(name)
