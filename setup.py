"""Packaging for moe-gpu; tool settings live in pyproject.toml.

``kernels/`` sits at the top of the tree so that the Triton sources are the first thing a reader
meets, but installs as ``moe_gpu.kernels``: Hugging Face publishes a package named ``kernels`` and
transformers looks for it, so a top-level module of that name must never come from here. Hence
also the explicit list of packages: ``find_packages()`` at the root would pick ``kernels`` up.
"""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent


def packages() -> list[str]:
    """Return every package that installs: moe_gpu, what is inside it, and kernels/ under it."""
    return [
        "moe_gpu",
        *(f"moe_gpu.{name}" for name in find_packages(HERE / "moe_gpu")),
        "moe_gpu.kernels",
        *(f"moe_gpu.kernels.{name}" for name in find_packages(HERE / "kernels")),
    ]


setup(
    name="moe-gpu",
    version="0.1.0",
    description="Mixture-of-experts models larger than the GPU: a residency-aware gate in Triton "
    "and an expert offloader for PyTorch and Hugging Face",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author="The moe-gpu authors",
    license="MIT",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=packages(),
    package_dir={"moe_gpu": "moe_gpu", "moe_gpu.kernels": "kernels"},
    entry_points={"console_scripts": ["moe-gpu = moe_gpu.__main__:main"]},
    install_requires=["torch>=2.11", "triton>=3.6; platform_system == 'Linux'", "numpy"],
    extras_require={
        "hf": ["transformers>=5.17", "safetensors", "tokenizers", "rich", "tqdm"],
        "metrics": ["prometheus-client>=0.20"],
        "profile": ["tensorboard>=2.20", "torch-tb-profiler>=0.4.3"],
        "dev": [
            "accelerate",  # transformers asks for it where a model is split or sharded
            "hypothesis",
            "matplotlib",
            "packaging",
            "pytest>=8",
            "pytest-xdist",
            "ruff",
            "setuptools>=77",
        ],
    },
)
