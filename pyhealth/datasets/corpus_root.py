"""Where a corpus lies: a folder, or an address of an object store."""

from __future__ import annotations

import hashlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fsspec.core import url_to_fs
from fsspec.spec import AbstractFileSystem

from ..processors.wfdb_record import is_address

__all__ = ["CorpusRoot"]

#: What wfdb can read records from.
SCHEMES = ("s3", "gs", "az")


@dataclass(frozen=True)
class CorpusRoot:
    """The root of a corpus of records and tables.

    Args:
        address: what records' paths begin with: a folder, or an address that fsspec
            knows, such as "s3://bucket/ptbxl".

    Examples:
        >>> CorpusRoot.of("file:///data/ptbxl").address
        '/data/ptbxl'
        >>> CorpusRoot.of("ftp://host/ptbxl")
        Traceback (most recent call last):
        ValueError: ftp://host/ptbxl: expected a folder, or an address of s3, gs, az.
    """

    address: str

    @classmethod
    def of(cls, root: str | Path) -> CorpusRoot:
        """Return the root that a user means.

        Args:
            root: a folder, "file:///folder" or an address.

        Raises:
            ValueError: if it is an address of another kind.
        """
        text = os.fspath(root)
        if text.startswith("file://"):
            _, text = url_to_fs(text)
        if not is_address(text):
            return cls(str(Path(text).expanduser().resolve()))
        if text.split("://")[0] not in SCHEMES:
            raise ValueError(
                f"{text}: expected a folder, or an address of {', '.join(SCHEMES)}."
            )
        return cls(text.rstrip("/"))

    @property
    def is_remote(self) -> bool:
        """Whether it is an address and not a folder."""
        return is_address(self.address)

    def tables(self, names: Sequence[str], cache_dir: str | Path | None) -> Path:
        """Return a folder with the tables; those of an address are copied once.

        A table that changes at the address is copied to another folder.

        Args:
            names: of the tables; one that is missing stays missing.
            cache_dir: where copies are kept.

        Raises:
            ValueError: if there is an address and no cache_dir.
            ImportError: if fsspec lacks a package for it.
            OSError: if the address cannot be read.
        """
        if not self.is_remote:
            return Path(self.address)
        if cache_dir is None:
            raise ValueError(
                f"Pass cache_dir: it keeps copies of the tables of {self.address}."
            )
        found = {name: self._key(name) for name in names if self.exists(name)}
        text = repr((self.address, sorted(found.items())))
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        folder = Path(cache_dir).expanduser().resolve() / "tables" / digest
        folder.mkdir(parents=True, exist_ok=True)
        for name, key in found.items():
            self._copy(name, key, folder / name)
        return folder

    def exists(self, name: str) -> bool:
        """Return whether there is such a file or folder.

        Args:
            name: its path below the root.

        Raises:
            OSError: if the address cannot be read.
        """
        if not self.is_remote:
            return (Path(self.address) / name).exists()
        with self._errors_told():
            return self._filesystem.exists(f"{self.address}/{name}")

    def problem_with(self, name: str) -> str:
        """Return why a name is that of no file of this corpus; nothing if it is one.

        Args:
            name: its path below the root.

        Raises:
            OSError: if the address cannot be read.
        """
        if self.is_remote:
            return "" if name in self._files else f"{name} is missing"
        path = (Path(self.address) / name).resolve()
        if not path.is_relative_to(self.address):
            return f"{name} lies outside {self.address}"
        return "" if path.is_file() else f"{name} is missing"

    @cached_property
    def _files(self) -> frozenset[str]:
        """All files of an address: listing them once is quicker than many looks."""
        with self._errors_told():
            start = self._filesystem._strip_protocol(self.address)
            found = self._filesystem.find(start)
        return frozenset(name.removeprefix(f"{start}/") for name in found)

    @cached_property
    def _filesystem(self) -> AbstractFileSystem:
        # A list that is kept would hide what others change.
        return url_to_fs(self.address, use_listings_cache=False)[0]

    def _key(self, name: str) -> str:
        with self._errors_told():
            return self._filesystem.ukey(f"{self.address}/{name}")

    def _copy(self, name: str, key: str, target: Path) -> None:
        if target.exists():
            return
        with tempfile.TemporaryDirectory(dir=target.parent) as own:
            copy = Path(own) / name
            with self._errors_told():
                self._filesystem.get_file(f"{self.address}/{name}", str(copy))
            if self._key(name) != key:
                raise OSError(
                    f"{self.address}/{name} was changed while it was copied. Try again."
                )
            # PyHealth's cache key sees the time of the file; two copies must have one.
            os.utime(copy, (0, 0))
            copy.replace(target)

    @contextmanager
    def _errors_told(self) -> Iterator[None]:
        """Name the address where it cannot be read."""
        try:
            yield
        except ImportError as error:  # it says what to install
            raise ImportError(f"{self.address}: {error}") from error
        except Exception as error:  # each kind of store has its own
            raise OSError(
                f"{self.address} cannot be read ({type(error).__name__}: {error}). "
                "Check the address, the network and your credentials for it."
            ) from error
