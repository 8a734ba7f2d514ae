"""Experts on disk: where the bytes of each lie, and how they become its run of bytes.

Reading converts on the way: float32, float16 and bfloat16 into each other, and block-scaled
float8 (a ``<tensor>_scale_inv`` beside each tensor) into any of them.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from .float8 import dequantize, scale_of, tensor_of
from .layout import ALIGNMENT, ExpertLayout, Field
from .shards import CheckpointError, Shards, TensorSpan

_FLOATS = {torch.float32, torch.float16, torch.bfloat16}
_AT_ONCE = 1 << 20  # elements converted at once: bounds what a read holds beside its output


class Source(NamedTuple):
    """A tensor of the checkpoint, or one row of it along the first dimension."""

    tensor: str
    row: int | None = None


class _Part(NamedTuple):
    """What one source contributes to an expert's run of bytes."""

    start: int  # bytes from the start of the expert
    stop: int
    dtype: torch.dtype  # of the expert
    span: TensorSpan
    first: int  # bytes from the start of the tensor
    columns: int  # elements that are converted together
    scale: TensorSpan | None
    scale_first: int  # rows from the start of the scales


class DiskExperts:
    """The experts of a checkpoint, read from disk in pieces.

    Every shape is checked here, so that a read can fail only by what happens to the disk. Any
    number of threads may read at once.

    Attributes:
        num_layers: L.
        num_experts: E.

    Args:
        layout: What an expert's run of bytes holds.
        shards: The files.
        sources: ``[layer][expert][field]``: the sources of a parameter, in the order in which
            their equal parts are joined along its first dimension.
        block_size: ``(rows, columns)`` that share one scale, where float8 tensors are scaled.

    Raises:
        ValueError: Sources that do not name the layout's fields.
        CheckpointError: A tensor that is missing, or of another shape or dtype than it must be.
    """

    def __init__(
        self,
        layout: ExpertLayout,
        shards: Shards,
        sources: Sequence[Sequence[Mapping[str, Sequence[Source]]]],
        block_size: tuple[int, int] | None = None,
    ):
        self.num_layers, self.num_experts = len(sources), len(sources[0]) if sources else 0
        self._layout, self._shards, self._block_size = layout, shards, block_size
        self._parts: list[list[tuple[_Part, ...]]] = []
        for layer, experts in enumerate(sources):
            if len(experts) != self.num_experts:
                raise ValueError(
                    f"sources must have {self.num_experts} experts in every layer, "
                    f"got {len(experts)} in layer {layer}"
                )
            self._parts.append(
                [
                    tuple(self._locate(f"layer {layer}, expert {expert}", fields))
                    for expert, fields in enumerate(experts)
                ]
            )

    def read_into(self, layer: int, expert: int, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill ``out`` with bytes [start, stop) of an expert's run; what pads it becomes zero.

        Args:
            layer: In ``[0, L - 1]``.
            expert: In ``[0, E - 1]``.
            start: First byte, a multiple of 256.
            stop: One past the last, a multiple of 256, as the length of the run is.
            out: uint8 ``(stop - start,)``, contiguous, on the host.

        Raises:
            ValueError: An argument outside its bounds.
            CheckpointError: As :meth:`Shards.read`; ``out`` then holds anything.
        """
        parts = self._expert(layer, expert)
        size = self._layout.expert_bytes
        if not 0 <= start <= stop <= size or start % ALIGNMENT or stop % ALIGNMENT:
            raise ValueError(
                f"start and stop must be multiples of {ALIGNMENT} in [0, {size}], "
                f"got {start} and {stop}"
            )
        if out.dtype != torch.uint8 or tuple(out.shape) != (stop - start,):
            raise ValueError(
                f"out must be uint8 of shape ({stop - start},), "
                f"got {out.dtype} of shape {tuple(out.shape)}"
            )
        filled = start
        for part in parts:
            first, last = max(start, part.start), min(stop, part.stop)
            if first < last:
                out[filled - start : first - start].zero_()
                self._read(part, first, last, out[first - start : last - start])
                filled = last
        out[filled - start :].zero_()

    def read_ahead(self, layer: int, expert: int) -> None:
        """Ask for an expert in the page cache soon; see :meth:`Shards.read_ahead` for its cost."""
        for part in self._expert(layer, expert):
            self._shards.read_ahead(part.span, *self._in_tensor(part))

    def drop_cache(self, layer: int, expert: int) -> None:
        """Give up the page cache of an expert whose bytes now live elsewhere."""
        for part in self._expert(layer, expert):
            self._shards.drop_cache(part.span, *self._in_tensor(part))

    def close(self) -> None:
        """Close the files: reading is an error from now on. Can be called again."""
        self._shards.close()

    def _expert(self, layer: int, expert: int) -> tuple[_Part, ...]:
        for name, value, size in (
            ("layer", layer, self.num_layers),
            ("expert", expert, self.num_experts),
        ):
            if not 0 <= value < size:
                raise ValueError(f"{name} must lie in [0, {size - 1}], got {value}")
        return self._parts[layer][expert]

    @staticmethod
    def _in_tensor(part: _Part) -> tuple[int, int]:
        """Return which bytes of its tensor a part takes."""
        elements = (part.stop - part.start) // part.dtype.itemsize
        return part.first, part.first + elements * part.span.dtype.itemsize

    def _read(self, part: _Part, start: int, stop: int, out: torch.Tensor) -> None:
        """Fill ``out`` with bytes [start, stop) of the run, which lie in one part."""
        if part.span.dtype == part.dtype:
            shift = part.first - part.start
            self._shards.read(part.span, start + shift, stop + shift, out)
            return
        item, C = part.span.dtype.itemsize, part.columns
        values = out.view(part.dtype)
        first = (start - part.start) // part.dtype.itemsize
        last = first + len(values)
        end = -(-last // C)
        step = max(1, _AT_ONCE // C)
        for row in range(first // C, end, step):
            stop_row = min(row + step, end)
            raw = torch.empty((stop_row - row) * C * item, dtype=torch.uint8)
            begin = part.first + row * C * item
            self._shards.read(part.span, begin, begin + len(raw), raw)
            source = raw.view(part.span.dtype)
            if part.scale is not None:
                scaled_RC = self._scaled(part, row, source.view(-1, C))
                source = scaled_RC.flatten()
            low, high = max(first, row * C), min(last, stop_row * C)
            values[low - first : high - first].copy_(source[low - row * C : high - row * C])

    def _scaled(self, part: _Part, row: int, values_RC: torch.Tensor) -> torch.Tensor:
        """Dequantise rows of a float8 matrix, of which ``row`` is the first."""
        rows, width = self._block_size[0], part.scale.shape[-1] * part.scale.dtype.itemsize
        first, last = row // rows, (row + len(values_RC) - 1) // rows + 1
        raw = torch.empty((last - first) * width, dtype=torch.uint8)
        begin = (part.scale_first + first) * width
        self._shards.read(part.scale, begin, begin + len(raw), raw)
        scales = raw.view(part.scale.dtype).view(last - first, -1)
        return dequantize(values_RC, scales, self._block_size, row - first * rows)

    def _locate(self, where: str, fields: Mapping[str, Sequence[Source]]) -> Iterator[_Part]:
        if set(fields) != set(self._layout.fields):
            raise ValueError(
                f"{where}: sources must be of {sorted(self._layout.fields)}, got {sorted(fields)}"
            )
        for name, field in self._layout.fields.items():
            yield from self._locate_field(f"{where}, {name}", field, fields[name])

    def _locate_field(self, where: str, field: Field, sources: Sequence[Source]) -> Iterator[_Part]:
        count, shape = len(sources), field.shape
        if count > 1 and shape and shape[0] % count == 0:
            shape = (shape[0] // count, *shape[1:])
        elif count != 1:
            raise ValueError(f"{where}: {count} sources do not make a parameter of shape {shape}")
        start, elements = field.offset, torch.Size(shape).numel()
        for source in sources:
            span = tensor_of(self._shards, source.tensor, where)
            _check_shape(where, span, source.row, shape)
            row, scale, columns = source.row or 0, None, 1
            if span.dtype.itemsize == 1 and span.dtype != field.dtype:
                block_size = self._block_size if len(shape) == 2 else None
                scale, columns = scale_of(self._shards, span, block_size), shape[-1]
            elif span.dtype != field.dtype and not {span.dtype, field.dtype} <= _FLOATS:
                raise CheckpointError(
                    f"{where}: tensor {span.name} is {span.dtype}, which does not become "
                    f"{field.dtype}"
                )
            stop = start + elements * field.dtype.itemsize
            yield _Part(
                start=start,
                stop=stop,
                dtype=field.dtype,
                span=span,
                first=row * elements * span.dtype.itemsize,
                columns=columns,
                scale=scale,
                scale_first=row * scale.shape[-2] if scale is not None else 0,
            )
            start = stop


def _check_shape(where: str, span: TensorSpan, row: int | None, shape: tuple[int, ...]) -> None:
    if row is None:
        sound, want = span.shape == shape, shape
    else:
        sound = (
            span.shape[1:] == shape and len(span.shape) > len(shape) and 0 <= row < span.shape[0]
        )
        want = (f"> {row}", *shape)
    if not sound:
        raise CheckpointError(
            f"{where}: tensor {span.name} has shape {span.shape}, expected "
            f"({', '.join(map(str, want))})"
        )
