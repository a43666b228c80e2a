"""The body of a server's answer, read as it comes: no more of it than an answer can have, whatever it unpacks to."""

from __future__ import annotations

import zlib
from collections.abc import AsyncIterator

MOST = 10 << 20  # bytes, unpacked
_STEP = 64 << 10  # unpacked at a time
# what is asked for, and how zlib takes it: with gzip's header, or with zlib's own
ENCODINGS = {"gzip": 31, "x-gzip": 31, "deflate": 15}
ACCEPTED = "gzip, deflate"


class TooMuch(Exception):
    """The body is longer than ``MOST``, or is packed in a way that cannot be unpacked here."""


async def read_body(raw: AsyncIterator[bytes], encoding: str) -> bytes:
    """Return a body, unpacked.

    Args:
        raw: as it comes over the wire
        encoding: what the header Content-Encoding says, "" for nothing

    Raises:
        TooMuch: as its class says; no more than ``MOST`` has been kept, and nothing further is read
    """
    packed = encoding.strip().lower()
    if packed in ("", "identity"):
        return await _plain(raw)
    if packed not in ENCODINGS:
        raise TooMuch(f"it is packed as {packed[:40]!r}, which was not asked for")
    unpacker, body = zlib.decompressobj(ENCODINGS[packed]), bytearray()
    async for data in raw:
        while data and not unpacker.eof:
            try:
                body += unpacker.decompress(data, _STEP)
            except zlib.error as error:
                raise TooMuch(f"it cannot be unpacked ({error})") from error
            _check(body)
            data = unpacker.unconsumed_tail
    return bytes(body)


async def _plain(raw: AsyncIterator[bytes]) -> bytes:
    body = bytearray()
    async for data in raw:
        body += data
        _check(body)
    return bytes(body)


def _check(body: bytearray) -> None:
    if len(body) > MOST:
        raise TooMuch(f"it is longer than {MOST >> 20} MiB")
