"""What a person asks of a published adapter on a computer, and what comes back: `qlora merge` and `qlora chat`."""

from qlora_api.accelerators import DeviceName
from qlora_api.base import ApiModel
from qlora_api.report import MergeReport
from qlora_api.v1alpha1 import MergeBase


class MergeRequest(ApiModel):
    """An adapter to be merged into a folder."""

    adapter: str
    """URI of a published adapter."""
    target: str
    """The folder's path."""
    base: MergeBase = "original"
    model: str | None = None
    """URI of the base, where it is not the one that the adapter names."""


class MergedFolder(ApiModel):
    """A merged model in a folder of a computer: what `qlora merge -o json` prints."""

    folder: str
    adapter: str
    """URI of the adapter that was merged."""
    base_model: str
    base_commit: str | None
    """None where another model was given than the one that the adapter names."""
    merge: MergeReport


class ChatRequest(ApiModel):
    """Adapters to be asked."""

    adapters: tuple[str, ...]
    """URIs of published adapters."""
    device: DeviceName
    model: str | None = None
    """URI of the base, where it is not the one that the adapters name."""


class GenerationConfig(ApiModel):
    """How answers are made."""

    max_new_tokens: int
    """Tokens of an answer at most."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    seed: int = 0
    system: str = ""
    """What a chat starts with."""


class Reply(ApiModel):
    """What the base, or one of the adapters on it, says."""

    by: str
    text: str
    complete: bool
    """It came to its end by itself, and not to the longest that is allowed."""


class ChatTurn(ApiModel):
    """One question, answered by all: a line of `qlora chat -o json`."""

    question: str
    replies: tuple[Reply, ...]
