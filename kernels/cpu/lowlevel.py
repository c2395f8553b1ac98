"""Intrinsics that Numba lacks: memory by address, atomic counters, 16-bit and 8-bit floats, and an exponential.

Keys of bfloat16 are read as uint16, of float16 as int16, and bounds of float8_e5m2 as uint8: the type of an element
tells `widen` what its bits mean.
"""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic, overload
from numba.np.arrayobj import populate_array

LANES = 128  # units of a tile: loops of so many steps have no remainder, so equal units have equal bits

# Division by zero gives infinity or NaN, as in PyTorch. Only in `fast` code the order of a sum is the compiler's.
exact = njit(error_model="numpy")
fast = njit(error_model="numpy", fastmath={"contract", "nsz", "reassoc"})

_LOG2_E, _LN2_HIGH, _LN2_LOW = np.float32(1.4426950408889634), np.float32(0.693359375), np.float32(-2.12194440e-4)
_C0, _C1, _C2 = np.float32(1.9875691500e-4), np.float32(1.3981999507e-3), np.float32(8.3334519073e-3)
_C3, _C4, _C5 = np.float32(4.1665795894e-2), np.float32(1.6666665459e-1), np.float32(5.0000001201e-1)
_ONE, _ZERO, _LEAST, _MOST = np.float32(1), np.float32(0), np.float32(-104), np.float32(88)
_E5M2_MAX, _E5M2_NORMAL, _E5M2_UNIT = np.float32(57344), np.float32(2.0**-14), np.float32(2.0**16)


def named_apart(function: Any, *kinds: Any) -> Any:
    """Name a function of a closure by its variables, and return it.

    Compiled code is linked by the names of functions and the types of their arguments. Code from the cache on disk may
    come from several processes, which number functions of one name alike.
    """
    function.__qualname__ += "".join(f"_{getattr(kind, '__name__', kind)}" for kind in kinds)
    return function


@intrinsic
def array(typing: Any, address: Any, count: Any, dtype: Any) -> Any:
    """Return the array of `count` elements at an address. It owns nothing, and costs nothing to make."""
    element = dtype.instance_type
    kind = types.Array(element, 1, "C")

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        made = context.make_array(kind)(context, builder)
        size = context.get_constant(types.intp, element.bitwidth // 8)
        data = builder.inttoptr(args[0], context.get_data_type(element).as_pointer())
        count = context.cast(builder, args[1], signature.args[1], types.intp)
        populate_array(made, data=data, shape=[count], strides=[size], itemsize=size, meminfo=None)
        return made._getvalue()

    return kind(types.int64, types.int64, dtype), build


@intrinsic
def load(typing: Any, address: Any, dtype: Any) -> Any:
    """Return the number at an address."""
    element = dtype.instance_type

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], context.get_data_type(element).as_pointer()))

    return element(types.int64, dtype), build


@intrinsic
def put(typing: Any, address: Any, value: Any, dtype: Any) -> Any:
    """Write a number to an address."""
    element = dtype.instance_type

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], context.get_data_type(element).as_pointer()))
        return context.get_dummy_value()

    return types.none(types.int64, element, dtype), build


@intrinsic
def prefetch(typing: Any, address: Any) -> Any:
    """Ask for the cache line at an address."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word, pointer = ir.IntType(32), ir.PointerType(ir.IntType(8))
        kind = ir.FunctionType(ir.VoidType(), [pointer, word, word, word])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [builder.inttoptr(args[0], pointer), word(0), word(3), word(1)])  # to read data, into L1
        return context.get_dummy_value()

    return types.none(types.int64), build


@intrinsic
def bytes_of(typing: Any, dtype: Any) -> Any:
    """Return the bytes of an element."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.int64, dtype.instance_type.bitwidth // 8)

    return types.int64(dtype), build


@intrinsic
def keep_apart(typing: Any) -> Any:
    """Keep the calling function from being inlined: its loops became vector code, and inlined ones may not."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        builder.function.attributes.add("noinline")
        return context.get_dummy_value()

    return types.none(), build


@intrinsic
def add_and_fetch(typing: Any, address: Any, amount: Any) -> Any:
    """Add to the int64 at an address, atomically, and return what was there before."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        place = builder.inttoptr(args[0], ir.PointerType(ir.IntType(64)))
        return builder.atomic_rmw("add", place, args[1], "seq_cst")

    return types.int64(types.int64, types.int64), build


def _bitcast(source: Any, target: Any, llvm: Any) -> Any:
    def declared(typing: Any, value: Any) -> Any:
        def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            return builder.bitcast(args[0], llvm)

        return target(source), build

    return intrinsic(declared)


