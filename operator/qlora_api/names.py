"""Every word that two places must spell alike, each with its sentence."""

from enum import StrEnum
from typing import Final, NamedTuple

GROUP: Final = "qlora.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "QLoRAJob"
PLURAL: Final = "qlorajobs"
FIELD_MANAGER: Final = "qlora-operator"
"""The server-side apply field manager, and the `app.kubernetes.io/managed-by` of every child."""

MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
JOB_LABEL: Final = "qlora.dev/job"
"""On every child; the value is the QLoRAJob's name. observe() selects by it."""
ROLE_LABEL: Final = "qlora.dev/role"
"""On every child: a Role."""
ATTEMPT_LABEL: Final = "qlora.dev/attempt"
"""On the children of a training attempt; the value is its number, from 1."""

MAX_JOB_NAME: Final = 52
"""Room for '-prepare' within the 63 characters of a label value that Kubernetes gives a Job's pods."""


class Role(StrEnum):
    """What a child is for."""

    PREPARE = "prepare"
    TRAIN = "train"


CONTAINER: Final = "trainer"
"""The one container of prepare and training pods; its termination message is the final word."""

CONFIG_MOUNT: Final = "/etc/qlora"
"""Where a pod finds its configuration (a ConfigMap)."""
PREPARE_CONFIG_FILE: Final = "prepare.json"
"""A PrepareConfig, in CONFIG_MOUNT of the prepare pod."""
RUN_CONFIG_FILE: Final = "run.json"
"""A RunConfig, in CONFIG_MOUNT of a training pod."""
ACCELERATE_CONFIG_FILE: Final = "accelerate.yaml"
"""What `accelerate launch` reads, in CONFIG_MOUNT of a training pod with other processes beside it."""
DEEPSPEED_CONFIG_FILE: Final = "deepspeed.json"
"""DeepSpeed's settings, in CONFIG_MOUNT where it divides the work."""
DEEPSPEED_FILE: Final = f"{CONFIG_MOUNT}/{DEEPSPEED_CONFIG_FILE}"
MAIN_ADDRESS_ENV: Final = "QLORA_MAIN_ADDRESS"
"""The name of the pod with the first process, where there are several pods."""
SECRETS_MOUNT: Final = "/var/run/qlora/secrets"
"""One folder per SecretRole, one file per key. The volumes are optional: the trainer names what is missing."""
TOKEN_MOUNT: Final = "/var/run/qlora/token"  # noqa: S105 (a path)
"""The projected ServiceAccount token for the progress endpoint."""
TOKEN_FILE: Final = f"{TOKEN_MOUNT}/token"
CLAIM_SCHEME: Final = "pvc://"
"""pvc://claim/path: a file or folder in a PersistentVolumeClaim of the QLoRAJob's namespace."""
CLAIMS_MOUNT: Final = "/var/run/qlora/claims"
"""One folder per claim that the spec reads from, read-only."""
WORK_MOUNT: Final = "/work"
"""The only writable folder of a pod: an emptyDir with caches, weights and checkpoints in the making."""
TOKEN_AUDIENCE: Final = "qlora-operator"  # noqa: S105 (an audience)

