"""Signs requests to S3 with the keys that the mounted Secret has at that time: a run outlives their rotation."""

from typing import Any

import boto3
import botocore.credentials
import botocore.session

from qlora_trainer.storage.credentials import Credentials

_ID, _SECRET, _TOKEN = "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"


def make_session(credentials: Credentials) -> boto3.session.Session:
    """Return a session with the keys of a Secret; without any, with boto3's own default chain."""
    if credentials.folder is None or not (credentials.get(_ID) and credentials.get(_SECRET)):
        return boto3.session.Session(
            aws_access_key_id=credentials.get(_ID),
            aws_secret_access_key=credentials.get(_SECRET),
            aws_session_token=credentials.get(_TOKEN),
        )
    session = botocore.session.get_session()
    session.get_component("credential_provider").providers.insert(0, _MountedKeysProvider(credentials))
    return boto3.session.Session(botocore_session=session)


class _MountedKeys(botocore.credentials.Credentials):
    """Keys that are read for each request: an expired one is denied, and the next request has the new one."""

    def __init__(self, credentials: Credentials) -> None:
        super().__init__(credentials.keys[_ID], credentials.keys[_SECRET], credentials.get(_TOKEN), method="secret")
        self._source = credentials

    def get_frozen_credentials(self) -> Any:
        """Return the keys for one request."""
        now = self._source.reread()
        return botocore.credentials.ReadOnlyCredentials(now.get(_ID), now.get(_SECRET), now.get(_TOKEN))


class _MountedKeysProvider(botocore.credentials.CredentialProvider):
    """First in botocore's chain, as keys given to a session are."""

    METHOD = "qlora-secret"

    def __init__(self, credentials: Credentials) -> None:
        super().__init__()
        self._credentials = credentials

    def load(self) -> botocore.credentials.Credentials:
        """Return the keys."""
        return _MountedKeys(self._credentials)
