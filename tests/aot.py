"""Compile route-kernel variants to machine code on a machine without a GPU, in this process.

Run as a script with TRITON_INTERPRET unset: ``python tests/aot.py TARGET INDEX [INDEX ...]``
compiles those entries of :data:`ALL` and prints one JSON line each: registers, spills.
"""

import json
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_86": ("cuda", 86, 32),
    "sm_89": ("cuda", 89, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "sm_120": ("cuda", 120, 32),
    "gfx942": ("hip", "gfx942", 64),
}

EXACT, BONUS, RANGE_BONUS, MASS, OUTPUT = range(5)
EXECUTED, DEMAND, SERVED = range(3)
SOFTMAX, SIGMOID, SPARSEMIXER = range(3)
STEPS, LAST, SUM = range(3)  # the second is the gate's default, the third that of attach
TOP2_SUM, MAX = range(2)


@dataclass(frozen=True)
class Variant:
    """One specialisation of the kernel, as a model and a call size ask for it."""

    E: int
    K: int
    T: int  # call size: decides tile, warps and whether the call is one tile
    rule: int = OUTPUT
    protect: int = 1
    dtype: str = "bf16"
    renormalize: bool = True
    affinity_from: int = SERVED
    aging: int = SUM
    contiguous: bool = True
    num_valid: bool = False
    ids: str = "i64"
    weights: str = "fp32"
    control: bool = False
    meters: bool = False
    score: int = SOFTMAX
    bias: bool = False
    groups: tuple[int, int, int] = (1, 1, 0)  # in all, visited, how they rank
    softcap: bool = False


ROUTERS = [(8, 2), (16, 2), (60, 4), (64, 6), (64, 8), (128, 8), (160, 6), (256, 8), (512, 10)]
SIZES = [1, 4, 64, 4096]  # decode, small batch, the largest policy call, prefill

VARIANTS = [
    # every router at every size, as a bf16 model with the default policy meets them
    *[Variant(E, K, T, rule=OUTPUT if T <= 64 else EXACT) for E, K in ROUTERS for T in SIZES],
    # every rule on the two ends of the router table
    *[
        Variant(E, K, T, rule=rule, protect=protect)
        for E, K in [(8, 2), (128, 8)]
        for T in [1, 64]
        for rule, protect in [(EXACT, 0), (BONUS, 0), (RANGE_BONUS, 1), (MASS, 1), (OUTPUT, 0)]
    ],
    # logits of the other dtypes
    *[
        Variant(E, K, T, dtype=dtype)
        for dtype in ["fp32", "fp16"]
        for E, K in [(8, 2), (128, 8)]
        for T in [1, 64]
    ],
    # bounds: the largest router, one expert, all experts, not a power of two
    Variant(1024, 16, 1, dtype="fp32"),
    Variant(1024, 16, 64, dtype="fp32"),
    Variant(1024, 16, 4096, rule=EXACT, dtype="fp32"),
    Variant(1024, 16, 64, rule=BONUS, protect=0, dtype="fp32"),
    Variant(1, 1, 1),
    Variant(8, 8, 1),
    Variant(13, 3, 64),
    Variant(32, 8, 64),
    Variant(128, 4, 64),
    Variant(16, 1, 64),
    # interface options
    Variant(8, 2, 1, num_valid=True),
    Variant(8, 2, 4096, rule=EXACT, num_valid=True),
    Variant(64, 6, 1, renormalize=False),
    Variant(64, 6, 64, renormalize=False),
    Variant(8, 2, 64, renormalize=False),
    Variant(8, 2, 1, rule=BONUS, protect=0, affinity_from=EXECUTED),
    Variant(8, 2, 64, rule=BONUS, protect=0, affinity_from=EXECUTED),
    Variant(8, 2, 1, ids="i32", weights="bf16"),
    *[Variant(E, K, 1, contiguous=False) for E, K in [(8, 2), (256, 8)]],
    *[Variant(E, K, 64, aging=aging) for E, K in [(8, 2), (128, 8)] for aging in (STEPS, LAST)],
]


# compiled for one target only: they add to the variants above, and a few stand for all
MEASURED = [
    Variant(8, 2, 1, control=True),
    Variant(8, 2, 1, meters=True),
    *[
        Variant(E, K, T, control=True, meters=True)
        for E, K in [(8, 2), (60, 4), (64, 8), (128, 8), (512, 10)]
        for T in [1, 64]
    ],
    Variant(8, 2, 1, rule=BONUS, protect=0, control=True),
    Variant(8, 2, 64, rule=MASS, control=True, meters=True, num_valid=True),
    Variant(64, 6, 64, control=True, meters=True, renormalize=False),
]

# score rules of other families: DeepSeek-V3 and V2, Phi-3.5-MoE, MiniMax-M2, a biased softmax
SCORED = [
    *[
        Variant(256, 8, T, dtype="fp32", score=SIGMOID, bias=True, groups=(8, 4, TOP2_SUM), rule=r)
        for T, r in [(1, OUTPUT), (64, OUTPUT), (64, BONUS), (4096, EXACT)]
    ],
    *[Variant(160, 6, T, dtype="fp32", renormalize=False, groups=(8, 3, MAX)) for T in [1, 64]],
    *[Variant(16, 2, T, score=SPARSEMIXER, renormalize=False, weights="bf16") for T in [1, 64]],
    *[Variant(128, 8, T, score=SIGMOID, bias=True) for T in [1, 64]],
    *[Variant(64, 6, T, bias=True) for T in [1, 64]],
    Variant(8, 2, 1, score=SIGMOID, bias=True),
    Variant(16, 2, 1, bias=True),
    Variant(8, 2, 64, softcap=True),
]

ALL = [*VARIANTS, *MEASURED, *SCORED]


