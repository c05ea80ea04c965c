"""Documents: 1-D sequences of token ids, and how to read them from files.

`load` puts together what the other modules do: `paths` finds the files of a folder, `streams` opens
and decodes them, `readers`, `tables` and `token_files` know their formats, `tokens` turns text into
token ids, `notes` counts what was left out, and `checks` holds documents to what a measurement
needs.
"""

from longrope.documents.checks import Documents, as_documents, long_enough
from longrope.documents.load import load_data, read_documents

__all__ = ["Documents", "as_documents", "load_data", "long_enough", "read_documents"]
