"""A content-addressed store on disk: compressed entries that carry their own digest.

An entry is 32 bytes of SHA-256 and then the compressed payload. A torn or altered entry does not
match its digest, is removed, and reads as absent, so that it is made anew.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import tempfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import platformdirs

from jaxbench.errors import StorageError

_DIGEST_BYTES = 32


def cache_dir() -> Path:
    """Returns the folder of the cache: $JAXBENCH_CACHE, or the user's cache folder."""
    return Path(os.environ.get("JAXBENCH_CACHE") or platformdirs.user_cache_dir("jaxbench"))


def key_of(*parts: Any) -> str:
    """Returns the hexadecimal SHA-256 of JSON-ready values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def read_entry(kind: str, key: str) -> bytes | None:
    """Returns the payload, or None where there is none or what lies there is damaged."""
    path = _path(kind, key)
    with storage_errors(path):
        try:
            raw = path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None
    digest, packed = raw[:_DIGEST_BYTES], raw[_DIGEST_BYTES:]
    if hashlib.sha256(packed).digest() != digest:
        path.unlink(missing_ok=True)
        return None
    return zlib.decompress(packed)


def write_entry(kind: str, key: str, payload: bytes) -> None:
    """Writes an entry whole or not at all.

    Raises:
      StorageError: if the disk is full or the folder is not writable.
    """
    packed = zlib.compress(payload, level=1)
    path = _path(kind, key)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            try:
                file.write(hashlib.sha256(packed).digest() + packed)
                file.flush()
                os.replace(file.name, path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


@contextlib.contextmanager
def storage_errors(path: Path) -> Iterator[None]:
    """Turns what the operating system says about a path into one line."""
    try:
        yield
    except OSError as error:
        advice = {
            errno.ENOSPC: "free some space",
            errno.EDQUOT: "free some space",
            errno.EACCES: "choose a folder that you may write",
            errno.EROFS: "choose a folder that you may write",
        }.get(error.errno or 0, "choose another folder")
        raise StorageError(
            f"Cannot write {path}: {os.strerror(error.errno or 0)}. Finished work is kept; "
            f"{advice} and start again."
        ) from error


@contextlib.contextmanager
def locked(kind: str, key: str) -> Iterator[None]:
    """Holds the entry's lock, so that two processes do not make the same entry twice.

    The kernel frees the lock when its holder ends, however it ends.
    """
    path = _path(kind, key).with_suffix(".lock")
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _path(kind: str, key: str) -> Path:
    return cache_dir() / kind / key[:2] / key[2:]
