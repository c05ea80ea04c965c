"""Files as streams: compression by content, and text by its byte order mark."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import lzma
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

#: Bytes that are decoded, and turned into tokens, at a time.
BLOCK = 1 << 20
#: Bytes at the start of a file in which a NUL byte means binary data (the rule of git).
_SNIFFED = 8000
#: The largest share of a text that may be no UTF-8: a stray byte is, a Latin-1 text is not.
_MOST_STRAY = 0.01
#: Surrogates by which Python's decoder hands over bytes that are no UTF-8.
STRAY = re.compile("[\udc80-\udcff]")

_MARKS = (  # the longer marks first: that of UTF-32 begins with that of UTF-16
    (codecs.BOM_UTF32_LE, "utf-32"), (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"),
)  # fmt: skip
_COMPRESSED = {
    b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd",
}  # fmt: skip
_REFUSED = {
    b"PK\x03\x04": "a zip archive", b"PK\x05\x06": "a zip archive", b"7z\xbc\xaf\x27\x1c":
    "a 7z archive", b"Rar!": "a rar archive", b"%PDF-": "a PDF", b"\x04\x22\x4d\x18":
    "lz4 data", b"GGUF": "a GGUF model",
}  # fmt: skip
#: Endings of compressed files; what stands before them says what is inside.
COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")


class NotTextError(ValueError):
    """A file that holds no text: refused by itself, left out and counted in a folder."""


@contextmanager
def opened(path: Path) -> Iterator[io.BufferedReader]:
    """Open a file inside a `with` block, decompressed if its content is compressed.

    Raises `ValueError` where the compressed content is damaged, inside the block too.
    """
    with path.open("rb", buffering=BLOCK) as raw:
        head = raw.peek(8)
        kind = next((k for magic, k in _COMPRESSED.items() if head.startswith(magic)), None)
        try:
            yield raw if kind is None else io.BufferedReader(_decompressed(raw, kind), BLOCK)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise ValueError(f"{path}: expected whole {kind} data, got {error}") from None
        except OSError as error:
            if kind != "bz2" or error.errno is not None:
                raise
            raise ValueError(f"{path}: expected whole bz2 data, got {error}") from None
        except Exception as error:  # zstandard has an error of its own, and it may be absent
            if type(error).__name__ != "ZstdError":
                raise
            raise ValueError(f"{path}: expected whole zstd data, got {error}") from None


def _decompressed(raw: BinaryIO, kind: str) -> io.RawIOBase:
    if kind == "gzip":
        return gzip.GzipFile(fileobj=raw)
    if kind == "bz2":
        return bz2.BZ2File(raw)
    if kind == "xz":
        return lzma.LZMAFile(raw)
    try:
        import zstandard
    except ImportError:
        raise ImportError(
            "path: reading zstd data needs zstandard (pip install zstandard)"
        ) from None
    return _Zstd(raw, zstandard.ZstdDecompressor(max_window_size=1 << 31))


class _Zstd(io.RawIOBase):
    """The content of zstd frames, one after another; `EOFError` where the last is cut off."""

    def __init__(self, raw: BinaryIO, decompressor):
        self._raw, self._decompressor = raw, decompressor
        self._frame = None
        self._rest = self._ready = b""

    def readable(self) -> bool:
        """Say that this is a stream to read."""
        return True

    def readinto(self, buffer) -> int:
        """Fill `buffer` with what comes next, and return how many bytes that is; 0 at the end."""
        while not self._ready:
            data = self._rest or self._raw.read(1 << 16)
            if not data:
                if self._frame is not None:
                    raise EOFError("a frame without its end")
                return 0
            self._frame = self._frame or self._decompressor.decompressobj()
            self._ready, self._rest = self._frame.decompress(data), b""
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def marked_encoding(stream: io.BufferedReader) -> str | None:
    """Return the encoding that a byte order mark at the start of a stream names, if there is one.

    Decoding by it leaves the mark out.
    """
    head = stream.peek(4)[:4]
    return next((encoding for mark, encoding in _MARKS if head.startswith(mark)), None)


def pieces_of_text(stream: io.BufferedReader, where: str) -> Iterator[str]:
    """Yield a text in pieces, without its byte order mark and with line ends `"\\n"`.

    UTF-8, or what the mark says. A byte that is no UTF-8 becomes a surrogate of `STRAY`. Raises
    `NotTextError` for binary data, and where more than a hundredth is no UTF-8.
    """
    head = stream.peek(_SNIFFED)[:_SNIFFED]
    encoding = marked_encoding(stream)
    kind = next((kind for magic, kind in _REFUSED.items() if head.startswith(magic)), None)
    if head[257:262] == b"ustar":
        kind = "a tar archive"
    if kind is not None:
        raise NotTextError(f"{where}: expected text, got {kind}")
    if b"\0" in head and encoding in (None, "utf-8-sig"):
        raise NotTextError(f"{where}: expected text, got binary data (it has NUL bytes)")
    decoder = codecs.getincrementaldecoder(encoding or "utf-8")("surrogateescape")
    seen = stray = 0
    held = ""
    try:
        while True:
            data = stream.read(BLOCK)
            piece = held + decoder.decode(data, final=not data)
            seen += len(piece)
            stray += piece.count("\0") + sum(1 for _ in STRAY.finditer(piece))
            if stray > _MOST_STRAY * seen and (not data or seen >= BLOCK):
                raise NotTextError(
                    f"{where}: expected text in UTF-8 (or UTF-16 with its mark), got {stray} bytes "
                    f"of {seen} that are no UTF-8; save it as UTF-8"
                )
            # A carriage return may be one half of a line end.
            held = "\r" if data and piece.endswith("\r") else ""
            piece = piece[: len(piece) - len(held)].replace("\r\n", "\n")
            if piece:
                yield piece
            if not data:
                return
    except UnicodeDecodeError as error:
        raise NotTextError(f"{where}: expected {encoding} text, got {error.reason}") from None
