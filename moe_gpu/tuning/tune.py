"""Finds the routing budget for a stated loss of quality, on the user's own model and text.

    text -> rows -> some calibrate layers and choose who leaves -> the others measure budgets

Quality is measured with decode semantics (:mod:`moe_gpu.tuning.quality`), in few evaluations: a
coarse grid of budgets, refined around the target.

Shape suffixes: N rows, T tokens predicted per row.
"""

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ..bounds import check_number
from ..huggingface.attached import AttachedMoE
from ..policies import Exact, QualityBudget
from .calibrate import layer_sensitivity
from .plot import check_matplotlib
from .quality import Evaluation, Job, Outcome
from .replay import OPTIMUM, replay_trace
from .result import ENOUGH_ROWS, Setting, TuneResult
from .search import largest_within, next_budgets
from .simulate import LRU, CacheRule
from .sizes import expert_layout, slot_counts
from .statistics import interval, perplexity_change, resamples
from .texts import rows_of, split_rows
from .trace import trace_of

CLEARLY_FEWER = 0.95  # share of the default's loads at which another eviction policy is taken


def tune(
    model: nn.Module | AttachedMoE,
    texts: Sequence[str] | torch.Tensor,
    tokenizer=None,
    *,
    max_perplexity_increase: float = 0.5,
    slots: int | Sequence[int] | None = None,
    resident: float | int | None = None,
    gpu_memory: int | str | None = None,
    context_tokens: int = 4096,
    rows: int | None = None,
    tokens: int = 256,
    seed: int = 0,
    batch_rows: int = 256,
    progress: bool = True,
    out: str | Path | None = None,
) -> TuneResult:
    """Find the policy with the fewest loads whose perplexity stays within a target.

    A quarter of the rows (at most 32) chooses the eviction policy and calibrates the layers; the
    others measure. A budget is within the target if the upper bound of its 95 % interval is (with
    fewer than 20 rows: its estimate, and a warning says so), and those of all smaller ones. Where
    none is, exact routing is recommended.

    At most one of ``slots``, ``resident`` and ``gpu_memory`` says how many experts stay; without,
    several sizes are tried: K, and a quarter, half and three quarters of the experts.

    Args:
        model: A transformers causal language model of a known family, on the device that is to
            compute; or the handle of one that is attached or loaded, for models larger than it.
            What a handle keeps and what moves on: :class:`~moe_gpu.tuning.quality.Evaluation`.
        texts: Text like that to be served, with ``tokenizer``; or token ids, an integer tensor
            ``(N, T + 1)`` of which tokens 1..T are predicted.
        tokenizer: The model's.
        max_perplexity_increase: Target, percent, ``>= 0``.
        slots: Experts per layer on the device, or several such numbers, each in [K, E].
        resident: The same as a share of E in (0, 1], rounded down, or as an int.
        gpu_memory: Bytes, or text such as ``"20GiB"``, as in :func:`moe_gpu.attach`.
        context_tokens: Sequence length that ``gpu_memory`` makes room for.
        rows: Most rows of text to use. Default: all.
        tokens: T of the rows that texts are cut into, ``>= 1``.
        seed: Of the split of the rows and of the bootstrap.
        batch_rows: Rows in one forward pass: memory for speed.
        progress: Show a bar on stderr.
        out: Folder for ``tune.json``, ``tune.png`` and ``trace.safetensors``.

    Returns:
        The table, the recommended policy and the arguments for ``attach``.

    Raises:
        TypeError: An argument of the wrong type.
        ValueError: An argument outside its bounds, too little text, an unknown family, an attached
            model without its handle, or memory that holds less than one token's experts.
        ModuleNotFoundError: ``out`` without matplotlib.

    Example:
        >>> result = moe_gpu.tune(model, texts, tokenizer, slots=4, max_perplexity_increase=0.5)
        >>> print(result)
        >>> moe = moe_gpu.attach(model, **result.attach_options)
    """
    if not isinstance(model, (nn.Module, AttachedMoE)):
        raise TypeError(
            f"model must be a transformers PreTrainedModel or the handle of one, got {model!r}"
        )
    check_target(max_perplexity_increase)
    sizes = slot_counts(model, slots, resident, gpu_memory, context_tokens)
    rows_NT = rows_of(texts, tokenizer, tokens, rows)
    check_ids(_module(model), rows_NT)
    calibration_NT, measured_NT = split_rows(rows_NT, seed)
    if out is not None:
        check_matplotlib()
        Path(out).mkdir(parents=True, exist_ok=True)

    search = _Tuning(model, calibration_NT, measured_NT, max_perplexity_increase, seed, batch_rows)
    with tqdm(desc="tune", unit="setting", disable=not progress) as bar:
        result = search.run(sizes, bar)
    if len(measured_NT) < ENOUGH_ROWS:
        warnings.warn(result.notes[0], stacklevel=2)
    if out is not None:
        result.save(out)
    return result


