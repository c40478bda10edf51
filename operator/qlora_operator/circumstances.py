"""What the reference tells of each reason beyond its guidance: when it is met, what lies behind it, what follows."""

from enum import StrEnum
from typing import Final, NamedTuple

from qlora_api.names import UNTROUBLED, Reason
from qlora_operator.recovery.preparation import PREPARE_PAUSE
from qlora_operator.recovery.retries import DISRUPTIONS, MOST_ATTEMPTS, REMEDIES, REMEDY_SENTENCES, Remedy
from qlora_operator.recovery.training import MAX_LOST_ATTEMPTS
from qlora_operator.values import PREPARE_DEADLINE, PREPARE_MEMORY


class Moment(StrEnum):
    """When a reason is met."""

    MANIFEST = "Before any pod is made"
    PREPARATION = "In the preparation"
    PLANNING = "Between preparation and training"
    WAITING = "While the pod has no node"
    STARTING = "While the pod starts on its node"
    TRAINING = "In a training attempt"
    OVER = "At the end"


MOMENTS: Final = {
    Moment.MANIFEST: "no GPU is held. See `qlora status NAME`; `qlora validate FILE` needs no cluster.",
    Moment.PREPARATION: "no GPU is held, since the prepare pod asks for none. See `qlora logs NAME --attempt 0`.",
    Moment.PLANNING: "no GPU is held. See `qlora status NAME`.",
    Moment.WAITING: "no GPU is held. See `qlora events NAME`.",
    Moment.STARTING: "a training pod holds its GPUs, for `spec.deadlines.startup` at most. See `qlora events NAME`.",
    Moment.TRAINING: "its GPUs are held until its pods end; between attempts none is held. See `qlora logs NAME`.",
    Moment.OVER: "no GPU is held any more. See `qlora status NAME`.",
}
"""What becomes of GPUs, and where to look; the message of the status is everywhere the first thing to read."""


class Circumstances(NamedTuple):
    """When a reason is met, and what usually lies behind it."""

    moments: tuple[Moment, ...]
    behind: str


_BEFORE: Final = (Moment.PREPARATION,)
_DURING: Final = (Moment.TRAINING,)
_EITHER: Final = (Moment.PREPARATION, Moment.TRAINING)
_SERVICE: Final = (
    "The endpoint is wrong or down, or a NetworkPolicy, a proxy or DNS is in the way. The message has the address."
)

