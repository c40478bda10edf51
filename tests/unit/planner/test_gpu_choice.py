"""Which GPU products a run may use: all that hold it and give the same result."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora_api.v1alpha1 import Plan
from qlora_planner import make_plan
from qlora_planner.gpu_choice import GpuChoice, choose_gpus
from qlora_planner.gpu_inventory import GpuPool, UnusableNodes
from qlora_planner.memory.estimate import SequenceLengths, TrainingWorkload
from qlora_planner.sizing import Misfit
from tests.make import make_spec
from tests.unit.planner.test_plan import prepared_for
from tests.unit.planner.test_sizing import FULL, shape_of

MIB = 1 << 20
T4 = GpuPool("Tesla-T4", 15_360 * MIB, 1, 1, (7, 5))
RTX_8000 = GpuPool("Quadro-RTX-8000", 49_152 * MIB, 1, 1, (7, 5))
A10 = GpuPool("NVIDIA-A10", 23_028 * MIB, 1, 1, (8, 6))
L4 = GpuPool("NVIDIA-L4", 23_034 * MIB, 1, 1, (8, 9))
A100 = GpuPool("NVIDIA-A100-SXM4-80GB", 81_920 * MIB, 8, 1, (8, 0))
SLICE = GpuPool("NVIDIA-A100-SXM4-80GB-MIG-2g.20gb", 19_968 * MIB, 3, 1, (8, 0))
SHARDED = {"resources": {"gpusPerNode": 2}, "distribution": "zero2"}


def many(pool: GpuPool, nodes: int, unready: int = 0) -> GpuPool:
    return replace(pool, nodes=nodes, unready=unready)


def work_of(model: str = "llama-3.2-3b", **blocks: Any) -> TrainingWorkload:
    spec = make_spec(**{"resources": {"gpusPerNode": 1}} | blocks)
    return TrainingWorkload(spec, shape_of(model), SequenceLengths(512, 512))


def choice_of(work: TrainingWorkload, *pools: GpuPool) -> GpuChoice:
    choice = choose_gpus(work, pools)
    assert isinstance(choice, GpuChoice), choice
    return choice


def products_of(work: TrainingWorkload, *pools: GpuPool) -> tuple[str, ...]:
    return choice_of(work, *pools).products


def plan_of(*pools: GpuPool, **blocks: Any) -> Plan:
    return make_plan(make_spec(**{"resources": {"gpusPerNode": 1}} | blocks), prepared_for(), pools)


def test_run_may_use_every_product_that_fits_and_is_sized_for_the_smallest() -> None:
    found = choice_of(work_of(), A10, L4, A100)
    assert found.products == ("NVIDIA-A10", "NVIDIA-L4", "NVIDIA-A100-SXM4-80GB")
    assert found.sizing.allocation.pool == A10
    assert found.reasons == (
        "GPUs that fit: NVIDIA-A10, NVIDIA-L4, NVIDIA-A100-SXM4-80GB; sized for NVIDIA-A10, the smallest of them",
    )


def test_product_that_is_too_small_is_left_out_with_the_reason() -> None:
    found = choice_of(work_of("llama-2-70b"), A10, many(A100, 2))
    assert found.products == ("NVIDIA-A100-SXM4-80GB",)
    assert found.reasons[0].startswith("GPUs left out: NVIDIA-A10 (")
    assert found.reasons[0].endswith(" GiB too small)")


def test_small_run_is_not_pinned_to_the_one_oldest_card() -> None:
    found = choice_of(work_of(), T4, many(A10, 400))
    assert found.products == ("NVIDIA-A10",)
    assert found.reasons == ("GPUs left out: Tesla-T4 (computes in float16, not bfloat16)",)
    assert products_of(work_of(), many(T4, 400), RTX_8000, A10) == ("Tesla-T4", "Quadro-RTX-8000")
    assert products_of(work_of(), T4, A10) == ("NVIDIA-A10",)


def test_queue_may_give_every_product_to_a_single_pod() -> None:
    queued = work_of(queue={"name": "gpus"})
    found = choice_of(queued, T4, many(A10, 4))
    assert found.products == ("NVIDIA-A10", "Tesla-T4")
    assert found.sizing.allocation.pool == T4
    assert found.reasons[1] == "the queue chooses among them; dtype float16 on Tesla-T4, else bfloat16"
    gang = work_of(queue={"name": "gpus"}, resources={"gpusPerNode": 1, "nodes": 2})
    assert products_of(gang, many(T4, 2), many(A10, 4)) == ("NVIDIA-A10",)


def test_product_of_unknown_dtype_agrees_with_no_other() -> None:
    unknown = [replace(pool, capability=None) for pool in (A10, many(L4, 3))]
    assert products_of(work_of(), *unknown) == ("NVIDIA-L4",)


def test_gpus_that_accept_no_pod_for_now_count_less_and_are_kept() -> None:
    cordoned = many(RTX_8000, 9, unready=9)
    assert products_of(work_of(), cordoned, A10) == ("NVIDIA-A10",)
    assert products_of(work_of("llama-2-70b"), A10, many(A100, 1, unready=1)) == ("NVIDIA-A100-SXM4-80GB",)


def test_pods_of_a_gang_may_share_a_node_and_mix_products_of_one_dtype() -> None:
    gang = work_of(resources={"gpusPerNode": 1, "nodes": 2})
    assert products_of(gang, A10, L4) == ("NVIDIA-A10", "NVIDIA-L4")
    assert products_of(gang, many(T4, 2), A10) == ("Tesla-T4",)
    assert products_of(gang, A100) == ("NVIDIA-A100-SXM4-80GB",)
    assert choose_gpus(gang, (A10,)) is None


def test_gang_with_too_few_gpus_waits_rather_than_land_on_small_ones() -> None:
    gang = work_of("llama-2-70b", resources={"gpusPerNode": 4, "nodes": 4}, training={"globalBatchSize": 16})
    small = replace(A10, gpus_per_node=4, nodes=8)
    assert products_of(gang, small, A100) == ("NVIDIA-A100-SXM4-80GB",)
    assert isinstance(choose_gpus(gang, (small,)), Misfit)


def test_partitions_of_a_gpu_are_for_single_processes() -> None:
    """NVIDIA/k8s-device-plugin#446: a process sees one MIG instance, so a second one would only be held."""
    two = work_of(resources={"gpusPerNode": 2})
    found = choice_of(two, SLICE, A100)
    assert found.products == ("NVIDIA-A100-SXM4-80GB",)
    assert found.reasons == (f"GPUs left out: {SLICE.product} (partitions of a GPU cannot train together)",)
    assert SLICE.product in products_of(work_of(), SLICE, A100)


