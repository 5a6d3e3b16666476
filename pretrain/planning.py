"""What a run will do and need, told before it starts."""

import math
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from pydantic import Field
from torch import nn

from pretrain import cost, hardware
from pretrain.backbone import BackboneConfig
from pretrain.centering import CenteringConfig
from pretrain.checkpoint import CheckpointConfig
from pretrain.hardware import Devices, free_bytes, images_a_core
from pretrain.heads import HeadsConfig
from pretrain.loader import LoaderConfig, micro_batch
from pretrain.losses import LossesConfig
from pretrain.masks import MasksConfig
from pretrain.schedules import SchedulesConfig, peak_lr
from pretrain.showing import PicturesConfig
from pretrain.views import ViewsConfig
from recipes.errors import UserError
from recipes.load import Section
from shards.cache import CacheConfig
from shards.order import OrderConfig, check_ranks
from shards.packed import PackedSplit
from shards.reader import ShardReader

ROOM = 0.9  # share of the memory that an estimate may fill
LARGE = 1024  # images of a global batch up to which the learning rate follows the linear rule


class PlanningConfig(Section):
    """Hardware and data to plan for that are not here; for dry_run=true, they change nothing in a run."""

    gpu: str | None = None  # a card by a part of its name: h100, rtx 4090; None: the device of this run
    gpus: int | None = Field(None, ge=1)  # how many, over all machines; None: the processes of this run
    gpu_memory: float | None = Field(None, gt=0)  # 10^9 bytes of each, where the usual size is not meant
    images: int | None = Field(None, ge=1)  # of the data set; None: of loader.shards
    days: float | None = Field(None, gt=0)  # how fast must it be to be done by then?


class Recipe(Protocol):
    """The sections that a plan reads."""

    precision: str
    log_every: int
    dry_run: bool
    planning: PlanningConfig
    loader: LoaderConfig
    order: OrderConfig
    cache: CacheConfig
    views: ViewsConfig
    masks: MasksConfig
    backbone: BackboneConfig
    heads: HeadsConfig
    centering: CenteringConfig
    losses: LossesConfig
    schedules: SchedulesConfig
    checkpoint: CheckpointConfig
    pictures: PicturesConfig


class Plan(NamedTuple):
    """The numbers, and the lines that tell them."""

    parameters: dict[str, int]
    steps_per_epoch: float
    steps: int
    micro: int  # images of a micro-batch
    flops: dict[str, float]  # of one image in a step
    peak: float | None  # FLOP/s of the device of this run, for the MFU; None: unknown, or the run is not in bf16
    memory: dict[str, float]  # bytes of a device
    disk: float  # bytes of the run folder at the end
    lines: tuple[str, ...] = ()

    @property
    def flops_per_image(self) -> float:
        """FLOP of one image in a step."""
        return sum(self.flops.values())

    def __str__(self) -> str:
        return "\n".join(self.lines)


def plan(
    config: Recipe,
    modules: dict[str, nn.Module],
    reader: ShardReader,
    launched: tuple[int, torch.device],
    out: Path,
    start: str,
) -> Plan:
    """The plan of a run, in full for dry_run=true and short else.

    modules: student, teacher, centres. launched: processes and device of this run. out: the run folder, which is not
    made. start: what the weights start from. UserError where the planned number of GPUs does not fit the recipe.
    """
    wanted, batch = config.planning, config.loader.batch
    if wanted != PlanningConfig() and not config.dry_run:
        raise UserError("the planning section is for hardware and data that are not here; it needs dry_run=true")
    half = config.precision == "bf16"
    on = devices(wanted, half, config.dry_run, *launched)
    check_ranks(on.count, batch, config.order.lanes)
    images = wanted.images or len(reader)
    micro, per_epoch, share = micro_batch(config.loader, on.count), images / batch, batch // on.count
    steps, student, head = max(1, int(config.schedules.epochs * per_epoch)), modules["student"], config.heads
    where = ("cuda" if on.gpu else "cpu", torch.bfloat16 if half else torch.float32)
    sizes = cost.sizes(student.backbone, config.views, config.masks, student.mim, where)
    counts = tuple(sum(p.numel() for p in modules[name].parameters()) for name in ("student", "teacher"))
    copies = config.checkpoint.asynchronous and not on.gpu  # with a GPU they are in the memory of the host
    copied = {"copy of the state being saved": cost.state_bytes(modules)} if copies else {}

    def memory(micro: int) -> dict[str, float]:
        return cost.step_memory(sizes, head, counts, micro, half, on.gpu) | copied

    parts = {config.backbone.name: student.backbone, "head": student.head}
    made = Plan(
        parameters={name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()},
        steps_per_epoch=per_epoch,
        steps=steps,
        micro=micro,
        flops=cost.step_flops(sizes, head),
        peak=hardware.device_peak(launched[1]) if half else None,
        memory=memory(micro),
        disk=cost.folder_bytes(modules, config.checkpoint, steps, per_epoch, config.log_every, config.pictures),
    )
    fits = [n for n in range(1, share + 1) if share % n == 0 and sum(memory(n).values()) <= ROOM * on.memory]
    lines = [*_sizes(made, images, on, config, start), *_work(made, on, config)]
    lines += _resources(made, on, config, out, reader)
    lines += _schedule(made, config.schedules) if config.dry_run else []
    lines += [f"note: {note}" for note in _notes(made, on, config, max(fits, default=0))]
    lines += [f"note: {note}" for note in _notes_on_data(made, on, config, out, reader)]
    return made._replace(lines=tuple(lines))


