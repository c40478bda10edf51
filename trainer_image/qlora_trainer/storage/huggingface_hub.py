"""Hugging Face Hub client: maps errors to reasons; the token is passed with each call and never stored."""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, TypeAlias

import httpx2
from huggingface_hub import HfApi, hf_hub_download, hf_hub_url
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff  # type: ignore[attr-defined]
from huggingface_hub.utils.tqdm import tqdm

from qlora_api.object_names import ObjectName
from qlora_api.reasons import Reason
from qlora_trainer.errors import RunError
from qlora_trainer.runtime.liveness import LIVENESS
from qlora_trainer.storage.store import SIZE, FieldRef, check_name, report_refused

RepoType: TypeAlias = Literal["model", "dataset"]

_TIMEOUT_SECONDS: Final = 20.0
_RANGE_NOT_SATISFIABLE: Final = 416
"""The answer to a request for the first bytes of an empty file."""
PUBLIC_HUB: Final = "https://huggingface.co"
_NOT_TRUSTED: Final = "CERTIFICATE_VERIFY_FAILED"
"""What OpenSSL says of a server whose certificate no known CA has signed."""
_SHOWN_CHARACTERS: Final = 200


class _LivenessProgressBar(tqdm):
    """Progress bar that reports liveness; the library updates it whether it is displayed or not."""

    def update(self, n: float | None = 1) -> None:
        """Report liveness for a downloaded chunk."""
        LIVENESS.tick()
        super().update(n)


@dataclass(frozen=True)
class Hub:
    """Client of one hub with one token, for one field of the spec."""

    field_ref: FieldRef
    endpoint: str | None = None
    token: str | None = field(default=None, repr=False)

    def resolve(self, name: str, revision: str, repo_type: RepoType = "model") -> tuple[str, tuple[ObjectName, ...]]:
        """Resolve a revision to a commit.

        Args:
            name: Repository, such as organization/name.
            revision: Branch, tag or commit.
            repo_type: Kind of repository.

        Returns:
            The commit and the sorted names of its files.

        Raises:
            RunError: The field's not-found reason, GATED_MODEL_NO_ACCESS, HUB_RATE_LIMITED or HUB_UNAVAILABLE.

        """
        api = HfApi(endpoint=self.endpoint, token=self._token)
        with self._translating_errors(f"{name}@{revision}"):
            get_info = api.dataset_info if repo_type == "dataset" else api.model_info
            info = get_info(name, revision=revision, timeout=_TIMEOUT_SECONDS)
        root = f"{self.endpoint or PUBLIC_HUB}/{name}"
        names = sorted(sibling.rfilename for sibling in info.siblings or ())
        return str(info.sha), tuple(self._check_names(names, root))

    def _check_names(self, files: Iterable[str], root: str) -> Iterator[ObjectName]:
        for file in files:
            try:
                yield check_name(file, root, self.field_ref)
            except RunError as error:
                report_refused(file, error, None)

    def download(self, name: str, commit: str, file: str, cache: Path, repo_type: RepoType = "model") -> Path:
        """Download a file of a commit into the cache and return its path; raises like `resolve`."""
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

    def read_start(
        self, name: str, commit: str, file: str, count: int, repo_type: RepoType = "model"
    ) -> tuple[bytes, int]:
        """Return the first `count` bytes of a file of a commit, and its size; raises like `resolve`."""
        url = hf_hub_url(name, file, repo_type=repo_type, revision=commit, endpoint=self.endpoint)
        headers = {
            **build_hf_headers(token=self._token),
            "Range": f"bytes=0-{count - 1}",
            "Accept-Encoding": "identity",
        }
        with (
            self._translating_errors(f"{name}/{file}@{commit}"),
            http_stream_backoff(
                "GET", url, headers=headers, timeout=_TIMEOUT_SECONDS, follow_redirects=True
            ) as response,
        ):
            if response.status_code == _RANGE_NOT_SATISFIABLE:
                return b"", 0
            hf_raise_for_status(response)
            answer = response.headers
            size = answer.get("Content-Range", "").rpartition("/")[2] or answer.get("Content-Length", "")
            if not SIZE.fullmatch(size):
                raise RunError(
                    Reason.HUB_UNAVAILABLE,
                    f"{self.field_ref.field}: {self.endpoint or PUBLIC_HUB} does not say how long {file} is; use a "
                    "proxy that keeps Content-Length and Content-Range",
                )
            # A server that ignores the range sends the whole file, of which no more is read.
            start = bytearray()
            for chunk in response.iter_bytes():
                start += chunk
                if len(start) >= count:
                    break
            return bytes(start[:count]), int(size)

    @property
    def _token(self) -> str | Literal[False]:
        # With None the library would use the token of the local user.
        return self.token or False

    @contextlib.contextmanager
    def _translating_errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except LocalEntryNotFoundError as error:
            # Raised if the file is not in the cache and the hub cannot be reached; the cause is the actual error.
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
        if _NOT_TRUSTED in str(error):
            return RunError(
                Reason.HUB_UNAVAILABLE,
                f"{where}: its certificate is not trusted ({_first_line(error)}); name the file with its CA's "
                "certificate in SSL_CERT_FILE, or use a hub or a mirror whose CA is known",
            )
        what_failed = f"status {status}" if status else _first_line(error)
        return RunError(
            Reason.HUB_UNAVAILABLE,
            f"{where}: {type(error).__name__}, {what_failed}; check the network, or set up a mirror",
        )

    def _no_access(self, where: str, status: int) -> RunError:
        token = "the token in use" if self.token else "anonymous requests"
        return RunError(
            Reason.GATED_MODEL_NO_ACCESS,
            f"{where}: the hub refuses {token} ({status}). The repository is gated, private or missing: accept its "
            f"license on the hub, and name a Secret with a valid HF_TOKEN in spec.{self.field_ref.role}.secretRef",
        )


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or ["no further message"])[0][:_SHOWN_CHARACTERS]
