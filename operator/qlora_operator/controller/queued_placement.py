"""Updates which nodes a Job avoids while it waits in a queue: when its turn comes, they may be the only free ones.

Kubernetes lets the node affinity of a suspended Job change (KEP-2926), and Kueue does not queue it again for that.
"""

import logging

from qlora_api.names import Role
from qlora_operator.cluster.interface import AdmissionDeniedError, Cluster
from qlora_operator.lifecycle import ReconcileContext
from qlora_operator.lifecycle.node_health import avoided_nodes
from qlora_operator.models import ChildJob, Job, Manifest, Observation
from qlora_operator.resources import build_avoided_nodes

_log = logging.getLogger(__name__)


async def refresh_avoided_nodes(job: Job, children: Observation, cluster: Cluster, context: ReconcileContext) -> None:
    """Let queued Jobs avoid the nodes that a new attempt would; one whose change is refused keeps those that it has."""
    for patch in outdated_avoided_nodes(job, children, context):
        try:
            await cluster.patch(patch)
        except AdmissionDeniedError as error:
            _log.info("%s keeps the nodes that it avoids: %s", job.ref, error)


def outdated_avoided_nodes(job: Job, children: Observation, context: ReconcileContext) -> list[Manifest]:
    """Return the patches of queued training Jobs that avoid other nodes than a new attempt would."""
    if not context.node_failures_known or job.skew.unreadable:
        return []
    avoided = avoided_nodes(job.status.attempts, context.quarantined_nodes, context.now)
    return [
        build_avoided_nodes(job.ref, child, tuple(avoided))
        for child in children.jobs
        if _is_queued(child) and set(child.avoided_nodes) != set(avoided)
    ]


def _is_queued(child: ChildJob) -> bool:
    """Return whether a training Job waits, and its queue is not about to start it."""
    waits = child.suspended and not (child.finished or child.deleting)
    about_to_start = child.workload is not None and child.workload.quota_reserved
    return child.role is Role.TRAIN and waits and not about_to_start
