"""Layout of the device tensors that the route kernel shares with the host.

Both sides import these constants, so a column cannot mean two things. Shape letters: L layers,
E experts, C counters, R int32 words of one layer's step record.

Step record, one row of int32 words per layer, rewritten whole by every route call::

    word 0                  generation, one more than the call before
    word 1                  number of experts whose priority is not PRIORITY_NONE
    RECORD_HEADER + 0 E     executed: valid tokens routed to each expert in this call
    RECORD_HEADER + 1 E     waiting: tokens waiting for a missing expert (see priority)
    RECORD_HEADER + 2 E     priority: PRIORITY_NONE, PRIORITY_URGENT or PRIORITY_BACKGROUND
    RECORD_HEADER + 3 E     affinity after this call, float32 bits
    RECORD_HEADER + 4 E     generation again: a reader that sees two values was overtaken

What protects a reader is stream order: read on the stream that routes. The two generations are
there to catch the mistake of reading elsewhere, not to make it safe.

A dense row is already unique per expert and ascending in the id, needs no compaction on the
device, and one copy of it is all that the host reads per layer.
"""

from typing import Protocol

import torch


class RouteState(Protocol):
    """The tensors that a route call reads and advances, one row per layer."""

    slot_of_LE: torch.Tensor  # int32, device slot of each expert, -1 absent; read only
    strength_L: torch.Tensor  # float32, bonus or budget in force; read only
    affinity_LE: torch.Tensor  # float32
    activations_LE: torch.Tensor  # int64
    counters_LC: torch.Tensor  # int64, columns below
    record_LR: torch.Tensor  # int32, step records, see above
    scratch: torch.Tensor  # int32, all zero between calls, at least scratch_words(...) long


# columns of RouterState.counters_LC, int64
TOKENS = 0  # valid tokens routed
PAIRS = 1  # executed (token, expert) pairs
HITS = 2  # pairs whose expert was resident when routed
MISSES = 3  # pairs whose expert was not
UNIQUE_MISSES = 4  # missing executed experts, each once per call
SWAPS = 5  # executed experts that replaced a demanded one
MOVED_MASS = 6  # router mass moved by swaps, units of 1 / MOVED_MASS_ONE of a token's demand
PADDED = 7  # rows beyond num_valid
NUM_COUNTERS = 8

MOVED_MASS_ONE = 1 << 24

PRIORITY_NONE = 0
PRIORITY_URGENT = 1  # executed in this call and not resident
PRIORITY_BACKGROUND = 2  # demanded, not resident, and swapped away by every token that wanted it

RECORD_HEADER = 2
RECORD_FIELDS = 4


def record_width(num_experts: int) -> int:
    """Return the int32 words in one layer's step record for ``num_experts`` experts."""
    return RECORD_HEADER + RECORD_FIELDS * num_experts + 1


CHUNK = 32  # tokens whose choices of one expert share an int32 word of the scratch
SCRATCH_HEADER = 4  # the ticket, padded to 16 bytes


def scratch_words(num_experts: int, tokens: int) -> int:
    """Return the int32 words of scratch for calls in which ``tokens`` tokens age the affinity."""
    chunks = -(-tokens // CHUNK) + 1  # a window may begin and end within a chunk
    return SCRATCH_HEADER + (2 + chunks) * num_experts
