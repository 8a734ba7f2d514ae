"""Metrics on their way out: Prometheus, TensorBoard, one line for a terminal.

Everything here reads ``metrics()``, which synchronises with the device: call it a few times per
second and not per token, and not while a CUDA graph is being captured.
"""

from collections.abc import Iterator
from dataclasses import fields
from typing import NamedTuple

from .meter import STATES, HasMetrics, Interval, Meter
from .metrics import LayerMetrics, Metrics

__all__ = [
    "Interval",
    "Meter",
    "PrometheusCollector",
    "postfix",
    "prometheus_text",
    "status_line",
    "write_scalars",
]


class _Family(NamedTuple):
    """How Prometheus calls a figure: without prefix and ``_total``, in base units."""

    name: str
    text: str
    scale: float = 1


_FAMILIES = {
    "tokens": _Family("tokens", "Valid tokens, each counted once."),
    "pairs": _Family("pairs", "Executed (token, expert) pairs."),
    "hits": _Family("hits", "Pairs whose expert was resident when it was routed."),
    "misses": _Family("misses", "Pairs whose expert was not resident."),
    "unique_misses": _Family("unique_misses", "Missing experts, each once per call."),
    "hit_rate": _Family("hit_rate", "Hits per pair since the last reset."),
    "swaps": _Family("swaps", "Executed experts that stood in for a demanded one."),
    "moved_mass": _Family("moved_mass", "Router mass moved by swaps, in tokens' demand."),
    "padded": _Family("padded_rows", "Rows beyond the valid ones."),
    "moved_mass_p99": _Family("moved_mass_p99", "99th percentile of the moved mass per token."),
    "l1_change": _Family("l1_change", "Change of a token's mixing weights, mean."),
    "routing_kl": _Family("routing_kl_nats", "KL divergence that swaps add, mean per token."),
    "swaps_by_rank": _Family("rank_swaps", "Demanded experts swapped away, by rank from 0."),
    "loads": _Family("loads", "Experts copied to the device."),
    "bytes_loaded": _Family("loaded_bytes", "Bytes of experts copied to the device."),
    "loads_by_tier": _Family("tier_loads", "Experts copied, by the tier they came from."),
    "bytes_by_tier": _Family("tier_loaded_bytes", "Bytes copied, by the tier they came from."),
    "evictions": _Family("evictions", "Experts whose slot was given to another."),
    "waves": _Family("waves", "Passes over the slots."),
    "superseded": _Family("superseded_records", "Step records that nobody read in time."),
    "background": _Family("background_requests", "Wanted experts that were swapped away."),
    "filled": _Family("filled_experts", "Experts copied to fill the slots, outside any step."),
    "bypassed": _Family("bypassed_loads", "Loads through a staging slot, displacing nobody."),
    "prefetch_issued": _Family("prefetch_issued", "Prefetches whose copy was begun."),
    "prefetch_useful": _Family("prefetch_useful", "Prefetches that a step used."),
    "prefetch_late": _Family("prefetch_late", "Useful prefetches still under way when wanted."),
    "prefetch_cancelled": _Family("prefetch_cancelled", "Prefetches given up before a copy."),
    "prefetch_failed": _Family("prefetch_failed", "Prefetches whose copy failed."),
    "prefetch_wasted_bytes": _Family("prefetch_wasted_bytes", "Prefetched bytes never used."),
    "prefetch_accuracy": _Family("prefetch_accuracy", "Useful per issued prefetch."),
    "slots": _Family("slots", "Device slots in all, staging slots not counted."),
    "slots_used": _Family("slots_used", "Slots that hold an expert."),
    "staging_slots": _Family("staging_slots", "Slots that experts pass through."),
    "resident": _Family("resident_experts", "Experts of the layer in slots."),
    "home_bytes": _Family("home_bytes", "Bytes of expert weights, by home tier."),
    "pin_refused_bytes": _Family("pin_refused_bytes", "Bytes that could not be page-locked."),
    "verified": _Family("verified_checksums", "Checksums compared with the stored ones."),
    "pager_restarts": _Family("pager_restarts", "Times the copying thread was started again."),
    "stall_ms": _Family("stall_seconds", "Time that compute waited for copies.", 1e-3),
    "route_us_mean": _Family("route_mean_seconds", "Mean latency of recent route calls.", 1e-6),
    "route_us_p50": _Family("route_p50_seconds", "Median latency of recent route calls.", 1e-6),
    "route_us_p99": _Family("route_p99_seconds", "99th percentile of that latency.", 1e-6),
    "route_path": _Family("route_path", "What ran the last route call."),
}


