"""The commands of the documentation, found as a user would type them: a shell reads the blocks, programs write down
their arguments instead of running.

    python tests/docs_commands.py            every command, with its page and line

A block marked `sh` is one script for bash, with its variables, continued lines, loops and comments. The only programs
that it finds are those of PROGRAMS, so one that the tests do not know makes it fail. A command inside a sentence counts
as well when it names what it runs: `python pretrain/convert.py FILE`, not `torchrun`.
"""

import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
PROGRAMS = ("python", "python3", "pip", "accelerate", "torchrun", "srun", "scontrol", "make", "hf", "mkdocs",
            "tensorboard", "ruff", "nvidia-smi")  # fmt: skip
REAL = ("bash", "head")  # of the system: what job scripts need besides
VARIABLES = ("ACCELERATE_USE_CPU", "OMP_NUM_THREADS")  # in front of a command; others change nothing of what is run
# in a sentence or a table: a program together with what it runs
INLINE = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:\.venv/bin/)?(?:python3? (?:-m )?[\w/.]+(?:\.py)?|accelerate launch \S.*\.py|"
    r"torchrun \S.*\.py|make [a-z-]+|ruff [a-z]+|pip install|hf [a-z]+|tensorboard --|mkdocs [a-z]+)(?: .*)?"
)
SHIM = """#!/bin/bash
printf '%s\\0' "$LINE" "${ACCELERATE_USE_CPU-}" "${OMP_NUM_THREADS-}" "$#" "${0##*/}" "$@" >> "$WRITTEN"
case "${0##*/}" in
    scontrol) echo node-1 ;;
    srun) while [[ $1 == --* ]]; do shift; done; "$@" ;;
esac
"""
# rm has nothing to remove here. LINE: of the script, for the programs. A variable that Slurm or the reader would set
# makes the block fail unless it stands here.
BEFORE = (
    "set -u; rm() { :; }; export LINE SLURM_JOB_NODELIST=node-[1-8] SLURM_NNODES=8 SLURM_NODEID=0 SLURM_JOB_ID=7; "
    "trap 'LINE=$LINENO' DEBUG"
)


class Block(NamedTuple):
    """A fenced block of a page; line: of its first line of content."""

    page: str
    line: int
    language: str
    text: str


class Command(NamedTuple):
    """What a user runs. words: program and arguments as the shell splits them; variables: those of VARIABLES."""

    page: str
    line: int
    words: tuple[str, ...]
    variables: tuple[tuple[str, str], ...] = ()

    @property
    def told(self) -> str:
        """On one line."""
        return " ".join([*(f"{name}={value}" for name, value in self.variables), *self.words])


def pages() -> list[str]:
    """The pages with commands, relative to the root."""
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [path.relative_to(ROOT).as_posix() for path in found]


@cache
def text_of(page: str) -> str:
    """A page."""
    return (ROOT / page).read_text(encoding="utf-8")


def blocks(page: str) -> list[Block]:
    """The fenced blocks of a page."""
    found, lines, start = [], text_of(page).split("\n"), None
    for number, line in enumerate(lines, start=1):
        if not line.lstrip().startswith("```"):
            continue
        if start is None:
            start = number
        else:
            language = lines[start - 1].strip("` ")
            found.append(Block(page, start + 1, language, "\n".join(lines[start : number - 1])))
            start = None
    assert start is None, f"{page}:{start}: a block without an end"
    return found


def prose(page: str) -> list[str]:
    """The lines of a page, those of blocks empty."""
    lines = text_of(page).split("\n")
    for block in blocks(page):
        size = block.text.count("\n") + 1 if block.text else 0
        for number in range(block.line - 1, block.line + size + 1):
            lines[number - 1] = ""
    return lines


def python(page: str) -> list[str]:
    """The pieces of Python of a page, which follow on each other."""
    return [block.text for block in blocks(page) if block.language == "python"]


class Shell:
    """A folder in which bash finds programs that write down how they were called."""

    def __init__(self, folder: Path):
        self.folder, self.written = folder, folder / "written"
        programs = folder / ".venv" / "bin"
        programs.mkdir(parents=True)
        (programs / "activate").touch()
        (folder / "runs" / "vits16").mkdir(parents=True)
        (folder / "runs" / "vits16" / "stopped.json").touch()  # what a job script looks for
        (programs / PROGRAMS[0]).write_text(SHIM)
        (programs / PROGRAMS[0]).chmod(0o755)
        for name in PROGRAMS[1:]:
            (programs / name).symlink_to(PROGRAMS[0])
        for name in REAL:
            (programs / name).symlink_to(shutil.which(name))

    def read(self, page: str) -> list[Command]:
        """The commands of a page, typed into one shell. AssertionError where bash does not like it."""
        self.written.write_bytes(b"")
        script = self.folder / "script"
        script.write_text("\n".join([BEFORE, *typed(page), ":"]))
        environment = {"PATH": str(self.folder / ".venv" / "bin"), "WRITTEN": str(self.written)}
        told = subprocess.run(
            ["/bin/bash", "-e", str(script)],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=20,
        )
        assert told.returncode == 0, f"{page}, one line further up than bash says: {told.stderr}"
        return list(self._commands(page, self.written.read_bytes().decode().split("\0")[:-1]))

    @staticmethod
    def _commands(page: str, fields: list[str]) -> Iterator[Command]:
        while fields:
            line, *values, count = fields[:4]
            end = 5 + int(count)
            given = tuple((name, value) for name, value in zip(VARIABLES, values, strict=True) if value)
            yield Command(page, int(line) - 1, tuple(fields[4:end]), given)
            fields = fields[end:]


def typed(page: str) -> list[str]:
    """The lines of a page, those left empty that nobody types."""
    lines = ["; ".join(filter(INLINE.fullmatch, re.findall(r"`([^`]+)`", line))) for line in prose(page)]
    for block in blocks(page):
        if block.language == "sh":
            own = block.text.split("\n")
            lines[block.line - 1 : block.line - 1 + len(own)] = own
    return lines


@cache
def commands() -> tuple[Command, ...]:
    """Every command of every page, in their order."""
    with tempfile.TemporaryDirectory() as folder:
        shell = Shell(Path(folder))
        return tuple(command for page in pages() for command in shell.read(page))


def distinct() -> dict[Command, list[str]]:
    """Each command once, with the places where it stands."""
    first: dict[tuple, Command] = {}
    places: dict[Command, list[str]] = {}
    for command in commands():
        own = first.setdefault((command.words, command.variables), command)
        places.setdefault(own, []).append(f"{command.page}:{command.line}")
    return places


def enter(folder: str) -> None:
    """Be in the folder of a command; called in its process before its script (tests/forked.py)."""
    os.chdir(folder)


if __name__ == "__main__":
    for each in commands():
        print(f"{each.page}:{each.line}: {each.told}")
