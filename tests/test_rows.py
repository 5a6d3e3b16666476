"""The table of faults: what it counts, and what it refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import rows

TESTS = """
import pytest

@pytest.mark.row("R7")
def test_found(figures):
    figures("R7", injected="every member boundary cut", times=52, lost=0, wrong=0, note="52 of 52 detected")

@pytest.mark.row("R7", "R8")
def test_wrong(figures):
    figures("R8", injected="a bit flipped", times=3, lost=1, wrong=2)
    assert False

@pytest.mark.row("R9")
def test_not_here():
    pytest.skip("no room")

@pytest.fixture
def broken():
    raise RuntimeError

@pytest.mark.row("R10")
def test_without_its_fixture(broken):
    pass

def test_of_no_row():
    pass
"""


def pytest_run(folder, text: str, *more: str) -> subprocess.CompletedProcess:
    """A pytest of its own on one file."""
    (folder / "test_some.py").write_text(text)
    marker = ["-o", "markers=row: a row", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "rows", "-q", *marker, *more, str(folder / "test_some.py")],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(rows.__file__).parent)},
    )


def test_the_table_of_a_run(tmp_path):
    done = pytest_run(tmp_path, TESTS, f"--rows-json={tmp_path / 'out' / 'rows.json'}")
    assert done.returncode == 1, "pytest's own status"
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert (
        "| R7 | damaged shards | 1 passed, 1 failed | every member boundary cut | 52 | 0 | 0 | 52 of 52 detected |"
        in lines
    )
    assert "| R8 | damaged checkpoints | 1 failed | a bit flipped | 3 | 1 | 2 | FAILED |" in lines
    assert "| R9 | full disk | 1 skipped |  |  |  |  |  |" in lines
    assert "| R10 | SIGTERM, SIGUSR1 | 1 failed |  |  |  |  |  |" in lines
    assert sum("| NO TEST |" in line for line in lines) == 20
    assert "0 of 24 rows passed; 1 lost, 2 wrong" in done.stdout
    told = json.loads((tmp_path / "out" / "rows.json").read_text())
    assert [row["row"] for row in told["rows"]] == [f"R{n}" for n in range(1, 25)]
    assert told["rows"][6]["figures"][0]["times"] == 52
    short = pytest_run(tmp_path, TESTS)
    assert "NO TEST" not in short.stdout, "without a file, the rows that had a test"


@pytest.mark.parametrize("mark, sentence", [('"R25"', "R25 is no row"), ("", "nothing is no row")])
def test_a_row_that_does_not_exist(mark, sentence, tmp_path):
    done = pytest_run(tmp_path, f"import pytest\n\n@pytest.mark.row({mark})\ndef test_it():\n    pass\n")
    assert done.returncode == 4
    assert sentence in done.stdout + done.stderr


def test_figures_of_another_row(request):
    tell = rows.figures.__wrapped__(SimpleNamespace(node=request.node))
    with pytest.raises(AssertionError, match="no mark"):
        tell("R7", injected="x", times=1, lost=0, wrong=0)
