"""Vectors of 16 lanes as LLVM's own types, for kernels in numba: what numba's loops become depends on checks for
overlap, on remainders, and, where sums may be reassociated, on whether a callee is fresh or from numba's cache.

LLVM splits the vectors for narrower machines. numba's cache looks at the files of the kernels alone: after a change
here, change those too.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir  # type: ignore[import-untyped]
from numba.core import cgutils

LANES = 16
I8, I32, I64, FLOAT = ir.IntType(8), ir.IntType(32), ir.IntType(64), ir.FloatType()


class Lanes:
    """LANES numbers in an LLVM register while code is generated; operators emit instructions."""

    def __init__(self, builder: ir.IRBuilder, value: ir.Value) -> None:
        self.builder, self.value = builder, value
        self.is_float = value.type.element == FLOAT

    def _with(self, other: Lanes | int, integers: str, floats: str = "") -> Lanes:
        operand = other.value if isinstance(other, Lanes) else constant(other)
        return Lanes(self.builder, getattr(self.builder, floats if self.is_float else integers)(self.value, operand))

    def __add__(self, other: Lanes | int) -> Lanes:
        return self._with(other, "add", "fadd")

    def __sub__(self, other: Lanes | int) -> Lanes:
        return self._with(other, "sub", "fsub")

    def __mul__(self, other: Lanes | int) -> Lanes:
        return self._with(other, "mul", "fmul")

    def __and__(self, other: Lanes | int) -> Lanes:
        return self._with(other, "and_")

    def __or__(self, other: Lanes | int) -> Lanes:
        return self._with(other, "or_")

    def __xor__(self, other: Lanes | int) -> Lanes:
        return self._with(other, "xor")

    def __lshift__(self, count: int) -> Lanes:
        return self._with(count, "shl") if count else self

    def __rshift__(self, count: int) -> Lanes:
        return self._with(count, "lshr") if count else self

    def clamped(self, low: Lanes, high: Lanes) -> Lanes:
        """Of floats; neither bound nor value is NaN."""
        builder = self.builder
        value = builder.select(builder.fcmp_ordered("<", high.value, self.value), high.value, self.value)
        value = builder.select(builder.fcmp_ordered(">", low.value, value), low.value, value)
        return Lanes(builder, value)

    def larger(self, other: Lanes) -> Lanes:
        """Of integers with signs."""
        builder = self.builder
        higher = builder.icmp_signed(">", self.value, other.value)
        return Lanes(builder, builder.select(higher, self.value, other.value))

    def to_int(self) -> Lanes:
        return Lanes(self.builder, self.builder.fptosi(self.value, ir.VectorType(I32, LANES)))

    def to_float(self) -> Lanes:
        return Lanes(self.builder, self.builder.sitofp(self.value, ir.VectorType(FLOAT, LANES)))

    def bits(self) -> Lanes:
        return Lanes(self.builder, self.builder.bitcast(self.value, ir.VectorType(I32, LANES)))

    def as_float(self) -> Lanes:
        return Lanes(self.builder, self.builder.bitcast(self.value, ir.VectorType(FLOAT, LANES)))

    def store(self, pointer: ir.Value) -> None:
        """To floats or bytes, with no demand on the address."""
        value = self.value
        if pointer.type.pointee == I8:
            value = self.builder.trunc(value, ir.VectorType(I8, LANES))
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer()), align=1)


def constant(number: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(I32, LANES), [number] * LANES)


def load(builder: ir.IRBuilder, pointer: ir.Value) -> Lanes:
    """LANES floats, or bytes as integers, from any address."""
    vector = ir.VectorType(pointer.type.pointee, LANES)
    value = builder.load(builder.bitcast(pointer, vector.as_pointer()), align=1)
    if pointer.type.pointee == I8:
        value = builder.zext(value, ir.VectorType(I32, LANES))
    return Lanes(builder, value)


def splat(builder: ir.IRBuilder, value: ir.Value) -> Lanes:
    vector = ir.VectorType(value.type, LANES)
    single = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(I32, 0))
    return Lanes(builder, builder.shuffle_vector(single, ir.Constant(vector, ir.Undefined), constant(0)))


def pointers(context: Any, builder: ir.IRBuilder, arrays: Any, values: Any) -> list[ir.Value]:
    """Where the data of one-dimensional arrays begin."""
    made = [context.make_array(kind)(context, builder, value) for kind, value in zip(arrays, values, strict=True)]
    return [array.data for array in made]


def call(builder: ir.IRBuilder, name: str, result: ir.Type, *arguments: ir.Value, **flags: Any) -> ir.Value:
    kind = ir.FunctionType(result, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), arguments, **flags)


def add_up(lanes: Lanes) -> ir.Value:
    """The sum of floats, in the order that this machine's vectors give."""
    name, start = f"llvm.vector.reduce.fadd.v{LANES}f32", ir.Constant(FLOAT, -0.0)
    return call(lanes.builder, name, FLOAT, start, lanes.value, fastmath=("reassoc",))
