"""Reads and writes objects in S3 or Google's storage. It is the only module that imports obstore.

Storage has no rename. An object is there whole or not at all: a small one is one request, a large one is a multipart upload,
which is invisible until its last request. Two conditions replace locks: `create` fails if the object exists (If-None-Match),
`replace` if it has changed (If-Match).

Each request that fails with a server error, a cut or a time-out is tried again with growing waits. Credentials come from the
environment, the machine's role, or the standard files; they are never in an address and never in a message.
"""

import configparser
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

from data.system import disk
from data.system.optional_package import optional_package
from data.system.retry import wait_s
from recipes.schema.credentials import without_credentials
from recipes.schema.errors import StratumError
from recipes.schema.foreign import printable
from recipes.schema.storage_rules import address_problem

PART_BYTES = 8 << 20
"""Bytes of a request for a part of a large object. S3 needs at least 5 MiB."""
_MOST_PARTS = 9_000
"""S3 allows 10,000 parts of an object, so the parts of a very large one are larger."""
_AT_ONCE = 4
"""Parts in transfer at once. Memory is bounded by this times the size of a part."""
_SMALL_BYTES = 1 << 30
"""Limit for objects that are read into memory, such as a manifest."""


class StorageError(StratumError):
    """Object storage that cannot be used as configured: no such bucket, refused credentials, an object that is missing."""


class UnreachableError(StorageError):
    """The storage did not answer, or not correctly, after all retries."""

    status = 1
    """Not 2: it may answer later, so launchers restart the run."""


class MissingError(StorageError):
    """There is no such object."""


class ChangedError(StorageError):
    """The object exists already (`create`), or another process has replaced it (`replace`)."""


@dataclass(frozen=True)
class StoredObject:
    """One object, as the server lists it."""

    name: str
    """Below the bucket's address."""
    size: int
    changed: float
    """Time of its last change in seconds since the epoch, by the server's clock."""


@dataclass(frozen=True)
class Version:
    """One version of an object, as the server names it. `replace` compares it."""

    e_tag: str | None
    version: str | None


@dataclass(frozen=True)
class Retries:
    """How failed requests are repeated."""

    count: int = 8
    first_wait_s: float = 0.5
    most_wait_s: float = 20.0
    total_s: float = 300.0
    """No new try of a request after this time."""
    timeout_s: float = 60.0
    """A request that takes longer has failed."""


