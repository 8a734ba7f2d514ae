"""Where each expert has its home: page-locked host memory, pageable host memory, or disk.

Plain arithmetic, without tensors: the same decision serves the planner and the loader.

Shape suffixes: L layers, E experts.
"""

import enum
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

HOST_SHARE = 0.8  # of the available memory, where nobody says how much; untuned
PINNED_SHARE = 0.5  # page-locked memory is lost to everybody else on the machine


class Tier(enum.Enum):
    """Home of an expert's weights, fastest first."""

    PINNED = "pinned"
    PAGEABLE = "pageable"
    DISK = "disk"


def place(
    num_layers: int,
    num_experts: int,
    expert_bytes: int,
    pinned_memory: int,
    host_memory: int,
    *,
    on_disk: bool,
    heat: Sequence[Sequence[float]] | None = None,
) -> list[list[Tier]]:
    """Return the home of every expert, hottest experts in the fastest tier.

    Equal heat, which is the default, goes expert by expert over all layers, so that no layer has
    more than one expert more than another in any tier.

    Args:
        num_layers: L, ``>= 1``.
        num_experts: Experts per layer E, ``>= 1``.
        expert_bytes: Size of one expert, ``>= 1``.
        pinned_memory: Bytes of host memory for page-locked experts, in ``[0, host_memory]``.
        host_memory: Bytes of host memory for experts in all, page-locked ones included.
        on_disk: Whether experts may stay in the checkpoint's files.
        heat: Finite numbers ``[layer][expert]``, higher is hotter.

    Returns:
        Tiers ``[layer][expert]``.

    Raises:
        ValueError: An argument outside its bounds, or experts that fit nowhere.
    """
    sizes = {"num_layers": num_layers, "num_experts": num_experts, "expert_bytes": expert_bytes}
    for name, value in sizes.items():
        if value < 1:
            raise ValueError(f"{name} must be >= 1, got {value}")
    if not 0 <= pinned_memory <= host_memory:
        raise ValueError(
            f"pinned_memory must lie in [0, host_memory={host_memory:,}], got {pinned_memory:,}"
        )
    total = num_layers * num_experts
    pinned, host = pinned_memory // expert_bytes, host_memory // expert_bytes
    if host < total and not on_disk:
        raise ValueError(
            f"host_memory={host_memory:,} bytes holds {host} of {total} experts of "
            f"{expert_bytes:,} bytes: all of them take {total * expert_bytes:,}"
        )
    order = [(layer, expert) for expert in range(num_experts) for layer in range(num_layers)]
    if heat is not None:
        heat = _checked(heat, num_layers, num_experts)
        order.sort(key=lambda home: -heat[home[0]][home[1]])  # stable: ties stay spread
    tiers_LE = [[Tier.DISK] * num_experts for _ in range(num_layers)]
    for rank, (layer, expert) in enumerate(order[:host]):
        tiers_LE[layer][expert] = Tier.PINNED if rank < pinned else Tier.PAGEABLE
    return tiers_LE


def _checked(heat, num_layers, num_experts):
    heat_LE = [[float(value) for value in row] for row in heat]
    if [len(row) for row in heat_LE] != [num_experts] * num_layers:
        raise ValueError(
            f"heat must be {num_layers} rows of {num_experts}, "
            f"got rows of {[len(row) for row in heat_LE]}"
        )
    for layer, row in enumerate(heat_LE):
        for expert, value in enumerate(row):
            if not math.isfinite(value):
                raise ValueError(f"heat[{layer}][{expert}] must be finite, got {value}")
    return heat_LE


def host_budget(
    host_memory: int | None,
    pinned_memory: int | None,
    expert_total_bytes: int,
    *,
    cuda: bool,
    available: int | None,
) -> tuple[int, int]:
    """Return how many bytes of host memory experts may take, page-locked and in all.

    Args:
        host_memory: In all. Default: every expert, but at most 80 % of what is available.
        pinned_memory: Page-locked part. Default on CUDA: ``host_memory``, but at most half of
            what is available; else 0.
        expert_total_bytes: Bytes of all experts.
        cuda: Whether the experts are copied to a CUDA device.
        available: Free host memory, see :func:`available_memory`; None if unknown.

    Returns:
        ``(pinned_bytes, host_bytes)``. Neither is more than all experts take.

    Raises:
        ValueError: A negative amount, more page-locked memory than memory in all, or nothing to
            derive ``host_memory`` from.
    """
    given = {"host_memory": host_memory, "pinned_memory": pinned_memory}
    for name, value in given.items():
        if value is not None and value < 0:
            raise ValueError(f"{name} must be >= 0 bytes, got {value:,}")
    if host_memory is not None and pinned_memory is not None and pinned_memory > host_memory:
        raise ValueError(
            f"pinned_memory={pinned_memory:,} bytes must be <= host_memory={host_memory:,}, "
            "of which it is a part"
        )
    if host_memory is None:
        if available is None:
            raise ValueError("host_memory must be given: this system does not tell what is free")
        # more may be pinned on request than would be taken by default
        host_memory = max(math.floor(HOST_SHARE * available), pinned_memory or 0)
    host = min(host_memory, expert_total_bytes)
    if available is not None and host > available:
        warnings.warn(
            f"experts are to take {host:,} bytes of host memory, {available:,} are available",
            RuntimeWarning,
            stacklevel=2,
        )
    if pinned_memory is None:
        # who gives host_memory vouches for it
        free = host_memory if available is None else available
        pinned_memory = math.floor(PINNED_SHARE * free) if cuda else 0
    return min(pinned_memory, host), host


def available_memory(root: Path = Path("/")) -> int | None:
    """Return the bytes of host memory that this process can still take without swapping.

    On Linux the least of ``MemAvailable`` and what each memory cgroup above the process leaves;
    elsewhere the free, else all physical pages; None where not even those are known.

    Args:
        root: Where ``proc`` and ``sys`` are.
    """
    for line in _lines(root / "proc/meminfo"):
        if line.startswith("MemAvailable:"):
            return min([int(line.split()[1]) * 1024, *_cgroup_headrooms(root)])
    for name in ("SC_AVPHYS_PAGES", "SC_PHYS_PAGES"):
        try:
            return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")
        except (AttributeError, OSError, ValueError):  # no sysconf at all, or not this name
            continue
    return None


def _cgroup_headrooms(root: Path) -> Iterator[int]:
    """Yield what is left under the limit of each cgroup from the process's own to the root."""
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
    v2 = ("memory.max", "memory.current", "inactive_file")
    for line in _lines(root / "proc/self/cgroup"):
        number, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            mounts, files = ["sys/fs/cgroup/memory"], v1
        elif number == "0":
            mounts, files = ["sys/fs/cgroup", "sys/fs/cgroup/unified"], v2
        else:
            continue
        # in a container the path may be the host's: then only the mount itself exists
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in mounts:
            for depth in range(len(parts), -1, -1):
                yield from _headroom(root.joinpath(mount, *parts[:depth]), *files)


def _headroom(folder: Path, limit: str, usage: str, cache: str) -> Iterator[int]:
    limits, usages = _lines(folder / limit), _lines(folder / usage)
    if not limits or not usages or limits[0] == "max":
        return
    # the page cache counts as used but gives way
    stat = dict(line.split(maxsplit=1) for line in _lines(folder / "memory.stat"))
    yield max(0, int(limits[0]) - int(usages[0]) + int(stat.get(cache, 0)))


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