float_of = _bitcast(types.uint32, types.float32, ir.FloatType())
bits_of = _bitcast(types.float32, types.uint32, ir.IntType(32))


@intrinsic
def _half_to_float(typing: Any, bits: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.int16), build


@intrinsic
def _float_to_half(typing: Any, value: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.int16(types.float32), build


@intrinsic
def nearest(typing: Any, value: Any) -> Any:
    """Round a float32 to the nearest integer, halves to even."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        function = builder.module.declare_intrinsic("llvm.rint", [ir.FloatType()])
        return builder.call(function, [args[0]])

    return types.float32(types.float32), build


@intrinsic
def whole(typing: Any, value: Any) -> Any:
    """Convert a float32 to int32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.fptosi(args[0], ir.IntType(32))

    return types.int32(types.float32), build


@intrinsic
def digit(typing: Any, word: Any, shift: Any, mask: Any) -> Any:
    """Return `(word >> shift) & mask` of a uint32 as float32."""

    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sitofp(builder.and_(builder.lshr(args[0], args[1]), args[2]), ir.FloatType())

    return types.float32(types.uint32, types.uint32, types.uint32), build


@intrinsic
def _power_of_two(typing: Any, exponent: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(32)
        biased = builder.shl(builder.add(args[0], word(127)), word(23))
        return builder.bitcast(biased, ir.FloatType())

    return types.float32(types.int32), build


@intrinsic
def _halved(typing: Any, number: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.ashr(args[0], ir.IntType(32)(1))

    return types.int32(types.int32), build


@intrinsic
def _minus(typing: Any, first: Any, second: Any) -> Any:
    def build(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return builder.sub(*args)

    return types.int32(types.int32, types.int32), build


@exact
def exp(x):
    """Return e^x of a float32 to 2 units in the last place, for x up to 88; loops over it become vector code."""
    low = max(_LEAST, x)
    inside = min(_MOST, low)
    n = nearest(inside * _LOG2_E)
    r = (inside - n * _LN2_HIGH) - n * _LN2_LOW
    p = (((((_C0 * r + _C1) * r + _C2) * r + _C3) * r + _C4) * r + _C5) * (r * r) + r + _ONE
    power = whole(n)
    half = _halved(power)  # in two factors, as the result may be subnormal
    p = p * _power_of_two(half) * _power_of_two(_minus(power, half))
    p = p if x > _LEAST else _ZERO
    return p if x == x else x  # NaN stays


def widen(element):
    """Return an element of keys, values or bounds as float32."""
    raise NotImplementedError("for compiled code")


@overload(widen)
def _widen(element):
    if element == types.float32:
        return lambda element: element
    if element == types.uint16:
        return lambda element: float_of(np.uint32(element) << np.uint32(16))
    if element == types.int16:
        return lambda element: _half_to_float(element)  # noqa: PLW0108  # an intrinsic is no implementation
    return lambda element: _half_to_float(np.int16(np.uint16(element) << np.uint16(8)))


@exact
def _rounded_bits(value, dropped):
    """Return the bits of a float32 without its last `dropped` ones, rounded to nearest, halves to even."""
    bits = np.int64(bits_of(value))
    return (bits + (np.int64(1) << (dropped - 1)) - 1 + ((bits >> dropped) & 1)) >> dropped


@exact
def to_bfloat16(value):
    """Return the bits of a float32 rounded to bfloat16."""
    if value != value:
        return np.uint16(0x7FC0)
    return np.uint16(_rounded_bits(value, 16))


@exact
def _to_float8(value):
    """Return the bits of a float32 rounded to float8_e5m2; values out of range saturate, NaN stays NaN."""
    if value != value:
        return np.uint8(0x7F)
    sign = np.int64(128) if bits_of(value) >> np.uint32(31) else np.int64(0)
    size = min(abs(value), _E5M2_MAX)
    if size < _E5M2_NORMAL:
        return np.uint8(sign | np.int64(nearest(size * _E5M2_UNIT)))
    return np.uint8(sign | (_rounded_bits(size, 21) - (112 << 2)))


def store(place, i, value):
    """Write a float32 to an array of keys, bounds or outputs."""
    raise NotImplementedError("for compiled code")


@overload(store)
def _store(place, i, value):
    def exact(place, i, value):
        place[i] = value

    def bfloat16(place, i, value):
        place[i] = to_bfloat16(value)

    def float16(place, i, value):
        place[i] = _float_to_half(value)

    def float8(place, i, value):
        place[i] = _to_float8(value)

    known = {types.float32: exact, types.uint16: bfloat16, types.int16: float16, types.uint8: float8}
    return known[place.dtype]
