"""Layout of the device tensors that the route kernel shares with the host.

Both sides import these constants, so a column cannot mean two things. Shape letters: L layers,
E experts, C counters, R int32 words of one layer's step record, P parameters and S state of the
controller, M meters.

Step record, one row of int32 words per layer, rewritten whole by every route call::

    word 0                  generation, one more than the call before
    word 1                  number of experts whose priority is not PRIORITY_NONE
    words 2 and 3           nothing: what follows begins where a thread can store four words
    RECORD_HEADER + 0 E     executed: valid tokens routed to each expert in this call
    RECORD_HEADER + 1 E     waiting: tokens waiting for a missing expert (see priority)
    RECORD_HEADER + 2 E     priority: PRIORITY_NONE, PRIORITY_URGENT or PRIORITY_BACKGROUND
    RECORD_HEADER + 3 E     affinity after this call, float32 bits
    RECORD_HEADER + 4 E     nothing, three words
    the last word           generation again: a reader that sees two values was overtaken

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
    strength_L: torch.Tensor  # float32, bonus or budget in force; a controller writes it
    affinity_LE: torch.Tensor  # float32
    activations_LE: torch.Tensor  # int64
    counters_LC: torch.Tensor  # int64, columns below
    record_LR: torch.Tensor  # int32, step records, see above
    scratch: torch.Tensor  # int32, all zero between calls, at least scratch_words(...) long
    control_LP: torch.Tensor  # float32, the controller's parameters, columns below; read only
    control_state_LS: torch.Tensor  # float32, its state, columns below
    meters_LM: torch.Tensor  # int64, columns below


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

# columns of RouterState.control_LP, float32; what they do is in control_ref.py
MODE = 0  # one of the modes below
TARGET = 1  # share of pairs (hit rate), or of a token's demand (moved mass)
LARGEST = 2  # bound on the strength
SMALLEST = 3  # the least strength that is not 0
START = 4  # strength after the warm-up
GAIN = 5  # octaves per token and unit of error; with MODE_BONUS strength per token
CALL_GAIN = 6  # bound on the gain of a call of many tokens
LEAD = 7  # octaves per unit of the recent error
RECENT_RATE = 8  # weight of one token in the recent error
DEAD_BAND = 9  # distance of the average from the target within which the strength rests
AVERAGE_RATE = 10  # weight of one token in the averages
WARM_TOKENS = 11  # tokens that are routed exactly after a reset
NUM_CONTROLS = 12

MODE_OFF = 0
MODE_QUALITY = 1  # hold the moved mass per token
MODE_HIT_RATE = 2  # hold the hit rate
MODE_BONUS = 3  # step up below the target, down above it

# columns of RouterState.control_state_LS, float32, all zero after a reset
SEEN = 0  # tokens routed since then; stands still at 2 ** 24
LEVEL = 1  # octaves above SMALLEST; with MODE_BONUS the strength itself
RECENT_ERROR = 2
MEAN_HITS = 3  # averages: hits per pair
MEAN_MOVED = 4  # moved mass per token
MEAN_UNAVOIDABLE = 5  # misses per pair that no strength avoids
FLAGS = 6  # sum of the flags below
NUM_CONTROL_STATE = 8

FLAG_COLD = 1  # routed exactly: still warming up, or fewer experts resident than a token needs
FLAG_CLAMPED = 2  # at the largest strength
FLAG_INFEASIBLE = 4  # the target is above what the residents allow

# columns of RouterState.meters_LM, int64: calls that might have swapped
METERED = 0  # valid tokens
L1_CHANGE = 1  # sum of |weight executed - weight of the demand|, units of 1 / METER_ONE
ROUTING_KL = 2  # KL divergence, nats, the same units
HISTOGRAM = 3  # tokens by moved mass, see moved_mass_edges()
HISTOGRAM_BINS = 30
SWAPS_BY_RANK = HISTOGRAM + HISTOGRAM_BINS  # demanded experts of rank 0, 1, ... swapped away
RANKS = 16
NUM_METERS = SWAPS_BY_RANK + RANKS

METER_ONE = 1 << 24
LEAST_KEPT = 2.0**-24  # of the demand's mass, for the KL: a token counts as 16.6 nats at most
# bin 1 ends at 1.5 * 2 ** -14, the last begins at 1
HISTOGRAM_OCTAVES = 14


def moved_mass_edges() -> list[float]:
    """Return the upper edge of each bin: 0, then 1 and 1.5 in every octave, at last 1.

    Bin 0 holds exactly 0; another holds what is at least the edge before it and below its own.
    """
    steps = range(1 - 2 * HISTOGRAM_OCTAVES, 1)
    edges = [(1.5 if step % 2 else 1.0) * 2.0 ** (step // 2) for step in steps]
    return [0.0, *edges, 1.0]


PRIORITY_NONE = 0
PRIORITY_URGENT = 1  # executed in this call and not resident
PRIORITY_BACKGROUND = 2  # demanded, not resident, and swapped away by every token that wanted it

RECORD_HEADER = 4
RECORD_FIELDS = 4
RECORD_TAIL = 4


def record_width(num_experts: int) -> int:
    """Return the int32 words in one layer's step record for ``num_experts`` experts."""
    return RECORD_HEADER + RECORD_FIELDS * num_experts + RECORD_TAIL


CHUNK = 32  # tokens whose choices of one expert share an int32 word of the scratch
SCRATCH_HEADER = 4  # the ticket, unavoidable misses, moved mass (two words: an int64)


def scratch_words(num_experts: int, tokens: int) -> int:
    """Return the int32 words of scratch for calls in which ``tokens`` tokens age the affinity."""
    chunks = -(-tokens // CHUNK) + 1  # a window may begin and end within a chunk
    return SCRATCH_HEADER + (2 + chunks) * num_experts
