"""Every metric of the operator and of the trainer; the metric reference is generated from these definitions.

Names follow Prometheus's conventions: base units, `_total` for counters, and the unit before it. Labels have few
values; `series` bounds the cardinality of each metric.
"""

from dataclasses import dataclass
from enum import StrEnum
from typing import Final

PORT: Final = 9464
"""Port of a training pod's metrics endpoint; the default of OpenTelemetry's Prometheus exporters."""
PORT_NAME: Final = "metrics"
"""The port's name in the pod, for a PodMonitor."""
PATH: Final = "/metrics"


class MetricType(StrEnum):
    """Prometheus metric types."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True)
class Metric:
    """One metric."""

    name: str
    kind: MetricType
    help: str
    labels: tuple[str, ...] = ()
    series: str = "1"
    """Upper bound of the number of series, for the reference."""
    buckets: tuple[float, ...] = ()
    """Upper bounds of a histogram, in seconds."""

    @property
    def constructor_args(self) -> tuple[str, str, tuple[str, ...]]:
        """Return the first arguments of a metric's constructor in prometheus_client."""
        return self.name, self.help, self.labels


_CALL_BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_STEP_BUCKETS: Final = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_UPLOAD_BUCKETS: Final = (0.1, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 900.0)
_WAIT_BUCKETS: Final = (10.0, 30.0, 60.0, 300.0, 900.0, 1800.0, 3600.0, 14_400.0, 43_200.0, 86_400.0, 604_800.0)
_RUN_BUCKETS: Final = (60.0, 300.0, 900.0, 1800.0, 3600.0, 7200.0, 14_400.0, 28_800.0, 86_400.0, 259_200.0, 604_800.0)