def test_deepspeed_gets_no_gpu_that_computes_in_float16() -> None:
    turing = replace(RTX_8000, gpus_per_node=8, nodes=9)
    assert products_of(work_of(**SHARDED), turing, A100) == ("NVIDIA-A100-SXM4-80GB",)
    full = work_of(**FULL, resources={"gpusPerNode": 2})
    found = choose_gpus(full, (turing,))
    assert isinstance(found, Misfit) or found is None or found.sizing.layout.strategy == "ddp"


def test_queue_gets_no_gpu_that_cannot_compute_with_the_strategy() -> None:
    full = work_of(**FULL, resources={"gpusPerNode": 4}, queue={"name": "gpus"})
    ampere, turing = (
        replace(A100, product="A100-40", memory=40 << 30),
        replace(RTX_8000, gpus_per_node=4, memory=96 << 30),
    )
    assert products_of(full, turing) == ("Quadro-RTX-8000",)
    found = choice_of(full, ampere, turing)
    assert (found.sizing.layout.strategy, found.products) == ("zero2", ("A100-40",))


def test_optimizer_of_a_full_run_is_the_same_on_every_product() -> None:
    full = work_of(**FULL)
    found = choice_of(full, replace(A100, product="NVIDIA-L40S", memory=46_068 * MIB, nodes=9), A100)
    assert found.products == ("NVIDIA-L40S",)
    assert found.reasons == ("GPUs left out: NVIDIA-A100-SXM4-80GB (optimizer adamw, not adamw8bit)",)


