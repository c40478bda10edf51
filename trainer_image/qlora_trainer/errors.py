"""RunError, the exception for failures that somebody can act on, and the conversion of all others to it."""

import traceback

from qlora_api.reasons import Reason


class RunError(Exception):
    """A failure that somebody can act on: the reason says who, the message names field, cause and fix."""

    def __init__(self, reason: Reason, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.step = step


def as_run_error(error: BaseException) -> RunError:
    """Convert the exception that ended a run to a RunError; an unexpected one becomes TrainerError."""
    if isinstance(error, RunError):
        return error
    # By name, so that explaining a failure never imports torch.
    if type(error).__name__ == "OutOfMemoryError":
        return RunError(Reason.CUDA_OUT_OF_MEMORY, f"spec.training.microBatchSize or maxLength is too high: {error}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return RunError(Reason.HOST_OUT_OF_MEMORY, f"spec.resources.memory is too low: {str(error) or 'MemoryError'}")
    if _is_collective_failure(error):
        return RunError(Reason.COLLECTIVE_TIMEOUT, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    frames = traceback.extract_tb(error.__traceback__)
    location = f" ({frames[-1].name}, line {frames[-1].lineno})" if frames else ""
    return RunError(Reason.TRAINER_ERROR, f"{type(error).__name__}: {error}{location}")


def _is_collective_failure(error: BaseException) -> bool:
    """Return whether a collective operation failed: torch raises its own types, gloo names a source file of its own."""
    return type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"} or "/gloo/" in str(error)
