"""Kernels that only benchmarks run: the least launch, routing alone, the route kernel in part.

``empty_kernel`` is what a launch costs. ``route_only_kernel`` is the work of a routing-only
library, from the device functions of the shipped kernel: scores, top K, weights, no state.
:func:`kernel_until` is the shipped kernel without some of its writes: compiled from the same source
less these statements, so that it differs by them, and by what compilers drop because only they
needed it.
"""

import ast
import functools
import importlib.util
import tempfile
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from moe_gpu.kernels import route
from moe_gpu.kernels._keys import (
    TAKEN,
    finite_or_zero,
    key_score,
    order_key,
    ranked,
    side_by_side,
)
from moe_gpu.kernels._select import demand_of
from moe_gpu.kernels.launch import columns_of


@triton.jit
def empty_kernel(x_ptr):
    pass


@triton.jit(do_not_specialize=["T"])
def route_only_kernel(
    logits_ptr, stride_lt,   # (T, E) in, unit stride along E
    weights_ptr, stride_wt,  # (T, K) out, unit stride along K
    ids_ptr, stride_it,      # (T, K) out, unit stride along K
    T,
    E: tl.constexpr, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    offs_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    offs_e = tl.arange(0, BLOCK_E)
    offs_k = tl.arange(0, BLOCK_K)
    rows_t1 = offs_t.to(tl.int64)[:, None]
    mask_t1 = (offs_t < T)[:, None]
    mask_e = (offs_e < E)[None, :]
    mask_k = (offs_k < K)[None, :]
    x_te = tl.load(
        logits_ptr + rows_t1 * stride_lt + offs_e[None, :], mask=mask_t1 & mask_e, other=0.0
    )
    PACKED: tl.constexpr = x_te.dtype == tl.bfloat16
    code_te = tl.broadcast_to((offs_e * 2)[None, :], [BLOCK_T, BLOCK_E])
    rank_te = ranked(order_key(x_te.to(tl.float32)), code_te, PACKED)
    best = demand_of(tl.where(mask_e, rank_te, TAKEN), code_te, K, PACKED)
    score_tk = key_score(side_by_side(best[0], offs_k, K))
    top_t1 = finite_or_zero(key_score(best[0][0]))[:, None]
    mass_tk = tl.where(mask_k, tl.exp(score_tk - top_t1), 0.0)
    weight_tk = mass_tk / tl.sum(mass_tk, axis=1)[:, None]
    id_tk = side_by_side(best[1], offs_k, K) >> 1
    mask_tk = mask_t1 & mask_k
    tl.store(weights_ptr + rows_t1 * stride_wt + offs_k[None, :], weight_tk, mask=mask_tk)
    id_tk = id_tk.to(ids_ptr.dtype.element_ty)
    tl.store(ids_ptr + rows_t1 * stride_it + offs_k[None, :], id_tk, mask=mask_tk)


# which tensors the route kernel does not write yet when it has done what the name says
NOT_WRITTEN = {
    "affinity": ("activations_ptr", "counters_ptr", "record_ptr"),
    "counters": ("record_ptr",),
}
# modules that write state, and the launch; each may import from those before it
SOURCES = ("_epilogue", "_route_kernel", "launch")
_WRITES = ("store", "atomic_add", "atomic_or", "atomic_max")
_folder = tempfile.TemporaryDirectory(prefix="moe_gpu_kernels_")  # Triton reads a kernel's source


class _Without(ast.NodeTransformer):
    """Takes stores and atomics to some tensors out of a function, by the names of the pointers."""

    def __init__(self, names: tuple[str, ...]):
        self.names = set(names)

    def _points_there(self, node: ast.expr) -> bool:
        return any(isinstance(n, ast.Name) and n.id in self.names for n in ast.walk(node))

    def visit_Assign(self, node: ast.Assign) -> ast.Assign:  # noqa: N802
        target = node.targets[0]
        if isinstance(target, ast.Name) and self._points_there(node.value):
            self.names.add(target.id)  # a pointer made of one of them
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.stmt:  # noqa: N802
        call = node.value
        is_write = (
            isinstance(call, ast.Call)
            and isinstance(call.func, ast.Attribute)
            and call.func.attr in _WRITES
        )
        return ast.Pass() if is_write and self._points_there(call.args[0]) else node


def without_writes(source: str, names: tuple[str, ...]) -> str:
    """Return a module's source without what its functions write through pointers of these names."""
    tree = ast.parse(source)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            _Without(names).visit(node)
    return ast.unparse(ast.fix_missing_locations(tree))


@functools.cache
def launch_until(stage: str):
    """Return the module of the shipped launch, for the kernel up to a stage of :data:`NOT_WRITTEN`."""
    replaced = {}
    for name in SOURCES:
        shipped = importlib.import_module(f"moe_gpu.kernels.{name}")
        path = Path(_folder.name) / f"{name}_until_{stage}.py"
        source = Path(shipped.__file__).read_text(encoding="utf-8")
        path.write_text(without_writes(source, NOT_WRITTEN[stage]), encoding="utf-8")
        spec = importlib.util.spec_from_file_location(f"{shipped.__name__}_until_{stage}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        vars(module).update({k: f for k, f in replaced.items() if k in vars(module)})
        replaced |= {k: v for k, v in vars(module).items() if isinstance(v, type(empty_kernel))}
    return module


def routed_until(stage: str, call):
    """Return ``call``, which routes, with the kernel of :func:`launch_until` in place of the whole."""
    launch = launch_until(stage).launch

    def shortened():
        whole, route.launch = route.launch, launch
        try:
            return call()
        finally:
            route.launch = whole

    return shortened


def columns_tile(E: int) -> tuple[int, int, int]:
    """Return ``(BLOCK_T, BLOCK_E, num_warps)`` as SGLang's router picks them: 256 columns a warp."""
    BLOCK_E = triton.next_power_of_2(E)
    return max(1, min(4, 256 // BLOCK_E)), BLOCK_E, 1 if BLOCK_E <= 512 else 4


def route_only(
    logits_TE: torch.Tensor, K: int, tile: tuple[int, int, int]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights and ids of plain top-K routing, ``(T, K)``; ``tile`` as ``tile_of`` gives it."""
    T, E = logits_TE.shape
    BLOCK_T, BLOCK_E, num_warps = tile
    weights_TK = torch.empty(T, K, dtype=torch.float32, device=logits_TE.device)
    ids_TK = torch.empty(T, K, dtype=torch.int64, device=logits_TE.device)
    route_only_kernel[(triton.cdiv(T, BLOCK_T),)](
        logits_TE, logits_TE.stride(0), weights_TK, K, ids_TK, K, T,
        E=E, K=K, BLOCK_T=BLOCK_T, BLOCK_E=BLOCK_E,
        BLOCK_K=columns_of(BLOCK_T, K), num_warps=num_warps,
    )  # fmt: skip
    return weights_TK, ids_TK


def launch_empty(x: torch.Tensor, programs: int, num_warps: int) -> None:
    """Launch a kernel that does nothing, on so many programs."""
    empty_kernel[(programs,)](x, num_warps=num_warps)


def direct_launch(x: torch.Tensor, programs: int, num_warps: int):
    """Return a function that does the same past Triton's front door, as the library launches."""
    kernel = empty_kernel[(programs,)](x, num_warps=num_warps)
    if kernel is None:  # in the interpreter there is no other way
        return lambda: launch_empty(x, programs, num_warps)
    run, function, metadata = kernel.run, kernel.function, kernel.packed_metadata
    index = x.device.index

    def launch():
        stream = driver.active.get_current_stream(index)
        run(programs, 1, 1, stream, function, metadata, None, None, None, x)

    return launch
