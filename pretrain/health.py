"""Is it learning? Signals of collapse, cheap enough for every logged line, and the alarms that follow from them.

The signs are those of DINO, arXiv 2104.14294, section 5.3 and figure 7: without centring the entropy of the targets
goes to 0, without sharpening to ln K. The effective rank is RankMe, arXiv 2210.02885, eq. 1.
"""

import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from pretrain.losses import Guessed, Logits
from pretrain.student_teacher import Seen
from recipes.load import Section

Centres = Mapping[str, Tensor]  # running centres [K] by kind of token; empty where the targets need none


class HealthConfig(Section):
    """When a run is called ill. Logged lines are judged; K is the number of prototypes."""

    on_collapse: Literal["warn", "stop"] = "warn"
    max_skipped: int = Field(20, ge=0)  # steps in a row whose loss or gradient is not finite; above it the run stops
    first_step: int = Field(20, ge=0)  # before it nothing is judged: the centres settle
    lasting: int = Field(10, ge=0)  # steps that a sign has to last
    flat_epochs: float = Field(2.0, gt=0)  # that uniform targets or a flat loss have to last; 200 steps at least
    sharp: float = Field(0.01, ge=0, le=1)  # entropy of a target as a share of ln K; below it the target is hard
    uniform: float = Field(0.995, ge=0, le=1)  # the same; above it the target says nothing
    prototypes: float = Field(2.0, ge=1)  # in use, exp(entropy of the mean target); below it all images get one
    centred: float = Field(0.05, ge=0, le=1)  # share of the mean logits that the centre takes away; below it it is off
    spread: float = Field(0.05, ge=0)  # feature_std; below it the features of all images are the same
    on_spike: Literal["ignore", "warn", "roll_back"] = "warn"  # roll_back: to the state before it, without its batches
    spike_sigmas: float = Field(6.0, gt=0)  # standard deviations above the mean from which a loss is an outlier
    spike_share: float = Field(0.02, ge=0)  # of the mean that it has to be above it, too: a quiet loss has no sigma
    spike_steps: int = Field(3, ge=1)  # outliers in a row that make a spike
    spike_window: int = Field(200, ge=2)  # steps that mean and deviation remember
    spike_warmup: int = Field(100, ge=2)  # steps before the first one that is judged
    spike_before: int = Field(
        5, ge=0
    )  # steps before the spike whose batches are skipped as well: they may have led to it
    max_roll_backs: int = Field(3, ge=0)  # of a run; then a spike stops it


COLD = 0.01  # teacher temperature far below the 0.02 to 0.07 of published recipes
EVEN = 0.99  # share of ln K; a mean target with more entropy needs no centring
FLAT_LOSS = 0.005  # share of ln K by which a loss that is pinned there may differ from it
FLAT_STEPS = 200
SKIPS, SPIKE = "skipped_steps", "loss_spike"  # the alarms that are no collapse
ROWS, PATCH_ROWS = 256, 1024  # features and patch targets that are looked at, at most
FEW = 4  # targets whose mean says nothing


def entropy(p: Tensor) -> Tensor:
    """Entropy in nats over the last dimension of probabilities [..., K]."""
    return torch.special.entr(p.float()).sum(-1)


def _targets(name: str, mean_name: str, p: Tensor, count: int) -> dict[str, Tensor]:
    """Mean entropy of targets [N, K], and entropy of their mean. count: how many of them are of different images."""
    unknown = torch.full((), math.nan, device=p.device)
    return {
        name: entropy(p).mean() if len(p) else unknown,
        mean_name: entropy(p.float().mean(0)) if count >= FEW else unknown,
    }


