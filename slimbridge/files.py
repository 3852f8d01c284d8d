"""Writing files so that a crash, a kill or a full disk never costs one that was already there."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from slimbridge.errors import RunError


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