def devices(wanted: PlanningConfig, bf16: bool, measure: bool, processes: int, device: torch.device) -> Devices:
    """What to plan for. measure: on a CPU, find its rate."""
    if wanted.gpu is not None:
        return hardware.gpus_elsewhere(wanted.gpus or processes, wanted.gpu, wanted.gpu_memory, bf16)
    if wanted.gpus is not None or wanted.gpu_memory is not None:
        raise UserError("planning.gpus and planning.gpu_memory need a card, for example planning.gpu=a100")
    if device.type == "cuda":
        return hardware.gpus_here(processes, device, bf16)
    return hardware.cpus_here(processes, bf16, measure)


def _sizes(made: Plan, images: int, on: Devices, config: Recipe, start: str) -> list[str]:
    """Parameters and lengths."""
    batch, parts = config.loader.batch, ", ".join(f"{name} {count:,}" for name, count in made.parameters.items())
    return [
        f"parameters: {parts}; start: {start}",
        f"{images:,} images, {made.steps:,} steps of {batch} = {made.steps * batch / images:.2f} epochs; "
        f"{on.count} process(es) x {batch // on.count // made.micro} micro-batch(es) x {made.micro} images; "
        f"peak learning rate {peak_lr(config.schedules, batch):.2e}",
    ]


def _duration(seconds: float) -> str:
    units = (("days", 86400), ("hours", 3600), ("minutes", 60), ("seconds", 1))
    name, length = next((unit for unit in units if seconds >= 2 * unit[1]), units[-1])
    return f"{seconds / length:,.1f} {name}"


def _amount(value: float, unit: str) -> str:
    """With three digits and a prefix: 70.3 GFLOP, 85.9 GB."""
    place = min(6, int(math.log10(max(value, 1)) / 3))
    number = value / 1000**place
    return f"{number:.3g} {' kMGTPE'[place].strip()}{unit}" if number < 1000 else f"{number:,.0f} E{unit}"


def _table(items: dict[str, float], unit: str) -> list[str]:
    """The items of a sum, one a line."""
    total = sum(items.values())
    return [f"  {_amount(value, unit):>12}  {value / total:4.0%}  {item}" for item, value in items.items()]


def _images_a_second(made: Plan, on: Devices) -> tuple[float, float] | None:
    """Of all devices together, from and to."""
    return None if on.rates is None else tuple(on.count * rate / made.flops_per_image for rate in on.rates)


def _work(made: Plan, on: Devices, config: Recipe) -> list[str]:
    """Floating-point operations and time."""
    images, flops = made.steps * config.loader.batch, made.flops_per_image
    lines = [f"work: {_amount(flops, 'FLOP')} an image, {_amount(flops * images, 'FLOP')} in all"]
    lines += _table(made.flops, "FLOP") if config.dry_run else []
    rates = _images_a_second(made, on)
    if rates:
        lines.append(
            f"time: {_duration(images / rates[1])} to {_duration(images / rates[0])} on {on.count} x {on.name}, "
            f"{rates[0]:,.0f} to {rates[1]:,.0f} images/s, if each reaches {on.told}"
        )
    elif config.dry_run:
        lines.append(f"time: not known for {on.count} x {on.name} with precision={config.precision}")
    if config.planning.days:
        needed = images / config.planning.days / 86400
        rate = f"{needed:,.0f} images/s, {_amount(needed * flops, 'FLOP/s')} of all devices together"
        lines.append(f"  to be done in {config.planning.days:g} days: {rate}")
    return lines


