"""A recipe from the arguments that DINO, iBOT, PersonViT, TransReID-SSL and PASS store in their training files.

Each argument becomes a key of the recipe, or a comment that says why it has no place; each key that no argument tells
becomes a comment, and the default holds.
"""

import json
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from recipes.errors import UserError

STOCK_RATIO = [0.75, 1.3333]  # width / height of a crop in torchvision, which all but PersonViT left as it is
STOCK_LOCAL = 96  # pixels: sides of a local crop in the code of DINO and iBOT
ARCHITECTURES = {"tiny", "small", "base", "large"}
# of the machine and not of the method
MACHINE = {
    *("output_dir", "dist_url", "dist_backend", "local_rank", "rank", "gpu", "distributed", "load_from", "world_size"),
    *("device", "resume", "log_dir", "num_gpus", "nodes", "ngpus"),
}
# which images: loader.shards and loader.keep
IMAGES = {"data_path", "filter_path", "keep_num"}
# arguments whose value here is the only one that this project has
ONLY = {
    **{"optimizer": "adamw", "norm_in_head": None, "act_in_head": "gelu", "use_bn_in_head": False},
    **{"global_crops_number": 2, "use_masked_im_modeling": True, "window_size": 7},
}


class Rule(NamedTuple):
    """One key of the recipe and the argument that tells it."""

    key: str  # section.key
    argument: str
    convert: Callable[[Any], Any] = lambda value: value


def _listed(value: Any) -> list:
    return list(value) if isinstance(value, list | tuple) else [value]


def _name(arch: str) -> str:
    """vit_small, deit_small, ours_vit_small (ICS) -> timm's name."""
    size = str(arch).rpartition("_")[2]
    if "vit" not in str(arch).replace("deit", "vit") or size not in ARCHITECTURES:
        known = ", ".join(f"vit_{name}" for name in sorted(ARCHITECTURES))
        raise UserError(f"arch = {arch!r} is no Vision Transformer that a recipe can name; known are {known}")
    return f"vit_{size}_patch16_224"


RULES = (
    Rule("seed", "seed"),
    Rule("precision", "use_fp16", lambda half: "bf16" if half else "no"),
    Rule("loader.batch_per_device", "batch_size_per_gpu"),
    Rule("loader.workers", "num_workers"),
    Rule("views.local_count", "local_crops_number"),
    Rule("views.global_scale", "global_crops_scale", _listed),
    Rule("views.local_scale", "local_crops_scale", _listed),
    Rule("masks.ratios", "pred_ratio", _listed),
    Rule("masks.spreads", "pred_ratio_var", _listed),
    Rule("masks.shape", "pred_shape", lambda shape: "random" if shape == "rand" else shape),
    Rule("masks.start_epoch", "pred_start_epoch"),
    Rule("backbone.name", "arch", _name),
    Rule("backbone.patch_size", "patch_size"),
    Rule("backbone.drop_path", "drop_path"),
    Rule("heads.out_dim", "out_dim"),
    Rule("heads.shared", "shared_head"),
    Rule("heads.teacher_shared", "shared_head_teacher"),
    Rule("heads.norm_last_layer", "norm_last_layer"),
    Rule("losses.cls_weight", "lambda1"),
    Rule("losses.patch_weight", "lambda2"),
    Rule("schedules.epochs", "epochs"),
    Rule("schedules.warmup_epochs", "warmup_epochs"),
    Rule("schedules.lr", "lr"),
    Rule("schedules.lr_end", "min_lr"),
    Rule("schedules.weight_decay", "weight_decay"),
    Rule("schedules.weight_decay_end", "weight_decay_end"),
    Rule("schedules.momentum", "momentum_teacher"),
    Rule("schedules.teacher_temperature_start", "warmup_teacher_temp"),
    Rule("schedules.teacher_temperature", "teacher_temp"),
    Rule("schedules.teacher_temperature_epochs", "warmup_teacher_temp_epochs"),
    Rule("schedules.freeze_last_layer_epochs", "freeze_last_layer"),
    Rule("optim.clip", "clip_grad", lambda longest: longest or None),
    Rule("checkpoint.teacher_every_epochs", "saveckp_freq", lambda every: every or 20),
)
TEMPERATURES = {"warmup_teacher_patch_temp": "warmup_teacher_temp", "teacher_patch_temp": "teacher_temp"}


def keys_of(settings: Mapping[str, Any], grid: tuple[int, int]) -> tuple[dict[str, tuple[Any, str]], dict[str, str]]:
    """section.key -> (value, where it comes from), and argument -> why it has no place.

    settings: arguments of the training. grid: rows, columns of patches of its position embeddings.
    """
    keys = {
        rule.key: (rule.convert(settings[rule.argument]), rule.argument) for rule in RULES if rule.argument in settings
    }
    for key, extra in _combined(settings, grid).items():
        keys[key] = extra
    used = {rule.argument for rule in RULES} | {"height", "width", "crop_height", "crop_width", "world_size"}
    homeless = {}
    for name, value in settings.items():
        if name in used or (name in ONLY and value == ONLY[name]):
            continue
        if name in TEMPERATURES:
            if value != settings.get(TEMPERATURES[name], value):
                homeless[name] = "one temperature serves CLS and patch tokens here"
        elif name == "patch_out_dim":
            if value != settings.get("out_dim", value):
                homeless[name] = "heads.out_dim serves CLS and patch tokens"
        elif name in ONLY:
            homeless[name] = f"only {ONLY[name]!r} exists here"
        elif name in IMAGES:
            homeless[name] = "which images: see loader.shards and loader.keep"
        elif name not in MACHINE:
            homeless[name] = "unknown to this recipe: look whether it matters"
    return keys, homeless


