"""Device function of the controller: ``control_ref.py`` for one layer, operation by operation.

No exponential and no fused multiply-add, and divisions that round to nearest: the same bits as the
reference.
"""

import triton
import triton.language as tl

from . import layout
from .control_ref import OCTAVE

_MODE = tl.constexpr(layout.MODE)
_TARGET = tl.constexpr(layout.TARGET)
_LARGEST = tl.constexpr(layout.LARGEST)
_SMALLEST = tl.constexpr(layout.SMALLEST)
_START = tl.constexpr(layout.START)
_GAIN = tl.constexpr(layout.GAIN)
_CALL_GAIN = tl.constexpr(layout.CALL_GAIN)
_LEAD = tl.constexpr(layout.LEAD)
_RECENT_RATE = tl.constexpr(layout.RECENT_RATE)
_DEAD_BAND = tl.constexpr(layout.DEAD_BAND)
_AVERAGE_RATE = tl.constexpr(layout.AVERAGE_RATE)
_WARM_TOKENS = tl.constexpr(layout.WARM_TOKENS)
_NUM_CONTROLS = tl.constexpr(layout.NUM_CONTROLS)

_QUALITY = tl.constexpr(layout.MODE_QUALITY)
_BONUS = tl.constexpr(layout.MODE_BONUS)

_SEEN = tl.constexpr(layout.SEEN)
_LEVEL = tl.constexpr(layout.LEVEL)
_RECENT_ERROR = tl.constexpr(layout.RECENT_ERROR)
_MEAN_HITS = tl.constexpr(layout.MEAN_HITS)
_MEAN_MOVED = tl.constexpr(layout.MEAN_MOVED)
_MEAN_UNAVOIDABLE = tl.constexpr(layout.MEAN_UNAVOIDABLE)
_FLAGS = tl.constexpr(layout.FLAGS)
_NUM_CONTROL_STATE = tl.constexpr(layout.NUM_CONTROL_STATE)

_COLD = tl.constexpr(layout.FLAG_COLD)
_CLAMPED = tl.constexpr(layout.FLAG_CLAMPED)
_INFEASIBLE = tl.constexpr(layout.FLAG_INFEASIBLE)
_MOVED_UNIT = tl.constexpr(1 / layout.MOVED_MASS_ONE)
_OCTAVE = tl.constexpr(float(OCTAVE))
_OCTAVE_UNIT = tl.constexpr(1 / OCTAVE)


@triton.jit
def strength_in_force(control_ptr, strength, residents, K: tl.constexpr):
    """The strength that a call uses; ``control_ptr`` is at the layer's row."""
    largest = tl.load(control_ptr + _LARGEST)
    held = tl.where(strength < largest, strength, largest)
    held = tl.where(residents >= K, held, 0.0)
    return tl.where(tl.load(control_ptr + _MODE) > 0.0, held, strength)


@triton.jit
def _toward(mean, value, share):
    return mean + share * (value - mean)


@triton.jit
def _within(value, top):
    value = tl.where(value > 0.0, value, 0.0)
    value = tl.where(value < top, value, top)
    return tl.where(value > 0.0, value, 0.0)


@triton.jit
def _octaves(strength, bottom):
    return (strength.to(tl.int32, bitcast=True) - bottom).to(tl.float32) * _OCTAVE_UNIT


