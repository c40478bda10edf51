"""Names that several components must agree on: labels, paths, variables, phases, condition types."""

from enum import StrEnum
from typing import Final

GROUP: Final = "qlora.dev"
VERSION: Final = "v1alpha1"
API_VERSION: Final = f"{GROUP}/{VERSION}"
KIND: Final = "QLoRAJob"
PLURAL: Final = "qlorajobs"
CLASS_KIND: Final = "QLoRAClass"
CLASS_PLURAL: Final = "qloraclasses"
DEFAULT_CLASS_ANNOTATION: Final = "qlora.dev/is-default-class"
"""On a QLoRAClass: "true" makes it the class of runs without spec.className, in the namespaces that may use it."""
FIELD_MANAGER: Final = "qlora-operator"
"""Field manager of everything the operator writes; also the value of `app.kubernetes.io/managed-by` on every child."""

MANAGED_BY_LABEL: Final = "app.kubernetes.io/managed-by"
JOB_LABEL: Final = "qlora.dev/job"
"""On every child; the value is the QLoRAJob's name. The operator lists children by it."""
ROLE_LABEL: Final = "qlora.dev/role"
"""On every child: a Role."""
LEADER_LABEL: Final = "qlora.dev/leader"
"""On the pod of the operator that is the leader; the progress Service selects by it."""
ATTEMPT_LABEL: Final = "qlora.dev/attempt"
"""On the children of a training attempt; the value is its number, from 1."""

PREPARATION_LABEL: Final = "qlora.dev/preparation"
"""On a prepare Job and its pods; the value is its number, from 1. A label of its own: every selector of ATTEMPT_LABEL,
such as that of `qlora logs`, means training pods."""
CLASS_LABEL: Final = "qlora.dev/class"
"""On a Job and its pods: the QLoRAClass whose settings they have; absent without one."""
RETRY_ANNOTATION: Final = "qlora.dev/retry-requested-at"
"""On a QLoRAJob: a value that the operator has not seen yet lets a failed run try again from its checkpoint."""

MAX_JOB_NAME: Final = 52
"""Leaves room for '-prepare-0' or '-prep9999-0' within 63 characters: the host name of a pod of an Indexed Job is the
Job's name and the pod's index."""
MOST_PREPARATIONS: Final = 9999
"""The highest number of a prepare Job, see MAX_JOB_NAME."""


class Role(StrEnum):
    """What a child is for."""

    PREPARE = "prepare"
    TRAIN = "train"


NUMBER_LABELS: Final = {Role.PREPARE: PREPARATION_LABEL, Role.TRAIN: ATTEMPT_LABEL}
"""By role: the label with the number of a child."""

CONTAINER: Final = "trainer"
"""The only container of prepare and training pods; its termination message has the result."""

CONFIG_MOUNT: Final = "/etc/qlora"
"""Mount path of a pod's configuration (a ConfigMap)."""
PREPARE_CONFIG_FILE: Final = "prepare.json"
"""A PrepareConfig, in CONFIG_MOUNT of the prepare pod."""
RUN_CONFIG_FILE: Final = "run.json"
"""A RunConfig, in CONFIG_MOUNT of a training pod."""
ACCELERATE_CONFIG_FILE: Final = "accelerate.yaml"
"""What `accelerate launch` reads, in CONFIG_MOUNT of a training pod of a run with several processes."""
DEEPSPEED_CONFIG_FILE: Final = "deepspeed.json"
"""DeepSpeed's configuration, in CONFIG_MOUNT if the strategy uses DeepSpeed."""
DEEPSPEED_FILE: Final = f"{CONFIG_MOUNT}/{DEEPSPEED_CONFIG_FILE}"
MAIN_ADDRESS_ENV: Final = "QLORA_MAIN_ADDRESS"
"""Environment variable: host name of the pod with the main process, if there are several pods."""
SECRETS_MOUNT: Final = "/var/run/qlora/secrets"
"""One folder per SecretRole, one file per key. The volumes are optional: the trainer reports what is missing."""
TOKEN_MOUNT: Final = "/var/run/qlora/token"  # noqa: S105 (a path)
"""The projected ServiceAccount token for the progress endpoint."""
TOKEN_FILE: Final = f"{TOKEN_MOUNT}/token"
CLAIM_SCHEME: Final = "pvc://"
"""pvc://claim/path: a file or folder in a PersistentVolumeClaim of the QLoRAJob's namespace."""
CLAIMS_MOUNT: Final = "/var/run/qlora/claims"
"""One folder per claim that the spec reads from, read-only."""
WORK_MOUNT: Final = "/work"
"""The only writable folder of a pod: an emptyDir for caches, weights and unfinished checkpoints."""
TOKEN_AUDIENCE: Final = "qlora-operator"  # noqa: S105 (an audience)
TOKEN_SECONDS: Final = 600
"""Lifetime of the progress token, the shortest that Kubernetes grants: after 80 % of it the kubelet requests a new one.
The tokens of a ServiceAccount that was deleted and created anew are refused until then."""

