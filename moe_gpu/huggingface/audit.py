"""The audit: what the expert that was wanted would have said, against what its stand-in said.

A swap is decided from router weights alone. The audit measures, on a sample of the swaps, what it
did to the layer. It keeps the hidden state x of a token whose expert m gave way to r, with what r
said, until m has a turn in that layer for a reason of its own, and then computes m on x:

    error = ||a(m) f_m(x) - a(r) f_r(x)|| / ||y||

``a(m)`` is the mixing weight that the model's own routing gives m, ``a(r)`` the one that was used,
y the layer's output for the token as it was. The error is local: what later layers make of it, and
the other experts of the token, whose weights a swap changes a little, are not in it.

The sample: each token of each decode call of a layer is drawn with the audit's rate by a seeded
generator, and all swaps of a drawn token are taken. So every swap has the same chance, whatever
the rhythm of text and layers (every hundredth swap would always meet the same layer where a token
has a number of swaps that divides it), the same run draws the same tokens, and a token that is not
drawn costs a random number. No expert is loaded for an audit, so experts that seldom come back
are under-represented in what is compared; ``dropped`` says how many did not come back in time.

Shape suffixes: T tokens, R drawn rows of them, E experts, K experts per token, D model width,
N samples.
"""

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..gate import MoEGate, Routing
from ..kernels.route_ref import SIMILARITY, Rule
from ..kernels.score_ref import mixing_weights, rank_experts, score_ref
from ..waiting import page_locked, wait_event

WAITING = 64  # samples per layer that wait for their expert; with x and f(x), D values each
KEPT = 1024  # comparisons per layer that figures are taken over, the most recent


@dataclass(frozen=True, kw_only=True)
class AuditFigures:
    """What an audit has found, in one layer or in all.

    Figures are over the last 1,024 comparisons of each layer, without those that are not finite
    (an output of norm 0); None where there are none.

    Attributes:
        sampled: Swaps that were drawn; ``compared + dropped + pending``.
        compared: Swaps whose wanted expert has been computed.
        dropped: Swaps that gave way to later ones, 64 of a layer being kept, or to the end of the
            attachment.
        pending: Swaps that wait for their expert.
        error_mean, error_p50, error_p99: Of the error of a swap, as a share of the norm of the
            layer's output; see :mod:`moe_gpu.huggingface.audit`.
        cosine_mean: Cosine between the outputs of the wanted expert and of its stand-in.
        price_mean: Of the price at which :class:`~moe_gpu.policies.QualityBudget` takes a swap,
            whatever the policy in force: ``sqrt(w(m)^2 + w(r)^2 - 1.5 w(m) w(r))``.
        price_correlation: Spearman's rank correlation between price and error: 1 where the price
            puts swaps in the right order, 0 where it knows nothing about them.
    """

    sampled: int
    compared: int
    dropped: int
    pending: int
    error_mean: float | None = None
    error_p50: float | None = None
    error_p99: float | None = None
    cosine_mean: float | None = None
    price_mean: float | None = None
    price_correlation: float | None = None


@dataclass(frozen=True, kw_only=True)
class LayerAudit(AuditFigures):
    """What an audit has found in one layer.

    Attributes:
        layer: MoE layer, counted from 0.
    """

    layer: int


@dataclass(frozen=True, kw_only=True)
class Audit(AuditFigures):
    """What an audit has found since the start or the last reset.

    Attributes:
        rate: Share of the tokens that is drawn.
        layers: The same by layer.
    """

    rate: float
    layers: tuple[LayerAudit, ...]


class _Drawn(NamedTuple):
    """The drawn rows of a route call, until the experts of the layer have run."""

    rows: list[int]  # of the call's tokens
    x_RD: torch.Tensor
    logits_RE: torch.Tensor  # float32
    mass_RE: torch.Tensor  # float32, as the policy prices it
    demand_RK: torch.Tensor  # best first
    weights_RK: torch.Tensor  # as used
    choices_2RK: torch.Tensor  # demand and executed ids, on the host
    arrived: torch.cuda.Event | None  # when they are there


class _Sample(NamedTuple):
    """A swap that waits for the expert that was wanted."""

    expert: int
    x_D: torch.Tensor
    used_D: torch.Tensor  # output of the stand-in
    terms_4: torch.Tensor  # a(m), a(r), norm of y, price