def _combined(settings: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, tuple[Any, str]]:
    """The keys that follow from several arguments, or from their absence."""
    keys: dict[str, tuple[Any, str]] = {}
    processes, share, patch = (settings.get(name) for name in ("world_size", "batch_size_per_gpu", "patch_size"))
    if isinstance(processes, int) and isinstance(share, int):
        batch = processes * share
        keys["loader.batch"] = batch, f"{processes} processes with {share} each"
        if isinstance(settings.get("lr"), float):  # none of them has a cap
            keys["schedules.lr_cap"] = settings["lr"] * batch / 256, "not capped there: lr x batch / 256"
    ratios, spreads = (_listed(settings.get(name, 0)) for name in ("pred_ratio", "pred_ratio_var"))
    if "pred_ratio" in settings and len(spreads) == 1 < len(ratios):
        keys["masks.spreads"] = spreads * len(ratios), "pred_ratio_var, for each ratio"
    sizes = [settings.get(name) for name in ("height", "width", "crop_height", "crop_width")]
    own_sizes = None not in sizes
    if own_sizes:
        keys["views.global_size"] = sizes[:2], "height, width"
        keys["views.local_size"] = sizes[2:], "crop_height, crop_width"
    elif isinstance(patch, int):
        keys["views.global_size"] = [side * patch for side in grid], "the position embeddings"
        if grid[0] == grid[1]:
            keys["views.local_size"] = [STOCK_LOCAL, STOCK_LOCAL], "fixed in the code of DINO and iBOT"
    if own_sizes or grid[0] == grid[1]:
        keys["views.ratio"] = STOCK_RATIO, "fixed in their code, torchvision's default"
    if str(settings.get("arch", "")).startswith("ours_vit"):
        keys["backbone.stem"] = "ics", "arch"
    if "lambda2" not in settings and "pred_ratio" not in settings:
        keys["losses.patch_weight"] = 0.0, "DINO: no argument of a MIM term in the file"
    return keys


# keys that only `_combined` knows, each with what would have told it
COMBINED = {
    "loader.batch": "world_size and batch_size_per_gpu",
    "schedules.lr_cap": "world_size and batch_size_per_gpu",
    "views.global_size": "height and width",
    "views.local_size": "crop_height and crop_width",
    "views.ratio": "the range of width / height of a crop",
}


def recipe_text(settings: Mapping[str, Any], grid: tuple[int, int], source: str, name: str, registers: int = 0) -> str:
    """The recipe. source: the file, for its header. name: of the recipe. registers: of the backbone. UserError when
    there are no arguments."""
    if not settings:
        raise UserError(f"{source} stores no arguments of its training (`args`); no recipe can be made from it")
    keys, homeless = keys_of(settings, grid)
    keys |= {"backbone.registers": (registers, "the weights")} if registers else {}
    lines = [
        f"# Source: the arguments stored in {source}. Keys that it does not tell are comments: their defaults hold.",
        f"# Command: accelerate launch pretrain/run.py --recipe {name}.yaml --out runs/{name}",
        "# Hardware: not measured yet. Expected: what the authors of the file report for it. Not reproduced yet.",
    ]
    lines += [f"# no place: {_word(name)} = {_plain(settings[name])} ({why})" for name, why in homeless.items()]
    lines += [f"# no place, of the machine: {', '.join(sorted(MACHINE & {*settings}))}"]
    sections: dict[str, list[str]] = {"": [], "loader": ["shards: [data/mine]  # yours"]}
    for key, argument in {**{rule.key: rule.argument for rule in RULES}, **COMBINED, **dict.fromkeys(keys, "")}.items():
        section, _, last = key.rpartition(".")
        if key in keys:
            value, origin = keys[key]
            line = f"{last}: {_plain(value)}  # {origin}"
        else:
            line = f"# {key}: {argument} is not in the file: default"
        sections.setdefault(section, []).append(line)
    sections.setdefault("optim", []).append("clip_by: parameter  # fixed in their code")
    for section, own in sections.items():
        told = section and any(not line.startswith("#") for line in own)
        lines += [f"{section}:", *(f"  {line}" for line in own)] if told else own
    return "\n".join(lines) + "\n"


def _plain(value: Any) -> str:
    """A value of an argument on one line; of JSON, which is YAML as well."""
    return json.dumps(value, default=repr)[:200]


def _word(name: str) -> str:
    """The name of an argument on one line."""
    return " ".join(str(name).split())[:60]
