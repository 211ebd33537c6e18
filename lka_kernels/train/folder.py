"""The folder of a run: whether it may be used, who holds it, and its configuration."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path
from typing import Any

from .errors import TrainError
from .files import disk_problem, remove_partial, write_text

CONFIG_NAME = "config.yaml"
_LOCK = ".lock"


def check_free(folder: Path, resume: bool, overwrite: bool) -> None:
    """Raises TrainError where a run in ``folder`` would harm what stands there."""
    if folder.exists() and not folder.is_dir():
        raise TrainError(f"--out {folder} is a file")
    if not folder.is_dir() or not any(p for p in folder.iterdir() if not p.name.startswith(".")):
        return
    if not (folder / CONFIG_NAME).exists():
        raise TrainError(f"--out {folder} holds other files than a run's: choose another folder")
    if not resume and not overwrite:
        raise TrainError(
            f"--out {folder} holds a run already: continue it with --resume, replace it with "
            "--overwrite, or choose another folder"
        )


class RunFolder:
    """An opened run folder; other processes are kept out until it is closed."""

    def __init__(self, path: Path, overwrite: bool = False):
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = os.open(path / _LOCK, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            raise disk_problem(error, path) or error from error
        try:
            # The kernel drops this lock when the process ends, however it ends.
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(self._lock)
            raise TrainError(f"--out {path} is in use by another running process") from error
        try:
            if overwrite:
                self._clear()
            remove_partial(path)
        except BaseException:
            os.close(self._lock)
            raise

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, *exception) -> None:
        os.close(self._lock)

    def saved_config(self) -> dict[str, Any] | None:
        """What ``config.yaml`` holds; None when there is none."""
        return read_config(self.path)

    def write_config(self, values: dict[str, Any]) -> None:
        """Writes ``config.yaml``, which ``lka-train --config`` takes back."""
        import yaml

        write_text(self.path / CONFIG_NAME, yaml.safe_dump(values, sort_keys=False))

    def _clear(self) -> None:
        # The configuration goes last: until then a folder that is half cleared is still a run's.
        for path in sorted(self.path.iterdir(), key=lambda path: path.name == CONFIG_NAME):
            if path.name == _LOCK:
                continue
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink()


def read_config(path: Path) -> dict[str, Any] | None:
    """The configuration of the run in ``path``; None when there is none."""
    import yaml

    try:
        text = (path / CONFIG_NAME).read_text()
    except FileNotFoundError:
        return None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise TrainError(f"{path / CONFIG_NAME} cannot be read: {error}") from error
