"""Damaged and hostile files by the thousand: valid ones changed byte by byte and value by value, and a count of what a
reader makes of them."""

import contextlib
import copy
import io
import json
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from recipes.errors import UserError
from shards.schema import BadSample

# numbers at which fields of a file overflow, and bytes that mean something in most formats
EDGES = (0, 1, -1, 127, 128, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**63, 2**64 - 1)
NUMBERS = [
    value.to_bytes(size, order, signed=value < 0)
    for value in EDGES
    for size in (1, 2, 4, 8)
    for order in ("little", "big")
    if -(2 ** (8 * size - 1)) <= value < 2 ** (8 * size)
]
TEXTS = [b"../../x", b"/etc/passwd", b"[" * 64, b"{" * 64, b"\xc3\x28", b"NaN", b"1e999"]
TOKENS = [*NUMBERS, b"\0" * 8, b"\xff" * 8, *TEXTS]
DEEP = "lists in lists"  # stands for 3,000 of them: no Python program likes to print those
# what stands in a tree of JSON or YAML where something else was expected
ODD = [
    *(None, True, -1, 0, 1, 2**31, 2**63, 10**30, 1e308, float("nan"), float("inf"), "", "x", "../../x", "/etc/passwd"),
    *(
        "file:///etc/passwd",
        "\0",
        "\ud800",
        "a" * 5000,
        [],
        [[]],
        {},
        {"a": {}},
        {"": ""},
        [None],
        [1, 2],
        [-1, 0],
        DEEP,
    ),
]


Reader = Callable[[Any], object]


@dataclass
class Counts:
    """What became of the inputs; those that raised anything else end the run."""

    tried: int = 0
    refused: int = 0  # UserError


def fuzz(inputs: st.SearchStrategy, read: Callable[[Any], object], times: int) -> Counts:
    """Read `times` inputs, the same ones each time; everything but a UserError fails, with the smallest such input."""
    counts = Counts()

    @settings(
        max_examples=times,
        derandomize=True,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
    )
    @given(inputs)
    def attempt(given_: Any) -> None:
        counts.tried += 1
        try:
            read(given_)
        except UserError:
            counts.refused += 1

    attempt()
    return counts


def filed(path: Path, read: Reader) -> Reader:
    """Reads bytes from a file."""

    def through(data: bytes) -> object:
        path.write_bytes(data)
        return read(path)

    return through


def passed_over(read: Callable[[], object]) -> None:
    """A sample that a loader would replace by another."""
    with contextlib.suppress(BadSample):
        read()


def fuzz_all(
    name: str, parts: list[tuple[st.SearchStrategy, Reader]], times: int, figures: Callable[..., None]
) -> None:
    """`times` inputs shared out among the kinds of inputs of a reader, and the figures of R17.

    parts: inputs and reader of each kind; the first kind makes up for others of which there are fewer.
    """
    found: list[Counts] = []
    for place, (inputs, read) in reversed([*enumerate(parts)]):
        found.append(fuzz(inputs, read, (times - sum(counts.tried for counts in found)) // (place + 1)))
    tried, refused = (sum(getattr(counts, what) for counts in found) for what in ("tried", "refused"))
    assert tried >= times
    assert refused, "not one input was damaged"
    note = f"{refused:,} refused with a sentence, {tried - refused:,} read, 0 crashes"
    figures("R17", injected=f"fuzzing: {name}", times=tried, lost=0, wrong=0, note=note)


@st.composite
def changed_bytes(draw: st.DrawFn, bases: list[bytes], tokens: list[bytes] = TOKENS) -> bytes:
    """One of the files with one to four changes: bits, bytes, pieces, or a token in the place of something."""
    data = bytearray(draw(st.sampled_from(bases)))
    for _ in range(draw(st.integers(1, 4))):
        # headers stand in front, directories at the end
        span = draw(st.sampled_from(["front", "end", "anywhere"]))
        low, high = {"front": (0, min(512, len(data))), "end": (max(0, len(data) - 512), len(data))}.get(
            span, (0, len(data))
        )
        at = draw(st.integers(low, high))
        match draw(st.sampled_from(["flip", "byte", "cut", "remove", "insert", "over", "double"])):
            case "flip" if at < len(data):
                data[at] ^= 1 << draw(st.integers(0, 7))
            case "byte" if at < len(data):
                data[at] = draw(st.integers(0, 255))
            case "cut":
                del data[at:]
            case "remove":
                del data[at : at + draw(st.integers(1, 64))]
            case "insert":
                data[at:at] = draw(st.sampled_from(tokens))
            case "over":
                token = draw(st.sampled_from(tokens))
                data[at : at + len(token)] = token
            case "double":
                data[at:at] = data[at : at + draw(st.integers(1, 256))]
    return bytes(data)


def _places(tree: Any, path: tuple = ()) -> Iterator[tuple]:
    """The paths to all values of a tree."""
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from _places(value, (*path, key))


@st.composite
def changed_trees(draw: st.DrawFn, base: Any, odd: list[Any] = ODD) -> Any:
    """A tree of dicts and lists with one to three changes: a value in the place of another, one less, one more."""
    tree = copy.deepcopy(base)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(tree))
        if not places or draw(st.integers(0, 40)) == 0:
            return copy.deepcopy(draw(st.sampled_from(odd)))
        *path, last = draw(st.sampled_from(places))
        node = tree
        for key in path:
            node = node[key]
        match draw(st.sampled_from(["put", "put", "put", "drop", "add"])):
            case "put":
                node[last] = copy.deepcopy(draw(st.sampled_from(odd)))
            case "drop":
                del node[last]
            case "add" if isinstance(node, dict):
                node[draw(st.sampled_from(["x", "", "../x", "\0", "a" * 300]))] = draw(st.sampled_from(odd[:10]))
            case "add":
                node.insert(last, copy.deepcopy(node[last]))
    return tree


def as_json(tree: Any) -> bytes:
    """A tree as JSON, with the NaN and the lone surrogates that Python writes; it is valid YAML too, but for these."""
    return json.dumps(tree).replace(json.dumps(DEEP), "[" * 3000 + "]" * 3000).encode()


def npy(array: np.ndarray) -> bytes:
    """An array as a .npy file."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def npy_claiming(descr: Any, shape: Any, data: bytes = b"", order: bool = False) -> bytes:
    """A .npy file whose header claims what it likes."""
    header = repr({"descr": descr, "fortran_order": order, "shape": shape}).encode() + b"\n"
    return b"\x93NUMPY\x02\x00" + len(header).to_bytes(4, "little") + header + data


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> bytes:
    """A zip file."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return buffer.getvalue()
