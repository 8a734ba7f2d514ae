"""Block-scaled float8: a matrix of float8 values, and one scale for each block of it."""

import torch

from .shards import CheckpointError, Shards, TensorSpan

SCALE_SUFFIX = "_scale_inv"  # by which values are multiplied, in spite of its name
_SCALES = {torch.float32, torch.bfloat16, torch.float8_e8m0fnu}


def tensor_of(shards: Shards, name: str, where: str) -> TensorSpan:
    """Return a tensor's span, or say for what it is missing."""
    if name not in shards.tensors:
        raise CheckpointError(f"{where}: the checkpoint in {shards.folder} lacks tensor {name}")
    return shards.tensors[name]


def scale_of(shards: Shards, span: TensorSpan, block_size: tuple[int, int] | None) -> TensorSpan:
    """Return the scales of a float8 tensor ``(..., R, C)``: ``(..., R / rows, C / columns)``.

    Raises:
        CheckpointError: Not float8 with scales of that shape, or ``block_size`` is None.
    """
    if span.dtype != torch.float8_e4m3fn or block_size is None or len(span.shape) < 2:
        raise CheckpointError(
            f"tensor {span.name} is {span.dtype} of shape {span.shape}, which is read only as a "
            f"block-scaled float8_e4m3fn matrix; block size: {block_size}"
        )
    scale = tensor_of(shards, span.name + SCALE_SUFFIX, f"scales of {span.name}")
    *lead, R, C = span.shape
    want = (*lead, -(-R // block_size[0]), -(-C // block_size[1]))
    if scale.shape != want or scale.dtype not in _SCALES:
        raise CheckpointError(
            f"tensor {scale.name} is {scale.dtype} of shape {scale.shape}, expected floats of "
            f"shape {want}: one for each {block_size[0]} x {block_size[1]} of {span.shape}"
        )
    return scale


def dequantize(
    values_RC: torch.Tensor,
    scales: torch.Tensor,
    block_size: tuple[int, int],
    first_row: int = 0,
) -> torch.Tensor:
    """Return float32 ``(R, C)``: each float8 value times the scale of its block.

    Args:
        values_RC: float8 ``(R, C)``, any number of rows.
        scales: One per block, any float dtype; the first row of blocks is the first here.
        block_size: Rows and columns of a block; blocks at the edges may be partial.
        first_row: Row within its block that ``values_RC`` starts with.
    """
    R, C = values_RC.shape
    row_of = torch.arange(first_row, first_row + R, device=scales.device) // block_size[0]
    column_of = torch.arange(C, device=scales.device) // block_size[1]
    return values_RC.float() * scales.float()[row_of][:, column_of]
