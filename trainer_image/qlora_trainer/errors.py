"""RunError, the exception for failures that somebody can act on, StopRequested, and the conversion of all others."""

import traceback
from typing import Final

from qlora_api.reasons import Reason

_OUT_OF_GPU_MEMORY: Final = (
    "cuda error: out of memory",
    "cuda out of memory",
    "cublas_status_alloc_failed",
    "cublas_status_not_initialized",
    "cudnn_status_alloc_failed",
    "cusparse_status_alloc_failed",
    "cuda failure 2 ",
    "cuda failure 'out of memory'",
    "cudaerrormemoryallocation",
)
"""What CUDA, its libraries and NCCL say where torch raises no OutOfMemoryError; error 2 is cudaErrorMemoryAllocation,
and cuBLAS is not initialized where its workspace does not fit (pytorch#109420)."""
_GPU_FAILURES: Final = (
    "uncorrectable",
    "nvrm: xid",
    "row remapping failure",
    "unspecified launch failure",
    "hardware stack error",
    "device(s) is/are busy or unavailable",
    "gpu is lost",
    "gpu has fallen off the bus",
    "nvml_error_gpu_is_lost",
    "cuda error: unknown error",
    "cuda error: initialization error",
    "cuda driver initialization failed",
    "cuda unknown error",
    "the launch timed out and was terminated",
    "system not yet initialized",
)
"""CUDA's messages about a fault of one GPU or node, which other GPUs do not have (CUDA runtime API, cudaError_t)."""


class RunError(Exception):
    """A failure that somebody can act on: the reason says who, the message names field, cause and fix."""

    def __init__(self, reason: Reason, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.step = step


class StopRequested(BaseException):
    """SIGTERM outside a step.

    No Exception, so that code that skips what fails does not skip a checkpoint, and libraries do not carry on.
    """


def interrupted_error(step: int | None = None) -> RunError:
    """Return the error of a run that ends because a stop was requested."""
    return RunError(Reason.INTERRUPTED, "the pod was terminated (SIGTERM) before the run was published", step)


def as_run_error(error: BaseException) -> RunError:
    """Convert the exception that ended a run to a RunError; an unexpected one becomes TrainerError."""
    if isinstance(error, RunError):
        return error
    said = str(error).lower()
    # By name, so that explaining a failure never imports torch.
    if type(error).__name__ == "OutOfMemoryError" or any(words in said for words in _OUT_OF_GPU_MEMORY):
        return RunError(Reason.CUDA_OUT_OF_MEMORY, f"spec.training.microBatchSize or maxLength is too high: {error}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return RunError(Reason.HOST_OUT_OF_MEMORY, f"spec.resources.memory is too low: {str(error) or 'MemoryError'}")
    if any(words in said for words in _GPU_FAILURES):
        return RunError(Reason.ACCELERATOR_FAILED, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    if _is_collective_failure(error):
        return RunError(Reason.COLLECTIVE_TIMEOUT, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return RunError(Reason.TRAINER_ERROR, f"{type(error).__name__}: {error}{location}")


def _is_collective_failure(error: BaseException) -> bool:
    """Return whether a collective operation failed: torch raises its own types, gloo names a source file of its own."""
    return type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"} or "/gloo/" in str(error)
