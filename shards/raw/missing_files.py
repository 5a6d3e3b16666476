"""Images that a list names: do they exist, and do their names stay inside the data set's folder?"""

import os
from pathlib import Path
from typing import Literal

from recipes.errors import UserError


def inside(name: str, path: Path) -> str:
    """A relative path out of the list `path`, unchanged. UserError if it leads out of the folder."""
    if name.startswith(("/", "\\")) or name[1:2] == ":" or ".." in name.replace("\\", "/").split("/"):
        raise UserError(f"{path} names {name!r}, which leads out of the folder of the data set; mend the list")
    return name


class Presence:
    """Counts the files of a data set that are listed but not there."""

    def __init__(self, title: str, missing: Literal["error", "skip"] | None = None):
        """missing: the source's key of this name; None = the source has none, and missing files are refused."""
        self.title, self.missing = title, missing
        self.listed = self.lost = 0
        self.first = ""

    def check(self, path: str) -> bool:
        """Whether the file exists."""
        self.listed += 1
        if os.path.isfile(path):
            return True
        self.lost, self.first = self.lost + 1, self.first or path
        return False

    def finish(self) -> None:
        """UserError with the number of missing files and the first of them, also if all are missing."""
        if self.lost and (self.missing != "skip" or self.lost == self.listed):
            hint = ", or leave such images out with source.missing=skip" if self.missing == "error" else ""
            raise UserError(
                f"{self.lost:,} of the {self.listed:,} images that {self.title} lists are missing, the first is "
                f"{self.first}; unpack or fetch the set again{hint}"
            )