def _figures(part: Metrics | LayerMetrics) -> dict[str, object]:
    """Return the figures of one object by name, derived ones included, without the layers."""
    figures = {f.name: getattr(part, f.name) for f in fields(part)} | {"hit_rate": part.hit_rate}
    if isinstance(part, Metrics):
        figures["prefetch_accuracy"] = part.prefetch_accuracy
    ranks = figures["swaps_by_rank"]
    if ranks is not None:
        figures["swaps_by_rank"] = {str(rank): swaps for rank, swaps in enumerate(ranks)}
    return {name: value for name, value in figures.items() if name not in ("layer", "layers")}


def _metrics_of(given: Metrics | HasMetrics | Interval) -> Metrics:
    """Return metrics, those of an interval, or those of whatever has ``metrics()``."""
    found = given if isinstance(given, Metrics) else getattr(given, "metrics", None)
    found = found() if callable(found) else found
    if not isinstance(found, Metrics):
        raise TypeError(
            "metrics must be Metrics, or an object with metrics() such as an attached model, "
            f"got {given!r}"
        )
    return found


def _prometheus():
    """Return prometheus_client, or say how to get it."""
    try:
        import prometheus_client.core
    except ImportError:
        raise ImportError(
            "Prometheus metrics need prometheus_client: pip install prometheus-client"
        ) from None
    return prometheus_client


class PrometheusCollector:
    """Collector for ``prometheus_client``: a scrape reads ``metrics()`` once per model.

    Names follow Prometheus: ``moe_gpu_hits_total``, ``moe_gpu_loaded_bytes_total``,
    ``moe_gpu_stall_seconds_total``, gauges such as ``moe_gpu_slots_used``. Figures of one layer
    are families of their own, ``moe_gpu_layer_hits_total{layer="3"}``, and so are those by tier,
    ``moe_gpu_tier_loads_total{tier="disk"}``, and by rank: a sum over a family counts nothing twice. What was
    not measured has no sample. ``reset_metrics()`` looks to Prometheus like a restart.

    A second model in the same process goes into the same collector: :meth:`add`.

    Args:
        moe: What has ``metrics()``; kept until :meth:`remove`.
        model: Value of the label ``model``.

    Raises:
        ImportError: ``prometheus_client`` is not installed.

    Example:
        >>> prometheus_client.REGISTRY.register(PrometheusCollector(moe, model="mixtral"))
        >>> prometheus_client.start_http_server(9400)
    """

    def __init__(self, moe: HasMetrics, model: str = "model"):
        self._core = _prometheus().core
        self._models = {model: moe}

    def add(self, moe: HasMetrics, model: str) -> None:
        """Report another model as well.

        Raises:
            ValueError: The label is taken.
        """
        if model in self._models:
            raise ValueError(f"there is already a model with the label {model!r}")
        self._models[model] = moe

    def remove(self, model: str) -> None:
        """Report a model no longer, and let go of it.

        Raises:
            KeyError: No such label.
        """
        del self._models[model]

    def describe(self) -> Iterator:
        """Yield every family without samples: registering reads no metrics."""
        for part, prefix in ((Metrics(), ""), (LayerMetrics(layer=0), "layer_")):
            for field in _figures(part):
                yield self._family(field, prefix)

    def collect(self) -> Iterator:
        """Yield every family that has samples."""
        families = {}
        for model, moe in list(self._models.items()):  # a scrape comes from another thread
            metrics = moe.metrics()
            self._sample(families, metrics, "", {"model": model})
            for layer in metrics.layers:
                labels = {"model": model, "layer": str(layer.layer)}
                self._sample(families, layer, "layer_", labels)
        yield from families.values()

    def _family(self, field: str, prefix: str):
        """Return an empty family for one figure."""
        core, family = self._core, _FAMILIES[field]
        kind = "gauge" if field in STATES else "counter"
        kind = "info" if field == "route_path" else kind
        return core.Metric(f"moe_gpu_{prefix}{family.name}", family.text, kind)

    def _sample(self, families: dict, part: Metrics | LayerMetrics, prefix: str, labels: dict):
        """Add the figures of one object to their families."""
        for field, value in _figures(part).items():
            if value is None or value == {}:
                continue  # not measured: no sample, and no family without one
            family = families.setdefault(prefix + field, self._family(field, prefix))
            suffix = {"counter": "_total", "info": "_info"}.get(family.type, "")
            if isinstance(value, dict):
                by = "rank" if field == "swaps_by_rank" else "tier"
                samples = [(labels | {by: part}, number) for part, number in value.items()]
            elif isinstance(value, str):
                samples = [(labels | {"path": value}, 1)]
            else:
                samples = [(labels, value)]
            for names, number in samples:
                family.add_sample(family.name + suffix, names, number * _FAMILIES[field].scale)


