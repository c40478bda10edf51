"""The peak of a run's memory on one GPU: weights and what learns, activations, communication, context, slack."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Final

from qlora_api.accelerators import NVIDIA, DeviceName
from qlora_api.optimizers import ADAMW, OptimizerName
from qlora_api.strategies import SINGLE, STRATEGIES, Strategy, StrategyName
from qlora_api.units import MIB
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.memory.activations import Activations, estimate_activations
from qlora_planner.memory.adapter import Trainable, find_trainable, ranks_of_layer
from qlora_planner.memory.forward_config import BatchShape, ForwardConfig, Kernel
from qlora_planner.memory.weights import FP32, HALF, BaseBytes, base_bytes, optimizer_bytes
from qlora_planner.models.shapes import Linear, ModelShape

CONTEXT: Final = 500 * MIB
"""Bytes of a process's CUDA context, torch's and bitsandbytes' kernels in it: 0.49 GiB on an A100 (TianheWu/CoSeR#10)
and on an RTX 4090 (3DTopia/Phidias-Diffusion#8), as torch's messages count what is not its own."""
WORKSPACE: Final = 32 * MIB
"""Bytes that cuBLAS works in on sm_90 (pytorch#182669); elsewhere it is 8."""
NCCL: Final = 688 * MIB
"""Bytes of NCCL's buffers between more than two GPUs with NVLink, the most of its default settings (nccl#964)."""
SLACK: Final = 0.07
"""Of what is allocated, what torch's allocator holds beyond it: 7.0 % on one GPU, 5.4 % with data parallelism and
6.9 % with FSDP in AgileRL's calibration."""
BUCKET: Final = 50_000_000 * FP32
"""Bytes in which DeepSpeed collects gradients: qlora_api.launcher_config sets so many numbers."""
LIVE: Final = 1_000_000_000
"""Numbers that ZeRO-3 keeps collected at most (DeepSpeed 0.19: stage3_max_live_parameters)."""
PACK_TOKENS: Final = 4096
"""Tokens joined into one sequence at most, unless one row is longer: qlora_trainer.data.batching.PACK_TOKENS."""


@dataclass(frozen=True)
class SequenceLengths:
    """How long the rows are, in tokens, as they are trained on."""

    longest: int
    mean: float


@dataclass(frozen=True)
class Layout:
    """How a run is laid out over its processes."""

    processes: int = 1
    strategy: StrategyName = SINGLE.name
    micro_batch: int = 1
    checkpointing: bool = False
    optimizer: OptimizerName = ADAMW.name

    @property
    def sharing(self) -> Strategy:
        """Return what the strategy divides."""
        return STRATEGIES[self.strategy]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest GPU."""

    base: BaseBytes
    """Of one process's share."""
    adapter: int
    """What learns beside the base, in fp32, and ZeRO-2's copy of it."""
    gradients: int
    optimizer: int
    activations: int
    """At the peak of forward and backward: kept tensors, logits, dequantised matrices."""
    communication: int
    """Gradients or weights of several processes, gathered or added up."""
    loading: int
    """The base while it is loaded, before anything is divided."""
    non_torch: int
    """What torch's allocator does not know: context and NCCL."""

    @property
    def training(self) -> int:
        """Return what tensors take while a step is taken."""
        return sum(
            (self.base.total, self.adapter, self.gradients, self.optimizer, self.activations, self.communication)
        )

    @property
    def loads_more_than_it_trains(self) -> bool:
        """Return whether the peak is before the first step."""
        return self.loading > self.training

    @property
    def allocated(self) -> int:
        """Return the most that tensors take at any time."""
        return max(self.loading, self.training)

    @property
    def minimum(self) -> int:
        """Return what the GPU must have if torch's allocator wastes nothing."""
        return self.allocated + self.non_torch

    @property
    def peak(self) -> int:
        """Return what the GPU should have."""
        return ceil(self.allocated * (1 + SLACK)) + self.non_torch if self.non_torch else self.allocated


@dataclass(frozen=True)
class TrainingWorkload:
    """A model, what a spec makes of it, and the rows."""

    spec: QLoRAJobSpec
    shape: ModelShape
    rows: SequenceLengths
    device: DeviceName = NVIDIA.device

    @property
    def full_finetune(self) -> bool:
        """Return whether the model itself is trained."""
        return self.spec.method == "full"

    @property
    def width(self) -> int:
        """Return the bytes of a weight that is not quantised; on a CPU without bf16, which is the worse case, 4."""
        return FP32 if self.full_finetune or self.device == "cpu" else HALF

    @property
    def attention(self) -> Kernel:
        """Return the kernel that the trainer takes where FlashAttention is not installed."""
        return "eager" if self.shape.attention.softcapped else "sdpa"

    @cached_property
    def trainable(self) -> Trainable:
        """Return what learns."""
        return find_trainable(self.shape, self.spec)

    @cached_property
    def base(self) -> BaseBytes:
        """Return the base as one device holds it."""
        return base_bytes(self.shape, self.spec.quantization, self.width)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Return the ranks of a layer's adapters."""
        return {} if self.full_finetune else ranks_of_layer(self.shape, self.spec.lora)

    def largest_batch(self, micro_batch: int) -> BatchShape:
        """Return the longest pass that the rows can make."""
        packing, longest = self.spec.training.packing and self.shape.supports_packing, self.rows.longest
        most = max(PACK_TOKENS, longest) // longest if packing else micro_batch
        rows = min(micro_batch, most)
        # Whatever the loss is taken of, some row may be nearly all answer.
        return BatchShape(rows, longest, rows * longest, rows * longest, packing, equal_length=True)

    @cached_property
    def _activation_cache(self) -> dict[tuple[int, bool], Activations]:
        """What was estimated: GPUs and strategies differ in other things."""
        return {}

    def activations(self, micro_batch: int, *, checkpointing: bool) -> Activations:
        """Return what a forward and a backward pass take."""
        key = (micro_batch, checkpointing)
        if key not in self._activation_cache:
            self._activation_cache[key] = estimate_activations(as_dense(self.shape), self._forward_config(*key))
        return self._activation_cache[key]

    def _forward_config(self, micro_batch: int, checkpointing: bool) -> ForwardConfig:
        lora = self.spec.lora
        return ForwardConfig(
            batch=self.largest_batch(micro_batch),
            device=self.device,
            attention=self.attention,
            compute=FP32 if self.device == "cpu" else HALF,
            bits=self.spec.quantization.bits,
            ranks=self.ranks,
            dropout=lora.dropout > 0 and not self.full_finetune,
            dora=lora.dora and not self.full_finetune,
            full_finetune=self.full_finetune,
            checkpointing=checkpointing,
            neftune=self.spec.training.neftune_alpha > 0,
        )


def as_dense(shape: ModelShape) -> ModelShape:
    """Return a mixture of experts as a model whose MLP is as wide as the experts that a token goes through.

    That is what its tensors are as large as; copies of the experts' inputs and the router's scores are not counted, and
    nothing of it was measured.
    """
    mlp, hidden = shape.mlp, shape.hidden
    if mlp.experts == 1:
        return shape
    width = mlp.experts_per_token * mlp.intermediate
    sides = (("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden))
    fed = tuple(Linear(f"mlp.{name}", inputs, outputs, quantizable=False) for name, inputs, outputs in sides)
    decoder = replace(shape.decoder, linears=(*shape.decoder.linears, *fed), stacked=())
    return replace(shape, decoder=decoder, mlp=replace(mlp, intermediate=width, experts=1, experts_per_token=1))


def estimate_memory(work: TrainingWorkload, layout: Layout) -> MemoryEstimate:
    """Return what the fullest GPU holds at its peak."""
    learned = work.trainable.parameters * FP32
    parts = layout.processes if layout.sharing.shards_optimizer else 1
    weights_parts = layout.processes if layout.sharing.shards_weights else 1
    base = BaseBytes(ceil(work.base.weights / weights_parts), work.base.constants)
    return MemoryEstimate(
        base=base,
        adapter=_adapter_bytes(work, layout, learned),
        gradients=ceil(learned / parts),
        optimizer=ceil(optimizer_bytes(work.trainable, layout.optimizer) / parts),
        activations=work.activations(layout.micro_batch, checkpointing=layout.checkpointing).peak,
        communication=_communication_bytes(work, layout, learned),
        loading=_loading_bytes(work),
        non_torch=_non_torch_bytes(work, layout),
    )


def _loading_bytes(work: TrainingWorkload) -> int:
    """Return the whole base, which every process loads and ZeRO-3 divides afterwards, with its largest tensor twice."""
    return work.base.total + max(work.shape.embedding.parameters, work.shape.head.weights) * work.width


def _adapter_bytes(work: TrainingWorkload, layout: Layout, learned: int) -> int:
    """Return the weights that learn beside the base; with method full they are the base."""
    own = 0 if work.full_finetune else ceil(learned / (layout.processes if layout.sharing.shards_weights else 1))
    # ZeRO-2 steps on a flat copy of its part; ZeRO-3 on the parts themselves, which are fp32 already.
    copies = layout.sharing.shards_optimizer and not layout.sharing.shards_weights
    copy = ceil(learned / layout.processes) if copies else 0
    # PiSSA's first matrices stay beside the ones that learn, since the base is without them.
    start = sum(work.trainable.matrices) * FP32 if work.spec.lora.init == "pissa" and not work.full_finetune else 0
    return own + copy + start


def _communication_bytes(work: TrainingWorkload, layout: Layout, learned: int) -> int:
    """Return what processes exchange at once: one flat tensor of all gradients, or DeepSpeed's buckets."""
    if layout.processes == 1:
        return 0
    if not layout.sharing.shards_optimizer:
        return learned
    if not layout.sharing.shards_weights:
        return BUCKET
    shape = work.shape
    largest = max(shape.embedding.parameters, shape.head.weights) * work.width
    mean = work.base.weights / shape.parameters
    return BUCKET + largest + min(work.base.weights, ceil(LIVE * mean))


def _non_torch_bytes(work: TrainingWorkload, layout: Layout) -> int:
    if work.device == "cpu":
        return 0
    return CONTEXT + WORKSPACE + (NCCL if layout.processes > 1 else 0)
