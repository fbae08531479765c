"""Reading, checking and decoding a run of chunks in one call without the GIL.

`numcodecs.blosc.decompress` drops the GIL for the 20 microseconds that one chunk takes and then
queues for it again, behind the other threads that decode, gather and train; `google_crc32c` keeps
it. So the chunks of a run are read, checked and decoded in one compiled loop around the same C
functions, ``blosc_decompress_ctx`` and ``crc32c_value``, which the libraries export on Linux, and
``pread``. Where they are not to be had, the chunks are decoded one by one.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
from typing import Any

import google_crc32c
import numcodecs.blosc
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rayvaec.compiled import compiled

HEADER_BYTES = 16
CRC_BYTES = 4

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


def _find_crc32c() -> int:
    """Return the address of ``crc32c_value``, 0 where it is not to be had."""
    try:
        library = importlib.import_module("google_crc32c._crc32c").__file__
        function = ctypes.CDLL(library).crc32c_value
    except (ImportError, OSError, AttributeError):
        return 0
    function.argtypes, function.restype = [ctypes.c_char_p, ctypes.c_size_t], ctypes.c_uint32
    works = function(b"123456789", 9) == 0xE3069283  # the check value of RFC 3720's CRC-32C
    return ctypes.cast(function, ctypes.c_void_p).value or 0 if works else 0


def _find_pread() -> int:
    """Return the address of ``pread`` with 64-bit offsets, 0 where it is not to be had."""
    try:
        function = ctypes.CDLL(None).pread64
    except (OSError, AttributeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


DECOMPRESS = _find_decompress()
CRC32C = _find_crc32c()
PREAD = _find_pread()


def decode_chunks(
    encoded: NDArray[np.uint8],
    places: NDArray[np.int64],
    out: NDArray[np.uint8],
    chunk_bytes: int,
    crc: bool,
) -> int:
    """Check and decode blosc chunks that stand one after the other.

    Parameters
    ----------
    encoded : array of uint8
        Memory that holds the encoded chunks, the first one at its start.
    places : array[n_chunks, 2] of int64
        Where each chunk begins, counted from anywhere, and its length in bytes.
    out : array[at least n_chunks * chunk_bytes] of uint8
        Where to put what they hold.
    chunk_bytes : int
        Bytes of a decoded chunk.
    crc : bool
        Whether each chunk ends with its CRC-32C.

    Returns
    -------
    int
        The first chunk whose checksum is wrong, that is not blosc's or holds another number of
        bytes; -1 if all are right.
    """
    if DECOMPRESS and CRC32C:
        return _decode_native(DECOMPRESS, CRC32C, encoded, places, out, chunk_bytes, crc)
    first = int(places[0, 0]) if len(places) else 0
    for k, (begin, length) in enumerate(places.tolist()):
        stored = encoded[begin - first : begin - first + length]
        chunk = checked(stored) if crc else stored
        if chunk is None or not _decode_one(chunk, out[k * chunk_bytes : (k + 1) * chunk_bytes]):
            return k
    return -1


def read_chunks(
    descriptor: int,
    encoded: NDArray[np.uint8],
    places: NDArray[np.int64],
    out: NDArray[np.uint8],
    chunk_bytes: int,
    crc: bool,
) -> bool:
    """Read blosc chunks that stand one after the other in an open file, and decode them.

    Parameters
    ----------
    descriptor : int
        The file.
    encoded : array of uint8
        Room for the encoded chunks.
    places, out, chunk_bytes, crc
        As in `decode_chunks`; places are counted from the start of the file.

    Returns
    -------
    bool
        Whether all is done; if not, nobody knows what failed, or nothing was tried.
    """
    if not (DECOMPRESS and CRC32C and PREAD):
        return False
    functions = (PREAD, DECOMPRESS, CRC32C)
    return _read_native(*functions, descriptor, encoded, places, out, chunk_bytes, crc)


def checked(chunk: NDArray[np.uint8]) -> NDArray[np.uint8] | None:
    """Return what stands before a chunk's CRC-32C; None where that does not match."""
    if len(chunk) < CRC_BYTES:
        return None
    value, stored = chunk[:-CRC_BYTES], int.from_bytes(chunk[-CRC_BYTES:].data, "little")
    return value if google_crc32c.value(value) == stored else None


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


