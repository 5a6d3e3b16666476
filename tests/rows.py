"""The table of faults: which tests belong to a row R1 to R24 of docs/reliability.md, and what they counted.

    @pytest.mark.row("R7")
    def test_a_cut_shard_is_found(figures): ...
        figures("R7", injected="every member boundary cut", times=52, lost=0, wrong=0, note="52 of 52 detected")

The table is printed after every run that had such tests. With `--rows-json FILE` all 24 rows are listed, those without
a test say so, and the file gets the same numbers. The exit status is pytest's own.
"""

import json
import os
import platform
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROWS = {
    "R1": "SIGKILL at random instants",
    "R2": "several resumes inside one epoch",
    "R3": "cost of a resume",
    "R4": "another number of processes",
    "R5": "everything is in the state",
    "R6": "uneven shards",
    "R7": "damaged shards",
    "R8": "damaged checkpoints",
    "R9": "full disk",
    "R10": "SIGTERM, SIGUSR1",
    "R11": "a lost process",
    "R12": "a slow process",
    "R13": "values that are not finite",
    "R14": "collapse",
    "R15": "roll-back on a spike of the loss",
    "R16": "a faulty server",
    "R17": "hostile files",
    "R18": "two runs are equal",
    "R19": "a copy, then the writing",
    "R20": "20,000 steps",
    "R21": "packing killed",
    "R22": "files of older formats",
    "R23": "parts of other projects' weights",
    "R24": "evaluation against brute force",
}
HEADER = ("row", "what", "tests", "injected", "times", "lost", "wrong", "note")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--rows-json", type=Path, metavar="FILE", help="write the table of rows R1 to R24 to FILE")


def rows_of(item: pytest.Item) -> list[str]:
    """The rows that a test belongs to, in order."""
    return sorted({row for mark in item.iter_markers("row") for row in mark.args}, key=lambda row: int(row[1:]))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the rows into the reports of each test; a row that does not exist ends the run."""
    for item in items:
        wrong = [str(row) for mark in item.iter_markers("row") for row in mark.args or ("nothing",) if row not in ROWS]
        if wrong:
            raise pytest.UsageError(f"{item.nodeid}: {wrong[0]} is no row; known are R1 to R24")
        if rows := rows_of(item):
            item.user_properties.append(("rows", rows))


@pytest.fixture
def figures(request):
    """Tell what a test injected: `figures(row, injected=, times=, lost=, wrong=, note=)`; several calls are listed.

    injected: the fault in a few words. times: how often. lost: samples, lines or files that are gone though they must
    not be. wrong: results that differ from those without the fault. The test asserts what these must be.
    """

    def tell(row: str, *, injected: str, times: int, lost: int, wrong: int, note: str = "") -> None:
        assert row in rows_of(request.node), f"the test has no mark row({row!r})"
        counts = {"times": times, "lost": lost, "wrong": wrong}
        assert all(type(value) is int and value >= 0 for value in counts.values()), counts
        request.node.user_properties.append(("figures", {"row": row, "injected": injected, **counts, "note": note}))

    return tell


class Table:
    """Counts the tests of each row and keeps their figures."""

    def __init__(self) -> None:
        self.rows: dict[str, dict[str, Any]] = {
            row: {"row": row, "what": what, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0, "figures": []}
            for row, what in ROWS.items()
        }
        self.outcomes: dict[str, str] = {}  # worst of set-up, call and tear-down, by test
        self.seconds: dict[str, float] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        told = dict(property_ for property_ in report.user_properties if property_[0] == "rows")
        if not told:
            return
        name = report.nodeid
        self.seconds[name] = self.seconds.get(name, 0.0) + report.duration
        if report.outcome != "passed" or name not in self.outcomes:
            self.outcomes[name] = "failed" if self.outcomes.get(name) == "failed" else report.outcome
        if report.when != "teardown":
            return
        for row in told["rows"]:
            self.rows[row][self.outcomes[name]] += 1
            self.rows[row]["seconds"] += self.seconds[name]
        for kind, given in report.user_properties:
            if kind == "figures":
                shown = {key: value for key, value in given.items() if key != "row"}
                self.rows[given["row"]]["figures"].append({**shown, "test": name, "outcome": self.outcomes[name]})

    def met(self) -> list[dict[str, Any]]:
        """The rows that had a test."""
        return [row for row in self.rows.values() if row["passed"] + row["failed"] + row["skipped"]]

    def lines(self, whole: bool) -> list[str]:
        """The table in Markdown; whole: also the rows without a test."""
        cells = [HEADER, ("---",) * len(HEADER)]
        for row in self.rows.values() if whole else self.met():
            counts = [f"{row[kind]} {kind}" for kind in ("passed", "failed", "skipped") if row[kind]]
            head = (row["row"], row["what"], ", ".join(counts) or "NO TEST")
            told = [
                (one["injected"], f"{one['times']:,}", f"{one['lost']:,}", f"{one['wrong']:,}", note_of(one))
                for one in row["figures"]
            ] or [("",) * 5]
            cells += [(*(head if first == 0 else ("",) * 3), *one) for first, one in enumerate(told)]
        return ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in cells]

    def summary(self) -> str:
        """What the rows come to in one line."""
        given = [one for row in self.rows.values() for one in row["figures"]]
        passed = [row for row in self.met() if row["passed"] and not row["failed"]]
        lost, wrong = (sum(one[key] for one in given) for key in ("lost", "wrong"))
        return f"{len(passed)} of {len(ROWS)} rows passed; {lost:,} lost, {wrong:,} wrong"


def note_of(figure: dict[str, Any]) -> str:
    """The note, and whether the test that gave it failed."""
    failed = "FAILED" if figure["outcome"] == "failed" else ""
    return "; ".join(part for part in (failed, figure["note"]) if part)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Table(), "rows-table")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    table, file = config.pluginmanager.get_plugin("rows-table"), config.getoption("--rows-json")
    if file is None and not table.met():
        return
    terminalreporter.section("rows of docs/reliability.md")
    for line in [*table.lines(whole=file is not None), "", table.summary()]:
        terminalreporter.line(line)
    if file is not None:
        facts = {
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
            "versions": {"python": platform.python_version(), "torch": metadata.version("torch")},
            "summary": table.summary(),
            "rows": list(table.rows.values()),
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(facts, indent=1) + "\n")
        terminalreporter.line(f"written to {file}")