@triton.jit
def adapt(
    control_ptr, state_ptr, strength_ptr,
    tokens, residents, misses, moved_units, unavoidable, K: tl.constexpr,
):  # fmt: skip
    """Advance one layer's controller; pointers are at the layer's row."""
    mode = tl.load(control_ptr + _MODE)
    if (mode > 0.0) & (tokens > 0):
        if residents < K:
            tl.store(state_ptr + _FLAGS, _COLD * 1.0)
        else:
            target = tl.load(control_ptr + _TARGET)
            largest = tl.load(control_ptr + _LARGEST)
            smallest = tl.load(control_ptr + _SMALLEST)
            start = tl.load(control_ptr + _START)
            gain = tl.load(control_ptr + _GAIN)
            call_gain = tl.load(control_ptr + _CALL_GAIN)
            lead = tl.load(control_ptr + _LEAD)
            recent_rate = tl.load(control_ptr + _RECENT_RATE)
            dead_band = tl.load(control_ptr + _DEAD_BAND)
            average_rate = tl.load(control_ptr + _AVERAGE_RATE)
            warm_tokens = tl.load(control_ptr + _WARM_TOKENS)
            before = tl.load(state_ptr + _SEEN)
            level = tl.load(state_ptr + _LEVEL)
            recent = tl.load(state_ptr + _RECENT_ERROR)
            mean_hits = tl.load(state_ptr + _MEAN_HITS)
            mean_moved = tl.load(state_ptr + _MEAN_MOVED)
            mean_unavoidable = tl.load(state_ptr + _MEAN_UNAVOIDABLE)
            # several warps have loaded: none may still be loading when another stores
            tl.debug_barrier()

            n = tokens.to(tl.float32)
            pairs = tokens.to(tl.int64) * K
            warm = before >= warm_tokens
            seen = tl.minimum(before + n, 16777216.0)
            since = tl.where(warm, seen - warm_tokens, seen)
            share = tl.maximum(average_rate * n, tl.div_rn(n, tl.maximum(since, 1.0)))
            share = tl.minimum(share, 1.0)
            hits = tl.div_rn((pairs - misses).to(tl.float32), pairs.to(tl.float32))
            moved = tl.div_rn(moved_units.to(tl.float32) * _MOVED_UNIT, n)
            blocked = tl.div_rn(unavoidable.to(tl.float32), pairs.to(tl.float32))
            mean_hits = _toward(mean_hits, hits, share)
            mean_moved = _toward(mean_moved, moved, share)
            mean_unavoidable = _toward(mean_unavoidable, blocked, share)

            quality = mode == _QUALITY
            error = target - tl.where(quality, moved, hits)
            mean_error = target - tl.where(quality, mean_moved, mean_hits)
            if mode == _BONUS:
                step = gain * n
                level = tl.where(before > 0.0, level, start)
                up = warm & (mean_error > 0.0)
                down = warm & (mean_hits > target + dead_band)
                level = level + tl.where(up, step, tl.where(down, -step, 0.0))
                level = _within(level, largest)
                recent = 0.0
                strength = level
            else:
                bottom = smallest.to(tl.int32, bitcast=True)
                top = _octaves(largest, bottom)
                level = tl.where(before > 0.0, level, _octaves(start, bottom))
                moving = warm & (tl.abs(mean_error) > dead_band)
                step = tl.minimum(gain * n, call_gain) * error
                level = _within(level + tl.where(moving, step, 0.0), top)
                recent = _toward(recent, error, tl.minimum(recent_rate * n, 1.0))
                recent = tl.where(warm, recent, 0.0)
                divisor = tl.where(lead > 0.0, lead, 1.0)
                most, least = tl.div_rn(top - level, divisor), tl.div_rn(-level, divisor)
                recent = tl.where((lead > 0.0) & (recent > most), most, recent)
                recent = tl.where((lead > 0.0) & (recent < least), least, recent)
                octaves = _within(level + lead * recent, top)
                bits = bottom + (octaves * _OCTAVE).to(tl.int32)
                strength = tl.where(octaves > 0.0, bits.to(tl.float32, bitcast=True), 0.0)

            cold = seen < warm_tokens
            strength = _within(tl.where(cold, 0.0, strength), largest)
            impossible = (quality == 0) & (target > 1.0 - mean_unavoidable)
            flags = tl.where(strength >= largest, _CLAMPED * 1.0, 0.0)
            flags = flags + tl.where(impossible, _INFEASIBLE * 1.0, 0.0)
            flags = tl.where(cold, _COLD * 1.0, flags)
            tl.store(strength_ptr, strength)
            tl.store(state_ptr + _SEEN, seen)
            tl.store(state_ptr + _LEVEL, level)
            tl.store(state_ptr + _RECENT_ERROR, recent)
            tl.store(state_ptr + _MEAN_HITS, mean_hits)
            tl.store(state_ptr + _MEAN_MOVED, mean_moved)
            tl.store(state_ptr + _MEAN_UNAVOIDABLE, mean_unavoidable)
            tl.store(state_ptr + _FLAGS, flags)
