"""What a routing policy costs and saves on a text, token by token as in decoding.

Shape suffixes: N rows of text, T tokens predicted per row, B rows side by side (rows x settings),
L layers, E experts, K experts per token, D model width, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import nn

from ..adaptive import Adaptive
from ..gate import MoEGate, Routing
from ..huggingface.attached import AttachedMoE
from ..huggingface.blocks import MoEBlock, find_blocks, score_arguments
from ..huggingface.experts import ATTRIBUTE
from ..kernels.score_ref import ScoreRule
from ..policies import Exact, Policy, layer_strengths
from .simulate import CacheRule, Choose, DecodeCaches, chooser, route_side_by_side


class Baseline(Protocol):
    """A way to choose that is no policy of the library, for comparison.

    Attributes:
        strength: The knob. Baselines that differ only in it are evaluated side by side.
        family: What else tells them apart.
    """

    strength: float
    family: str

    def chooser(self, top_k: int, strength_B1: torch.Tensor) -> Choose:
        """Return how one layer chooses, starting anew; rows differ in their strength."""


@dataclass(frozen=True)
class Job:
    """One setting to evaluate: a policy (or baseline), slots per layer, who leaves a cache."""

    policy: Policy | Baseline
    slots: int
    cache: CacheRule = CacheRule()


@dataclass(frozen=True)
class Outcome:
    """What one evaluation counted, per row; sums over layers.

    Attributes:
        nll_N: Cross-entropy in nats, summed over tokens, float64.
        kl_N: KL divergence of the next-token distribution from exact routing's, likewise.
        agree_N: Tokens whose most probable next token is exact routing's.
        loads_NT: Experts that each token had to load, int16.
        swaps_N: Pairs that a stand-in served.
        moved_N: Router mass that swaps moved, in units of one token's demand.
        l1_N: L1 change of the mixing weights.
        price_N: Squared prices of the swaps, as Rule.OUTPUT asks them.
        pairs: Routed pairs of each row.
    """

    nll_N: torch.Tensor
    kl_N: torch.Tensor
    agree_N: torch.Tensor
    loads_NT: torch.Tensor
    swaps_N: torch.Tensor
    moved_N: torch.Tensor
    l1_N: torch.Tensor
    price_N: torch.Tensor
    pairs: int

    @property
    def tokens(self) -> int:
        """Return the tokens of each row."""
        return self.loads_NT.shape[1]

    @property
    def loads_N(self) -> torch.Tensor:
        """Return the loads of each row, float64."""
        return self.loads_NT.sum(1).double()


class _Reference(NamedTuple):
    """Exact routing of the text."""

    hidden_NTD: torch.Tensor  # before the head
    logits_LNTE: list[torch.Tensor]  # of the routers


class Evaluation:
    """Evaluates settings on rows of text.

    Each row (or each ``segments`` rows) starts with the first S experts of every layer resident.

    An attached or loaded model is evaluated through its handle, whatever its own slots, policy and
    eviction: routes are simulated, and its offloader fetches the experts that they name. Affinity,
    routing counts and policy are put back afterwards (an adaptive one begins again); residency and
    the counts of the offloader move on.

    Attributes:
        num_layers, num_experts, top_k: L, E and K of the model's MoE layers.
        score_rule: How its routers score.
        rows_NT: See below, int64.

    Args:
        model: A transformers causal language model of a known family, or the handle of one that
            is attached.
        rows_NT: Token ids, ``(N, T + 1)``: tokens 1..T are predicted from those before them.
        segments: Rows that follow one another through the same caches, as requests to one server
            do; attention sees one row at a time.
        batch_rows: Rows in one forward pass: memory for speed.

    Raises:
        TypeError: Token ids that are no integer tensor.
        ValueError: Rows that are too short or do not make whole streams, an unknown family, or an
            attached model without its handle.
    """

    def __init__(
        self,
        model: nn.Module | AttachedMoE,
        rows_NT: torch.Tensor,
        segments: int = 1,
        batch_rows: int = 256,
    ):
        if not isinstance(rows_NT, torch.Tensor) or rows_NT.is_floating_point():
            raise TypeError(f"rows must be a tensor of token ids, got {rows_NT!r}")
        if rows_NT.ndim != 2 or len(rows_NT) == 0 or rows_NT.shape[1] < 2:
            raise ValueError(
                f"rows must have shape (rows, at least 2 tokens), got {tuple(rows_NT.shape)}"
            )
        if segments < 1 or len(rows_NT) % segments:
            raise ValueError(f"segments must divide the {len(rows_NT)} rows, got {segments}")
        self._moe = model if isinstance(model, AttachedMoE) else None
        if self._moe is not None and len(self._moe.states) > 1:
            raise ValueError(
                "a model that is split over several devices cannot be evaluated attached: detach() "
                "it, and give the model itself on one device"
            )
        model = model if self._moe is None else self._moe.model
        self._blocks = find_blocks(model)
        is_attached = any(ATTRIBUTE in block.experts.__dict__ for block in self._blocks)
        if is_attached and self._moe is None:
            raise ValueError(
                "model is attached: give the handle that attach() or load() returned, or detach()"
            )
        if self._moe is not None and not is_attached:
            raise ValueError("the handle's model is not attached any more: give the model itself")
        self.num_layers = len(self._blocks)
        self.num_experts = self._blocks[0].router.num_experts
        self.top_k = self._blocks[0].router.top_k
        # a gate checks the rule; of one model, all layers score alike
        first = MoEGate(
            num_experts=self.num_experts, top_k=self.top_k, **score_arguments(self._blocks[0])
        )
        self.score_rule, self._weights_dtype = first.score_rule, first.weights_dtype
        self.rows_NT = rows_NT.long()
        self._model, self._segments = model, segments
        self._batch_rows = max(segments, batch_rows // segments * segments)
        self._device = next(model.parameters()).device
        self._reference: _Reference | None = None

    def biases(self) -> torch.Tensor | None:
        """Return the routers' correction biases, float32 ``(L, E)`` on the host, if they have any."""
        biases = [block.bias() for block in self._blocks]
        if biases[0] is None:
            return None
        return torch.stack([bias.detach().float().cpu() for bias in biases])

    @torch.no_grad()
    def run(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Evaluate settings, in groups that fit side by side; yields each as it is done.

        Raises:
            TypeError: An adaptive policy, whose strength moves with the traffic.
            ValueError: Slots that one token's experts do not fit into, or more than there are.
        """
        for job in jobs:
            if isinstance(job.policy, Adaptive):
                raise TypeError(f"policy must have a fixed strength, got {job.policy}")
            if not self.top_k <= job.slots <= self.num_experts:
                raise ValueError(
                    f"slots must lie in [{self.top_k}, {self.num_experts}], got {job.slots}"
                )
        self.router_logits()
        groups: dict[tuple, list[Job]] = {}
        for job in jobs:
            if isinstance(job.policy, Exact):
                yield job, self._exact(job)
            else:
                groups.setdefault(_family(job), []).append(job)
        side_by_side = max(1, self._batch_rows // len(self.rows_NT))
        for group in groups.values():
            for start in range(0, len(group), side_by_side):
                part = group[start : start + side_by_side]
                yield from zip(part, self._evaluate(part), strict=True)

    @torch.no_grad()
    def router_logits(self) -> list[torch.Tensor]:
        """Return the router logits of exact routing, ``(N, T, E)`` for each MoE layer."""
        if self._reference is None:
            self._reference = self._route_exactly()
        return self._reference.logits_LNTE

    def _route_exactly(self) -> _Reference:
        seen_L: list[list[torch.Tensor]] = [[] for _ in self._blocks]

        def note(layer: int, logits_BTE: torch.Tensor):
            seen_L[layer].append(logits_BTE)

        hidden = []
        hooks = [
            block.router.register_forward_hook(
                lambda _, inputs, output, layer=layer: note(layer, output[0])
            )
            for layer, block in enumerate(self._blocks)
        ]
        try:
            with self._gates_exact():
                for part_NT in self.rows_NT.split(self._batch_rows):
                    hidden.append(self._hidden(part_NT))
        finally:
            for hook in hooks:
                hook.remove()
        N, T = len(self.rows_NT), self.rows_NT.shape[1] - 1
        logits_LNTE = [torch.cat(seen).view(N, T, -1) for seen in seen_L]
        return _Reference(torch.cat(hidden), logits_LNTE)

    def _hidden(self, rows_NT: torch.Tensor) -> torch.Tensor:
        decoder = self._model.get_decoder()
        return decoder(rows_NT[:, :-1].to(self._device), use_cache=False).last_hidden_state

    def _exact(self, job: Job) -> Outcome:
        """Step the caches through the recorded logits: the model's output is the reference."""
        N, T = len(self.rows_NT), self.rows_NT.shape[1] - 1
        tally = _Tally(N, T, self._segments)
        for block, logits_NTE in zip(self._blocks, self._reference.logits_LNTE, strict=True):
            self._route_layer(block, logits_NTE, job, chooser(job.policy, self.top_k, 0.0), tally)
        nll_N = torch.stack([self._nll(n, self._log_probs(n)) for n in range(N)])
        agree_N = torch.full((N,), float(T))
        return tally.outcome(0, N, self._pairs, nll_N, torch.zeros(N).double(), agree_N)

    def _evaluate(self, jobs: list[Job]) -> list[Outcome]:
        """Evaluate settings of one family."""
        N, T = len(self.rows_NT), self.rows_NT.shape[1] - 1
        per_pass = max(self._segments, self._batch_rows // len(jobs))
        per_pass -= per_pass % self._segments
        parts: list[list[Outcome]] = [[] for _ in jobs]
        for start in range(0, N, per_pass):
            rows_NT = self.rows_NT[start : start + per_pass]
            n = len(rows_NT)
            tally = _Tally(n * len(jobs), T, self._segments)
            with self._simulated(jobs, n, tally):
                hidden_BTD = self._hidden(rows_NT.repeat(len(jobs), 1))
            nll, kl, agree = self._compare(hidden_BTD, start, n, len(jobs))
            for j, part in enumerate(parts):
                first = j * n
                part.append(tally.outcome(first, n, self._pairs, nll[j], kl[j], agree[j]))
        return [_joined(part) for part in parts]

    @property
    def _pairs(self) -> int:
        return (self.rows_NT.shape[1] - 1) * self.top_k * self.num_layers

    def _compare(self, hidden_BTD, start, n, num_jobs):
        """Return nll, KL and agreement, each ``(jobs, n)``: all logits at once would be large."""
        found = torch.zeros(3, num_jobs, n, dtype=torch.float64)
        for i in range(n):
            ref_TV = self._log_probs(start + i)
            best_T = ref_TV.argmax(1)
            for j in range(num_jobs):
                log_TV = self._head(hidden_BTD[j * n + i])
                found[0, j, i] = self._nll(start + i, log_TV)
                found[1, j, i] = torch.nn.functional.kl_div(
                    log_TV, ref_TV, reduction="sum", log_target=True
                )
                found[2, j, i] = (log_TV.argmax(1) == best_T).sum()
        return found

    def _head(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        return self._model.get_output_embeddings()(hidden_TD).float().log_softmax(1)

    def _log_probs(self, n: int) -> torch.Tensor:
        return self._head(self._reference.hidden_NTD[n])

    def _nll(self, n: int, log_TV: torch.Tensor) -> torch.Tensor:
        target_T = self.rows_NT[n, 1:].to(log_TV.device)
        return -log_TV.gather(1, target_T[:, None]).double().sum().cpu()

    @contextmanager
    def _simulated(self, jobs: list[Job], rows: int, tally: "_Tally"):
        """Route every MoE layer through caches, the rows of one setting after another."""
        strengths_JL = [self._strengths(job) for job in jobs]
        caches_rows = rows // self._segments

        def route_of(layer: int, block: MoEBlock):
            strength_J = torch.tensor([strengths[layer] for strengths in strengths_JL])
            strength_B1 = strength_J.repeat_interleave(caches_rows)[:, None].to(self._device)

            def route(logits_TE):
                logits_BTE = logits_TE.view(rows * len(jobs), -1, logits_TE.shape[-1])
                choose = _chooser(jobs[0], self.top_k, strength_B1)
                steps = self._route_layer(block, logits_BTE, jobs[0], choose, tally)
                weights_TK = steps.weights_BTK.flatten(0, 1)
                weights_TK = weights_TK.to(self._weights_dtype or logits_TE.dtype)
                return Routing(logits_TE, weights_TK, steps.ids_BTK.flatten(0, 1))

            return route

        routes = [route_of(layer, block) for layer, block in enumerate(self._blocks)]
        if self._moe is not None:
            with self._gates_exact(), _routed_by(self._moe.gates, routes):
                yield
            return
        for block, route in zip(self._blocks, routes, strict=True):
            block.router.forward = _forward_of(block, route)
        try:
            yield
        finally:
            for block in self._blocks:
                del block.router.forward

    @contextmanager
    def _gates_exact(self):
        """Let the gates of an attached model route exactly; then put back what they keep."""
        if self._moe is None:
            yield
            return
        state, gates = self._moe.state, self._moe.gates
        with self._moe.offloader.lock:
            policies = [gate.policy for gate in gates]
            kept = [
                (tensor, tensor.clone())
                for tensor in (
                    state.affinity_LE, state.activations_LE, state.counters_LC, state.meters_LM
                )
            ]  # fmt: skip
            for gate in gates:
                gate.policy = Exact()
            try:
                yield
            finally:
                for gate, policy in zip(gates, policies, strict=True):
                    gate.policy = policy
                for tensor, before in kept:
                    tensor.copy_(before)

    def _strengths(self, job: Job) -> list[float]:
        if isinstance(job.policy, Policy):
            return layer_strengths(job.policy, self.num_layers)
        return [job.policy.strength] * self.num_layers

    def _route_layer(self, block, logits_BTE, job, choose, tally):
        B, T, E = logits_BTE.shape
        streams = B // self._segments
        caches = DecodeCaches(streams, E, job.slots, job.cache, logits_BTE.device)
        steps = route_side_by_side(
            logits_BTE.reshape(streams, self._segments * T, E),
            self.top_k,
            choose,
            caches,
            self.score_rule,
            block.bias(),
        )
        tally.add(steps)
        return steps


def _forward_of(block: MoEBlock, route):
    def forward(hidden_states, *_, **__):
        hidden_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
        return tuple(route(block.logits(hidden_TD)))

    return forward


@contextmanager
def _routed_by(gates: list[MoEGate], routes: list):
    """Route the layers of an attached model otherwise; the gates still tell the offloader."""

    def forced(gate: MoEGate, route):
        def route_and_tell(logits_TE, **_):
            routing = route(logits_TE)
            order_TK = torch.arange(gate.top_k, 0, -1, device=logits_TE.device).float()
            only_TE = torch.full_like(logits_TE, -torch.inf, dtype=torch.float32)
            only_TE.scatter_(1, routing.ids, order_TK.expand_as(routing.weights))
            MoEGate.route(gate, only_TE)
            return routing

        return route_and_tell

    rules = [gate.score_rule for gate in gates]
    for gate, route in zip(gates, routes, strict=True):
        gate.route = forced(gate, route)
        gate.score_rule = ScoreRule()  # no group may keep out who was chosen
    try:
        yield
    finally:
        for gate, rule in zip(gates, rules, strict=True):
            del gate.route
            gate.score_rule = rule


class _Tally:
    """Sums over layers, rows back from streams."""

    def __init__(self, rows: int, tokens: int, segments: int):
        self._shape = rows, tokens
        self._loads_BT = torch.zeros(rows, tokens, dtype=torch.int64)
        self._swaps_B, self._moved_B, self._l1_B, self._price_B = (
            torch.zeros(rows, dtype=torch.float64) for _ in range(4)
        )

    def add(self, steps) -> None:
        """Add one layer."""
        self._loads_BT += steps.loads_BT.reshape(self._shape).cpu()
        self._swaps_B += steps.swaps_BT.reshape(self._shape).sum(1).cpu()
        self._moved_B += steps.moved_BT.reshape(self._shape).double().sum(1).cpu()
        self._l1_B += steps.l1_BT.reshape(self._shape).double().sum(1).cpu()
        self._price_B += steps.price_BT.reshape(self._shape).double().sum(1).cpu()

    def outcome(self, first, rows, pairs, nll_N, kl_N, agree_N) -> Outcome:
        """Return the rows from ``first`` on."""
        part = slice(first, first + rows)
        return Outcome(
            nll_N.double(),
            kl_N.double(),
            agree_N.double(),
            self._loads_BT[part].to(torch.int16),
            self._swaps_B[part],
            self._moved_B[part],
            self._l1_B[part],
            self._price_B[part],
            pairs,
        )


def _joined(parts: list[Outcome]) -> Outcome:
    names = [name for name in Outcome.__dataclass_fields__ if name != "pairs"]
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    return Outcome(**joined, pairs=parts[0].pairs)


def _family(job: Job) -> tuple:
    """Return what jobs must have in common to be evaluated side by side."""
    if isinstance(job.policy, Policy):
        return type(job.policy), job.policy.rule, job.policy.protect, job.slots, job.cache
    return job.policy.family, job.slots, job.cache


def _chooser(job: Job, top_k: int, strength_B1: torch.Tensor) -> Choose:
    if isinstance(job.policy, Policy):
        return chooser(job.policy, top_k, strength_B1)
    return job.policy.chooser(top_k, strength_B1)