def check_target(max_perplexity_increase: float) -> None:
    """Refuse a target that is no finite number ``>= 0``.

    Raises:
        TypeError: Not a number.
        ValueError: Outside the bounds.
    """
    check_number("max_perplexity_increase", max_perplexity_increase)
    if not (math.isfinite(max_perplexity_increase) and max_perplexity_increase >= 0):
        raise ValueError(
            f"max_perplexity_increase must be finite and >= 0, got {max_perplexity_increase}"
        )


class _Tuning:
    """One run of :func:`tune`."""

    def __init__(self, model, calibration_NT, measured_NT, target, seed, batch_rows):
        self._model, self._target, self._batch_rows = model, float(target), batch_rows
        self._layout, self._E = expert_layout(model)
        self._calibration_NT, self._measured_NT = calibration_NT, measured_NT
        self._on_calibration = Evaluation(model, calibration_NT, batch_rows=batch_rows)
        self._on_measured = Evaluation(model, measured_NT, batch_rows=batch_rows)
        self._index_RN = resamples(len(measured_NT), seed=seed)

    @property
    def _is_enough(self) -> bool:
        return len(self._measured_NT) >= ENOUGH_ROWS

    def run(self, sizes: list[int], bar: tqdm) -> TuneResult:
        partial = [slots for slots in sizes if slots < self._E]
        L, notes = self._on_measured.num_layers, []
        if not self._is_enough:
            notes.append(
                f"{len(self._measured_NT)} measured rows are too few to tell: estimates were "
                f"compared with the target, not the upper bounds of intervals; give "
                f"{ENOUGH_ROWS} or more"
            )
        scale, replay = (1.0,) * L, {}
        if partial:
            bar.set_postfix_str("calibrating layers")
            middle = partial[len(partial) // 2]
            found = layer_sensitivity(
                self._model, self._calibration_NT, middle, batch_rows=self._batch_rows
            )
            # three digits: what is printed is what was measured
            scale = tuple(float(f"{factor:.3g}") for factor in found.layer_scale)
            if unknown := found.kl_per_price.count(None):
                notes.append(
                    f"the calibration saw too few swaps in {unknown} of {L} layers, which keep "
                    "scale 1: more text would tell"
                )
            bar.update(L)
            replay = self._replay(partial)
        table: list[Setting] = []
        for slots in sizes:
            bar.set_postfix_str(f"{slots} of {self._E} resident")
            table += self._measure(slots, scale, replay.get(slots), notes, bar)
        return TuneResult(
            model_type=_module(self._model).config.model_type,
            num_layers=L,
            num_experts=self._E,
            top_k=self._on_measured.top_k,
            expert_bytes=self._layout.expert_bytes,
            max_perplexity_increase=self._target,
            tokens=self._measured_NT.shape[1] - 1,
            rows=len(self._measured_NT),
            calibration_rows=len(self._calibration_NT) if partial else 0,
            layer_scale=scale,
            table=tuple(table),
            replay=replay,
            notes=tuple(notes),
            trace=trace_of(self._on_calibration, self._layout.expert_bytes),
        )

    def _replay(self, sizes: list[int]) -> dict[int, dict[str, float]]:
        """Return the hit rate of exact routing by slots and eviction policy.

        LRU is the plain one of others; the rest, and Belady's bound, have bypass.
        """
        rates: dict[int, dict[str, float]] = {slots: {} for slots in sizes}
        for one in replay_trace(trace_of(self._on_calibration), sizes):
            if one.bypass == (one.eviction != "lru"):
                rates[one.slots][one.eviction] = one.hit_rate
        return rates

    def _measure(self, slots, scale, rates, notes, bar) -> list[Setting]:
        """Measure exact routing and budgets at one number of slots, and mark the best."""
        cache = CacheRule()
        if rates is not None:
            best = max((name for name in rates if name != OPTIMUM), key=rates.__getitem__)
            if 1 - rates[best] < CLEARLY_FEWER * (1 - rates[cache.eviction]):
                cache = LRU if best == "lru" else CacheRule(best)
        jobs = [Job(Exact(), slots, rule) for rule in dict.fromkeys((LRU, CacheRule(), cache))]
        outcomes = dict(self._on_measured.run(jobs))
        exact = outcomes[jobs[-1]]
        settings = [self._setting(job, outcomes[job], exact) for job in jobs]
        bar.update(len(jobs))
        is_within: dict[float, bool] = {}
        while slots < self._E and (budgets := next_budgets(is_within)):
            bar.total = bar.n + len(budgets)
            jobs = [Job(QualityBudget(budget, scale), slots, cache) for budget in budgets]
            for job, outcome in self._on_measured.run(jobs):
                setting = self._setting(job, outcome, exact)
                settings.append(setting)
                is_within[setting.budget] = self._is_within(setting)
                bar.update()
        return self._marked(settings, notes)

    def _is_within(self, setting: Setting) -> bool:
        return (setting.change_high if self._is_enough else setting.change) <= self._target

    def _marked(self, settings: list[Setting], notes: list[str]) -> list[Setting]:
        exact = [setting for setting in settings if setting.budget is None]
        budgets = {setting.budget: setting for setting in settings if setting.budget is not None}
        is_within = {budget: self._is_within(setting) for budget, setting in budgets.items()}
        largest = largest_within(is_within)
        choices = [*exact[::-1], *(s for b, s in budgets.items() if largest and b <= largest)]
        best = min(choices, key=lambda setting: setting.loads_per_token)
        if budgets and largest is None:
            by_estimate = any(s.change <= self._target for s in budgets.values())
            more = ", though some are by their estimate: more text would tell" * by_estimate
            notes.append(
                f"with {best.slots} of {self._E} resident no budget stays within "
                f"+{self._target:g} % perplexity{more}"
            )
        ordered = *exact, *(budgets[budget] for budget in sorted(budgets))
        return [replace(s, is_recommended=True) if s is best else s for s in ordered]

    def _setting(self, job: Job, outcome: Outcome, exact: Outcome) -> Setting:
        change_R = perplexity_change(outcome, exact, self._index_RN)
        low, high = interval(change_R)
        tokens = len(self._measured_NT) * outcome.tokens
        loads = outcome.loads_N.sum().item() / tokens
        return Setting(
            slots=job.slots,
            budget=None if isinstance(job.policy, Exact) else job.policy.budget,
            eviction=job.cache.eviction,
            bypass=job.cache.bypass,
            loads_per_token=loads,
            mb_per_token=loads * self._layout.expert_bytes / 1e6,
            hit_rate=_hit_rate(outcome),
            perplexity=math.exp(outcome.nll_N.sum().item() / tokens),
            change=change_R[0].item(),
            change_low=low,
            change_high=high,
            kl_per_token=outcome.kl_N.sum().item() / tokens,
            swaps_per_token=outcome.swaps_N.sum().item() / tokens,
        )


def _hit_rate(outcome: Outcome) -> float:
    return 1 - outcome.loads_N.sum().item() / (outcome.pairs * len(outcome.loads_N))


def _module(model: nn.Module | AttachedMoE) -> nn.Module:
    return model.model if isinstance(model, AttachedMoE) else model


def check_ids(model: nn.Module, rows_NT: torch.Tensor) -> None:
    """Refuse rows of token ids that a model cannot read.

    Raises:
        ValueError: Ids outside its vocabulary, or rows longer than its context.
    """
    vocabulary = model.get_input_embeddings().num_embeddings
    if rows_NT.min() < 0 or rows_NT.max() >= vocabulary:
        raise ValueError(
            f"token ids must lie in [0, {vocabulary}), got {rows_NT.min()} to {rows_NT.max()}: "
            "is this the model's tokenizer?"
        )
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and rows_NT.shape[1] - 1 > longest:
        raise ValueError(f"tokens must be <= {longest} for this model, got {rows_NT.shape[1] - 1}")
