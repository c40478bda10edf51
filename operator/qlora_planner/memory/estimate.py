"""Estimates the peak memory of a run on one GPU: weights, trainable state, activations, communication, overhead."""

from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from typing import Final

from qlora_api.accelerators import NVIDIA, Accelerator, Capability, DeviceName
from qlora_api.optimizers import ADAMW, OptimizerName
from qlora_api.precision import compute_dtype_of
from qlora_api.strategies import SINGLE, STRATEGIES, Strategy, StrategyName
from qlora_api.units import MIB
from qlora_api.v1alpha1 import QLoRAJobSpec
from qlora_planner.memory.activations import Activations, estimate_activations, least_activations
from qlora_planner.memory.adapter import Trainable, find_trainable, ranks_of_layer
from qlora_planner.memory.forward_config import BatchShape, ForwardConfig, Kernel
from qlora_planner.memory.weights import FP32, HALF, BaseBytes, base_bytes, optimizer_bytes
from qlora_planner.models.shapes import Linear, ModelShape
from qlora_planner.models.traced import TracedShape

CONTEXT: Final = 500 * MIB
"""Bytes of a process's CUDA context, torch's and bitsandbytes' kernels in it: 0.49 GiB on an A100 (TianheWu/CoSeR#10)
and on an RTX 4090 (3DTopia/Phidias-Diffusion#8), as torch's out-of-memory messages count memory outside of torch."""
WORKSPACE: Final = 32 * MIB
"""Bytes of cuBLAS workspace on sm_90 (pytorch#182669); 8 MiB elsewhere."""
NCCL: Final = 688 * MIB
"""Bytes of NCCL's buffers for more than two GPUs with NVLink, the largest of its default settings (nccl#964)."""
SLACK: Final = 0.07
"""What torch's caching allocator holds beyond allocated tensors, as a share of these: 7.0 % on one GPU, 5.4 %
with data parallelism and 6.9 % with FSDP in AgileRL's calibration."""
BUCKET: Final = 50_000_000 * FP32
"""Bytes of DeepSpeed's gradient bucket, whose size qlora_api.launcher_config sets."""
MAX_LIVE_PARAMETERS: Final = 1_000_000_000
"""Parameters that ZeRO-3 keeps gathered at most (DeepSpeed 0.19: stage3_max_live_parameters)."""
PACK_TOKENS: Final = 4096
"""Longest packed sequence in tokens, unless one row is longer: qlora_trainer.data.batching.PACK_TOKENS."""


@dataclass(frozen=True)
class SequenceLengths:
    """Lengths of the rows in tokens, after truncation."""

    longest: int
    mean: float


@dataclass(frozen=True)
class Layout:
    """How a run is distributed over its processes, and how each computes a step."""

    processes: int = 1
    strategy: StrategyName = SINGLE.name
    micro_batch: int = 1
    checkpointing: bool = False
    optimizer: OptimizerName = ADAMW.name

    @property
    def sharing(self) -> Strategy:
        """Return the strategy with what it shards."""
        return STRATEGIES[self.strategy]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest GPU."""

    base: BaseBytes
    """Base weights of one process."""
    adapter: int
    """Trainable weights besides the base in fp32, and ZeRO-2's copy of them."""
    gradients: int
    optimizer: int
    activations: int
    """At the peak of forward and backward: saved tensors, logits, dequantized matrices."""
    communication: int
    """Gathered weights and reduced gradients of several processes."""
    loading: int
    """The base while it is loaded, before it is sharded."""
    non_torch: int
    """Memory outside of torch's allocator: CUDA context and NCCL."""

    @property
    def training(self) -> int:
        """Return the bytes of all tensors during a step."""
        return sum(
            (self.base.total, self.adapter, self.gradients, self.optimizer, self.activations, self.communication)
        )

    @property
    def loads_more_than_it_trains(self) -> bool:
        """Return whether the peak is reached while the base is loaded."""
        return self.loading > self.training

    @property
    def allocated(self) -> int:
        """Return the peak bytes of all tensors."""
        return max(self.loading, self.training)

    @property
    def minimum(self) -> int:
        """Return the bytes that a GPU needs at least, without allocator overhead."""
        return self.allocated + self.non_torch

    @property
    def peak(self) -> int:
        """Return the bytes that a GPU needs, with the usual allocator overhead."""
        return ceil(self.allocated * (1 + SLACK)) + self.non_torch if self.non_torch else self.allocated


