"""Requests and results of the commands that load a published adapter locally: `qlora merge` and `qlora chat`."""

from qlora_api.accelerators import DeviceName
from qlora_api.base import ApiModel
from qlora_api.report import MergeReport
from qlora_api.v1alpha1 import MergeBase


class MergeRequest(ApiModel):
    """Merge a published adapter with its base, into a folder."""

    adapter: str
    """URI of a published adapter."""
    target: str
    """Path of the folder to write."""
    base: MergeBase = "original"
    model: str | None = None
    """URI of the base model; default: the one recorded with the adapter."""


class MergedFolder(ApiModel):
    """A merged model in a local folder: what `qlora merge -o json` prints."""

    folder: str
    adapter: str
    """URI of the adapter that was merged."""
    base_model: str
    base_commit: str | None
    """None if the request named another model than the one recorded with the adapter."""
    merge: MergeReport


class ChatRequest(ApiModel):
    """Load adapters of one base model for a chat."""

    adapters: tuple[str, ...]
    """URIs of published adapters."""
    device: DeviceName
    model: str | None = None
    """URI of the base model; default: the one recorded with the adapters."""


class GenerationConfig(ApiModel):
    """How answers are generated."""

    max_new_tokens: int
    """Maximum tokens per answer."""
    temperature: float = 0.0
    """0 is greedy decoding."""
    seed: int = 0
    system: str = ""
    """System message of a chat."""


class Reply(ApiModel):
    """One answer of the base model or of an adapter."""

    by: str
    """"base", or the adapter's name."""
    text: str
    complete: bool
    """Whether it ended with an end-of-text token; False: it was cut off at max_new_tokens."""


class ChatTurn(ApiModel):
    """One question with the answer of each model: a line of `qlora chat -o json`."""

    question: str
    replies: tuple[Reply, ...]
