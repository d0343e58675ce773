"""Outputs that are whole or not there."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from unipic_jax.core.errors import InputError


@contextlib.contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A temporary folder beside `target` that takes its name at the end, and is removed on error.

    Raises InputError where the target exists and is not empty, or cannot be written.
    """
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise InputError(f"{target} exists already; remove it or choose another folder")
    partial = partial_name(target, os.getpid())
    try:
        partial.mkdir(parents=True)
        yield partial
        if target.exists():
            target.rmdir()
        partial.rename(target)
    except OSError as e:
        raise InputError(f"{target} cannot be written: {e.strerror or e}") from e
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def partial_name(target: Path, process: int) -> Path:
    """What a folder is called while that process writes it."""
    return target.absolute().with_name(f".{target.absolute().name}.partial-{process}")


@contextlib.contextmanager
def new_file(target: Path) -> Iterator[Path]:
    """A temporary file beside `target`, of the same suffix, that takes its name at the end."""
    target = Path(target)
    partial = target.with_name(f".{target.stem}.partial-{os.getpid()}{target.suffix}")
    try:
        yield partial
        partial.replace(target)
    except OSError as e:
        raise InputError(f"{target} cannot be written: {e.strerror or e}") from e
    finally:
        partial.unlink(missing_ok=True)


def check_writable(target: Path) -> None:
    """Raises InputError where a file could not be made there; called before long work."""
    folder = Path(target).absolute().parent
    if not folder.is_dir():
        raise InputError(f"{folder} is not a folder; make it, or choose another output")
    if Path(target).is_dir() or not os.access(folder, os.W_OK):
        raise InputError(f"{target} cannot be written; choose another output")
