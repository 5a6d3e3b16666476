"""The studies of the article as recipes: each is its base but for what it studies, and runs on any set."""

import json
from typing import Any

import pytest
import small
from accelerate.commands.config.config_args import load_config_from_file

from pretrain.config import PretrainConfig
from pretrain.loader import MicroBatches, micro_batch
from pretrain.schedules import peak_lr
from recipes.load import load, recipe_path
from shards.order import check_ranks

PAPER = "personvit_vits16_luperson"
FEW = "studies/data_03"  # three per cent of the data, on which the article compares crops
# study -> its base, and the keys that it studies
STUDIES: dict[str, tuple[str, set[str]]] = {
    "dino_vits16_luperson": (PAPER, {"losses.patch_weight"}),
    FEW: (PAPER, {"loader.keep"}),
    "studies/data_10": (PAPER, {"loader.keep"}),
    "studies/data_10_cfs": (PAPER, {"loader.keep"}),
    "studies/data_50": (PAPER, {"loader.keep"}),
    "studies/data_50_cfs": (PAPER, {"loader.keep"}),
    "studies/data_100_init": (PAPER, {"ckpt"}),
    "studies/data_03_init": (FEW, {"ckpt"}),
    "studies/data_10_init": ("studies/data_10", {"ckpt"}),
    "studies/data_10_cfs_init": ("studies/data_10_cfs", {"ckpt"}),
    "studies/crops_stock_ratio": (FEW, {"views.ratio"}),
    "studies/crops_stock_scales": (FEW, {"views.local_scale"}),
    "studies/crops_stock": (FEW, {"views.ratio", "views.local_scale"}),
    "studies/crops_ratio_globals": (FEW, {"views.local_ratio"}),
    "studies/epochs_200": (PAPER, {"schedules.epochs"}),
    "studies/epochs_220": (PAPER, {"schedules.epochs"}),
    "studies/epochs_250": (PAPER, {"schedules.epochs"}),
}
SIZES = {
    "personvit_vits16_luperson",
    "personvit_vitb16_luperson",
    "personvit_vitt16_luperson",
    "personvit_vitl16_luperson",
}
# what a tiny set on a CPU needs, and a short run: none of it is what a study studies, but the crops' sizes follow
TINY = [
    *("precision=no", "log_every=1", "loader.batch=16", "loader.batch_per_device=16", "loader.workers=0"),
    *("views.global_size=[64,32]", "views.local_size=[32,16]", "backbone.patch_size=8", *small.VIT),
    *("heads.out_dim=64", "heads.hidden_dim=32", "schedules.epochs=0.25"),  # 2 steps of the 8 of an epoch
]


def leaves(tree: Any, prefix: str = "") -> dict[str, str]:
    """{"a": {"b": 1}} -> {"a.b": "1"}."""
    if not isinstance(tree, dict):
        return {prefix: json.dumps(tree)}
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{prefix}.{key}" if prefix else key)
    return found


def settings(name: str) -> dict[str, str]:
    return leaves(load(PretrainConfig, f"pretrain/{name}.yaml").model_dump(mode="json"))


@pytest.mark.parametrize("name", STUDIES)
def test_a_study_is_its_base_but_for_what_it_studies(name):
    base, studied = STUDIES[name]
    ours, theirs = settings(name), settings(base)
    assert ours.keys() == theirs.keys()
    assert {key for key in ours if ours[key] != theirs[key]} == studied


def test_every_study_is_in_the_table():
    found = {f"studies/{path.stem}" for path in recipe_path("pretrain/studies").glob("*.yaml")}
    assert found == {name for name in STUDIES if name.startswith("studies/")}


@pytest.mark.parametrize("name", [name for name in STUDIES if name.startswith("studies/")])
def test_the_header_makes_the_list_that_the_study_reads(name):
    text = recipe_path(f"pretrain/{name}.yaml").read_text()
    keep = load(PretrainConfig, f"pretrain/{name}.yaml").loader.keep
    assert f"recipes/pretrain/{name}.yaml" in text
    assert (keep is None) == ("shards/cfs_keep.py" not in text)
    if keep is not None:
        share = {"03": "0.03", "10": "0.1", "50": "0.5"}[keep.stem[-2:]]
        assert f"--fraction {share}" in text
        assert f"--out {keep}" in text
        assert ("--random" in text) == ("random" in keep.stem)


@pytest.mark.parametrize("name", ["studies/crops_ratio_globals", "studies/epochs_220"])
def test_a_study_runs_on_any_set(name, tmp_path):
    crops = small.drawn(tmp_path, {**small.UNLABELED, "identities": 32})
    given = [f"loader.shards=[{crops}]", "loader.keep=null", *TINY]
    recipe = str(recipe_path(f"pretrain/{name}.yaml"))
    command = [str(small.ROOT / "pretrain/run.py"), "--recipe", recipe, "--out", str(tmp_path / "run"), *given]
    assert small.run(command) == 0
    assert [line["step"] for line in small.metrics(tmp_path / "run")] == [0, 1]
    assert (tmp_path / "run" / "teacher" / "model.safetensors").is_file()


@pytest.mark.parametrize("name", sorted(SIZES))
@pytest.mark.parametrize("per_device", [None, 24], ids=["as it is", "small cards"])
def test_one_eight_and_64_devices_take_the_same_step(name, per_device):
    more = [] if per_device is None else [f"loader.batch_per_device={per_device}"]
    config = load(PretrainConfig, f"pretrain/{name}.yaml", more)
    batch = config.loader.batch
    seen = []
    for ranks in (1, 8, 64):
        check_ranks(ranks, batch, config.order.lanes)
        micro = micro_batch(config.loader, ranks)
        assert micro <= config.loader.batch_per_device
        shares = [list(MicroBatches((3, 4), batch, micro, rank, ranks)) for rank in range(ranks)]
        assert all(len(part) == micro for share in shares for part in share)
        assert micro * len(shares[0]) * ranks == batch
        seen.append(sorted(position for share in shares for part in share for position in part))
    assert seen[0] == seen[1] == seen[2] == list(range(3 * batch, 4 * batch))
    # nothing else of a recipe knows the number of devices: the rate follows the global batch
    assert peak_lr(config.schedules, batch) == 2e-3


@pytest.mark.parametrize("launch, processes", [("gpu1", 1), ("gpu8", 8), ("nodes", 64)])
@pytest.mark.parametrize("name", sorted(SIZES))
def test_a_recipe_of_the_paper_shows_the_line_for_each_number_of_devices(name, launch, processes):
    path = f"recipes/accelerate/{launch}.yaml"
    assert load_config_from_file(str(small.ROOT / path)).num_processes == processes
    assert f"accelerate launch --config_file {path}" in recipe_path(f"pretrain/{name}.yaml").read_text()
