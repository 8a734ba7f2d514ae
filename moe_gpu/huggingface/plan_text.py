"""A memory plan as text of at most 80 columns."""

import textwrap

from .plan import MemoryPlan

WIDTH = 80
_NUMBERS = 14  # columns of a number or a size


def plan_text(plan: MemoryPlan) -> str:
    """Return what fits where as aligned lines, without colour."""
    model = plan.model
    title = (
        f"{model.model_type}, {model.dtype}: {model.moe_layers} MoE layers of "
        f"{model.num_experts:,} experts of {size(model.expert_bytes)}, {model.top_k} per token"
    )
    lines = [
        *textwrap.wrap(title, WIDTH),
        "",
        *_device(plan),
        "",
        *_host(plan),
        "",
        *_traffic(plan),
    ]
    for note in plan.notes:
        lines += ["", *textwrap.wrap(f"Note: {note}.", WIDTH)]
    return "\n".join(lines)


def size(num_bytes: int) -> str:
    """Return bytes in the largest binary unit of which there is at least one."""
    for power, unit in ((4, "TiB"), (3, "GiB"), (2, "MiB"), (1, "KiB")):
        if num_bytes >= 1024**power:
            return f"{num_bytes / 1024**power:,.2f} {unit}"
    return f"{num_bytes} B"


def _row(label: str, *values: str) -> str:
    numbers = "".join(f"{value:>{_NUMBERS}}" for value in values)
    return f"{label:<{WIDTH - len(numbers)}}{numbers}".rstrip()


def _device(plan: MemoryPlan) -> list[str]:
    device, model = plan.device, plan.model
    lines = [
        _row("Device memory"),
        _row("  dense weights", size(device.dense_bytes)),
        _row(f"  KV cache of {device.context_tokens:,} tokens", size(device.kv_cache_bytes)),
        _row("  workspace (an estimate)", size(device.workspace_bytes)),
    ]
    if device.slots is not None:
        staging = device.staging_bytes // model.expert_bytes
        where = (
            f"one pool over layers, {device.slots / model.moe_layers:.1f} a layer"
            if device.pool
            else f"{device.slots_per_layer} per layer"
        )
        lines += [
            _row(f"  staging slots: {staging}", size(device.staging_bytes)),
            _row(f"  expert slots: {device.slots:,} ({where})", size(device.slots_bytes)),
            _row("  unused", size(device.unused_bytes)),
            _row("  gpu_memory, all of these", size(device.gpu_memory)),
        ]
    experts = model.moe_layers * model.num_experts
    lines += [
        _row(f"  all {experts:,} experts alone", size(model.experts_bytes)),
        _row("  everything resident would need", size(device.everything_resident_bytes)),
    ]
    return lines


def _host(plan: MemoryPlan) -> list[str]:
    host = plan.host
    lines = [_row("Homes of the experts", "experts", "size")]
    for tier, experts in host.experts.items():
        lines.append(_row(f"  {tier}", f"{experts:,}", size(host.bytes[tier])))
    free = "unknown" if host.available_memory is None else size(host.available_memory)
    lines += [
        _row("  host_memory, for pinned and pageable", size(host.host_memory)),
        _row("  pinned_memory, a part of it", size(host.pinned_memory)),
        _row("  available on this machine (the defaults come from it)", free),
    ]
    return lines


def _traffic(plan: MemoryPlan) -> list[str]:
    traffic = plan.traffic
    if traffic.hit_rate == traffic.assumed_hit_rate:
        why = "an assumption"
    else:
        why = "all resident" if traffic.hit_rate == 1 else "all that the slots allow"
    lines = [
        f"Per token, if {traffic.hit_rate:.1%} of its {traffic.pairs_per_token:,} routed pairs hit "
        f"({why})",
        _row("  experts loaded", f"{traffic.misses_per_token:,.2f}"),
        _row("  over the link to the device", size(traffic.bytes_per_token)),
    ]
    if traffic.disk_bytes_per_token:
        lines.append(
            _row("  from disk, if misses are spread evenly", size(traffic.disk_bytes_per_token))
        )
    lines.append(
        _row(
            f"  tokens/s at most, from a link of {traffic.link_gbps:g} GB/s alone",
            _rate(traffic.link_tokens_per_s),
        )
    )
    if traffic.disk_tokens_per_s is not None:
        lines += [
            _row(
                f"  tokens/s at most, from a disk of {traffic.disk_gbps:g} GB/s alone",
                _rate(traffic.disk_tokens_per_s),
            ),
            _row("  tokens/s at most, both overlapping", _rate(traffic.tokens_per_s)),
        ]
    return lines


def _rate(tokens_per_s: float | None) -> str:
    if tokens_per_s is None:
        return "no limit"
    return f"{tokens_per_s:,.2f}" if tokens_per_s < 100 else f"{tokens_per_s:,.0f}"
