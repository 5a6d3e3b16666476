"""Every command and every piece of Python in README.md and docs/ is tried, in a folder with tiny sets under the names
that the pages use: docs_commands.py finds them, docs_ways.py says how each is tried, docs_folder.py makes the folder.
"""

import configparser
import os
import re
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import docs_commands
import docs_folder
import docs_ways
import pytest
from docs_commands import ROOT, Command
from docs_ways import Way

BIN = Path(sys.executable).parent
COMMANDS = docs_commands.distinct()
PRELUDES = {  # what a page leaves to its reader
    "docs/search.md": "import numpy as np\nframe = np.zeros((200, 300, 3), np.uint8)\nboxes = [[10, 20, 60, 150]]\n"
    "first_track, second_track = ['a.jpg', 'b.jpg'], ['c.jpg']\n",
    "docs/evaluation.md": "import os; os.chdir('runs/market')\n",
    "CONTRIBUTING.md": "from collections.abc import Iterator\nfrom pathlib import Path\n"
    "from recipes.load import Section\nfrom shards.published import Published\nfrom shards.schema import Record\n",
}
SMALLER = {"docs/evaluation.md": ("far=1e-3", "far=0.1")}  # the tiny set has few pairs
DONE: set[tuple[str, ...]] = set()  # what scripts were run with
TRIED: dict[str, str] = {}  # the kind of way of each command that was tried in this run


@pytest.fixture(scope="module")
def kept(tmp_path_factory, forks):
    """The prepared folder; told at the end: how many commands were tried, and how."""
    return docs_folder.Kept(tmp_path_factory.mktemp("docs"), forks)


@pytest.fixture(scope="module", autouse=True)
def summary(request):
    """One line on the screen after the tests of the commands."""
    yield
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(TRIED.values()).items()))
    if reporter := request.config.pluginmanager.get_plugin("terminalreporter"):
        reporter.write_line(f"\ncommands of the documentation: {len(TRIED)} of {len(COMMANDS)} tried ({kinds})")


def refuse_nothing(words: list[str], pytestconfig: pytest.Config) -> None:
    """The parser of another program takes the words."""
    program, *rest = words
    if program == "pip":
        from pip._internal.commands import create_command

        options, targets = create_command(rest[0]).parse_args(rest[1:])
        named = configparser.ConfigParser()
        named.read(ROOT / "setup.cfg")
        for target in (*getattr(options, "editables", []), *targets):
            extras = re.findall(r"\[(.*)\]", target)
            assert set(extras) <= set(named["options.extras_require"]), f"{target}: setup.cfg has no such extra"
    elif program == "hf":
        told = subprocess.run([str(BIN / "hf"), rest[0], "--help"], capture_output=True, text=True, timeout=60)
        assert told.returncode == 0, told.stderr
        assert re.match(r"\s*Usage: hf upload \[OPTIONS\] REPO_ID \[LOCAL_PATH\]", told.stdout)
        assert len(rest) == 3
    elif program == "mkdocs":
        from mkdocs.__main__ import cli

        cli.commands[rest[0]].make_context("mkdocs", rest[1:])
    elif program == "tensorboard":
        assert re.fullmatch(r"--logdir [\w/]+", " ".join(rest))
    elif program == "pytest":
        given = pytestconfig._parser.parse(rest)
        assert all((ROOT / name).exists() for name in given.file_or_dir)
    elif program == "srun":
        assert rest[0] == "--kill-on-bad-exit=1"
        assert rest[1:3] == ["bash", "-c"]
    else:
        assert (program, rest[0]) in (("scontrol", "show"), ("scontrol", "requeue"))


def make_plan(words: list[str]) -> None:
    """`make -n`: the target is there, and the scripts that it would start."""
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for script in re.findall(r"\b(?:finetune|pretrain|shards)/\w+\.py\b", done.stdout):
        assert (ROOT / script).is_file()


def run_program(words: list[str], folder: Path) -> None:
    """A program of the virtual environment, in an empty folder; exit status 0."""
    environment = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=60, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr


def run_script(how: Way, kept: docs_folder.Kept, forks) -> None:
    """In the prepared folder, in a process of its own; exit status 0."""
    same = (how.kind, *(word for before, word in pairwise(["", *how.words]) if before != "--out"))
    if same in DONE:  # by another launcher, or into another folder
        return
    folder = kept.fresh(*how.gone)
    run = docs_folder.run(forks, how.words, folder, "read_arguments" if how.kind == "arguments" else "leave_quickly")
    status = run.wait()
    assert status == (1 if counts_differ(how.words) else 0), f"{' '.join(how.words)}\n{run.told()}"
    DONE.add(same)


def counts_differ(words: list[str]) -> bool:
    """shards/check.py of a set with published counts: those of the made one are others, and it says so."""
    return words[0] == "shards/check.py" and words[1].startswith("market1501:")


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: f"{command.page}:{command.line}")
def test_a_command_of_the_documentation(command: Command, kept, forks, pytestconfig, tmp_path):
    how = docs_ways.way(command)
    if command.words[0] == "ruff" or command.words[1:3] == ("-m", "venv"):
        run_program(how.words, tmp_path)
    elif how.kind == "make -n":
        make_plan(how.words)
    elif how.kind == "parser":
        refuse_nothing(how.words, pytestconfig)
    else:
        run_script(how, kept, forks)
    TRIED[command.told] = how.kind


@pytest.mark.parametrize("page", [page for page in docs_commands.pages() if docs_commands.python(page)])
def test_the_python_of_a_page(page, kept, forks):
    folder = kept.fresh()
    script = folder / "page.py"
    text = "\n".join([PRELUDES.get(page, ""), *docs_commands.python(page)])
    script.write_text(text.replace(*SMALLER[page]) if page in SMALLER else text)
    run = docs_folder.run(forks, [str(script)], folder)
    assert run.wait() == 0, run.told()


def test_commands_are_found_as_a_shell_reads_them(tmp_path, monkeypatch):
    page = """Say `make demo SEED=1`, not `torchrun`.

```sh
# a comment
R="--size 1  2"
python a.py \\
    'x=[1, 2]' $R     # behind it
for name in one two; do OMP_NUM_THREADS=1 python b.py $name; done
```
```
python c.py
```
"""
    monkeypatch.setattr(docs_commands, "text_of", {"page": page, "wrong": "```sh\nwget x\n```"}.get)
    shell = docs_commands.Shell(tmp_path)
    assert shell.read("page") == [
        Command("page", 1, ("make", "demo", "SEED=1")),
        Command("page", 6, ("python", "a.py", "x=[1, 2]", "--size", "1", "2")),
        *(Command("page", 8, ("python", "b.py", name), (("OMP_NUM_THREADS", "1"),)) for name in ("one", "two")),
    ]
    with pytest.raises(AssertionError, match="wget: command not found"):
        shell.read("wrong")


def test_what_is_not_run_has_a_reason():
    ways = {command: docs_ways.way(command) for command in COMMANDS}
    assert all(how.reason for how in ways.values() if how.kind in ("parser", "arguments"))
    whole = [command for command, how in ways.items() if how.kind in ("run", "plan")]
    assert len(whole) > len(COMMANDS) / 2, "most commands are to be run"
