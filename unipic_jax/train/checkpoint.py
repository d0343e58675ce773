"""Checkpoints of a run: written while training goes on, restored onto any devices.

A folder holds one Orbax checkpoint a step. It has the state, and in its metadata a dictionary
of what else the run needs. A step takes its name once it is whole; steps that cannot be read
are set aside, and removed when a newer one is whole.
"""

import contextlib
import fcntl
import gc
import logging
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils
from orbax.checkpoint import v1 as ocp

from unipic_jax.convert.store import CHUNK
from unipic_jax.core.errors import InputError
from unipic_jax.core.params import Tree

HALF_WRITTEN = ".orbax-checkpoint-tmp"  # Orbax's suffix of a step that is not whole
ASIDE = "unreadable-"
FULL = ("No space left", "os_error_code='28'", "Disk quota", "os_error_code='122'",
        "File too large", "os_error_code='27'")

log = logging.getLogger(__name__)


class Checkpoints:
    """The checkpoints in a folder; every process of a run opens the same one, and calls alike.

    Saves every `every` steps; keeps the `keep` newest, and for good every `keep_every`th step
    (none where it is 0). Raises InputError where the folder cannot be made.
    """

    def __init__(self, folder: Path, *, every: int, keep: int, keep_every: int):
        self.folder, self.every = Path(folder).absolute(), every  # Orbax takes no other path
        self._saving: int | None = None  # the step that is being written
        self._unreadable: list[int] = []
        self._started = False
        context = ocp.Context()
        # Masters and moments hardly compress.
        context.array.saving.use_compression = False
        context.array.saving.storage_options.chunk_byte_size = CHUNK
        rules = ocp.training.preservation_policies
        kept = [rules.LatestN(keep)] + ([rules.EveryNSteps(keep_every)] if keep_every else [])
        try:
            self._orbax = ocp.training.Checkpointer(
                self.folder, context=context,
                preservation_policy=rules.AnyPreservationPolicy(kept))
        except OSError as e:
            raise InputError(f"{folder} cannot be written: {e.strerror or e}") from e

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_):
        self.close()

    @property
    def steps(self) -> list[int]:
        """The steps that are there, or being written, in order."""
        return [c.step for c in self._orbax.checkpoints]

    def save(self, step: int, state: Tree, extra: dict, *, force: bool = False) -> bool:
        """Start writing the state after `step` steps, if it is time to or `force`; whether it did.

        `state` is any tree of arrays, random keys and numbers, and may be donated afterwards;
        `extra` is what JSON can hold. Raises InputError where this save or the one before it
        failed, a full disk for instance; earlier steps stay as they are.
        """
        if not (force or step % self.every == 0):
            return False
        self._finish()
        if not self._started:
            self._set_aside()
        if step in self.steps:
            return False
        self._saving = step
        try:
            # Under a key, since Orbax reads a lost file as an empty dictionary.
            self._orbax.save_checkpointables_async(
                step, {"state": state}, force=True, custom_metadata={"extra": extra})
        except OSError as e:
            raise self._failed(e) from e
        return True

    def restore(self, abstract_state: Tree) -> tuple[int, Tree, dict] | None:
        """(step, state, extra) of the newest step that can be read, or None where there is none.

        The state comes with the shapes, types and shardings of `abstract_state`, on any number
        of devices; leaves that are `ocp.PLACEHOLDER` are not read. Raises InputError where the
        stored state is another, naming the first leaf, or where there are steps and all are
        unreadable.
        """
        steps, self._unreadable, error = self.steps, [], None
        for step in reversed(steps):
            with _quiet():
                found, error = self._read(step, abstract_state)
                if error:  # asyncio logs what a failed read left behind, when that is collected
                    gc.collect()
            if _on_all_processes(error is None):
                break
            log.warning("step %d in %s cannot be read (%s)", step, self.folder,
                        error or "by another process")
            self._unreadable.append(step)
        else:
            found = None
        if steps and found is None:
            raise InputError(f"none of the steps {steps} in {self.folder} can be read; restore a "
                             f"copy of one, or remove the folder to start anew")
        half = [s for p in self.folder.glob(f"*{HALF_WRITTEN}")
                if (s := int(p.name.removesuffix(HALF_WRITTEN))) > (found[0] if found else -1)]
        for step in half:
            log.warning("step %d in %s is only half written", step, self.folder)
        if found and (half or self._unreadable):
            log.warning("going on from step %d", found[0])
        return found

    def close(self) -> None:
        """Wait until everything is written. Raises InputError where the last save failed."""
        try:
            self._finish()
        finally:
            self._orbax.close()

    def _read(self, step, abstract_state):
        """((step, state, extra), None), or (None, why not) where the step is not whole."""
        context = ocp.Context()
        # Each process reads its own shards without waiting for the others: a file that only one
        # of them cannot read would leave the others at a barrier.
        context.multiprocessing.primary_host = jax.process_index()
        context.multiprocessing.active_processes = {jax.process_index()}
        path = self.folder / str(step)
        try:
            with context:
                about = ocp.checkpointables_metadata(path)
                extra, stored = about.custom_metadata["extra"], about.metadata["state"]
                if stored is None:
                    raise ValueError("it says nothing of its state")
                if difference := _difference(stored, abstract_state):
                    raise InputError(
                        f"the state does not fit step {step} in {self.folder}: {difference}; use "
                        f"the configuration that it was saved with, or another folder")
                loaded = ocp.load_checkpointables(path, {"state": abstract_state})
            return (step, jax.block_until_ready(loaded["state"]), extra), None
        except InputError:
            raise
        except Exception as e:  # Orbax raises many kinds for a step that is not whole
            return None, _line(e)

    def _set_aside(self):
        """Rename what could not be read, so that its steps can be saved again."""
        self._started = True
        if jax.process_index() == 0:
            names = [str(s) for s in self._unreadable]
            names += [p.name for p in self.folder.glob(f"*{HALF_WRITTEN}")]
            for name in names:
                (self.folder / name).rename(self.folder / f"{ASIDE}{name}-{time.time_ns()}")
        _on_all_processes(True)
        self._orbax.reload()

    def _finish(self):
        """Wait for the save under way; once it is whole, what was set aside may go."""
        if self._saving is None:
            return
        try:
            with _quiet():
                self._orbax.wait()
        except Exception as e:  # whatever the writing threads raised
            raise self._failed(e) from e
        self._saving = None
        if jax.process_index() == 0:
            for path in self.folder.glob(f"{ASIDE}*"):
                shutil.rmtree(path, ignore_errors=True)

    def _failed(self, error) -> InputError:
        """The line for a save that failed; removes what it left, which no one can read."""
        step, self._saving = self._saving, None
        if jax.process_index() == 0:
            shutil.rmtree(self.folder / f"{step}{HALF_WRITTEN}", ignore_errors=True)
        last = max((int(p.name) for p in self.folder.glob("*") if p.name.isdigit()), default=None)
        goes_on = "from the beginning" if last is None else f"from step {last}"
        full = any(sign in str(error) for sign in FULL)
        why = "the disk is full" if full else _line(error)
        todo = "make room" if full else "see to that"
        return InputError(f"step {step} could not be saved in {self.folder}: {why}; {todo} and "
                          f"start again: the run goes on {goes_on}")