def light(variants: list[Variant]) -> list[int]:
    """Indices in :data:`ALL` of those that compile in a second or two."""
    return [ALL.index(v) for v in variants if v.E <= 16 or (v.T == 1 and v.E <= 256)]


def sample() -> list[tuple[str, int]]:
    """About 40 (target, variant index) pairs: a fixed draw of variants, targets in turn."""
    targets = list(TARGETS)
    quick = [i for i, v in enumerate(VARIANTS) if v.E * v.K < 8192 and (v.E, v.K) != (8, 8)]
    pairs = [
        (targets[n % len(targets)], i) for n, i in enumerate(random.Random(1).sample(quick, 39))
    ]
    return [*pairs, ("sm_90", VARIANTS.index(Variant(1024, 16, 1, dtype="fp32")))]


def everything() -> list[tuple[str, int]]:
    """Every variant for every target."""
    return [(target, i) for target in TARGETS for i in range(len(ALL))]


def compile_variant(variant: Variant, target: str) -> dict:
    """Compile one variant; return registers, spills (bytes on CUDA, registers on AMD), warps."""
    binary, num_warps = compile_binary(variant, target)
    usage = _cuda_usage if TARGETS[target][0] == "cuda" else _amd_usage
    return usage(binary) | {"warps": num_warps}


def compile_binary(variant: Variant, target: str):
    """Compile one variant; return Triton's compiled kernel and its warps."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from moe_gpu.kernels._route_kernel import route_kernel
    from moe_gpu.kernels.launch import columns_of, launch_options, tile_of

    v = variant
    BLOCK_T, BLOCK_E, num_warps = tile_of(v.T, v.E, v.K)
    constants = {
        "E": v.E, "K": v.K, "J": min(v.protect, v.K), "RULE": v.rule,
        "SCORE": v.score, "RENORMALIZE": v.renormalize, "CAPPED": v.softcap,
        "NUM_GROUPS": v.groups[0], "TOP_GROUPS": v.groups[1], "GROUP_SCORE": v.groups[2], "BLOCK_G": triton.next_power_of_2(v.groups[0]),
        **({} if v.bias else {"bias_ptr": None}),
        "AFFINITY_FROM": v.affinity_from, "AGING": v.aging,
        "CONTROL": v.control, "METERS": v.meters,
        **({} if v.control else {"control_ptr": None, "control_state_ptr": None}),
        **({} if v.meters else {"meters_ptr": None}),
        "CONTIGUOUS": v.contiguous, "BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E, "BLOCK_K": columns_of(BLOCK_T, v.K), "ONE_TILE": v.T <= BLOCK_T,
        **({"stride_le": 1} if v.contiguous else {}), **({} if v.num_valid else {"num_valid_ptr": None}),
        # as the launcher specialises contiguous tensors: 1 is a constant
        **({"stride_lt": 1} if v.E == 1 else {}),
        **({"stride_wt": 1, "stride_it": 1} if v.K == 1 else {}),
    }  # fmt: skip
    types = {
        "logits_ptr": f"*{v.dtype}", "stride_lt": "i32", "stride_le": "i32",
        "num_valid_ptr": "*i32", "bias_ptr": "*fp32", "slot_of_ptr": "*i32", "strength_ptr": "*fp32",
        "weights_ptr": f"*{v.weights}", "stride_wt": "i32", "ids_ptr": f"*{v.ids}",
        "stride_it": "i32", "affinity_ptr": "*fp32", "activations_ptr": "*i64",
        "counters_ptr": "*i64", "record_ptr": "*i32", "scratch_ptr": "*i32",
        "control_ptr": "*fp32", "control_state_ptr": "*fp32", "meters_ptr": "*i64",
        "T": "i32", "layer": "i32", "window": "i32",
        "decay": "fp32", "boost": "fp32", "max_score": "fp32", "units": "fp32", "unit": "fp32",
        "scaling_factor": "fp32", "softcap": "fp32", "far_eps": "fp32",
    }  # fmt: skip
    signature = {
        name: "constexpr" if name in constants else types[name] for name in route_kernel.arg_names
    }
    # what the launcher knows of fresh tensors: pointers are 16-byte aligned, some strides too
    whole = {"stride_lt"} if v.E % 16 == 0 else set()
    whole |= {"stride_wt", "stride_it"} if v.K % 16 == 0 else set()
    whole |= set() if v.contiguous else {"stride_le"}  # such as a column-major tensor's
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(route_kernel.arg_names)
        if (name.endswith("_ptr") or name in whole) and name not in constants
    }
    source = ASTSource(route_kernel, signature, constants, aligned)
    backend, arch, warp = TARGETS[target]
    binary = triton.compile(
        source,
        target=GPUTarget(backend, arch, warp),
        options=launch_options(num_warps, hip=backend == "hip"),
    )
    return binary, num_warps


def _cuda_usage(binary) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers = int(re.search(r"REG:(\d+)", text)[1])
    # a kernel without local arrays uses stack and local memory for spills alone
    spill = sum(int(n) for n in re.findall(r"(?:STACK|LOCAL):(\d+)", text))
    return {"registers": registers, "spill": spill}


def _amd_usage(binary) -> dict:
    text = binary.asm["amdgcn"]
    # scalar registers spill into vector ones, not to memory: only the vector spills count
    spills = re.findall(r"\.vgpr_spill_count:\s*(\d+)", text)
    registers = re.search(r"\.vgpr_count:\s*(\d+)", text)
    return {"registers": int(registers[1]), "spill": sum(map(int, spills))}


if __name__ == "__main__":
    for index in map(int, sys.argv[2:]):
        print(
            json.dumps({"index": index, **compile_variant(ALL[index], sys.argv[1])}),
            flush=True,
        )
