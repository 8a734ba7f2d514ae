"""What the compiler makes of the route kernel: registers, spills, instructions. Needs no GPU.

Usage:
    python profiling/resources.py                 # some minutes
    python profiling/resources.py --quick
    python profiling/resources.py --before FILE   # beside the figures of another commit

For a call whose experts are all there, and for one where some are missing: instructions of one warp
and cycles estimated for it alone (:mod:`_sass` says what the estimate leaves out). "A row" is the
length of the loop over rows, as a warp runs it, over the rows that it takes at a time. Beside them the
same for ``route_only_kernel``, which scores, selects and weighs and does nothing else.
"""

import argparse
import json
import os
import platform
import sys
from pathlib import Path

import torch
import triton
from tqdm import tqdm
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import _route_only as kernels
from _bench import RESULTS, facts, git_commit, table, write_whole
from _sass import Code
from moe_gpu.kernels.launch import columns_of, tile_of

sys.path.append(str(Path(__file__).parent.parent / "tests"))

import aot  # noqa: E402

ROUTERS = ((8, 2), (16, 2), (64, 6), (128, 8), (256, 8), (512, 10))
TARGETS = ("sm_80", "sm_90", "sm_100")
PATHS_OF = "sm_90"
MANY = 16384  # tokens of a call with many tiles
RULES = {"exact": aot.EXACT, "quality budget": aot.OUTPUT}


