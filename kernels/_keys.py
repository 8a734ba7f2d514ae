"""The encodings that carry a selection through the route kernel, and its masks.

* key: int32 that orders as the score does, every non-finite score at the key of -inf, and
  TAKEN, one below, for columns that are gone (already chosen, no candidates, or padding). Nothing
  is masked with a sentinel score, which a large bonus could meet.
* code: ``2 * expert + missing``. The lowest code among equal keys is the lower id, and who was
  chosen and whether it is resident arrive in one reduction.
* rank: what a selection is made from. It is the key, and finding the best takes two reductions,
  of keys and of the codes among them. A bfloat16 leaves the low half of its key free: PACKED, the
  inverted code is there, and one reduction finds both.

Rows are a tile of BLOCK_T by BLOCK_E >= E columns. What belongs to one rank (0 .. K-1) is a vector
of BLOCK_T: no gather, no sort, no shared memory of our own.
"""

import triton
import triton.language as tl

TAKEN = tl.constexpr(-(2**31))
NONFINITE = tl.constexpr(-2139095041)  # the key of -inf: 0xff800000 ^ 0x7fffffff
NO_CODE = tl.constexpr(2**31 - 1)
FLOAT32_MAX = tl.constexpr(3.4028234663852886e38)


@triton.jit
def order_key(x):
    bits = (x + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0: both zeros tie
    # negative floats run backwards as integers: s eeeeeeee mmm --> s ~eeeeeeee ~mmm
    key = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return tl.where(tl.abs(x) <= FLOAT32_MAX, key, NONFINITE)


@triton.jit
def key_score(key):
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def ranked(key, code, PACKED: tl.constexpr):
    """The rank of a key. PACKED, it is at most NONFINITE for a score that is not finite, too."""
    rank = key
    if PACKED:
        rank = (key & -65536) | (65535 - code)
    return rank


@triton.jit
def rank_key(rank, PACKED: tl.constexpr):
    """The key in a rank, below NONFINITE if that is TAKEN."""
    key = rank
    if PACKED:
        # the low half of a float that was a bfloat16 is 0, and of a negative one's key, all ones
        key = tl.where(rank < 0, rank | 65535, rank & -65536)
    return key


@triton.jit
def rank_code(rank):
    """The code in a packed rank."""
    return 65535 - (rank & 65535)


@triton.jit
def best_of(rank_te, code_te, PACKED: tl.constexpr):
    """The best column of each row: its key and its code, and what marks it, for :func:`without`."""
    rank_t = tl.max(rank_te, axis=1)
    if PACKED:
        key_t = rank_key(rank_t, PACKED)
        code_t = rank_code(rank_t)
        mark_t = rank_t
    else:
        key_t = rank_t
        code_t = tl.min(tl.where(rank_te == rank_t[:, None], code_te, NO_CODE), axis=1)
        mark_t = code_t
    return key_t, code_t, mark_t


@triton.jit
def without(rank_te, code_te, mark_t, PACKED: tl.constexpr):
    """The ranks once the column with this mark is gone."""
    if PACKED:
        gone_te = rank_te == mark_t[:, None]
    else:
        gone_te = code_te == mark_t[:, None]
    return tl.where(gone_te, TAKEN, rank_te)


@triton.jit
def value_at(value_te, code_te, code_t):
    """The value of the expert with this code; exact, since all others add zero."""
    return tl.sum(tl.where(code_te == code_t[:, None], value_te, 0.0), axis=1)


@triton.jit
def column(value_t):
    """A vector of BLOCK_T as what K columns are computed with."""
    # of one row a scalar, which has no layout: the tile of K columns need not take that of the
    # row, in which a thread holds several columns
    if value_t.shape[0] == 1:
        column = tl.sum(value_t, axis=0)
    else:
        column = value_t[:, None]
    return column


@triton.jit
def side_by_side(values, offs_k, K: tl.constexpr):
    """K vectors of BLOCK_T as the first K columns of a tile; the others repeat the first."""
    BLOCK_T: tl.constexpr = values[0].shape[0]
    value_tk = tl.zeros([BLOCK_T, offs_k.shape[0]], values[0].dtype) + column(values[0])
    for k in tl.static_range(1, K):
        value_tk = tl.where((offs_k == k)[None, :], column(values[k]), value_tk)
    return value_tk


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
