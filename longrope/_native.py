"""Load the compiled extension `longrope._C`, which registers the ops as `torch.ops.longrope.*`."""

import torch  # noqa: F401  (first: the extension links against the libraries that it loads)

try:
    from longrope import _C
except ImportError as error:
    raise ImportError(
        "longrope._C: the compiled extension is missing or was built for another torch; "
        f"run `pip install .` in the source folder ({error})"
    ) from error

__all__ = ["_C"]
