"""Where huggingface_hub keeps its cache on this machine, and whether it is to be used without network."""

import os
from pathlib import Path
from typing import Final

from qlora_cli.uris import to_absolute_path, to_display_path

_TRUE: Final = frozenset({"1", "ON", "YES", "TRUE"})


def hub_caches(mirror: str | None) -> tuple[Path, ...]:
    """Return the folders with the layout of a hub cache: the mirror, or the cache of huggingface_hub."""
    if mirror:
        return (to_absolute_path(to_display_path(mirror), "--hub-mirror"),)
    home = os.environ.get("HF_HOME") or f"{os.environ.get('XDG_CACHE_HOME') or '~/.cache'}/huggingface"
    cache = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE") or f"{home}/hub"
    return (to_absolute_path(cache, "HF_HUB_CACHE, HF_HOME or XDG_CACHE_HOME"),)


def offline_hub_cache() -> str | None:
    """Return the hub's cache if HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set, as huggingface_hub reads them."""
    if any(os.environ.get(name, "").upper() in _TRUE for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")):
        return str(hub_caches(None)[0])
    return None