@contextlib.contextmanager
def stopping() -> Iterator[Callable[[int], bool]]:
    """A function that says after each step whether to save and stop, since SIGTERM came.

    Under `jax.distributed` all processes are told to at the same step, and it must be called at
    every one.
    """
    if jax.distributed.is_initialized():  # its own handler is at work; ours would replace it
        yield multihost_utils.reached_preemption_sync_point
        return
    came = []
    before = signal.signal(signal.SIGTERM, lambda *_: came.append(True))
    try:
        yield lambda step: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Keep other runs out of a folder, which is made; it is free again however this one ends.

    Raises InputError, in every process, where another run is in it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as held:
        free = True
        if jax.process_index() == 0:
            try:
                lock = held.enter_context((folder / ".lock").open("a"))
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                free = False
            except OSError:  # a file system without locks, or a folder that `Checkpoints` refuses
                log.info("%s cannot be locked", folder)
        if not _on_all_processes(free):
            raise InputError(f"another run is in {folder}; wait for its end, or take another one")
        yield


def _on_all_processes(fine: bool) -> bool:
    """Whether all processes say so; waits for all."""
    return bool(np.all(multihost_utils.process_allgather(np.array(fine))))


def _difference(stored: Tree, wanted: Tree) -> str | None:
    """The first leaf in which a stored tree, of Orbax's descriptions, is not the one wanted."""
    stored, wanted = _leaves(stored), _leaves(wanted)
    for path, leaf in wanted.items():
        if path not in stored:
            return f"{path} is not stored there"
        if leaf is ocp.PLACEHOLDER or not hasattr(leaf, "shape"):
            continue
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        there = stored[path]
        here = f"{leaf.dtype}{list(leaf.shape)}"
        there = f"{there.dtype}{list(there.shape)}" if hasattr(there, "shape") else "a number"
        if here != there:
            return f"{path} is {here}, and {there} there"
    return next((f"{path} is stored there, and not part of it"
                 for path in stored if path not in wanted), None)


def _leaves(tree: Tree) -> dict[str, object]:
    """Leaves by path, the same for a dataclass or a named tuple and for what Orbax stores."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in flat}


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"


@contextlib.contextmanager
def _quiet():
    """Without Orbax's own reports of what is caught here and said in a line."""
    loggers = [logging.getLogger(n) for n in ("absl", "asyncio")]
    levels = [g.level for g in loggers]
    for g in loggers:
        g.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        for g, level in zip(loggers, levels):
            g.setLevel(level)