CIRCUMSTANCES: Final[dict[Reason, Circumstances]] = {
    Reason.ACCEPTED: Circumstances(
        (Moment.MANIFEST,), "It stays so while children of an earlier QLoRAJob of the same name are being deleted."
    ),
    Reason.PREPARING: Circumstances(
        _BEFORE,
        "The model is resolved to a commit, each row of the dataset is checked, tokens are counted, and a file is "
        "written to the output. The message says when the pod itself does not start.",
    ),
    Reason.PREPARED: Circumstances(
        (Moment.PLANNING,),
        "What was found is in `status.model` and `status.dataset`, what follows from it in `status.plan`.",
    ),
    Reason.SCHEDULING: Circumstances(
        (Moment.WAITING, Moment.STARTING), "The message says which of them it waits for, and on which node."
    ),
    Reason.QUEUED: Circumstances(
        (Moment.WAITING,),
        "Kueue starts the Job when the LocalQueue that `spec.queue.name` names has room. Without Kueue in the cluster "
        "it waits for ever.",
    ),
    Reason.SUSPENDED_BY_USER: Circumstances(
        _EITHER, "An attempt under way finishes its step, writes a checkpoint and ends."
    ),
    Reason.UNSCHEDULABLE: Circumstances(
        (Moment.WAITING,),
        "All GPUs are in use, no node has what `spec.resources.gpuProduct` or `nodeSelector` asks for, a taint has no "
        "toleration, or the nodes are too small for `gpusPerNode`, `cpu` or `memory`.",
    ),
    Reason.TRAINING: Circumstances(
        _DURING, "`kubectl get qlj NAME --output wide` has step, loss and speed, `qlora status --watch NAME` a curve."
    ),
    Reason.EVALUATING: Circumstances(
        _DURING,
        "The base is examined before the training and the adapter after it; with `spec.training.evaluateEvery` there "
        "are looks in between.",
    ),
    Reason.PUBLISHING: Circumstances(
        _DURING, "The adapter is loaded in a fresh process, and has to have the loss there that it had in training."
    ),
    Reason.PUBLISHED: Circumstances(
        (Moment.OVER,), "`status.output` has adapter and report, `status.evaluation` the comparison with the base."
    ),
    Reason.ALREADY_PUBLISHED: Circumstances(
        (Moment.OVER,),
        "A result is named by all that decides it, and the preparation found that name with a complete manifest.",
    ),
    Reason.INVALID_SPEC: Circumstances(
        (Moment.MANIFEST, Moment.PREPARATION, Moment.TRAINING),
        "Most mistakes are refused when the manifest is applied. What is left shows later: an output's bucket or an "
        "evaluation task that does not exist, a child's name that another object has, a strategy or a full training "
        "that the GPU is not made for.",
    ),
    Reason.SECRET_NOT_FOUND: Circumstances(
        _EITHER,
        "It is missing, lies in another namespace, or its keys have other names. The operator reads no Secret: the pod "
        "that was to have it says so.",
    ),
    Reason.MODEL_NOT_FOUND: Circumstances(
        _EITHER, "A misspelt name or revision, or a mirror or bucket that does not have the model."
    ),
    Reason.GATED_MODEL_NO_ACCESS: Circumstances(
        _EITHER,
        "The licence was not accepted by the token's account, the token has expired or may not read, or the repository "
        "is private or missing: the hub does not tell these apart.",
    ),
    Reason.UNSAFE_MODEL_FORMAT: Circumstances(
        _BEFORE, "There are only `.bin` or `.pt` files where `.safetensors` are looked for; no setting loads them."
    ),
    Reason.MODEL_UNSUPPORTED: Circumstances(
        _EITHER,
        "An architecture that transformers does not know without code of the repository, a tokenizer without an "
        "end-of-text token or chat template, `spec.lora.targets` that no module has, or a quantisation that the model "
        "cannot take.",
    ),
    Reason.DOES_NOT_FIT: Circumstances(
        (Moment.PLANNING,),
        "The peak is computed from the shapes of the model and the lengths of the rows; [`qlora plan`](../plan.md) "
        "tells the same offline, part by part.",
    ),
    Reason.DATASET_NOT_FOUND: Circumstances(
        _EITHER, "The bucket, the object or the file does not exist, or no data file lies below the prefix."
    ),
    Reason.DATASET_INVALID: Circumstances(
        _BEFORE,
        "All rows are read before a GPU is asked for. A field is missing or has another type, a chat has its turns in "
        "a wrong order, or the file is not what its name says ([data](../data.md)).",
    ),
    Reason.DATASET_EMPTY: Circumstances(
        _BEFORE,
        "A file has no rows, all rows are longer than `spec.training.maxLength`, or all that could be learned from are "
        "held out.",
    ),
    Reason.S3_DENIED: Circumstances(
        _EITHER,
        "Wrong or missing keys, or a policy that allows too little. In a training it means that they were changed or "
        "have expired since the preparation.",
    ),
    Reason.OUTPUT_EXISTS: Circumstances(
        _BEFORE, "The preparation found the name of this result with a complete manifest."
    ),
    Reason.NON_FINITE_LOSS: Circumstances(
        _DURING,
        "At step 0 the base itself is broken, or its weights overflow in the dtype; later the learning rate is too "
        "high, or a row is unlike all others.",
    ),
    Reason.GATE_FAILED: Circumstances(
        _DURING, "The training is complete, and its adapter and report are kept; see [gate](../results.md#gate)."
    ),
    Reason.LOSS_DIVERGED: Circumstances(
        _DURING, "The message has the level before and the loss now. Checkpoints from before the rise are kept."
    ),
    Reason.CUDA_OUT_OF_MEMORY: Circumstances(
        _DURING,
        "The prediction was too low, or something else uses the GPU. Micro-batches are halved down to one row, then "
        "activations are recomputed; when nothing is left to shrink, the run ends.",
    ),
    Reason.HOST_OUT_OF_MEMORY: Circumstances(
        _EITHER,
        f"On a CPU another attempt may mend it. With a GPU none is made: there the container's memory holds the rows, "
        f"and the model while it is loaded. The prepare pod has {PREPARE_MEMORY}, and is not made again.",
    ),
    Reason.DEADLINE_EXCEEDED: Circumstances(
        _EITHER,
        f"`spec.deadlines.total` bounds all attempts together, from the start of each one's container; a preparation "
        f"has {PREPARE_DEADLINE.total_seconds() / 3600:g} hour.",
    ),
    Reason.STARTUP_DEADLINE_EXCEEDED: Circumstances(
        (Moment.STARTING,),
        "A volume that is not there or cannot be attached, a node that is not well, or, with several nodes, pods that "
        "wait in vain for the others.",
    ),
    Reason.RETRIES_EXHAUSTED: Circumstances(
        _DURING,
        f"`status.attempts` has the reason, the node and the message of each. Disruptions do not count, but "
        f"{MOST_ATTEMPTS} attempts of any kind are the most.",
    ),
    Reason.IMAGE_PULL_FAILED: Circumstances(
        (Moment.STARTING,),
        "The kubelet tries again meanwhile. When `spec.deadlines.startup` is over, the run ends and the node is free.",
    ),
    Reason.POD_REJECTED: Circumstances(
        (Moment.MANIFEST, Moment.WAITING, Moment.STARTING),
        "A ResourceQuota, an admission policy or Pod Security refused the pod, or the kubelet could not start its "
        "container.",
    ),
    Reason.ACCELERATOR_MISSING: Circumstances(
        _DURING, "torch finds no CUDA device: the driver or the device plugin is broken, or the hardware was changed."
    ),
    Reason.S3_UNAVAILABLE: Circumstances(_EITHER, _SERVICE),
    Reason.HUB_UNAVAILABLE: Circumstances(_EITHER, _SERVICE),
    Reason.HUB_RATE_LIMITED: Circumstances(
        _EITHER, "Many runs ask anonymously from one address. A mirror in S3 ends that for good."
    ),
    Reason.UPLOAD_FAILED: Circumstances(
        _EITHER, "What was read back differs from what was sent, or a folder of the output has files that nobody wrote."
    ),
    Reason.INTERRUPTED: Circumstances(
        _EITHER,
        "A training has the pod's grace period to finish its step and to write a checkpoint; what is after the last "
        "one is trained again.",
    ),
    Reason.PREEMPTED: Circumstances(_EITHER, "The scheduler took the node for a pod with a higher PriorityClass."),
    Reason.EVICTED: Circumstances(_EITHER, "Caches and checkpoints lie in emptyDir volumes on the node's disk."),
    Reason.NODE_LOST: Circumstances(
        _EITHER, "The node died, was cut off or was deleted; about three minutes pass until Kubernetes is sure."
    ),
    Reason.POD_LOST: Circumstances(
        _DURING, "Somebody or something deleted the Job with its pods, or the pods without letting them end."
    ),
    Reason.HEARTBEAT_LOST: Circumstances(
        _DURING, "A process hangs: in a read that never returns, in a kernel, or waiting for another process."
    ),
    Reason.COLLECTIVE_TIMEOUT: Circumstances(
        _DURING, "Another pod of the run ended first, which its own last word explains better, or packets are dropped."
    ),
    Reason.TRAINER_ERROR: Circumstances(
        _EITHER, "An error of the trainer's, of a library's or of an image that you made: nobody foresaw it."
    ),
}
"""One entry per reason; a test keeps it complete."""