@dataclass(frozen=True)
class TrainingWorkload:
    """Everything about a run that its memory depends on: spec, model and rows."""

    spec: QLoRAJobSpec
    shape: ModelShape | TracedShape
    rows: SequenceLengths
    device: DeviceName = NVIDIA.device
    fp32: bool = False
    """Whether a GPU computes in fp32: one without bf16, if the family overflows in fp16."""

    def on(self, accelerator: Accelerator, capability: Capability | None) -> "TrainingWorkload":
        """Return the run on GPUs of this compute capability; if it is not known, they have bf16."""
        fp32 = compute_dtype_of(accelerator, capability, self.shape.family) == "float32"
        return self if fp32 == self.fp32 else replace(self, fp32=fp32)

    @property
    def full_finetune(self) -> bool:
        """Return whether all weights are trained (method full)."""
        return self.spec.method == "full"

    @property
    def width(self) -> int:
        """Return the bytes per unquantized weight."""
        return FP32 if self.full_finetune else self.compute_width

    @property
    def compute_width(self) -> int:
        """Return the bytes per activation; on a CPU the worst case, fp32, where it has no bf16."""
        return FP32 if self.fp32 or self.device == "cpu" else HALF

    @property
    def attention(self) -> Kernel:
        """Return the attention kernel that the trainer uses without FlashAttention."""
        return "eager" if isinstance(self.shape, ModelShape) and self.shape.attention.softcapped else "sdpa"

    @property
    def knows_activations(self) -> bool:
        """Return whether activations are estimated; if not, a lower bound takes their place."""
        return isinstance(self.shape, ModelShape)

    @cached_property
    def trainable(self) -> Trainable:
        """Return the trainable weights."""
        return find_trainable(self.shape, self.spec)

    @cached_property
    def base(self) -> BaseBytes:
        """Return the bytes of the unsharded base."""
        return base_bytes(self.shape, self.spec.quantization, self.width)

    @cached_property
    def ranks(self) -> dict[str, int]:
        """Return the adapter ranks of a layer, by module path."""
        if self.full_finetune or not isinstance(self.shape, ModelShape):
            return {}
        return ranks_of_layer(self.shape, self.spec.lora)

    def largest_batch(self, micro_batch: int) -> BatchShape:
        """Return the largest forward pass that the rows can fill."""
        supported = not isinstance(self.shape, ModelShape) or self.shape.supports_packing
        packing, longest = self.spec.training.packing and supported, self.rows.longest
        rows_that_fit = max(PACK_TOKENS, longest) // longest if packing else micro_batch
        rows = min(micro_batch, rows_that_fit)
        # Whichever tokens are labels, some row may consist almost entirely of them.
        return BatchShape(rows, longest, rows * longest, rows * longest, packing, equal_length=True)

    @cached_property
    def _activation_cache(self) -> dict[tuple[int, bool], Activations]:
        """Estimates by micro-batch and checkpointing; they do not depend on GPU or strategy."""
        return {}

    def activations(self, micro_batch: int, *, checkpointing: bool) -> Activations:
        """Return the activations of a forward and a backward pass."""
        key = (micro_batch, checkpointing)
        if key not in self._activation_cache:
            self._activation_cache[key] = self._estimate_activations(self._forward_config(*key))
        return self._activation_cache[key]

    def _estimate_activations(self, config: ForwardConfig) -> Activations:
        if isinstance(self.shape, ModelShape):
            return estimate_activations(as_dense(self.shape), config)
        return least_activations(self.shape, config)

    def _forward_config(self, micro_batch: int, checkpointing: bool) -> ForwardConfig:
        lora = self.spec.lora
        return ForwardConfig(
            batch=self.largest_batch(micro_batch),
            device=self.device,
            attention=self.attention,
            compute=self.compute_width,
            bits=self.spec.quantization.bits,
            ranks=self.ranks,
            dropout=lora.dropout > 0 and not self.full_finetune,
            dora=lora.dora and not self.full_finetune,
            full_finetune=self.full_finetune,
            checkpointing=checkpointing,
            neftune=self.spec.training.neftune_alpha > 0,
        )


