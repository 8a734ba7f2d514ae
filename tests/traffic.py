"""Bytes that a kernel reads and writes, counted in Triton's interpreter, where nothing is cached."""

import contextlib

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder


class Traffic:
    """Bytes by direction; an atomic counts once each way."""

    def __init__(self):
        self.read = self.written = self.launches = 0


@contextlib.contextmanager
def counted():
    """Count what kernels move while this is open."""
    traffic, kept = Traffic(), {}

    def watch(name, count):
        kept[name] = original = getattr(InterpreterBuilder, name)

        def counting(self, *args, **kwargs):
            count(*args)
            return original(self, *args, **kwargs)

        setattr(InterpreterBuilder, name, counting)

    def moved(pointers, mask):
        return int(np.count_nonzero(mask.data)) * pointers.get_element_ty().primitive_bitwidth // 8

    def load(pointers, mask, *_):
        traffic.read += moved(pointers, mask)

    def store(pointers, value, mask, *_):
        traffic.written += moved(pointers, mask)

    def atomic(operation, pointers, value, mask, *_):
        load(pointers, mask)
        store(pointers, value, mask)

    watch("create_masked_load", load)
    watch("create_masked_store", store)
    watch("create_atomic_rmw", atomic)
    try:
        yield traffic
    finally:
        for name, original in kept.items():
            setattr(InterpreterBuilder, name, original)
