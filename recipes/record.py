"""The run folder: which recipe ran, in which environment, and the numbers it gave.

    <out>/recipe.yaml        the resolved recipe: every key, defaults and overrides included
    <out>/environment.json   commit, versions, machine and command line of this launch, and of the earlier ones
    <out>/metrics.jsonl      one JSON object a line, in the order of the steps

A folder belongs to one recipe. Opening it again with the same recipe continues the run; with another one it is refused,
and while another process works there, too (locks.py). Only the main process writes.
"""

import json
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from recipes import locks
from recipes.errors import UserError
from recipes.lines import Lines
from recipes.load import Section, dump
from recipes.whole import plain, write_json, write_text

RECIPE, ENVIRONMENT, METRICS, LOCK = "recipe.yaml", "environment.json", "metrics.jsonl", ".lock"
# distributions whose version can change a result
VERSIONED = (
    *("personssl", "torch", "torchvision", "timm", "accelerate", "numpy", "pillow", "webdataset", "scikit-learn"),
    *("faiss-cpu", "faiss-gpu", "faiss-gpu-cu12", "einops", "safetensors", "pydantic"),
)


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


def differences(old: Any, new: Any, may_differ: Collection[str]) -> list[str]:
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
    changed = differences(old, yaml.safe_load(dump(resolved)), may_differ)
    if changed:
        more = f" (and {len(changed) - 3} more)" if len(changed) > 3 else ""
        raise UserError(
            f"{path} holds a run of another recipe: {'; '.join(changed[:3])}{more}. "
            "Choose another --out, or give the old values to continue that run"
        )


class RunFolder:
    """One run on disk. Made by `RunFolder.open`; on processes other than the main one every method does nothing."""

    def __init__(self, path: Path, main: bool):
        self.path, self.main, self.lines = path, main, Lines(path / METRICS)

    @staticmethod
    def open(
        out: Path,
        resolved: Section,
        main: bool,
        may_differ: Collection[str] = (),
        facts: Mapping[str, Any] | None = None,
    ) -> "RunFolder":
        """Create the folder, or continue the run that it holds; no other process can open it until `close`, or until
        this one ends.

        may_differ: dotted keys, or whole sections, that do not change the result (number of workers, for example) and
        so may differ when a run is continued. facts: what this module cannot know (device names, number of processes),
        for environment.json. Raises UserError when the folder holds something else than a run of this recipe, or
        another process works there, which is named.
        """
        folder = RunFolder(Path(out), main)
        if not main:
            return folder
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {out}: {error.strerror}; choose another --out") from error
        _refuse_other(folder.path, resolved, may_differ)  # before the lock, which would be a file in a foreign folder
        busy = f"another process is at work in the run folder {out}"
        locks.keep(folder.path / LOCK, busy, "wait for it, stop it, or choose another --out")
        _refuse_other(folder.path, resolved, may_differ)  # the owner before may have begun a run meanwhile
        write_text(folder.path / RECIPE, dump(resolved))
        folder._record_launch(facts or {})
        folder.lines.keep(math.inf)
        return folder

    def _record_launch(self, facts: Mapping[str, Any]) -> None:
        path, earlier = self.path / ENVIRONMENT, []
        try:
            previous = json.loads(path.read_bytes())
            earlier = [*previous.pop("earlier"), previous]
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):  # it is a record, no input
            aside = path.with_name(f"{path.name}.damaged")
            path.replace(aside)
            print(f"warning: {path} was damaged; it is {aside.name} now, and a new one begins", file=sys.stderr)
        write_json(path, {**environment(), **facts, "earlier": earlier})

    def log(self, values: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl; it is on disk when this returns, or waits for room on a full disk.

        `step` counts optimiser steps done.
        """
        if self.main:
            self.lines.add(json.dumps(plain(values), allow_nan=False).encode() + b"\n")

    def rewind(self, step: int) -> None:
        """After a resume from the checkpoint of `step`: drop the lines of later steps, which will be run again."""
        if self.main:
            self.lines.keep(step)

    def __enter__(self) -> "RunFolder":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        """`close`; where something else went wrong before, what that finds is a warning."""
        try:
            self.close()
        except UserError as told:
            if error is None:
                raise
            print(f"warning: {told}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """The run has ended: write the lines that wait, and let others open the folder. UserError on a full disk."""
        if self.main:
            self.lines.close()
            locks.drop(self.path / LOCK)
