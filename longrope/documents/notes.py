"""What was left out while documents were read: counted, and named in one line."""

from __future__ import annotations

#: How many of each kind are named.
_NAMED = 3


class Notes:
    """Counts what was left out, by kind, with the names of the first few."""

    def __init__(self):
        self._counts: dict[str, int] = {}
        self._names: dict[str, list[str]] = {}
        self._remarks: list[str] = []

    def add(self, kind: str, name: str = "", count: int = 1) -> None:
        """Count something left out; `kind` is its plural, such as `"null rows"`."""
        self._counts[kind] = self._counts.get(kind, 0) + count
        names = self._names.setdefault(kind, [])
        if name and len(names) <= _NAMED:
            names.append(name)

    def remark(self, text: str) -> None:
        """Keep a remark about what was read."""
        self._remarks.append(text)

    def line(self) -> str:
        """Return all of it as one line without a full stop; empty where there is nothing."""
        parts = []
        for kind, count in self._counts.items():
            names = self._names[kind]
            named = ", ".join(names[:_NAMED]) + ", ..." * (len(names) > _NAMED)
            parts.append(f"{count} {_singular(kind, count)}" + f" ({named})" * bool(names))
        left_out = ["left out " + ", ".join(parts)] if parts else []
        return "; ".join(left_out + self._remarks)


def _singular(kind: str, count: int) -> str:
    if count != 1:
        return kind
    noun, *rest = kind.replace("links ", "link ").split(" that are ")
    return " that is ".join([noun.removesuffix("s"), *rest])
