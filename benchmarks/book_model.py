"""Train the second model of search_comparison.py: bytes of long books, grouped-query attention.

`python benchmarks/book_model.py --books FOLDER --out MODEL`: a byte-level Llama of 3.2 M parameters
with half as many heads of keys as of queries and a context of 256, by the training of
`longrope.demo.train`; `--qk-norm`: a Qwen3, which normalises queries and keys. Of the folder's text
files, in the order of their names, every sixth is held out for tests and the one after it for
searches; the folder needs at least 6 files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from longrope import load_data
from longrope.demo import train

#: A file's role by its place among the files of the folder, modulo 6.
ROLES = {0: "test", 1: "search"}


def documents(folder: Path, role: str, tokenizer: Any = None) -> list[np.ndarray]:
    """Return the files of one role, `"train"`, `"search"` or `"test"`, as int64 bytes or tokens."""
    books = [book.astype(np.int64) for book in load_data(folder, tokenizer)]
    if len(books) < 6:
        raise SystemExit(f"--books: expected at least 6 text files, got {len(books)} in {folder}")
    return [book for index, book in enumerate(books) if ROLES.get(index % 6, "train") == role]


def main() -> None:
    """Train and save."""
    parser = train.parser(__doc__.splitlines()[0], steps=600)
    parser.add_argument("--books", type=Path, required=True, help="folder of text files")
    parser.add_argument("--qk-norm", action="store_true", help="a Qwen3 in place of a Llama")
    args = parser.parse_args()
    from transformers import set_seed

    set_seed(args.seed)
    model = train.build_model("qwen3" if args.qk_norm else "llama", num_key_value_heads=2)
    train.train(model, documents(args.books, "train"), args.out, args)


if __name__ == "__main__":
    main()
