"""Writing files so that a crash, a kill or a full disk never costs one that was already there."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from slimbridge.errors import RunError

if sys.platform != "win32":
    import fcntl


def write_file(path: Path, content: bytes | str) -> None:
    """Write all or nothing: to a temporary file in the same folder, then renamed over the old one.

    Raises:
        RunError: the folder is missing or not writable, or the disk is full; the old file is as it was.
    """
    data = content.encode() if isinstance(content, str) else content
    temporary = None
    try:
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    except OSError as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold a file's lock; it goes with the process, however that ends. Where the system has no such locks, nothing.

    Raises:
        RunError: another process holds it, or the file cannot be made.
    """
    try:
        file = path.open("w")
    except OSError as error:
        raise RunError(f"{path}: cannot be written: {error.strerror or error}") from error
    with file:
        if sys.platform != "win32":
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise RunError(f"{path.parent}: another process is working in it") from error
        yield


def make_folder(path: Path) -> None:
    """Make a folder and those above it; RunError when that cannot be done."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{path}: cannot be made: {error.strerror or error}") from error


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
