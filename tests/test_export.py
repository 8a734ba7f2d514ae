"""Metrics on their way out: what leaves is what the dataclass holds, number by number."""

import subprocess
import sys
from dataclasses import fields, replace

import pytest
from prometheus_client import CollectorRegistry
from prometheus_client.parser import text_string_to_metric_families
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

import moe_gpu
from moe_gpu.export import (
    Meter,
    PrometheusCollector,
    postfix,
    prometheus_text,
    status_line,
    write_scalars,
)
from moe_gpu.meter import STATES
from moe_gpu.metrics import LayerMetrics, Metrics

COUNTED = {
    "tokens": "tokens",
    "pairs": "pairs",
    "hits": "hits",
    "misses": "misses",
    "unique_misses": "unique_misses",
    "swaps": "swaps",
    "moved_mass": "moved_mass",
    "padded": "padded_rows",
    "loads": "loads",
    "bytes_loaded": "loaded_bytes",
    "evictions": "evictions",
    "waves": "waves",
    "superseded": "superseded_records",
    "background": "background_requests",
    "filled": "filled_experts",
    "bypassed": "bypassed_loads",
    "prefetch_issued": "prefetch_issued",
    "prefetch_useful": "prefetch_useful",
    "prefetch_late": "prefetch_late",
    "prefetch_cancelled": "prefetch_cancelled",
    "prefetch_failed": "prefetch_failed",
    "prefetch_wasted_bytes": "prefetch_wasted_bytes",
    "verified": "verified_checksums",
    "pager_restarts": "pager_restarts",
}
MEASURED = {
    "moved_mass_p99": "moved_mass_p99",
    "l1_change": "l1_change",
    "routing_kl": "routing_kl_nats",
}
OF_A_LAYER = ["pairs", "hits", "misses", "unique_misses", "loads", "bytes_loaded", "evictions"]


class Stub:
    """What has metrics, and how often it was asked."""

    def __init__(self, now=None):
        self.now, self.reads = now or Metrics(), 0

    def metrics(self):
        self.reads += 1
        return self.now


def layer(i, **more):
    numbers = {name: 1000 * (i + 1) + n for n, name in enumerate(OF_A_LAYER)}
    measured = {name: (i + n + 1) / 64 for n, name in enumerate(MEASURED)}
    numbers |= measured | {"swaps_by_rank": (600 + i, 610 + i)}
    return LayerMetrics(
        **{"layer": i, "resident": 3 + i, "stall_ms": 12.5 * (i + 1)} | numbers | more
    )


def full():
    """Every figure there is, no two alike."""
    numbers = {name: 10 + n for n, name in enumerate(COUNTED)}
    tiers = {
        "loads_by_tier": {"pinned": 201, "pageable": 202, "disk": 203},
        "bytes_by_tier": {"pinned": 301, "disk": 303},
        "home_bytes": {"pinned": 401, "pageable": 402, "disk": 2**40},
    }
    states = {
        "slots": 16,
        "slots_used": 15,
        "staging_slots": 3,
        "pin_refused_bytes": 77,
        "route_path": "triton",
    }
    times = {"stall_ms": 250.5, "route_us_mean": 5.5, "route_us_p50": 5.0, "route_us_p99": 9.0}
    measured = {"moved_mass_p99": 0.25, "l1_change": 0.03125, "routing_kl": 0.0625}
    measured["swaps_by_rank"] = (501, 502, 503)
    return Metrics(**numbers | tiers | states | times | measured, layers=(layer(0), layer(1)))


def samples(text):
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation and family.type in ("counter", "gauge"), family
        for sample in family.samples:
            key = sample.name, frozenset(sample.labels.items())
            assert key not in found
            found[key] = sample.value
    return found


def key(name, **labels):
    return f"moe_gpu_{name}", frozenset(labels.items())


def test_exposition_has_every_number_and_no_other():
    m = full()
    want = {key(f"{name}_total", model="a"): getattr(m, f) for f, name in COUNTED.items()}
    want |= {
        key("stall_seconds_total", model="a"): 0.2505,
        key("hit_rate", model="a"): m.hits / m.pairs,
        key("prefetch_accuracy", model="a"): m.prefetch_useful / m.prefetch_issued,
        key("slots", model="a"): 16,
        key("slots_used", model="a"): 15,
        key("staging_slots", model="a"): 3,
        key("pin_refused_bytes", model="a"): 77,
        key("route_mean_seconds", model="a"): 5.5e-6,
        key("route_p50_seconds", model="a"): 5e-6,
        key("route_p99_seconds", model="a"): 9e-6,
        key("route_path_info", model="a", path="triton"): 1,
    }
    for field, name in (
        ("loads_by_tier", "tier_loads_total"),
        ("bytes_by_tier", "tier_loaded_bytes_total"),
        ("home_bytes", "home_bytes"),
    ):
        want |= {key(name, model="a", tier=t): n for t, n in getattr(m, field).items()}
    want |= {key(name, model="a"): getattr(m, f) for f, name in MEASURED.items()}
    want |= {
        key("rank_swaps_total", model="a", rank=str(k)): n for k, n in enumerate(m.swaps_by_rank)
    }
    for x in m.layers:
        of = {"model": "a", "layer": str(x.layer)}
        want |= {key(f"layer_{name}", **of): getattr(x, f) for f, name in MEASURED.items()}
        want |= {
            key("layer_rank_swaps_total", **of, rank=str(k)): n
            for k, n in enumerate(x.swaps_by_rank)
        }
        want |= {key(f"layer_{COUNTED[f]}_total", **of): getattr(x, f) for f in OF_A_LAYER}
        want[key("layer_stall_seconds_total", **of)] = x.stall_ms / 1e3
        want[key("layer_hit_rate", **of)] = x.hits / x.pairs
        want[key("layer_resident_experts", **of)] = x.resident
    assert samples(prometheus_text(Stub(m), model="a")) == pytest.approx(want)