PROGRESS_URL_ENV: Final = "KUBEFLOW_TRAINER_SERVER_URL"
"""Kubeflow Trainer's status protocol: transformers' KubeflowCallback switches itself on when it is set."""
PROGRESS_TOKEN_ENV: Final = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105 (a variable's name)
"""The path of the bearer token's file."""

GPU_RESOURCE: Final = "nvidia.com/gpu"
"""What a pod asks for, and the prefix of the labels of NVIDIA's GPU feature discovery."""
GPU_MEMORY_LABEL: Final = f"{GPU_RESOURCE}.memory"
"""MiB of each GPU of a node."""

GRACE_SECONDS: Final = 60
"""From SIGTERM to SIGKILL: enough to finish a step, write a checkpoint and leave a last word."""
TERMINATION_MESSAGE_PATH: Final = "/dev/termination-log"
TERMINATION_MESSAGE_BYTES: Final = 4096
"""The kubelet cuts a container's termination message here."""


class SecretRole(StrEnum):
    """Which reference of the spec a mounted Secret belongs to; the folder's name under SECRETS_MOUNT."""

    MODEL = "model"
    DATASET = "dataset"
    OUTPUT = "output"
    WANDB = "wandb"
    MLFLOW = "mlflow"


class Phase(StrEnum):
    """One word for the PHASE column; the conditions are the truth."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    SCHEDULING = "Scheduling"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


TERMINAL: Final = frozenset({Phase.SUCCEEDED, Phase.FAILED})


class ConditionType(StrEnum):
    """The conditions of a QLoRAJob; Ready, Reconciling and Stalled are kstatus's."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    FINISHED = "Finished"
    SUCCEEDED = "Succeeded"
    PREPARED = "Prepared"
    SCHEDULED = "Scheduled"
    PUBLISHED = "Published"


class Reason(StrEnum):
    """The closed list of condition reasons; GUIDANCE has the sentence and the remedy of each."""

    # on the way
    ACCEPTED = "Accepted"
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    SCHEDULING = "Scheduling"
    UNSCHEDULABLE = "Unschedulable"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    # done
    PUBLISHED = "Published"
    ALREADY_PUBLISHED = "AlreadyPublished"
    # the user acts
    INVALID_SPEC = "InvalidSpec"
    SECRET_NOT_FOUND = "SecretNotFound"  # noqa: S105 (a reason)
    MODEL_NOT_FOUND = "ModelNotFound"
    GATED_MODEL_NO_ACCESS = "GatedModelNoAccess"
    UNSAFE_MODEL_FORMAT = "UnsafeModelFormat"
    MODEL_UNSUPPORTED = "ModelUnsupported"
    DOES_NOT_FIT = "DoesNotFit"
    DATASET_NOT_FOUND = "DatasetNotFound"
    DATASET_INVALID = "DatasetInvalid"
    DATASET_EMPTY = "DatasetEmpty"
    S3_DENIED = "S3Denied"
    OUTPUT_EXISTS = "OutputExists"
    NON_FINITE_LOSS = "NonFiniteLoss"
    GATE_FAILED = "GateFailed"
    LOSS_DIVERGED = "LossDiverged"
    CUDA_OUT_OF_MEMORY = "CudaOutOfMemory"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    # whoever runs the cluster acts
    IMAGE_PULL_FAILED = "ImagePullFailed"
    POD_REJECTED = "PodRejected"
    ACCELERATOR_MISSING = "AcceleratorMissing"
    S3_UNAVAILABLE = "S3Unavailable"
    HUB_UNAVAILABLE = "HubUnavailable"
    HUB_RATE_LIMITED = "HubRateLimited"
    UPLOAD_FAILED = "UploadFailed"
    INTERRUPTED = "Interrupted"
    POD_LOST = "PodLost"
    COLLECTIVE_TIMEOUT = "CollectiveTimeout"
    # we act
    TRAINER_ERROR = "TrainerError"


_CONSEQUENCES: Final = (Reason.INTERRUPTED, Reason.COLLECTIVE_TIMEOUT)
"""How a process or a pod ends when something happened to another one; the earlier explains a run better."""


def distance_from_cause(reason: Reason) -> int:
    """Return 0 for what explains the end of a run by itself, and more for what only follows from it."""
    return _CONSEQUENCES.index(reason) + 1 if reason in _CONSEQUENCES else 0


class Guidance(NamedTuple):
    """What a reason means, and what to do next."""

    sentence: str
    remedy: str


_WAIT: Final = "Nothing to do."

GUIDANCE: Final[dict[Reason, Guidance]] = {
    Reason.ACCEPTED: Guidance("The manifest was read and is valid.", _WAIT),
    Reason.PREPARING: Guidance("A pod without a GPU checks the model, the dataset and the output.", _WAIT),
    Reason.PREPARED: Guidance("Model, dataset and output were checked.", _WAIT),
    Reason.SCHEDULING: Guidance("The training pod waits for a node, its image or its volumes.", _WAIT),
    Reason.UNSCHEDULABLE: Guidance(
        "No node fits the training pod; the message is the scheduler's.",
        "Free or add a matching node, or ask for less in a new QLoRAJob's spec.resources.",
    ),
    Reason.TRAINING: Guidance("The adapter is being trained.", _WAIT),
    Reason.EVALUATING: Guidance("Base model and adapter are compared on the held-out rows.", _WAIT),
    Reason.PUBLISHING: Guidance("The adapter is being uploaded; its manifest comes last.", _WAIT),
    Reason.PUBLISHED: Guidance("The adapter is complete and verified in the output.", "Use status.output.adapter."),
    Reason.ALREADY_PUBLISHED: Guidance(
        "The same model, data and settings were published before; no GPU was used.",
        "Use status.output.adapter, or change the seed to train again.",
    ),
    Reason.INVALID_SPEC: Guidance("The manifest asks for something impossible.", "Correct the field that is named."),
    Reason.SECRET_NOT_FOUND: Guidance(
        "A Secret named in the manifest does not exist in its namespace, or has no keys.",
        "Create the Secret in the QLoRAJob's namespace, then create the QLoRAJob anew.",
    ),
    Reason.MODEL_NOT_FOUND: Guidance(
        "The model or its revision does not exist at the URI.", "Correct spec.model.uri or spec.model.revision."
    ),
    Reason.GATED_MODEL_NO_ACCESS: Guidance(
        "The hub refuses this model to the token in use.",
        "Accept the model's licence on the hub, and name a Secret with a valid HF_TOKEN in spec.model.secretRef.",
    ),
    Reason.UNSAFE_MODEL_FORMAT: Guidance(
        "The model has pickle weights only; loading pickle runs code.",
        "Choose a revision with .safetensors files, or convert the weights first.",
    ),
    Reason.MODEL_UNSUPPORTED: Guidance(
        "The model's architecture, tokenizer or modules do not fit the manifest.", "See the message for what fits."
    ),
    Reason.DOES_NOT_FIT: Guidance(
        "The run needs more memory than any GPU that it may have; none was asked for.",
        "Make the change that the message names, or add a larger GPU; then create the QLoRAJob anew.",
    ),
    Reason.DATASET_NOT_FOUND: Guidance("No object was found at a dataset's URI.", "Correct spec.dataset.uri."),
    Reason.DATASET_INVALID: Guidance(
        "A row cannot be used; the message has its number and the reason.", "Correct the row in the dataset."
    ),
    Reason.DATASET_EMPTY: Guidance("The dataset leaves no row to train or to evaluate on.", "Add rows."),
    Reason.S3_DENIED: Guidance(
        "The object store refuses the credentials.",
        "Grant the credentials read access to the inputs and write access to the prefix of spec.output.uri.",
    ),
    Reason.OUTPUT_EXISTS: Guidance(
        "This result was published before, and spec.output.ifExists is Fail.",
        "Set spec.output.ifExists to Skip, or choose another spec.output.uri.",
    ),
    Reason.NON_FINITE_LOSS: Guidance(
        "The loss became NaN or infinite.", "Lower spec.training.learningRate, or check the dataset."
    ),
    Reason.GATE_FAILED: Guidance(
        "The result breaks a rule of spec.evaluation.gate and was not published; the message has figure and bound.",
        "Read the report under rejected/, then change data or recipe; or create the QLoRAJob anew with a gate that "
        "the result passes, which publishes it without training again.",
    ),
    Reason.LOSS_DIVERGED: Guidance(
        "The loss rose far above where it was, and stayed there.",
        "Lower spec.training.learningRate, or raise warmupRatio or globalBatchSize.",
    ),
    Reason.CUDA_OUT_OF_MEMORY: Guidance(
        "The GPU's memory did not suffice.",
        "Lower spec.training.microBatchSize or spec.training.maxLength, or choose a larger GPU.",
    ),
    Reason.HOST_OUT_OF_MEMORY: Guidance(
        "The container's memory limit did not suffice; the message says which pod's.",
        "For a training pod raise spec.resources.memory; for the prepare pod, whose limit is fixed, lower "
        "spec.dataset.maxSamples or split the dataset.",
    ),
    Reason.DEADLINE_EXCEEDED: Guidance(
        "A pod took longer than allowed; the message says which one's.",
        "For a training pod raise spec.deadlines.total; for the prepare pod, whose deadline is fixed, lower "
        "spec.dataset.maxSamples or split the dataset.",
    ),
    Reason.STARTUP_DEADLINE_EXCEEDED: Guidance(
        "The pod did not start in time; it was removed so that it holds no GPU.",
        "See the message for what it waited for, or raise spec.deadlines.startup.",
    ),
    Reason.IMAGE_PULL_FAILED: Guidance(
        "The node cannot pull the trainer image.", "Correct the image, the registry or the pull credentials."
    ),
    Reason.POD_REJECTED: Guidance(
        "The cluster refused the pod; the message is the API server's or the kubelet's.",
        "Change the policy, quota or limit that the message names.",
    ),
    Reason.ACCELERATOR_MISSING: Guidance(
        "A GPU was promised, but the container finds no CUDA device.", "Check the node's driver and device plugin."
    ),
    Reason.S3_UNAVAILABLE: Guidance("The object store does not answer.", "Check its endpoint and the network."),
    Reason.HUB_UNAVAILABLE: Guidance("The model hub does not answer.", "Check the network, or set up a mirror."),
    Reason.HUB_RATE_LIMITED: Guidance("The model hub refuses more requests.", "Wait, use a token, or set up a mirror."),
    Reason.UPLOAD_FAILED: Guidance("A file could not be uploaded and verified.", "Check the object store."),
    Reason.INTERRUPTED: Guidance(
        "The pod was asked to stop: a drain, an eviction or a deletion.",
        "Create the QLoRAJob anew, under the same name: it goes on from its last checkpoint.",
    ),
    Reason.POD_LOST: Guidance(
        "The pod vanished without a last word.",
        "Create the QLoRAJob anew, under the same name: it goes on from its last checkpoint.",
    ),
    Reason.COLLECTIVE_TIMEOUT: Guidance(
        "A process waited in vain for the others of its run, or lost its connection to them.",
        "See which pod ended first, and check the network between the nodes; NetworkPolicies must let the pods of a "
        "run reach each other.",
    ),
    Reason.TRAINER_ERROR: Guidance(
        "The trainer failed in a way it does not know.", "Read the pod's log, and report it with the message."
    ),
}
"""One entry per reason; a test keeps it complete."""


def prepare_job_name(job: str) -> str:
    """Name of the Job, and of its ConfigMap, that prepares a QLoRAJob."""
    return f"{job}-prepare"


def train_job_name(job: str, attempt: int) -> str:
    """Name of the Job, and of its ConfigMap, of one training attempt; attempts count from 1."""
    return f"{job}-{attempt}"


def progress_path(namespace: str, job: str) -> str:
    """Path of the progress endpoint that a pod of this QLoRAJob posts to."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{job}/status"
