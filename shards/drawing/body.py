"""The body: the skeleton of `pose.py`, dressed, drawn from back to front. Lengths are shares of the body height."""

import math
from dataclasses import replace

from shards.drawing.accessories import draw_back_hair, draw_backpack, draw_bag, draw_head, draw_strap
from shards.drawing.canvas import Canvas, Place, Ring, cut, mix
from shards.drawing.people import Colour, Person
from shards.drawing.pose import ANKLE, Pose, arm, leg


def _chest(p: Person, hem: float) -> list[Ring]:
    """The trunk from the collar to the hem of the upper garment."""
    w = p.width
    shoulder, waist, hip = (0.93 * w, 0.9 * w, 1.03 * w) if p.woman else (1.04 * w, w, 0.98 * w)
    thick = 0.009 if p.top in ("jacket", "coat", "hoodie") else 0.003
    if p.top in ("jacket", "coat", "hoodie", "sweater"):
        waist = 0.5 * (waist + hip)
    rings = [
        Ring(0.853, 0.04, 0.042, -0.006),
        Ring(0.837, 0.082 * shoulder, 0.05, -0.008),
        Ring(0.818, 0.112 * shoulder + thick, 0.058, -0.006),
        Ring(0.785, 0.121 * shoulder + thick, 0.068 + thick, 0.0),
        Ring(0.73, 0.112 * shoulder + thick, (0.08 if p.woman else 0.074) + thick, 0.006),
        Ring(0.67, 0.098 * waist + thick, 0.071 * w + thick, 0.003),
        Ring(0.625, 0.09 * waist + thick, 0.068 * w + thick, 0.001),
        Ring(0.57, 0.098 * hip + thick, 0.076 * w + thick, -0.006),
        Ring(0.51, 0.103 * hip + thick, 0.082 * w + thick, -0.008),
    ]
    if hem < 0.5:
        rings.append(Ring(hem, 0.118 * hip, 0.1 * w, 0.0))
    return cut(rings, 0.853, hem)


