"""Where bodies are drawn: a colour layer and a shading layer, both at twice the size of the image.

Shapes are given in body coordinates: x to the person's left, y up from the ground, z to where the person faces, all
in body heights. Round shapes shade themselves: the shading layer is blurred later, so bands become soft folds of light.
"""

import math
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw

from shards.drawing.people import Colour

OVER = 2  # supersampling
NEUTRAL = 128  # byte of the shading layer that leaves a colour as it is
Point = tuple[float, float]  # pixels of the layers
Place = tuple[float, float, float]  # body coordinates
# light across a round shape, seen from the lit side (-1) to the dark side (1)
_BANDS = ((-1.0, -0.78, 1.02), (-0.78, -0.2, 1.14), (0.25, 0.62, 0.84), (0.62, 1.0, 0.64))
_CAP = tuple((math.cos(a), math.sin(a)) for a in (math.pi * k / 5 for k in range(1, 5)))


@dataclass(frozen=True)
class Ring:
    """A horizontal slice of a trunk: centre (x, y, z), half width and half depth, in body heights."""

    y: float
    width: float
    depth: float
    z: float = 0.0
    x: float = 0.0


@dataclass(frozen=True)
class View:
    """How the body stands before the camera."""

    yaw: float  # rad; 0 faces the camera, pi turns the back to it
    elevation: float  # rad; the camera looks down by this much
    perspective: float  # the top of the body is larger by this share
    x: float  # of the ground point below the body, pixels of the image
    y: float
    scale: float  # pixels of the image for a body height
    light: float  # side that the light comes from: -1 left, 1 right


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """Colour between a (share 0) and b (share 1)."""
    return tuple(round(p + (q - p) * share) for p, q in zip(a, b, strict=True))


def cut(rings: list[Ring], top: float, bottom: float) -> list[Ring]:
    """The part of a trunk between two heights; rings run from top to bottom."""
    kept = [ring for ring in rings if bottom < ring.y < top]
    return [_at(rings, top), *kept, _at(rings, bottom)]


def _at(rings: list[Ring], y: float) -> Ring:
    for high, low in pairwise(rings):
        if high.y >= y >= low.y:
            t = (high.y - y) / max(high.y - low.y, 1e-6)
            return Ring(
                y,
                high.width + (low.width - high.width) * t,
                high.depth + (low.depth - high.depth) * t,
                high.z + (low.z - high.z) * t,
                high.x + (low.x - high.x) * t,
            )
    edge = rings[0] if y > rings[0].y else rings[-1]
    return Ring(y, edge.width, edge.depth, edge.z, edge.x)


