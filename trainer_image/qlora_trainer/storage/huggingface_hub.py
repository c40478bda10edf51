"""Reads from a Hugging Face hub, and its errors turned into reasons; the token is passed along, never stored."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

import httpx2
from huggingface_hub import HfApi, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils.tqdm import tqdm

from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.liveness import LIVENESS
from qlora_trainer.storage.store import FieldRef

RepoType: TypeAlias = Literal["model", "dataset"]

_TIMEOUT_SECONDS: Final = 20.0
PUBLIC_HUB: Final = "https://huggingface.co"


class _LivenessProgressBar(tqdm):
    """A progress bar whose every move is a sign of life; the library moves it whether it is shown or not."""

    def update(self, n: float | None = 1) -> None:
        """Take note of a part."""
        LIVENESS.tick()
        super().update(n)


@dataclass(frozen=True)
class Hub:
    """One hub, asked with one token on behalf of one field of the spec."""

    field_ref: FieldRef
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)

    def resolve(self, name: str, revision: str, repo_type: RepoType = "model") -> tuple[str, tuple[str, ...]]:
        """Return the commit of a revision, and the names of its files."""
        api = HfApi(endpoint=self.endpoint, token=self._token)
        with self._translating_errors(f"{name}@{revision}"):
            ask = api.dataset_info if repo_type == "dataset" else api.model_info
            info = ask(name, revision=revision, timeout=_TIMEOUT_SECONDS)
        files = tuple(sorted(sibling.rfilename for sibling in info.siblings or ()))
        return str(info.sha), files

    def download(self, name: str, commit: str, file: str, cache: Path, repo_type: RepoType = "model") -> Path:
        """Return the local path of one file of a commit."""
        with self._translating_errors(f"{name}/{file}@{commit}"):
            path = hf_hub_download(
                name,
                file,
                revision=commit,
                repo_type=repo_type,
                cache_dir=cache,
                endpoint=self.endpoint,
                token=self._token,
                tqdm_class=_LivenessProgressBar,
            )
        return Path(str(path))

    @property
    def _token(self) -> str | Literal[False]:
        # None would make the library look for a token of whoever uses this computer.
        return self.token or False

    @contextlib.contextmanager
    def _translating_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except LocalEntryNotFoundError as error:
            # The library's word for "not in the cache, and the hub could not be reached"; the cause says why.
            raise self._to_run_error(what, error.__cause__ or error) from error
        except (HfHubHTTPError, EntryNotFoundError, OfflineModeIsEnabled, httpx2.HTTPError) as error:
            raise self._to_run_error(what, error) from error

    def _to_run_error(self, what: str, error: BaseException) -> RunError:
        where = f"{self.field_ref.field}: {what} on {self.endpoint or PUBLIC_HUB}"
        status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else 0
        if isinstance(error, GatedRepoError) or status in {401, 403}:
            return self._no_access(where, status)
        missing = isinstance(error, (RepositoryNotFoundError, RevisionNotFoundError, EntryNotFoundError))
        if missing or status == 404:
            return RunError(
                self.field_ref.not_found, f"{where}: there is no such repository, revision or file; correct the URI"
            )
        if status == 429:
            return RunError(
                Reason.HUB_RATE_LIMITED, f"{where}: too many requests; wait, use a token or set up a mirror"
            )
        return RunError(
            Reason.HUB_UNAVAILABLE,
            f"{where}: {type(error).__name__} {status or ''}; check the network, or set up a mirror",
        )

    def _no_access(self, where: str, status: int) -> RunError:
        token = "the token in use" if self.token else "anonymous requests"
        return RunError(
            Reason.GATED_MODEL_NO_ACCESS,
            f"{where}: the hub refuses {token} ({status}). The repository is gated, private or missing: accept its "
            f"licence on the hub, and name a Secret with a valid HF_TOKEN in spec.{self.field_ref.role}.secretRef",
        )