class Bucket:
    """The objects below one address. Methods raise StorageError; UnreachableError if a later try may succeed."""

    def __init__(self, address: str, *, retries: Retries | None = None) -> None:
        """Connects at the first request. Raises StorageError for a wrong address, BackendError without obstore."""
        if wrong := address_problem(address):
            raise StorageError(f"{wrong} Write s3://BUCKET/PREFIX or gs://BUCKET/PREFIX.")
        self.address = address.rstrip("/")
        with optional_package("obstore", extra="storage"):
            import obstore  # optional

        self._obstore = obstore
        retries = self._retries = retries or Retries()
        settings: dict[str, Any] = {
            "client_options": {
                "timeout": timedelta(seconds=retries.timeout_s),
                "connect_timeout": timedelta(seconds=min(10.0, retries.timeout_s)),
                "allow_http": any(url.startswith("http://") for url in map(os.environ.get, _ENDPOINTS) if url),
            },
            "retry_config": {
                "max_retries": retries.count,
                "backoff": {
                    "init_backoff": timedelta(seconds=retries.first_wait_s),
                    "max_backoff": timedelta(seconds=retries.most_wait_s),
                },
                "retry_timeout": timedelta(seconds=retries.total_s),
            },
        }
        settings |= _aws_files() if address.startswith("s3://") else {}
        with self._errors(""):
            self._store: Any = obstore.store.from_url(self.address, **settings)

    def read(self, name: str) -> tuple[bytes, Version]:
        """A small object and its version. MissingError if it does not exist."""
        with self._errors(name):
            result = self._obstore.get(self._store, name)
            meta = result.meta
            if meta["size"] > _SMALL_BYTES:
                raise StorageError(f"{self.address}/{name} has {meta['size']:,} bytes, far too many for this file.")
            return bytes(result.bytes()), Version(meta.get("e_tag"), meta.get("version"))

    def create(self, name: str, content: bytes) -> Version:
        """Write a small object that must not exist. ChangedError if it does.

        A request may be carried out although its answer is lost; its repetition then finds the object. So an object with this
        very content counts as written.
        """
        return self._put(name, content, mode="create")

    def replace(self, name: str, content: bytes, *, version: Version) -> Version:
        """Replace a small object that must still be `version`. ChangedError if it is not. A lost answer: as for `create`."""
        return self._put(
            name, content, mode={key: value for key, value in asdict(version).items() if value is not None}
        )

    def _put(self, name: str, content: bytes, *, mode: Any) -> Version:
        deadline = time.monotonic() + self._retries.total_s
        for failures in range(1, self._retries.count + 1):
            try:
                with self._errors(name):
                    return _version(self._obstore.put(self._store, name, content, mode=mode, use_multipart=False))
            except (ChangedError, MissingError) as error:
                try:
                    found, now = self.read(name)
                except MissingError:
                    raise ChangedError(f"{self.address}/{name} was removed.") from error
                if found != content:
                    raise ChangedError(str(error)) from error
                return now
            except UnreachableError as error:
                # obstore repeats such a request after a server error, but not after a cut or a time-out, when it may have been
                # carried out.
                is_last = failures == self._retries.count or time.monotonic() > deadline
                if is_last or "HTTP error" not in str(error.__cause__):
                    raise
                time.sleep(wait_s(failures, first_s=self._retries.first_wait_s, most_s=self._retries.most_wait_s))
        raise AssertionError("the last try returns or raises")

    def upload(self, path: Path, name: str) -> None:
        """Copy a file to an object, in parts if it is large. The object is replaced."""
        size = path.stat().st_size
        part = max(PART_BYTES, -(-size // _MOST_PARTS))
        with self._errors(name):
            self._obstore.put(self._store, name, path, chunk_size=part, max_concurrency=_AT_ONCE)

    def download(self, name: str, path: Path, *, size: int) -> None:
        """Copy an object of `size` bytes to a new file, durably."""
        starts = range(0, size, PART_BYTES)
        with disk.new_file(path) as handle, ThreadPoolExecutor(_AT_ONCE) as pool:

            def fetch(start: int) -> None:
                length = min(PART_BYTES, size - start)
                with self._errors(name):
                    content = memoryview(self._obstore.get_range(self._store, name, start=start, length=length))
                if len(content) != length:
                    raise UnreachableError(f"{self.address}/{name}: {len(content):,} of {length:,} bytes came.")
                while content:
                    written = os.pwrite(handle, content, start + length - len(content))
                    content = content[written:]

            for _ in pool.map(fetch, starts):
                pass
            disk.sync_file(handle)

    def objects(self, prefix: str = "") -> list[StoredObject]:
        """All objects below a folder, by name; [] for an empty folder."""
        with self._errors(prefix):
            found = [entry for entries in self._obstore.list(self._store, prefix or None) for entry in entries]
        objects = [StoredObject(e["path"], e["size"], e["last_modified"].timestamp()) for e in found]
        return sorted(objects, key=lambda entry: entry.name)

    def delete(self, names: list[str]) -> None:
        """Delete objects; those that do not exist are left out."""
        for name in names:
            try:
                with self._errors(name):
                    self._obstore.delete(self._store, name)
            except MissingError:
                continue

    @contextmanager
    def _errors(self, name: str) -> Iterator[None]:
        """Turn obstore's errors into ours, with the address and without credentials."""
        errors = self._obstore.exceptions
        place = f"{self.address}/{name}".rstrip("/")
        try:
            yield
        except (OSError, errors.BaseError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of a local file
            raise self._translated(error, place) from error

    def _translated(self, error: Exception, place: str) -> StorageError:
        errors = self._obstore.exceptions
        if "NoSuchBucket" in str(error):
            bucket = "/".join(self.address.split("/")[:3])
            return StorageError(f"there is no bucket {bucket}. Create it, or name another.")
        if _REFUSED.search(str(error)):  # a listing has no class of its own for it
            error = errors.PermissionDeniedError(str(error))
        match error:
            case FileNotFoundError():  # obstore's class for an object that does not exist
                return MissingError(f"{place} does not exist.")
            case errors.AlreadyExistsError() | errors.PreconditionError():
                return ChangedError(f"{place} was written by another process.")
            case errors.PermissionDeniedError() | errors.UnauthenticatedError():
                return StorageError(
                    f"{place}: the storage refuses the credentials of this process ({_reason(error)}). Set them in the "
                    f"environment or in the standard files, and check what they allow (docs/storage.md)."
                )
            case errors.NotSupportedError() | errors.UnknownConfigurationKeyError() | errors.InvalidPathError():
                return StorageError(f"{place}: {_reason(error)}.")
        return UnreachableError(f"{place}: {_reason(error)}.")


_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT", "STORAGE_EMULATOR_HOST")
"""Variables with the address of another server than AWS's or Google's. With http:// it needs no certificate."""
_FROM_ENVIRONMENT = (
    "AWS_ACCESS_KEY_ID", "AWS_WEB_IDENTITY_TOKEN_FILE", "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI", "AWS_SKIP_SIGNATURE",
)  # fmt: skip
"""Variables by which obstore finds credentials itself, before it asks the machine's role."""
_REFUSED = re.compile(r"status code: 40[13]\b")
_REASON = re.compile(
    r"<Message>([^<]{1,200})|with status ([0-9]{3}[^:\n]{0,60})|after [0-9]+ retries[^\n]*: ([^\n]{1,200})"
)


def _aws_files() -> dict[str, str]:
    """Keys and region of the profile AWS_PROFILE in ~/.aws/credentials and ~/.aws/config, which obstore does not read.

    Variables of the environment win. Profiles that name a program or a single sign-on have no keys and are left out.
    """
    wanted = {"aws_access_key_id", "aws_secret_access_key", "aws_session_token", "region"}
    if any(os.environ.get(name) for name in _FROM_ENVIRONMENT):
        wanted = {"region"}
    if any(os.environ.get(name) for name in ("AWS_REGION", "AWS_DEFAULT_REGION")):
        wanted.discard("region")
    profile = os.environ.get("AWS_PROFILE", "default")
    found: dict[str, str] = {}
    for variable, name in (("AWS_CONFIG_FILE", "config"), ("AWS_SHARED_CREDENTIALS_FILE", "credentials")):
        parser = configparser.RawConfigParser()
        try:
            parser.read(os.environ.get(variable) or Path.home() / ".aws" / name)
        except (configparser.Error, UnicodeDecodeError, RuntimeError):
            continue  # RuntimeError: no home folder. A damaged file holds no keys; the server then refuses the request
        for section in (profile, f"profile {profile}"):
            if parser.has_section(section):
                found |= {key: value for key, value in parser.items(section) if key in wanted and value}
    return found


def _version(result: Any) -> Version:
    return Version(result.get("e_tag"), result.get("version"))


def _reason(error: Exception) -> str:
    """What the server or the system said, in one line without credentials."""
    text = str(error)
    if match := _REASON.search(text):
        text = next(filter(None, match.groups()))
    text = text.split("\n\nDebug source")[0]
    return printable(without_credentials(" ".join(text.split())), most=300).rstrip(".")
