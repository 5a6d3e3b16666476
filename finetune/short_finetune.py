"""A short fine-tune of a teacher in a process of its own: what it is worth after training, and not only as it is."""

import hashlib
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pretrain.checkpoint import WEIGHTS
from recipes.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
NUMBERS = ("mAP", "rank1", "rank5", "rank10", "mINP", "average_precision")
SETTINGS = "settings"  # key of the numbers
# set by accelerate and torchrun: the child is a launch of its own
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def digest(folder: Path) -> str:
    """sha256 of the weights of an exported model, hexadecimal."""
    with open(folder / WEIGHTS, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class ShortFinetune:
    """From a teacher to the numbers of finetune/run.py; its run folders lie in `folder`, one a teacher's weights."""

    def __init__(self, recipe: str, overrides: Sequence[str], folder: Path):
        """recipe, overrides: as on the command line of finetune/run.py, the fewer epochs among the overrides."""
        self.recipe, self.overrides, self.folder = recipe, list(overrides), Path(folder)

    def settings(self) -> dict[str, Any]:
        """What the numbers depend on beside the teacher, JSON-able."""
        return {"recipe": self.recipe, "overrides": self.overrides}

    def command(self, ckpt: Path, out: Path) -> list[str]:
        """Arguments of the interpreter."""
        return ["finetune/run.py", "--ckpt", str(ckpt), "--recipe", self.recipe, "--out", str(out), *self.overrides]

    def __call__(self, ckpt: Path) -> dict[str, Any]:
        """Fine-tune and evaluate; a run that was killed goes on. UserError when it fails."""
        # with the weights in its name: those of a pretraining that was started anew are another run
        out = self.folder / f"{ckpt.name}-{digest(ckpt)[:8]}"
        script, *rest = self.command(ckpt, out)
        print(f"fine-tuning: python {shlex.join([script, *rest])}", file=sys.stderr, flush=True)
        environ = {name: value for name, value in os.environ.items() if name not in LAUNCH}
        # close_fds=False: a child that outlives this process keeps its lock on the folder (see follow.py)
        done = subprocess.run([sys.executable, str(ROOT / script), *rest], env=environ, close_fds=False)
        if done.returncode:
            raise UserError(
                f"the short fine-tune of {ckpt} failed with exit code {done.returncode}; its message stands above. "
                "Mend the recipe or leave the fine-tune out; what was scored is kept"
            )
        return self._results(out)

    def _results(self, out: Path) -> dict[str, Any]:
        found = [path for path in [out / "results.json", *sorted(out.glob("*/results.json"))] if path.is_file()]
        if len(found) != 1:
            raise UserError(
                f"{out} holds results of {len(found)} test sets, but teachers are compared by one; give one test set"
            )
        results = json.loads(found[0].read_text(encoding="utf-8"))
        return {**{name: results[name] for name in NUMBERS}, "run": str(out), SETTINGS: self.settings()}
