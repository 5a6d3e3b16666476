"""How each command of the documentation is tried: the whole way where a tiny set and a tiny network will do.

    run        the script runs to its end, with the arguments of the page and those of ADDED behind them (small sizes)
    plan       a pretraining, with dry_run=true behind it
    make -n    what make would run; that the scripts exist
    arguments  the script's own parser, and its recipe; for a reason that REASONS tells
    parser     the parser of another program (pip, hf, pytest, ...); for a reason that REASONS tells

A launcher (accelerate, torchrun) reads its options with its own parser and gives the script that it would start.
"""

import argparse
import os
import re
import runpy
import sys
import traceback
from collections.abc import Callable
from itertools import pairwise
from typing import Any, NamedTuple, NoReturn

from docs_commands import ROOT, Command

# the tiny networks of small.py, for recipes of any size
VIT = ["backbone.name=vit_tiny_patch16_224", "backbone.patch_size=8", "backbone.embed_dim=32", "backbone.depth=2",
       "backbone.num_heads=2"]  # fmt: skip
HEAD = ["heads.out_dim=64", "heads.hidden_dim=32", "heads.bottleneck_dim=256"]
CROPS = ["views.global_size=[64,32]", "views.local_size=[32,16]", "loader.batch=16", "loader.batch_per_device=16"]
FINETUNE = [*VIT, "augment.height=64", "augment.width=32", "sampling.identities_per_batch=4",
            "sampling.images_per_identity=2", "optim.epochs=1", "optim.warmup_epochs=0", "benchmark.draw=null",
            "benchmark.workers=0", "benchmark.strips=2", "benchmark.bootstrap=20"]  # fmt: skip
HELD_OUT = ["validation.identities=4", "validation.every_epochs=1"]
REASONS = {
    "pip": "would change the environment that runs the tests",
    "hf": "would publish a folder on the Hub",
    "mkdocs": "serves until it is stopped; the site is built by another test",
    "tensorboard": "serves until it is stopped",
    "pytest": "would run tests inside a test",
    "scontrol": "Slurm is not here",
    "srun": "Slurm is not here; what it starts stands in the list by itself",
    "bench": "takes minutes on an idle machine, or gigabytes",
    "resnet": "a whole ResNet-50 takes a minute an epoch",
    "app": "serves until it is stopped; tests/test_app.py runs it",
}


class Way(NamedTuple):
    """How a command is tried. words: script and arguments, or for `parser` and `make -n` the program's."""

    kind: str
    words: list[str]
    reason: str = ""
    gone: tuple[str, ...] = ()  # what the command makes anew


def _after(words: list[str], option: str) -> list[str]:
    """The values behind an option."""
    return [value for before, value in pairwise(words) if before == option]


def launched(command: Command) -> list[str]:
    """The script that a launcher would start, and its arguments. SystemExit where it refuses an option."""
    program, *rest = command.words
    if program == "torchrun":
        from torch.distributed.run import config_from_args, get_args_parser

        given = get_args_parser().parse_args(rest)
        config_from_args(given)
        return [given.training_script, *given.training_script_args]
    assert rest[0] == "launch", f"{command.told}: which command of accelerate?"
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    given = launch_command_parser().parse_args(rest[1:])
    asked = given.num_processes
    checked, _, _ = _validate_launch_command(given)
    if "--config_file" in rest or asked:  # without one of them it starts what it finds on this machine
        assert checked.num_processes == (asked or checked.num_processes)
        # accelerate starts one process, and does not say so, unless told that there are several devices
        assert checked.num_processes == 1 or checked.multi_gpu, f"{command.told}: starts one process only"
    return [given.training_script, *given.training_script_args]


def _pretrain(words: list[str]) -> Way:
    if any(word.startswith("planning.") for word in words):  # a plan that a page shows: of the real sizes
        return Way("plan", [*words, "dry_run=true"])
    # planning.gpu: else the speed of this CPU would be measured for half a second
    return Way("plan", [*words, *VIT, *HEAD, *CROPS, "planning.gpu=a100", "dry_run=true"])


def _finetune(words: list[str]) -> Way:
    if any("_r50" in word for word in words):
        return Way("arguments", words, REASONS["resnet"])
    text = ["method.word_table={kind: random}"] if any("text_search" in word for word in words) else []
    text += ["method={name: mdpr, dim: 16}"] if any("/mdpr_" in word for word in words) else []
    held_out = HELD_OUT if any(word.startswith("validation.") for word in words) else []
    return Way("run", [*words, *FINETUNE, *held_out, *text], gone=tuple(_after(words, "--out")))


