"""The headers of safetensors files and their index, checked before a byte of data is read."""

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_MAX_HEADER = 100_000_000  # bytes; the safetensors library's own limit
_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}


class CheckpointError(RuntimeError):
    """A checkpoint is malformed, has changed since it was opened, or cannot be read."""


class TensorSpan(NamedTuple):
    """Where the bytes of one tensor lie, row-major and little-endian."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    file: int  # index into Shards.files
    offset: int  # bytes from the start of the file
    nbytes: int


def read_index(folder: Path) -> dict[str, str]:
    """Return the shard of every tensor; checks what the index says, not the shards."""
    path = folder / INDEX
    if not path.is_file():
        pickled = sorted(file.name for file in folder.glob("*.bin*"))
        why = f"holds {pickled[0]}, which is pickled" if pickled else f"has no {SINGLE} nor {INDEX}"
        raise CheckpointError(f"{folder} {why}: only safetensors are read")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        names = list(weight_map.values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} is not an index of safetensors: {error!r}") from error
    for tensor, name in weight_map.items():
        plain = isinstance(name, str) and not set(name) & set("/\\\0")
        if not plain or not name.endswith(".safetensors"):
            raise CheckpointError(
                f"{path} maps {tensor} to {name!r}: it must be a .safetensors file of this folder"
            )
    if not names:
        raise CheckpointError(f"{path} lists no tensors")
    return weight_map


def read_header(path: Path, fd: int, file: int) -> Iterator[TensorSpan]:
    """Yield the tensors of a file, after checking that their bytes fill it exactly."""
    size = os.fstat(fd).st_size
    length = int.from_bytes(os.pread(fd, 8, 0), "little")
    if length > min(size - 8, _MAX_HEADER):
        raise CheckpointError(
            f"{path} is truncated or no safetensors file: it has {size:,} bytes, "
            f"its header would have {length:,}"
        )
    try:
        header = json.loads(_pread(fd, length, 8))
        header.pop("__metadata__", None)
        entries = sorted(header.items(), key=lambda item: item[1]["data_offsets"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{path} has a malformed header: {error!r}") from error
    end = 0
    for name, entry in entries:
        dtype, shape, (start, stop) = _parse(path, name, entry)
        if start != end or stop - start != math.prod(shape) * dtype.itemsize:
            raise CheckpointError(
                f"{path} has a malformed header: {name}, {dtype} of shape {shape}, must lie at "
                f"[{end}, {end + math.prod(shape) * dtype.itemsize}), not [{start}, {stop})"
            )
        yield TensorSpan(name, dtype, shape, file, 8 + length + start, stop - start)
        end = stop
    if size != 8 + length + end:
        raise CheckpointError(
            f"{path} is truncated or damaged: it has {size:,} bytes, by its header it must have "
            f"{8 + length + end:,}"
        )


def _pread(fd: int, length: int, offset: int) -> bytes:
    data = b""
    while len(data) < length and (part := os.pread(fd, length - len(data), offset + len(data))):
        data += part
    return data


def _parse(path: Path, name: str, entry: dict) -> tuple[torch.dtype, tuple[int, ...], list[int]]:
    """Return dtype, shape and offsets of a header's entry."""
    try:
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        whole = all(type(n) is int and n >= 0 for n in [*shape, *offsets])
        sound = whole and len(offsets) == 2 and dtype in _DTYPES
    except (KeyError, TypeError):
        sound = False
    if not sound:
        raise CheckpointError(f"{path} has a header not understood at {name}: {entry!s:.200}")
    return _DTYPES[dtype], tuple(shape), offsets
