"""Results of long benchmarks: one JSON object a line, never made twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

type Key = Mapping[str, str | int | float]


class Rows:
    """A file of rows that only grows and survives a kill.

    Args:
        path: the file; made with its folder if missing.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._rows = list(self._read())

    def __iter__(self) -> Iterator[dict]:
        return iter(self._rows)

    def __contains__(self, key: Key) -> bool:
        return any(key.items() <= row.items() for row in self._rows)

    def append(self, row: Mapping) -> None:
        """Write one row, to the disk before it returns."""
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self._rows.append(dict(row))

    def _read(self) -> Iterator[dict]:
        if not self.path.exists():
            return
        whole, text = [], self.path.read_text()
        for line in text.splitlines(keepends=True):
            if line.endswith("\n"):  # a kill can cut the last line short
                whole.append(line)
                yield json.loads(line)
        if text != "".join(whole):
            self.path.write_text("".join(whole))
