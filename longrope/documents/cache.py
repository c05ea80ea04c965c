"""Token ids of files on disk, so that a text is tokenised once."""

from __future__ import annotations

import hashlib
import os
import shutil
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from longrope._files import new_folder
from longrope.documents.token_files import mapped_npy
from longrope.documents.tokens import Encoder

#: Of what is kept, and of how texts become tokens: a change of either makes older entries unread.
_VERSION = "1"
_IDS, _LENGTHS = "ids.npy", "lengths.npy"
#: Files that hold token ids.
_IDS_ALREADY = (".npy", ".bin")


class TokenCache:
    """A folder with the documents of files, by the content of the file and the tokenizer.

    An entry is a folder of two arrays: all ids one after another, which stay on the disk until they
    are used; and the lengths of the documents, and last a checksum (CRC-32) of the ids. Entries
    appear whole or not at all: several processes may share a cache. Deleting any of them is safe.

    Parameters
    ----------
    folder
        Made where it is not there.
    encode
        What makes the tokens. Nothing is kept where they are bytes, or of a tokenizer that does not
        say what it is (a function, a slow one).
    text_field
        Where texts stand in the files.
    """

    def __init__(self, folder: str | os.PathLike, encode: Encoder, text_field: str):
        self.folder = Path(folder)
        self._settings = None
        state = encode.state()
        if state is not None:
            said = "\0".join((_VERSION, text_field, state))
            self._settings = hashlib.sha256(said.encode(errors="surrogatepass")).digest()

    def entry(self, file: Path) -> Path | None:
        """Return where the documents of a file are or would be; None: they are not kept."""
        endings = "".join(file.suffixes).lower()
        if self._settings is None or endings.endswith(_IDS_ALREADY):
            return None
        digest = hashlib.sha256(self._settings + endings.encode(errors="surrogateescape"))
        with file.open("rb") as content:
            while block := content.read(1 << 20):
                digest.update(block)
        return self.folder / digest.hexdigest()[:32]

    def get(self, entry: Path) -> list[np.ndarray] | None:
        """Return the documents of an entry, mapped into memory; None where it is none."""
        try:
            ids = mapped_npy(entry / _IDS)
            *lengths, checksum = mapped_npy(entry / _LENGTHS).tolist()
        except (ValueError, TypeError):  # also of other shapes
            return None
        whole = ids.ndim == 1 and all(type(length) is int for length in lengths)
        if not whole or sum(lengths) != len(ids) or zlib.crc32(ids) != checksum:
            return None
        return [part.view(np.ndarray) for part in np.split(ids, np.cumsum(lengths)[:-1])]

    def put(self, entry: Path, documents: Sequence[np.ndarray]) -> None:
        """Keep the documents of a file; `ValueError` where the folder cannot be written."""
        if not sum(map(len, documents)):
            return
        if entry.exists():
            shutil.rmtree(entry, ignore_errors=True)  # damaged, or it would have been read
        try:
            with new_folder(entry) as folder:
                kind = max((d.dtype for d in documents), key=lambda dtype: dtype.itemsize)
                ids = np.lib.format.open_memmap(
                    folder / _IDS, "w+", kind, (sum(map(len, documents)),)
                )
                start = 0
                for document in documents:
                    ids[start : start + len(document)] = document
                    start += len(document)
                ids.flush()
                said = [*map(len, documents), zlib.crc32(ids)]
                np.save(folder / _LENGTHS, np.array(said, np.int64))
        except OSError as error:
            if entry.is_dir():  # another process was first
                return
            raise ValueError(
                f"cache: cannot write to {str(self.folder)!r} ({error.strerror or error})"
            ) from None
