"""The demo as a user runs it. Long: only with `make soak`."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.soak
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_teacher_helps(tmp_path, seed):
    out = tmp_path / "demo"
    subprocess.run([sys.executable, "finetune/demo.py", "--out", out, "--seed", str(seed)], cwd=ROOT, check=True)
    report = json.loads((out / "report.json").read_text())
    assert report["direct_teacher"]["mAP"] >= 3 * report["direct_random"]["mAP"]
    assert report["pretrained"]["mAP"] > report["scratch"]["mAP"]
    assert report["histogram"]["mAP"] < 0.5, "colour histograms alone must not solve it"
    assert set(report["seconds"]) >= {"pretrain", "scratch", "pretrained"}
    assert (out / "ranked_lists.png").stat().st_size > 10_000
