"""Locations of runs: local paths and URLs that fsspec can open (``s3://``, ``gs://``, ...)."""

from __future__ import annotations

import os
import posixpath
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import fsspec
from fsspec.implementations.local import LocalFileSystem

from ulysses_monitor.common.errors import InputError

__all__ = ["Location"]


@dataclass(frozen=True)
class Location:
    """A file or folder to read.

    Attributes:
        filesystem: the fsspec file system.
        path: the path in the file system.
    """

    filesystem: Any
    path: str

    @classmethod
    def of(cls, place: str | os.PathLike[str]) -> Location:
        """Returns the location of a path or URL.

        Raises:
            InputError: no installed package can open such a URL.
        """
        if "://" not in str(
            place
        ):  # a path, even if fsspec would read its characters in another way
            return cls(LocalFileSystem(), str(Path(place).absolute()))
        try:
            filesystem, path = fsspec.core.url_to_fs(os.fspath(place))
        except (ImportError, ValueError) as error:
            raise InputError(f"run {place}: cannot be opened ({error})") from None
        return cls(filesystem, path)

    def __truediv__(self, name: str) -> Location:
        return Location(self.filesystem, posixpath.join(self.path, name))

    def __str__(self) -> str:
        return str(self.local or self.filesystem.unstrip_protocol(self.path))

    @property
    def name(self) -> str:
        """The last part of the path."""
        return posixpath.basename(self.path.rstrip("/"))

    @property
    def local(self) -> Path | None:
        """The path if the location is on this machine, else None."""
        return Path(self.path) if isinstance(self.filesystem, LocalFileSystem) else None

    def is_file(self) -> bool:
        """Returns whether a file exists here."""
        return bool(self.filesystem.isfile(self.path))

    def children(self) -> list[str]:
        """Returns the sorted names in the folder, none if there is no folder."""
        try:
            self.filesystem.invalidate_cache(self.path)
            found = self.filesystem.ls(self.path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        names = {posixpath.basename(str(entry).rstrip("/")) for entry in found}
        return sorted(names - {""})

    def read(self) -> bytes:
        """Returns the content of the file.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        return bytes(self.filesystem.cat_file(self.path))

    def open(self) -> BinaryIO:
        """Opens the file for reading, with seek.

        Raises:
            FileNotFoundError: the file does not exist.
        """
        file: BinaryIO = self.filesystem.open(self.path, "rb")
        return file
