"""Writing checkpoints in the background while training continues."""

from __future__ import annotations

from collections.abc import Iterator
import contextlib
import os
import pathlib
import shutil
import threading
from types import TracebackType
from typing import Self

import jax

from tvq_haiku.checkpoint import checkpoints, run_directory
from tvq_haiku.checkpoint.run_directory import CheckpointError
from tvq_haiku.config import TrainConfig, TransformerConfig
from tvq_haiku.model import parameters
from tvq_haiku.parallel import multihost
from tvq_haiku.utils import files

# Orbax measures its timeout with the system clock, which may jump. No jump is as long as this.
_NO_TIMEOUT_SECONDS = 10**10


class CheckpointWriter:
  """A context manager that writes the checkpoints of a run in the background.

  A checkpoint gets its final name on disk only when it is complete. Leaving the context waits until
  the last checkpoint is written. With several processes, all of them must make the same calls.
  """

  def __init__(
    self,
    directory: str | os.PathLike,
    config: TransformerConfig,
    train_cfg: TrainConfig,
    *,
    rng_impl: str | None = None,
    max_to_keep: int = 2,
  ):
    """Creates the directory, or checks that it belongs to a run with these configurations.

    Args:
      directory: directory of the run.
      config: model configuration.
      train_cfg: training configuration.
      rng_impl: kind of the random keys of a new run, from `jax.random.key_impl`; None: it is not
        recorded, and checkpoints are loaded with the standard kind whose keys have the same size.
      max_to_keep: number of most recent checkpoints to keep; older ones are removed.

    Raises:
      CheckpointError: the directory holds a run with a different configuration.
      OSError: the directory cannot be written to.
    """
    self._path = files.prepare_directory(directory)
    if run_directory.has_checkpoint(self._path):
      run_directory.check_same_run(self._path, config, train_cfg)
      if multihost.is_main_process():
        run_directory.extend(self._path, train_cfg)
    elif multihost.is_main_process():
      run_directory.write_config(self._path, config, train_cfg, rng_impl=rng_impl)
    multihost.barrier("writer")
    self._pending: int | None = None  # updates of the checkpoint that is being written
    self._error: Exception | None = None  # why the pending checkpoint failed
    self._thread: threading.Thread | None = None
    orbax = checkpoints.orbax()
    with _raising_os_errors("checkpoints", self._steps):
      self._manager = orbax.CheckpointManager(
        self._steps,
        options=orbax.CheckpointManagerOptions(
          max_to_keep=max_to_keep,
          create=True,
          enable_async_checkpointing=True,
          async_options=orbax.AsyncOptions(timeout_secs=_NO_TIMEOUT_SECONDS),
        ),
      )

  def save(self, checkpoint: checkpoints.Checkpoint) -> None:
    """Waits for the previous checkpoint and starts to write this one in the background.

    Returns when the arrays have been copied to host memory. The caller may then donate or overwrite
    their device buffers.

    Raises:
      CheckpointError: the directory holds a checkpoint of the same or a later update.
      OSError: the previous checkpoint could not be written, or this one could not be started.
    """
    self.wait()
    step = int(checkpoint.train_state.step)
    newest = max(run_directory.saved_steps(self._path), default=None)
    if newest is not None and newest >= step:
      raise CheckpointError(
        f"{self._path} already holds a checkpoint of update {newest}; one of update {step} would "
        "not be newer. Use another directory."
      )
    tree = checkpoints.to_tree(checkpoint)
    with _raising_os_errors(f"the checkpoint of update {step}", self._steps):
      self._manager.save(step, args=checkpoints.orbax().args.StandardSave(tree), force=True)
    self._pending = step
    # A thread writes the manifest as soon as the checkpoint is complete, because the process may
    # end before the next call of `save` or `wait`.
    self._thread = threading.Thread(
      target=self._finish, args=(step,), name="checkpoint", daemon=True
    )
    self._thread.start()

  def wait(self) -> None:
    """Blocks until the last checkpoint is on disk.

    Raises:
      OSError: the checkpoint could not be written.
    """
    if self._pending is None:
      return
    self._thread.join()
    step, self._pending = self._pending, None
    error, self._error = self._error, None
    if error is not None:
      for draft in self._steps.glob(f"{step}.*tmp*"):
        shutil.rmtree(draft, ignore_errors=True)
      with _raising_os_errors(f"the checkpoint of update {step}", self._steps):
        raise error

  @property
  def _steps(self) -> pathlib.Path:
    return self._path / run_directory.STEPS_DIRECTORY

  def _finish(self, step: int) -> None:
    """Waits until orbax has written the checkpoint, then writes its manifest."""
    try:
      self._manager.wait_until_finished()
      if multihost.is_main_process():
        directory = run_directory.step_directory(self._path, step)
        files.write_manifest(directory, run_directory.MANIFEST_FILE)
    except Exception as error:  # `wait` raises it in the caller's thread
      self._error = error

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    if kind is not None and not multihost.is_single_process():
      return  # other processes may have ended, and waiting for them would block
    with contextlib.ExitStack() as stack:
      stack.callback(self._close)
      self.wait()

  def _close(self) -> None:
    with contextlib.suppress(Exception):  # `wait` has already raised writing errors
      self._manager.close()


def save_checkpoint(
  directory: str | os.PathLike, checkpoint: checkpoints.Checkpoint, *, max_to_keep: int = 2
) -> None:
  """Writes one checkpoint to the directory of a run, and returns when it is on disk.

  Args:
    directory: directory of the run, new or with older checkpoints of the same configuration.
    checkpoint: the checkpoint to write.
    max_to_keep: number of most recent checkpoints to keep; older ones are removed.

  Raises:
    CheckpointError: the directory holds a run with a different configuration, or a checkpoint of
      the same or a later update.
    ValueError: the parameters do not fit the model configuration.
    OSError: the checkpoint could not be written.
  """
  parameters.check_params(checkpoint.train_state.params, checkpoint.config)
  with CheckpointWriter(
    directory,
    checkpoint.config,
    checkpoint.train_cfg,
    rng_impl=jax.random.key_impl(checkpoint.rng),
    max_to_keep=max_to_keep,
  ) as writer:
    writer.save(checkpoint)


@contextlib.contextmanager
def _raising_os_errors(name: str, directory: pathlib.Path) -> Iterator[None]:
  """Turns exceptions of orbax and tensorstore, which have many types, into an OSError.

  Failures of other processes pass unchanged, so that the caller can recognize them.

  Args:
    name: description of what is written, for the message.
    directory: directory that it is written to, for the message.
  """
  try:
    yield
  except Exception as error:
    if multihost.is_peer_failure(error):
      raise
    raise OSError(f"cannot write {name} to {directory}: {files.short_message(error)}") from error
