"""Starts the operator: kopf, the work queue and the progress server in one event loop."""

import asyncio
import os
import sys

from qlora_operator.cluster.api import Api, load_configuration
from qlora_operator.handlers import serve
from qlora_operator.logs import configure_logs
from qlora_operator.runtime import Runtime
from qlora_operator.settings import Settings, SettingsError, read_settings


async def run(settings: Settings) -> None:
    """Run one operator until it is told to stop."""
    configuration = await load_configuration(settings.kubeconfig)
    await serve(settings, configuration, Runtime(settings, Api(configuration)))


def main() -> int:
    """Return 0 after SIGTERM, 2 for a wrong setting; anything else is raised, and ends the process with 1."""
    try:
        settings = read_settings(os.environ)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    configure_logs(settings.log_level)
    asyncio.run(run(settings))
    return 0


if __name__ == "__main__":
    sys.exit(main())
