"""The whole chain on drawn people, on a CPU: pretrain without labels, fine-tune from random weights and the teacher.

    python finetune/demo.py                  about 8 minutes on 2 cores; results in runs/demo
    python finetune/demo.py --seed 1 --out runs/demo1

Every stage is a command that you can run yourself; it is printed before it starts. The recipes are
recipes/shards/demo_*.yaml, recipes/pretrain/demo.yaml and recipes/finetune/demo.yaml.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from finetune import page
from finetune.strips import draw_strips
from recipes.errors import UserError, plain_errors
from recipes.record import environment, write_json
from shards.embeddings import EmbeddingTable
from shards.reader import ShardReader

ROOT = Path(__file__).resolve().parent.parent
COMPARISON = "compare.html"
COLUMNS = ("mAP", "rank1", "rank5", "mINP")
ROWS = {
    "histogram": "colour histograms, no network",
    "direct_random": "random weights, no fine-tuning",
    "direct_teacher": "teacher, no fine-tuning",
    "scratch": "fine-tuned from random weights",
    "pretrained": "fine-tuned from the teacher",
}


def run(title: str, script: str, *arguments: str) -> float:
    """Run one stage as the user would; returns its seconds."""
    command = [script, *arguments]
    print(f"\n== {title}\n   python {shlex.join(command)}", flush=True)
    # two busy threads on two cores: one that waits must not spin, or any other process slows both down
    environ = {"GOMP_SPINCOUNT": "1000", **os.environ}
    start = time.monotonic()
    code = subprocess.run([sys.executable, *command], cwd=ROOT, env=environ).returncode
    if code:
        raise UserError(f"the stage {title!r} failed with exit code {code}; its message stands above")
    return time.monotonic() - start


def stages(out: Path, seed: int) -> dict[str, float]:
    """All stages in order; seconds of each."""
    unlabeled, reid = str(out / "data" / "unlabeled"), str(out / "data" / "reid")
    tune = ["--recipe", "recipes/finetune/demo.yaml", f"benchmark.shards={reid}", f"seed={seed}"]
    teacher = str(out / "pretrain" / "teacher")
    build, drawn = "shards/build.py", f"source.seed={seed}"
    pretrain = ["--recipe", "recipes/pretrain/demo.yaml", f"loader.shards=[{unlabeled}]", f"seed={seed}"]

    def evaluate(title: str, ckpt: str, name: str) -> float:
        return run(title, "finetune/eval.py", "--ckpt", ckpt, *tune, "--out", str(out / name))

    def finetune(title: str, ckpt: str, name: str) -> float:
        return run(title, "finetune/run.py", "--ckpt", ckpt, *tune, "--out", str(out / name))

    return {
        "draw_unlabeled": run("draw unlabeled people", build, "--recipe", "recipes/shards/demo_unlabeled.yaml",
                              "--out", unlabeled, drawn),
        "draw_reid": run("draw labelled people, other identities", build, "--recipe", "recipes/shards/demo_reid.yaml",
                         "--out", reid, drawn),
        "pretrain": run("pretrain without labels", "pretrain/run.py", *pretrain, "--out", str(out / "pretrain")),
        "histogram": evaluate("baseline: colour histograms", "histogram", "histogram"),
        "direct_random": evaluate("random weights as they are", "none", "direct_random"),
        "direct_teacher": evaluate("the teacher as it is", teacher, "direct_teacher"),
        "scratch": finetune("fine-tune from random weights", "none", "scratch"),
        "pretrained": finetune("fine-tune from the teacher, same recipe", teacher, "pretrained"),
        "pictures": run("what the teacher sees", "pretrain/pictures.py", str(out / "pretrain"), reid, "--out",
                        str(out / "pictures")),
        "page": run("the page of the pretraining", "finetune/report.py", str(out / "pretrain"), "--pictures",
                    str(out / "pictures")),
        "comparison": run("the page that compares all models", "finetune/report.py",
                          *(str(out / name) for name in reversed(ROWS)), "--out", str(out / COMPARISON)),
    }  # fmt: skip


def picture(out: Path, names: tuple[str, ...]) -> Path:
    """The same queries searched by several models, one ranked list below the other."""
    tables = {name: [EmbeddingTable.load(out / name / "embeddings" / split) for split in ("query", "gallery")]
              for name in names}  # fmt: skip
    readers = [ShardReader([out / "data" / "reid"], split) for split in ("query", "gallery")]
    panels = [(ROWS[name], *tables[name]) for name in names]
    path = out / "ranked_lists.png"
    draw_strips(path, *readers, panels, list(range(0, len(readers[0]), max(1, len(readers[0]) // 5)))[:5])
    return path


def show(results: dict[str, dict[str, float]]) -> None:
    """One table of all results, in per cent."""
    table = Table(title="retrieval on identities that no training saw (%)")
    table.add_column("")
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, title in ROWS.items():
        table.add_row(title, *(f"{100 * results[name][column]:.1f}" for column in COLUMNS))
    Console().print(table)


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo; default: runs/demo")
    parser.add_argument("--seed", type=int, default=0, help="of the drawn people, the weights and the views")
    given = parser.parse_args()
    out = given.out.resolve()
    if (out / "report.json").exists():
        show(json.loads((out / "report.json").read_text()))
        print(f"{given.out} holds this finished demo; delete the folder, or choose another --out, to run it again")
        return
    seconds = stages(out, given.seed)
    results = {name: json.loads((out / name / "results.json").read_text()) for name in ROWS}
    report = {name: {column: result[column] for column in COLUMNS} for name, result in results.items()}
    facts = environment()
    write_json(out / "report.json", {**report, "seed": given.seed, "seconds": seconds, "versions": facts["versions"],
                                     "environment": facts})  # fmt: skip
    show(report)
    print(f"{sum(seconds.values()) / 60:.1f} minutes in all; report: {given.out / 'report.json'}")
    print(f"pictures: {picture(out, ('scratch', 'pretrained'))}, and what the teacher sees in {out / 'pictures'}")
    print(f"open in a browser: {out / COMPARISON}, {out / 'pretrain' / page.NAME}, {out / 'pretrained' / page.NAME}")


if __name__ == "__main__":
    with plain_errors():
        main()
