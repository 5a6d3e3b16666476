"""Going on with a teacher on other images, and the verdict at the end: go, no-go, or undecided."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import small
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from pretrain import checkpoint, verdict
from pretrain.agreement import Agreement, Images
from pretrain.config import PretrainConfig
from pretrain.verdict import Teacher, VerdictConfig, decide, interval, judge, losses_of
from recipes.errors import UserError
from recipes.load import load

CONFIG = VerdictConfig()


def scored(mean: float, rank: float = 20.0, count: int = 400, seed: int = 0) -> Agreement:
    """A teacher whose images scatter about that score, by the same chance for all teachers of a seed."""
    noise = np.random.default_rng(seed).normal(0, 0.1, count)
    own = np.random.default_rng(int(mean * 1e6)).normal(0, 0.05, count)
    reciprocal = mean + noise - noise.mean() + own - own.mean()
    return Agreement(reciprocal, 0.1, rank)


def test_the_interval_is_that_of_the_paired_difference():
    before, after = scored(0.30).reciprocal, scored(0.32).reciprocal
    found = interval(before, after, 0.95, 4000, 0)
    error = (after - before).std() / math.sqrt(400)
    assert found.mean == pytest.approx(0.02)
    assert found.low == pytest.approx(0.02 - 1.96 * error, abs=0.15 * error)
    assert found.high == pytest.approx(0.02 + 1.96 * error, abs=0.15 * error)
    assert found == interval(before, after, 0.95, 4000, 0)
    assert found != interval(before, after, 0.95, 4000, 1)
    alone = interval(np.zeros(400), after, 0.95, 4000, 0)  # not paired: what the images have in common stays in
    assert found.high - found.low < 0.8 * (alone.high - alone.low)
    assert interval(before, before + 0.1, 0.95, 200, 0) == pytest.approx((0.1, 0.1, 0.1))


def test_an_interval_covers_the_truth_as_often_as_it_says():
    rng = np.random.default_rng(5)
    hits = 0
    for turn in range(200):
        change = rng.normal(0.1, 1, 60)
        found = interval(np.zeros(60), change, 0.9, 300, turn)
        hits += found.low <= 0.1 <= found.high
    assert 0.83 <= hits / 200 <= 0.95


@pytest.mark.parametrize(
    ("end", "losses", "expected", "why"),
    [
        (scored(0.35), (5.0, 4.0), "GO", "knows the images better than the start"),
        (scored(0.35), None, "GO", "from 0.3000 to 0.3500"),
        (scored(0.35), (4.0, 4.0), "UNDECIDED", "the loss did not fall: from 4.000 to 4.000"),
        (scored(0.30), (5.0, 4.0), "UNDECIDED", "did not clearly rise"),
        (scored(0.301), (5.0, 4.0), "UNDECIDED", "did not clearly rise"),
        (scored(0.25), (5.0, 4.0), "NO-GO", "the score fell from 0.3000 to 0.2500"),
        (scored(0.35, rank=9.9), (5.0, 4.0), "NO-GO", "Collapse: its features use 9.9 directions"),
        (scored(0.35, rank=10.1), (5.0, 4.0), "GO", "10.1 directions, those of the start 20.0"),
        (scored(0.35, rank=math.nan), (5.0, 4.0), "NO-GO", "not finite"),
        (Agreement(np.full(400, 1 / 400), 0.0, 1.0), (5.0, 4.0), "NO-GO", "Collapse"),
    ],
)
def test_go_no_go_and_undecided(end, losses, expected, why):
    told = decide(CONFIG, scored(0.30), end, losses)
    assert told.verdict == expected
    assert why in told.reason


def test_the_thresholds_are_those_of_the_recipe():
    start, end = scored(0.30), scored(0.35)
    assert decide(VerdictConfig(gain=0.03), start, end, None).verdict == "GO"
    more = decide(VerdictConfig(gain=0.06), start, end, None)
    assert more.verdict == "UNDECIDED"
    assert "verdict.gain = 0.06" in more.reason
    assert decide(VerdictConfig(rank_share=0.2), start, scored(0.35, rank=5), None).verdict == "GO"
    # the features of random weights use many directions: after them only the absolute limit counts
    assert decide(CONFIG, start, scored(0.35, rank=5), None, trained=False).verdict == "GO"
    assert decide(CONFIG, start, scored(0.35, rank=1.9), None, trained=False).verdict == "NO-GO"


@pytest.mark.parametrize(
    ("lines", "expected"), [([], None), ([5.0], None), ([5.0, 4.0], (5, 4)), ([*range(30)], (1, 28))]
)
def test_the_loss_of_a_run_is_that_of_its_first_and_last_tenth(tmp_path, lines, expected):
    assert losses_of(tmp_path) is None
    texts = [json.dumps({"step": step, "loss": loss}) for step, loss in enumerate(lines)]
    texts.insert(1, json.dumps({"step": 0, "loss": None}))  # not finite: written as null
    (tmp_path / "metrics.jsonl").write_text("\n".join([*texts, '{"alarm": "x"}']) + "\n")
    assert losses_of(tmp_path) == expected


@pytest.fixture(scope="module")
def adapted(tmp_path_factory):
    """`source`: a run of seconds on some people. `run`: its teacher, gone on with others by the recipe for a CPU."""
    base = tmp_path_factory.mktemp("adapt")
    people = small.drawn(base, small.UNLABELED)
    assert small.run(small.arguments("pretrain/run.py", base / "source", people, "schedules.epochs=2")) == 0
    (base / "drawn-unlabeled").rename(base / "people")
    others = small.drawn(base, {**small.UNLABELED, "seed": 9, "first_identity": 500})
    script, recipe = str(small.ROOT / "pretrain/run.py"), "recipes/pretrain/adapt_cpu.yaml"
    given = [f"loader.shards=[{others}]", *small.PRETRAIN, "schedules.epochs=2", "checkpoint.teacher_every_epochs=0.5"]
    more = ["--ckpt", str(base / "source" / "teacher"), "verdict.images=128"]
    assert small.run([script, "--recipe", recipe, "--out", str(base / "run"), *more, *given]) == 0
    return base


def test_a_run_ends_with_its_verdict(adapted):
    told = small.json_of(adapted / "run" / "verdict.json")
    assert told["verdict"] in ("GO", "NO-GO", "UNDECIDED")
    assert f"{told['start']['score']:.4f} to {told['end']['score']:.4f}" in told["reason"]
    assert told["start"]["ckpt"] == str(adapted / "source" / "teacher")
    assert told["end"]["ckpt"] == str(adapted / "run" / "teacher")
    assert told["take"] in [row["ckpt"] for row in told["teachers"]]
    assert [row["epochs"] for row in told["teachers"]] == [0, 0.5, 1.0, 1.5, 2.0]
    assert told["images"]["count"] == 128
    assert told["loss"]["begin"] > 0
    assert told["difference"]["mean"] == pytest.approx(told["end"]["score"] - told["start"]["score"])
    assert small.json_of(adapted / "source" / "teacher" / "config.json")["kind"] == "backbone"
    assert not (adapted / "source" / "verdict.json").exists(), "it is asked for in the recipe, or not given"


@pytest.fixture
def accelerator():
    """Of this process and in full precision; forgotten afterwards, else the next script inherits that."""
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


def conclude(adapted, tmp_path, accelerator, make_teacher) -> dict:
    """The verdict on a copy of the run whose last teacher is another one: make_teacher(folder) changes it."""
    out = tmp_path / "run"
    shutil.copytree(adapted / "run", out)
    shutil.rmtree(out / "teachers")
    make_teacher(out / "teacher")
    verdict.conclude(load(PretrainConfig, out / "recipe.yaml"), out, accelerator)
    return small.json_of(out / "verdict.json")


def rewritten(folder: Path, change) -> None:
    tensors, config = checkpoint.load_model(folder)
    checkpoint.save_model(folder, {name: change(name, tensor) for name, tensor in tensors.items()}, config)


def test_a_teacher_that_did_not_change_is_undecided(adapted, tmp_path, accelerator, capsys):
    def same(folder: Path) -> None:
        tensors, _ = checkpoint.load_model(adapted / "source" / "teacher")
        checkpoint.save_model(folder, tensors, checkpoint.load_model(folder)[1])

    told = conclude(adapted, tmp_path, accelerator, same)
    assert told["verdict"] == "UNDECIDED"
    assert told["difference"] == {"mean": 0, "low": 0, "high": 0}
    assert told["take"] == told["start"]["ckpt"]
    assert f"verdict: UNDECIDED. {told['reason']}. Nothing is gained by it, stay with {told['take']}" in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda name, tensor: torch.full_like(tensor, 0.1), "Collapse"),
        (lambda name, tensor: tensor * 0 if "patch_embed" in name else tensor, "Collapse"),
        (lambda name, tensor: tensor * math.nan if name == "norm.weight" else tensor, "not finite"),
    ],
    ids=["all-weights-equal", "blind", "nan"],
)
def test_a_teacher_that_broke_is_no_go(adapted, tmp_path, accelerator, change, why):
    told = conclude(adapted, tmp_path, accelerator, lambda folder: rewritten(folder, change))
    assert told["verdict"] == "NO-GO"
    assert why in told["reason"]
    assert told["take"] == told["start"]["ckpt"]


def test_without_being_asked_nothing_is_scored(adapted, tmp_path, accelerator, capsys):
    given = load(PretrainConfig, adapted / "run" / "recipe.yaml", ["verdict.enabled=false"])
    verdict.conclude(given, tmp_path, accelerator)
    assert not list(tmp_path.iterdir())
    assert not capsys.readouterr().out


def test_the_start_of_a_run_folder_without_a_last_teacher_is_its_newest_state(adapted, tmp_path):
    config = load(PretrainConfig, adapted / "run" / "recipe.yaml")
    finished, _ = verdict.start_of(config, str(adapted / "source"))
    shutil.copytree(adapted / "source" / "checkpoints", tmp_path / "checkpoints")
    unfinished, stored = verdict.start_of(config, str(tmp_path))
    assert not stored
    for name, tensor in finished.vit.state_dict().items():
        assert torch.equal(tensor, unfinished.vit.state_dict()[name]), name
    fresh, _ = verdict.start_of(config, "none")
    assert not torch.equal(fresh.vit.pos_embed, finished.vit.pos_embed)
    with pytest.raises(UserError, match="no checkpoint"):
        verdict.start_of(config, str(tmp_path / "not-there"))


def judged(adapted, tmp_path, *scores: Agreement) -> dict:
    """The verdict on made-up teachers: the start, snapshots, the last one."""
    config = load(PretrainConfig, adapted / "run" / "recipe.yaml")
    names = ["start", *(f"snapshot-{n}" for n in range(1, len(scores) - 1)), "last"]
    teachers = [Teacher(name, float(n), own) for n, (name, own) in enumerate(zip(names, scores, strict=True))]
    return judge(config, adapted / "run", tmp_path, teachers, Images(None, np.arange(400), "made up"))


def test_a_snapshot_may_be_better_than_both_ends(adapted, tmp_path):
    told = judged(adapted, tmp_path, scored(0.30), scored(0.36), scored(0.33), scored(0.25))
    assert (told["verdict"], told["take"]) == ("NO-GO", "snapshot-1")
    assert "snapshot-1 is better than both (score 0.3600)" in told["reason"]
    told = judged(adapted, tmp_path, scored(0.30), scored(0.40), scored(0.35))
    assert (told["verdict"], told["take"]) == ("GO", "snapshot-1")
    assert told["best"]["ckpt"] == "snapshot-1"


def test_the_last_teacher_is_taken_unless_a_snapshot_is_clearly_better(adapted, tmp_path):
    told = judged(adapted, tmp_path, scored(0.30), scored(0.3502), scored(0.35))
    assert (told["verdict"], told["take"]) == ("GO", "last")
    told = judged(adapted, tmp_path, scored(0.30), scored(0.29), scored(0.28))
    assert (told["verdict"], told["take"]) == ("NO-GO", "start")


def test_the_best_of_many_has_to_be_better_by_more(adapted, tmp_path):
    # 1.96 standard errors are enough for one comparison and not for the best of forty
    start, end = scored(0.30), scored(0.25)
    error = (scored(0.3077).reciprocal - start.reciprocal).std() / math.sqrt(400)
    better = Agreement(scored(0.3077).reciprocal - 0.0077 + 2.5 * error, 0.1, 20.0)
    assert judged(adapted, tmp_path, start, better, end)["take"] == "snapshot-1"
    assert judged(adapted, tmp_path, start, better, *[end] * 40)["take"] == "start"


@pytest.mark.soak
def test_adapting_on_a_cpu_helps_on_the_new_images(tmp_path):
    people = {"height": 64, "width": 32, "backdrop": 0.0, "misaligned": 0.7, "similar": 0.9, "role": "unlabeled"}
    first = small.drawn(tmp_path, {**people, "identities": 250, "images_per_identity": 6, "cameras": 6})
    first = first.rename(tmp_path / "first")
    other = {**people, "seed": 7, "camera_strength": 0.6, "occluders": 0.3, "cameras": 6}
    others = small.drawn(tmp_path, {**other, "identities": 200, "images_per_identity": 6})
    script, made = str(small.ROOT / "pretrain/run.py"), tmp_path / "adapted"
    given = ["--out", str(tmp_path / "source"), f"loader.shards=[{first}]", "schedules.epochs=3"]
    assert small.run([script, "--recipe", "recipes/pretrain/demo.yaml", *given, "views.local_count=2"]) == 0
    keep = tmp_path / "keep.npz"
    command = [str(small.ROOT / "shards/cfs_keep.py"), "--shards", str(others), "--fraction", "0.8", "--random"]
    assert small.run([*command, "--out", str(keep)]) == 0
    given = ["--ckpt", str(tmp_path / "source" / "teacher"), "--out", str(made), f"loader.shards=[{others}]"]
    recipe = ["--recipe", "recipes/pretrain/adapt_cpu.yaml", f"loader.keep={keep}"]
    assert small.run([script, *recipe, *given, "schedules.epochs=5"]) == 0
    told = small.json_of(made / "verdict.json")
    print(told["verdict"], told["reason"])
    assert told["images"]["kind"].startswith("held out")
    assert told["images"]["count"] == 240
    assert told["verdict"] == "GO"
