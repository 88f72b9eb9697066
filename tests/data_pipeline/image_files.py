"""Image files with a flaw."""

import zlib


def png_header(width: int, height: int) -> bytes:
    """A PNG that claims to have this size and ends after a bit of pixel data."""
    body = b"IHDR" + width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x08\x02\x00\x00\x00"
    pixels = b"IDAT" + zlib.compress(bytes(100))
    chunks = [
        (len(chunk) - 4).to_bytes(4, "big") + chunk + zlib.crc32(chunk).to_bytes(4, "big")
        for chunk in (body, pixels)
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)
