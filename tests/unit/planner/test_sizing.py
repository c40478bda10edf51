"""Sizing: GPUs and layouts, where the sizes of the models alone decide."""

from dataclasses import replace
from functools import cache
from math import ceil
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_planner.explain import explain_sizing
from qlora_planner.gpu_inventory import GpuPool
from qlora_planner.memory.estimate import SLACK, Layout, SequenceLengths, TrainingWorkload, as_dense, estimate_memory
from qlora_planner.models.families import read_shape
from qlora_planner.models.shapes import ModelShape, UnknownModelError
from qlora_planner.sizing import Misfit, Sizing, find_allocations, size_run
from qlora_planner.suggestions import describe_misfit, find_lossless_changes, find_lossy_changes, suggest_change
from tests.make import make_spec
from tests.unit.planner.public import load_config

GIBIBYTE = 1 << 30
FULL = {"method": "full", "quantization": {"bits": 16}}
ALL = {"targets": ["all-linear"]}


@cache
def shape_of(name: str) -> ModelShape:
    return read_shape(load_config(name))


def make_work(name: str = "llama-3.2-3b", rows: SequenceLengths | None = None, **blocks: Any) -> TrainingWorkload:
    spec = make_spec(**{"resources": {"gpusPerNode": 1}} | blocks)
    length = spec.training.max_length
    return TrainingWorkload(spec, shape_of(name), rows or SequenceLengths(length, length))


def minimum_bytes(work: TrainingWorkload) -> int:
    """Bytes of the smallest GPU that it fits on."""
    found = size_run(work, (pool(0.001),))
    assert isinstance(found, Misfit)
    return ceil(found.nearest.estimate.peak / 0.98) + 1


def pool(gibibytes: float, gpus: int = 1, nodes: int = 1, name: str = "") -> GpuPool:
    return GpuPool(name, int(gibibytes * GIBIBYTE), gpus, nodes)


def sized(work: TrainingWorkload, *pools: GpuPool, flexible: bool = False) -> Sizing:
    found = size_run(work, pools, flexible=flexible)
    assert isinstance(found, Sizing), found
    assert not found.tight
    return found


def nearest_of(work: TrainingWorkload, offer: tuple[GpuPool, ...], *, flexible: bool = False) -> Sizing:
    found = size_run(work, offer, flexible=flexible)
    assert found is not None
    return found.nearest if isinstance(found, Misfit) else found


@pytest.mark.parametrize(
    ("name", "memory", "checkpointing"),
    [
        pytest.param("smollm2-135m", 16, False, id="small-model"),
        pytest.param("llama-3.2-3b", 24, False, id="3b-on-24"),
        pytest.param("llama-3.2-3b", 8, True, id="3b-on-8"),
        pytest.param("llama-3.1-8b", 16, True, id="8b-on-a-t4"),
        pytest.param("llama-3.1-8b", 80, False, id="8b-on-80"),
        pytest.param("llama-2-70b", 80, True, id="70b-on-80"),
    ],
)
def test_checkpointing_only_if_activations_do_not_fit(name: str, memory: int, checkpointing: bool) -> None:
    assert sized(make_work(name, lora=ALL), pool(memory)).layout.checkpointing is checkpointing


def test_smallest_gpu_that_fits_is_chosen() -> None:
    offer = (pool(80, name="large"), pool(24, name="middle"), pool(6, name="small"))
    assert sized(make_work("llama-3.1-8b"), *offer).allocation.pool.product == "middle"
    assert sized(make_work("llama-2-70b"), *offer).allocation.pool.product == "large"


def test_flexible_run_takes_fewest_gpus() -> None:
    full = make_work("llama-3.2-3b", **FULL)
    eight = sized(full, pool(40, gpus=8), flexible=True)
    assert (eight.allocation.gpus_per_node, eight.layout.strategy) == (4, "zero2")
    assert sized(make_work("llama-3.2-3b"), pool(24, gpus=8), flexible=True).allocation.gpus_per_node == 1


def test_model_too_large_to_train_on_one_gpu_is_sharded() -> None:
    offer = (pool(40, gpus=8),)
    found = sized(make_work("llama-2-70b", lora=ALL), *offer, flexible=True)
    assert (found.layout.strategy, found.layout.optimizer) == ("zero3", "adamw")
    assert found.allocation.gpus_per_node > 1
    for lora in (ALL | {"modulesToSave": ["norm"]}, ALL | {"dora": True}):
        assert nearest_of(make_work("llama-2-70b", lora=lora), offer, flexible=True).layout.strategy != "zero3"


