"""Head, hair, hats and bags: what is put on the body of `body.py`. Lengths are shares of the body height."""

import math
from itertools import pairwise

from shards.drawing.canvas import Canvas, Place, Point, Ring, cut, mix
from shards.drawing.people import Colour, Person

_CENTRE: Place = (0.0, 0.936, 0.01)
_HALF = 0.067  # chin to crown
_OVAL = tuple((math.cos(math.pi * k / 8), math.sin(math.pi * k / 8)) for k in range(16))


class _Head:
    """The head turned by its own angle; positions are shares of its half width and half height, y down."""

    def __init__(self, canvas: Canvas, nod: float):
        self.c = canvas
        self.yaw = canvas.view.yaw + nod
        self.x, self.y = canvas.project(_CENTRE)
        s = canvas.size(_CENTRE[1])
        self.w = math.hypot(0.044 * math.cos(self.yaw), 0.055 * math.sin(self.yaw)) * s
        self.h = _HALF * s

    def point(self, x: float, y: float) -> Point:
        """Pixel of a position on the picture of the head."""
        return self.x + x * self.w, self.y + y * self.h

    def at(self, angle: float, y: float) -> Point | None:
        """Pixel of the place at an angle around the head (0 the nose), None when it is hidden."""
        turned = angle + self.yaw
        if math.cos(turned) < 0.3:
            return None
        return self.point(math.sin(turned) * math.sqrt(max(0.05, 1 - y * y)), y)

    def oval(self, x: float, y: float, w: float, h: float, low: int = 0, high: int = 16) -> list[Point]:
        """Ellipse, or the arc from low to high sixteenths (clockwise from the right)."""
        return [self.point(x + w * _OVAL[k % 16][0], y + h * _OVAL[k % 16][1]) for k in range(low, high)]

    def span(self, half: float, centre: float = 0.0) -> tuple[float, float] | None:
        """Left and right end of the angles centre +- half on the picture, None when hidden."""
        middle = (centre + self.yaw + math.pi) % math.tau - math.pi
        low, high = max(middle - half, -math.pi / 2), min(middle + half, math.pi / 2)
        return (math.sin(low), math.sin(high)) if high - low > 0.05 else None


def draw_head(canvas: Canvas, p: Person, nod: float) -> None:
    """Head with face, hair and hat."""
    head = _Head(canvas, nod)
    hood = p.hat == "hood"
    if hood:
        canvas.fill(head.oval(0, -0.02, 1.34, 1.2), p.top_colour)
        canvas.tint(head.oval(0.5 * canvas.lit, 0, 0.8, 1.1), 0.8)
    bare = p.hair == "bald" and not hood
    back = p.skin if bare else mix(p.top_colour, (0, 0, 0), 0.3) if hood else p.hair_colour
    volume = {"curly": 1.2, "long": 1.1, "short": 1.05, "ponytail": 1.04, "bun": 1.04}.get(p.hair, 1.0)
    volume = 1.0 if hood else volume
    canvas.fill(head.oval(0, -0.04, volume, 1.0 + 0.45 * (volume - 1)), back, 1.0)
    if p.hair == "curly" and not hood:
        for k in range(9, 17):
            canvas.fill(head.oval(_OVAL[k % 16][0] * 1.05, _OVAL[k % 16][1] * 0.95 - 0.05, 0.28, 0.24), back)
    canvas.tint(head.oval(0.62 * canvas.lit, 0.05, 0.42, 0.85), 0.8)
    canvas.tint(head.oval(-0.35 * canvas.lit, -0.6, 0.35, 0.25), 1.2)
    _nape(head, p)
    _face(head, p)
    if p.hair == "bun" and p.hat != "hood":
        canvas.ball((0.0, 0.995, -0.035), 0.024, 0.022, mix(p.hair_colour, (0, 0, 0), 0.15))
    if p.hat in ("cap", "beanie"):
        _hat(head, p)


def _box(x: float, y: float, half: float, top: float, bottom: float) -> list[Point]:
    """A small box around (x, y), a little narrower below."""
    return [(x - half, y + top), (x + half, y + top), (x + 0.85 * half, y + bottom), (x - 0.85 * half, y + bottom)]


def _nape(head: _Head, p: Person) -> None:
    """Skin of the neck below short hair, seen from behind."""
    span = head.span(1.2, math.pi)
    if span and p.hair in ("short", "bun", "ponytail") and p.hat != "hood":
        left, right = span
        middle, half = 0.5 * (left + right), 0.5 * (right - left)
        head.c.paint(head.oval(middle, 0.78, half * 0.62, 0.34), mix(p.skin, (0, 0, 0), 0.12))


