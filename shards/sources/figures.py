"""People drawn on the spot: the data set that ships with the project, for the smoke recipes, the tests and the demo.

Every image is a pure function of (seed, identity, camera, shot), so nothing is stored and any number of identities can
be had. Bodies have a pose, clothes, bags and hats; cameras differ; captions say what is drawn. It is no substitute for
photographs: what is measured on it says whether the code works, not how good a method is.
"""

import math
from collections.abc import Iterator
from functools import partial
from typing import Literal

import numpy as np
from PIL import Image
from pydantic import Field

from recipes.errors import UserError
from recipes.load import Section
from shards.drawing.body import draw_person
from shards.drawing.cameras import Camera, camera, encode, expose
from shards.drawing.canvas import Canvas, View
from shards.drawing.people import person, sentence
from shards.drawing.pose import sample_pose
from shards.drawing.scenes import ground_shadow, occluder, over, plain, scenic
from shards.schema import Record
from shards.seeds import generator


class Config(Section):
    """What is drawn and how it is split."""

    seed: int = Field(0, ge=0)  # another seed gives other people and other cameras
    role: Literal["unlabeled", "train", "test", "reid"] = "reid"  # unlabeled: no labels; test: query and gallery;
    # reid: the first train_identities are train, the others query and gallery
    identities: int = Field(200, ge=1)  # in all
    train_identities: int = Field(100, ge=0)  # of them, for training; role reid only
    first_identity: int = Field(0, ge=0)  # identities before this one are left out: pids start at first_identity + 1
    images_per_identity: int = Field(8, ge=1)  # over all cameras, spread evenly
    cameras: int = Field(4, ge=1, le=1000)
    height: int = Field(256, ge=16, le=2048)  # pixels
    width: int = Field(128, ge=8, le=2048)  # pixels
    background: Literal["plain", "scenic"] = "plain"  # a gradient per image, or a street per camera
    backdrop: float = Field(1.0, ge=0, le=1)  # how much the plain background changes from image to image; 0 = one grey
    camera_strength: float = Field(0.5, ge=0, le=1)  # 0 all cameras alike, 1 very different
    variation: float = Field(1.0, ge=0, le=2)  # light, cast, sharpness and place in the box, from image to image
    similar: float = Field(0.5, ge=0, le=1)  # how much identities share the colours of their clothes
    occluders: float = Field(0.0, ge=0, le=1)  # probability that something stands before the person
    misaligned: float = Field(0.0, ge=0, le=1)  # shift and scale of the box, heads and feet cut off


def records(config: Config) -> Iterator[Record]:
    """The images of the set, identity after identity; each is drawn when it is read."""
    _check(config)
    for index in range(config.identities):
        pid = config.first_identity + 1 + index
        for image in range(config.images_per_identity):
            yield _record(config, index, pid, image)


def _check(config: Config) -> None:
    if config.role == "reid" and config.train_identities >= config.identities:
        raise UserError(
            f"figures: train_identities is {config.train_identities}, but there are {config.identities} identities in "
            "all and role reid needs some for query and gallery; lower train_identities or raise identities"
        )
    if config.role in ("test", "reid") and not 2 <= config.cameras < config.images_per_identity:
        raise UserError(
            f"figures: role {config.role} needs at least 2 cameras and more images_per_identity than cameras, so that "
            f"every query has a match; got cameras={config.cameras}, images_per_identity={config.images_per_identity}"
        )


def _record(config: Config, index: int, pid: int, image: int) -> Record:
    # the first camera changes from one identity to the next, so few images still use all cameras
    camid, shot = (pid + image) % config.cameras, image // config.cameras
    read = partial(render_bytes, config, pid, camid, shot)
    if config.role == "unlabeled":
        number = config.first_identity * config.images_per_identity + index * config.images_per_identity + image
        return Record(f"figure-{number:09d}", "unlabeled", read, origin=f"drawn figure {number}")
    name = f"figure-{pid:07d}-c{camid}-{shot:03d}"
    if config.role == "train" or (config.role == "reid" and index < config.train_identities):
        split = "train"
    else:
        again = image + config.cameras < config.images_per_identity  # this camera sees the person once more
        split = "query" if shot == 0 and again else "gallery"
    text = (caption(config, pid, camid, shot),)
    return Record(name, split, read, pid, camid, text, origin=f"drawn figure {pid}, camera {camid}, shot {shot}")


