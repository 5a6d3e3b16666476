"""The short fine-tune of a teacher runs as a process of its own, and what it leaves is not mixed up."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import small
from followed import Scorer, snapshot, under_way

from finetune.follow import follow
from finetune.metrics import summarise
from finetune.short_finetune import LAUNCH, ShortFinetune, digest
from recipes.errors import UserError


@pytest.fixture
def run(tmp_path):
    """A run with teachers of epochs 1, 2 and 3, the second the best."""
    return under_way(tmp_path)


def fake_script(tmp_path: Path, monkeypatch, text: str) -> None:
    """A finetune/run.py that does what a test says."""
    (tmp_path / "finetune").mkdir()
    (tmp_path / "finetune" / "run.py").write_text(text)
    monkeypatch.setattr("finetune.short_finetune.ROOT", tmp_path)


RESULTS = {"mAP": 0.5, "rank1": 0.6, "rank5": 0.7, "rank10": 0.8, "mINP": 0.1, "average_precision": [0.5, None]}
WRITES = f"""
import json, os, sys
from pathlib import Path
out = Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "results.json").write_text(json.dumps({RESULTS!r} | {{"told": sys.argv[1:], "env": os.environ.get("RANK")}}))
"""


def test_a_short_finetune_is_a_launch_of_its_own(run, tmp_path, monkeypatch):
    fake_script(tmp_path, monkeypatch, WRITES)
    for name in LAUNCH:
        monkeypatch.setenv(name, "1")
    short = ShortFinetune("bot.yaml", ["optim.epochs=3"], tmp_path / "tuned")
    teacher = run / "teachers" / "epoch-0001.00"
    out = tmp_path / "tuned" / f"epoch-0001.00-{digest(teacher)[:8]}"
    assert short(teacher) == {**RESULTS, "run": str(out), "settings": short.settings()}
    told = small.json_of(out / "results.json")
    options = ["--recipe", "bot.yaml", "--out", str(out), "optim.epochs=3"]
    assert told["told"] == ["--ckpt", str(teacher), *options]
    assert told["env"] is None
    shutil.rmtree(teacher)
    assert short(snapshot(run, 1, 11))["run"] != str(out), "other weights under the same name"


def test_a_short_finetune_that_fails_keeps_the_scores(run, tmp_path, monkeypatch):
    fake_script(tmp_path, monkeypatch, "raise SystemExit(2)")
    out, score = run / "follow" / "set", Scorer()
    with pytest.raises(UserError, match="failed with exit code 2; its message stands above"):
        follow(run, score, out, once=True, finetune=ShortFinetune("bot.yaml", [], out / "finetune"))
    assert len(list((out / "scores").iterdir())) == 1
    follow(run, score, out, once=True)
    assert len(score.asked) == 3


def test_other_settings_of_the_finetune_run_again(run, tmp_path, monkeypatch):
    fake_script(tmp_path, monkeypatch, WRITES)
    out, score = run / "follow" / "set", Scorer()
    monkeypatch.setattr(Scorer, "__call__", lambda self, _: summarise([np.array([2]), np.empty(0, np.int64)]))
    for epochs in (3, 3, 4):
        short = ShortFinetune("bot.yaml", [f"optim.epochs={epochs}"], out / "finetune")
        told = follow(run, score, out, once=True, finetune=short)
        assert told["finetuned"]["settings"]["overrides"] == [f"optim.epochs={epochs}"]


FOLLOWS = """
import sys
from pathlib import Path
import numpy as np
from finetune.follow import follow
from finetune.metrics import summarise
from finetune.short_finetune import ShortFinetune
run, root = Path(sys.argv[1]), sys.argv[2]
import finetune.short_finetune
finetune.short_finetune.ROOT = Path(root)
short = ShortFinetune("bot.yaml", [], run / "follow" / "set" / "finetune")
follow(run, lambda _: summarise([np.array([2])]), run / "follow" / "set", True, finetune=short)
"""


def test_a_finetune_that_a_killed_one_left_keeps_others_out(run, tmp_path, monkeypatch):
    started = tmp_path / "started"
    told = f"from pathlib import Path\nPath({str(started)!r}).touch()\nimport time\ntime.sleep(600)"
    fake_script(tmp_path, monkeypatch, told)
    (tmp_path / "follows.py").write_text(FOLLOWS)
    command = [sys.executable, str(tmp_path / "follows.py"), str(run), str(tmp_path)]
    environ = small.environment(PYTHONPATH=str(small.ROOT))
    parent = subprocess.Popen(command, env=environ, start_new_session=True)
    try:
        while not started.exists() and parent.poll() is None:
            time.sleep(0.05)
        assert parent.poll() is None, "the fine-tune was not started"
        parent.kill()
        parent.wait()
        with pytest.raises(UserError, match="or by a fine-tune that a killed one left"):
            follow(run, Scorer(), run / "follow" / "set", once=True)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)
    parent.wait()
