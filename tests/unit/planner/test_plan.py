"""The plan: numbers that can be checked by hand."""

import json
from pathlib import Path

import pytest

from qlora_api.model_config import reduce_config
from qlora_api.prepared import Prepared
from qlora_api.v1alpha1 import RowLengths
from qlora_planner import make_plan
from qlora_planner.gpu_inventory import GpuPool
from qlora_planner.memory.estimate import SequenceLengths
from qlora_planner.plan import sequence_lengths
from qlora_planner.sizing import DoesNotFitError
from tests.make import make_prepared, make_spec


def plan_of(rows: int = 950, gpus: int = 0, **training: object) -> tuple[int, int, int]:
    prepared = make_prepared()
    dataset = prepared.dataset.model_copy(update={"training_rows": rows})
    plan = make_plan(
        make_spec(training=training, resources={"gpusPerNode": gpus}), prepared.model_copy(update={"dataset": dataset})
    )
    assert len(plan.reasons) == 4 + bool(gpus)  # of the prepared model no config.json was recorded
    assert plan.micro_batch_size * plan.gradient_accumulation == make_spec(training=training).training.global_batch_size
    return plan.micro_batch_size, plan.gradient_accumulation, plan.total_steps


@pytest.mark.parametrize(
    ("gpus", "training", "micro", "accumulation"),
    [
        pytest.param(1, {}, 4, 4, id="the-seed's-recipe"),
        pytest.param(0, {}, 16, 1, id="cpu-16-rows-share-dequantization"),
        pytest.param(1, {"globalBatchSize": 6}, 3, 2, id="largest-divisor"),
        pytest.param(1, {"globalBatchSize": 7}, 1, 7, id="prime"),
        pytest.param(1, {"globalBatchSize": 2}, 2, 1, id="small-batch"),
        pytest.param(1, {"microBatchSize": 16}, 16, 1, id="given"),
        pytest.param(0, {"microBatchSize": 1}, 1, 16, id="given-on-cpu"),
    ],
)
def test_micro_batch(gpus: int, training: dict[str, int], micro: int, accumulation: int) -> None:
    assert plan_of(gpus=gpus, **training)[:2] == (micro, accumulation)


@pytest.mark.parametrize(
    ("rows", "training", "steps"),
    [
        pytest.param(950, {}, 180, id="3-epochs-of-60-steps"),
        pytest.param(960, {}, 180, id="exact"),
        pytest.param(961, {}, 183, id="one-row-more"),
        pytest.param(950, {"epochs": 0.5}, 30, id="half-an-epoch"),
        pytest.param(950, {"epochs": 0.51}, 31, id="rounded-up"),
        pytest.param(160, {"epochs": 1.1}, 11, id="floating-point"),
        pytest.param(5, {"epochs": 0.01}, 1, id="at-least-one"),
        pytest.param(950, {"maxSteps": 100}, 100, id="capped"),
        pytest.param(950, {"maxSteps": 1000}, 180, id="cap-not-reached"),
    ],
)
def test_steps(rows: int, training: dict[str, float], steps: int) -> None:
    assert plan_of(rows=rows, **training)[2] == steps


def test_cpu_plan_has_reasons() -> None:
    reasons = make_plan(make_spec(), make_prepared()).reasons
    assert reasons[1] == (
        "micro-batch 16: the largest divisor of globalBatchSize 16 up to 16; "
        "a CPU pays for dequantization per forward pass, whatever its rows"
    )


@pytest.mark.parametrize(
    ("resources", "distribution", "global_batch_size", "expected"),
    [
        pytest.param({}, "auto", 16, ("single", 16, 1), id="alone"),
        pytest.param({"nodes": 2}, "auto", 16, ("ddp", 8, 1), id="two-nodes"),
        pytest.param({"nodes": 2}, "zero3", 16, ("zero3", 8, 1), id="as-asked"),
        pytest.param({"nodes": 2, "gpusPerNode": 4}, "zero2", 64, ("zero2", 4, 2), id="eight-gpus"),
        pytest.param({"nodes": 3}, "ddp", 16, ("ddp", 6, 1), id="uneven-shares"),
    ],
)
def test_processes_divide_global_batch(
    resources: dict[str, int], distribution: str, global_batch_size: int, expected: tuple[str, int, int]
) -> None:
    spec = make_spec(training={"globalBatchSize": global_batch_size})
    spec = spec.model_copy(
        update={
            "resources": spec.resources.model_copy(
                update={"nodes": resources.get("nodes", 1), "gpus_per_node": resources.get("gpusPerNode", 0)}
            ),
            "distribution": distribution,
        }
    )
    plan = make_plan(spec, make_prepared())
    assert (plan.strategy, plan.micro_batch_size, plan.gradient_accumulation) == expected
    assert plan.micro_batch_size * plan.gradient_accumulation * plan.processes >= global_batch_size


