"""What the quality meters count, in plain PyTorch, for calls whose policy might swap.

With ``mass`` the masses of :mod:`.score_ref`, D a token's demand and X its executed set:

* moved: ``(mass(D) - mass(X)) / mass(D)``, at least 0: D holds the largest masses unless a
  correction bias chose it.
* L1: ``sum |w'(e) - w(e)|`` of the mixing weights before the scaling factor. Renormalised,
  ``w = mass / mass(D)`` over D and ``w' = mass / mass(X)`` over X. Experts in both change by
  ``|kept / mass(X) - kept / mass(D)|`` in all, with ``kept = mass(D and X)``; the others by their
  whole weight; together that is ``2 (1 - kept / max(mass(D), mass(X)))``. Not renormalised, those
  in both keep their weight, and it is ``mass(D) + mass(X) - 2 kept``, of a softmax as a share of
  ``mass(all)``. Sparsemixer's own weights have no such form: it is measured by the softmax.
* KL: with the masses of all experts as a distribution, of its restriction to X from it, less the
  same of D: ``log(mass(all) / mass(X)) - log(mass(all) / mass(D)) = -log(1 - moved)``.

Shape suffixes: T tokens, E experts, K experts per token, M meters.
"""

import torch

from . import layout
from .score_ref import Score, ScoreRule


def meters_ref(
    mass_TE: torch.Tensor,
    demand_TK: torch.Tensor,
    ids_TK: torch.Tensor,
    moved_T: torch.Tensor,
    rule: ScoreRule,
) -> torch.Tensor:
    """Return what T valid tokens add to a layer's meters, int64 ``(M,)``.

    Args:
        mass_TE: Of every expert, float32; of a softmax up to a factor per row.
        demand_TK: int64, best first.
        ids_TK: Executed, int64.
        moved_T: float32.
        rule: How they become weights.
    """
    stays_TK = (demand_TK[:, :, None] == ids_TK[:, None, :]).any(2)
    demand_mass_TK = mass_TE.gather(1, demand_TK)
    wanted_T = demand_mass_TK.sum(1)
    kept_T = torch.where(stays_TK, demand_mass_TK, 0.0).sum(1)
    executed_T = mass_TE.gather(1, ids_TK).sum(1)
    if rule.renormalize:
        change_T = 2 * (1 - kept_T / torch.maximum(wanted_T, executed_T))
    else:
        change_T = wanted_T - kept_T + (executed_T - kept_T)
        if rule.score != Score.SIGMOID:
            change_T = change_T / mass_TE.sum(1)
    change_T = torch.where(stays_TK.all(1), 0.0, change_T)
    kl_T = -(1 - moved_T).clamp(min=layout.LEAST_KEPT).log()

    added_M = torch.zeros(layout.NUM_METERS, dtype=torch.int64)
    added_M[layout.METERED] = len(moved_T)
    added_M[layout.L1_CHANGE] = _units(change_T)
    added_M[layout.ROUTING_KL] = _units(kl_T)
    bins = torch.bincount(moved_mass_bin(moved_T), minlength=layout.HISTOGRAM_BINS)
    added_M[layout.HISTOGRAM : layout.SWAPS_BY_RANK] = bins
    gone_K = (~stays_TK).sum(0)
    added_M[layout.SWAPS_BY_RANK : layout.SWAPS_BY_RANK + len(gone_K)] = gone_K
    return added_M


def moved_mass_bin(moved_T: torch.Tensor) -> torch.Tensor:
    """Return the bin of :func:`~moe_gpu.kernels.layout.moved_mass_edges`, int64."""
    # seeeeeeeemmm... --> eeeeeeeem: the octave and which half of it
    half_octave_T = (moved_T.view(torch.int32) >> 22).long()
    first = 2 * (127 - layout.HISTOGRAM_OCTAVES)
    bin_T = (half_octave_T - first + 1).clamp(1, layout.HISTOGRAM_BINS - 1)
    return torch.where(moved_T > 0, bin_T, 0)


def _units(share_T):
    return (share_T * layout.METER_ONE + 0.5).long().sum()