class LayerAuditor:
    """Samples and compares the swaps of one layer; its caller holds the offloader's lock.

    Args:
        gate: Routes the layer.
        draws: The generator of the model's draws.
        rate: Share of tokens that is drawn.
        timeout_s: Bound of the wait for the device, in seconds.
    """

    def __init__(self, gate: MoEGate, draws: random.Random, rate: float, timeout_s: float):
        self._gate, self._draws, self._rate, self._timeout_s = gate, draws, rate, timeout_s
        self._comparisons = torch.zeros(KEPT, 3, device=gate.state.slot_of_LE.device)
        self.reset()

    def reset(self) -> None:
        """Forget all samples and comparisons."""
        self._drawn: _Drawn | None = None
        self._waiting: list[_Sample] = []
        self._sampled = self._compared = self._dropped = 0

    def close(self) -> None:
        """Free what is on the device; figures stay readable."""
        self._drawn = None
        self._dropped += len(self._waiting)
        self._waiting = []
        self._comparisons = self._comparisons.cpu()

    def draw(
        self,
        hidden_TD: torch.Tensor,
        routing: Routing,
        correction_bias: torch.Tensor | None = None,
    ) -> None:
        """Draw tokens of a route call; no wait for the device.

        Args:
            hidden_TD: What was routed, ``(T, D)``.
            routing: What the gate decided.
            correction_bias: ``(E,)``, that it decided with.
        """
        self._drawn = None
        T, gate = len(hidden_TD), self._gate
        if T > gate.max_policy_tokens or gate.policy.rule == Rule.EXACT:
            return  # routed exactly
        rows = [t for t in range(T) if self._draws.random() < self._rate]
        if not rows:
            return
        with torch.no_grad():
            # an index on the host would be a copy that waits
            x_RD, logits_RE, weights_RK, ids_RK = (
                torch.stack([part[t] for t in rows]) for part in (hidden_TD, *routing)
            )
            logits_RE = logits_RE.float()
            scores = score_ref(logits_RE, gate.score_rule, correction_bias)
            order_RE = rank_experts(scores.selection_TE, scores.candidate_TE)
            demand_RK = order_RE[:, : gate.top_k]
            choices_2RK, arrived = _send(torch.stack([demand_RK, ids_RK]))
        self._drawn = _Drawn(
            rows, x_RD, logits_RE, scores.mass_TE, demand_RK, weights_RK, choices_2RK, arrived
        )

    def sample(self, pairs_TKD: torch.Tensor, mixed_TD: torch.Tensor) -> None:
        """Keep the swaps of the tokens that were drawn.

        Waits for what was ordered by the time of the route call, which the offloader's step has
        waited for already.

        Args:
            pairs_TKD: Output of each executed expert, before weights.
            mixed_TD: Output of the layer.
        """
        drawn, self._drawn = self._drawn, None
        if drawn is None:
            return
        if drawn.arrived is not None:
            wait_event(drawn.arrived, self._timeout_s, "the audit's copy of a routing")
        own_RK = mixing_weights(drawn.logits_RE, drawn.demand_RK, self._gate.score_rule)
        shares_RE = drawn.mass_RE / drawn.mass_RE.gather(1, drawn.demand_RK).sum(1, keepdim=True)
        samples = []
        for row, (demand, executed) in enumerate(zip(*drawn.choices_2RK.tolist(), strict=True)):
            token = drawn.rows[row]
            for m, r in swap_pairs(demand, executed):
                place = executed.index(r)
                terms = (
                    own_RK[row, demand.index(m)],
                    drawn.weights_RK[row, place].float(),
                    mixed_TD[token].float().norm(),
                    swap_price(shares_RE[row, m], shares_RE[row, r]),
                )
                # cloned: a view would keep the whole call
                used_D = pairs_TKD[token, place].clone()
                samples.append(_Sample(m, drawn.x_RD[row].clone(), used_D, torch.stack(terms)))
        waiting = self._waiting + samples
        too_many = max(0, len(waiting) - WAITING)
        self._waiting = waiting[too_many:]
        self._sampled += len(samples)
        self._dropped += too_many

    def compare(self, expert: int, compute: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Compute an expert for the samples that wait for it; no wait for the device.

        For the time of the expert's turn: its slot may be given away afterwards.

        Args:
            expert: Whose turn it is.
            compute: From hidden states ``(N, D)`` to the expert's output.
        """
        due = [sample for sample in self._waiting if sample.expert == expert]
        if not due:
            return
        wanted_ND = compute(torch.stack([sample.x_D for sample in due])).float()
        used_ND = torch.stack([sample.used_D for sample in due]).float()
        terms_N4 = torch.stack([sample.terms_4 for sample in due])
        own_N, weight_N, norm_N, price_N = terms_N4.unbind(1)
        moved_ND = own_N[:, None] * wanted_ND - weight_N[:, None] * used_ND
        cosine_N = torch.cosine_similarity(wanted_ND, used_ND, dim=1)
        found_N3 = torch.stack([moved_ND.norm(dim=1) / norm_N, cosine_N, price_N], dim=1)
        for place, found_3 in enumerate(found_N3, self._compared):
            self._comparisons[place % KEPT] = found_3
        self._compared += len(due)
        self._waiting = [sample for sample in self._waiting if sample.expert != expert]

    def comparisons(self) -> torch.Tensor:
        """Return error, cosine and price of what is kept, float64 ``(N, 3)`` on the host.

        Synchronises; the order is not that of time.
        """
        return self._comparisons[: self._compared].cpu().double()

    def counts(self) -> dict[str, int]:
        """Return the counts of :class:`AuditFigures`."""
        return {
            "sampled": self._sampled,
            "compared": self._compared,
            "dropped": self._dropped,
            "pending": len(self._waiting),
        }


class Auditor:
    """The audit of an attached model.

    Args:
        rate: Share of tokens that is drawn, in (0, 1].
        gates: Of the layers.
        timeout_s: Bound of every wait for the device, in seconds.
    """

    def __init__(self, rate: float, gates: Sequence[MoEGate], timeout_s: float):
        draws = random.Random(0)
        self.rate = float(rate)
        self.layers = [LayerAuditor(gate, draws, self.rate, timeout_s) for gate in gates]

    def report(self) -> Audit:
        """Return what was found so far. Synchronises."""
        found = [layer.comparisons() for layer in self.layers]
        counts = [layer.counts() for layer in self.layers]
        layers = [
            LayerAudit(layer=i, **count, **_figures(found_N3))
            for i, (count, found_N3) in enumerate(zip(counts, found, strict=True))
        ]
        total = {name: sum(count[name] for count in counts) for name in counts[0]}
        return Audit(rate=self.rate, layers=tuple(layers), **total, **_figures(torch.cat(found)))

    def reset(self) -> None:
        """Forget all samples and comparisons."""
        for layer in self.layers:
            layer.reset()

    def close(self) -> None:
        """Free what is on the device; :meth:`report` still works."""
        for layer in self.layers:
            layer.close()


def swap_pairs(demand: list[int], executed: list[int]) -> list[tuple[int, int]]:
    """Return ``(wanted, stand-in)`` of each swap of a token, in the order the policy took them.

    Args:
        demand: Experts that the router wanted, best first.
        executed: Experts that were computed, best first.
    """
    gone = [expert for expert in reversed(demand) if expert not in executed]
    came = [expert for expert in executed if expert not in demand]
    return list(zip(gone, came, strict=True))


def swap_price(wanted: torch.Tensor, stand_in: torch.Tensor) -> torch.Tensor:
    """Return what the output rule expects a swap to cost; see ``Rule.OUTPUT``.

    Args:
        wanted: Router mass of the expert swapped away, as a share of the demand's.
        stand_in: The same of the expert that took its place.
    """
    squared = wanted * wanted + stand_in * (stand_in - 2 * SIMILARITY * wanted)
    return squared.clamp(min=0).sqrt()


def _send(ids: torch.Tensor) -> tuple[torch.Tensor, "torch.cuda.Event | None"]:
    """Order a copy to the host; return where it lands, and when."""
    if not ids.is_cuda:
        return ids, None
    host, arrived = page_locked(ids.shape, ids.dtype), torch.cuda.Event()
    host.copy_(ids, non_blocking=True)
    arrived.record(torch.cuda.current_stream(ids.device))
    return host, arrived


def _figures(found_N3: torch.Tensor) -> dict[str, float | None]:
    """Return the figures of :class:`AuditFigures` that are not counts."""
    found_N3 = found_N3[found_N3.isfinite().all(1)]
    if not len(found_N3):
        return {}
    error_N, cosine_N, price_N = found_N3.unbind(1)
    p50, p99 = error_N.quantile(torch.tensor([0.5, 0.99], dtype=torch.float64)).tolist()
    return {
        "error_mean": error_N.mean().item(),
        "error_p50": p50,
        "error_p99": p99,
        "cosine_mean": cosine_N.mean().item(),
        "price_mean": price_N.mean().item(),
        "price_correlation": rank_correlation(price_N, error_N),
    }


def rank_correlation(x_N: torch.Tensor, y_N: torch.Tensor) -> float | None:
    """Return Spearman's correlation, equal values sharing their mean rank; None if it is undefined."""
    ranks_2N = torch.stack([_ranks(x_N), _ranks(y_N)])
    if not (ranks_2N != ranks_2N[:, :1]).any(1).all():  # one value only
        return None
    return torch.corrcoef(ranks_2N)[0, 1].item()


def _ranks(values_N):
    _, which_N, counts = values_N.unique(return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts - 1) / 2)[which_N]
