"""Every reason of a condition or an attempt, with one record each: texts, retries, documentation.

To add a reason: add it to `Reason` and `REASONS` here, and make the classifier that finds it return it.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final


class Reason(StrEnum):
    """The closed list of condition reasons; REASONS has the record of each."""

    # in progress
    ACCEPTED = "Accepted"
    PREPARING = "Preparing"
    PREPARED = "Prepared"
    QUEUED = "Queued"
    SUSPENDED_BY_USER = "SuspendedByUser"
    SCHEDULING = "Scheduling"
    UNSCHEDULABLE = "Unschedulable"
    TRAINING = "Training"
    EVALUATING = "Evaluating"
    PUBLISHING = "Publishing"
    # done
    PUBLISHED = "Published"
    ALREADY_PUBLISHED = "AlreadyPublished"
    # for the user to fix
    INVALID_SPEC = "InvalidSpec"
    CLASS_NOT_READY = "ClassNotReady"
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
    OUTPUT_NOT_FOUND = "OutputNotFound"
    OUTPUT_EXISTS = "OutputExists"
    NON_FINITE_LOSS = "NonFiniteLoss"
    GATE_FAILED = "GateFailed"
    LOSS_DIVERGED = "LossDiverged"
    CUDA_OUT_OF_MEMORY = "CudaOutOfMemory"
    HOST_OUT_OF_MEMORY = "HostOutOfMemory"
    DEADLINE_EXCEEDED = "DeadlineExceeded"
    STARTUP_DEADLINE_EXCEEDED = "StartupDeadlineExceeded"
    RETRIES_EXHAUSTED = "RetriesExhausted"
    # for the cluster's administrator to fix
    IMAGE_PULL_FAILED = "ImagePullFailed"
    POD_REJECTED = "PodRejected"
    ACCELERATOR_MISSING = "AcceleratorMissing"
    ACCELERATOR_FAILED = "AcceleratorFailed"
    S3_UNAVAILABLE = "S3Unavailable"
    HUB_UNAVAILABLE = "HubUnavailable"
    HUB_RATE_LIMITED = "HubRateLimited"
    UPLOAD_FAILED = "UploadFailed"
    INTERRUPTED = "Interrupted"
    PREEMPTED = "Preempted"
    EVICTED = "Evicted"
    NODE_LOST = "NodeLost"
    POD_LOST = "PodLost"
    HEARTBEAT_LOST = "HeartbeatLost"
    COLLECTIVE_TIMEOUT = "CollectiveTimeout"
    # for this project to fix
    TRAINER_ERROR = "TrainerError"


class Domain(StrEnum):
    """Where the cause of an attempt's end lies; each domain has a retry budget of its own.

    lifecycle/budgets.py has the budgets (docs/decisions/0021-fault-domains.md).
    """

    AUTHOR = "author"
    """The manifest, its data or its credentials: no other attempt."""
    RUN = "run"
    """What the run needs, such as memory: spec.retries.maxAttempts."""
    NODE = "node"
    """One node, or unknown: other nodes, a bounded number of times."""
    SERVICE = "service"
    """An object store or hub that serves many runs: hours of waiting."""
    CLUSTER = "cluster"
    """The cluster took the pod away: hours of waiting."""


class RetryAction(StrEnum):
    """What the next attempt does differently."""

    RESUME = "resume"
    """Nothing: the cause is outside the run."""
    OTHER_NODE = "other node"
    """It avoids the node for a while: the node caused it."""
    PREFER_OTHER_NODE = "prefer other node"
    """It prefers other nodes: the node may have caused it."""
    SHRINK_MICRO_BATCH = "shrink micro-batch"
    """Half the rows per forward pass, and twice the gradient accumulation."""


class Moment(StrEnum):
    """When a reason occurs."""

    MANIFEST = "Before any pod is created"
    PREPARATION = "During preparation"
    PLANNING = "Between preparation and training"
    WAITING = "While the pod has no node"
    STARTING = "While the pod starts on its node"
    TRAINING = "During a training attempt"
    OVER = "At the end"


class Topic(StrEnum):
    """What a failure is about: its row on the troubleshooting page, in this order."""

    # before training
    MANIFEST = "the manifest"
    CREDENTIALS = "credentials"
    MODEL = "the model"
    DATASET = "the dataset"
    CLUSTER = "the cluster"
    # during training
    RECIPE = "the recipe or the dataset"
    RESULT = "the result, which your gate refused"
    MEMORY = "memory"
    TIME = "time"
    RETRIES = "too many attempts; the message has the cause of the last one"
    VANISHED = "pods that disappear"
    TRAINER = "the trainer"
    # retried
    DISRUPTION = "the node or the cluster"
    HANG = "a process that hangs"
    SERVICE = "an object store or model hub"


@dataclass(frozen=True, kw_only=True)
class ReasonRecord:
    """The record of one reason.

    `background` and `outcome` may contain figures of the operator as {placeholders}; the reference fills them in.
    """

    sentence: str
    """What happened, for status, Events and the command line."""
    remedy: str
    """What to do about it."""
    moments: tuple[Moment, ...]
    """When it occurs."""
    background: str
    """What usually causes it; for the reference."""
    topic: Topic | None = None
    """Its row on the troubleshooting page; None: it is in that page's table of phases."""
    also_known_as: tuple[str, ...] = ()
    """What people search for: error messages, exit codes, terms of Kubernetes."""
    normal: bool = False
    """Whether its Event is Normal, because the run proceeds as it should; otherwise it is a Warning."""
    domain: Domain | None = None
    """Where the cause lies, which decides the retry budget; None: no attempt fails with this reason."""
    next_attempt: RetryAction = RetryAction.RESUME
    """What the next attempt does differently, if the domain has a budget."""
    consequence_rank: int = 0
    """0: a root cause. The higher, the more likely it only follows from the end of another pod of the run."""
    appears_late: bool = False
    """Whether what is missing may be made by others after the QLoRAJob, so that preparation waits for it."""
    cluster_fault: bool = False
    """Whether the alert QLoRAAttemptsLost counts it."""
    outcome: str = ""
    """What happens to the run, if the fields above do not say it; for the reference."""

    @property
    def retry(self) -> RetryAction | None:
        """Return what the next attempt does differently; None: not retried, somebody has to fix the cause first."""
        return None if self.domain in {None, Domain.AUTHOR} else self.next_attempt


