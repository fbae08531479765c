"""Decode runs of compressed chunks in one call that releases the GIL.

`numcodecs.blosc.decompress` drops the GIL for the 20 microseconds that one chunk takes and then
queues for it again, behind the other threads that decode, gather and train; `google_crc32c` keeps
it. So the chunks of many runs are read, checked and decoded in one compiled loop around the same C
functions, ``blosc_decompress_ctx`` and ``crc32c_value``, which the libraries export on Linux, and
``pread``. Where they are not to be had, the chunks are decoded one by one.
"""

from __future__ import annotations

import ctypes
import importlib
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import google_crc32c
import numcodecs.blosc
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from rayvaec.data.io.byte_reader import OpenFile
from rayvaec.util.numba_cache import compiled

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
        return _decode_native(DECOMPRESS, CRC32C, encoded, places, address(out), chunk_bytes, crc)
    first = int(places[0, 0]) if len(places) else 0
    for k, (begin, length) in enumerate(places.tolist()):
        stored = encoded[begin - first : begin - first + length]
        chunk = checked(stored) if crc else stored
        if chunk is None or not _decode_one(chunk, out[k * chunk_bytes : (k + 1) * chunk_bytes]):
            return k
    return -1


class ChunkRun(NamedTuple):
    """Neighbouring blosc chunks of an open file, to be read and decoded.

    Parameters
    ----------
    file : OpenFile
        The file.
    places : array[n_chunks, 2] of int64
        Where in the file each chunk begins, and its length; -1 for one that is not there.
    out : array[at least n_chunks * chunk_bytes] of uint8
        Where to put what they hold.
    chunk_bytes : int
        Bytes of a decoded chunk.
    crc : bool
        Whether each chunk ends with its CRC-32C.
    """

    file: OpenFile
    places: NDArray[np.int64]
    out: NDArray[np.uint8]
    chunk_bytes: int
    crc: bool


def read_chunks(runs: Sequence[ChunkRun], room: NDArray[np.uint8]) -> bool:
    """Read and decode runs of chunks, all of them in one call without the GIL.

    Parameters
    ----------
    runs : sequence of ChunkRun
        What to read.
    room : array of uint8
        Room for encoded chunks; as many as fit are read at once.

    Returns
    -------
    bool
        Whether all is done; if not, nobody knows what failed, or nothing was tried.
    """
    if not (DECOMPRESS and CRC32C and PREAD):
        return False
    table = np.array(
        [
            (run.file.descriptor, len(run.places), address(run.out), run.chunk_bytes, run.crc)
            for run in runs
        ],
        np.int64,
    )
    places = np.concatenate([run.places for run in runs])
    return _read_native(PREAD, DECOMPRESS, CRC32C, table, places, room)


def address(array: NDArray[Any]) -> int:
    """Return where an array's memory begins."""
    return int(array.__array_interface__["data"][0])


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
    target: int,
    chunk_bytes: int,
    crc: bool,
) -> int:
    source = encoded.ctypes.data
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
            np.uint64(decompress),
            chunk,
            np.uint64(target + k * chunk_bytes),
            np.uint64(chunk_bytes),
            np.int32(1),
        )
        if done != chunk_bytes:
            return k
    return -1


@compiled
def _read_native(
    pread: int,
    decompress: int,
    crc32c: int,
    runs: NDArray[np.int64],
    places: NDArray[np.int64],
    room: NDArray[np.uint8],
) -> bool:
    at = 0
    for r in range(len(runs)):
        descriptor, stop, target, chunk_bytes = runs[r, 0], at + runs[r, 1], runs[r, 2], runs[r, 3]
        while at < stop:
            end = _joined(places, at, stop, len(room))
            start, n = places[at, 0], places[end - 1].sum() - places[at, 0]
            if start < 0 or n > len(room) or not _fill(pread, descriptor, start, room[:n]):
                return False
            parts = places[at:end]
            crc = runs[r, 4] != 0
            if _decode_native(decompress, crc32c, room, parts, target, chunk_bytes, crc) >= 0:
                return False
            target += (end - at) * chunk_bytes
            at = end
    return True


@compiled
def _joined(places: NDArray[np.int64], at: int, stop: int, room: int) -> int:
    """Return how far chunks stand one after the other and fit into the room together."""
    end = at + 1
    while (
        end < stop
        and places[end, 0] == places[end - 1].sum()
        and places[end].sum() - places[at, 0] <= room
    ):
        end += 1
    return end


@compiled
def _fill(pread: int, descriptor: int, start: int, room: NDArray[np.uint8]) -> bool:
    """Read from a place of a file until the room is full."""
    to, done = np.uint64(room.ctypes.data), np.int64(0)
    while done < len(room):
        step = _pread(
            np.uint64(pread),
            np.int32(descriptor),
            to + np.uint64(done),
            np.uint64(len(room) - done),
            start + done,
        )
        if step <= 0:
            return False
        done += step
    return True