def test_smaller_gpu_of_the_same_product_is_excluded_by_its_memory() -> None:
    small, large = (GpuPool("RTX-3060", size * MIB, 1, 2, (8, 6)) for size in (3_000, 12_288))
    found = choice_of(work_of(), small, large)
    assert (found.products, found.min_memory) == (("RTX-3060",), large.memory)
    assert choice_of(work_of(), large).min_memory is None


def test_gpu_without_product_label_is_used_by_its_memory_if_no_other_fits() -> None:
    unnamed = replace(A100, product="")
    assert (choice_of(work_of(), unnamed).products, choice_of(work_of(), unnamed).min_memory) == ((), unnamed.memory)
    assert products_of(work_of(), A10, unnamed) == ("NVIDIA-A10",)


def test_plan_names_products_and_why_others_are_left_out() -> None:
    unusable = (UnusableNodes("NVIDIA-L4", "taint team, which spec.resources.tolerations does not tolerate"),)
    plan = make_plan(make_spec(resources={"gpusPerNode": 1}), prepared_for(), (T4, many(A10, 2), A100), unusable)
    assert (plan.gpu_product, plan.gpu_products) == ("NVIDIA-A10", ("NVIDIA-A10", "NVIDIA-A100-SXM4-80GB"))
    assert (
        "GPUs left out: Tesla-T4 (computes in float16, not bfloat16), NVIDIA-L4 (taint team, which "
        "spec.resources.tolerations does not tolerate)" in plan.reasons
    )


def test_run_that_is_not_sized_says_which_gpus_it_cannot_use() -> None:
    unusable = (UnusableNodes("Tesla-T4", "time-sliced"),)
    plan = make_plan(make_spec(resources={"gpusPerNode": 1}), prepared_for(), (), unusable)
    assert plan.reasons[-1] == "GPUs left out: Tesla-T4 (time-sliced)"


def test_fleet_with_very_many_products_keeps_the_bounds_of_the_status() -> None:
    pools = [GpuPool(f"NVIDIA-{number:02}-{'x' * 50}", (24_000 + number) * MIB, 1, 1, (8, 6)) for number in range(60)]
    plan = plan_of(*pools)
    assert plan.gpu_products is not None
    assert len(plan.gpu_products) == 32
    assert Plan.model_validate(plan.model_dump()) == plan


@pytest.mark.parametrize(
    "blocks", [{}, {"queue": {"name": "gpus"}}, FULL, SHARDED], ids=["one", "queue", "full", "two"]
)
@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_every_chosen_product_holds_the_plan(blocks: dict[str, Any], data: st.DataObject) -> None:
    sizes = data.draw(st.lists(st.integers(4, 200), min_size=1, max_size=8, unique=True))
    pools = [
        GpuPool(
            data.draw(st.sampled_from([f"gpu-{size}", "twice", ""])),
            size << 30,
            data.draw(st.integers(1, 8)),
            data.draw(st.integers(1, 4)),
            data.draw(st.sampled_from([None, (7, 5), (8, 0), (9, 0)])),
        )
        for size in sizes
    ]
    work = work_of(data.draw(st.sampled_from(["llama-3.2-3b", "llama-3.1-8b", "llama-2-70b"])), **blocks)
    found = choose_gpus(work, pools)
    if not isinstance(found, GpuChoice):
        return
    check_choice(work, found, pools)


def check_choice(work: TrainingWorkload, found: GpuChoice, pools: Sequence[GpuPool]) -> None:
    estimate = found.sizing.estimate
    needed = estimate.minimum if found.sizing.tight else estimate.peak
    for pool in pools:
        labels_match = pool.product in found.products or not found.products
        enough_memory = found.min_memory is None or pool.memory >= found.min_memory
        # The scheduler places a pod only where it gets as many GPUs as it requests.
        if labels_match and enough_memory and pool.gpus_per_node >= work.spec.resources.gpus_per_node:
            assert needed <= pool.usable
    if work.spec.queue is None:
        assert len({pool.dtype(work.shape.family) for pool in found.pools}) == 1