PROGRESS_URL_ENV: Final = "KUBEFLOW_TRAINER_SERVER_URL"
"""Environment variable of Kubeflow Trainer's status protocol; if set, transformers enables its KubeflowCallback."""
PROGRESS_TOKEN_ENV: Final = "KUBEFLOW_TRAINER_SERVER_TOKEN"  # noqa: S105 (a variable's name)
"""The path of the bearer token's file."""

WATCHED_NAMESPACES_ANNOTATION: Final = f"{GROUP}/watched-namespaces"
"""On the Lease of an installation: the namespaces that it watches, separated by commas; empty: all."""

QUEUE_LABEL: Final = "kueue.x-k8s.io/queue-name"
"""On a training Job, and a prepare Job if a queue holds it, that Kueue admits; the value is spec.queue.name."""
KUEUE_GROUP: Final = "kueue.x-k8s.io"
KUEUE_JOB_LABEL: Final = "kueue.x-k8s.io/job-uid"
"""On a Workload of Kueue; the value is the uid of its Job."""
PRIORITY_CLASS_LABEL: Final = "kueue.x-k8s.io/priority-class"
"""Next to QUEUE_LABEL; the value is spec.queue.priorityClass."""

GRACE_SECONDS: Final = 60
"""Seconds from SIGTERM to SIGKILL: enough to finish a step, write a checkpoint and write the termination message."""
TERMINATION_MESSAGE_PATH: Final = "/dev/termination-log"
TERMINATION_MESSAGE_BYTES: Final = 4096
"""The kubelet truncates a container's termination message to this length."""


class SecretRole(StrEnum):
    """What a mounted Secret is for; also its folder's name under SECRETS_MOUNT."""

    MODEL = "model"
    DATASET = "dataset"
    OUTPUT = "output"
    WANDB = "wandb"
    MLFLOW = "mlflow"


class Phase(StrEnum):
    """Summary in one word, for the PHASE column; the conditions are authoritative."""

    PENDING = "Pending"
    PREPARING = "Preparing"
    QUEUED = "Queued"
    SCHEDULING = "Scheduling"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    SUSPENDED = "Suspended"
    SUCCEEDED = "Succeeded"
    FAILED = "Failed"


TERMINAL: Final = frozenset({Phase.SUCCEEDED, Phase.FAILED})
RUNNING: Final = frozenset({Phase.TRAINING, Phase.EVALUATING, Phase.PUBLISHING})
"""Phases in which training pods run."""


class ConditionType(StrEnum):
    """Condition types of a QLoRAJob; Ready, Reconciling and Stalled are those of kstatus."""

    READY = "Ready"
    RECONCILING = "Reconciling"
    STALLED = "Stalled"
    FINISHED = "Finished"
    SUCCEEDED = "Succeeded"
    PREPARED = "Prepared"
    SCHEDULED = "Scheduled"
    PUBLISHED = "Published"
    SUSPENDED = "Suspended"


def prepare_job_name(job: str, number: int = 1) -> str:
    """Return the name of a prepare Job; the first one's is also that of the ConfigMap of all of them.

    No other QLoRAJob's child can have it: those end in '-prepare' or in a hyphen and digits.
    """
    return f"{job}-prepare" if number == 1 else f"{job}-prep{number}"


def train_job_name(job: str, attempt: int) -> str:
    """Return the name of the Job, and of its ConfigMap, of one training attempt; attempts count from 1."""
    return f"{job}-{attempt}"


def gang_service_name(job: str, attempt: int) -> str:
    """Return the name of the headless Service of an attempt on several nodes.

    Up to Kubernetes 1.35 the name of a Service must start with a letter (DNS-1035); that of a QLoRAJob need not.
    """
    return f"qlora-{train_job_name(job, attempt)}"


def output_root(uri: str, job: str) -> str:
    """Return the URI below which all results of a job are, one folder per digest; `uri` is spec.output.uri."""
    return f"{uri.rstrip('/')}/{job}"


def progress_path(namespace: str, job: str) -> str:
    """Return the path of the progress endpoint that a pod of this QLoRAJob posts to."""
    return f"/apis/{GROUP}/{VERSION}/namespaces/{namespace}/{PLURAL}/{job}/status"
