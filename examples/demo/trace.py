"""A torch.profiler trace of generation, for TensorBoard or Perfetto."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile, tensorboard_trace_handler


def all_threads() -> object | None:
    """Return what makes the profiler record the thread that copies, where torch knows that."""
    try:
        return torch._C._profiler._ExperimentalConfig(profile_all_threads=True)
    except (AttributeError, TypeError):  # private: a torch may lack it or its option
        return None


def write_trace(folder: Path, work: Callable[[], object]) -> Path:
    """Run ``work`` under the profiler and return the trace, which appears in ``folder`` whole.

    Args:
        folder: Made if absent.
        work: What to record; the library marks its own ranges in it.
    """
    activities = [ProfilerActivity.CPU]
    if torch.cuda.is_available():
        activities.append(ProfilerActivity.CUDA)
    is_new = not folder.exists()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # on the same file system, so that the last step is a rename
        with tempfile.TemporaryDirectory(dir=folder, prefix=".partial-") as partial:
            # a name of ours: the default one carries the name of the machine
            handler = tensorboard_trace_handler(partial, worker_name="moe_gpu")
            with profile(
                activities=activities, on_trace_ready=handler, experimental_config=all_threads()
            ):
                work()
            (trace,) = Path(partial).iterdir()
            return trace.replace(folder / trace.name)
    except BaseException:
        if is_new:
            folder.rmdir()
        raise