BUILD: Final = Metric(
    "qlora_operator_build_info", MetricType.GAUGE, "The operator's version, as a label; always 1.", ("version",)
)
LEADER: Final = Metric(
    "qlora_operator_leader",
    MetricType.GAUGE,
    "1 in the replica that is the leader and works; 0 in replicas on standby, and while it starts or is unhealthy.",
)
RECONCILES: Final = Metric(
    "qlora_operator_reconcile_total",
    MetricType.COUNTER,
    "Reconciles of a QLoRAJob, by result: success; busy, which is retried; error, which is a bug of the operator.",
    ("result",),
    "3",
)
RECONCILE_SECONDS: Final = Metric(
    "qlora_operator_reconcile_duration_seconds",
    MetricType.HISTOGRAM,
    "Time of a reconcile.",
    buckets=_CALL_BUCKETS,
)
RECONCILE_ERRORS: Final = Metric(
    "qlora_operator_reconcile_errors_total",
    MetricType.COUNTER,
    "Reconciles that ended with an error, by its type; its message is in the condition Reconciling of the QLoRAJob.",
    ("error",),
    "the types that occur, about 5",
)
STALLED: Final = Metric(
    "qlora_operator_stalled_seconds",
    MetricType.GAUGE,
    "Time for which no reconcile has succeeded although some are due, or since startup began while it has not ended.",
)
NAMESPACE_SERVED: Final = Metric(
    "qlora_operator_namespace_served",
    MetricType.GAUGE,
    "1 if the operator can list and watch a namespace of watchNamespaces (without them: all), else 0; also 0 for a "
    "namespace that is left to another installation.",
    ("namespace",),
    "the watched namespaces",
)
API_REQUESTS: Final = Metric(
    "qlora_operator_api_requests_total",
    MetricType.COUNTER,
    "Requests to the API server, by HTTP status code; none if it did not respond. Watches are not counted.",
    ("verb", "code"),
    "5 verbs x the statuses that occur, about 30",
)
API_SECONDS: Final = Metric(
    "qlora_operator_api_request_duration_seconds",
    MetricType.HISTOGRAM,
    "Time of a request to the API server.",
    ("verb",),
    "5",
    _CALL_BUCKETS,
)
QUEUE_DEPTH: Final = Metric("qlora_operator_queue_depth", MetricType.GAUGE, "QLoRAJobs in the work queue.")
QUEUE_AGE: Final = Metric(
    "qlora_operator_queue_oldest_age_seconds",
    MetricType.GAUGE,
    "Age of the oldest item in the work queue, including the time in which it is being reconciled.",
)
JOBS: Final = Metric("qlora_jobs", MetricType.GAUGE, "QLoRAJobs that exist, by phase.", ("phase",), "10 phases")
JOBS_FINISHED: Final = Metric(
    "qlora_jobs_finished_total",
    MetricType.COUNTER,
    "QLoRAJobs that ended while this replica was the leader, by phase (Succeeded, Failed) and reason.",
    ("phase", "reason"),
    "the reasons that occur, about 40",
)
ATTEMPTS: Final = Metric(
    "qlora_job_attempts_ended_total",
    MetricType.COUNTER,
    "Training attempts that ended while this replica was the leader, by reason.",
    ("reason",),
    "the reasons that occur, about 30",
)
NODE_FAILURES: Final = Metric(
    "qlora_node_attempts_failed_total",
    MetricType.COUNTER,
    "Training attempts that ended because of their node while this replica was the leader, by node.",
    ("node",),
    "nodes that failed",
)
NODES_QUARANTINED: Final = Metric(
    "qlora_nodes_quarantined",
    MetricType.GAUGE,
    "Nodes that no new attempt uses for now, because they ended attempts of several QLoRAJobs.",
)
JOB_WAIT_SECONDS: Final = Metric(
    "qlora_job_wait_duration_seconds",
    MetricType.HISTOGRAM,
    "Time from the creation of a QLoRAJob to the first start of its training: preparation, queue and scheduling.",
    buckets=_WAIT_BUCKETS,
)
JOB_RUN_SECONDS: Final = Metric(
    "qlora_job_run_duration_seconds",
    MetricType.HISTOGRAM,
    "Time from the first start of a QLoRAJob's training to its end, by phase (Succeeded, Failed).",
    ("phase",),
    "2",
    _RUN_BUCKETS,
)
_NAMESPACES: Final = "namespaces with QLoRAJobs"
GPU_SECONDS: Final = Metric(
    "qlora_gpu_seconds_total",
    MetricType.COUNTER,
    "GPU-seconds that training pods held, by what for, as recorded in the statuses while this replica was the leader.",
    ("namespace", "part"),
    f"6 x {_NAMESPACES}",
)
GPU_SECONDS_LOST: Final = Metric(
    "qlora_gpu_seconds_lost_total",
    MetricType.COUNTER,
    "GPU-seconds held for nothing, by the reason of the end that caused it; of a failed run all that it held.",
    ("namespace", "reason"),
    f"the reasons that occur x {_NAMESPACES}",
)
GPU_SECONDS_SAVED: Final = Metric(
    "qlora_gpu_seconds_saved_total",
    MetricType.COUNTER,
    "GPU-seconds of the training steps of results that were found published, instead of trained again.",
    ("namespace",),
    _NAMESPACES,
)
JOBS_WITHOUT_GPU: Final = Metric(
    "qlora_jobs_ended_without_gpu_total",
    MetricType.COUNTER,
    "QLoRAJobs that ended before a pod held a GPU, by reason: AlreadyPublished, or why they were refused.",
    ("namespace", "reason"),
    f"the reasons that occur x {_NAMESPACES}",
)
_RUNNING: Final = "QLoRAJobs that train, evaluate or publish"
PROGRESS: Final = Metric(
    "qlora_job_progress_ratio",
    MetricType.GAUGE,
    "Fraction of the optimizer steps done, from 0 to 1; absent when the run has no pod.",
    ("namespace", "name"),
    _RUNNING,
)
ETA: Final = Metric(
    "qlora_job_eta_seconds",
    MetricType.GAUGE,
    "Estimated time to the end of training.",
    ("namespace", "name"),
    _RUNNING,
)
LOSS: Final = Metric(
    "qlora_job_loss",
    MetricType.GAUGE,
    "Latest training loss, in nats per token.",
    ("namespace", "name"),
    _RUNNING,
)
OPERATOR: Final = (
    BUILD, LEADER, RECONCILES, RECONCILE_SECONDS, RECONCILE_ERRORS, API_REQUESTS, API_SECONDS, QUEUE_DEPTH, QUEUE_AGE,
    STALLED, NAMESPACE_SERVED,
    JOBS, JOBS_FINISHED, ATTEMPTS, NODE_FAILURES, NODES_QUARANTINED, JOB_WAIT_SECONDS, JOB_RUN_SECONDS,
    GPU_SECONDS, GPU_SECONDS_LOST, GPU_SECONDS_SAVED, JOBS_WITHOUT_GPU,
    PROGRESS, ETA, LOSS,
)  # fmt: skip
"""Metrics of every replica of the operator; a replica on standby exposes no QLoRAJob metrics."""

