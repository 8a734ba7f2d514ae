"""Files that appear whole or not at all."""

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file


def save_whole(
    tensors: Mapping[str, torch.Tensor], path: str | Path, metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file under another name, then give it its own.

    Raises:
        FileNotFoundError: No folder to write it to.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"path={str(path)!r} cannot be written: there is no folder {str(path.parent)!r}"
        )
    handle, partial = tempfile.mkstemp(dir=path.parent, prefix=".partial-")
    os.close(handle)
    try:
        save_file(dict(tensors), partial, metadata=dict(metadata))
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise
