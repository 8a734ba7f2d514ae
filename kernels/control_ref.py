"""What the controller of a layer's strength means, in plain PyTorch.

After each call that a policy could swap for, the layer's strength for the next call follows from
what this one did. With ``x`` the hit rate, or the moved mass per token, of this call of ``n``
tokens, ``X`` its running average, and ``error = target - x``:

1. ``level`` integrates: ``level += min(GAIN n, CALL_GAIN) error``, in octaves above the smallest
   strength; it rests while ``|target - X| <= DEAD_BAND``. It is held within the smallest and the
   largest strength, and nothing accumulates beyond them: the first error of the other sign moves it.
2. ``recent`` is the error over the last few tokens. The strength is that of ``level + LEAD recent``
   octaves, at most the largest, and 0 at the bottom. The lead answers a change of text before the
   average shows it, and leaves nothing behind that would have to be made up for. It is held
   within the same bounds.
3. An octave is counted on the float's bits, which are its logarithm but for the straight line
   between two powers of two: no exponential, the same bits everywhere. More of either measure takes
   more strength, so one law serves both; counted in octaves it needs no scale.
4. Averages are running means over the first tokens, then forget at AVERAGE_RATE per token.
5. The first WARM_TOKENS tokens after a reset are routed exactly and integrate nothing, and neither
   does a call with fewer residents than a token has experts.

``MODE_BONUS`` is the original adaptive bonus: GAIN per token up while the average hit rate is below
the target, down while it is above target + DEAD_BAND.

A missing protected expert is a miss whatever the strength. So is a missing expert for which no
resident is left to stand in, but with at least K residents there is always one: of M missing
experts, R - (K - M) >= M residents are outside the demand. So the protected misses are the
unavoidable ones, and 1 - their average is the highest hit rate that the strength can reach.

Shape suffixes: L layers, P parameters, S state.
"""

from typing import NamedTuple

import torch

from . import layout

OCTAVE = 1 << 23  # of a float32 on its bits


class Call(NamedTuple):
    """What a call did, one integer per layer."""

    tokens: torch.Tensor  # valid ones, int64 (L,)
    residents: torch.Tensor  # experts
    misses: torch.Tensor  # executed pairs whose expert was not resident
    moved_units: torch.Tensor  # moved mass, units of 1 / MOVED_MASS_ONE
    unavoidable: torch.Tensor  # protected pairs whose expert was not resident


def strength_in_force(
    control_LP: torch.Tensor, strength_L: torch.Tensor, residents_L: torch.Tensor, top_k: int
) -> torch.Tensor:
    """Return the strength that a call uses: what was set, within what the bounds say by now."""
    mode_L, largest_L = control_LP[:, layout.MODE], control_LP[:, layout.LARGEST]
    held_L = torch.where(strength_L < largest_L, strength_L, largest_L)
    held_L = torch.where(residents_L >= top_k, held_L, 0.0)
    return torch.where(mode_L > 0, held_L, strength_L)


def adapt_ref(
    control_LP: torch.Tensor,
    state_LS: torch.Tensor,
    strength_L: torch.Tensor,
    call: Call,
    top_k: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the state after a call and the strength for the next one.

    Args:
        control_LP: Parameters, float32.
        state_LS: State before the call, float32.
        strength_L: Strength before the call, float32.
        call: What the call did.
        top_k: Experts per token K.
    """
    p, s = control_LP.unbind(1), state_LS.unbind(1)
    mode_L, target_L, largest_L = p[layout.MODE], p[layout.TARGET], p[layout.LARGEST]
    tokens_L = call.tokens.float()
    pairs_L = (call.tokens * top_k).float().clamp(min=1)
    each_L = tokens_L.clamp(min=1)
    warm_L = s[layout.SEEN] >= p[layout.WARM_TOKENS]  # what this call did may steer
    enough_L = call.residents >= top_k
    counts_L = (mode_L > 0) & (tokens_L > 0) & enough_L

    seen_L = (s[layout.SEEN] + tokens_L).clamp(max=2.0**24)
    since_L = torch.where(warm_L, seen_L - p[layout.WARM_TOKENS], seen_L)
    share_L = torch.maximum(p[layout.AVERAGE_RATE] * tokens_L, tokens_L / since_L.clamp(min=1))
    share_L = share_L.clamp(max=1)
    hits_L = ((call.tokens * top_k - call.misses).float()) / pairs_L
    moved_L = call.moved_units.float() * (1 / layout.MOVED_MASS_ONE) / each_L
    unavoidable_L = call.unavoidable.float() / pairs_L
    mean_hits_L = _toward(s[layout.MEAN_HITS], hits_L, share_L)
    mean_moved_L = _toward(s[layout.MEAN_MOVED], moved_L, share_L)
    mean_unavoidable_L = _toward(s[layout.MEAN_UNAVOIDABLE], unavoidable_L, share_L)

    quality_L = mode_L == layout.MODE_QUALITY
    error_L = target_L - torch.where(quality_L, moved_L, hits_L)
    mean_error_L = target_L - torch.where(quality_L, mean_moved_L, mean_hits_L)

    smallest_L = p[layout.SMALLEST].contiguous()
    bottom_L = smallest_L.view(torch.int32)
    top_L = (largest_L.contiguous().view(torch.int32) - bottom_L).float() * (1 / OCTAVE)
    start_L = (p[layout.START].contiguous().view(torch.int32) - bottom_L).float() * (1 / OCTAVE)
    gain_L = torch.minimum(p[layout.GAIN] * tokens_L, p[layout.CALL_GAIN])
    moving_L = warm_L & (mean_error_L.abs() > p[layout.DEAD_BAND])
    level_L = torch.where(s[layout.SEEN] > 0, s[layout.LEVEL], start_L)
    level_L = _within(level_L + torch.where(moving_L, gain_L * error_L, 0.0), top_L)
    weight_L = (p[layout.RECENT_RATE] * tokens_L).clamp(max=1)
    recent_L = _toward(s[layout.RECENT_ERROR], error_L, weight_L)
    recent_L = torch.where(warm_L, recent_L, 0.0)
    # a lead beyond the bounds would only delay the way back
    lead_L = p[layout.LEAD]
    leads_L = lead_L > 0
    divisor_L = torch.where(leads_L, lead_L, 1.0)
    most_L, least_L = (top_L - level_L) / divisor_L, -level_L / divisor_L
    recent_L = torch.where(leads_L & (recent_L > most_L), most_L, recent_L)
    recent_L = torch.where(leads_L & (recent_L < least_L), least_L, recent_L)
    octaves_L = _within(level_L + lead_L * recent_L, top_L)
    next_L = (bottom_L + (octaves_L * float(OCTAVE)).int()).view(torch.float32)
    next_L = torch.where(octaves_L > 0, next_L, 0.0)

    classic_L = mode_L == layout.MODE_BONUS
    step_L = p[layout.GAIN] * tokens_L
    bonus_L = torch.where(s[layout.SEEN] > 0, s[layout.LEVEL], p[layout.START])
    up_L = warm_L & (mean_error_L > 0)
    down_L = warm_L & (mean_hits_L > target_L + p[layout.DEAD_BAND])
    bonus_L = _within(
        bonus_L + torch.where(up_L, step_L, torch.where(down_L, -step_L, 0.0)), largest_L
    )
    level_L = torch.where(classic_L, bonus_L, level_L)
    recent_L = torch.where(classic_L, 0.0, recent_L)
    next_L = torch.where(classic_L, bonus_L, next_L)

    cold_L = seen_L < p[layout.WARM_TOKENS]
    next_L = _within(torch.where(cold_L, 0.0, next_L), largest_L)
    impossible_L = (mode_L != layout.MODE_QUALITY) & (target_L > 1 - mean_unavoidable_L)
    clamped_L = (next_L >= largest_L) & ~cold_L
    flags_L = torch.where(cold_L, float(layout.FLAG_COLD), 0.0)
    flags_L = flags_L + torch.where(clamped_L, float(layout.FLAG_CLAMPED), 0.0)
    flags_L = flags_L + torch.where(impossible_L & ~cold_L, float(layout.FLAG_INFEASIBLE), 0.0)

    new_LS = torch.zeros_like(state_LS)
    for column, value_L in (
        (layout.SEEN, seen_L),
        (layout.LEVEL, level_L),
        (layout.RECENT_ERROR, recent_L),
        (layout.MEAN_HITS, mean_hits_L),
        (layout.MEAN_MOVED, mean_moved_L),
        (layout.MEAN_UNAVOIDABLE, mean_unavoidable_L),
        (layout.FLAGS, flags_L),
    ):
        new_LS[:, column] = value_L
    new_LS = torch.where(counts_L[:, None], new_LS, state_LS)
    starved_L = (mode_L > 0) & (tokens_L > 0) & ~enough_L
    new_LS[:, layout.FLAGS] = torch.where(
        starved_L, float(layout.FLAG_COLD), new_LS[:, layout.FLAGS]
    )
    return new_LS, torch.where(counts_L, next_L, strength_L)


def _toward(mean_L, value_L, share_L):
    return mean_L + share_L * (value_L - mean_L)


def _within(value_L, top_L):
    """Clamp to [0, top]; NaN, of either, is 0."""
    value_L = torch.where(value_L > 0, value_L, 0.0)
    value_L = torch.where(value_L < top_L, value_L, top_L)
    return torch.where(value_L > 0, value_L, 0.0)
