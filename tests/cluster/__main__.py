"""`python -m tests.cluster up | down | build | image`: the test cluster by hand."""

import argparse
import os
import sys

from tests.cluster.cluster import Cluster, stop_cluster
from tests.cluster.host.paths import lock
from tests.cluster.host.progress import Unavailable, say
from tests.cluster.node.images import build_image
from tests.cluster.preparation import prepare
from tests.cluster.state import START_LOCK, all_states, find_state, remove_abandoned


def main() -> int:
    """Run one command; 2 says that this machine cannot do it."""
    arguments = build_parser().parse_args()
    try:
        COMMANDS[arguments.command](arguments)
    except Unavailable as reason:
        say(str(reason))
        return 2
    return 0


def build_parser() -> argparse.ArgumentParser:
    """Describe the commands."""
    parser = argparse.ArgumentParser(prog="python -m tests.cluster", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="start a cluster that runs until `down`")
    up.add_argument("--name", default="default")
    up.add_argument("--node", action="store_true", help="with a real node (root)")
    up.add_argument("--kwok", type=int, default=0, metavar="N", help="with N simulated GPU nodes")
    up.add_argument("--no-s3", action="store_true", help="without the S3 server")
    down = commands.add_parser("down", help="stop clusters and remove everything they made")
    down.add_argument("--name", help="only this one; all detached ones and what crashed ones left otherwise")
    build = commands.add_parser("build", help="build now what the first start would build")
    build.add_argument("--node", action="store_true", help="and what a node and the end-to-end tests need")
    build.add_argument("--controllers", action="store_true", help="and KWOK and Kueue")
    image = commands.add_parser("image", help="build a target of the Dockerfile and load it into the cluster")
    image.add_argument("target")
    image.add_argument("tag")
    image.add_argument("--name", default="default")
    return parser


def up(arguments: argparse.Namespace) -> None:
    """Start a cluster and say how to use it."""
    cluster = Cluster.start(arguments.name, node=arguments.node, kwok_nodes=arguments.kwok, s3=not arguments.no_s3)
    cluster.detach()
    variables = {"KUBECONFIG": str(cluster.kubeconfig)}
    if cluster.s3_server:
        variables |= cluster.s3_server.environment()
    sys.stdout.writelines(f"export {name}={value}\n" for name, value in variables.items())


def down(arguments: argparse.Namespace) -> None:
    """Stop one cluster, or all that no living process owns."""
    with lock(START_LOCK):
        remove_abandoned()
    states = [find_state(arguments.name)] if arguments.name else [state for state in all_states() if state.detached()]
    for state in states:
        stop_cluster(state, None)
        say(f"{state.name} is gone")


def build(arguments: argparse.Namespace) -> None:
    """Build what is missing."""
    prepare(node=arguments.node, controllers=arguments.controllers)


def image(arguments: argparse.Namespace) -> None:
    """Build an image and load it into a running cluster."""
    cluster = Cluster.attach(arguments.name)
    say(f"{cluster.load_image(build_image(arguments.target, arguments.tag))} is on the node")


COMMANDS = {"up": up, "down": down, "build": build, "image": image}


if __name__ == "__main__":
    os.umask(0o022)
    sys.exit(main())