def as_dense(shape: ModelShape) -> ModelShape:
    """Return a mixture of experts as a dense model whose MLP is as wide as the experts of one token.

    Its tensors are about that large; copies of the experts' inputs and router scores are not counted, and none of it
    was measured.
    """
    mlp, hidden = shape.mlp, shape.hidden
    if mlp.experts == 1:
        return shape
    width = mlp.experts_per_token * mlp.intermediate
    projections = (("gate_proj", hidden, width), ("up_proj", hidden, width), ("down_proj", width, hidden))
    mlp_linears = tuple(
        Linear(f"mlp.{name}", inputs, outputs, quantizable=False) for name, inputs, outputs in projections
    )
    decoder = replace(shape.decoder, linears=(*shape.decoder.linears, *mlp_linears), stacked=())
    return replace(shape, decoder=decoder, mlp=replace(mlp, intermediate=width, experts=1, experts_per_token=1))


def estimate_memory(work: TrainingWorkload, layout: Layout) -> MemoryEstimate:
    """Return the memory of the fullest GPU at its peak.

    Args:
        work: The run.
        layout: How it is distributed, with the micro-batch.

    """
    trainable_bytes = work.trainable.parameters * FP32
    optimizer_shards = layout.processes if layout.sharing.shards_optimizer else 1
    weight_shards = layout.processes if layout.sharing.shards_weights else 1
    base = BaseBytes(ceil(work.base.weights / weight_shards), work.base.constants)
    return MemoryEstimate(
        base=base,
        adapter=_adapter_bytes(work, layout, trainable_bytes),
        gradients=ceil(trainable_bytes / optimizer_shards),
        optimizer=ceil(optimizer_bytes(work.trainable, layout.optimizer) / optimizer_shards),
        activations=work.activations(layout.micro_batch, checkpointing=layout.checkpointing).peak,
        communication=_communication_bytes(work, layout, trainable_bytes),
        loading=_loading_bytes(work),
        non_torch=_non_torch_bytes(work, layout),
    )


def _loading_bytes(work: TrainingWorkload) -> int:
    """Return the bytes while loading: the full base, which ZeRO-3 shards only later, and its largest tensor again."""
    return work.base.total + max(work.shape.embedding.parameters, work.shape.head.weights) * work.width


def _adapter_bytes(work: TrainingWorkload, layout: Layout, trainable_bytes: int) -> int:
    """Return the bytes of trainable weights besides the base; with method full, there are none."""
    weights = (
        0 if work.full_finetune else ceil(trainable_bytes / (layout.processes if layout.sharing.shards_weights else 1))
    )
    # ZeRO-2 steps on a flat copy of its shard; ZeRO-3 on the shards themselves, which are fp32 already.
    copies = layout.sharing.shards_optimizer and not layout.sharing.shards_weights
    copy = ceil(trainable_bytes / layout.processes) if copies else 0
    # PiSSA's initial matrices are kept besides the trainable ones, since they were subtracted from the base.
    initial_matrices = (
        sum(work.trainable.matrices) * FP32 if work.spec.lora.init == "pissa" and not work.full_finetune else 0
    )
    return weights + copy + initial_matrices


def _communication_bytes(work: TrainingWorkload, layout: Layout, trainable_bytes: int) -> int:
    """Return the bytes of communication buffers: one flat tensor of all gradients, or DeepSpeed's buckets."""
    if layout.processes == 1:
        return 0
    if not layout.sharing.shards_optimizer:
        return trainable_bytes
    if not layout.sharing.shards_weights:
        return BUCKET
    shape = work.shape
    largest = max(shape.embedding.parameters, shape.head.weights) * work.width
    mean = work.base.weights / shape.parameters
    return BUCKET + largest + min(work.base.weights, ceil(MAX_LIVE_PARAMETERS * mean))


def _non_torch_bytes(work: TrainingWorkload, layout: Layout) -> int:
    if work.device == "cpu":
        return 0
    return CONTEXT + WORKSPACE + (NCCL if layout.processes > 1 else 0)
