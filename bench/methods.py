"""One training step of a method beside BoT's, on the same backbone and the same images.

    python bench/methods.py                                   AlignedReID, MDPR and text search on ViT-S/16, float32
    python bench/methods.py --batch 64 --precision bf16 --device cuda
    python bench/methods.py method.fusion.width=512 --methods mdpr

Forward, losses, backward and the step of the optimiser, with the settings of the recipes for ViT teachers; images are
random, sentences have 25 of 4,000 words. Loading is left out: a random patch of MDPR costs a second image there.
`ratio` is BoT's time / the method's: below 1 the method is slower. One line for each method.
"""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pairs
import torch

from finetune import backbones
from finetune.config import FinetuneConfig
from finetune.methods import build
from finetune.methods.base import ImageBatch, Method, Parts
from finetune.optim import build_optimizer
from recipes.load import load, recipe_path

RECIPES = {"bot": "bot_market1501", "aligned": "aligned_market1501", "mdpr": "mdpr_market1501_vits",
           "text_search": "text_search_cuhk_pedes"}  # fmt: skip
GIVEN = {"text_search": ["method.word_table={kind: random, dim: 512}"]}  # instead of a table from CLIP's file
SIZE, CLASSES = (256, 128), 751
WORDS, LENGTH = 4000, 25


def captions() -> list[tuple[str, ...]]:
    """Sentences that have every word twice, so that none is rare."""
    words = [f"word{chr(97 + n % 26)}{chr(97 + n // 26 % 26)}{chr(97 + n // 676)}" for n in range(WORDS)]
    return [(" ".join(words[at : at + LENGTH]),) * 2 for at in range(0, WORDS, LENGTH)]


class Step:
    """A method and its optimiser on one batch."""

    def __init__(self, name: str, given: argparse.Namespace):
        config = load(
            FinetuneConfig,
            str(recipe_path("finetune") / f"{RECIPES[name]}.yaml"),
            [*GIVEN.get(name, []), *([] if name == "bot" else given.overrides)],
        )
        device, rng = torch.device(given.device), np.random.default_rng(0)
        torch.manual_seed(0)
        wanted = config.backbone.model_copy(update={"name": given.backbone})
        backbone = backbones.build(backbones.arguments_of(wanted, SIZE), wanted.drop_path)
        parts = Parts(backbone, CLASSES, 0, config.sampling, 0, captions)
        self.method: Method = build(config.method, parts).to(device).train()
        self.optimisers = [build_optimizer(part, config.optim) for part in self.method.optimisers()]
        self.device, self.bf16 = device, given.precision == "bf16"
        images = torch.from_numpy(rng.standard_normal((given.batch, 3, *SIZE), dtype=np.float32)).to(device)
        labels = torch.arange(given.batch, device=device) // 4
        drops = torch.from_numpy(rng.random((given.batch, self.method.draws), dtype=np.float32))
        words = torch.from_numpy(rng.integers(1, WORDS, (given.batch, LENGTH))).to(device)
        self.batch = ImageBatch(images, labels, drops, torch.zeros_like(labels), words)

    def __call__(self) -> None:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            losses = self.method(self.batch)
        sum(losses.values()).backward()
        for optimiser in self.optimisers:
            optimiser.step()
            optimiser.zero_grad()
        self.method.end_step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def repeated(step: Callable[[], None], times: int) -> Callable[[], None]:
    """Several steps as one."""

    def work() -> None:
        for _ in range(times):
            step()

    return work


def main() -> None:
    """Time each method in turns with BoT; print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [name for name in RECIPES if name != "bot"]
    parser.add_argument("--methods", nargs="+", choices=others, default=others)
    parser.add_argument("--backbone", default="vit_small_patch16_224", help="a ViT of timm")
    parser.add_argument("--batch", type=int, default=16, help="images, four of each person")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=2, help="in a round")
    parser.add_argument("--precision", choices=("float32", "bf16"), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="change the recipe, not BoT's")
    parser.add_argument("--json", type=Path, metavar="FOLDER", help="write METHOD.json there, too")
    given = parser.parse_intermixed_args()
    bot, gpu = Step("bot", given), None
    if bot.device.type == "cuda":
        gpu = torch.cuda.get_device_name(bot.device)
    threads = int(os.environ.get("OMP_NUM_THREADS", os.cpu_count() or 1))
    for name in given.methods:
        step = Step(name, given)
        pair = pairs.Pair(repeated(step, given.steps), repeated(bot, given.steps), given.rounds)
        millions = [round(sum(p.numel() for p in one.method.parameters()) / 1e6, 1) for one in (step, bot)]
        told = {"size": f"{given.backbone}, {given.batch} images of {SIZE[0]} x {SIZE[1]}, {given.precision}",
                "million_weights": millions[0], "million_weights_of_bot": millions[1]}  # fmt: skip
        file = given.json / f"{name}.json" if given.json else None
        numbers = pair.numbers(1 / given.steps)
        pairs.report(f"methods: {name}", numbers, "s a step", pair.peak_mb, threads, gpu, file, **told)


if __name__ == "__main__":
    main()
