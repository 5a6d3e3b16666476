"""Damage to a folder of files, as disks and people do it: one kind a function, each of which changes something."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from random import Random

BLOCK = 512  # bytes that a disk loses at once

Kind = Callable[[Path, Path, Random], str]  # folder, a sound one like it, chance -> what was done


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.is_file())


def _one(folder: Path, chance: Random) -> tuple[Path, bytearray]:
    path = chance.choice(_files(folder))
    return path, bytearray(path.read_bytes())


def cut(folder: Path, other: Path, chance: Random) -> str:
    """A file ends early."""
    path, data = _one(folder, chance)
    keep = chance.randrange(len(data))
    path.write_bytes(data[:keep])
    return f"{path.name} cut at {keep}"


def flip(folder: Path, other: Path, chance: Random) -> str:
    """One bit anywhere in one of the files."""
    path, data = _one(folder, chance)
    place, bit = chance.randrange(len(data)), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {place} flipped"


def flip_in_a_header(folder: Path, other: Path, chance: Random) -> str:
    """One bit at the beginning of a file, where safetensors has lengths, names, shapes and offsets."""
    path, data = _one(folder, chance)
    place, bit = chance.randrange(min(64, len(data))), chance.randrange(8)
    data[place] ^= 1 << bit
    path.write_bytes(data)
    return f"{path.name}: bit {bit} of byte {place} flipped"


def delete(folder: Path, other: Path, chance: Random) -> str:
    """A file is gone."""
    path = chance.choice(_files(folder))
    path.unlink()
    return f"{path.name} deleted"


def empty(folder: Path, other: Path, chance: Random) -> str:
    """A file has its name and no byte, as after a power cut."""
    path = chance.choice(_files(folder))
    path.write_bytes(b"")
    return f"{path.name} emptied"


def zero(folder: Path, other: Path, chance: Random) -> str:
    """A block of zeros in the place of data."""
    path, data = _one(folder, chance)
    places = [place for place in range(0, len(data), BLOCK) if any(data[place : place + BLOCK])]
    place = chance.choice(places)
    size = len(data[place : place + BLOCK])
    data[place : place + BLOCK] = bytes(size)
    path.write_bytes(data)
    return f"{path.name}: {size} bytes of zeros at {place}"


def grow(folder: Path, other: Path, chance: Random) -> str:
    """Something is written behind the end of a file."""
    path, data = _one(folder, chance)
    path.write_bytes(data + chance.randbytes(chance.randrange(1, 100)))
    return f"{path.name} grown"


def swap(folder: Path, other: Path, chance: Random) -> str:
    """The files have each other's content."""
    one, two = _files(folder)[:2]
    first, second = one.read_bytes(), two.read_bytes()
    one.write_bytes(second)
    two.write_bytes(first)
    return f"{one.name} and {two.name} swapped"


def exchange(folder: Path, other: Path, chance: Random) -> str:
    """A file of another one, sound in itself and of nearly the same size."""
    path = chance.choice(_files(folder))
    assert (other / path.name).read_bytes() != path.read_bytes()
    shutil.copyfile(other / path.name, path)
    return f"{path.name} of {other.name}"


def link(folder: Path, other: Path, chance: Random) -> str:
    """A file is a link to that of another one."""
    path = chance.choice(_files(folder))
    path.unlink()
    path.symlink_to(os.path.relpath(other / path.name, folder))
    return f"{path.name} linked to that of {other.name}"


def obstruct(folder: Path, other: Path, chance: Random) -> str:
    """A folder has the name of a file."""
    path = chance.choice(_files(folder))
    path.unlink()
    path.mkdir()
    return f"{path.name} is a folder"


def clear(folder: Path, other: Path, chance: Random) -> str:
    """Nothing is left in the folder."""
    shutil.rmtree(folder)
    folder.mkdir()
    return "nothing left"


def replace(folder: Path, other: Path, chance: Random) -> str:
    """A file in the place of the folder."""
    shutil.rmtree(folder)
    folder.write_bytes(chance.randbytes(10))
    return "a file in its place"


def add(folder: Path, other: Path, chance: Random) -> str:
    """A file that does not belong there; what does is sound."""
    name = chance.choice(["notes.txt", "tensors (copy).safetensors", "state.json", ".DS_Store"])
    (folder / name).write_bytes(chance.randbytes(50))
    return f"{name} added"


HARMLESS: tuple[Kind, ...] = (add,)
KINDS: tuple[Kind, ...] = (
    *(cut, flip, flip_in_a_header, delete, empty, zero, grow, swap, exchange, link, obstruct, clear, replace),
    *HARMLESS,
)
