"""Page-locked host memory: what the copy engines of a CUDA device read at full speed.

Registers memory instead of allocating it pinned: PyTorch's pinned allocator rounds a layer of
experts up to a power of two.
"""

import mmap

import torch


def whole_pages(num_bytes: int) -> torch.Tensor:
    """Return uint8 host memory that shares no page with anything else: pages are locked whole."""
    size = -(-num_bytes // mmap.PAGESIZE) * mmap.PAGESIZE
    memory = torch.empty(size + mmap.PAGESIZE, dtype=torch.uint8)
    first = -memory.data_ptr() % mmap.PAGESIZE
    return memory[first : first + num_bytes]


def page_lock(memory: torch.Tensor, device: torch.device) -> str | None:
    """Page-lock memory of :func:`whole_pages`; return None, or the cause if it is refused."""
    runtime = torch.cuda.cudart()
    with torch.cuda.device(device):  # else the first device would get a context of its own
        code = runtime.cudaHostRegister(memory.data_ptr(), memory.nbytes, 1)  # 1: every context
    if int(code) == 0:
        return None
    # the refusal is also CUDA's pending "last error", which the next kernel launch would report
    # as its own failure; a launch of ours takes it instead
    try:
        torch.ones(1, device=device)
    except RuntimeError:
        pass
    return f"cudaHostRegister: {runtime.cudaGetErrorString(code)}"


def page_unlock(memory: torch.Tensor) -> None:
    """Undo :func:`page_lock`. The memory must still be alive, and no copy may read it."""
    if not torch.cuda._is_in_bad_fork():  # a child's copy is ordinary memory, and CUDA refuses it
        torch.cuda.cudart().cudaHostUnregister(memory.data_ptr())