def _cosines(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cosine of unit vectors [B, D] of the same images, and of different ones (nan for a batch of one)."""
    same, pairs = (one * other).sum(), one.sum(0) @ other.sum(0)
    return same / len(one), (pairs - same) / (len(one) * (len(one) - 1))


@torch.no_grad()
def signals(targets: Logits, seen: Seen, guessed: Guessed, centres: Centres) -> dict[str, Tensor]:
    """Health of the teacher on one micro-batch of one process: float32 [], on the device. nan = not known here.

    targets: the teacher's probabilities. docs/health.md tells how to read each value:
    `teacher_entropy`: mean entropy of a CLS target, nats; `teacher_entropy_share`: as a share of ln K, 0..1.
    `mean_entropy`: entropy of the mean CLS target, nats; its exp is the number of prototypes in use.
    `patch_entropy`, `patch_mean_entropy`: the same of the masked patches, where there are any.
    `feature_std`: mean standard deviation over the images of the L2-normalised CLS tokens times sqrt(D); 0 when all are
    equal, about 1 when they fill the sphere.
    `positive_cosine`, `negative_cosine`: of the teacher's CLS tokens of the two global views of the same image, and of
    different images. `student_cosine`: of the student's and the teacher's token of the same global view.
    `centre_norm_*`: length of a running centre. `centre_share_*`: (mean logits . centre) / |mean logits|^2, the share
    of the mean logits that the centre takes away; 1 when it has settled, 0 without one.
    """
    cls = targets.cls.flatten(0, -2)
    found = _targets("teacher_entropy", "mean_entropy", cls, targets.cls.shape[1])
    found["teacher_entropy_share"] = found["teacher_entropy"] / math.log(cls.shape[-1])
    if targets.patches is not None:
        some = targets.patches[:: max(1, len(targets.patches) // PATCH_ROWS)]  # they lie image by image
        found |= _targets("patch_entropy", "patch_mean_entropy", some, min(len(some), targets.cls.shape[1]))
    teacher, student = (F.normalize(each.features.float(), dim=-1) for each in (seen, guessed))
    found["feature_std"] = teacher[0].std(0, unbiased=False).mean() * teacher.shape[-1] ** 0.5
    found["positive_cosine"], found["negative_cosine"] = _cosines(*teacher)
    found["student_cosine"] = (teacher * student).sum(-1).mean()
    means = {"cls": seen.cls_mean, "patches": seen.patch_mean}
    for kind, centre in centres.items():
        mean = means[kind].float()
        found[f"centre_norm_{kind}"] = centre.norm()
        found[f"centre_share_{kind}"] = (mean @ centre) / (mean @ mean)
    return found


def effective_rank(features: Tensor) -> float:
    """exp(entropy of the singular values [min(N, D)] over their sum) of features [N, D]; 1 when all rows are parallel.

    RankMe, arXiv 2210.02885, eq. 1, with its epsilon; on ROWS rows at most. It waits for the device. It is bounded by
    N, so compare only values of equal N. nan where a feature is not finite.
    """
    some = features[:ROWS].double().cpu()
    if not torch.isfinite(some).all():
        return math.nan
    gram = some @ some.T if some.shape[0] <= some.shape[1] else some.T @ some
    singular = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = singular / singular.sum().clamp(min=1e-30) + 1e-7
    return math.exp(torch.special.entr(share).sum().item())


class Spike(NamedTuple):
    """A spike of the loss (spikes.py)."""

    first: int  # step of the first outlier of the first row
    last: int  # step of the last outlier
    peak: float  # largest loss of them
    mean: float  # of the accepted losses
    deviation: float  # their standard deviation

    @property
    def text(self) -> str:
        """For people."""
        many = f"steps {self.first} to {self.last}" if self.last > self.first else f"step {self.first}"
        return f"loss {self.peak:.4g} in {many}, where {self.mean:.4g} +- {self.deviation:.2g} is usual"


class Sign(NamedTuple):
    """What a line may show. It becomes an alarm when it lasts."""

    lasting: float  # steps
    text: str  # what it is, the value that shows it, what to do


def _of_targets(line: Mapping[str, Any], kind: str, config: HealthConfig, ln_k: float) -> tuple[str, str] | None:
    """Name and text of what is wrong with the targets of "image"s or "patch"es, if anything is."""
    names = {"image": ("teacher_entropy", "mean_entropy"), "patch": ("patch_entropy", "patch_mean_entropy")}[kind]
    own, mean = (math.nan if line.get(name) is None else line[name] for name in names)
    share, used, temperature = own / ln_k, math.exp(min(mean, 700.0)), line["teacher_temperature"]
    suffix = "" if kind == "image" else "_of_patches"
    if share < config.sharp and temperature < COLD:
        return f"hard_targets{suffix}", (
            f"each {kind} gets one hard prototype: the entropy of the targets is {share:.4f} of ln K, because the "
            f"teacher temperature is {temperature:g}; raise schedules.teacher_temperature_start and "
            "schedules.teacher_temperature (published recipes take 0.02 to 0.07)"
        )
    if used < config.prototypes:
        return f"one_prototype{suffix}", (
            f"every {kind} gets the same prototype: the entropy of the mean target is {mean:.4f}, that is {used:.2f} "
            "prototypes in use; centring is off or too weak: set centering.kind=sinkhorn, or centering.kind=centre "
            "with centering.momentum=0.9 and a lower schedules.lr"
        )
    if share < config.sharp:
        return f"hard_targets{suffix}", (
            f"each {kind} gets one hard prototype: the entropy of the targets is {share:.4f} of ln K at a teacher "
            f"temperature of {temperature:g}; raise it, or set heads.norm_last_layer=true and lower schedules.lr"
        )
    return None


def signs(line: Mapping[str, Any], config: HealthConfig, ln_k: float, flat: float) -> dict[str, Sign]:
    """The signs of illness in a logged line, by name. flat: steps that uniform targets or a flat loss have to last."""

    def value(name: str) -> float:
        return math.nan if line.get(name) is None else float(line[name])  # no comparison with nan is true

    found: dict[str, Sign] = {}
    for kind in ("image", "patch"):
        wrong = _of_targets(line, kind, config, ln_k)
        if wrong and not found:  # the patches often share the prototypes: one illness, one alarm
            found[wrong[0]] = Sign(config.lasting, wrong[1])
    share, loss = value("teacher_entropy_share"), value("loss_cls") / ln_k
    taken = value("centre_share_cls")
    if taken < config.centred and value("mean_entropy") / ln_k < EVEN:
        found["no_centring"] = Sign(
            config.lasting,
            f"the centre takes away {taken:.1%} of the mean logits, so all images drift to the same prototype (entropy "
            "to 0): set centering.kind=sinkhorn, or centering.kind=centre with centering.momentum=0.9",
        )
    if share > config.uniform:
        found["uniform_targets"] = Sign(
            flat,
            f"the targets are uniform: their entropy is {share:.4f} of ln K, so nothing is learned; lower "
            f"schedules.teacher_temperature (now {line['teacher_temperature']:g}), or check that schedules.lr is not "
            "near 0 and that schedules.momentum is not 1",
        )
    elif abs(loss - 1) < FLAT_LOSS:
        found["flat_loss"] = Sign(
            flat,
            f"loss_cls stays at ln K = {ln_k:.4f}: the student guesses; raise schedules.lr, shorten "
            "schedules.warmup_epochs, or lower schedules.teacher_temperature",
        )
    if value("feature_std") < config.spread:
        found["equal_features"] = Sign(
            config.lasting,
            f"the features of different images are the same: feature_std is {value('feature_std'):.4f}, their cosine "
            f"{value('negative_cosine'):.4f}; the backbone has collapsed: start again with a lower schedules.lr, a "
            "longer schedules.warmup_epochs or centering.kind=sinkhorn",
        )
    return found


class Watch:
    """Which alarms ring. It is a fold over the logged lines: a run that goes on shows it the lines that it finds."""

    def __init__(self, config: HealthConfig, prototypes: int, epoch: float):
        """prototypes: K. epoch: steps of an epoch."""
        self.config, self.ln_k = config, math.log(prototypes)
        self.flat = max(FLAT_STEPS, config.flat_epochs * epoch)
        self.since: dict[str, int] = {}  # step of the first line of each sign that has lasted until now
        self.ringing: dict[str, str] = {}  # name and text of the alarms of the last line
        self.skipped = 0

    def see(self, line: Mapping[str, Any]) -> list[str]:
        """The next logged line; returns the names of the alarms that begin with it. None and nan are unknown values."""
        before, skipped = self.ringing, int(line.get("skipped_steps") or 0)
        newly, self.skipped = skipped - self.skipped, skipped
        self.ringing = {name: text for name, text in before.items() if name not in (SKIPS, SPIKE)}
        # a step that was skipped tells nothing about the model
        if "not_finite" not in line and line["step"] >= self.config.first_step:
            found = signs(line, self.config, self.ln_k, self.flat)
            self.since = {name: self.since.get(name, line["step"]) for name in found}
            lasted = {name: line["step"] - self.since[name] for name in found}
            self.ringing = {name: sign.text for name, sign in found.items() if lasted[name] >= sign.lasting}
        if newly > 0:
            self.ringing[SKIPS] = (
                f"{newly} step(s) since the line before were skipped, because the loss or the gradient was not finite "
                f"({skipped} in all); if it happens often, lower schedules.lr or set heads.norm_last_layer=true"
            )
        if "spike" in line:
            cure = "; a run that does not recover from it needs a lower schedules.lr, or health.on_spike=roll_back"
            self.ringing[SPIKE] = Spike(**line["spike"]).text + ("" if self.config.on_spike == "roll_back" else cure)
        return [name for name in self.ringing if name not in before]
