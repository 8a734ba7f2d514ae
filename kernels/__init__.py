"""Triton kernels of moe-gpu. Installs and imports only as ``moe_gpu.kernels``."""
