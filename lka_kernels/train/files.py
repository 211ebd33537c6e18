"""Writes files so that a crash or a full disk leaves the old file or the new, never half a one.

Names of files and classes need not be UTF-8; Python holds a byte that is not as a lone surrogate.
Text files get the bytes themselves back, JSON and YAML escape the surrogate and give it back when
they are read, and what can hold neither (a terminal, a picture, TensorBoard) gets :func:`shown`.
"""

from __future__ import annotations

import errno
import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import TrainError

_FULL = (errno.ENOSPC, errno.EDQUOT)
_PREFIX = ".partial-"


def write_atomically(path: str | Path, write: Callable[[Path], None]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then puts it in place.

    The data reach the disk before the name does (fsync of the file, rename, fsync of the
    folder), so that after a power cut too the name leads to a whole file.

    Raises:
        TrainError: the disk is full or cannot be written; names ``path``. What stood there is
            untouched.
    """
    path = Path(path)
    temporary = path.with_name(f"{_PREFIX}{path.name}")
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        problem = disk_problem(error, path)
        if problem is not None:
            raise problem from error
        raise


def write_bytes(path: str | Path, content: bytes) -> None:
    """Atomic counterpart of ``Path.write_bytes``."""
    write_atomically(path, lambda temporary: _write_all(temporary, content))


def write_text(path: str | Path, content: str) -> None:
    """Atomic counterpart of ``Path.write_text``: UTF-8, and names byte for byte."""
    write_bytes(path, content.encode("utf-8", "surrogateescape"))


def shown(text: str) -> str:
    """``text`` with every byte that is not UTF-8 as ``\\xNN``: for what takes no such bytes."""
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def write_json(path: str | Path, content: Any) -> None:
    """Writes indented JSON atomically."""
    write_text(path, json.dumps(content, indent=2) + "\n")


def write_torch(path: str | Path, content: Any) -> None:
    """Writes ``torch.save`` output atomically.

    It is serialised in memory first: torch turns an OSError inside its writer into a
    RuntimeError that no longer says that the disk is full.
    """
    import torch

    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_bytes(path, buffer.getvalue())


def disk_problem(error: BaseException, path: str | Path) -> TrainError | None:
    """A TrainError for an error that means the disk is full or not writable, else None."""
    number = getattr(error, "errno", None)
    text = str(error)
    # safetensors reports the operating system's error in its text only.
    if number in _FULL or "os error 28" in text or "No space left" in text:
        return TrainError(
            f"the disk is full: {path} could not be written. All that was saved before is intact; "
            "free some space, then continue with --resume"
        )
    if isinstance(error, OSError) and not isinstance(error, InterruptedError):
        return TrainError(f"{path} could not be written: {error}")
    return None


def remove_partial(folder: Path) -> None:
    """Removes temporary files that a killed process left."""
    for path in folder.glob(f"{_PREFIX}*"):
        path.unlink(missing_ok=True)


def _write_all(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
