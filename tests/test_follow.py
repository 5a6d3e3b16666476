"""A pretraining is followed with labels: every teacher is scored once, whatever kills or deletes what."""

import fcntl
import json
import shutil
from pathlib import Path

import pytest
import small
from followed import Scorer, export, snapshot, under_way

from finetune import follow as module
from finetune.curve import sentence
from finetune.follow import follow, snapshots
from pretrain.checkpoint import load_model
from recipes.errors import UserError


class Killed(BaseException):
    """Stands for SIGKILL: nothing may catch it."""


@pytest.fixture
def run(tmp_path):
    """A run with teachers of epochs 1, 2 and 3, the second the best."""
    return under_way(tmp_path)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_every_teacher_is_scored_and_the_best_is_marked(run, capsys):
    before, score = contents(run), Scorer()
    out = run / "follow" / "set"
    told = follow(run, score, out, once=True, facts={"data": "drawn people", "protocol": "drop"})
    assert score.asked == ["epoch-0001.00", "epoch-0002.00", "epoch-0003.00"]
    assert told["ckpt"] == str(run / "teachers" / "epoch-0002.00")
    assert told["mAP"] == pytest.approx((30 + 10 / 4) / 40)
    assert told["rank1"] == pytest.approx(0.75)
    assert told["as_good"] == []
    assert told["last"]["below_best"]["mean"] == pytest.approx(10 * 0.75 / 40)
    assert told["last"]["below_best"]["low"] > 0
    assert json.loads((out / "best.json").read_text()) == told
    rows = small.json_of(out / "curve.json")["teachers"]
    assert [(row["epochs"], row["as_good"]) for row in rows] == [(1, False), (2, False), (3, False)]
    for row in rows:
        assert row["intervals"]["mAP"][0] <= row["mAP"] <= row["intervals"]["mAP"][1]
    table = (out / "table.md").read_text()
    assert "* data: drawn people" in table
    assert table.count(" best |") == 1
    assert "| 2 | 81.2" in table
    assert (out / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert {name: data for name, data in contents(run).items() if not name.startswith("follow/")} == before
    assert "epoch 3: mAP 62.5 %" in capsys.readouterr().out
    assert f"use it: python finetune/run.py --ckpt {told['ckpt']}" in sentence(told, out)


def test_what_was_scored_is_skipped_and_new_weights_are_not(run, capsys):
    out, score = run / "follow" / "set", Scorer()
    first = follow(run, score, out, once=True)
    assert follow(run, score, out, once=True) == first
    assert len(score.asked) == 3
    snapshot(run, 4, 35)
    assert follow(run, score, out, once=True)["epochs"] == 4
    shutil.rmtree(run / "teachers" / "epoch-0001.00")
    snapshot(run, 1, 39)  # a pretraining that was started anew in the same folder
    assert follow(run, score, out, once=True)["epochs"] == 1
    assert score.asked[3:] == ["epoch-0004.00", "epoch-0001.00"]


def test_the_last_teacher_stands_for_its_snapshot(run):
    out, score = run / "follow" / "set", Scorer()
    follow(run, score, out, once=True)
    snapshot(run, 4, 35)
    follow(run, score, out, once=True)
    export(run / "teacher", 4, 35)
    assert [one.folder.name for one in snapshots(run)][-1] == "teacher"
    assert follow(run, score, out, once=False)["ckpt"] == str(run / "teacher")
    assert len(score.asked) == 4, "the last teacher has the weights of epoch 4"


def test_it_waits_for_teachers_until_the_last_one(run, monkeypatch, capsys):
    coming = iter([lambda: None, lambda: snapshot(run, 4, 35), lambda: None, lambda: export(run / "teacher", 5, 25)])
    waited = []

    def sleep(seconds):
        waited.append(seconds)
        next(coming)()

    monkeypatch.setattr(module, "sleep", sleep)
    score = Scorer()
    told = follow(run, score, run / "follow" / "set", once=False, poll_s=7)
    assert score.asked == [f"epoch-000{n}.00" for n in (1, 2, 3, 4)] + ["teacher"]
    assert waited == [7] * 4
    assert (told["epochs"], told["last"]["epochs"]) == (4, 5)
    assert capsys.readouterr().err.count("waiting for the next teacher") == 2


def test_ctrl_c_while_it_waits_ends_it(run, monkeypatch):
    def sleep(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "sleep", sleep)
    assert follow(run, Scorer(), run / "follow" / "set", once=False)["epochs"] == 2


@pytest.mark.parametrize("moment", ["score", "write_json", "publish"])
@pytest.mark.parametrize("number", [1, 2])
def test_a_kill_anywhere_loses_one_score_at_most(moment, number, run, monkeypatch):
    whole = follow(run, Scorer(), run / "follow" / "whole", once=True)
    out, score, calls = run / "follow" / "set", Scorer(), []

    def dying(real):
        def call(*arguments):
            calls.append(moment)
            if len(calls) == number:
                raise Killed
            return real(*arguments)

        return call

    with monkeypatch.context() as patched:
        if moment != "score":
            patched.setattr(module, moment, dying(getattr(module, moment)))
        with pytest.raises(Killed):
            follow(run, dying(score) if moment == "score" else score, out, once=True)
    assert follow(run, score, out, once=True) == whole
    assert len(score.asked) == 3 + (moment == "write_json")


def test_the_best_outlives_what_the_pretraining_deletes(run):
    out, score = run / "follow" / "set", Scorer()
    passing = snapshot(run, 2.5, 38, kept="newest")
    told = follow(run, score, out, once=True)
    copy = out / "kept" / "epoch-0002.50"
    assert told["ckpt"] == str(copy)
    shutil.rmtree(passing)
    assert follow(run, score, out, once=True)["ckpt"] == str(copy)
    assert int(load_model(copy)[0]["cls_token"][0, 0, 0]) == 38
    snapshot(run, 2.75, 5, kept="newest")
    assert follow(run, score, out, once=True)["ckpt"] == str(copy)
    assert [path.name for path in (out / "kept").iterdir()] == ["epoch-0002.50"]
    snapshot(run, 4, 40)
    assert follow(run, score, out, once=True)["epochs"] == 4
    assert list((out / "kept").iterdir()) == [], "no copy of what is not the best"
    rows = {row["epochs"]: row["ckpt"] for row in small.json_of(out / "curve.json")["teachers"]}
    assert rows[2.5] is None
    assert "deleted by the pretraining" in (out / "table.md").read_text()
    assert len(score.asked) == 6


def test_one_that_is_deleted_before_its_turn_is_left_out(run, capsys):
    passing = snapshot(run, 2.5, 38, kept="newest")
    score, real = Scorer(), Scorer()

    def deleting(ckpt):
        shutil.rmtree(passing, ignore_errors=True)
        return real(ckpt)

    assert follow(run, deleting, run / "follow" / "set", once=True)["epochs"] == 2
    assert score.asked == []
    assert real.asked == ["epoch-0001.00", "epoch-0002.00", "epoch-0003.00"]
    assert f"{passing} was deleted before it could be scored" in capsys.readouterr().err


def test_as_good_means_that_the_interval_of_the_difference_holds_zero(run):
    snapshot(run, 4, 29)
    told = follow(run, Scorer(), run / "follow" / "set", once=True)
    assert told["epochs"] == 2
    assert told["as_good"] == [str(run / "teachers" / "epoch-0004.00")], "one query of 40 is chance"
    assert "1 other is as good by these queries" in sentence(told, run)


def test_the_best_after_a_short_finetune(run):
    out, score, tuned = run / "follow" / "set", Scorer(), []
    assert follow(run, score, out, once=True)["epochs"] == 2

    def finetune(ckpt):
        """Turns the order round."""
        tuned.append(ckpt.name)
        found = score(ckpt)
        return {**found.numbers(), "mAP": 1 - found.mAP / 2, "average_precision": (1 - found.ap / 2).tolist()}

    told = follow(run, score, out, once=True, finetune=finetune)
    assert (told["epochs"], told["by"]) == (1, "mAP after a short fine-tune")
    assert tuned == ["epoch-0001.00", "epoch-0002.00", "epoch-0003.00"]
    assert len(score.asked) == 6, "three scores, three fine-tunes, and no score twice"
    assert follow(run, score, out, once=True, finetune=finetune) == told
    assert len(tuned) == 3
    assert "mAP % fine-tuned" in (out / "table.md").read_text()
    assert "average_precision" not in (out / "best.json").read_text()


def test_while_some_are_not_fine_tuned_yet_the_best_is_among_the_others(run):
    out, score = run / "follow" / "set", Scorer()
    follow(run, score, out, once=True)

    def finetune(ckpt):
        if ckpt.name != "epoch-0001.00":
            raise Killed
        return {**score(ckpt).numbers(), "average_precision": score(ckpt).ap.tolist()}

    with pytest.raises(Killed):
        follow(run, score, out, once=True, finetune=finetune)
    best = small.json_of(out / "best.json")
    assert (best["epochs"], best["by"], best["last"]["below_best"]) == (1, "mAP after a short fine-tune", None)
    assert [row["below_best"] is None for row in small.json_of(out / "curve.json")["teachers"]] == [False, True, True]


def test_scores_under_other_settings_are_not_mixed(run):
    out = run / "follow" / "set"
    follow(run, Scorer(), out, once=True, facts={"data": ["Market-1501"], "flip": False})
    with pytest.raises(UserError, match=r"flip was False and is now True\. Choose another --out"):
        follow(run, Scorer(), out, once=True, facts={"data": ["Market-1501"], "flip": True})
    next((out / "scores").glob("*.json")).write_text("{")
    with pytest.raises(UserError, match="is damaged; delete it to have that teacher scored again"):
        follow(run, Scorer(), out, once=True, facts={"data": ["Market-1501"], "flip": False})


def test_two_do_not_write_into_one_folder(run):
    out = run / "follow" / "set"
    out.mkdir(parents=True)
    with open(out / ".lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="in use by another --follow"):
            follow(run, Scorer(), out, once=True)
    assert follow(run, Scorer(), out, once=True)["epochs"] == 2


def test_what_is_no_run_is_refused(run, tmp_path):
    with pytest.raises(UserError, match=r"no run folder of pretrain/run.py, it has no recipe.yaml"):
        follow(tmp_path, Scorer(), tmp_path / "out", once=True)
    shutil.rmtree(run / "teachers")
    with pytest.raises(UserError, match="holds no teacher"):
        follow(run, Scorer(), tmp_path / "out", once=True)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="results go into a folder"):
        follow(run, Scorer(), tmp_path / "file", once=True)


def test_a_damaged_teacher_is_told(run):
    config = run / "teachers" / "epoch-0002.00" / "config.json"
    config.write_text(json.dumps({"kind": "backbone"}))
    with pytest.raises(UserError, match="does not tell samples and epochs"):
        follow(run, Scorer(), run / "follow" / "set", once=True)