class Canvas:
    """The two layers and the projection of body coordinates onto them."""

    def __init__(self, width: int, height: int):
        self.colour = Image.new("RGBA", (width * OVER, height * OVER))
        self.shade = Image.new("L", (width * OVER, height * OVER), NEUTRAL)
        self._ink, self._tint = ImageDraw.Draw(self.colour), ImageDraw.Draw(self.shade)

    def aim(self, view: View) -> None:
        """Set the view of all that is drawn next."""
        self.view = view
        self._cos, self._sin = math.cos(view.yaw), math.sin(view.yaw)
        self._up, self._down = math.cos(view.elevation), math.sin(view.elevation)
        self.lit = 1.0 if view.light < 0 else -1.0  # multiplies the band positions

    def depth(self, place: Place) -> float:
        """How far towards the camera a place is, body heights."""
        return place[2] * self._cos - place[0] * self._sin

    def size(self, y: float) -> float:
        """Pixels of the layers for a body height, at height y."""
        return self.view.scale * OVER * (1.0 + self.view.perspective * (y - 0.5))

    def project(self, place: Place) -> Point:
        """Pixel of the layers for a place."""
        x, y, z = place
        stretch = y + 0.5 * self.view.perspective * y * (y - 1.0)
        near = z * self._cos - x * self._sin
        scale = self.view.scale * OVER
        across = self.view.x * OVER + (x * self._cos + z * self._sin) * self.size(y)
        return across, self.view.y * OVER - (stretch * self._up - near * self._down) * scale

    def fill(self, points: list[Point], colour: Colour, light: float = 1.0) -> None:
        """A flat polygon; light multiplies its colour."""
        self._ink.polygon(points, fill=(*colour, 255))
        self._tint.polygon(points, fill=min(255, int(NEUTRAL * light)))

    def paint(self, points: list[Point], colour: Colour) -> None:
        """A flat polygon that keeps the shading below it."""
        self._ink.polygon(points, fill=(*colour, 255))

    def tint(self, points: list[Point], light: float) -> None:
        """Light or darken what is drawn there."""
        self._tint.polygon(points, fill=min(255, int(NEUTRAL * light)))

    def ball(self, centre: Place, width: float, height: float, colour: Colour, light: float = 1.0, round_: bool = True):
        """An ellipse with half axes in body heights."""
        (x, y), s = self.project(centre), self.size(centre[1])
        a, b = width * s, height * s
        box = (x - a, y - b, x + a, y + b)
        self._ink.ellipse(box, fill=(*colour, 255))
        self._tint.ellipse(box, fill=min(255, int(NEUTRAL * light)))
        if round_:
            rim = ((0.3, -0.95), (0.75, -0.66), (1, 0), (0.7, 0.7), (0.2, 0.98))
            dark = [(x + self.lit * a * c, y + b * d) for c, d in rim]
            self.tint([*dark, (x + self.lit * a * 0.45, y)], 0.78 * light)

    def cover(self, thing: Image.Image) -> None:
        """Put an unshaded RGBA picture of the layers' size over everything."""
        self.colour.alpha_composite(thing)
        self.shade.paste(NEUTRAL, mask=thing.getchannel("A"))

    def limb(self, a: Place, b: Place, ra: float, rb: float, colour: Colour, light: float = 1.0, end: float = 1.0):
        """A rounded, tapered limb from a (radius ra) to b (radius rb), shaded across; end 0 cuts it straight at b."""
        (ax, ay), (bx, by) = self.project(a), self.project(b)
        ra, rb = ra * self.size(a[1]), rb * self.size(b[1])
        dx, dy = bx - ax, by - ay
        length = math.hypot(dx, dy) or 1.0
        ux, uy = dx / length, dy / length
        nx, ny = (uy, -ux) if uy > 0 else (-uy, ux)  # points to the right of the picture
        outline = [(ax + nx * ra, ay + ny * ra)]
        outline += [(ax + ra * (c * nx - s * ux), ay + ra * (c * ny - s * uy)) for c, s in _CAP]
        outline += [(ax - nx * ra, ay - ny * ra), (bx - nx * rb, by - ny * rb)]
        outline += [(bx - rb * (c * nx - s * end * ux), by - rb * (c * ny - s * end * uy)) for c, s in _CAP]
        outline.append((bx + nx * rb, by + ny * rb))
        self.fill(outline, colour, light)
        if length < 0.3 * (ra + rb):
            return
        for low, high, tone in _BANDS:
            p, q = low * self.lit, high * self.lit
            self.tint(
                [
                    (ax + nx * ra * p, ay + ny * ra * p),
                    (ax + nx * ra * q, ay + ny * ra * q),
                    (bx + nx * rb * q, by + ny * rb * q),
                    (bx + nx * rb * p, by + ny * rb * p),
                ],
                tone * light,
            )

    def _rows(self, rings: list[Ring]) -> list[tuple[float, float, float, float]]:
        """(centre x, centre y, half width, sag of the near edge) of each ring, in pixels."""
        rows = []
        for ring in rings:
            x, y = self.project((ring.x, ring.y, ring.z))
            s = self.size(ring.y)
            wide = math.hypot(ring.width * self._cos, ring.depth * self._sin) * s
            deep = math.hypot(ring.width * self._sin, ring.depth * self._cos) * s
            rows.append((x, y, wide, deep * self._down))
        return rows

    def _strip(self, rows: list[tuple[float, float, float, float]], low: float, high: float) -> list[Point]:
        """Outline of the strip from position low to high across a trunk (-1 left edge, 1 right edge)."""
        bow = [(f, math.sqrt(max(0.0, 1.0 - f * f))) for f in (low + (high - low) * k / 4 for k in range(5))]
        top, last = rows[0], rows[-1]
        points = [(top[0] + f * top[2], top[1] + top[3] * near) for f, near in reversed(bow)]
        points += [(x + low * w, y + sag * bow[0][1]) for x, y, w, sag in rows[1:-1]]
        points += [(last[0] + f * last[2], last[1] + last[3] * near) for f, near in bow]
        points += [(x + high * w, y + sag * bow[-1][1]) for x, y, w, sag in rows[-2:0:-1]]
        return points

    def trunk(self, rings: list[Ring], colour: Colour, light: float = 1.0) -> None:
        """A body of elliptic slices (chest, skirt, coat, backpack), shaded across."""
        rows = self._rows(rings)
        self.fill(self._strip(rows, -1.0, 1.0), colour, light)
        for low, high, tone in _BANDS:
            p, q = sorted((low * self.lit, high * self.lit))
            self.tint(self._strip(rows, p, q), tone * light)

    def band(self, rings: list[Ring], colour: Colour) -> None:
        """Colour a whole slice of a trunk that is drawn already, keeping its shading."""
        self._ink.polygon(self._strip(self._rows(rings), -1.0, 1.0), fill=(*colour, 255))

    def patch(self, rings: list[Ring], start: float, end: float, colour: Colour | None, light: float = 0.0) -> bool:
        """Colour (and with light > 0 also tint) a trunk between two angles around the body; 0 is the front.

        Returns False where that part is turned away from the camera.
        """
        centre = (0.5 * (start + end) + self.view.yaw + math.pi) % math.tau - math.pi
        half = 0.5 * (end - start)
        low, high = max(centre - half, -math.pi / 2), min(centre + half, math.pi / 2)
        if high - low < 0.02:
            return False
        points = self._strip(self._rows(rings), math.sin(low), math.sin(high))
        if colour is not None:
            self._ink.polygon(points, fill=(*colour, 255))
        if light:
            self.tint(points, light)
        return True

    def surface(self, rings: list[Ring], angle: float, y: float) -> Point | None:
        """Pixel of the place at an angle around a trunk and height y; None where it is turned away."""
        turned = angle + self.view.yaw
        if math.cos(turned) < 0.0:
            return None
        across, down, wide, sag = self._rows([_at(rings, y)])[0]
        return across + math.sin(turned) * wide, down + math.cos(turned) * sag