def main() -> int:
    """Compile, disassemble, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="two routers on one target")
    parser.add_argument("--before", type=Path, help="results of another commit to compare with")
    parser.add_argument("--out", type=Path, default=RESULTS / "resources.json")
    options = parser.parse_args()
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise SystemExit("the interpreter compiles nothing: unset TRITON_INTERPRET")
    before = None
    if options.before is not None:
        before = json.loads(options.before.read_text(encoding="utf-8"))

    routers = ROUTERS[:2] if options.quick else ROUTERS
    targets = (PATHS_OF,) if options.quick else TARGETS
    calls = [
        (target, E, K, T, rule)
        for target in targets
        for E, K in routers
        for T, rule in (
            (1, "exact"),
            (1, "quality budget"),
            (64, "quality budget"),
            (MANY, "exact"),
        )
    ]
    rows = [row_of(*call) for call in tqdm(calls, unit="kernel", leave=False, disable=None)]
    alone = [
        alone_row(E, K, T)
        for E, K in tqdm(routers, unit="router", leave=False, disable=None)
        for T in (1, MANY)
    ]
    content = {
        "conditions": {
            "torch": torch.__version__,
            "triton": triton.__version__,
            "python": platform.python_version(),
            "commit": git_commit(),
            "logits": "bfloat16, contiguous",
        },
        "rows": rows,
        "routing_only": alone,
    }
    if before is not None:
        content["before"] = {key: before[key] for key in ("conditions", "rows")}
    text = report(content)
    print(text)
    write_whole(options.out, json.dumps(content, indent=1) + "\n")
    write_whole(options.out.with_suffix(".md"), text)
    print(f"\nwrote {options.out}")
    return int(any(row["spill"] for row in rows))


def row_of(target: str, E: int, K: int, T: int, rule: str) -> dict:
    """Return the figures of one variant of the route kernel."""
    variant = aot.Variant(E, K, T, rule=RULES[rule])
    binary, _ = aot.compile_binary(variant, target)
    row = {"target": target, "E": E, "K": K, "T": T, "rule": rule} | aot._cuda_usage(binary)
    return row | (_figures(binary, T, tile_of(T, E, K)[0]) if target == PATHS_OF else {})


def alone_row(E: int, K: int, T: int) -> dict:
    """Return the figures of routing only, with the better of two tiles."""
    tiles = {kernels.columns_tile(E), tile_of(T, E, K)}
    rows = [_alone_with(E, K, T, tile) for tile in tiles]
    return min(rows, key=lambda row: row["cycles"] if T == 1 else row["instructions_a_row"])


def _alone_with(E: int, K: int, T: int, tile: tuple[int, int, int]) -> dict:
    BLOCK_T, BLOCK_E, num_warps = tile
    kernel, BLOCK_K = kernels.route_only_kernel, columns_of(BLOCK_T, K)
    constants = {
        "E": E, "K": K, "BLOCK_T": BLOCK_T, "BLOCK_E": BLOCK_E, "BLOCK_K": BLOCK_K,
        # a wrapper of its own would know them, as ours does
        "stride_lt": E, "stride_wt": K, "stride_it": K,
    }  # fmt: skip
    types = {"logits_ptr": "*bf16", "weights_ptr": "*fp32", "ids_ptr": "*i64"}
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32")
        for name in kernel.arg_names
    }
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in types}
    binary = triton.compile(
        ASTSource(kernel, signature, constants, aligned),
        target=GPUTarget(*aot.TARGETS[PATHS_OF]),
        options={"num_warps": num_warps},
    )
    row = {"E": E, "K": K, "T": T, "rows at a time": BLOCK_T} | aot._cuda_usage(binary)
    return row | _figures(binary, 1, BLOCK_T) | {"instructions_a_row": _whole(binary) / BLOCK_T}


def _whole(binary) -> int:
    return Code.of(binary.asm["cubin"]).paths()[-1][1]


def _figures(binary, T: int, BLOCK_T: int) -> dict:
    code = Code.of(binary.asm["cubin"])
    if T == MANY:
        return {"instructions_a_row": code.loop() / BLOCK_T}
    paths = code.paths()
    (cycles, instructions), (most_cycles, most_instructions) = paths[0], paths[-1]
    return {
        "cycles": cycles, "instructions": instructions,
        "cycles_missing": most_cycles, "instructions_missing": most_instructions,
    }  # fmt: skip


def report(content: dict) -> str:
    """Return the tables as Markdown."""

    def find(rows, **wanted):
        found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
        return found[0] if found else None

    rows, alone = content["rows"], content["routing_only"]
    earlier = content.get("before", {}).get("rows", [])
    single, many, registers = [], [], []
    for E, K in dict.fromkeys((row["E"], row["K"]) for row in rows):
        base = find(alone, E=E, K=K, T=1)
        for rule in RULES:
            now = find(rows, target=PATHS_OF, E=E, K=K, T=1, rule=rule)
            old = find(earlier, target=PATHS_OF, E=E, K=K, T=1, rule=rule)
            line = {"(E, K), policy": f"({E}, {K}), {rule}"}
            for label, cycles, count in (
                ("nothing missing", "cycles", "instructions"),
                ("some missing", "cycles_missing", "instructions_missing"),
            ):
                if earlier:
                    line[f"{label}, before"] = f"{old[cycles]:,} / {old[count]:,}" if old else None
                line[label] = f"{now[cycles]:,} / {now[count]:,}"
            line["routing only"] = f"{base['cycles']:,} / {base['instructions']:,}"
            single.append(line)
        now = find(rows, target=PATHS_OF, E=E, K=K, T=MANY)
        old = find(earlier, target=PATHS_OF, E=E, K=K, T=MANY)
        line = {"(E, K)": f"({E}, {K})"}
        if earlier:
            line["before"] = old["instructions_a_row"] if old else None
        line["now"] = now["instructions_a_row"]
        line["routing only"] = find(alone, E=E, K=K, T=MANY)["instructions_a_row"]
        many.append(line)
        line = {"(E, K)": f"({E}, {K})"}
        for T, rule in (
            (1, "exact"),
            (1, "quality budget"),
            (64, "quality budget"),
            (MANY, "exact"),
        ):
            found = [find(rows, target=t, E=E, K=K, T=T, rule=rule) for t in TARGETS]
            line[f"T={T}, {rule}"] = ", ".join(str(row["registers"]) for row in found if row)
        registers.append(line)
    measured = f"Compiled with: {facts(content['conditions'])}"
    if earlier:
        commit = content["before"]["conditions"]["commit"]
        measured += f" Before: commit {commit}, the same estimate."
    spilled = sum(1 for row in rows if row["spill"])
    return "\n\n".join(
        [
            "# What the compiler makes of the route kernel",
            "Estimates from machine code, for one warp alone: they order versions and are no times. "
            "No GPU has run this.",
            f"## One token on {PATHS_OF}: estimated cycles / instructions",
            table(single),
            f"## Many tokens on {PATHS_OF}: instructions of a warp per row (routing only: whole kernel)",
            table(many),
            f"## Registers a thread on {', '.join(TARGETS)}",
            table(registers),
            f"{len(rows)} variants, {spilled} with spills.",
            measured,
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
