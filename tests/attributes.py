"""Everything that hangs on the objects of a training, by name: tensors, numbers and texts, wherever they are kept.

R5 compares two of these: of a run that nobody stopped, and of one that went on from a state. What differs is neither in
the state nor follows from it. See tests/reliability/test_attributes.py.
"""

import ast
import collections
import enum
import hashlib
import inspect
import random
import textwrap
import types
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

OURS = ("pretrain", "finetune", "shards", "recipes")
OPENED = (*OURS, "torch.nn", "torch.optim", "timm", "accelerate")  # packages whose objects are looked into
PLAIN = (int, float, complex, str, bytes, bool, type(None), Path, enum.Enum, torch.device, torch.dtype)


def _of(kind: type, packages: tuple[str, ...]) -> bool:
    return any(kind.__module__ == package or kind.__module__.startswith(f"{package}.") for package in packages)


def _value(tensor: Tensor) -> tuple[str, tuple[int, ...], str]:
    raw = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return str(tensor.dtype), tuple(tensor.shape), hashlib.sha256(raw).hexdigest()


class Walk:
    """leaves: path -> value; tensors: path -> the tensor itself; owners: path -> the `Class.attribute`s on the way
    there; classes: those of ours that were met.

    What is met again is a leaf that names its first path, so it is seen who shares what.
    """

    def __init__(self, roots: Mapping[str, Any]):
        self.leaves: dict[str, Any] = {}
        self.tensors: dict[str, Tensor] = {}
        self.owners: dict[str, tuple[str, ...]] = {}
        self.classes: set[type] = set()
        self.first: dict[int, str] = {}
        self.alive: list[Any] = []  # so that no id is given twice
        for name, root in roots.items():
            self._walk(name, root, (name,))

    def _walk(self, path: str, thing: Any, owners: tuple[str, ...]) -> None:
        self.owners[path] = owners
        if isinstance(thing, PLAIN):
            self.leaves[path] = thing
        elif id(thing) in self.first:
            self.leaves[path] = f"the same as {self.first[id(thing)]}"
        else:
            self.first[id(thing)] = path
            self.alive.append(thing)
            self._open(path, thing, owners)

    def _open(self, path: str, thing: Any, owners: tuple[str, ...]) -> None:
        if isinstance(thing, Tensor):
            self.tensors[path], self.leaves[path] = thing, _value(thing)
            if thing.is_leaf:
                self._walk(f"{path}.grad", thing.grad, (*owners, "Tensor.grad"))
        elif isinstance(thing, np.ndarray | np.generic):
            self.leaves[path] = (str(thing.dtype), thing.shape, hashlib.sha256(thing.tobytes()).hexdigest())
        elif isinstance(thing, Mapping):
            self.leaves[path] = f"{type(thing).__name__} of {len(thing)}"
            for key, value in sorted(
                ((self._name(key), value) for key, value in thing.items()), key=lambda pair: pair[0]
            ):
                self._walk(f"{path}[{key}]", value, owners)
        elif isinstance(thing, list | tuple | collections.deque | set | frozenset):
            self.leaves[path] = f"{type(thing).__name__} of {len(thing)}"
            for place, part in enumerate(
                sorted(thing, key=self._name) if isinstance(thing, set | frozenset) else thing
            ):
                self._walk(f"{path}[{place}]", part, owners)
        else:
            kind = type(thing)
            self.leaves[path] = kind.__name__
            self.classes |= {kind} if _of(kind, OURS) else set()
            for name, part in self._attributes(thing):
                self._walk(f"{path}.{name}", part, (*owners, f"{kind.__name__}.{name}"))

    def _name(self, key: Any) -> str:
        """A key as part of a path; a tensor by where it was met first."""
        return str(key) if isinstance(key, PLAIN) else self.first.get(id(key), type(key).__name__)

    def _attributes(self, thing: Any) -> Iterator[tuple[str, Any]]:
        """Of an object of the opened packages, of a generator, a bound method; of others none."""
        found: dict[str, Any] = {}
        if isinstance(thing, types.GeneratorType):
            found = inspect.getgeneratorlocals(thing)
        elif isinstance(thing, types.MethodType):
            found = {"__self__": thing.__self__}
        elif not isinstance(thing, type | types.ModuleType | types.FunctionType) and _of(type(thing), OPENED):
            slots = [slot for kind in type(thing).__mro__ for slot in kind.__dict__.get("__slots__", ())]
            found = vars(thing) if hasattr(thing, "__dict__") else {}
            found = {**found, **{slot: getattr(thing, slot) for slot in slots if hasattr(thing, slot)}}
        yield from ((name, found[name]) for name in sorted(found))


def generators() -> dict[str, Any]:
    """The state of the process's own generators of random numbers, which nothing should use."""
    legacy = np.random.get_state()[1:3]  # noqa: NPY002
    return {"torch": torch.get_rng_state(), "numpy": legacy, "python": random.getstate()[1]}


def differences(one: Walk, other: Walk) -> set[str]:
    """Paths that are in one of them only, or have another value there."""
    nothing = object()
    paths = one.leaves.keys() | other.leaves.keys()
    return {path for path in paths if one.leaves.get(path, nothing) != other.leaves.get(path, nothing)}


def assigned_later(kind: type) -> set[str]:
    """`Class.x` where a method of the class has `self.x = ...`, so that x may change while a run goes on."""
    found: set[str] = set()
    for method in vars(kind).values():
        method = getattr(method, "fget", None) or getattr(method, "__func__", None) or method
        method = inspect.unwrap(method) if callable(method) else method
        # what a decorator made (dataclass, NamedTuple) has no source in the file
        if not isinstance(method, types.FunctionType) or method.__code__.co_filename != inspect.getsourcefile(kind):
            continue
        if method.__name__ in ("__init__", "__post_init__"):
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(method)))):
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AugAssign | ast.AnnAssign) else targets
            for part in (part for target in targets for part in ast.walk(target)):
                if isinstance(part, ast.Attribute) and isinstance(part.value, ast.Name) and part.value.id == "self":
                    found.add(f"{kind.__name__}.{part.attr}")
    return found