def test_base_that_no_gpu_can_load_does_not_fit() -> None:
    work, offer = make_work("llama-2-70b"), (pool(24, gpus=8),)
    found = size_run(work, offer, flexible=True)
    assert isinstance(found, Misfit)
    assert "per GPU while every process loads the full base, " in describe_misfit(work, offer, found)


def test_several_gpus_shard_only_what_does_not_fit() -> None:
    # Rules about how many GPUs a manifest may ask for are the rules' business.
    spec = make_spec(resources={"gpusPerNode": 1}, lora=ALL)
    two = spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus_per_node": 2})})
    found = sized(TrainingWorkload(two, shape_of("llama-3.1-8b"), SequenceLengths(512, 512)), pool(24, gpus=2))
    assert (found.layout.strategy, found.layout.processes) == ("ddp", 2)
    assert 16 % (found.layout.micro_batch * 2) == 0


def test_too_few_gpus_in_inventory_returns_none() -> None:
    spec = make_spec(resources={"gpusPerNode": 1})
    four = spec.model_copy(update={"resources": spec.resources.model_copy(update={"gpus_per_node": 4})})
    work = TrainingWorkload(four, shape_of("smollm2-135m"), SequenceLengths(64, 64))
    assert size_run(work, (pool(80, gpus=2),)) is None
    assert size_run(work, ()) is None


def test_gpus_do_not_exceed_global_batch() -> None:
    work = make_work(training={"globalBatchSize": 3})
    assert [room.processes for room in find_allocations(work, (pool(24, gpus=8),), flexible=True)] == [1, 2]


@pytest.mark.parametrize(
    ("training", "rows", "micro"),
    [
        pytest.param({"microBatchSize": 2}, SequenceLengths(100, 50), 2, id="given"),
        pytest.param({}, SequenceLengths(100, 50), 16, id="all-rows-at-once"),
        pytest.param({"globalBatchSize": 512}, SequenceLengths(200, 100), 32, id="a-pass-is-full"),
        pytest.param({"globalBatchSize": 7}, SequenceLengths(2048, 1024), 1, id="prime"),
        pytest.param({"maxLength": 8192}, SequenceLengths(8192, 5000), 1, id="a-row-longer-than-a-pass"),
    ],
)
def test_micro_batch(training: dict[str, int], rows: SequenceLengths, micro: int) -> None:
    assert sized(make_work("smollm2-135m", rows, training=training), pool(80)).layout.micro_batch == micro


def test_misfit_names_missing_memory_and_suggestion() -> None:
    work = make_work("llama-2-70b", lora=ALL)
    found = size_run(work, (pool(24, name="NVIDIA-A10"),))
    assert isinstance(found, Misfit)
    sentence = describe_misfit(work, (pool(24, name="NVIDIA-A10"),), found)
    needed = found.nearest.estimate.peak / GIBIBYTE
    assert sentence.startswith(f"needs {needed:.1f} GiB per GPU with micro-batch 1 and gradient checkpointing, ")
    assert f"{needed - 24 * 0.98:.1f} GiB more than the 23.5 GiB that a process has on a NVIDIA-A10; " in sentence
    assert sentence.endswith(f"it fits on a GPU with {ceil(needed / 0.98)} GiB or more")


RANK_512 = {"rank": 512, **ALL}


@pytest.mark.parametrize(
    ("before", "after", "remedy"),
    [
        pytest.param(
            {"training": {"microBatchSize": 2}}, {}, "spec.training.microBatchSize left out", id="micro-batch"
        ),
        pytest.param(
            {"quantization": {"doubleQuant": False}}, {}, "spec.quantization.doubleQuant true", id="double-quantization"
        ),
        pytest.param(
            {"lora": RANK_512},
            {"lora": RANK_512, "training": {"optimizer": "adamw8bit"}},
            "spec.training.optimizer adamw8bit",
            id="optimizer",
        ),
        pytest.param({"quantization": {"bits": 8}}, {}, "spec.quantization.bits 4 instead of 8", id="bits"),
        pytest.param(FULL, {}, "spec.method qlora and spec.quantization.bits 4 instead of 16", id="method-full"),
        pytest.param(
            {"lora": RANK_512, "training": {"optimizer": "adamw8bit"}},
            {"lora": RANK_512 | {"rank": 128}, "training": {"optimizer": "adamw8bit"}},
            "spec.lora.rank 128 instead of 512",
            id="rank",
        ),
        pytest.param(
            {"lora": {"rank": 4}, "training": {"maxLength": 4096}},
            {"lora": {"rank": 4}, "training": {"maxLength": 1024}},
            "spec.training.maxLength 1024 instead of 4096",
            id="shorter-rows",
        ),
    ],
)
def test_least_intrusive_change_is_suggested(before: dict[str, Any], after: dict[str, Any], remedy: str) -> None:
    work = make_work("llama-3.1-8b", **before)
    offer = (GpuPool("", minimum_bytes(make_work("llama-3.1-8b", **after))),)
    nearest = Misfit(nearest_of(work, offer))
    assert suggest_change(work, offer, nearest) == f"it fits with {remedy}"
    tried = [*find_lossless_changes(work, nearest), *find_lossy_changes(work)]
    place = next(number for number, change in enumerate(tried) if change.sentence == remedy)
    fits = [not nearest_of(change.work, offer).tight for change in tried[: place + 1]]
    assert fits == [*[False] * place, True]