_SPECIAL: Final = {
    Reason.PUBLISHED: "The run has succeeded; nothing starts again.",
    Reason.ALREADY_PUBLISHED: "The run has succeeded; nothing starts again.",
    Reason.SUSPENDED_BY_USER: "It does not count against `spec.retries.maxAttempts`; another attempt goes on from the "
    "last checkpoint when `spec.suspend` is false.",
    Reason.UNSCHEDULABLE: "The pod stays, and starts when a node fits; it may wait for ever.",
    Reason.POD_REJECTED: "What the API server refuses is tried again each minute. What the kubelet refuses, and a Job "
    "that gets no pod within `spec.deadlines.startup`, ends the run.",
    Reason.POD_LOST: f"The run is prepared again, and finds what was published; it ends after {MAX_LOST_ATTEMPTS} such "
    "attempts. It does not count against `spec.retries.maxAttempts`.",
}


def follows(reason: Reason) -> str:
    """Say what becomes of a run that met this reason."""
    if reason in _SPECIAL:
        return _SPECIAL[reason]
    if reason in UNTROUBLED:
        return "The run goes on by itself."
    if reason not in REMEDIES:
        return "No: the run has ended, and somebody has to act first."
    counts = "it does not count" if reason in DISRUPTIONS else "it counts"
    sentences = [f"After an attempt {REMEDY_SENTENCES[REMEDIES[reason]]}; {counts} against `spec.retries.maxAttempts`."]
    if REMEDIES[reason] is Remedy.RESUME and Moment.PREPARATION in CIRCUMSTANCES[reason].moments:
        sentences.append(
            f"A preparation is made again after {PREPARE_PAUSE.total_seconds():g} s, until `spec.deadlines.startup` "
            "has passed since the QLoRAJob was created."
        )
    return " ".join(sentences)
