"""Where images come from: one module a dataset, found by its name.

A source is a module here with `class Config(Section)` and `def records(config) -> Iterator[Record]`; to add one, add
the file.
"""

import difflib
import importlib
import pkgutil
from types import ModuleType

from recipes.errors import UserError


def names() -> list[str]:
    """All sources that there are."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__))


def find(name: str) -> ModuleType:
    """The module of a source. UserError with the nearest name if there is none."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
        raise UserError(f"there is no source {name!r}; the nearest is {near!r}, known are {', '.join(known)}")
    return importlib.import_module(f"shards.sources.{name}")