def _face(head: _Head, p: Person) -> None:
    """Face with eyes, brows, nose, mouth, ear, beard and glasses, as far as it is turned to the camera."""
    c, span = head.c, head.span(1.12)
    ear = head.at(math.pi / 2, 0.1) or head.at(-math.pi / 2, 0.1)
    if span and span[1] - span[0] < 0.2:
        span = None  # a sliver at the rim of the head
    if span:
        left, right = span
        middle, half = 0.5 * (left + right), 0.5 * (right - left)
        brow = -0.5 if p.hair != "bald" else -0.8
        face = [head.point(middle + half * 0.98 * x, 0.24 + 0.76 * y) for x, y in (_OVAL[k] for k in range(0, 9))]
        face += [head.point(middle - half * 0.96, -0.1), head.point(middle - half * 0.7, brow)]
        face += [head.point(middle + half * 0.7, brow), head.point(middle + half * 0.96, -0.1)]
        c.fill(face, p.skin)
        cheek = ((0.45, -0.45), (0.95, -0.1), (0.8, 0.7), (0.45, 0.92))
        c.tint([head.point(middle + half * f * c.lit, y) for f, y in cheek], 0.8)
        c.tint(head.oval(middle, 0.86, half * 0.5, 0.12), 0.88)
    if ear and p.hair not in ("long", "curly") and p.hat not in ("hood", "beanie"):
        x, y = ear
        s = 0.1 * head.h
        c.fill(_box(x, y, s, -s, 1.3 * s), mix(p.skin, (60, 30, 25), 0.15), 0.8)
    if span is None:
        return
    if p.beard:
        beard = mix(p.hair_colour, p.skin, 0.25)
        jaw = [head.point(middle + half * 0.98 * x, 0.24 + 0.78 * y) for x, y in (_OVAL[k] for k in range(0, 9))]
        c.paint([*jaw, head.point(middle - half * 0.45, 0.42), head.point(middle + half * 0.45, 0.42)], beard)
    dark = (36, 28, 28)
    for angle in (-0.45, 0.45):
        eye = head.at(angle, 0.0)
        if eye:
            x, y = eye
            s = 0.1 * head.h
            if p.glasses:
                c.paint(_box(x, y, 2 * s, -s, 1.2 * s), dark)
            c.paint(_box(x, y, 1.2 * s, -0.5 * s, 0.6 * s), dark)
            c.paint(_box(x, y, 1.5 * s, -1.9 * s, -1.2 * s), mix(p.hair_colour, p.skin, 0.35))
    for y, w, h, colour in ((0.3, 0.09, 0.16, (60, 30, 20)), (0.58, 0.26, 0.06, (132, 52, 48))):
        spot = head.at(0.0, y)
        if spot:
            x, v = spot
            a, b = w * head.w, h * head.h
            c.paint(_box(x, v, a, -0.4 * b, b), mix(p.skin, colour, 0.3 if y < 0.5 else 0.65))


def _hat(head: _Head, p: Person) -> None:
    """Cap with its peak, or beanie with its rim."""
    c, beanie = head.c, p.hat == "beanie"
    edge = 0.0 if beanie else -0.32
    dome = head.oval(0, edge, 1.13, 1.15 + edge + (0.12 if beanie else 0.0), 8, 17)
    c.fill(dome, p.hat_colour)
    c.tint(head.oval(0.6 * c.lit, edge - 0.4, 0.5, 0.4), 0.8)
    rim = 0.2 if beanie else 0.1
    band = [head.point(x, edge + y) for x, y in ((1.15, -rim), (1.15, 0.08), (-1.15, 0.08), (-1.15, -rim))]
    c.paint(band, mix(p.hat_colour, (0, 0, 0) if sum(p.hat_colour) > 200 else (255, 255, 255), 0.2))
    span = head.span(0.95)
    if not beanie and span:
        left, right = span
        out = math.sin(head.yaw) * 0.75
        peak = [head.point(left, edge), head.point(right, edge)]
        drop = 0.2 + 0.14 * max(0.0, math.cos(head.yaw))
        peak += [head.point(right + out, edge + drop * 0.7), head.point(0.5 * (left + right) + out, edge + drop)]
        peak.append(head.point(left + out, edge + drop * 0.7))
        c.fill(peak, mix(p.hat_colour, (0, 0, 0), 0.2), 0.85)