def test_the_full_example_is_full():
    """A field added to the dataclasses must be thought of here too."""
    m = full()
    assert [f.name for f in fields(m) if getattr(m, f.name) == f.default] == []
    assert {f.name for f in fields(m)} - STATES - COUNTED.keys() == {
        "loads_by_tier", "bytes_by_tier", "stall_ms", "swaps_by_rank", "layers",
    }  # fmt: skip
    assert {f.name for f in fields(LayerMetrics)} == {
        "layer", "resident", "stall_ms", "swaps_by_rank", *MEASURED, *OF_A_LAYER,
    }  # fmt: skip


def test_what_was_not_measured_has_no_sample():
    found = {name for name, _ in samples(prometheus_text(Stub()))}
    assert "moe_gpu_hits_total" in found and "moe_gpu_hit_rate" in found
    assert not [name for name in found if "seconds" in name or "tier" in name or "path" in name]


def test_two_models_share_one_collector():
    registry, a, b = CollectorRegistry(), Stub(full()), Stub(Metrics(hits=5))
    collector = PrometheusCollector(a, model="a")
    registry.register(collector)
    assert a.reads == 0  # a model may be anything but ready while it is registered
    collector.add(b, "b")
    with pytest.raises(ValueError, match="label 'b'"):
        collector.add(b, "b")
    assert registry.get_sample_value("moe_gpu_hits_total", {"model": "a"}) == a.now.hits
    assert registry.get_sample_value("moe_gpu_hits_total", {"model": "b"}) == 5
    b.now = Metrics(hits=7)
    assert registry.get_sample_value("moe_gpu_hits_total", {"model": "b"}) == 7
    with pytest.raises(ValueError, match="moe_gpu_hits"):
        registry.register(PrometheusCollector(b, model="c"))
    reads = a.reads
    collector.remove("a")
    assert registry.get_sample_value("moe_gpu_hits_total", {"model": "a"}) is None
    assert a.reads == reads


def test_a_gate_can_be_scraped():
    gate = moe_gpu.MoEGate(hidden_size=8, num_experts=4, top_k=2)
    assert samples(prometheus_text(gate))[key("pairs_total", model="model")] == 0


def test_without_the_extra_it_says_what_to_install():
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from moe_gpu.export import PrometheusCollector, prometheus_text, status_line\n"
        "for wants in (PrometheusCollector, prometheus_text):\n"
        "    try: wants(None)\n"
        "    except ImportError as error: print(error)\n"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    said = child.stdout.splitlines()
    assert len(said) == 2 and all("pip install prometheus-client" in line for line in said)


def test_takes_metrics_or_what_has_them(tmp_path):
    class Handle:
        def metrics(self):
            return full()

    interval = Meter(Handle())()
    assert postfix(Handle()) == postfix(full()) and postfix(interval) == postfix(interval.metrics)
    assert status_line(Handle()) == status_line(full()) and status_line(interval)
    with SummaryWriter(tmp_path) as writer:
        write_scalars(writer, Handle(), step=1)
    assert scalars(tmp_path)["moe_gpu/hits"] == [(1, full().hits)]
    for use in (postfix, status_line, lambda other: write_scalars(None, other, 1)):
        for other in (None, {"hits": 1}, "hits"):
            with pytest.raises(TypeError, match="metrics must be Metrics, or an object with"):
                use(other)


