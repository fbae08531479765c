"""LLVM intrinsics that numba lacks: prefetch, bit scan, SIMD micro-kernels.

numba vectorises a loop, not a block of two dimensions kept in registers, and has no bit mask of a
comparison. Where that decides the speed, the innermost step is written here in LLVM's language; it
compiles to what the machine has, for every width of vector.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import extending, types
from numba.core import cgutils
from numba.core.compiler import Compiler


class Distinct(Compiler):
    """For ``njit(pipeline_class=Distinct)``: the caller's arrays do not overlap."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.state.flags.noalias = True


WIDTH = 16
"""Lanes that `advance` takes at once; `PRODUCT_WIDTH` divides it."""

PRODUCT_WIDTH = 16 if binding.get_host_cpu_features().get("avx512f") else 8
"""Lanes that a function of `chains`, `gathers` or `scatters` takes at once."""

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
    sums = [cgutils.alloca_once_value(builder, vector(None)) for _ in range(n_genes)]

    def of_row(base: Any, row: Any) -> Any:
        at = builder.gep(base, [builder.mul(row, n_lanes)])
        return builder.bitcast(at, vector.as_pointer())

    with cgutils.for_range(builder, n_hidden) as loop:
        part = builder.load(of_row(lanes, loop.index), align=4)
        for gene, total in enumerate(sums):
            at = builder.add(builder.mul(n_hidden.type(gene), n_hidden), loop.index)
            factor = _spread(builder, builder.load(builder.gep(weight, [at])), vector)
            builder.store(_multiply_add(builder, factor, part, builder.load(total)), total)
    for gene, total in enumerate(sums):
        builder.store(builder.load(total), of_row(out, n_hidden.type(gene)), align=4)


def gathers(n_vectors: int, lanes: int = PRODUCT_WIDTH) -> Any:
    """Make the function that adds weighted rows of a matrix to a total kept in registers.

    Parameters
    ----------
    n_vectors : int
        Vectors that it takes of every row.
    lanes : int
        Columns of a vector.

    Returns
    -------
    callable
        For numba; takes a pointer to the first column in matrix[., width], float32, the width,
        pointers to rows[n] (int) and factors[n] (float32), n, and a pointer to total (float32).
    """

    @intrinsic
    def gather(
        typing_context: Any, matrix: Any, width: Any, rows: Any, factors: Any, n: Any, total: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            matrix, width, rows, factors, n, total = arguments
            sums = _registers(builder, n_vectors, lanes, total)
            with cgutils.for_range(builder, n) as loop:
                row = _row_at(builder, matrix, width, rows, loop.index)
                factor = _factor_at(builder, lanes, factors, loop.index)
                for k, kept in enumerate(sums):
                    part = builder.load(_vector_at(builder, lanes, row, k), align=4)
                    builder.store(_multiply_add(builder, factor, part, builder.load(kept)), kept)
            for k, kept in enumerate(sums):
                builder.store(builder.load(kept), _vector_at(builder, lanes, total, k), align=4)
            return context.get_dummy_value()

        return types.void(matrix, types.intp, rows, factors, types.intp, total), generate

    return gather


def scatters(n_vectors: int, lanes: int = PRODUCT_WIDTH) -> Any:
    """Make the function that adds one row, kept in registers and weighted, to rows of a matrix.

    Parameters
    ----------
    n_vectors, lanes : int
        As in `gathers`.

    Returns
    -------
    callable
        For numba; as that of `gathers`, with a pointer to the row in place of the total.
    """

    @intrinsic
    def scatter(
        typing_context: Any, matrix: Any, width: Any, rows: Any, factors: Any, n: Any, source: Any
    ) -> Any:
        def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
            matrix, width, rows, factors, n, source = arguments
            parts = _registers(builder, n_vectors, lanes, source)
            with cgutils.for_range(builder, n) as loop:
                row = _row_at(builder, matrix, width, rows, loop.index)
                factor = _factor_at(builder, lanes, factors, loop.index)
                for k, kept in enumerate(parts):
                    at = _vector_at(builder, lanes, row, k)
                    total = builder.load(at, align=4)
                    total = _multiply_add(builder, factor, builder.load(kept), total)
                    builder.store(total, at, align=4)
            return context.get_dummy_value()

        return types.void(matrix, types.intp, rows, factors, types.intp, source), generate

    return scatter


def _registers(builder: Any, n_vectors: int, lanes: int, pointer: Any) -> list[Any]:
    """Return variables that hold consecutive vectors from memory; LLVM keeps them in registers."""
    loaded = [
        builder.load(_vector_at(builder, lanes, pointer, k), align=4) for k in range(n_vectors)
    ]
    return [cgutils.alloca_once_value(builder, vector) for vector in loaded]


def _vector_at(builder: Any, lanes: int, pointer: Any, number: int) -> Any:
    """Return a pointer to one of consecutive vectors."""
    at = builder.gep(pointer, [_INT(number * lanes)])
    return builder.bitcast(at, ir.VectorType(_FLOAT, lanes).as_pointer())


def _row_at(builder: Any, matrix: Any, width: Any, rows: Any, number: Any) -> Any:
    """Return a pointer into the row of a matrix whose number stands in `rows`."""
    row = builder.load(builder.gep(rows, [number]))
    if row.type.width < width.type.width:
        row = builder.zext(row, width.type)
    return builder.gep(matrix, [builder.mul(row, width)])


def _factor_at(builder: Any, lanes: int, factors: Any, number: Any) -> Any:
    """Return a vector filled with one of `factors`."""
    factor = builder.load(builder.gep(factors, [number]))
    return _spread(builder, factor, ir.VectorType(_FLOAT, lanes))


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """Return a * b + c, rounded once."""
    kind, name = ir.FunctionType(a.type, [a.type] * 3), f"llvm.fma.v{a.type.count}f32"
    return builder.call(cgutils.get_or_insert_function(builder.module, kind, name), [a, b, c])


def _spread(builder: Any, value: Any, vector: Any) -> Any:
    """Fill a vector with one value."""
    first = builder.insert_element(vector(ir.Undefined), value, _INT(0))
    zeros = ir.VectorType(_INT, vector.count)(None)
    return builder.shuffle_vector(first, vector(ir.Undefined), zeros)