def draw_back_hair(canvas: Canvas, p: Person, wind: float) -> None:
    """Long hair or a ponytail behind the neck."""
    if p.hat == "hood":
        return
    sway = 0.012 * math.sin(wind)
    if p.hair == "long":
        rings = [Ring(0.95, 0.05, 0.03, -0.024), Ring(0.87, 0.054, 0.026, -0.03), Ring(0.81, 0.052, 0.022, -0.05, sway)]
        canvas.trunk([*rings, Ring(0.755, 0.044, 0.014, -0.06, 1.5 * sway)], p.hair_colour)
    elif p.hair == "ponytail":
        canvas.limb((0, 0.945, -0.055), (sway, 0.83, -0.082), 0.02, 0.011, mix(p.hair_colour, (0, 0, 0), 0.12))


def draw_backpack(canvas: Canvas, p: Person) -> None:
    """Backpack with pocket and flap, behind the trunk."""
    if p.bag != "backpack":
        return
    z, dark = -0.105, mix(p.bag_colour, (0, 0, 0), 0.35)
    rings = [Ring(0.825, 0.05, 0.03, z + 0.02), Ring(0.8, 0.082, 0.05, z), Ring(0.66, 0.088, 0.058, z)]
    rings.append(Ring(0.595, 0.078, 0.045, z))
    canvas.trunk(rings, p.bag_colour)
    canvas.patch(cut(rings, 0.76, 0.748), math.pi - 1.4, math.pi + 1.4, dark)
    canvas.patch(cut(rings, 0.7, 0.615), math.pi - 0.75, math.pi + 0.75, mix(p.bag_colour, (0, 0, 0), 0.18))
    canvas.patch(cut(rings, 0.7, 0.69), math.pi - 0.75, math.pi + 0.75, dark, 0.8)


def _across(canvas: Canvas, rings: list[Ring], start: Point, end: Point, half: float, colour: Colour) -> None:
    """A strap over the trunk from (angle, height) to (angle, height), half of its width in body heights."""
    (a, y), (turn, drop) = start, (end[0] - start[0], end[1] - start[1])
    points = [canvas.surface(rings, a + turn * k / 8, y + drop * k / 8) for k in range(9)]
    s = half * canvas.size(0.7)
    for a, b in pairwise(points):
        if a and b:
            canvas.paint([(a[0] - s, a[1]), (a[0] + s, a[1]), (b[0] + s, b[1]), (b[0] - s, b[1])], colour)


def draw_strap(canvas: Canvas, p: Person, rings: list[Ring]) -> None:
    """Straps of a backpack over the shoulders, or of a shoulder bag across the trunk."""
    colour = mix(p.bag_colour, (0, 0, 0), 0.3)
    if p.bag == "backpack":
        for middle in (-0.62, 0.62):
            _across(canvas, rings, (middle, 0.845), (middle * 1.5, 0.66), 0.012, colour)
    elif p.bag == "shoulder bag":
        side = 1.0 if p.left else -1.0
        _across(canvas, rings, (-0.6 * side, 0.845), (1.2 * side, 0.56), 0.011, colour)
        _across(canvas, rings, (math.pi + 0.6 * side, 0.845), (math.pi - 1.2 * side, 0.56), 0.011, colour)


def draw_bag(canvas: Canvas, p: Person, wrist: Place) -> None:
    """Shoulder bag at the hip, or handbag below the hand."""
    side = 1.0 if p.left else -1.0
    dark = mix(p.bag_colour, (0, 0, 0), 0.3)
    if p.bag == "shoulder bag":
        x = side * 0.135 * p.width
        hidden = canvas.depth((x, 0, 0)) < -0.07
        if hidden:
            return
        rings = [Ring(0.575, 0.036, 0.07, 0, x), Ring(0.55, 0.042, 0.078, 0, x), Ring(0.455, 0.042, 0.08, 0, x)]
        canvas.trunk(rings, p.bag_colour)
        canvas.band(cut(rings, 0.53, 0.52), dark)
    elif p.bag == "handbag":
        x, y, z = wrist[0], wrist[1] - 0.05, wrist[2]
        for end in (-0.045, 0.045):
            a, b = canvas.project((x, y, z)), canvas.project((x, y - 0.06, z + end))
            s = 0.006 * canvas.size(0.4)
            canvas.paint([(a[0] - s, a[1]), (a[0] + s, a[1]), (b[0] + s, b[1]), (b[0] - s, b[1])], dark)
        rings = [Ring(y - 0.05, 0.026, 0.05, z, x), Ring(y - 0.075, 0.034, 0.068, z, x)]
        rings.append(Ring(y - 0.15, 0.036, 0.075, z, x))
        canvas.trunk(rings, p.bag_colour)
        canvas.band(cut(rings, y - 0.09, y - 0.1), dark)
