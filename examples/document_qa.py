"""Question answering over a document that is longer than the model's own window.

`python examples/document_qa.py --model FOLDER --document FILE --question "Who ...?"`

The whole document and the question are one prompt; the answer is generated greedily. Without flags
the packaged model reads Python source with a line `MAGIC_NUMBER = ...` near its beginning, and is
asked to continue `MAGIC_NUMBER = ` at the end; a model of 3.5 M parameters rarely can.

What a real model needs: an instruction-tuned model, and factors that keep retrieval alive: searched
ones rather than YaRN's (`longrope search`), and a look at the distance (`longrope passkey`).
For an 8B Llama a document of 128k tokens, a novel, takes 16 GiB of keys and values and 7e15 FLOP:
some ten seconds on an H100, hours on a CPU. Each token of the answer reads the cache.
"""

from __future__ import annotations

from pathlib import Path

import common

from longrope.demo import corpus

NUMBER = "48151623"
QUESTION = "MAGIC_NUMBER = "


def default_document(tokens: int) -> str:
    """Return Python source of so many bytes, with the line to find behind its first tenth."""
    source = bytes(corpus.documents("test", min_length=tokens)[0][:tokens].astype("uint8"))
    head, tail = source[: tokens // 10], source[tokens // 10 :]
    line = f"\n{QUESTION}{NUMBER}\n".encode()
    return (head + line + tail)[:tokens].decode(errors="replace")


def main(argv: list[str] | None = None) -> str:
    """Print and return the answer."""
    p = common.parser(__doc__)
    p.add_argument("--document", type=Path, help="a text file; default: Python source")
    p.add_argument("--question", help="what to ask about the document")
    p.add_argument("--answer", help="a text that a right answer contains")
    p.add_argument("--new-tokens", type=int, default=32)
    args = p.parse_args(argv)
    reader = common.load(args)
    question, answer = args.question or QUESTION, args.answer
    if args.document is None:
        document = default_document(reader.window - args.new_tokens - 64)
        answer = answer or (NUMBER if args.question is None else None)
    else:
        document = args.document.read_text(encoding="utf-8", errors="replace")
    ids = reader.fitted(document, question, args.new_tokens)
    print(reader.costs(len(ids)))
    found = reader.complete(ids, args.new_tokens)
    print(f"{question}\n{found}" if reader.chats else f"{question}{found}")
    if answer is not None:
        print("right" if answer in found else f"wrong: expected {answer}")
    return found


if __name__ == "__main__":
    common.run(main)