STEP: Final = Metric(
    "qlora_trainer_step", MetricType.GAUGE, "Optimizer steps done, including those of earlier attempts."
)
PLANNED_STEPS: Final = Metric("qlora_trainer_planned_steps", MetricType.GAUGE, "Optimizer steps of the run.")
TRAINING_LOSS: Final = Metric(
    "qlora_trainer_loss", MetricType.GAUGE, "Training loss of the last step, in nats per token."
)
HELD_OUT_LOSS: Final = Metric(
    "qlora_trainer_held_out_loss",
    MetricType.GAUGE,
    "Loss on the held-out rows at the last evaluation, in nats per token.",
)
LEARNING_RATE: Final = Metric("qlora_trainer_learning_rate", MetricType.GAUGE, "Learning rate of the last step.")
GRADIENT_NORM: Final = Metric(
    "qlora_trainer_gradient_norm", MetricType.GAUGE, "Norm of the gradients of the last step, before clipping."
)
TOKENS: Final = Metric(
    "qlora_trainer_tokens_total",
    MetricType.COUNTER,
    "Non-padding tokens that this attempt has trained on, over all processes; its rate is the throughput.",
)
TOKEN_RATE: Final = Metric(
    "qlora_trainer_tokens_per_second",
    MetricType.GAUGE,
    "Non-padding tokens per second in the last step, over all processes.",
)
STEP_SECONDS: Final = Metric(
    "qlora_trainer_step_duration_seconds", MetricType.HISTOGRAM, "Time of an optimizer step.", buckets=_STEP_BUCKETS
)
PEAK_MEMORY: Final = Metric(
    "qlora_trainer_peak_memory_bytes",
    MetricType.GAUGE,
    "Peak memory of the process so far: reserved on its GPU, or resident memory when it trains on a CPU.",
)
CHECKPOINT_SECONDS: Final = Metric(
    "qlora_trainer_checkpoint_duration_seconds",
    MetricType.HISTOGRAM,
    "Time to write and verify a checkpoint, in the background of training.",
    buckets=_UPLOAD_BUCKETS,
)
UPLOAD_SECONDS: Final = Metric(
    "qlora_trainer_upload_duration_seconds",
    MetricType.HISTOGRAM,
    "Time to upload one object to S3, including verification.",
    buckets=_UPLOAD_BUCKETS,
)
UPLOADED_BYTES: Final = Metric(
    "qlora_trainer_uploaded_bytes_total", MetricType.COUNTER, "Bytes of the objects uploaded to S3."
)
TRAINER: Final = (
    STEP, PLANNED_STEPS, TRAINING_LOSS, HELD_OUT_LOSS, LEARNING_RATE, GRADIENT_NORM, TOKENS, TOKEN_RATE, STEP_SECONDS,
    PEAK_MEMORY, CHECKPOINT_SECONDS, UPLOAD_SECONDS, UPLOADED_BYTES,
)  # fmt: skip
"""Metrics of the first process of every training pod; pod, namespace and job come from Prometheus's discovery."""