def scalars(folder):
    events = EventAccumulator(str(folder)).Reload()
    return {
        tag: [(x.step, x.value) for x in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }


def test_tensorboard_scalars_read_back(tmp_path):
    m = full()
    with SummaryWriter(tmp_path) as writer:
        write_scalars(writer, m, 7)
        write_scalars(writer, replace(m, tokens=99), 8)
    want = {}
    for name, value in m.as_dict().items():
        if isinstance(value, dict):
            want |= {f"moe_gpu/{name}/{tier}": number for tier, number in value.items()}
        elif name == "swaps_by_rank":
            want |= {f"moe_gpu/{name}/{rank}": number for rank, number in enumerate(value)}
        elif name not in ("layers", "route_path"):
            want[f"moe_gpu/{name}"] = value
    for x in m.as_dict()["layers"]:
        place = f"moe_gpu/layer_{x.pop('layer')}"
        want |= {f"{place}/swaps_by_rank/{k}": n for k, n in enumerate(x.pop("swaps_by_rank"))}
        want |= {f"{place}/{name}": value for name, value in x.items()}
    found = scalars(tmp_path)
    assert {tag: value for tag, ((_, value), _) in found.items()} == pytest.approx(want)
    assert found["moe_gpu/tokens"] == [(7, m.tokens), (8, 99)]


def test_tensorboard_skips_what_was_not_measured(tmp_path):
    with SummaryWriter(tmp_path) as writer:
        write_scalars(writer, Metrics(layers=(LayerMetrics(layer=4),)), 0, prefix="run")
    found = scalars(tmp_path)
    assert "run/hits" in found and "run/layer_4/hit_rate" in found
    assert not [tag for tag in found if "stall" in tag or "route" in tag or "tier" in tag]


def test_status_line():
    m = Metrics(
        tokens=200, pairs=400, hits=340, loads=236, bytes_loaded=70_000_000,
        bytes_by_tier={"pinned": 70_000_000}, stall_ms=62.0, slots=16, slots_used=16,
    )  # fmt: skip
    line = "hits 85.0%, loads/token 1.18, MB/token 0.35, stall 0.31 ms/token, slots 16/16"
    assert status_line(m) == line
    from_disk = replace(
        m, bytes_by_tier={"pinned": 52_500_000, "pageable": 0, "disk": 17_500_000},
        prefetch_issued=50, prefetch_useful=31, stall_ms=None,
    )  # fmt: skip
    assert postfix(from_disk) == {
        "hits": "85.0%",
        "loads/token": "1.18",
        "MB/token": "0.35",
        "from": "pinned 75% disk 25%",
        "prefetch": "62% useful",
        "slots": "16/16",
    }


@pytest.mark.parametrize(
    "metrics, line",
    [
        (Metrics(), "no tokens yet"),
        (Metrics(slots=8, slots_used=8), "no tokens yet, slots 8/8"),
        (Metrics(tokens=1), "loads/token 0.00, MB/token 0.00"),
        (Metrics(pairs=2, hits=2), "hits 100.0%"),  # a gate without an offloader
        (
            Metrics(tokens=1, loads=64, bytes_loaded=22_548_578_304),
            "loads/token 64.0, MB/token 22,549",
        ),
        (Metrics(bytes_by_tier={"disk": 0}, stall_ms=3.0), "no tokens yet"),
    ],
)
def test_status_line_where_figures_are_missing(metrics, line):
    assert status_line(metrics) == line


def test_meter_gives_differences(monkeypatch):
    clock = iter([100.0, 102.0, 103.0, 103.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    moe = Stub(full())
    meter = Meter(moe)
    moe.now = replace(
        full(),
        tokens=110, bytes_loaded=full().bytes_loaded + 5_000_000, stall_ms=300.5, slots_used=16,
        loads_by_tier={"pinned": 201, "pageable": 210, "disk": 203},
        bytes_by_tier={"pinned": 302, "pageable": 9, "disk": 303},
        layers=(layer(0, hits=1006), layer(1), layer(2)),
    )  # fmt: skip
    peeked = meter.peek()
    assert (peeked.seconds, peeked.tokens_per_second, peeked.mb_per_second) == (2.0, 50.0, 2.5)
    interval = meter()
    assert interval.seconds == 3.0 and interval.metrics == peeked.metrics
    m = interval.metrics
    assert (m.tokens, m.bytes_loaded, m.stall_ms, m.hits) == (100, 5_000_000, 50.0, 0)
    assert (m.slots, m.slots_used, m.route_us_p50, m.route_path) == (16, 16, 5.0, "triton")
    assert m.loads_by_tier == {"pinned": 0, "pageable": 8, "disk": 0}
    assert m.bytes_by_tier == {"pinned": 1, "pageable": 9, "disk": 0}
    assert m.home_bytes == full().home_bytes
    assert [(x.layer, x.hits, x.loads, x.resident) for x in m.layers] == [
        (0, 5, 0, 3), (1, 0, 0, 4), (2, layer(2).hits, layer(2).loads, 5),
    ]  # fmt: skip
    nothing = meter()
    assert nothing.seconds == 0 == nothing.tokens_per_second == nothing.mb_per_second


@pytest.mark.parametrize(
    "after",
    [
        Metrics(tokens=3, hits=2, pairs=6),
        replace(full(), swaps=0),  # one total alone gives it away
        replace(full(), bytes_by_tier={"pinned": 300, "disk": 303}),
        replace(full(), layers=(layer(0), layer(1, stall_ms=0.0))),
        replace(full(), stall_ms=0.0),
    ],
)
def test_meter_survives_a_reset(after):
    moe = Stub(full())
    meter = Meter(moe)
    moe.now = after
    assert meter().metrics == after
    moe.now = replace(after, tokens=after.tokens + 4)
    assert meter().metrics.tokens == 4


def test_meter_where_the_stall_is_not_measured():
    moe = Stub(Metrics())
    meter = Meter(moe)
    moe.now = Metrics(stall_ms=2.0)
    assert meter().metrics.stall_ms == 2.0
    moe.now = Metrics(stall_ms=None)
    assert meter().metrics.stall_ms is None
