"""Who is drawn: the attributes of an identity and the sentence that describes one of its images.

An identity is a pure function of (seed, pid, similar), so it looks the same under every camera and needs no storage.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from shards.seeds import generator

Colour = tuple[int, int, int]  # red, green, blue in [0, 255]

COLOURS: dict[str, Colour] = {
    "black": (34, 34, 38),
    "dark grey": (76, 76, 82),
    "grey": (138, 138, 140),
    "white": (234, 232, 228),
    "red": (188, 34, 40),
    "maroon": (104, 26, 40),
    "orange": (226, 114, 36),
    "yellow": (230, 194, 56),
    "green": (46, 130, 66),
    "olive": (98, 100, 52),
    "teal": (26, 126, 130),
    "blue": (44, 86, 174),
    "navy": (30, 38, 82),
    "light blue": (136, 178, 216),
    "purple": (104, 60, 140),
    "pink": (226, 140, 166),
    "brown": (102, 66, 42),
    "beige": (208, 186, 150),
}
_MUTED = ("black", "dark grey", "grey", "white", "navy", "blue", "brown", "beige")
_UPPER = (*COLOURS, *_MUTED)  # streets are mostly muted: these come twice as often
_LOWER = ("black", "navy", "blue", "grey", "dark grey", "beige", "brown", "olive", "white", "light blue", "maroon")
_SHOES = ("black", "white", "brown", "grey", "red", "blue", "beige", "navy")
_HAIR: dict[str, Colour] = {
    "black": (26, 22, 22),
    "dark brown": (56, 38, 28),
    "brown": (98, 66, 40),
    "blond": (196, 162, 98),
    "red": (142, 66, 34),
    "grey": (150, 148, 146),
}
_HAIR_SHARE = (0.34, 0.24, 0.18, 0.12, 0.05, 0.07)
_SKIN: tuple[Colour, ...] = (
    (242, 208, 182),
    (228, 186, 154),
    (204, 158, 122),
    (168, 120, 86),
    (124, 84, 60),
    (86, 58, 44),
)
PATTERNS = ("plain", "striped", "pinstriped", "checked", "printed", "two-tone")
GROUP = 8  # identities that share a wardrobe when `similar` is above 0


@dataclass(frozen=True)
class Person:
    """Everything about an identity that does not change between images. Lengths are shares of the body height."""

    woman: bool
    width: float  # body width against the average, 0.85 to 1.25
    stature: float  # height against the average, 0.9 to 1.08
    skin: Colour
    hair: str  # bald, short, long, ponytail, bun, curly
    hair_name: str
    hair_colour: Colour
    beard: bool
    glasses: bool
    top: str  # shirt, T-shirt, sweater, hoodie, jacket, coat, dress
    top_name: str  # colour name
    top_colour: Colour
    second_name: str  # of the pattern, or of the shirt under an open jacket
    second_colour: Colour
    pattern: str  # one of PATTERNS
    period: float  # of stripes and checks, share of the body height
    long_sleeves: bool
    open_front: bool  # jacket or coat open over a shirt of the second colour
    bottom: str  # trousers, shorts, skirt, dress (hem of the top)
    bottom_name: str
    bottom_colour: Colour
    side_stripe: bool  # trousers with a stripe of the second colour
    shoe_name: str
    shoe_colour: Colour
    boots: bool
    bag: str  # "", backpack, shoulder bag, handbag
    bag_name: str
    bag_colour: Colour
    left: bool  # the side that the bag is on
    hat: str  # "", cap, beanie, hood
    hat_name: str
    hat_colour: Colour


def _tone(g: np.random.Generator, colour: Colour, spread: float = 9.0) -> Colour:
    shift = g.normal(0.0, spread, 3)
    return tuple(int(min(255, max(0, c + s))) for c, s in zip(colour, shift, strict=True))


class _Wardrobe:
    """Hands out named colours; with probability `similar` one of the three that the whole group of identities wears."""

    def __init__(self, seed: int, pid: int, similar: float, g: np.random.Generator):
        shared = generator(seed, "figures wardrobe", pid // GROUP)
        self.shared = [str(n) for n in shared.choice(list(COLOURS), size=3, replace=False)]
        self.similar, self.g = similar, g

    def __call__(self, names: tuple[str, ...] = _UPPER, avoid: str = "") -> tuple[str, Colour]:
        pool = self.shared if self.g.random() < self.similar else names
        pool = [name for name in pool if name != avoid] or list(COLOURS)
        name = pool[int(self.g.integers(len(pool)))]
        return name, _tone(self.g, COLOURS[name])


def _pick(g: np.random.Generator, options: tuple[str, ...], share: tuple[float, ...]) -> str:
    return options[int(g.choice(len(options), p=share))]


@lru_cache(maxsize=4096)
def person(seed: int, pid: int, similar: float) -> Person:
    """The identity pid (>= 0). similar in [0, 1]: how much the colours are shared with the identities around it."""
    g = generator(seed, "figures person", pid)
    wear = _Wardrobe(seed, pid, similar, g)
    woman = bool(g.random() < 0.5)
    clothes = _dress(woman, wear, g)
    return Person(woman=woman, **_body(woman, g), **clothes, **_extras(woman, clothes, wear, g))


def _body(woman: bool, g: np.random.Generator) -> dict[str, Any]:
    """Build, skin, hair and face."""
    hair = _pick(
        g,
        ("bald", "short", "long", "ponytail", "bun", "curly"),
        (0.0, 0.15, 0.45, 0.2, 0.1, 0.1) if woman else (0.12, 0.7, 0.05, 0.03, 0.0, 0.1),
    )
    hair_name = _pick(g, tuple(_HAIR), _HAIR_SHARE)
    return {
        "width": float(np.clip(g.normal(0.96 if woman else 1.03, 0.1), 0.82, 1.28)),
        "stature": float(np.clip(g.normal(0.97 if woman else 1.02, 0.035), 0.88, 1.08)),
        "skin": _tone(g, _SKIN[int(g.integers(len(_SKIN)))], 4.0),
        "hair": hair,
        "hair_name": hair_name,
        "hair_colour": _tone(g, _HAIR[hair_name], 5.0),
        "beard": not woman and bool(g.random() < 0.25),
        "glasses": bool(g.random() < 0.2),
    }


def _dress(woman: bool, wear: _Wardrobe, g: np.random.Generator) -> dict[str, Any]:
    """Clothes and shoes with their colours and patterns."""
    tops = ("shirt", "T-shirt", "sweater", "hoodie", "jacket", "coat", "dress")
    share = (0.14, 0.2, 0.14, 0.1, 0.18, 0.09, 0.15) if woman else (0.18, 0.24, 0.16, 0.13, 0.2, 0.09, 0.0)
    top = _pick(g, tops, share)
    pattern = _pick(g, PATTERNS, (0.3, 0.22, 0.12, 0.14, 0.1, 0.12))
    open_front = top in ("jacket", "coat") and bool(g.random() < 0.6)
    if open_front or (top in ("jacket", "coat") and pattern == "printed"):
        pattern = "plain"
    bottom = _pick(g, ("trousers", "shorts", "skirt"), (0.62, 0.14, 0.24) if woman else (0.78, 0.22, 0.0))
    bottom = "dress" if top == "dress" else "trousers" if top == "coat" else bottom
    top_name, top_colour = wear()
    second_name, second_colour = wear(avoid=top_name)
    bottom_name, bottom_colour = wear(_LOWER)
    shoe_name, shoe_colour = wear(_SHOES)
    return {
        "top": top,
        "top_name": top_name,
        "top_colour": top_colour,
        "second_name": second_name,
        "second_colour": second_colour,
        "pattern": pattern,
        "period": float(g.uniform(0.04, 0.085)),
        "long_sleeves": top not in ("T-shirt", "dress") or (top == "dress" and bool(g.random() < 0.4)),
        "open_front": open_front,
        "bottom": bottom,
        "bottom_name": bottom_name,
        "bottom_colour": bottom_colour,
        "side_stripe": bottom == "trousers" and bool(g.random() < 0.12),
        "shoe_name": shoe_name,
        "shoe_colour": shoe_colour,
        "boots": bool(g.random() < (0.3 if woman else 0.12)),
    }


def _extras(woman: bool, clothes: dict[str, Any], wear: _Wardrobe, g: np.random.Generator) -> dict[str, Any]:
    """Bag and hat; a hood belongs to the top."""
    bags = ("", "backpack", "shoulder bag", "handbag")
    bag = _pick(g, bags, (0.34, 0.3, 0.2, 0.16) if woman else (0.42, 0.36, 0.17, 0.05))
    bag_name, bag_colour = wear()
    hats = ("", "cap", "beanie", "hood")
    hat = _pick(g, hats, (0.74, 0.12, 0.09, 0.05) if woman else (0.64, 0.2, 0.1, 0.06))
    if hat == "hood" and clothes["top"] not in ("hoodie", "jacket", "coat"):
        hat = ""
    hat_name, hat_colour = (clothes["top_name"], clothes["top_colour"]) if hat == "hood" else wear()
    return {
        "bag": bag,
        "bag_name": bag_name,
        "bag_colour": bag_colour,
        "left": bool(g.random() < 0.5),
        "hat": hat,
        "hat_name": hat_name,
        "hat_colour": hat_colour,
    }


def _article(phrase: str) -> str:
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def _clothes(p: Person, front: bool) -> str:
    """The upper clothes as a phrase, for example `a red and white striped shirt`."""
    name = f"long-sleeved {p.top}" if p.top == "dress" and p.long_sleeves else p.top
    if p.open_front and front:
        return f"an open {p.top_name} {name} over a {p.second_name} shirt"
    if p.pattern == "plain" or (p.pattern == "printed" and not front):
        return _article(f"{p.top_name} {name}")
    if p.pattern == "printed":
        return f"{_article(p.top_name)} {name} with {_article(p.second_name)} print"
    return f"{_article(p.top_name)} and {p.second_name} {p.pattern} {name}"


def _head(p: Person) -> str:
    """What is on the head: `short black hair`, `a red cap`."""
    if p.hat == "hood":
        return "the hood up"
    if p.hat:
        return _article(f"{p.hat_name} {p.hat}")
    if p.hair in ("ponytail", "bun"):
        return f"{p.hair_name} hair in a {p.hair}"
    return "a bald head" if p.hair == "bald" else f"{p.hair} {p.hair_name} hair"


def sentence(p: Person, front: bool, feet: bool, g: np.random.Generator) -> str:
    """One sentence about what an image of the person shows.

    front: the front of the body is seen. feet: the shoes are inside the image. g: chooses the wording.
    """
    noun = str(g.choice(("woman", "lady", "young woman") if p.woman else ("man", "guy", "young man")))
    worn = [_clothes(p, front)]
    if p.bottom != "dress":
        kind = "jeans" if p.bottom == "trousers" and p.bottom_name in ("blue", "light blue") else p.bottom
        worn.append(_article(f"{p.bottom_name} skirt") if kind == "skirt" else f"{p.bottom_name} {kind}")
    if feet:
        worn.append(f"{p.shoe_name} {'boots' if p.boots else 'shoes'}")
    listed = worn[0] if len(worn) == 1 else f"{', '.join(worn[:-1])} and {worn[-1]}"
    bag = f"{_article(p.bag_name)} {p.bag}" if p.bag else ""
    who = f"{noun} {'in' if p.hat in ('cap', 'beanie') else 'with'} {_head(p)}"
    template = int(g.integers(4))
    if template == 0:
        return f"A {who} wears {listed}" + (f", and carries {bag}." if bag else ".")
    if template == 1:
        return f"The {who} is wearing {listed}" + (f" and has {bag}." if bag else ".")
    if template == 2:
        return f"A {who}, dressed in {listed}" + (f", walks with {bag}." if bag else ", walks by.")
    return (f"Carrying {bag}, this {who}" if bag else f"This {who}") + f" has {listed} on."
