"""The one exception for what somebody can act on, and how everything else is told from it."""

import traceback

from qlora_api.reasons import Reason


class RunError(Exception):
    """Somebody must act: the reason says who, the message names the field, the cause and the remedy."""

    def __init__(self, reason: Reason, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.message = message
        self.step = step


def as_run_error(error: BaseException) -> RunError:
    """Turn whatever ended a run into a RunError; what nobody foresaw becomes TrainerError."""
    if isinstance(error, RunError):
        return error
    # By name, so that explaining a failure never imports torch.
    if type(error).__name__ == "OutOfMemoryError":
        return RunError(Reason.CUDA_OUT_OF_MEMORY, f"spec.training.microBatchSize or maxLength is too high: {error}")
    if isinstance(error, MemoryError) or "DefaultCPUAllocator" in str(error):
        return RunError(Reason.HOST_OUT_OF_MEMORY, f"spec.resources.memory is too low: {str(error) or 'MemoryError'}")
    if _is_collective_failure(error):
        return RunError(Reason.COLLECTIVE_TIMEOUT, f"{type(error).__name__}: {str(error).splitlines()[0]}")
    where = traceback.extract_tb(error.__traceback__)
    place = f" ({where[-1].name}, line {where[-1].lineno})" if where else ""
    return RunError(Reason.TRAINER_ERROR, f"{type(error).__name__}: {error}{place}")


def _is_collective_failure(error: BaseException) -> bool:
    """Return whether a process waited in vain for others: torch says so by its type, gloo by a line of its source."""
    return type(error).__name__ in {"DistBackendError", "DistNetworkError", "DistStoreError"} or "/gloo/" in str(error)
