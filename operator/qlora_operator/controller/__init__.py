"""The control loop: kopf handlers, work queue, reconcile."""
