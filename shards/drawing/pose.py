"""The skeleton in walking pose. Lengths are shares of the body height, after the drawing canon of 7.5 heads."""

import math
from dataclasses import dataclass

import numpy as np

from shards.drawing.canvas import Place
from shards.drawing.people import Person

ANKLE = 0.04  # height of the ankle of a foot that stands on the ground
_HIP, _SHOULDER = 0.525, 0.786
_THIGH, _SHANK, _UPPER_ARM, _FOREARM = 0.245, 0.24, 0.165, 0.15


@dataclass(frozen=True)
class Pose:
    """What the body does in one image. Angles in rad."""

    phase: float  # of the walk
    stride: float  # largest angle of a thigh, 0 stands still
    spread: float  # arms away from the body
    bend: float  # of the elbows
    raised: int  # arm that is bent up (a telephone): -1 right, 1 left, 0 none
    nod: float  # the head turns against the body by this angle
    wind: float  # phase of hair and hem


def sample_pose(g: np.random.Generator) -> Pose:
    """A random pose; most people walk, some stand, some hold a telephone."""
    standing = g.random() < 0.2
    raised = int(g.integers(2)) * 2 - 1 if g.random() < 0.12 else 0
    return Pose(
        phase=float(g.uniform(0, math.tau)),
        stride=float(g.uniform(0.0, 0.1) if standing else g.uniform(0.18, 0.46)),
        spread=float(g.uniform(0.05, 0.2)),
        bend=float(g.uniform(0.1, 0.55)),
        raised=raised,
        nod=float(g.normal(0.0, 0.3)),
        wind=float(g.uniform(0, math.tau)),
    )


def leg(pose: Pose, side: int, person: Person) -> tuple[Place, Place, Place]:
    """Hip, knee and ankle; side 1 is the person's left."""
    phase = pose.phase + (math.pi if side < 0 else 0.0)
    thigh = pose.stride * math.sin(phase) + 0.04
    shank = thigh - 0.06 - 1.5 * pose.stride * max(0.0, math.cos(phase + 0.4))
    x = side * 0.052 * person.width
    knee = (x * 0.95, _HIP - _THIGH * math.cos(thigh), _THIGH * math.sin(thigh))
    return (
        (x, _HIP, 0.0),
        knee,
        (x * 0.85, knee[1] - _SHANK * math.cos(shank), knee[2] + _SHANK * math.sin(shank)),
    )


def arm(pose: Pose, side: int, person: Person, wide: float) -> tuple[Place, Place, Place]:
    """Shoulder, elbow and wrist."""
    swing = -0.75 * pose.stride * math.sin(pose.phase + (math.pi if side < 0 else 0.0))
    bend, spread = pose.bend + 0.5 * max(0.0, swing), pose.spread
    carries = person.bag == "handbag" and (side > 0) == person.left
    raised = pose.raised == side and not carries
    if carries:
        swing, bend = 0.3 * swing, 0.15
    elif raised:
        swing, bend, spread = 0.5, 2.2, 0.15
    x = side * wide
    elbow = (
        x + side * _UPPER_ARM * math.sin(spread),
        _SHOULDER - _UPPER_ARM * math.cos(swing),
        _UPPER_ARM * math.sin(swing),
    )
    lower = swing + bend
    wrist = (
        elbow[0] + side * _FOREARM * math.sin(spread) * (-0.6 if raised else 0.3),
        elbow[1] - _FOREARM * math.cos(lower),
        elbow[2] + _FOREARM * math.sin(lower),
    )
    return (x, _SHOULDER, 0.0), elbow, wrist