def _evaluate(words: list[str]) -> Way:
    # with --finetune-epochs each teacher is fine-tuned by an interpreter of its own: one will do
    gone = [*_after(words, "--out"), *(["runs/pretrain/teachers"] if "--finetune-epochs" in words else [])]
    small = FINETUNE if "--recipe" in words or "--data" not in words else [w for w in FINETUNE if w.startswith("bench")]
    small = [word for word in small if word != "benchmark.draw=null"] if "--data" in words else small
    follow = ["--poll", "0.1"] if "--follow" in words else []
    short = ["--finetune-epochs", "1"] if "--finetune-epochs" in words else []
    rough = ["benchmark.far=0.1"] if "--calibrate" in words else []
    return Way("run", [*words, *follow, *short, *small, *rough], gone=tuple(gone))


def _build(words: list[str]) -> Way:
    small = ["source.identities=8"] if "figures" in words else []
    if "source.train_identities=100" in words:
        small = [*small, "source.train_identities=4"]
    small = [*small, "source.expect=none"] if any(word.startswith("luperson:") for word in words) else small
    return Way("run", [*words, "packing.workers=1", *small], gone=tuple(_after(words, "--out")))


def _search(words: list[str]) -> Way:
    device = ["--device", "cpu"] if words[1] in ("build", "add", "query") else []
    return Way("run", [*words, *device], gone=tuple(_after(words, "--out")))


def _made(*more: str) -> Callable[[list[str]], Way]:
    """The script as it stands, with more arguments; its --out is new."""
    return lambda words: Way("run", [*words, *more], gone=tuple(_after(words, "--out")))


def _bench(words: list[str]) -> Way:
    return Way("arguments", words, REASONS["bench"])


SCRIPTS: dict[str, Callable[[list[str]], Way]] = {
    "pretrain/run.py": _pretrain,
    "pretrain/choose.py": _made("--images", "64"),
    "pretrain/convert.py": _made(),
    "pretrain/pictures.py": _made("--images", "2"),
    "finetune/run.py": _finetune,
    "finetune/eval.py": _evaluate,
    "finetune/embed.py": _made("--workers", "0"),
    "finetune/cluster.py": _made(),
    "finetune/search.py": _search,
    "finetune/export.py": _made(),
    "finetune/report.py": _made(),
    "finetune/app.py": lambda words: Way("arguments", words, REASONS["app"]),
    "tests/docs_commands.py": lambda words: Way("run", words),
    "shards/build.py": _build,
    "shards/check.py": _made("--workers", "1"),
    "shards/cfs_score.py": _made(),
    "shards/cfs_keep.py": _made(),
}


def way(command: Command) -> Way:
    """How a command is tried. KeyError for a script that nobody has thought of."""
    program, *rest = command.words
    if program in ("accelerate", "torchrun"):
        words = launched(command)
    elif program in ("python", "python3"):
        if rest[0] == "-m":
            return _module(rest[1:])
        words = rest
    elif program == "make":
        # without --assume-old make would really install: it runs lines with $(MAKE) in them also with -n
        return Way("make -n", ["make", "-n", "--assume-old=.venv/.installed", *rest])
    elif program == "ruff":
        return Way("run", list(command.words))
    else:
        return Way("parser", list(command.words), REASONS[program])
    words = [re.sub(r"(?<![\w.])/(?=(?:shared|path)/)", "", word) for word in words]  # below the prepared folder
    return _bench(words) if words[0].startswith("bench/") else SCRIPTS[words[0]](words)


def _module(words: list[str]) -> Way:
    if words[0] == "venv":
        return Way("run", [sys.executable, "-m", "venv", "--without-pip", *words[1:]])
    return Way("parser", words, REASONS[words[0]])


def stopping(parse: Callable[..., Any]) -> Callable[..., NoReturn]:
    """A way to parse that ends the process when all went well."""

    def stop(*given: Any, **named: Any) -> NoReturn:
        parse(*given, **named)
        raise SystemExit(0)

    return stop


def read_arguments() -> NoReturn:
    """Called in the process of a script (tests/forked.py): read its command line, load its recipe, and end."""
    script = sys.argv[0]
    sys.path.insert(0, os.path.dirname(script))
    if not script.startswith(str(ROOT / "bench")):
        runpy.run_path(script, run_name="read")["arguments"]()
        raise SystemExit(0)
    for name in ("parse_args", "parse_intermixed_args"):
        setattr(argparse.ArgumentParser, name, stopping(getattr(argparse.ArgumentParser, name)))
    runpy.run_path(script, run_name="__main__")
    raise AssertionError(f"{script} read no arguments")


def leave_quickly() -> NoReturn:
    """Called in the process of a script in its place: run it, and end without taking the interpreter down, which takes
    longer than most of these commands."""
    status: Any = 0
    sys.path.insert(0, os.path.dirname(sys.argv[0]))
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as exit_:
        status = exit_.code
        if isinstance(status, str):
            print(status, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status if isinstance(status, int) else bool(status))