def _call_at(result: Any, *kinds: Any) -> Any:
    """Return a builder of calls to the C function at an address known at run time.

    A ctypes function would be compiled in by its address, which is another in every process, and
    numba then refuses to keep the machine code. Pointers are passed as numbers.
    """
    signature = result(types.uint64, *kinds)

    def build(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        arguments = [context.get_value_type(kind) for kind in signature.args[1:]]
        function = ir.FunctionType(context.get_value_type(signature.return_type), arguments)
        return builder.call(builder.inttoptr(values[0], function.as_pointer()), values[1:])

    return signature, build


def _build_decompress(typing_context: Any, at: Any, source: Any, out: Any, n: Any, m: Any) -> Any:
    """Call ``blosc_decompress_ctx(source, out, n_bytes, n_threads)``."""
    return _call_at(types.int32, types.uint64, types.uint64, types.uint64, types.int32)


def _build_crc32c(typing_context: Any, at: Any, source: Any, n: Any) -> Any:
    """Call ``crc32c_value(source, n_bytes)``."""
    return _call_at(types.uint32, types.uint64, types.uint64)


def _build_pread(typing_context: Any, at: Any, file: Any, out: Any, n: Any, start: Any) -> Any:
    """Call ``pread(file, out, n_bytes, start)``."""
    return _call_at(types.int64, types.int32, types.uint64, types.uint64, types.int64)


_pread: Any = intrinsic(_build_pread)
_decompress: Any = intrinsic(_build_decompress)
_crc32c: Any = intrinsic(_build_crc32c)


@compiled
def _number(encoded: NDArray[np.uint8], at: int) -> Any:
    """Return the little-endian uint32 at a place."""
    value = np.int64(0)
    for byte in range(4):
        value |= np.int64(encoded[at + byte]) << (8 * byte)
    return value


@compiled
def _decode_native(
    decompress: int,
    crc32c: int,
    encoded: NDArray[np.uint8],
    places: NDArray[np.int64],
    out: NDArray[np.uint8],
    chunk_bytes: int,
    crc: bool,
) -> int:
    source, target = encoded.ctypes.data, out.ctypes.data
    for k in range(len(places)):
        begin, length = places[k, 0] - places[0, 0], places[k, 1]
        if crc:
            length -= CRC_BYTES
        if length < HEADER_BYTES:
            return k
        chunk = np.uint64(source + begin)
        if crc:
            value = _crc32c(np.uint64(crc32c), chunk, np.uint64(length))
            if np.int64(value) != _number(encoded, begin + length):
                return k
        # Blosc's header: uint32 sizes of the decoded chunk, of a block and of the encoded chunk.
        if _number(encoded, begin + 4) != chunk_bytes or _number(encoded, begin + 12) != length:
            return k
        done = _decompress(
            *(np.uint64(decompress), chunk, np.uint64(target + k * chunk_bytes)),
            *(np.uint64(chunk_bytes), np.int32(1)),
        )
        if done != chunk_bytes:
            return k
    return -1


@compiled
def _read_native(
    pread: int,
    decompress: int,
    crc32c: int,
    descriptor: int,
    encoded: NDArray[np.uint8],
    places: NDArray[np.int64],
    out: NDArray[np.uint8],
    chunk_bytes: int,
    crc: bool,
) -> bool:
    room, start = np.uint64(encoded.ctypes.data), places[0, 0]
    done, n = np.int64(0), np.int64(len(encoded))
    while done < n:
        step = _pread(
            *(np.uint64(pread), np.int32(descriptor), room + np.uint64(done)),
            *(np.uint64(n - done), start + done),
        )
        if step <= 0:
            return False
        done += step
    return _decode_native(decompress, crc32c, encoded, places, out, chunk_bytes, crc) < 0