CONFIGS = Path(__file__).parent / "configs"
A10 = GpuPool("NVIDIA-A10", 23_028 << 20, 1, 4, (8, 6))
GPU = {"resources": {"gpusPerNode": 1}}


def prepared_for(name: str | None = "llama-3.2-3b") -> Prepared:
    prepared = make_prepared()
    config = "" if name is None else reduce_config(json.loads((CONFIGS / f"{name}.json").read_text()))
    lengths = RowLengths(mean=37.0, p50=30, p95=90, p99=150)
    return prepared.model_copy(
        update={
            "model": prepared.model.model_copy(update={"config": config}),
            "dataset": prepared.dataset.model_copy(update={"row_lengths": lengths}),
        }
    )


def test_plan_is_sized_by_rows_model_and_gpus() -> None:
    plan = make_plan(make_spec(**GPU), prepared_for(), (A10,))
    assert plan.peak_bytes is not None
    assert 2.2e9 < plan.peak_bytes < A10.usable
    assert (plan.device, plan.strategy, plan.gradient_checkpointing) == ("cuda", "single", False)
    assert (plan.micro_batch_size, plan.gradient_accumulation, plan.total_steps) == (16, 1, 180)
    assert plan.reasons[0] == "1 x NVIDIA-A10 on 1 node: as spec.resources asks"
    assert plan.reasons[-3:] == (
        "gradient accumulation 1: 16 x 1 = globalBatchSize 16",
        "steps 180: 3 epochs x 60 steps (950 rows / 16)",
        "training about 20 s to 44 s: 1.1e+05 tokens at 22% to 47% of 125 TFLOP/s, as published runs reached; "
        "evaluation and upload not counted",
    )


@pytest.mark.parametrize(
    ("offer", "blocks"),
    [
        pytest.param((), GPU, id="no-gpu-is-known"),
        pytest.param((A10,), {}, id="cpu"),
        pytest.param((GpuPool("NVIDIA-A10", 23_028 << 20, 1, 0),), GPU, id="fewer-nodes-than-asked-for"),
    ],
)
def test_unsized_plan_follows_default_recipe(offer: tuple[GpuPool, ...], blocks: dict[str, object]) -> None:
    spec = make_spec(**blocks)
    plan = make_plan(spec, prepared_for("llama-3.2-3b"), offer)
    assert plan == make_plan(spec, prepared_for("llama-3.2-3b"))
    assert plan.peak_bytes is None
    unsized = "peak memory is not estimated: the cluster's nodes show fewer GPUs than the run needs"
    assert (unsized in plan.reasons) == bool(blocks)


@pytest.mark.parametrize(
    ("config", "cause"),
    [
        pytest.param("", "the model's config.json was not recorded", id="older-release"),
        pytest.param('{"model_type": "olmo"}', "the size of a model of type 'olmo' is not known", id="other-family"),
        pytest.param('{"model_type": "llama", "hidden_size": "x"}', "config.json: hidden_size: ", id="no-number"),
        pytest.param('{"model_type": "\\ud800\\u202e"}', "the size of a model of type '\\ud800\\u202e'", id="escaped"),
        pytest.param(f'{{"model_type": "{"x" * 2000}"}}', f"the size of a model of type '{'x' * 100}", id="long"),
    ],
)
def test_plan_says_why_memory_is_not_estimated(config: str, cause: str) -> None:
    prepared = make_prepared()
    recorded = prepared.model_copy(update={"model": prepared.model.model_copy(update={"config": config})})
    plan = make_plan(make_spec(**GPU), recorded, (A10,))
    assert plan.peak_bytes is None
    assert any(reason.startswith(f"peak memory is not estimated: {cause}") for reason in plan.reasons)
    assert all(";" not in reason for reason in plan.reasons if "not estimated" in reason)


TABLE = (
    ":model.embed_tokens=400000000,model.norm=4096,lm_head=100000x4096;"
    "model.layers.0-{last}:self_attn.q_proj|self_attn.o_proj=4096x4096qa,self_attn.v_proj=1024x4096qa,"
    "mlp.up_proj=16384x4096qa,mlp.down_proj=4096x16384qa,input_layernorm=4096"
)
A100 = GpuPool("NVIDIA-A100-SXM4-80GB", 81_920 << 20, 8, 4, (8, 0))
H200 = GpuPool("NVIDIA-H200", 143_771 << 20, 8, 4, (9, 0))


def traced_model(layers: int, **traced: object) -> Prepared:
    """Prepare a model of an architecture that no code describes, of 0.17e9 weights a layer."""
    sizes = {"version": 1, "embedding": "model.embed_tokens", "head": "lm_head"}
    config = json.dumps({"model_type": "new", "traced": sizes | {"modules": TABLE.format(last=layers - 1)} | traced})
    prepared = prepared_for()
    return prepared.model_copy(update={"model": prepared.model.model_copy(update={"config": config})})


