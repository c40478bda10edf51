"""The contract between manifest, operator, trainer and command line; its only third-party import is pydantic."""

from typing import Final

__version__: Final = "0.1.0"
"""The release; images carry this file and no package metadata."""