def prometheus_text(moe: HasMetrics, model: str = "model") -> str:
    """Return the metrics in Prometheus' text format, for a server or file of your own.

    Args:
        moe: What has ``metrics()``.
        model: Value of the label ``model``.

    Raises:
        ImportError: ``prometheus_client`` is not installed.
    """
    prometheus = _prometheus()
    registry = prometheus.CollectorRegistry()
    registry.register(PrometheusCollector(moe, model))
    return prometheus.generate_latest(registry).decode()


def write_scalars(
    writer, metrics: Metrics | HasMetrics | Interval, step: int, prefix: str = "moe_gpu"
) -> None:
    """Write every number as a TensorBoard scalar; what was not measured is left out.

    Tags are ``prefix/hits``, ``prefix/loads_by_tier/disk`` and ``prefix/layer_3/hits``.
    TensorBoard keeps float32: totals over 16 million lose their last digits.

    Args:
        writer: A ``torch.utils.tensorboard.SummaryWriter``.
        metrics: Totals, what has them, or the difference that a :class:`Meter` gives.
        step: Global step, such as the tokens so far.
        prefix: First part of every tag.

    Raises:
        TypeError: Neither metrics nor anything that has them.
    """
    metrics = _metrics_of(metrics)
    parts = {prefix: metrics} | {f"{prefix}/layer_{x.layer}": x for x in metrics.layers}
    for place, part in parts.items():
        for name, value in _figures(part).items():
            by_tag = value if isinstance(value, dict) else {None: value}
            for key, number in by_tag.items():
                if isinstance(number, int | float):
                    tag = f"{place}/{name}" if key is None else f"{place}/{name}/{key}"
                    writer.add_scalar(tag, number, step)


def postfix(metrics: Metrics | HasMetrics | Interval) -> dict[str, str]:
    """Return what a progress bar should show, for ``tqdm.set_postfix``.

    Empty where nothing happened yet; parts that do not apply are left out.

    Raises:
        TypeError: Neither metrics nor anything that has them.
    """
    m, shown = _metrics_of(metrics), {}
    if m.pairs:
        shown["hits"] = f"{m.hit_rate:.1%}"
    if m.tokens:
        shown["loads/token"] = _short(m.loads / m.tokens)
        shown["MB/token"] = _short(m.bytes_loaded / 1e6 / m.tokens)
    moved = sum(m.bytes_by_tier.values())
    if m.bytes_by_tier.get("disk"):
        shares = ((tier, num_bytes / moved) for tier, num_bytes in m.bytes_by_tier.items())
        shown["from"] = " ".join(f"{tier} {share:.0%}" for tier, share in shares if share)
    if m.tokens and m.stall_ms is not None:
        shown["stall"] = f"{_short(m.stall_ms / m.tokens)} ms/token"
    if m.prefetch_issued:
        shown["prefetch"] = f"{m.prefetch_accuracy:.0%} useful"
    if m.slots:
        shown["slots"] = f"{m.slots_used}/{m.slots}"
    return shown


def status_line(metrics: Metrics | HasMetrics | Interval) -> str:
    """Return one short line for a long run, made of :func:`postfix`.

    Raises:
        TypeError: Neither metrics nor anything that has them.

    Example:
        >>> status_line(moe.metrics())
        'hits 85.2%, loads/token 1.18, MB/token 0.35, stall 0.31 ms/token, slots 16/16'
    """
    metrics = _metrics_of(metrics)
    shown = postfix(metrics)
    parts = [f"{name} {value}" for name, value in shown.items()]
    return ", ".join(parts if metrics.tokens or metrics.pairs else ["no tokens yet", *parts])


def _short(number: float) -> str:
    """Return about three digits."""
    return f"{number:.2f}" if number < 10 else f"{number:.1f}" if number < 100 else f"{number:,.0f}"
