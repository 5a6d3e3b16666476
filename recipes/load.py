"""Read a recipe: YAML -> validated, frozen config.

Unknown keys are refused with the nearest known name, values are checked against the type and range that the part
states, `section.key=value` overrides come from the command line, and the resolved recipe can be written back.

A recipe is text, numbers, lists and sections. Tags (`!!python/...`) and anchors (`&a`, `*a`) are refused: the first ask
for objects, and with the second a short file can stand for a tree that fits into no memory.
"""

import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from recipes.errors import UserError


class Section(BaseModel):
    """Base of every config. Frozen; keys that are not fields are refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)


S = TypeVar("S", bound=Section)
LONGEST = 1 << 19  # bytes of a recipe; its tree takes some 300 times as much memory
SHOWN = 200  # characters of a wrong value that are repeated in the error


def recipe_path(name: str) -> Path:
    """Path of a recipe that ships with the project, for example `pretrain/smoke.yaml`."""
    return Path(__file__).parent / name


class _Loader(yaml.SafeLoader):
    """YAML 1.1 reads `1e-6` as text and `on` as true; here numbers are numbers and only true/false are booleans."""

    def _refuse(self) -> None:
        what = f"{self.peek()!r} begins a tag or an anchor, which no recipe needs; put text in quotes"
        raise yaml.scanner.ScannerError(None, None, what, self.get_mark())

    fetch_tag = fetch_anchor = fetch_alias = _refuse


_Loader.yaml_implicit_resolvers = {
    first: [
        (tag, regexp)
        for tag, regexp in resolvers
        if not tag.endswith(("bool", "int", "float", "timestamp", "merge", "value"))
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_NUMBER = r"^[-+]?(?:[0-9]+\.[0-9]*(?:e[-+]?[0-9]+)?|\.[0-9]+(?:e[-+]?[0-9]+)?|[0-9]+e[-+]?[0-9]+|\.inf|\.nan)$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false|True|False)$"), list("tfTF"))
# not `1:30`, which YAML 1.1 takes for 90, nor numbers of thousands of digits, which Python cannot write again
_INTEGER = r"^[-+]?(?:0b[01_]{1,256}|0x[0-9a-fA-F_]{1,64}|0[0-7_]{0,64}|[1-9][0-9_]{0,255})$"
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(_INTEGER), list("-+0123456789"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(_NUMBER, re.IGNORECASE), list("-+0123456789."))


class _Dumper(yaml.SafeDumper):
    """Quotes text that this reader, or plain YAML 1.1, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {*yaml.SafeDumper.yaml_implicit_resolvers, *_Loader.yaml_implicit_resolvers}
}


def _parse(text: str, where: str) -> Any:
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 - a SafeLoader subclass, builds no objects
    except (yaml.YAMLError, ValueError) as error:  # an integer of 5,000 digits, or one of `0b_`, is a ValueError
        raise UserError(f"{where} is not valid YAML: {' '.join(str(error).split())[:400]}") from error
    except RecursionError as error:
        raise UserError(f"{where} is no recipe: lists or sections lie in one another without end") from error


def _text(path: Path) -> str:
    if path.stat().st_size > LONGEST:
        raise UserError(f"recipe {path} has {path.stat().st_size:,} bytes; no recipe is longer than {LONGEST:,}")
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"recipe {path} is no text in UTF-8 ({error.reason} at byte {error.start})") from error


def _override(tree: dict[str, Any], assignment: str) -> None:
    """Apply one `a.b=c` in place; c is read as YAML."""
    dotted, equals, text = assignment.partition("=")
    if not equals or not dotted:
        raise UserError(f"override {assignment!r} is not of the form section.key=value")
    *sections, key = dotted.split(".")
    node = tree
    for name in sections:
        child = node.setdefault(name, {})
        if not isinstance(child, dict):
            raise UserError(f"override {assignment!r}: {name!r} is a value, not a section")
        node = child
    node[key] = _parse(text, f"the value of override {assignment!r:.200}")


def _sections(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, typing.Annotated):
        return [found for part in typing.get_args(annotation) for found in _sections(part)]
    return []


def _known_keys(model: type[Section], location: tuple[Any, ...]) -> list[str]:
    """Names that are allowed beside the last element of a dotted location."""
    for name in location[:-1]:
        field = model.model_fields.get(str(name))
        inner = _sections(field.annotation) if field else []
        if not inner:
            return []
        model = inner[0]
    return list(model.model_fields)


def _shown(value: Any) -> str:
    """A value for an error; Python refuses to write an integer of more than 4,300 digits."""
    try:
        text = repr(value)
    except ValueError:
        return f"a {type(value).__name__} with an integer of thousands of digits"
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _sentence(model: type[Section], error: Any, where: str) -> str:
    dotted = ".".join(str(part) for part in error["loc"])[:SHOWN] or "the recipe"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, error["loc"])
        near = difflib.get_close_matches(str(error["loc"][-1])[:SHOWN], known, n=1, cutoff=0.0)
        hint = f"; the nearest known key is {near[0]!r}" if near else ""
        return f"{where}: unknown key {dotted!r}{hint}"
    if error["type"] == "missing":
        return f"{where}: key {dotted!r} is missing"
    return f"{where}: {dotted} = {_shown(error['input'])} is refused: {error['msg']}"


def validate(model: type[S], tree: Any, where: str) -> S:
    """Build a config from a plain tree; the first fault is raised as a sentence that names its key."""
    if not isinstance(tree, dict):
        raise UserError(f"{where} must hold sections and keys, not {type(tree).__name__}")
    try:
        return model.model_validate(tree)
    except ValidationError as error:
        faults = error.errors(include_url=False, include_context=False)
        # an unknown key explains a missing one (a typo), so it is told first
        faults.sort(key=lambda fault: fault["type"] != "extra_forbidden")
        raise UserError(_sentence(model, faults[0], where)) from error


def load(model: type[S], path: Path | str, overrides: list[str] | tuple[str, ...] = ()) -> S:
    """Read the recipe at `path` (or the shipped recipe of that name) and apply `section.key=value` overrides.

    Raises UserError naming the file and the key for a missing file, bad YAML, unknown keys and values out of range.
    """
    path = Path(path)
    if not path.is_file():
        shipped = recipe_path(str(path).removeprefix("recipes/"))
        if not shipped.is_file():
            raise UserError(f"recipe {path} does not exist; shipped recipes lie under {recipe_path('')}")
        path = shipped
    tree = _parse(_text(path), f"recipe {path}") or {}
    if not isinstance(tree, dict):
        raise UserError(f"recipe {path} must hold sections and keys, not {type(tree).__name__}")
    for assignment in overrides:
        _override(tree, assignment)
    return validate(model, tree, f"recipe {path}")


def dump(config: Section) -> str:
    """The resolved recipe as YAML: every key, defaults included."""
    return yaml.dump(config.model_dump(mode="json"), Dumper=_Dumper, sort_keys=False)
