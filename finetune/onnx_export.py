"""A model as an ONNX file that trackers and runtimes take: any batch, one input, one L2-normalised feature an image."""

import contextlib
import io
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from finetune import models
from finetune.augment import Augment, AugmentConfig
from finetune.plain_forward import IMAGENET, Input, PlainEmbedder
from recipes.errors import UserError
from shards.sources import figures

OPSET = 18  # of ONNX: read by onnxruntime since 1.14 and by TensorRT since 8.6
COSINE = 0.9999  # with the features of torch, of every image of the check
BATCHES = (1, 3, 8)  # images of the check; the model was traced with two


class Written(NamedTuple):
    """What was written and how well it agrees with torch."""

    path: Path
    cosine: dict[str, float]  # lowest with torch's features: "random", "drawn" images
    facts: dict[str, str]  # metadata in the file


def libraries() -> tuple[Any, Any]:
    """onnx and onnxruntime. UserError where they are not installed."""
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401  torch's exporter needs it
    except ImportError as error:
        raise UserError(f"--to onnx needs {error.name}: pip install 'personssl[onnx]'") from error
    return onnx, onnxruntime


def prepared_as(augment: AugmentConfig, prepared: Input) -> tuple[list[float], list[float]]:
    """Mean and std with which an image in 0..255 is normalised before the model sees it; of R, G, B in 0..255."""
    if prepared == "pixels":
        return [0.0] * 3, [1.0] * 3
    mean, std = IMAGENET if prepared == "imagenet" else (augment.mean, augment.std)
    return [255 * value for value in mean], [255 * value for value in std]


def write(
    path: Path, model: nn.Module, augment: AugmentConfig, stored: Mapping[str, Any], title: str, prepared: Input
) -> Written:
    """Export, check against torch, and only then put the file in its place.

    stored: the model's config.json; its calibration goes along. title: in the metadata. UserError where the file does
    not give torch's features.
    """
    onnx, onnxruntime = libraries()
    model = model.cpu().eval()
    plain = PlainEmbedder(model, {"mean": augment.mean, "std": augment.std}, prepared)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    try:
        _traced(plain, augment, partial)
        session = onnxruntime.InferenceSession(str(partial), providers=["CPUExecutionProvider"])
        cosine = agreement(session, model, augment, prepared)
        if not min(cosine.values()) >= COSINE:  # also where it is no number
            told = ", ".join(f"{value:.6f} on {kind} images" for kind, value in cosine.items())
            raise UserError(
                f"the ONNX file does not give the features of the model (cosine {told}); nothing is written"
            )
        facts = _facts(model, augment, stored, title, prepared)
        content = onnx.load(partial)
        onnx.helper.set_model_props(content, facts)
        onnx.checker.check_model(content)
        onnx.save(content, partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return Written(path, cosine, facts)


def _traced(plain: PlainEmbedder, augment: AugmentConfig, path: Path) -> None:
    """The file of torch's exporter, with the number of images left open."""
    example = torch.zeros(2, 3, *augment.size)
    batch = {"images": {0: torch.export.Dim("batch", min=1)}}
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):  # it talks to its developers
        warnings.simplefilter("ignore")
        torch.onnx.export(
            plain,
            (example,),
            path,
            dynamo=True,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["features"],
            dynamic_shapes=batch,
            external_data=False,
            verbose=False,
        )


def views(augment: AugmentConfig, count: int, kind: str) -> Tensor:
    """Images in 0..255, float32 [count, 3, H, W]: "random" pixels, or "drawn" people resized as a test view is."""
    if kind == "random":
        shape = count, 3, *augment.size
        return torch.from_numpy(np.random.default_rng(count).integers(0, 256, shape).astype(np.float32))
    plain = Augment(augment.model_copy(update={"mean": (0.0,) * 3, "std": (1.0,) * 3}))
    config = figures.Config(role="unlabeled", identities=count)
    drawn = [plain.test_view(figures.render(config, pid, pid % config.cameras, 0)) for pid in range(1, count + 1)]
    return torch.from_numpy(np.stack(drawn)) * 255


@torch.no_grad()
def agreement(session: Any, model: nn.Module, augment: AugmentConfig, prepared: Input) -> dict[str, float]:
    """The lowest cosine between the features of an onnxruntime session and of the model, on two kinds of images."""
    found = {}
    own, given = prepared_as(augment, "own"), prepared_as(augment, prepared)
    for kind in ("random", "drawn"):
        lowest = []
        for count in BATCHES:
            pixels = views(augment, count, kind)
            ours, theirs = (
                (pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
                for mean, std in (own, given)
            )
            (features,) = session.run(None, {session.get_inputs()[0].name: theirs.numpy()})
            lowest.append(float((torch.from_numpy(features) * model.embed(ours).float()).sum(dim=1).min()))
        found[kind] = float(np.min(lowest))  # NaN stays NaN
    return found


def _facts(
    model: nn.Module, augment: AugmentConfig, stored: Mapping[str, Any], title: str, prepared: Input
) -> dict[str, str]:
    """What stands in the file's metadata: all of it text."""
    mean, std = prepared_as(augment, prepared)
    calibration = stored.get("calibration") or {}
    facts = {
        **{"title": title, "input": prepared, "height": augment.height, "width": augment.width, "channels": "RGB"},
        **{"mean": [round(value, 4) for value in mean], "std": [round(value, 4) for value in std]},
        **{"pixel_range": [0, 255], "normalised": True, "similarity": "inner product", "opset": OPSET},
        **{"fingerprint": models.fingerprint(model), "source": stored.get("source", title)},
        **({"calibration": calibration, "threshold": calibration.get("threshold")} if calibration else {}),
    }
    return {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
