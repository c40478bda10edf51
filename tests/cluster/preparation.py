"""Builds everything that takes minutes the first time, before the tests start: tests have timeouts and no output."""

import os

from tests.cluster.binaries import (
    CLIENT_PROGRAMS,
    CONTROL_PLANE_PROGRAMS,
    CONTROLLERS,
    NODE_PROGRAMS,
    build_programs,
)
from tests.cluster.images import build_own_image, named_image
from tests.cluster.node import ensure_node_possible
from tests.cluster.progress import Unavailable, say


def prepare(*, node: bool, controllers: bool = False) -> None:
    """Make what a cluster needs that is not there yet; without what a node needs where there can be none."""
    if os.environ.get("QLORA_TEST_KUBECONFIG"):
        build_programs(CLIENT_PROGRAMS)
        return
    build_programs((*CONTROL_PLANE_PROGRAMS, *(CONTROLLERS if controllers else ())))
    if node:
        try:
            prepare_node()
        except Unavailable as reason:
            say(f"the tests that need a node will be skipped: {reason}")


def prepare_node() -> None:
    """Make the node's packages, its programs and the repository's images."""
    ensure_node_possible()
    build_programs(NODE_PROGRAMS)
    for target in ("operator", "trainer"):
        if not named_image(target):
            say(f"building the {target}'s image (minutes the first time)")
            build_own_image(target)
