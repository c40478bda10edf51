"""Runs the operator with a skewed clock: `python -m tests.chaos.skewed SECONDS`."""

import sys
import time

import time_machine

from qlora_operator.__main__ import main

if __name__ == "__main__":
    with time_machine.travel(time.time() + float(sys.argv[1]), tick=True):
        sys.exit(main())
