"""HTTP server for the progress reports of running pods, in Kubeflow Trainer's status protocol.

A pod authenticates with its bound service account token, and can report for its own QLoRAJob only. Losing a report
never fails a run; silence of an attempt that has reported before, for twice its heartbeat deadline, ends the attempt.
"""

from qlora_operator.progress_server.connections import ProgressServer
from qlora_operator.progress_server.endpoint import ProgressEndpoint
from qlora_operator.progress_server.pod_authorizer import PodAuthorizer
from qlora_operator.progress_server.reports import ReportStore

__all__ = ["PodAuthorizer", "ProgressEndpoint", "ProgressServer", "ReportStore"]
