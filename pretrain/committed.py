"""Folders of one tensor file and one JSON file that are either whole on disk, or not there.

A folder is written under a hidden name: the tensors, then the JSON with the size and the CRC-32 of each file, each
flushed to the disk; then it gets its name. What a kill or a power cut leaves has a hidden name and is tidied up by the
next write. Whoever reads checks sizes and sums first, so a bit that changed later is found.
"""

import json
import os
import re
import shutil
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from recipes.errors import UserError, naming

FILES, SUM = "files", "crc32"  # keys of the JSON file: what lies beside it; the sum of the JSON itself
LONGEST = 16 << 20  # bytes of a JSON file that is read
BLOCK = 4 << 20  # bytes read at a time


class Damaged(UserError):
    """A folder is not what was written."""


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _hidden(folder: Path, kind: str) -> Path:
    return folder.with_name(f".{folder.name}.{kind}")


def checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with open(path, "rb", buffering=0) as file:
        while block := file.read(BLOCK):
            value = zlib.crc32(block, value)
    return value


def _sum_of(facts: Mapping[str, Any]) -> int:
    """CRC-32 of facts, however the JSON is laid out."""
    return zlib.crc32(json.dumps(facts, sort_keys=True, separators=(",", ":")).encode())


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    """`save_file`, whose own kind of error hides the number of the system's."""
    try:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        if not number:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    _fsync(path)


def commit(
    folder: Path, tensors: Mapping[str, Tensor], names: tuple[str, str], facts: Mapping[str, Any], sealed: bool
) -> None:
    """Write `folder`, replacing one of that name; whatever goes wrong, the one before is still there.

    names: of the tensor file and of the JSON file. facts: for the JSON file, JSON-able; "files" is added, and the
    "crc32" of all of it where nobody may change it later (sealed). OSError where the disk does not take it.
    """
    partial = _hidden(folder, "partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        if not folder.parent.is_dir():
            folder.parent.mkdir(parents=True)
            _fsync(folder.parent.parent)  # else a power cut takes the new folder with all that is in it
        partial.mkdir()
        path, manifest = (partial / name for name in names)
        _save_tensors(tensors, path)
        whole = json.loads(json.dumps(facts)) | {FILES: {path.name: {"size": path.stat().st_size, SUM: checksum(path)}}}
        with naming(manifest), open(manifest, "w", encoding="utf-8") as file:
            file.write(json.dumps(whole | ({SUM: _sum_of(whole)} if sealed else {}), indent=1) + "\n")
            file.flush()
            os.fsync(file.fileno())
        _fsync(partial)
        _put(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # only there when the lines above failed, on a full disk for example


def _put(partial: Path, folder: Path) -> None:
    """Give the folder its name. Between the two renames nothing has that name: `recover` undoes the first."""
    recover(folder)
    old = _hidden(folder, "old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    partial.rename(folder)
    _fsync(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def recover(folder: Path) -> None:
    """If a process died while it replaced the folder, put the one before back."""
    old = _hidden(folder, "old")
    if not folder.exists() and old.is_dir():
        old.rename(folder)


def discard(folders: Sequence[Path]) -> None:
    """Delete folders; a kill in between leaves no half one under its name."""
    for folder in folders:
        gone = _hidden(folder, "gone")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)


def tidy(parent: Path) -> None:
    """Delete what killed processes left in a folder that nobody else writes to."""
    for kind in ("partial", "gone"):
        for path in parent.glob(f".*.{kind}"):
            shutil.rmtree(path, ignore_errors=True)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; Damaged where there is none."""
    try:
        if path.stat().st_size > LONGEST:
            raise Damaged(f"{path} is longer than {LONGEST >> 20} MB: that is no description of a checkpoint")
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:  # JSON and UTF-8 errors are ValueErrors
        if isinstance(error, UserError):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise Damaged(f"{path} is damaged ({reason})") from error
    if not isinstance(found, dict):
        raise Damaged(f"{path} is damaged (it holds no JSON object)")
    return found


def read_facts(path: Path, sealed: bool) -> dict[str, Any]:
    """The facts in a JSON file that `commit` wrote, "files" among them.

    sealed: its own sum must be right; without, it may have been edited. Raises Damaged.
    """
    facts = read_object(path)
    told = facts.pop(SUM, None)
    if sealed and told != _sum_of(facts):
        raise Damaged(f"{path} is damaged (its checksum is wrong)")
    return facts


def check_files(folder: Path, facts: Mapping[str, Any]) -> None:
    """Raise Damaged unless each of facts["files"] lies in the folder with the size and the sum that stand there."""
    files = facts.get(FILES)
    if not isinstance(files, dict) or not files:
        raise Damaged(f"{folder} is damaged (its description names no files)")
    for name, told in files.items():
        if not isinstance(told, dict) or not re.fullmatch(r"\w[\w.-]*", name):
            raise Damaged(f"{folder} is damaged (its description names {name!r}, which is no file beside it)")
        path = folder / name
        try:
            size = path.stat().st_size
            if size != told.get("size"):
                raise Damaged(f"{path} is damaged ({size} bytes in place of {told.get('size')})")
            if checksum(path) != told.get(SUM):
                raise Damaged(f"{path} is damaged (its checksum is wrong)")
        except OSError as error:
            raise Damaged(f"{path} is damaged ({error.strerror})") from error


def check_tensors(path: Path) -> None:
    """Raise Damaged unless the file is as long as its own list of tensors says."""
    try:
        with safe_open(path, "pt"):
            pass
    except (OSError, SafetensorError) as error:
        raise Damaged(f"{path} is damaged ({error})") from error
