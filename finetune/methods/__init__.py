"""Methods are found by the name of their file."""

import importlib
import pkgutil
from types import ModuleType
from typing import Any

from finetune.methods.base import Method, Parts
from recipes.errors import UserError
from recipes.load import validate


def names() -> list[str]:
    """All methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def _module(name: Any) -> ModuleType:
    if name not in names():
        what = "is missing" if name is None else f"= {name!r} is unknown"
        raise UserError(f"method.name {what}; there are: {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


def reads_captions(section: dict[str, Any]) -> bool:
    """Whether the method that a recipe's `method` section names learns from captions: READS_CAPTIONS in its file."""
    return getattr(_module(section.get("name")), "READS_CAPTIONS", False)


def build(section: dict[str, Any], parts: Parts) -> Method:
    """The method that a recipe's `method` section names: `finetune/methods/<name>.py`.

    Its `Config` validates the other keys of the section, its `build` makes it.
    """
    settings = dict(section)
    name = settings.pop("name", None)
    module = _module(name)
    return module.build(validate(module.Config, settings, f"the method {name}"), parts)
