"""Progress lines and the reasons for which a machine cannot run the test cluster."""

import sys


class Unavailable(Exception):  # noqa: N818  a condition of the machine, not a fault of the code
    """This machine cannot run what was asked for; the message says why and what to do instead."""


HOW_TO_RUN = "run as root on Debian (`sudo -E make test`), or set QLORA_TEST_KUBECONFIG to a cluster you have"


def say(message: str) -> None:
    """Print a progress message for the person who waits."""
    sys.stderr.write(f"test cluster: {message}\n")
    sys.stderr.flush()
