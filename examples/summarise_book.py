"""Summarise a book in one prompt, without cutting it into chapters first.

`python examples/summarise_book.py --model FOLDER --book FILE`

The whole text, as far as it fits, and the request are one prompt; the answer is greedy. Without
flags the packaged model reads Python source and continues a comment: it shows that everything runs,
not a summary.

What a real model needs: an instruction-tuned model of 7B parameters or more. A novel is 100k to
200k tokens: for an 8B Llama 12 to 25 GiB of keys and values and 4e15 to 1.4e16 FLOP, half a minute
on an H100; at a million tokens 122 GiB and 3e17 FLOP, for several GPUs and minutes.
"""

from __future__ import annotations

from pathlib import Path

import common

from longrope.demo import corpus

REQUEST = "Summarise the text above in ten sentences: who are its people, and what happens to them?"
REQUEST_FOR_SOURCE = "# In summary, this module "


def main(argv: list[str] | None = None) -> str:
    """Print and return the summary."""
    p = common.parser(__doc__)
    p.add_argument("--book", type=Path, help="a text file; default: Python source")
    p.add_argument("--request", help="what to ask for")
    p.add_argument("--new-tokens", type=int, default=256)
    args = p.parse_args(argv)
    reader = common.load(args)
    if args.book is None:
        source = corpus.documents("test", min_length=reader.window)[0].astype("uint8")
        book, request = bytes(source).decode(errors="replace"), REQUEST_FOR_SOURCE
    else:
        book, request = args.book.read_text(encoding="utf-8", errors="replace"), REQUEST
    ids = reader.fitted(book, args.request or request, args.new_tokens)
    print(reader.costs(len(ids)))
    summary = reader.complete(ids, args.new_tokens)
    print(summary)
    return summary


if __name__ == "__main__":
    common.run(main)