def test_tight_fit_is_allowed_misfit_is_not() -> None:
    work = make_work("llama-3.1-8b", lora=ALL)
    smallest = nearest_of(work, (pool(0.001),)).estimate
    tight = size_run(work, (GpuPool("", ceil(smallest.minimum / 0.98) + 1),))
    assert isinstance(tight, Sizing)
    assert (tight.tight, tight.layout.micro_batch, tight.layout.checkpointing) == (True, 1, True)
    assert explain_sizing(work, tight)[-1].endswith("; tight: it fits if torch's allocator needs less than that slack")
    assert isinstance(size_run(work, (GpuPool("", int(smallest.minimum / 0.98) - 1),)), Misfit)
    roomy = size_run(work, (tight.allocation.pool, pool(80)))
    assert isinstance(roomy, Sizing)
    assert roomy.allocation.pool.memory == 80 * GIBIBYTE


def test_more_gpus_are_suggested_before_lossy_changes() -> None:
    work = make_work("llama-3.2-3b", **FULL)
    offer = (pool(40, gpus=8),)
    found = size_run(work, offer)
    assert isinstance(found, Misfit)
    assert describe_misfit(work, offer, found).endswith("it fits with spec.resources.gpusPerNode 4")


def test_suggestion_may_replace_requested_strategy() -> None:
    spec = make_work("llama-3.2-3b", **FULL).spec
    resources = spec.resources.model_copy(update={"gpus_per_node": 2})
    asked = spec.model_copy(update={"resources": resources, "distribution": "ddp"})
    work, offer = TrainingWorkload(asked, shape_of("llama-3.2-3b"), SequenceLengths(2048, 2048)), (pool(40, gpus=8),)
    found = size_run(work, offer)
    assert isinstance(found, Misfit)
    sentence = "it fits with spec.resources.gpusPerNode 4 and spec.distribution zero2"
    assert describe_misfit(work, offer, found).endswith(sentence)


@settings(deadline=None)  # other tests run beside it
@given(micro=st.integers(1, 64), longer=st.integers(1, 4096), rank=st.sampled_from([4, 16, 64]))
def test_memory_grows_with_work(micro: int, longer: int, rank: int) -> None:
    work = make_work("smollm2-135m", SequenceLengths(longer, longer), lora={"rank": rank, **ALL})
    less = estimate_memory(work, Layout(micro_batch=micro)).peak
    assert estimate_memory(work, Layout(micro_batch=micro + 1)).peak >= less
    assert estimate_memory(replace(work, rows=SequenceLengths(longer + 1, longer)), Layout(micro_batch=1)).peak >= (
        estimate_memory(work, Layout(micro_batch=1)).peak
    )
    assert estimate_memory(work, Layout(micro_batch=micro, optimizer="adamw8bit")).peak <= less


def test_zero_stage_reduces_sharded_memory_only() -> None:
    work = make_work("llama-3.1-8b", **FULL)
    unsharded, zero2, zero3 = (
        estimate_memory(work, Layout(4, strategy, 1, checkpointing=True)) for strategy in ("ddp", "zero2", "zero3")
    )
    weights = 4 * shape_of("llama-3.1-8b").parameters
    assert unsharded.optimizer == 2 * weights == 4 * zero2.optimizer == 4 * zero3.optimizer
    assert unsharded.gradients == weights == 4 * zero2.gradients
    assert unsharded.base.weights == zero2.base.weights == 4 * zero3.base.weights
    assert zero3.training < zero2.training < unsharded.training
    # Every process loads the unsharded base, and ZeRO-3 divides it afterwards.
    assert zero3.loading > weights


def test_peak_is_sum_of_parts() -> None:
    found = sized(make_work(lora=ALL), pool(24)).estimate
    parts = found.base.total + found.adapter + found.gradients + found.optimizer + found.activations
    assert found.peak == pytest.approx(parts * (1 + SLACK) + found.non_torch, abs=1)
    assert found.adapter == found.gradients == found.optimizer // 2 == 24_313_856 * 4


