"""The files of a run that tell what came out, read for its page: whole, missing or damaged.

A page must come out of a run in any state, and of a folder that somebody else made. So what a file holds is checked
here, and a file that is not what it should be becomes a sentence among the notes of the page.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from recipes import plain_json

Share = Annotated[float, Field(ge=0, le=1)]
Notes = list[str]  # sentences on what is missing or damaged
LONGEST = 64 << 20  # bytes of a JSON file that is read


class Told(BaseModel):
    """Base of what is read: keys that are not known are left out."""

    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


T = TypeVar("T", bound=Told)


class Intervals(Told):
    """[low, high] of each number."""

    level: Share = 0.95
    resamples: int = 0
    mAP: tuple[Share, Share] | None = None
    rank1: tuple[Share, Share] | None = None
    rank5: tuple[Share, Share] | None = None
    rank10: tuple[Share, Share] | None = None
    mINP: tuple[Share, Share] | None = None


class Numbers(Told):
    """How well a set was searched."""

    mAP: Share | None = None
    rank1: Share | None = None
    rank5: Share | None = None
    rank10: Share | None = None
    mINP: Share | None = None
    valid: int = Field(0, ge=0)  # queries that count
    skipped: int = Field(0, ge=0)
    intervals: Intervals | None = None
    average_precision: list[Share | None] = []  # of every query; None: skipped


class Split(Told):
    """What a split holds."""

    images: int
    identities: int = 0
    cameras: int = 0
    distractors: int = 0
    junk: int = 0


class Rules(Told):
    """The protocol: its key, and the rules in words."""

    same_camera: str = "drop"
    rules: str = ""


class Point(Told):
    """The share that is accepted, or found, at a false accept rate."""

    tar: Share | None = None
    dir: Share | None = None


class OpenSet(Told):
    """Queries without and with their person in the gallery."""

    unknown_queries: int = 0
    known_queries: int = 0
    dir: dict[str, Point | None] = {}


class Pairs(Told):
    """Same person or not, over all pairs."""

    eer: Share | None = None
    tar: dict[str, Point | None] = {}
    open_set: OpenSet | None = None


class Threshold(Told):
    """The calibrated cosine for "same person"."""

    threshold: float
    tar: Share
    far: Share


class Reranked(Numbers):
    """The numbers after re-ranking, and its settings."""

    rerank: dict[str, Any] = {}


class Second(Numbers):
    """The numbers of a second stage by local features."""

    distance: str
    candidates: int = 0


class Result(Numbers):
    """results.json of one set."""

    title: str = ""
    data: list[str] = []
    shards: str = ""
    version: str = ""
    dim: int | None = None
    flip: bool = False
    splits: dict[str, Split] = {}
    protocol: Rules = Rules()
    verification: Pairs | None = None
    calibration: Threshold | None = None
    reranked: Reranked | None = None
    rescored: list[Second] = []
    not_measured: list[str] = []

    @property
    def name(self) -> str:
        """The data set."""
        return " + ".join(self.data) or "a set without a name"


class Several(Told):
    """results.json of several sets: the numbers of each, by the name of its folder."""

    sets: dict[str, Result] = {}


class Teacher(Numbers):
    """A teacher of a pretraining that was scored with labels."""

    name: str
    epochs: float
    finetuned: Numbers | None = None
    as_good: bool = False


class Follow(Told):
    """curve.json of finetune/eval.py --follow."""

    facts: dict[str, Any] = {}
    teachers: list[Teacher] = []


class Best(Told):
    """best.json beside it."""

    name: str
    epochs: float
    by: str = ""


class Epoch(Numbers):
    """The held-out identities after an epoch."""

    epoch: float


class Validation(Told):
    """validation.json of a fine-tune."""

    epochs: list[Epoch] = []


class Verdict(Told):
    """verdict.json of a pretraining."""

    verdict: str
    reason: str
    take: str = ""


class LeftOut(Told):
    """A roll-back: the steps that were taken back."""

    steps: tuple[int, int]


class RollBacks(Told):
    """skipped_batches.json of a pretraining."""

    skipped: list[LeftOut] = []


class Stop(Told):
    """stopped.json: the run was asked to stop."""

    step: int | None = None
    lost: str = ""


class Snapshot(Told):
    """config.json of an exported teacher."""

    samples: int = Field(gt=0)
    epochs: float = Field(gt=0)


class Plain(BaseModel):
    """Any JSON object."""

    model_config = ConfigDict(extra="allow")


def parsed(path: Path, read: Callable[[bytes], Any], notes: Notes) -> Any:
    """What `read` makes of a file, None where there is none; a file that it refuses by a ValueError is noted."""
    try:
        with open(path, "rb") as file:
            data = file.read(LONGEST + 1)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        notes.append(f"{path.name} cannot be read: {error.strerror}.")
        return None
    try:
        if len(data) > LONGEST:
            raise ValueError(f"it has more than {LONGEST:,} bytes")
        return read(data)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))[:100] or "the whole"
        notes.append(f"{path.name} is damaged, and left out: {where}: {first['msg']}.")
    except ValueError as error:
        notes.append(f"{path.name} is damaged, and left out: {str(error)[:200]}.")
    return None


def read(path: Path, model: type[T], notes: Notes) -> T | None:
    """A JSON file; None where it is missing, or damaged, which is noted."""
    return parsed(path, lambda data: model.model_validate(plain_json.parse(data)), notes)


def read_tree(path: Path, notes: Notes) -> dict[str, Any]:
    """A JSON object as it is; {} where it is missing, or damaged, which is noted."""
    found = parsed(path, lambda data: Plain.model_validate(plain_json.parse(data)), notes)
    return {} if found is None else dict(found.model_extra or {})
