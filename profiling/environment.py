"""What a machine is, as far as a number depends on it.

Usage:
    python profiling/environment.py                 # CUDA where there is one
    python profiling/environment.py --device cpu

GPU, driver, clocks, versions, commit, and which of the packages that the tests use are missing.
"""

import importlib.metadata
import shutil

import torch

import _bench as bench

PACKAGES = (
    "torch", "triton", "transformers", "accelerate", "safetensors", "tokenizers", "numpy", "kernels",
    "pytest", "pytest-xdist", "hypothesis", "tqdm", "rich", "prometheus-client", "tensorboard",
    "torch-tb-profiler", "matplotlib", "packaging", "setuptools",
)  # fmt: skip
TOOLS = ("nvidia-smi", "nvcc", "gcc", "make", "git")


def main() -> None:
    """Print and write what there is."""
    _, device, write = bench.arguments(__doc__, "environment")
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    content = {
        "conditions": bench.conditions(device),
        # where results of this machine belong
        "folder": str(bench.results_path("environment", device).parent),
        "packages": versions,
        "tools": {name: shutil.which(name) is not None for name in TOOLS},
        "cuda_devices": torch.cuda.device_count(),
    }
    missing = [name for name, version in versions.items() if version is None]
    missing += [name for name, is_there in content["tools"].items() if not is_there]
    text = "\n\n".join(
        [
            "# The machine",
            bench.facts(content["conditions"]),
            bench.table(
                [{"package": name, "version": v or "missing"} for name, v in versions.items()]
            ),
            f"Missing: {', '.join(missing)}." if missing else "Nothing is missing.",
        ]
    )
    print(text)
    write(content, text)


if __name__ == "__main__":
    main()
