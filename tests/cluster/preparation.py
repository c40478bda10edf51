"""Builds everything that takes minutes the first time, before the tests start: tests have timeouts and no output."""

import os
from collections.abc import Callable

from tests.cluster.host.progress import Unavailable, say
from tests.cluster.node.images import build_own_image, named_image
from tests.cluster.node.node import ensure_node_possible
from tests.cluster.programs.binaries import (
    CLIENT_PROGRAMS,
    CONTROL_PLANE_PROGRAMS,
    CONTROLLERS,
    NODE_PROGRAMS,
    build_programs,
)


def prepare(*, node: bool, controllers: bool = False) -> None:
    """Make what a cluster needs that is not there yet; without what a node needs where there can be none."""
    if os.environ.get("QLORA_TEST_KUBECONFIG"):
        build_programs(CLIENT_PROGRAMS)
        return
    with_node = node and succeeds_here(ensure_node_possible)
    controllers_too = CONTROLLERS if controllers else ()
    # In one go: what is compiled for one program serves the others.
    build_programs((*CONTROL_PLANE_PROGRAMS, *controllers_too, *(NODE_PROGRAMS if with_node else ())))
    if with_node:
        succeeds_here(build_images)


def succeeds_here(step: Callable[[], None]) -> bool:
    """Take a step towards a node; where this machine cannot, say why."""
    try:
        step()
    except Unavailable as reason:
        say(f"the tests that need a node will be skipped: {reason}")
        return False
    return True


def build_images() -> None:
    """Make the repository's images, but those that the environment names."""
    for target in ("operator", "trainer"):
        if not named_image(target):
            say(f"building the {target}'s image (minutes the first time)")
            build_own_image(target)