def _view(config: Config, cam: Camera, tall: float, g: np.random.Generator) -> View:
    """Where the person stands before the camera in this image."""
    way = cam.facing if g.random() < cam.habit else g.integers(4) * math.pi / 2
    jitter = np.clip(g.normal(0, 1, 4), -2, 2)
    cut = np.clip(g.normal(0, 1, 3), -1.5, 1.5) * config.misaligned
    v = config.variation
    upright = math.cos(cam.elevation) + 0.06 * math.sin(cam.elevation)
    scale = config.height * cam.fill * tall**0.5 * (1 + 0.035 * v * jitter[0]) * math.exp(0.12 * cut[0]) / upright
    middle = 0.5 * config.height * (1 + 0.025 * v * jitter[1] + 0.1 * cut[1])
    return View(
        yaw=float(way + 0.3 * g.normal()),
        elevation=cam.elevation,
        perspective=cam.perspective,
        x=float(config.width * (0.5 + 0.05 * v * jitter[2] + 0.14 * cut[2])),
        y=float(middle + 0.5 * scale * upright - 0.02 * config.height),
        scale=float(scale),
        light=cam.light if v == 0 or g.random() < 0.8 else -cam.light,
    )


def _shot(config: Config, pid: int, camid: int, shot: int) -> tuple[np.random.Generator, Camera, View]:
    g = generator(config.seed, "figures image", pid, camid, shot)
    cam = camera(config.seed, camid, config.camera_strength)
    return g, cam, _view(config, cam, person(config.seed, pid, config.similar).stature, g)


def caption(config: Config, pid: int, camid: int, shot: int) -> str:
    """The sentence of an image; the image need not be drawn for it."""
    _, _, view = _shot(config, pid, camid, shot)
    words = generator(config.seed, "figures words", pid, camid, shot)
    who = person(config.seed, pid, config.similar)
    return sentence(who, math.cos(view.yaw) > 0.25, view.y < 1.02 * config.height, words)


def render(config: Config, pid: int, camid: int, shot: int) -> Image.Image:
    """Draw an image: RGB, height x width of the config, before JPEG."""
    g, cam, view = _shot(config, pid, camid, shot)
    w, h = config.width, config.height
    canvas = Canvas(w, h)
    canvas.aim(view)
    draw_person(canvas, person(config.seed, pid, config.similar), sample_pose(g))
    back = plain(w, h, config.backdrop, g) if config.background == "plain" else scenic(config.seed, camid, w, h, g)
    back = back * ground_shadow(w, h, view.x, view.y, view.scale, -view.light * g.uniform(0, 1))[..., None]
    if g.random() < config.occluders:
        _occluder(canvas, config, pid, view, g)
    colours, cover = over(canvas.colour, canvas.shade, cam.depth)
    return expose(back * (1.0 - cover) + colours, cam, config.variation, g)


def _occluder(canvas: Canvas, config: Config, pid: int, view: View, g: np.random.Generator) -> None:
    """Draw a pole, a car bonnet, a bush or a passer-by before the person."""
    kind = ("pole", "car", "bush", "passer-by")[int(g.integers(4))]
    if kind != "passer-by":
        canvas.cover(occluder(kind, config.width, config.height, g))
        return
    side = float(g.choice((-1.0, 1.0)))
    near = view.scale * g.uniform(1.05, 1.3)
    place = view.x + side * config.width * g.uniform(0.4, 0.62)
    changes = {"yaw": float(g.uniform(0, math.tau)), "x": place, "scale": near, "y": view.y + 0.5 * (near - view.scale)}
    canvas.aim(View(**{**vars(view), **changes}))
    other = pid + 1 + int(g.integers(1000))  # any other identity; the colours of neighbours are the hardest
    draw_person(canvas, person(config.seed, other, config.similar), sample_pose(g))


def render_bytes(config: Config, pid: int, camid: int, shot: int) -> bytes:
    """Draw an image and encode it as JPEG with the quality of its camera."""
    quality = camera(config.seed, camid, config.camera_strength).quality
    return encode(render(config, pid, camid, shot), quality)
