"""The run folder: which recipe ran, in which environment, and the numbers it gave.

    <out>/recipe.yaml        the resolved recipe: every key, defaults and overrides included
    <out>/environment.json   commit, versions, machine and command line of this launch, and of the earlier ones
    <out>/metrics.jsonl      one JSON object a line, in the order of the steps

A folder belongs to one recipe. Opening it again with the same recipe continues the run; with another one it is refused.
Only the main process writes.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from recipes.errors import UserError
from recipes.load import Section, dump

RECIPE, ENVIRONMENT, METRICS = "recipe.yaml", "environment.json", "metrics.jsonl"
# distributions whose version can change a result
VERSIONED = (
    *("personssl", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "webdataset", "scikit-learn"),
    *("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "einops", "safetensors", "pydantic"),
)


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader, also one after a power cut, sees all of it or the previous one."""
    path = Path(path)
    draft = path.with_name(f".{path.name}.tmp")
    try:
        with open(draft, "w", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)  # only there when the lines above failed, for example on a full disk
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself lives in the folder
    finally:
        os.close(folder)


def write_json(path: Path, value: Any) -> None:
    """`write_text` of a value as indented JSON; numpy and torch scalars become numbers, nan and inf become null."""
    write_text(path, json.dumps(_plain(value), indent=2, allow_nan=False) + "\n")


def _plain(value: Any) -> Any:
    """The value in JSON's own types. JSON has no nan or inf, so they become None."""
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if value is None or isinstance(value, str | int):
        return value
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays
        return _plain(value.tolist())
    raise TypeError(f"{type(value).__name__} cannot be recorded as JSON")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    """Output of git in the folder of this source tree; None without git or outside of a checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():  # an installed copy may lie inside a checkout of something else
        return None
    try:
        done = subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def environment() -> dict[str, Any]:
    """What one needs beside the recipe to run the same thing again."""
    changes = _git("status", "--porcelain", "--untracked-files=no")
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "commit": _git("rev-parse", "HEAD"),
        "uncommitted_changes": None if changes is None else bool(changes),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "versions": {name: version for name in VERSIONED if (version := _version(name))},
    }


def _leaves(tree: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}; lists are leaves."""
    if not isinstance(tree, dict) or not tree:
        return {prefix: tree}
    return {
        dotted: leaf
        for key, inner in tree.items()
        for dotted, leaf in _leaves(inner, f"{prefix}.{key}" if prefix else str(key)).items()
    }


def _differences(old: Any, new: Any, may_differ: Collection[str]) -> list[str]:
    """Sentences `a.b was 1 and is now 2`, in the order of the new recipe."""
    before, after = _leaves(old), _leaves(new)
    missing = object()
    return [
        f"{key} was {'not there' if was is missing else repr(was)} "
        f"and is now {'not there' if now is missing else repr(now)}"
        for key in dict.fromkeys([*after, *before])
        if key not in may_differ
        and key.partition(".")[0] not in may_differ
        # repr, because nan is not equal to itself
        and repr(was := before.get(key, missing)) != repr(now := after.get(key, missing))
    ]


def _refuse_other(path: Path, resolved: Section, may_differ: Collection[str]) -> None:
    """Raise unless the folder is empty or holds a run of this recipe."""
    if not (path / RECIPE).is_file():
        # hidden files are drafts of a killed run or belong to the file system
        foreign = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
        if foreign:
            raise UserError(f"{path} holds {foreign[0]!r} but no {RECIPE}: it is no run folder; choose another --out")
        return
    try:
        old = yaml.safe_load((path / RECIPE).read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path / RECIPE} cannot be read as YAML; mend it or choose another --out") from error
    changed = _differences(old, yaml.safe_load(dump(resolved)), may_differ)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{path} holds a run of another recipe: {'; '.join(changed[:3])}{more}. "
            "Choose another --out, or give the old values to continue that run"
        )


@dataclass(frozen=True)
class RunFolder:
    """One run on disk. Made by `RunFolder.open`; on processes other than the main one every method does nothing."""

    path: Path
    main: bool

    @staticmethod
    def open(
        out: Path,
        resolved: Section,
        main: bool,
        may_differ: Collection[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> "RunFolder":
        """Create the folder, or continue the run that it holds.

        may_differ: dotted keys, or whole sections, that do not change the result (number of workers, for example) and
        so may differ when a run is continued. facts: what this module cannot know (device names, number of processes),
        for environment.json. Raises UserError when the folder holds something else than a run of this recipe.
        """
        folder = RunFolder(Path(out), main)
        if not main:
            return folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {out}: {error.strerror}; choose another --out") from error
        _refuse_other(folder.path, resolved, may_differ)
        write_text(folder.path / RECIPE, dump(resolved))
        folder._record_launch(facts or {})
        folder._keep(math.inf)
        return folder

    def _record_launch(self, facts: Mapping[str, Any]) -> None:
        path, earlier = self.path / ENVIRONMENT, []
        if path.is_file():
            previous = json.loads(path.read_text(encoding="utf-8"))
            earlier = [*previous.pop("earlier"), previous]
        write_json(path, {**environment(), **facts, "earlier": earlier})

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is on disk when this returns. `step` counts optimiser steps done."""
        if not self.main:
            return
        line = json.dumps(_plain(values), allow_nan=False) + "\n"
        with open(self.path / METRICS, "a", encoding="utf-8", newline="\n") as file:
            file.write(line)
            file.flush()
            os.fsync(file.fileno())

    def rewind(self, step: int) -> None:
        """After a resume from the checkpoint of `step`: drop the lines of later steps, which will be run again."""
        if self.main:
            self._keep(step)

    def _keep(self, last: float) -> None:
        """Keep the lines with step <= last and those without a step; a half-written last line goes."""
        path = self.path / METRICS
        if not path.is_file():
            return
        text = path.read_bytes().decode("utf-8", errors="replace")
        kept = []
        for number, line in enumerate(text.splitlines(keepends=True), start=1):
            if not line.endswith("\n"):
                break  # the process was killed while writing it
            try:
                step = json.loads(line).get("step")
            except (ValueError, AttributeError) as error:
                raise UserError(f"{path} line {number} is not a JSON object; mend or remove that line") from error
            if step is None or step <= last:
                kept.append(line)
        if "".join(kept) != text:
            write_text(path, "".join(kept))
