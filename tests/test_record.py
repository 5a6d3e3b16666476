"""The run folder: refuses foreign folders, continues its own, survives being killed in the middle of a write."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from recipes import lines as lines_of_json
from recipes import record
from recipes.errors import UserError
from recipes.load import Section, load
from recipes.record import RunFolder, environment, write_json, write_text


class OptimConfig(Section):
    lr: float = 1e-6
    floor: float = math.nan


class RunConfig(Section):
    seed: int = 0
    workers: int = 2
    optim: OptimConfig = OptimConfig()


def lines(run: RunFolder) -> list[dict]:
    return [json.loads(line) for line in (run.path / "metrics.jsonl").read_text().splitlines()]


def steps(run: RunFolder) -> list[int]:
    return [line["step"] for line in lines(run)]


@pytest.fixture
def run(tmp_path):
    return RunFolder.open(tmp_path / "runs" / "a", RunConfig(), main=True)


def test_a_new_folder_holds_recipe_and_environment(tmp_path):
    config = RunConfig(seed=3)
    run = RunFolder.open(tmp_path / "deep" / "run", config, main=True, facts={"processes": 2})
    assert load(RunConfig, run.path / "recipe.yaml").seed == 3
    told = json.loads((run.path / "environment.json").read_text())
    assert told["versions"]["torch"]
    assert told["versions"]["numpy"] == np.__version__
    assert told["cpus"] == os.cpu_count()
    assert told["processes"] == 2
    assert told["earlier"] == []
    assert {"commit", "python", "platform", "command", "started"} <= set(told)
    assert sorted(path.name for path in run.path.iterdir()) == [".lock", "environment.json", "recipe.yaml"]


def test_the_same_recipe_continues_and_remembers_earlier_launches(run):
    run.log({"step": 1})
    for _ in range(2):
        again = RunFolder.open(run.path, RunConfig(), main=True)
    assert steps(again) == [1]
    told = json.loads((run.path / "environment.json").read_text())
    assert len(told["earlier"]) == 2
    assert all("earlier" not in launch for launch in told["earlier"])


def test_another_recipe_is_refused_with_both_values(run):
    with pytest.raises(UserError) as caught:
        RunFolder.open(run.path, RunConfig(seed=5, optim=OptimConfig(lr=0.5)), main=True)
    message = str(caught.value)
    assert "seed was 0 and is now 5" in message
    assert "optim.lr was 1e-06 and is now 0.5" in message
    assert "--out" in message
    assert "floor" not in message  # nan equals nan here
    assert yaml.safe_load((run.path / "recipe.yaml").read_text())["seed"] == 0


def test_keys_that_came_or_went_are_named(run):
    class Newer(Section):
        seed: int = 0
        workers: int = 2
        momentum: float = 0.9

    with pytest.raises(UserError, match=r"momentum was not there and is now 0\.9; optim\.lr was 1e-06 and is now not"):
        RunFolder.open(run.path, Newer(), main=True)


def test_keys_that_do_not_change_the_result_may_differ(run):
    other = RunConfig(workers=7)
    with pytest.raises(UserError, match="workers was 2 and is now 7"):
        RunFolder.open(run.path, other, main=True)
    RunFolder.open(run.path, other, main=True, may_differ=["workers"])
    assert load(RunConfig, run.path / "recipe.yaml").workers == 7


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(UserError, match=r"'photo\.jpg'.*choose another --out"):
        RunFolder.open(tmp_path, RunConfig(), main=True)
    with pytest.raises(UserError, match="cannot make the run folder"):
        RunFolder.open(tmp_path / "photo.jpg", RunConfig(), main=True)


def test_drafts_of_a_killed_launch_do_not_stand_in_the_way(tmp_path):
    (tmp_path / ".recipe.yaml.tmp").write_text("seed: ")
    run = RunFolder.open(tmp_path, RunConfig(), main=True)
    assert [path.name for path in run.path.glob(".*")] == [".lock"]


def test_a_recipe_that_cannot_be_read_is_named(run):
    (run.path / "recipe.yaml").write_text("seed: [")
    with pytest.raises(UserError, match=r"recipe\.yaml cannot be read"):
        RunFolder.open(run.path, RunConfig(), main=True)


def test_log_is_one_plain_json_object_a_line(run):
    run.log({"step": 1, "loss": np.float32(2.5), "parts": {"cls": np.arange(2)}, "lr": math.inf, "to": Path("x")})
    run.log({"step": np.int64(2), "loss": float("nan"), "ok": True, "note": "a\nb"})
    assert lines(run) == [
        {"step": 1, "loss": 2.5, "parts": {"cls": [0, 1]}, "lr": None, "to": "x"},
        {"step": 2, "loss": None, "ok": True, "note": "a\nb"},
    ]
    with pytest.raises(TypeError, match="set cannot be recorded"):
        run.log({"step": 3, "loss": {1}})
    assert steps(run) == [1, 2]


def test_rewind_drops_what_will_be_run_again(run):
    for step in (10, 20, 30):
        run.log({"step": step})
    run.log({"note": "no step"})
    run.rewind(20)
    assert lines(run) == [{"step": 10}, {"step": 20}, {"note": "no step"}]
    run.log({"step": 30})
    assert lines(run)[-1] == {"step": 30}
    run.rewind(0)
    assert lines(run) == [{"note": "no step"}]


@pytest.mark.parametrize("half", ['{"step": 3', '{"step": 3}', '{"note": "\u00e9'])
def test_a_half_written_last_line_goes(run, half):
    run.log({"step": 1})
    with open(run.path / "metrics.jsonl", "ab") as file:
        file.write(half.encode()[:-1])
    RunFolder.open(run.path, RunConfig(), main=True)
    run.log({"step": 2})
    assert steps(run) == [1, 2]


def test_a_broken_line_in_the_middle_is_told(run):
    (run.path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl line 2"):
        run.rewind(1)


def test_a_damaged_record_of_the_launches_is_put_aside(run, capsys):
    """It is no input of the run, so it stops nobody; what can be read of it stays."""
    path = run.path / "environment.json"
    for damaged in ("", '{"earlier": 3}', '{"versions": {}}', "[]", path.read_text()[:-20]):
        path.write_text(damaged)
        RunFolder.open(run.path, RunConfig(), main=True)
        assert "environment.json.damaged now" in capsys.readouterr().err
        assert json.loads(path.read_text())["earlier"] == []
        assert (run.path / "environment.json.damaged").read_text() == damaged


def test_rewind_needs_no_room_on_the_disk(run, monkeypatch):
    for step in (10, 20, 30):
        run.log({"step": step})
    monkeypatch.setattr(lines_of_json, "write_text", None)  # would need room for a copy
    run.rewind(10)
    assert steps(run) == [10]


def test_rewind_of_a_run_without_numbers(run):
    run.rewind(5)
    assert not (run.path / "metrics.jsonl").exists()


def test_other_processes_write_nothing(tmp_path):
    run = RunFolder.open(tmp_path / "run", RunConfig(), main=False)
    run.log({"step": 1})
    run.rewind(0)
    assert not run.path.exists()


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"value": np.float64(1.5), "bad": math.nan})
    assert json.loads(path.read_text()) == {"value": 1.5, "bad": None}

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_text(path, "new")
    assert json.loads(path.read_text())["value"] == 1.5
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_environment_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    told = environment()
    assert told["commit"] is None
    assert told["uncommitted_changes"] is None