def _resources(made: Plan, on: Devices, config: Recipe, out: Path, reader: ShardReader) -> list[str]:
    """Memory, loader, disk, data."""
    needed = _amount(sum(made.memory.values()), "B")
    lines = [f"memory: about {needed} of {_amount(on.memory, 'B')} for each of {on.count} x {on.name}"]
    if not config.dry_run:
        return lines
    lines += _table(made.memory, "B")
    rates, each = _images_a_second(made, on), images_a_core(config.views)
    if rates:
        views, workers = 2 + config.views.local_count, config.loader.workers
        lines.append(
            f"loader: {rates[0] * views:,.0f} to {rates[1] * views:,.0f} views/s take {rates[0] / each:,.1f} to "
            f"{rates[1] / each:,.1f} cores if one makes the views of {each:,.0f} images/s, as in docs/results.md; "
            f"{on.count} x {workers} workers"
        )
    lines.append(f"disk: {_amount(made.disk, 'B')} in {out} at the end, {_amount(free_bytes(out), 'B')} are free there")
    shards = set_bytes(reader)
    if shards and config.planning.images is None:
        held = f", fetched into a cache of {config.cache.gigabytes:g} GB" if reader.remote else ""
        lines.append(f"data: {len(shards)} shard(s), {_amount(sum(shards), 'B')}{held}")
    return lines


def _schedule(made: Plan, config: SchedulesConfig) -> list[str]:
    """What changes, and until which step."""

    def step(epochs: float) -> str:
        return f"step {min(made.steps, round(epochs * made.steps_per_epoch)):,}"

    decay = f"{config.weight_decay:g} to {config.weight_decay_end:g}"
    low, high = config.teacher_temperature_start, config.teacher_temperature
    warm = f"{low:g} to {high:g}, reached at {step(max(config.teacher_temperature_epochs - 1, 0))}"
    return [
        f"schedule: learning rate up until {step(config.warmup_epochs)}, then down to {config.lr_end:g}",
        f"  teacher temperature {warm if low != high and config.teacher_temperature_epochs else f'{high:g}'}",
        f"  prototypes held until {step(config.freeze_last_layer_epochs)}; weight decay {decay}; "
        f"teacher momentum {config.momentum:g} to {config.momentum_end:g}",
    ]


def micro_batch_parts(config: Recipe) -> list[str]:
    """What sees one micro-batch, so that its result depends on how a batch is divided."""
    found = ["Sinkhorn-Knopp"] if config.centering.kind == "sinkhorn" else []
    found += ["KoLeo"] if config.losses.koleo_weight else []
    return found + (["batch normalisation (ICS)"] if config.backbone.stem == "ics" else [])


def _notes(made: Plan, on: Devices, config: Recipe, fits: int) -> list[str]:
    """What does not fit, or is easily overlooked. fits: the largest micro-batch that should fit, 0 = none."""
    notes, rule, batch = [], config.schedules, config.loader.batch
    accumulation = batch // on.count // made.micro
    if fits < made.micro:
        advice = f"try loader.batch_per_device={fits}" if fits else "take a smaller model or larger devices"
        notes.append(f"the step may not fit into memory; {advice}")
    if on.gpu and config.precision == "bf16" and "v100" in on.name.lower():
        notes.append("a V100 multiplies no bf16; take precision=no, which is several times slower, or another card")
    if rule.lr * batch / 256 > rule.lr_cap:
        notes.append(
            f"the linear rule gives {rule.lr * batch / 256:.2e}, schedules.lr_cap holds the rate at {rule.lr_cap:.2e}"
        )
    if batch > LARGE and rule.warmup_epochs <= 10:
        notes.append(
            f"above a global batch of {LARGE} others saw collapse; docs/pretraining.md names remedies: a longer "
            "warm-up, a lower teacher temperature, a smaller second beta of AdamW"
        )
    batched = micro_batch_parts(config)[accumulation == 1 and config.centering.kind == "sinkhorn" :]
    if batched:
        notes.append(f"{' and '.join(batched)} see one micro-batch: the result depends on how the batch is divided")
    return notes


def _notes_on_data(made: Plan, on: Devices, config: Recipe, out: Path, reader: ShardReader) -> list[str]:
    """The same of what feeds the devices and what they leave behind."""
    notes, rates = [], _images_a_second(made, on)
    if rates and on.gpu:
        needed = math.ceil(rates[0] / images_a_core(config.views) / on.count)
        if config.loader.workers < needed:
            notes.append(f"the loader may keep the GPUs waiting: loader.workers={needed} or more, a core for each")
    if not on.here:
        return notes
    if free_bytes(out) < made.disk:
        notes.append(f"{out} has too little room; lower checkpoint.keep or raise checkpoint.teacher_every_epochs")
    shards, machine = set_bytes(reader), torch.cuda.device_count() if on.gpu else on.count
    if reader.remote and shards:
        # each machine reads from its own share of the lanes at a time
        open_bytes = config.order.lanes * min(1, machine / on.count) * max(shards)
        if open_bytes > config.cache.gigabytes * 1e9:
            notes.append(
                f"a machine reads from shards of {_amount(open_bytes, 'B')} at a time and cache.gigabytes is "
                f"{config.cache.gigabytes:g}: shards will be fetched again and again; lower order.lanes or raise it"
            )
    return notes


def set_bytes(reader: ShardReader) -> list[int]:
    """Bytes of each packed shard."""
    return [size for part in reader.parts if isinstance(part, PackedSplit) for _, size, _ in part.tars]
