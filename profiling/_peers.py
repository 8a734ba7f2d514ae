"""What the route call is compared with: PyTorch as a user would write it, and other libraries.

Libraries are used where they can be imported, or found in a folder (``--peers``); where not, the
reason is part of the results. Their interfaces, as read at these versions:

* ``triton_kernels.topk.topk`` of triton-lang/triton, python/triton_kernels (02ed6565). The package of
  that name on PyPI is another one.
* ``moe_fused_gate`` of sgl-project/sglang, python/sglang/jit_kernel/moe_fused_gate.py (01553896).
* ``torch.ops._moe_C.topk_softmax`` of vllm-project/vllm.
* ``MixtralTopKRouter`` of transformers.

Those of the first three route and do nothing else; the router of transformers projects as well.
"""

import importlib
import shutil
import sys
import types
from collections.abc import Callable
from pathlib import Path

import torch

Routed = tuple[torch.Tensor, torch.Tensor]  # weights and ids, (T, K)
Route = Callable[[torch.Tensor], Routed]


class Absent(Exception):
    """A peer that cannot be had here, and why."""


class Chain:
    """All the work of a route call under ``Exact()``, as a user would write it in PyTorch.

    Two liberties, both in its favour: affinity is clamped once a call, not once a token, and
    without ``lists`` who is missing stays a mask.

    Args:
        resident_E: Who is on the device, bool.
        top_k: K.
        lists: Return the missing experts' ids, as a user needs them: ``nonzero`` waits for the
            device, and a CUDA graph cannot hold it.
        decay: Of the affinity.
        boost: Of a chosen expert.
        max_score: Clamp of the affinity.
    """

    def __init__(
        self, resident_E: torch.Tensor, top_k: int, lists: bool,
        decay: float = 0.99, boost: float = 1.0, max_score: float = 1.0,
    ):  # fmt: skip
        self.resident_E, self.top_k, self.lists = resident_E, top_k, lists
        self.decay, self.boost, self.max_score = decay, boost, max_score
        E, device = resident_E.numel(), resident_E.device
        self.affinity_E = torch.zeros(E, device=device)
        self.activations_E = torch.zeros(E, dtype=torch.int64, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.requests: torch.Tensor | None = None
        self._fading: dict[int, torch.Tensor] = {}

    def prepare(self, T: int) -> None:
        """Make what depends on the number of tokens alone."""
        age_T = torch.arange(T - 1, -1, -1, device=self.resident_E.device)
        added_T = self.boost * self.decay**age_T
        self._fading[T] = added_T.repeat_interleave(self.top_k)

    def __call__(self, logits_TE: torch.Tensor) -> Routed:
        """Route, count, age the affinity and find the missing experts."""
        T, E = logits_TE.shape
        probabilities_TE = torch.softmax(logits_TE.float(), dim=-1)
        weights_TK, ids_TK = torch.topk(probabilities_TE, self.top_k, dim=-1)
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
        ids_N = ids_TK.flatten()
        executed_E = torch.zeros_like(self.activations_E)
        executed_E.index_add_(0, ids_N, torch.ones_like(ids_N))
        self.activations_E += executed_E
        self.hits += (executed_E * self.resident_E).sum()
        self.affinity_E.mul_(self.decay**T).index_add_(0, ids_N, self._fading[T])
        self.affinity_E.clamp_(max=self.max_score)
        missing_E = (executed_E > 0) & ~self.resident_E
        self.requests = missing_E.nonzero() if self.lists else missing_E
        return weights_TK, ids_TK


def compiled(chain: Chain, device: torch.device) -> Route:
    """Return the chain under ``torch.compile``.

    Raises:
        Absent: Without a compiler that it needs.
    """
    compiler = ("g++", "clang++") if device.type == "cpu" else ("gcc", "clang", "cc")
    if not any(map(shutil.which, compiler)):
        raise Absent(f"torch.compile needs one of {', '.join(compiler)}")
    from torch._inductor import config

    config.compile_threads = 1  # a pool of compilers would share processors with what is measured
    return torch.compile(chain.__call__, dynamic=False)


# -- libraries


def _triton_kernels(E: int, K: int, device: torch.device, folder: Path | None) -> Route:
    _only_on_cuda(device)
    _add_package(folder, "triton_kernels/topk.py")
    topk = _import("triton_kernels.topk").topk

    def route(logits_TE: torch.Tensor) -> Routed:
        chosen = topk(logits_TE, K, apply_softmax=True)
        return chosen.vals, chosen.indx

    return route


def _sglang(E: int, K: int, device: torch.device, folder: Path | None) -> Route:
    _only_on_cuda(device)
    try:
        module = _import("sglang.jit_kernel.moe_fused_gate")
    except Absent:
        if folder is None:
            raise
        module = _sglang_file(folder)
    no_bias_E = torch.zeros(E, device=device)

    def route(logits_TE: torch.Tensor) -> Routed:
        return module.moe_fused_gate(
            logits_TE, no_bias_E, K, scoring_func="softmax", renormalize=True
        )

    return route


def _sglang_file(folder: Path):
    """Import the one file that holds the kernel, without the package around it."""
    path = _find(folder, "moe_fused_gate.py", holds="_router_triton_kernel")
    # the names that it takes from its package, and what they do for this kernel
    stand_ins = {
        "sglang.jit_kernel.utils": {
            "cache_once": lambda function: function,
            "is_arch_support_pdl": lambda: torch.cuda.get_device_capability()[0] >= 9,
            "load_jit": None,
        },
        "sglang.jit_kernel.moe_route_radix": {"covered": lambda *_: False},
        "sglang.kernel_api_logging": {"debug_kernel_api": lambda function: function},
    }
    for name in ("sglang", "sglang.jit_kernel", *stand_ins):
        module = sys.modules.setdefault(name, types.ModuleType(name))
        vars(module).update(stand_ins.get(name, {}))
    package = sys.modules["sglang.jit_kernel"]
    package.moe_route_radix = sys.modules["sglang.jit_kernel.moe_route_radix"]
    spec = importlib.util.spec_from_file_location("sglang_moe_fused_gate", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _vllm(E: int, K: int, device: torch.device, folder: Path | None) -> Route:
    _only_on_cuda(device)
    try:
        _import("vllm._moe_C")
    except Absent:
        if folder is None:
            raise
        torch.ops.load_library(_find(folder, "_moe_C*.so"))
    topk_softmax = torch.ops._moe_C.topk_softmax.default
    names = [argument.name for argument in topk_softmax._schema.arguments]
    if "renormalize" not in names:
        raise Absent(f"this topk_softmax does not renormalize: {names}")

    def route(logits_TE: torch.Tensor) -> Routed:
        T = logits_TE.shape[0]
        weights_TK = torch.empty(T, K, device=device)
        ids_TK, rows_TK = torch.empty(2, T, K, dtype=torch.int32, device=device)
        without_bias = (None,) * (len(names) - 5)
        topk_softmax(weights_TK, ids_TK, rows_TK, logits_TE, True, *without_bias)
        return weights_TK, ids_TK

    return route


LIBRARIES = {
    "triton_kernels topk": _triton_kernels,
    "SGLang Triton router": _sglang,
    "vLLM topk_softmax": _vllm,
}


def libraries(
    E: int, K: int, device: torch.device, folder: Path | None = None
) -> tuple[dict[str, Route], dict[str, str]]:
    """Return the libraries' routers that can be had here, and why the others cannot."""
    routes, absent = {}, {}
    for name, adapter in LIBRARIES.items():
        try:
            routes[name] = adapter(E, K, device, folder)
        except Absent as reason:
            absent[name] = str(reason)
        except Exception as error:  # of foreign code: nothing of ours depends on it
            absent[name] = f"{type(error).__name__}: {error}"
    return routes, absent


def transformers_router(E: int, K: int, D: int, weight_ED: torch.Tensor):
    """Return transformers' own router on a given weight: ``(logits, weights, ids) = f(hidden)``.

    The projection is part of the module, so a comparison includes it on both sides.
    """
    try:
        from transformers import MixtralConfig
        from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
    except ImportError as error:
        raise Absent(str(error)) from None
    config = MixtralConfig(num_local_experts=E, num_experts_per_tok=K, hidden_size=D)
    router = MixtralTopKRouter(config)
    router.weight = torch.nn.Parameter(weight_ED, requires_grad=False)
    return router


def _only_on_cuda(device: torch.device) -> None:
    if device.type != "cuda":
        raise Absent("runs on CUDA only")


def _import(name: str):
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise Absent(f"cannot import {name}: {error}") from None


def _find(folder: Path, pattern: str, holds: str | None = None) -> Path:
    for path in sorted(folder.rglob(pattern)):
        if holds is None or holds in path.read_text(encoding="utf-8", errors="replace"):
            return path
    raise Absent(f"no {pattern} in {folder.name}")


def _add_package(folder: Path | None, module: str) -> None:
    """Let a package be imported from a folder, which may lie somewhere below the one given."""
    if folder is not None:
        path = _find(folder, Path(module).name, holds="def topk(")
        root = path.parents[len(Path(module).parts) - 1]
        if root.joinpath(module) == path and str(root) not in sys.path:
            sys.path.insert(0, str(root))


# -- is it right


def differs(
    got: Routed, want: Routed, logits_TE: torch.Tensor, tolerance: float | None = None
) -> str | None:
    """Return how a routing differs from plain top-K; None if it does not.

    The order within a row is free, and so is who is taken of experts that tie at the cut.

    Args:
        got: Weights and ids, ``(T, K)``, any dtype and device.
        want: The same by the reference, on the CPU.
        logits_TE: What was routed.
        tolerance: Of a weight; None: float32's, or a half-precision dtype's.
    """
    weights_TK, ids_TK = got[0].detach().cpu(), got[1].detach().cpu().long()
    if tolerance is None:
        tolerance = 1e-5 if weights_TK.dtype == torch.float32 else 1e-2
    if weights_TK.shape != want[0].shape or ids_TK.shape != want[1].shape:
        return f"shapes {tuple(weights_TK.shape)}, {tuple(ids_TK.shape)}"
    E, K = logits_TE.shape[1], ids_TK.shape[1]
    if ids_TK.numel() and (ids_TK.min() < 0 or ids_TK.max() >= E):
        return "ids out of range"
    ids_TK, order_TK = ids_TK.sort(dim=1)
    weights_TK = weights_TK.float().gather(1, order_TK)
    want_ids_TK, order_TK = want[1].long().sort(dim=1)
    want_weights_TK = want[0].float().gather(1, order_TK)
    same_T = (ids_TK == want_ids_TK).all(dim=1)
    if K < E:
        best_TK = logits_TE.detach().cpu().float().sort(dim=1, descending=True).values
        tied_T = best_TK[:, K - 1] == best_TK[:, K]
    else:
        tied_T = torch.zeros_like(same_T)
    if wrong := int((~same_T & ~tied_T).sum()):
        return f"other experts in {wrong} of {len(same_T)} rows"
    error_TK = (weights_TK - want_weights_TK).abs()[same_T]
    worst = error_TK.max().item() if error_TK.numel() else 0.0
    if not worst <= tolerance:
        return f"weights are off by {worst:.2g}, allowed {tolerance:g}"
    return None
