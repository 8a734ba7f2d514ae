"""Safetensors files on disk, read by position straight into tensors; knows nothing of models.

Files are read, not mapped: a mapped file that is truncated kills the process (SIGBUS), a read
reports it, and both are served from the same page cache. Nothing is unpickled.
"""

import contextlib
import os
import stat
import weakref
from pathlib import Path
from typing import NamedTuple

import torch

from .headers import INDEX, SINGLE, CheckpointError, TensorSpan, read_header, read_index

__all__ = ["CheckpointError", "Shards", "TensorSpan"]

# Linux reads ahead at most the device's read-ahead window per call, 128 KiB by default
_READ_AHEAD = 128 << 10


class _File(NamedTuple):
    path: Path
    fd: int
    stamp: tuple[int, ...]  # what tells that the file is still the one that was opened


class Shards:
    """The safetensors files of a checkpoint, opened for reading.

    Owns the file descriptors. Reads carry their own positions, so any number of threads may read
    at once, and a forked child too. A file replaced by another of its name (as downloads do) is
    read on as it was opened; one that is written to in place is refused.

    Attributes:
        folder: Where the files are.
        files: Their names, in order of first mention.
        tensors: Every tensor by name.

    Args:
        folder: Holds ``model.safetensors``, or ``model.safetensors.index.json`` and its shards.
            The files themselves may be links to elsewhere, as in the cache of the hub.

    Raises:
        CheckpointError: No safetensors; an index or header that is malformed; an index that names
            something else than a .safetensors file of this folder, or a tensor that the file
            lacks; a file that is not as long as its header says.
    """

    def __init__(self, folder: Path | str):
        self.folder = Path(folder)
        self.files: list[str] = []
        self.tensors: dict[str, TensorSpan] = {}
        self._files: list[_File] = []
        fds: list[int] = []
        self._close = weakref.finalize(self, _close_all, fds)
        self._close.atexit = False  # a thread may still read then, and the process ends anyway
        try:
            if (self.folder / SINGLE).exists():
                self._add(SINGLE, fds)
            else:
                weight_map = read_index(self.folder)
                for name in dict.fromkeys(weight_map.values()):
                    self._add(name, fds, weight_map)
                if lacking := [name for name in weight_map if name not in self.tensors]:
                    raise CheckpointError(
                        f"{self.folder / INDEX} lists {lacking[0]} in {weight_map[lacking[0]]}, "
                        f"which does not hold it ({len(lacking)} such)"
                    )
        except BaseException:
            self.close()
            raise

    def _add(self, name: str, fds: list[int], weight_map: dict[str, str] | None = None) -> None:
        """Open a file and take in its tensors, those that the index finds there if there is one."""
        path = self.folder / name
        try:
            if not stat.S_ISREG(os.stat(path).st_mode):  # opening a pipe would wait
                raise CheckpointError(f"{path} is not a file")
            fds.append(fd := os.open(path, os.O_RDONLY))
            stamp = _stamp(fd)
            spans = list(read_header(path, fd, len(self.files)))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self.files.append(name)
        self._files.append(_File(path, fd, stamp))
        for span in spans:
            if weight_map is None or weight_map.get(span.name) == name:
                self.tensors[span.name] = span

    def read(self, span: TensorSpan, start: int, stop: int, out: torch.Tensor) -> None:
        """Read bytes [start, stop) of a tensor into host memory, without a copy in between.

        Args:
            span: One of :attr:`tensors`.
            start: First byte, ``>= 0``.
            stop: One past the last, ``<= span.nbytes``.
            out: uint8 ``(stop - start,)``, contiguous, on the host.

        Raises:
            ValueError: Bounds outside the tensor, or another ``out``.
            CheckpointError: The file has changed since it was opened, could not be read, or is
                closed. ``out`` then holds anything.
        """
        _check_bounds(span, start, stop)
        if out.dtype != torch.uint8 or tuple(out.shape) != (stop - start,):
            raise ValueError(
                f"out must be uint8 of shape ({stop - start},), "
                f"got {out.dtype} of shape {tuple(out.shape)}"
            )
        if out.device.type != "cpu" or not out.is_contiguous():
            raise ValueError(f"out must be contiguous on the host, got {out.device}")
        file, memory, done = self._files[span.file], memoryview(out.numpy()), 0
        try:
            self._check_open()
            while done < len(memory):
                count = os.preadv(file.fd, [memory[done:]], span.offset + start + done)
                if count == 0:
                    break
                done += count
            # after reading, so that it sees what happened before and meanwhile
            stamp = _stamp(file.fd)
        except OSError as error:
            raise CheckpointError(
                f"{file.path}: reading {stop - start:,} bytes of {span.name} failed: {error}"
            ) from error
        if stamp != file.stamp or done < len(memory):
            raise CheckpointError(
                f"{file.path} changed on disk since it was opened: it had {file.stamp[2]:,} bytes, "
                f"now {stamp[2]:,}; load the model again"
            )

    def load(self, name: str) -> torch.Tensor:
        """Return a whole tensor in new host memory.

        Raises:
            KeyError: No such tensor.
            CheckpointError: As :meth:`read`.
        """
        span = self.tensors[name]
        memory = torch.empty(span.nbytes, dtype=torch.uint8)
        self.read(span, 0, span.nbytes, memory)
        return memory.view(span.dtype).view(span.shape)

    def read_ahead(self, span: TensorSpan, start: int = 0, stop: int | None = None) -> None:
        """Ask for bytes [start, stop) in the page cache soon; a hint, which cannot fail.

        Takes about 0.2 ms per MiB of its thread (the kernel's page allocation), without the GIL.
        """
        stop = span.nbytes if stop is None else stop
        _check_bounds(span, start, stop)
        for first in range(start, stop, _READ_AHEAD):
            self._advise(span, first, min(first + _READ_AHEAD, stop), "POSIX_FADV_WILLNEED")

    def drop_cache(self, span: TensorSpan, start: int = 0, stop: int | None = None) -> None:
        """Give up the page cache of bytes [start, stop), which now live elsewhere; a hint."""
        stop = span.nbytes if stop is None else stop
        _check_bounds(span, start, stop)
        if start < stop:  # a length of 0 would mean the rest of the file
            self._advise(span, start, stop, "POSIX_FADV_DONTNEED")

    def close(self) -> None:
        """Close the files; reading is an error from now on. Can be called again."""
        self._close()

    def _advise(self, span: TensorSpan, start: int, stop: int, advice: str) -> None:
        self._check_open()
        if hasattr(os, "posix_fadvise"):
            with contextlib.suppress(OSError):
                fd = self._files[span.file].fd
                os.posix_fadvise(fd, span.offset + start, stop - start, getattr(os, advice))

    def _check_open(self) -> None:
        if not self._close.alive:
            raise CheckpointError(f"the files of {self.folder} are closed")

    def __enter__(self) -> "Shards":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Shards({str(self.folder)!r}, {len(self.files)} files, {len(self.tensors)} tensors)"


def _close_all(fds: list[int]) -> None:
    while fds:
        os.close(fds.pop())


def _stamp(fd: int) -> tuple[int, ...]:
    # device and inode: a thread that still reads while another closes may find the number reused
    found = os.fstat(fd)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _check_bounds(span: TensorSpan, start: int, stop: int) -> None:
    if not 0 <= start <= stop <= span.nbytes:
        raise ValueError(
            f"start and stop must lie in [0, {span.nbytes}], the bytes of {span.name}, "
            f"got {start} and {stop}"
        )
