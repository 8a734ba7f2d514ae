"""The two encodings that carry a selection through the route kernel, and its masks.

* key: int32 that orders as the score does, every non-finite score at the key of -inf, and
  TAKEN, one below, for columns that are gone (already chosen, no candidates, or padding). Nothing
  is masked with a sentinel score, which a large bonus could meet.
* code: ``2 * expert + missing``. The lowest code among equal keys is the lower id, and who was
  chosen and whether it is resident arrive in one reduction.

Rows are a tile of BLOCK_T by BLOCK_E >= E columns. What belongs to one rank (0 .. K-1) is a vector
of BLOCK_T: no gather, no sort, no shared memory of our own.
"""

import triton
import triton.language as tl

TAKEN = tl.constexpr(-(2**31))
NONFINITE = tl.constexpr(-2139095041)  # the key of -inf: 0xff800000 ^ 0x7fffffff
NO_CODE = tl.constexpr(2**31 - 1)


@triton.jit
def order_key(x):
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where(bits == TAKEN, 0, bits)  # -0.0 has the bits of TAKEN: both zeros tie
    # negative floats run backwards as integers: s eeeeeeee mmm --> s ~eeeeeeee ~mmm
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where((bits & 0x7F800000) == 0x7F800000, NONFINITE, key)


@triton.jit
def key_score(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def best_of(key_te, code_te):
    key_t = tl.max(key_te, axis=1)
    code_t = tl.min(tl.where(key_te == key_t[:, None], code_te, NO_CODE), axis=1)
    return key_t, code_t


@triton.jit
def value_at(value_te, code_te, code_t):
    """The value of the expert with this code; exact, since all others add zero."""
    return tl.sum(tl.where(code_te == code_t[:, None], value_te, 0.0), axis=1)


@triton.jit
def sum_of(values, K: tl.constexpr):
    total = values[0]
    for k in tl.static_range(1, K):
        total = total + values[k]
    return total


@triton.jit
def finite_or_zero(score):
    """The reference point of an exponential: a row with nothing finite has none."""
    return tl.where(score == -float("inf"), 0.0, score)
