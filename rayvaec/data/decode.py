"""Decoding a run of blosc chunks in one call without the GIL.

`numcodecs.blosc.decompress` drops the GIL for the 20 microseconds that one chunk takes and then
queues for it again, behind the other threads that decode, gather and train. So the chunks of a run
are decoded in one compiled loop around the same C function, ``blosc_decompress_ctx``, which
numcodecs' library exports on Linux. Where it does not, numcodecs decodes chunk by chunk.
"""

from __future__ import annotations

import ctypes
import struct
from typing import Any

import numcodecs.blosc
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rayvaec.compiled import compiled

HEADER_BYTES = 16

# With blosc's own threads, decoding would hold one global lock; without, it only drops the GIL.
numcodecs.blosc.use_threads = False


def _find_decompress() -> int:
    """Return the address of ``blosc_decompress_ctx``, 0 where it is not to be had."""
    try:
        function = ctypes.CDLL(numcodecs.blosc.__file__).blosc_decompress_ctx
    except (OSError, AttributeError):
        return 0
    function.argtypes = [ctypes.c_char_p, ctypes.c_char_p, ctypes.c_size_t, ctypes.c_int]
    sample = bytes(range(200)) * 3
    encoded = bytes(numcodecs.blosc.compress(sample, b"lz4", 5, 1, 0, 1))
    out = ctypes.create_string_buffer(len(sample))
    decoded = function(encoded, out, len(sample), 1)
    works = decoded == len(sample) and out.raw == sample
    return ctypes.cast(function, ctypes.c_void_p).value or 0 if works else 0


DECOMPRESS = _find_decompress()


def decode_chunks(
    encoded: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray[np.uint8],
    chunk_bytes: int,
) -> int:
    """Decode blosc chunks one after the other.

    Parameters
    ----------
    encoded : array of uint8
        Memory that holds the encoded chunks.
    begins, lengths : array[n_chunks] of int64
        Where each chunk begins in `encoded`, and its length in bytes.
    out : array[at least n_chunks * chunk_bytes] of uint8
        Where to put what they hold.
    chunk_bytes : int
        Bytes of a decoded chunk.

    Returns
    -------
    int
        The first chunk that is not blosc's or holds another number of bytes; -1 if all are right.
    """
    if DECOMPRESS:
        return _decode_native(DECOMPRESS, encoded, begins, lengths, out, chunk_bytes)
    for k, (begin, length) in enumerate(zip(begins.tolist(), lengths.tolist(), strict=True)):
        chunk = encoded[begin : begin + length]
        if not _decode_one(chunk, out[k * chunk_bytes : (k + 1) * chunk_bytes]):
            return k
    return -1


def _decode_one(encoded: NDArray[np.uint8], out: NDArray[np.uint8]) -> bool:
    if len(encoded) < HEADER_BYTES:
        return False
    # Blosc's header: uint32 sizes of the decoded chunk, of a block and of the encoded chunk.
    decoded, _, size = struct.unpack_from("<III", encoded.data, 4)
    if decoded != len(out) or size != len(encoded):
        return False
    try:
        numcodecs.blosc.decompress(encoded, out)
    except RuntimeError:  # what numcodecs raises for bytes that are not blosc's
        return False
    return True


def _build_call(typing_context: Any, function: Any, source: Any, out: Any, n: Any) -> Any:
    """Call ``blosc_decompress_ctx(source, out, n, 1)`` at an address known at run time.

    A ctypes function would be compiled in by its address, which is another in every process, and
    numba then refuses to keep the machine code.
    """
    signature = types.int32(types.uint64, types.uint64, types.uint64, types.uint64)

    def build(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        pointer, size, integer = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(32)
        kind = ir.FunctionType(integer, [pointer, pointer, size, integer])
        function, source, out, n = arguments
        return builder.call(
            builder.inttoptr(function, kind.as_pointer()),
            [
                builder.inttoptr(source, pointer),
                builder.inttoptr(out, pointer),
                n,
                ir.Constant(integer, 1),
            ],
        )

    return signature, build


_call: Any = intrinsic(_build_call)


@compiled
def _decode_native(
    function: int,
    encoded: NDArray[np.uint8],
    begins: NDArray[np.int64],
    lengths: NDArray[np.int64],
    out: NDArray[np.uint8],
    chunk_bytes: int,
) -> int:
    source, target = encoded.ctypes.data, out.ctypes.data
    for k in range(len(begins)):
        begin, length = begins[k], lengths[k]
        if length < HEADER_BYTES:
            return k
        decoded, size = np.int64(0), np.int64(0)
        for byte in range(4):
            decoded += np.int64(encoded[begin + 4 + byte]) << (8 * byte)
            size += np.int64(encoded[begin + 12 + byte]) << (8 * byte)
        if decoded != chunk_bytes or size != length:
            return k
        done = _call(
            *(np.uint64(function), np.uint64(source + begin)),
            *(np.uint64(target + k * chunk_bytes), np.uint64(chunk_bytes)),
        )
        if done != chunk_bytes:
            return k
    return -1