class _Dresser:
    """Draws one person in one pose; each method draws one layer of the body."""

    def __init__(self, canvas: Canvas, person: Person, pose: Pose):
        self.c, self.p, self.pose = canvas, person, pose
        yaw = canvas.view.yaw
        self.facing = math.cos(yaw)  # 1 the front is seen, -1 the back
        hem = {"coat": 0.33, "dress": 0.34, "jacket": 0.5, "hoodie": 0.51}.get(person.top, 0.52)
        self.hem = hem
        self.rings = _chest(person, hem)
        self.wide = self.rings[3].width - 0.024
        self.legs = {side: leg(pose, side, person) for side in (-1, 1)}
        self.arms = {side: arm(pose, side, person, self.wide) for side in (-1, 1)}

    def draw(self) -> None:
        """All layers, far ones first."""
        lift = min(ankle[1] for _, _, ankle in self.legs.values()) - ANKLE
        self.c.aim(replace(self.c.view, y=self.c.view.y + lift * self.c.view.scale))
        near = [side for side in (-1, 1) if self.c.depth((side, 0, 0)) > 0]
        far_side = -near[0] if near else -1
        behind = self.facing > 0.1
        if behind:
            draw_back_hair(self.c, self.p, self.pose.wind)
            draw_backpack(self.c, self.p)
        self.arm(far_side, 0.84)
        for side in sorted((-1, 1), key=lambda s: self.c.depth(self.legs[s][1]) + 0.3 * self.c.depth((s * 0.1, 0, 0))):
            self.leg(side)
        self.skirt()
        self.neck()
        self.chest()
        draw_strap(self.c, self.p, self.rings)
        if not behind:
            draw_backpack(self.c, self.p)
        draw_head(self.c, self.p, self.pose.nod)
        if not behind:
            draw_back_hair(self.c, self.p, self.pose.wind)
        draw_bag(self.c, self.p, self.arms[1 if self.p.left else -1][2])
        self.arm(-far_side, 1.0)
        if abs(math.sin(self.c.view.yaw)) < 0.5:  # front and back: the other arm hangs beside the trunk, not behind it
            self.arm(far_side, 0.95)

    def leg(self, side: int) -> None:
        """Leg, trousers and shoe."""
        p, c = self.p, self.c
        hip, knee, ankle = self.legs[side]
        light = 1.0 if c.depth((side * 0.1, 0, 0)) >= -0.02 else 0.86
        w = 0.5 * (1 + p.width)
        thin = 0.9 if p.woman else 1.0
        clothed = p.bottom == "trousers"
        shank = p.bottom_colour if clothed else p.skin
        thigh = p.bottom_colour if clothed else p.skin
        loose = 0.006 if clothed else 0.0
        if p.boots and not clothed:
            self.foot(ankle, light)
        c.limb(knee, ankle, (0.036 + loose) * w * thin, (0.023 + 1.5 * loose) * w * thin, shank, light)
        if p.boots and not clothed:
            middle = tuple(0.45 * a + 0.55 * b for a, b in zip(knee, ankle, strict=True))
            c.limb(middle, ankle, 0.036 * w, 0.03 * w, p.shoe_colour, light)
        else:
            self.foot(ankle, light)
        if clothed:
            c.limb(knee, ankle, (0.036 + loose) * w * thin, (0.023 + 1.5 * loose) * w * thin, shank, light)
        c.limb(hip, knee, 0.058 * w, (0.04 + loose) * w * thin, thigh, light)
        if p.bottom == "shorts":
            end = tuple(0.15 * a + 0.85 * b for a, b in zip(hip, knee, strict=True))
            c.limb(hip, end, 0.06 * w, 0.054 * w, p.bottom_colour, light, 0.1)
        if p.side_stripe and abs(c.depth((side, 0, 0))) > 0.25 and c.depth((side, 0, 0)) > 0:
            for a, b in ((hip, knee), (knee, ankle)):
                self.line(a, b, 0.007, p.second_colour)
        kx, ky = c.project(knee)
        s = c.size(0.3) * 0.03
        c.tint([(kx - s, ky + s * 0.3), (kx + s, ky - s * 0.2), (kx + s, ky + s * 0.2)], 0.78 * light)

    def foot(self, ankle: Place, light: float) -> None:
        """Shoe with its sole."""
        lift = min(0.9, max(0.0, (ankle[1] - ANKLE) * 5.0))  # the heel of the rear foot leaves the ground
        heel = (ankle[0], ankle[1] - 0.012, ankle[2] - 0.018)
        toe = (ankle[0] * 1.25, ankle[1] - 0.02 - 0.07 * lift, ankle[2] + 0.092)
        colour = self.p.shoe_colour
        sole = mix(colour, (10, 10, 10), 0.6) if self.p.boots else mix(colour, (205, 202, 195), 0.5)
        low = [(x, y - 0.008, z) for x, y, z in (heel, toe)]
        self.c.limb(low[0], low[1], 0.023, 0.017, sole, light * 0.75)
        self.c.limb(heel, toe, 0.026, 0.019, colour, light)

    def line(self, a: Place, b: Place, half: float, colour: Colour, light: float = 1.0) -> None:
        """A flat strip from a to b."""
        (ax, ay), (bx, by) = self.c.project(a), self.c.project(b)
        dx, dy = bx - ax, by - ay
        k = half * self.c.size(a[1]) / (math.hypot(dx, dy) or 1.0)
        x, y = -dy * k, dx * k
        self.c.fill([(ax + x, ay + y), (bx + x, by + y), (bx - x, by - y), (ax - x, ay - y)], colour, light)

    def skirt(self) -> None:
        """Seat of the trousers, or the skirt with the stride in its hem."""
        p = self.p
        hip = 1.03 * p.width if p.woman else 0.98 * p.width
        top = Ring(0.6, 0.09 * hip, 0.07 * p.width)
        if p.bottom == "skirt":
            reach = 0.245 * math.sin(self.pose.stride * abs(math.sin(self.pose.phase)))
            rings = [top, Ring(0.52, 0.106 * hip, 0.084 * p.width), Ring(0.31, 0.115 * hip, 0.08 + 0.75 * reach)]
            self.c.trunk(rings, p.bottom_colour)
        elif p.bottom != "dress":
            low = Ring(0.48, 0.098 * hip, 0.07 * p.width, -0.004)
            self.c.trunk([top, Ring(0.54, 0.102 * hip, 0.08 * p.width, -0.008), low], p.bottom_colour)

    def neck(self) -> None:
        """Neck, in the shade of the chin."""
        self.c.limb((0, 0.88, 0.004), (0, 0.83, -0.006), 0.029, 0.034, self.p.skin, 0.84)

    def chest(self) -> None:
        """Upper garment with its pattern, opening and folds."""
        p, c, rings = self.p, self.c, self.rings
        c.trunk(rings, p.top_colour)
        self.pattern(rings)
        if p.open_front:
            c.patch(cut(rings, 0.853, max(self.hem, 0.5)), -0.5, 0.5, p.second_colour)
            if self.hem < 0.5 and self.facing > 0:
                c.patch(cut(rings, 0.5, self.hem), -0.42, 0.42, mix(p.bottom_colour, (0, 0, 0), 0.25))
            for edge in (-0.55, 0.5):
                c.patch(rings, edge, edge + 0.06, mix(p.top_colour, (0, 0, 0), 0.35), 0.8)
        elif p.top in ("jacket", "coat"):
            c.patch(rings, -0.03, 0.03, mix(p.top_colour, (0, 0, 0), 0.45))
        elif p.top in ("shirt", "dress", "T-shirt"):
            c.patch(cut(rings, 0.853, 0.839), -1.0, 1.0, p.skin)
        if p.top in ("dress", "coat"):
            c.band(cut(rings, 0.632, 0.612), mix(p.top_colour, (0, 0, 0), 0.4) if p.top == "coat" else p.second_colour)
        for k in range(4):
            y = 0.72 - 0.06 * k
            start = self.pose.wind + 1.9 * k
            c.patch(cut(rings, y, max(y - 0.018, self.hem)), start, start + 0.9, None, 0.84)
        c.patch(cut(rings, min(0.545, self.hem + 0.03), self.hem), -1.5, 1.5, None, 0.85)

    def pattern(self, rings: list[Ring]) -> None:
        """Pattern of the upper garment around the whole trunk; a print sits on the chest only."""
        p, c = self.p, self.c
        if p.pattern == "printed":
            c.patch(cut(rings, 0.765, 0.68), -0.55, 0.55, p.second_colour)
            c.patch(cut(rings, 0.74, 0.705), -0.3, 0.3, p.top_colour)
        elif p.pattern == "two-tone":
            c.band(cut(rings, 0.853, 0.72), p.second_colour)
        elif p.pattern in ("striped", "checked"):
            y, across = 0.83, mix(p.top_colour, p.second_colour, 0.6 if p.pattern == "checked" else 1.0)
            while y > self.hem + 0.01:
                c.band(cut(rings, y, max(self.hem, y - 0.45 * p.period)), across)
                y -= p.period
        if p.pattern in ("checked", "pinstriped"):
            step = p.period * (8.0 if p.pattern == "checked" else 6.0)
            count = max(6, round(math.tau / step))
            for k in range(count):
                start = math.tau * k / count
                c.patch(rings, start, start + 0.42 * math.tau / count, p.second_colour)

    def arm(self, side: int, light: float) -> None:
        """Sleeve, forearm and hand."""
        p, c = self.p, self.c
        shoulder, elbow, wrist = self.arms[side]
        w = 0.5 * (1 + p.width) * (0.9 if p.woman else 1.0)
        loose = 0.005 if p.top in ("jacket", "coat", "hoodie", "sweater") else 0.0
        sleeve = p.second_colour if p.pattern == "two-tone" and not p.open_front else p.top_colour
        upper, lower = (0.034 + loose) * w, (0.027 + loose) * w
        reach = tuple(b + 0.32 * (b - a) for a, b in zip(elbow, wrist, strict=True))
        c.limb(wrist, reach, 0.016 * w, 0.015 * w, p.skin, light)
        cuff = 0.018 * w + (0.8 * loose if p.long_sleeves else 0.0)
        c.limb(elbow, wrist, lower, cuff, sleeve if p.long_sleeves else p.skin, light, 0.3)
        if p.long_sleeves:
            c.limb(shoulder, elbow, upper * 1.06, lower, sleeve, light)
        else:
            half = tuple(0.4 * a + 0.6 * b for a, b in zip(shoulder, elbow, strict=True))
            c.limb(shoulder, elbow, upper, lower, p.skin, light)
            c.limb(shoulder, half, upper * 1.1, upper * 1.15, sleeve, light, 0.1)
        if p.pattern in ("striped", "checked"):
            self.sleeve_stripes(shoulder, elbow, upper, light)
            if p.long_sleeves:
                self.sleeve_stripes(elbow, wrist, lower * 0.9, light)

    def sleeve_stripes(self, a: Place, b: Place, half: float, light: float) -> None:
        """Stripes across a piece of sleeve."""
        p = self.p
        count = max(2, round(math.dist(a, b) * (1.0 if p.long_sleeves else 0.55) / p.period))
        end = 1.0 if p.long_sleeves else 0.55
        for k in range(count):
            t, u = end * k / count, end * (k + 0.45) / count
            start = tuple(x + (y - x) * t for x, y in zip(a, b, strict=True))
            stop = tuple(x + (y - x) * u for x, y in zip(a, b, strict=True))
            (ax, ay), (bx, by) = self.c.project(start), self.c.project(stop)
            dx, dy = bx - ax, by - ay
            s = half * self.c.size(a[1]) / (math.hypot(dx, dy) or 1.0)
            x, y = -dy * s, dx * s
            self.c.paint([(ax + x, ay + y), (bx + x, by + y), (bx - x, by - y), (ax - x, ay - y)], p.second_colour)


def draw_person(canvas: Canvas, person: Person, pose: Pose) -> None:
    """Draw a person as the canvas's view says."""
    _Dresser(canvas, person, pose).draw()