NOTHING_TO_DO: Final = "Nothing to do."
"""The remedy of a reason that needs no action."""
_CREATE_AGAIN: Final = "Create the QLoRAJob again under the same name; it resumes from its last checkpoint."
_SERVICE_DOWN: Final = (
    "The endpoint is wrong or down, or a NetworkPolicy, a proxy or DNS is in the way. The message has the address."
)
_SUCCEEDED: Final = "The run has succeeded; nothing starts again."

_PREPARATION: Final = (Moment.PREPARATION,)
_TRAINING: Final = (Moment.TRAINING,)
_BOTH: Final = (Moment.PREPARATION, Moment.TRAINING)

REASONS: Final[dict[Reason, ReasonRecord]] = {
    Reason.ACCEPTED: ReasonRecord(
        sentence="The manifest was read and is valid.",
        remedy=NOTHING_TO_DO,
        moments=(Moment.MANIFEST,),
        background="A run stays here while children of an earlier QLoRAJob with the same name are being deleted.",
        also_known_as=("stuck in Pending", "object is being deleted"),
        normal=True,
    ),
    Reason.PREPARING: ReasonRecord(
        sentence="A pod without a GPU checks the model, the dataset and the output.",
        remedy=NOTHING_TO_DO,
        moments=_PREPARATION,
        background="The model is resolved to a commit, every row of the dataset is checked, tokens are counted, and a "
        "test file is written to the output. If the pod itself does not start, the message says so.",
        also_known_as=("preflight check", "tokenizing the dataset", "stuck in Preparing"),
        normal=True,
    ),
    Reason.PREPARED: ReasonRecord(
        sentence="Model, dataset and output were checked.",
        remedy=NOTHING_TO_DO,
        moments=(Moment.PLANNING,),
        background="`status.model` and `status.dataset` have what was found, `status.plan` has what was decided from "
        "it.",
        normal=True,
    ),
    Reason.SCHEDULING: ReasonRecord(
        sentence="The training pod waits for a node, its image or its volumes.",
        remedy=NOTHING_TO_DO,
        moments=(Moment.WAITING, Moment.STARTING),
        background="The message says which of them it waits for, and on which node.",
        also_known_as=("pod stuck in Pending", "ContainerCreating", "PodInitializing", "Pulling image"),
        normal=True,
    ),
    Reason.QUEUED: ReasonRecord(
        sentence="The training Job waits in its queue and holds no node.",
        remedy=NOTHING_TO_DO,
        moments=(Moment.WAITING,),
        background="Kueue starts the Job when the LocalQueue named in `spec.queue.name` has room. The message says "
        "what it waits for in Kueue's words. Without Kueue in the cluster, the Job waits forever.",
        also_known_as=("Kueue", "Workload not admitted", "QuotaReserved", "Job is suspended"),
        normal=True,
    ),
    Reason.SUSPENDED_BY_USER: ReasonRecord(
        sentence="spec.suspend is true: no pod runs, and the last checkpoint is kept.",
        remedy="Set spec.suspend to false to resume.",
        moments=_BOTH,
        background="A running attempt finishes its step, writes a checkpoint and ends.",
        also_known_as=("suspend", "pause", "paused", "resume", "resume training"),
        normal=True,
        outcome="It does not count against any budget; another attempt resumes from the last checkpoint when "
        "`spec.suspend` is false.",
    ),
    Reason.UNSCHEDULABLE: ReasonRecord(
        sentence="No node fits the training pod; the message is the scheduler's.",
        remedy="Free or add a matching node, or ask for less in the spec.resources of a new QLoRAJob.",
        moments=(Moment.WAITING,),
        domain=Domain.CLUSTER,
        background="All GPUs are in use, no node has what `spec.resources.gpuProduct` or `nodeSelector` asks for, a "
        "taint has no toleration, or the nodes are too small for `gpusPerNode`, `cpu` or `memory`.",
        also_known_as=(
            "FailedScheduling",
            "Insufficient nvidia.com/gpu",
            "Insufficient cpu",
            "Insufficient memory",
            "0/3 nodes are available",
            "untolerated taint",
            "didn't match Pod's node affinity/selector",
            "GPU unavailable",
        ),
        outcome="The pod stays and starts when a node fits; it may wait forever. If it waits only because the attempt "
        "avoids nodes that failed, another attempt that may use them follows after {quarantine_minutes} min.",
    ),
    Reason.TRAINING: ReasonRecord(
        sentence="The adapter is being trained.",
        remedy=NOTHING_TO_DO,
        moments=_TRAINING,
        background="`kubectl get qlj NAME --output wide` shows step, loss and speed; `qlora status --watch NAME` draws "
        "the loss curve.",
        normal=True,
    ),
    Reason.EVALUATING: ReasonRecord(
        sentence="Base model and adapter are compared on the held-out rows.",
        remedy=NOTHING_TO_DO,
        moments=_TRAINING,
        background="The base model is evaluated before training and the adapter after it; with "
        "`spec.training.evaluateEvery` the adapter is also evaluated during training.",
        also_known_as=("validation", "eval step"),
        normal=True,
    ),
    Reason.PUBLISHING: ReasonRecord(
        sentence="The adapter is being uploaded; its manifest comes last.",
        remedy=NOTHING_TO_DO,
        moments=_TRAINING,
        background="The adapter is loaded in a new process, where its loss must match the loss in training.",
        normal=True,
    ),
    Reason.PUBLISHED: ReasonRecord(
        sentence="The adapter is complete and verified in the output.",
        remedy="Use status.output.adapter.",
        moments=(Moment.OVER,),
        background="`status.output` has the adapter and the report, `status.evaluation` the comparison with the base "
        "model.",
        normal=True,
        outcome=_SUCCEEDED,
    ),
    Reason.ALREADY_PUBLISHED: ReasonRecord(
        sentence="The same model, data and settings were published before; no GPU was used.",
        remedy="Use status.output.adapter; to train again, change spec.training.seed or set spec.output.ifExists to "
        "Overwrite.",
        moments=(Moment.OVER,),
        background="The name of a result is a digest of everything that decides it, and preparation found a complete "
        "manifest under that name.",
        also_known_as=("cached result", "does not train again", "no GPU was used"),
        normal=True,
        outcome=_SUCCEEDED,
    ),
    Reason.INVALID_SPEC: ReasonRecord(
        sentence="The manifest asks for something that cannot be done.",
        remedy="Correct the field that the message names.",
        moments=(Moment.MANIFEST, Moment.PREPARATION, Moment.TRAINING),
        domain=Domain.AUTHOR,
        background="Most mistakes are refused when the manifest is applied. The rest show later: an evaluation "
        "task that does not exist, a child's name that another object has, a file in the output "
        "that somebody else wrote or changed, a strategy or a full fine-tuning that the GPU does not support.",
        topic=Topic.MANIFEST,
        also_known_as=(
            "invalid manifest",
            "ValidationError",
            "unknown field",
            "already exists",
        ),
    ),
    Reason.CLASS_NOT_READY: ReasonRecord(
        sentence="The QLoRAClass of the run does not exist, is invalid, or is not for its namespace.",
        remedy="Create or correct the QLoRAClass that the message names; if the run has failed, create the QLoRAJob "
        "again.",
        moments=(Moment.MANIFEST,),
        domain=Domain.AUTHOR,
        background="`spec.className` names it, or it is the default class of the namespace. The message says what is "
        "wrong with it. No pod exists meanwhile, and the run starts when the class can be used. A run that has used "
        "it once continues with the settings that `status.class` has.",
        topic=Topic.CLUSTER,
        also_known_as=("QLoRAClass not found", "class not allowed in namespace", "default class"),
        appears_late=True,
    ),
    Reason.SECRET_NOT_FOUND: ReasonRecord(
        sentence="A Secret named in the manifest does not exist in its namespace, or has no keys.",
        remedy="Create the Secret in the namespace of the QLoRAJob; if the run has failed, create the QLoRAJob again.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="The Secret is missing, is in another namespace, or its keys have other names. The operator reads "
        "no Secrets: the pod that mounts it reports it.",
        topic=Topic.CREDENTIALS,
        also_known_as=(
            'secret "x" not found',
            "missing AWS_ACCESS_KEY_ID",
            "NoCredentialsError",
            "Unable to locate credentials",
        ),
        appears_late=True,
    ),
    Reason.MODEL_NOT_FOUND: ReasonRecord(
        sentence="The model or its revision does not exist at the URI.",
        remedy="Correct spec.model.uri or spec.model.revision.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="The name or revision is misspelled, or the mirror or bucket does not have the model.",
        topic=Topic.MODEL,
        also_known_as=("404 Not Found", "RepositoryNotFoundError", "RevisionNotFoundError", "EntryNotFoundError"),
        appears_late=True,
    ),
    Reason.GATED_MODEL_NO_ACCESS: ReasonRecord(
        sentence="The model hub denies the token access to this model.",
        remedy="Accept the model's license on the hub, and name a Secret with a valid HF_TOKEN in "
        "spec.model.secretRef.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="The token's account did not accept the license, the token has expired or may not read, or the "
        "repository is private or missing: the hub does not distinguish these.",
        topic=Topic.CREDENTIALS,
        also_known_as=(
            "GatedRepoError",
            "401 Unauthorized",
            "401 GatedRepoError",
            "403 Forbidden (Hugging Face)",
            "HF_TOKEN",
            "access to model is restricted",
        ),
        appears_late=True,
    ),
    Reason.UNSAFE_MODEL_FORMAT: ReasonRecord(
        sentence="The model has only pickle weights; loading pickle runs code.",
        remedy="Choose a revision with .safetensors files, or convert the weights first.",
        moments=_PREPARATION,
        domain=Domain.AUTHOR,
        background="There are only `.bin` or `.pt` files and no `.safetensors`; no setting loads them.",
        topic=Topic.MODEL,
        also_known_as=("pytorch_model.bin", "no safetensors", "weights_only", "torch.load"),
    ),
    Reason.MODEL_UNSUPPORTED: ReasonRecord(
        sentence="The model's architecture, tokenizer or modules do not fit the manifest.",
        remedy="Change the field that the message names; the message lists what fits.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="transformers does not know the architecture without code from the repository, the tokenizer has no "
        "end-of-text token or chat template, no module matches `spec.lora.targets`, or the model cannot be quantized "
        "as asked.",
        topic=Topic.MODEL,
        also_known_as=(
            "trust_remote_code",
            "target_modules not found",
            "Target modules not found in the base model",
            "no chat template",
            "does not recognize this architecture",
        ),
    ),
    Reason.DOES_NOT_FIT: ReasonRecord(
        sentence="The run needs more memory than any GPU available to it; no GPU was requested.",
        remedy="Make the change that the message names, or add a larger GPU; then create the QLoRAJob again.",
        moments=(Moment.PLANNING,),
        domain=Domain.AUTHOR,
        background="The peak is computed from the shapes of the model and the lengths of the rows; "
        "[`qlora plan`](../plan.md) shows the same offline, by component.",
        topic=Topic.MANIFEST,
        also_known_as=("not enough VRAM", "GPU too small", "model too large", "predicted out of memory"),
        outcome="A larger GPU may be away for a moment: its node is being repaired, or lost its labels. The nodes are "
        "checked again, the longer the less often, up to every {check_minutes} min, and no GPU is held; after "
        "{check_hours} h the run has ended.",
    ),
    Reason.DATASET_NOT_FOUND: ReasonRecord(
        sentence="No object was found at the URI of a dataset.",
        remedy="Correct spec.dataset.uri.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="The bucket, the object or the file does not exist, or there is no data file under the prefix.",
        topic=Topic.DATASET,
        also_known_as=("NoSuchBucket", "NoSuchKey", "404 Not Found (S3)", "FileNotFoundError"),
        appears_late=True,
    ),
    Reason.DATASET_INVALID: ReasonRecord(
        sentence="A row cannot be used; the message has its number and the cause.",
        remedy="Correct the row in the dataset.",
        moments=_PREPARATION,
        domain=Domain.AUTHOR,
        background="All rows are read before a GPU is requested. A field is missing or has another type, the turns of "
        "a chat are in the wrong order, or the file is not what its name says ([data](../data.md)).",
        topic=Topic.DATASET,
        also_known_as=("JSONDecodeError", "invalid JSONL", "KeyError", "missing field", "wrong dataset format"),
    ),
    Reason.DATASET_EMPTY: ReasonRecord(
        sentence="The dataset leaves no row for training or for evaluation.",
        remedy="Add rows.",
        moments=_PREPARATION,
        domain=Domain.AUTHOR,
        background="A file has no rows, all rows are longer than `spec.training.maxLength`, or all rows with something "
        "to train on are held out.",
        topic=Topic.DATASET,
        also_known_as=("empty dataset", "num_samples=0", "all rows too long", "no training examples"),
        appears_late=True,
    ),
    Reason.S3_DENIED: ReasonRecord(
        sentence="The object store denies access to the credentials.",
        remedy="Grant the credentials read access to the inputs and write access to the prefix of spec.output.uri.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="The keys are wrong or missing, or the policy allows too little. During training it means that the "
        "keys were changed or have expired since preparation: the trainer reads the Secret again, and a run that has "
        "trained for {going_minutes} min or wrote a checkpoint waits for new keys, with the budget of a service.",
        topic=Topic.CREDENTIALS,
        also_known_as=(
            "403 AccessDenied",
            "403 Forbidden (S3)",
            "SignatureDoesNotMatch",
            "InvalidAccessKeyId",
            "ExpiredToken",
            "RequestTimeTooSkewed",
        ),
        appears_late=True,
    ),
    Reason.OUTPUT_NOT_FOUND: ReasonRecord(
        sentence="The bucket of the output does not exist.",
        remedy="Create the bucket, or correct spec.output.uri.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="The bucket is created later, or its name is misspelled; neither operator nor trainer creates it.",
        topic=Topic.MANIFEST,
        also_known_as=("output bucket missing", "bucket does not exist"),
        appears_late=True,
    ),
    Reason.OUTPUT_EXISTS: ReasonRecord(
        sentence="This result was published before, and spec.output.ifExists is Fail.",
        remedy="Set spec.output.ifExists to Skip or Overwrite, or choose another spec.output.uri.",
        moments=_PREPARATION,
        domain=Domain.AUTHOR,
        background="Preparation found a complete manifest under the name of this result.",
        topic=Topic.MANIFEST,
        also_known_as=("output already exists", "refuses to overwrite", "412 PreconditionFailed"),
    ),
    Reason.NON_FINITE_LOSS: ReasonRecord(
        sentence="The loss became NaN or infinite.",
        remedy="See the message; usually lower spec.training.learningRate or correct the dataset.",
        moments=_TRAINING,
        domain=Domain.AUTHOR,
        background="At step 0 the base model itself is broken, or its weights overflow in the dtype; later the "
        "learning rate is too high, or a row is an outlier.",
        topic=Topic.RECIPE,
        also_known_as=("NaN loss", "loss is nan", "loss inf", "loss nan", "fp16 overflow", "exploding gradients"),
    ),
    Reason.GATE_FAILED: ReasonRecord(
        sentence="The result breaks a rule of spec.evaluation.gate and was not published; the message has the figure "
        "and the limit.",
        remedy="Read the report under rejected/, then change the dataset or the recipe; or create the QLoRAJob again "
        "with a gate that the result passes, which publishes it without training again.",
        moments=_TRAINING,
        domain=Domain.AUTHOR,
        background="Training is complete, and its adapter and report are kept; see [gate](../results.md#gate).",
        topic=Topic.RESULT,
        also_known_as=("quality gate", "evaluation threshold", "adapter worse than base", "regression"),
    ),
    Reason.LOSS_DIVERGED: ReasonRecord(
        sentence="The loss rose far above its earlier level and stayed there.",
        remedy="Lower spec.training.learningRate, or raise spec.training.warmupRatio or spec.training.globalBatchSize.",
        moments=_TRAINING,
        domain=Domain.AUTHOR,
        background="The message has the earlier level and the loss now. Checkpoints from before the rise are kept.",
        topic=Topic.RECIPE,
        also_known_as=("loss diverged", "loss explodes", "loss spike", "training unstable", "learning rate too high"),
    ),
    Reason.CUDA_OUT_OF_MEMORY: ReasonRecord(
        sentence="The GPU ran out of memory.",
        remedy="Lower spec.training.microBatchSize or spec.training.maxLength, or choose a larger GPU.",
        moments=_TRAINING,
        domain=Domain.RUN,
        next_attempt=RetryAction.SHRINK_MICRO_BATCH,
        background="The prediction was too low, or something else uses the GPU. Micro-batches are halved down to one "
        "row, then activations are recomputed (gradient checkpointing); when nothing is left to shrink, the run ends.",
        topic=Topic.MEMORY,
        also_known_as=(
            "CUDA out of memory",
            "CUDA OOM",
            "torch.OutOfMemoryError",
            "torch.cuda.OutOfMemoryError",
            "CUBLAS_STATUS_ALLOC_FAILED",
            "out of memory on the GPU",
        ),
    ),
    Reason.HOST_OUT_OF_MEMORY: ReasonRecord(
        sentence="The container exceeded its memory limit; the message says which pod's.",
        remedy="For a training pod raise spec.resources.memory; for the prepare pod lower "
        "spec.dataset.maxSamples, split the dataset, or use a QLoRAClass with more resources.prepare.memory.",
        moments=_BOTH,
        domain=Domain.RUN,
        next_attempt=RetryAction.SHRINK_MICRO_BATCH,
        background="On a CPU another attempt with a smaller micro-batch may fix it. With a GPU the container's memory "
        "holds the dataset, and the model while it is loaded, whatever the micro-batch. If the attempt had run for "
        "{going_minutes} min or wrote a checkpoint, the node may have been short of memory, and there is one more "
        "attempt, if possible on another node. The prepare pod has {prepare_memory}, unless a QLoRAClass sets another "
        "limit, and is not retried.",
        topic=Topic.MEMORY,
        also_known_as=(
            "OOMKilled",
            "exit code 137",
            "out of memory",
            "MemoryError",
            "DefaultCPUAllocator: can't allocate memory",
        ),
    ),
    Reason.DEADLINE_EXCEEDED: ReasonRecord(
        sentence="A pod exceeded its deadline; the message says which one.",
        remedy="For a training pod raise spec.deadlines.total; for the prepare pod, whose deadline is fixed, lower "
        "spec.dataset.maxSamples or split the dataset.",
        moments=_BOTH,
        domain=Domain.AUTHOR,
        background="`spec.deadlines.total` bounds the time that containers run, of all attempts together; that of a "
        "preparation has {prepare_hours} hour. Waiting does not count.",
        topic=Topic.TIME,
        also_known_as=("activeDeadlineSeconds", "timed out", "job took too long"),
    ),
    Reason.STARTUP_DEADLINE_EXCEEDED: ReasonRecord(
        sentence="The pod did not start in time and was removed, so that it holds no GPU.",
        remedy="See the message for what it waited for, or raise spec.deadlines.startup.",
        moments=(Moment.STARTING,),
        domain=Domain.NODE,
        next_attempt=RetryAction.OTHER_NODE,
        background="A volume is missing or cannot be attached, a node is unhealthy, or, with several nodes, pods wait "
        "for others that never start.",
        topic=Topic.CLUSTER,
        also_known_as=(
            "CreateContainerConfigError",
            "FailedMount",
            "FailedAttachVolume",
            "FailedCreatePodSandBox",
            "pod never starts",
        ),
    ),
    Reason.RETRIES_EXHAUSTED: ReasonRecord(
        sentence="A retry budget is spent; the message says which one, and the cause of the last attempt's end.",
        remedy="Fix the cause, then raise spec.retries.maxAttempts, or create the QLoRAJob again under the same name; "
        "it resumes from its last checkpoint.",
        moments=_TRAINING,
        domain=Domain.AUTHOR,
        background="`status.attempts` has the reason, the domain, the node and the message of the last "
        "{most_attempts} attempts. Each domain has [a budget of its own](../attempts.md#retries), and a checkpoint "
        "that is further than the last one refills all of them.",
        topic=Topic.RETRIES,
        also_known_as=("BackoffLimitExceeded", "CrashLoopBackOff", "too many restarts", "maxAttempts"),
    ),
    Reason.IMAGE_PULL_FAILED: ReasonRecord(
        sentence="The node cannot pull the trainer image.",
        remedy="Correct the image, the registry or the pull credentials.",
        moments=(Moment.STARTING,),
        domain=Domain.NODE,
        next_attempt=RetryAction.OTHER_NODE,
        background="The kubelet keeps trying. When `spec.deadlines.startup` has passed, the attempt ends and the node "
        "is free.",
        topic=Topic.CLUSTER,
        also_known_as=(
            "ImagePullBackOff",
            "ErrImagePull",
            "ErrImageNeverPull",
            "InvalidImageName",
            "manifest unknown",
            "imagePullSecrets",
        ),
    ),
    Reason.POD_REJECTED: ReasonRecord(
        sentence="The cluster refused the pod; the message is the API server's or the kubelet's.",
        remedy="Change the policy, quota or limit that the message names.",
        moments=(Moment.MANIFEST, Moment.WAITING, Moment.STARTING),
        domain=Domain.NODE,
        next_attempt=RetryAction.OTHER_NODE,
        background="A ResourceQuota, an admission policy or Pod Security refused the pod, or the kubelet could not "
        "start its container.",
        topic=Topic.CLUSTER,
        also_known_as=(
            "FailedCreate",
            "exceeded quota",
            "violates PodSecurity",
            "admission webhook denied the request",
            "UnexpectedAdmissionError",
            "CreateContainerError",
            "RunContainerError",
            "exec format error",
        ),
        outcome="What the API server refuses is tried again until it is let in: a Job every minute by the operator, "
        "its pods by Kubernetes. What the kubelet refuses is retried on other nodes: {node_attempts} such attempts "
        "without a new checkpoint end the run.",
    ),
    Reason.ACCELERATOR_MISSING: ReasonRecord(
        sentence="A GPU was requested, but the container finds no CUDA device.",
        remedy="Check the node's driver and device plugin.",
        moments=_TRAINING,
        domain=Domain.NODE,
        next_attempt=RetryAction.OTHER_NODE,
        background="torch finds no CUDA device: the driver or the device plugin is broken, or the hardware was "
        "changed.",
        topic=Topic.DISRUPTION,
        also_known_as=(
            "torch.cuda.is_available() is False",
            "no CUDA-capable device is detected",
            "No CUDA GPUs are available",
            "NVIDIA driver",
            "nvidia-smi",
            "device plugin",
        ),
        cluster_fault=True,
    ),
    Reason.ACCELERATOR_FAILED: ReasonRecord(
        sentence="A GPU, its driver or its connection failed.",
        remedy="Look for Xid messages in the node's kernel log (`dmesg`), and drain the node if they come back.",
        moments=_TRAINING,
        domain=Domain.NODE,
        next_attempt=RetryAction.OTHER_NODE,
        background="The hardware reports an uncorrectable memory error, falls off the bus, or ends a kernel; the "
        "message has CUDA's own words.",
        topic=Topic.DISRUPTION,
        also_known_as=(
            "uncorrectable ECC error",
            "unspecified launch failure",
            "GPU is lost",
            "Xid",
            "NVLink error",
            "CUDA error: unknown error",
            "CUDA-capable device(s) is/are busy or unavailable",
        ),
        cluster_fault=True,
    ),
    Reason.S3_UNAVAILABLE: ReasonRecord(
        sentence="The object store does not respond.",
        remedy="Check its endpoint and the network.",
        moments=_BOTH,
        domain=Domain.SERVICE,
        background=_SERVICE_DOWN,
        topic=Topic.SERVICE,
        also_known_as=(
            "503 SlowDown",
            "SlowDown",
            "500 InternalError",
            "503 Service Unavailable",
            "EndpointConnectionError",
            "ConnectTimeoutError",
            "MinIO down",
        ),
        cluster_fault=True,
    ),
    Reason.HUB_UNAVAILABLE: ReasonRecord(
        sentence="The model hub does not respond.",
        remedy="Check the network, or set up a mirror.",
        moments=_BOTH,
        domain=Domain.SERVICE,
        background=_SERVICE_DOWN,
        topic=Topic.SERVICE,
        also_known_as=(
            "air-gapped",
            "offline",
            "HF_HUB_OFFLINE",
            "OfflineModeIsEnabled",
            "LocalEntryNotFoundError",
            "HF_ENDPOINT",
            "huggingface.co unreachable",
            "ConnectError",
        ),
        cluster_fault=True,
    ),
    Reason.HUB_RATE_LIMITED: ReasonRecord(
        sentence="The model hub refuses further requests for now (rate limit).",
        remedy="Wait, use a token, or set up a mirror.",
        moments=_BOTH,
        domain=Domain.SERVICE,
        background="Many runs request anonymously from one address. A mirror in S3 fixes it for good.",
        topic=Topic.SERVICE,
        also_known_as=("429 Too Many Requests", "rate limit", "HfHubHTTPError 429"),
    ),
    Reason.UPLOAD_FAILED: ReasonRecord(
        sentence="A file could not be uploaded and verified.",
        remedy="Check the object store.",
        moments=_BOTH,
        domain=Domain.SERVICE,
        background="What was read back differs from what was sent, or a prefix of the output has files from another "
        "writer.",
        topic=Topic.SERVICE,
        also_known_as=("checksum mismatch", "BadDigest", "ETag mismatch", "EntityTooLarge", "NoSuchUpload"),
        cluster_fault=True,
    ),
    Reason.INTERRUPTED: ReasonRecord(
        sentence="The pod was stopped by a drain, an eviction or a deletion.",
        remedy=_CREATE_AGAIN,
        moments=_BOTH,
        domain=Domain.CLUSTER,
        background="A training pod has its grace period to finish the step and write a checkpoint; steps after the "
        "last checkpoint are trained again.",
        topic=Topic.DISRUPTION,
        also_known_as=(
            "SIGTERM",
            "exit code 143",
            "SIGKILL",
            "kubectl drain",
            "EvictionByEvictionAPI",
            "spot interruption",
            "spot instance reclaimed",
            "preemptible VM",
            "Terminating",
        ),
        consequence_rank=1,
    ),
    Reason.PREEMPTED: ReasonRecord(
        sentence="The pod was preempted by a pod with a higher priority.",
        remedy=_CREATE_AGAIN,
        moments=_BOTH,
        domain=Domain.CLUSTER,
        background="The scheduler took the node for a pod with a higher PriorityClass.",
        topic=Topic.DISRUPTION,
        also_known_as=("Preempting", "PreemptionByScheduler", "Preempted by pod", "PriorityClass"),
    ),
    Reason.EVICTED: ReasonRecord(
        sentence="The kubelet evicted the pod: the node ran short of disk or memory, or the pod exceeded its own limit "
        "of disk; the message is the kubelet's.",
        remedy="Give the node more disk for emptyDir volumes, or choose larger nodes with spec.resources.nodeSelector. "
        "If the pod exceeded its own limit, raise what the message names.",
        moments=_BOTH,
        domain=Domain.NODE,
        background="Caches and checkpoints are in emptyDir volumes on the node's disk. A pod that exceeds its own "
        "limit of ephemeral-storage, or that of a volume, would do so on every node, so such an attempt counts for "
        "spec.retries.maxAttempts; a prepare pod that does so is not retried.",
        topic=Topic.DISRUPTION,
        also_known_as=(
            "DiskPressure",
            "MemoryPressure",
            "The node was low on resource: ephemeral-storage",
            "No space left on device",
            "TerminationByKubelet",
        ),
    ),
    Reason.NODE_LOST: ReasonRecord(
        sentence="The node of the pod does not respond.",
        remedy=_CREATE_AGAIN,
        moments=_BOTH,
        domain=Domain.CLUSTER,
        background="The node died, lost its network or was deleted; Kubernetes needs about three minutes to be sure.",
        topic=Topic.DISRUPTION,
        also_known_as=(
            "NodeNotReady",
            "node unreachable",
            "DeletionByTaintManager",
            "DeletionByPodGC",
            "ContainerStatusUnknown",
            "spot node deleted",
        ),
        cluster_fault=True,
    ),
    Reason.POD_LOST: ReasonRecord(
        sentence="The pod disappeared without a termination message.",
        remedy=_CREATE_AGAIN,
        moments=_BOTH,
        domain=Domain.CLUSTER,
        background="Somebody or something deleted the Job with its pods, or the pods without a grace period.",
        topic=Topic.VANISHED,
        also_known_as=("pod not found", "Job deleted", "kubectl delete --force", "pod disappeared"),
        cluster_fault=True,
        outcome="After a training attempt, preparation runs again and finds what was published; the run ends after "
        "{most_lost} such attempts without a new checkpoint.",
    ),
    Reason.HEARTBEAT_LOST: ReasonRecord(
        sentence="The run sent no heartbeat for spec.deadlines.heartbeat and was stopped, so that it holds no GPU.",
        remedy="Read the stack dumps under hangs/ in status.output.prefix, or raise spec.deadlines.heartbeat.",
        moments=_TRAINING,
        domain=Domain.NODE,
        next_attempt=RetryAction.PREFER_OTHER_NODE,
        background="A process hangs: in a read that never returns, in a kernel, or waiting for another process.",
        topic=Topic.HANG,
        also_known_as=("training hangs", "stuck at step", "deadlock", "no progress", "liveness"),
        cluster_fault=True,
    ),
    Reason.COLLECTIVE_TIMEOUT: ReasonRecord(
        sentence="A process timed out waiting for the other processes of its run, or lost its connection to them.",
        remedy="See which pod ended first, and check the network between the nodes; NetworkPolicies must let the pods "
        "of a run reach each other.",
        moments=_TRAINING,
        domain=Domain.NODE,
        next_attempt=RetryAction.PREFER_OTHER_NODE,
        background="Another pod of the run ended first, and its own termination message explains it better; or packets "
        "are dropped.",
        topic=Topic.HANG,
        also_known_as=(
            "NCCL timeout",
            "NCCL error",
            "Watchdog caught collective operation timeout",
            "DistBackendError",
            "Connection closed by peer",
            "Gloo",
            "TCPStore",
            "torch.distributed",
        ),
        consequence_rank=2,
        cluster_fault=True,
    ),
    Reason.TRAINER_ERROR: ReasonRecord(
        sentence="The trainer failed with an unexpected error.",
        remedy="Read the pod's log, and report it with the message.",
        moments=_BOTH,
        domain=Domain.NODE,
        next_attempt=RetryAction.PREFER_OTHER_NODE,
        background="The trainer, a library or an image of your own has a bug.",
        topic=Topic.TRAINER,
        also_known_as=("exit code 1", "Traceback", "RuntimeError", "segmentation fault", "exit code 139"),
    ),
}
"""One record per reason; a test checks that it is complete."""

NORMAL_REASONS: Final = frozenset(reason for reason, record in REASONS.items() if record.normal)
"""Reasons of a run that proceeds as it should; every other one needs attention, even if it is retried."""
