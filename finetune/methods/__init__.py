"""Methods are found by the name of their file."""

import importlib
import pkgutil
from typing import Any

from finetune.methods.base import Method, Parts
from recipes.errors import UserError
from recipes.load import validate


def names() -> list[str]:
    """All methods."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "base")


def build(name: str, settings: dict[str, Any], parts: Parts) -> Method:
    """The method in `finetune/methods/<name>.py`: its `Config` validates the settings, its `build` makes it."""
    if name not in names():
        raise UserError(f"method.name = {name!r} is unknown; there are: {', '.join(names())}")
    module = importlib.import_module(f"{__name__}.{name}")
    return module.build(validate(module.Config, settings, f"the method {name}"), parts)
