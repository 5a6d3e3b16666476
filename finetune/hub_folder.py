"""A fine-tuned model as a folder for the Hugging Face Hub: weights, config and a card; every `--ckpt` here takes it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from finetune.augment import AugmentConfig
from pretrain.checkpoint import save_model
from recipes.whole import write_text

CARD = """---
library_name: personssl
pipeline_tag: image-feature-extraction
tags: [person-re-identification, image-retrieval]
---
# {title}

Describes a person crop of {height} x {width} pixels (height x width) by {dim} numbers of length 1: the inner product of
two of them says how alike the people look.

| | |
|---|---|
{facts}

## How to use it

```python
from finetune.extractor import Extractor

features = Extractor("hub:OWNER/NAME")(["crop1.jpg", "crop2.jpg"])  # float32 [2, {dim}]; a folder does as well
```

```sh
python finetune/search.py build --ckpt hub:OWNER/NAME --source crops --out gallery
python finetune/eval.py --ckpt hub:OWNER/NAME --data data/market1501
python finetune/export.py --ckpt hub:OWNER/NAME --to onnx --input imagenet --out model.onnx
```

## Results

{results}

## Intended use and limits

For research on person re-identification: to find the crops of one person among those of one camera network. It was not
trained to identify people by name, and may work less well for people, clothes, cameras and light that its training
images lack. Whoever applies it to people needs a legal basis for it, and must measure its errors on their own images
first.

## Licence

The code that made it is under Apache-2.0. The weights come from images of people, and the terms of these data sets
reach further: LUPerson, Market-1501, MSMT17 and others are for research only. State the licence of the weights before
you publish this folder; none is stated here.
"""
NONE = "None are recorded with the model: `python finetune/eval.py --ckpt ... --data SET` measures them."
NUMBERS = (("mAP", "mAP"), ("rank1", "Rank-1"), ("rank5", "Rank-5"), ("mINP", "mINP"))  # key in results.json, heading


def results_of(run: Path) -> str:
    """The table of the results.json of a run folder, or of those of its test sets; a sentence where there are none."""
    found = []
    for path in sorted([*run.glob("results.json"), *run.glob("*/results.json")]):
        try:
            told = json.loads(path.read_text())
        except (OSError, ValueError):  # of an evaluation under way
            continue
        if not isinstance(told, dict) or not all(isinstance(told.get(key), int | float) for key, _ in NUMBERS):
            continue
        names = told["data"] if isinstance(told.get("data"), list) else [path.parent.name]
        found.append([", ".join(map(str, names)), *(f"{100 * told[key]:.1f}" for key, _ in NUMBERS)])
    if not found:
        return NONE
    head = ["test set", *(heading for _, heading in NUMBERS)]
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, ["---"] * len(head), *found])


def write(
    folder: Path, model: nn.Module, augment: AugmentConfig, stored: Mapping[str, Any], dim: int, run: Path
) -> None:
    """Write model.safetensors, config.json and README.md. stored: the model's config.json. dim: numbers of a feature.
    run: where the results may lie."""
    save_model(folder, model.state_dict(), dict(stored))
    arguments, calibration = stored["timm"], stored.get("calibration") or {}
    facts = {
        "network": arguments["model_name"],
        "method": stored["method"]["name"],
        "identities in training": stored.get("classes"),
        "normalisation": f"mean {list(augment.mean)}, std {list(augment.std)} of R, G, B in 0..1",
        "came from": stored.get("source"),
        "same person at a cosine of": calibration.get("threshold"),
    }
    text = CARD.format(
        **{"title": folder.name, "height": augment.height, "width": augment.width, "dim": dim},
        facts="\n".join(f"| {what} | {value} |" for what, value in facts.items() if value is not None),
        results=results_of(run),
    )
    write_text(folder / "README.md", text)
