"""What numba's language has no words for: addresses, and steps that take a vector of lanes at once.

numba vectorises a loop, not a block of two dimensions kept in registers, and has no bit mask of a
comparison. Where that decides the speed, the innermost step is written here in LLVM's language; it
compiles to what the machine has, for every width of vector.

Kernels of other modules inline these functions, and numba's cache looks at the calling file only:
after a change here, touch nb_sweep.py and decoded_draws.py.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import extending, types
from numba.core import cgutils

WIDTH = 16
"""Lanes that `advance` takes at once; `PRODUCT_WIDTH` divides it."""

PRODUCT_WIDTH = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Lanes that a function of `chains` takes at once."""

# As numba types it, what it returns still wants the two contexts as arguments.
intrinsic: Any = extending.intrinsic

_FLOAT, _DOUBLE, _INT = ir.FloatType(), ir.DoubleType(), ir.IntType(32)


@intrinsic
def address(typing_context: Any, array: Any, index: Any) -> Any:
    """Return a pointer to an array's element, counted from the first in memory."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        data = context.make_array(signature.args[0])(context, builder, arguments[0]).data
        return builder.gep(data, [arguments[1]])

    return types.CPointer(array.dtype)(array, types.intp), generate


@intrinsic
def prefetch(typing_context: Any, pointer: Any) -> Any:
    """Ask for a cache line, which may lie beyond the array: nothing is read."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        byte = ir.IntType(8).as_pointer()
        kind = ir.FunctionType(ir.VoidType(), [byte, _INT, _INT, _INT])
        hint = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        to_read, keep, data = _INT(0), _INT(3), _INT(1)
        builder.call(hint, [builder.bitcast(arguments[0], byte), to_read, keep, data])
        return context.get_dummy_value()

    return types.void(pointer), generate


@intrinsic
def lowest_bit(typing_context: Any, mask: Any) -> Any:
    """Return the number of the lowest bit that is set in an int64 other than 0."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.cttz(arguments[0], ir.IntType(1)(1))

    return types.int64(types.int64), generate


@intrinsic
def advance(typing_context: Any, lam: Any, gap: Any, large: Any) -> Any:
    """Take `WIDTH` lanes past a gene, and return the mask of those that stop there.

    Takes pointers to lambdas (float32) and to what is left of the gaps (float64). A lane stops
    where lambda is above its gap, which is then left as it is, or above `large` (float32), which
    takes nothing from the gap.
    """

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        lam, gap, large = arguments
        singles, doubles = ir.VectorType(_FLOAT, WIDTH), ir.VectorType(_DOUBLE, WIDTH)
        wide = builder.load(builder.bitcast(lam, singles.as_pointer()), align=4)
        at_gap = builder.bitcast(gap, doubles.as_pointer())
        before = builder.load(at_gap, align=8)
        is_large = builder.fcmp_ordered(">", wide, _spread(builder, large, singles))
        reach = builder.fpext(builder.select(is_large, singles(None), wide), doubles)
        ends = builder.fcmp_ordered(">", reach, before)
        builder.store(builder.select(ends, before, builder.fsub(before, reach)), at_gap, align=8)
        stops = builder.bitcast(builder.or_(ends, is_large), ir.IntType(WIDTH))
        return builder.zext(stops, ir.IntType(64))

    return types.int64(lam, gap, types.float32), generate


def chains(n_genes: int) -> Any:
    """Make the function that multiplies `n_genes` rows of a weight with `PRODUCT_WIDTH` lanes.

    Parameters
    ----------
    n_genes : int
        As many chains of multiply-adds go on in registers; their sums begin with the first column.

    Returns
    -------
    callable
        For numba; takes pointers to weight[n_genes, n_hidden], lanes[n_hidden, n_lanes] and
        out[n_genes, n_lanes], float32, each followed by its number of columns but for the last.
    """

    @intrinsic
    def multiply(
        typing_context: Any, weight: Any, n_hidden: Any, lanes: Any, n_lanes: Any, out: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            _multiply(builder, n_genes, *arguments)
            return context.get_dummy_value()

        return types.void(weight, types.intp, lanes, types.intp, out), generate

    return multiply


def _multiply(
    builder: Any, n_genes: int, weight: Any, n_hidden: Any, lanes: Any, n_lanes: Any, out: Any
) -> None:
    vector = ir.VectorType(_FLOAT, PRODUCT_WIDTH)
    kind, name = ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{PRODUCT_WIDTH}f32"
    multiply_add = cgutils.get_or_insert_function(builder.module, kind, name)
    sums = [cgutils.alloca_once_value(builder, vector(None)) for _ in range(n_genes)]

    def of_row(base: Any, row: Any) -> Any:
        at = builder.gep(base, [builder.mul(row, n_lanes)])
        return builder.bitcast(at, vector.as_pointer())

    with cgutils.for_range(builder, n_hidden) as loop:
        part = builder.load(of_row(lanes, loop.index), align=4)
        for gene, total in enumerate(sums):
            at = builder.add(builder.mul(n_hidden.type(gene), n_hidden), loop.index)
            factor = _spread(builder, builder.load(builder.gep(weight, [at])), vector)
            builder.store(builder.call(multiply_add, [factor, part, builder.load(total)]), total)
    for gene, total in enumerate(sums):
        builder.store(builder.load(total), of_row(out, n_hidden.type(gene)), align=4)


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """Fill a vector with one value."""
    first = builder.insert_element(vector(ir.Undefined), value, _INT(0))
    zeros = ir.VectorType(_INT, vector.count)(None)
    return builder.shuffle_vector(first, vector(ir.Undefined), zeros)