def test_pissa_counts_initial_matrices() -> None:
    lora = {"method": "lora", "quantization": {"bits": 16}}
    plain, pissa = (make_work(**lora, lora=block) for block in ({}, {"init": "pissa"}))
    assert estimate_memory(pissa, Layout()).adapter == 2 * estimate_memory(plain, Layout()).adapter


def test_reasons_of_sized_plan_fit_status() -> None:
    work = make_work("llama-3.1-8b", lora=ALL)
    reasons = explain_sizing(work, sized(work, GpuPool("NVIDIA-A10", 23_028 << 20, 1, 1, (8, 6))))
    assert [reason.split()[0] for reason in reasons] == [
        "1",
        "dtype",
        "attention",
        "optimizer",
        "micro-batch",
        "gradient",
        "peak",
    ]
    assert reasons[:3] == (
        "1 x NVIDIA-A10 on 1 node: as spec.resources asks",
        "dtype bfloat16: sm_86 has native bf16",
        "attention sdpa: exact with packed rows; FlashAttention, where the image has it, takes less memory",
    )
    assert max(map(len, reasons)) <= 256


def test_mixture_of_experts_is_estimated_as_dense() -> None:
    mixtral = make_work("mixtral-8x7b-v0.1", SequenceLengths(512, 512))
    fed = {linear.path: (linear.inputs, linear.outputs) for linear in as_dense(mixtral.shape).decoder.linears[4:]}
    assert fed == {"mlp.gate_proj": (4096, 28_672), "mlp.up_proj": (4096, 28_672), "mlp.down_proj": (28_672, 4096)}
    assert as_dense(shape_of("llama-3.2-3b")) is shape_of("llama-3.2-3b")
    assert sized(mixtral, pool(141)).estimate.base.weights > 90e9


def test_adapters_on_stacked_experts_raise_unknown_model() -> None:
    work = make_work("mixtral-8x7b-v0.1", lora={"dropout": 0, **ALL})
    with pytest.raises(UnknownModelError, match="stacked experts of mixtral is not known; name the projections"):
        size_run(work, (pool(141),))


def test_base_with_few_quantizable_weights_has_reason() -> None:
    mixtral = make_work("mixtral-8x7b-v0.1")
    reasons = explain_sizing(mixtral, sized(mixtral, pool(141)))
    assert any(reason.startswith("base: only 3% of its layers' weights can be stored in 4 bits") for reason in reasons)


def test_model_without_packing_support_is_padded() -> None:
    blocks = {"method": "lora", "quantization": {"bits": 16}, "lora": ALL}
    falcon, phi = (make_work(name, SequenceLengths(100, 50), **blocks) for name in ("falcon-7b", "phi-2"))
    assert (falcon.largest_batch(64).tokens, falcon.largest_batch(64).packing) == (6400, False)
    assert (phi.largest_batch(64).tokens, phi.largest_batch(64).packing) == (4000, True)


T4 = GpuPool("Tesla-T4", 15 * GIBIBYTE, 1, 1, (7, 5))
A10 = replace(T4, product="NVIDIA-A10", capability=(8, 6))


@pytest.mark.parametrize(
    ("name", "offer", "dtype"),
    [
        pytest.param("gemma-3-1b", T4, "dtype float32: sm_75 predates native bf16, and gemma3_text overflows", id="t4"),
        pytest.param("gemma-3-1b", A10, "dtype bfloat16: sm_86 has native bf16", id="a10"),
        pytest.param("smollm2-135m", T4, "dtype float16: sm_75 predates native bf16", id="llama"),
        pytest.param(
            "gemma-3-1b",
            replace(T4, capability=None),
            "dtype bfloat16 where the GPU has it (sm_80 and later), else float32, as this family overflows in float16",
            id="unknown",
        ),
    ],
)
def test_family_that_overflows_in_fp16_computes_in_fp32_where_the_gpu_has_no_bf16(name, offer, dtype):
    work = make_work(name, SequenceLengths(256, 256))
    assert any(reason.startswith(dtype) for reason in explain_sizing(work, sized(work, offer)))


def test_fp32_is_counted_where_the_gpu_has_no_bf16():
    work = make_work("gemma-3-1b", SequenceLengths(256, 256), quantization={"bits": 16})
    on_t4, on_a10 = (nearest_of(work, (offer,)).estimate.base.total for offer in (T4, A10))
    assert on_t4 == 2 * on_a10