def test_plan_of_a_traced_model_follows_default_recipe_on_gpus_that_hold_its_weights() -> None:
    plan = make_plan(make_spec(**GPU), traced_model(layers=300), (A10, A100, H200))
    recipe = make_plan(make_spec(**GPU), make_prepared(), (A10, A100, H200))
    assert (plan.gpu_product, plan.gpu_products) == (A100.product, (A100.product, H200.product))
    assert (plan.peak_bytes, plan.gradient_checkpointing, plan.micro_batch_size) == (None, None, 4)
    changed = {"gpu_product": None, "gpu_products": None, "reasons": recipe.reasons}
    assert plan.model_copy(update=changed) == recipe
    assert plan.reasons[4:] == (
        "peak memory is not estimated: all but the activations takes 28.2 GiB of 78.4 GiB per GPU, and those of a "
        "model of type 'new' are not known",
        "GPUs that fit: NVIDIA-A100-SXM4-80GB, NVIDIA-H200; sized for NVIDIA-A100-SXM4-80GB, the smallest of them",
        "GPUs left out: NVIDIA-A10 (7.9 GiB too small)",
    )


def test_traced_model_shards_what_no_gpu_holds_alone() -> None:
    spec = make_spec(resources={"gpusPerNode": 8}, method="full", quantization={"bits": 16})
    plan = make_plan(spec, traced_model(layers=32), (A100,))
    assert (plan.strategy, plan.peak_bytes) == ("zero2", None)
    assert plan.reasons[1].startswith("strategy zero2: ")


@pytest.mark.parametrize(
    ("layers", "blocks", "sentence"),
    [
        pytest.param(
            900,
            {},
            r"^needs .* GiB per GPU besides the activations of its layers, .* GiB more than .* on a NVIDIA-A100",
            id="weights",
        ),
        pytest.param(
            60,
            {"method": "full", "quantization": {"bits": 16}},
            r"^needs .* per GPU besides the activations of its layers, which are not estimated, .* GiB more than",
            id="full-fine-tuning",
        ),
    ],
)
def test_traced_model_whose_weights_alone_do_not_fit_is_refused(
    layers: int, blocks: dict[str, object], sentence: str
) -> None:
    with pytest.raises(DoesNotFitError, match=sentence) as caught:
        make_plan(make_spec(**GPU | blocks), traced_model(layers), (A100,))
    assert "these parts fit " in str(caught.value)


@pytest.mark.parametrize(
    ("traced", "blocks", "cause"),
    [
        pytest.param({"version": 7}, {}, "the recorded sizes of a model of type 'new' have version 7", id="version"),
        pytest.param({"modules": "%"}, {}, "the recorded sizes of a model of type 'new' cannot be read", id="damaged"),
        pytest.param(
            {},
            {"lora": {"modulesToSave": ["pooler"]}},
            "spec.lora.modulesToSave: a model of type new has no module pooler of a known size",
            id="module-without-a-name",
        ),
    ],
)
def test_plan_of_sizes_that_cannot_be_read_says_why(
    traced: dict[str, object], blocks: dict[str, object], cause: str
) -> None:
    plan = make_plan(make_spec(**GPU | blocks), traced_model(2, **traced), (A10,))
    assert (plan.gpu_products, plan.peak_bytes) == (None, None)
    assert any(reason.startswith(f"peak memory is not estimated: {cause}") for reason in plan.reasons)


def test_run_that_does_not_fit_raises() -> None:
    with pytest.raises(
        DoesNotFitError, match=r"needs .* GiB more than the 22\.0 GiB that a process has on a NVIDIA-A10"
    ):
        make_plan(make_spec(**GPU), prepared_for("llama-2-70b"), (A10,))


@pytest.mark.parametrize(
    ("longest", "mean", "rows"),
    [
        pytest.param(212, 37.0, SequenceLengths(212, 37.0), id="as-they-are"),
        pytest.param(9000, 3000.0, SequenceLengths(2048, 2048), id="cut-at-maxLength"),
        pytest.param(212, None, SequenceLengths(212, 212), id="mean-unknown"),
        pytest.param(0, 0.0, SequenceLengths(1, 1.0), id="empty"),
    ],
)
def test_sequence_lengths(longest: int, mean: float | None, rows: SequenceLengths) -> None:
    lengths = None if mean is None else RowLengths(mean=mean, p50=1, p95=1, p99=1)
    dataset = make_prepared().dataset.model_copy(update={"longest_row_tokens": longest, "row_lengths": lengths})
    assert sequence_lengths(dataset, make_spec().training) == rows
