"""Opens the store for a URI by its scheme."""

from qlora_api.names import CLAIM_SCHEME
from qlora_api.runconfig import S3Config
from qlora_trainer.storage.credentials import Secrets
from qlora_trainer.storage.local_store import FileStore
from qlora_trainer.storage.store import FieldRef, Store


def open_store(uri: str, field_ref: FieldRef, secrets: Secrets, s3: S3Config) -> Store:
    """Return the store for a URI, with the credentials of the field's role."""
    if uri.startswith(("file://", CLAIM_SCHEME)):
        return FileStore(uri, field_ref)
    from qlora_trainer.storage.s3 import S3Store  # noqa: PLC0415 (boto3 takes a second to import)

    return S3Store(uri, field_ref, secrets.of(field_ref.role), s3)
