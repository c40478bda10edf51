"""What each reason means, and what to do next; the sentences that users see."""

from typing import Final, NamedTuple

from qlora_api.names import Reason


class Guidance(NamedTuple):
    """What a reason means, and what to do next."""

    sentence: str
    remedy: str


_WAIT: Final = "Nothing to do."
_AGAIN: Final = "Create the QLoRAJob anew, under the same name: it goes on from its last checkpoint."

GUIDANCE: Final[dict[Reason, Guidance]] = {
    Reason.ACCEPTED: Guidance("The manifest was read and is valid.", _WAIT),
    Reason.PREPARING: Guidance("A pod without a GPU checks the model, the dataset and the output.", _WAIT),
    Reason.PREPARED: Guidance("Model, dataset and output were checked.", _WAIT),
    Reason.SCHEDULING: Guidance("The training pod waits for a node, its image or its volumes.", _WAIT),
    Reason.QUEUED: Guidance("The training Job waits in its queue, and holds no node.", _WAIT),
    Reason.SUSPENDED_BY_USER: Guidance(
        "spec.suspend is true: no pod runs; what was trained is kept in the last checkpoint.",
        "Set spec.suspend to false to go on.",
    ),
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
        "Set spec.output.ifExists to Skip or Overwrite, or choose another spec.output.uri.",
    ),
    Reason.NON_FINITE_LOSS: Guidance(
        "The loss became NaN or infinite.",
        "See the message; usually a lower spec.training.learningRate, or a correction of the dataset.",
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
    Reason.RETRIES_EXHAUSTED: Guidance(
        "Every attempt that spec.retries.maxAttempts allows has failed; the message has the last one's cause.",
        "Mend the cause; then create the QLoRAJob anew, under the same name: it goes on from its last checkpoint.",
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
        _AGAIN,
    ),
    Reason.PREEMPTED: Guidance("The pod had to make room for one of a higher priority.", _AGAIN),
    Reason.EVICTED: Guidance(
        "The node ran short of disk or memory and stopped the pod; the message is the kubelet's.",
        "Give the node more disk for emptyDir volumes, or choose larger nodes with spec.resources.nodeSelector.",
    ),
    Reason.NODE_LOST: Guidance("The pod's node does not answer any more.", _AGAIN),
    Reason.POD_LOST: Guidance(
        "The pod vanished without a last word.",
        _AGAIN,
    ),
    Reason.HEARTBEAT_LOST: Guidance(
        "The run gave no sign of life for spec.deadlines.heartbeat, and was stopped so that it holds no GPU.",
        "Read the stack dumps under hangs/ in status.output.prefix; or raise spec.deadlines.heartbeat.",
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
