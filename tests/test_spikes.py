"""Spikes of the loss against a plain reckoning; the batches that are left out against a list with holes."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from hypothesis import given, settings
from hypothesis import strategies as st
from waiting import Reads

from pretrain import checkpoint, gaps
from pretrain.gaps import Gaps
from pretrain.health import HealthConfig, Spike
from pretrain.spikes import NEW_LEVEL, RollBack, Spikes
from recipes.errors import UserError
from shards.order import Order, OrderConfig

CONFIG = HealthConfig(spike_warmup=10, spike_steps=3, spike_window=20, spike_sigmas=6, spike_share=0.0)
NAN, INF = math.nan, math.inf


def shown(losses: list[float], spikes: Spikes | None = None, first: int = 0, config: HealthConfig = CONFIG) -> Spikes:
    """After these losses, of the steps from `first` on."""
    spikes = spikes or Spikes()
    for step, value in enumerate(losses, start=first):
        loss = torch.tensor(value)
        spikes.see(step, loss, torch.isfinite(loss), torch.tensor(2), config)
    return spikes


def noise(count: int, level: float = 5.0, seed: int = 0) -> list[float]:
    return (level + 0.05 * torch.randn(count, generator=torch.Generator().manual_seed(seed))).tolist()


def test_mean_and_deviation_are_plain_at_first_and_then_remember_a_window():
    few = noise(20)
    spikes = shown(few)
    assert spikes.mean.item() == pytest.approx(sum(few) / 20, rel=1e-6)
    assert spikes.variance.item() == pytest.approx(torch.tensor(few).double().var(unbiased=False).item(), rel=1e-4)
    # from there on the weight of a step falls by 1/20 with each later one
    more = noise(50, seed=1)
    weights = torch.tensor([0.05 * 0.95 ** (49 - n) for n in range(50)], dtype=torch.float64)
    mean = sum(few) / 20 * 0.95**50 + (weights * torch.tensor(more).double()).sum()
    assert shown(more, spikes, 20).mean.item() == pytest.approx(mean.item(), rel=1e-5)


@pytest.mark.row("R13")
def test_what_is_rejected_leaves_no_bit_behind(figures):
    sound, places, wrong = noise(60), {20, 21, 30, 41, 42, 43, 44}, []
    clean = shown(sound).state_dict()
    assert clean["count"] == 60
    values = (NAN, INF, -INF, 5.5, 50.0, 1e30)
    for bad in values:
        rest = iter(sound)
        spoilt = shown([bad if step in places else next(rest) for step in range(60 + len(places))]).state_dict()
        names = ("mean", "variance", "count", "row")
        wrong += [(bad, name) for name in names if not torch.equal(spoilt[name], clean[name])]
    times = len(places) * len(values)
    figures("R13", injected="nan, inf, outliers into the statistics", times=times, lost=0, wrong=len(wrong))
    assert wrong == []


def test_a_row_of_outliers_is_a_spike_and_a_shorter_one_is_not():
    two = [*noise(30), 7.0, 9.0, *noise(10)]
    assert shown(two).look() is None
    spikes = shown([*noise(30), 7.0, 9.0, 8.0, *noise(10)])
    mean, deviation = spikes.mean.item(), spikes.variance.sqrt().item()
    found = spikes.look()
    assert found == Spike(30, 32, 9.0, mean, deviation)
    assert found.text == f"loss 9 in steps 30 to 32, where {mean:.4g} +- {deviation:.2g} is usual"
    assert spikes.look() is None, "it is told once"


def test_a_step_that_was_not_taken_does_not_end_a_row():
    assert shown([*noise(30), 7.0, NAN, 9.0, INF, 8.0, *noise(5)]).look()[:3] == (30, 34, 9.0)
    assert shown([*noise(30), 7.0, 5.0, 9.0, 5.0, 8.0, *noise(5)]).look() is None


def test_two_spikes_between_two_looks_are_told_as_one_span():
    spikes = shown([*noise(30), 9.0, 9.0, 9.0, *noise(5), 7.0, 7.0, 7.0, 7.0])
    assert spikes.look()[:3] == (30, 41, 9.0)
    shown([7.5], spikes, 42)
    assert spikes.look()[:3] == (38, 42, 7.5), "the second one goes on"


def test_only_what_is_above_by_both_measures_is_an_outlier():
    quiet = [5.0] * 30  # no deviation at all
    assert shown([*quiet, 5.001, 5.001, 5.001], config=CONFIG).look() is not None
    wide = CONFIG.model_copy(update={"spike_share": 0.02})
    assert shown([*quiet, 5.09, 5.09, 5.09], config=wide).look() is None
    assert shown([*quiet, 5.11, 5.11, 5.11], config=wide).look() is not None
    assert shown([*quiet, 1.0, 1.0, 1.0]).look() is None, "a loss that falls is welcome"


def test_nothing_is_judged_in_the_warm_up():
    assert shown([*noise(9), 50.0, 50.0, 50.0]).look() is None
    assert shown([*noise(10), 50.0, 50.0, 50.0]).look() is not None


def test_a_jump_of_the_schedules_begins_anew_and_so_does_a_new_level():
    spikes = shown(noise(30))
    spikes.see(30, torch.tensor(NAN), torch.tensor(False), torch.tensor(9), CONFIG)
    assert (int(spikes.count), int(spikes.regime)) == (30, 2), "nor does a regime that is not finite count"
    spikes.see(31, torch.tensor(9.0), torch.tensor(True), torch.tensor(3), CONFIG)
    assert (int(spikes.count), spikes.mean.item(), spikes.variance.item(), int(spikes.regime)) == (1, 9.0, 0.0, 3)
    spikes.see(32, torch.tensor(9.0), torch.tensor(True), torch.tensor(2), CONFIG)
    assert (int(spikes.count), int(spikes.regime)) == (2, 3), "masks may be missing in a small batch"
    spikes = shown([*noise(30), *[9.0] * NEW_LEVEL])
    assert (int(spikes.row), int(spikes.count)) == (NEW_LEVEL, 30)
    shown([9.0], spikes, 30 + NEW_LEVEL)
    assert (int(spikes.row), int(spikes.count), spikes.mean.item()) == (0, 1, 9.0)


def test_the_state_holds_all_of_it(tmp_path):
    losses = [*noise(30), 9.0, 9.0, NAN, 9.0, *noise(8), 7.0, 7.0, 7.0]
    for cut in range(28, 45):
        first, second = shown(losses[:cut]), Spikes()
        second.load_state_dict(first.state_dict())
        whole, resumed = shown(losses), shown(losses[cut:], second, cut)
        assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
        assert whole.look() == resumed.look()


def test_nothing_is_read_but_in_a_look():
    with Reads() as reads:
        spikes = Spikes()
        for step in range(40):
            loss = torch.full((), 9.0 if step > 30 else 5.0)
            spikes.see(step, loss, torch.isfinite(loss), torch.full((), 2), CONFIG)
        assert reads.found == {}
        assert spikes.look() is not None
    assert reads.who() == {"spikes.py:look"}


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 12)), max_size=8))
@settings(max_examples=200, deadline=None)
def test_the_batches_of_all_steps_after_any_cuts(cuts):
    remaining, left_out = list(range(400)), Gaps()
    for first, more in cuts:
        before = [left_out.data_step(step) for step in range(first)]
        left_out = Gaps([*left_out.told, left_out.and_steps(first, first + more)])
        del remaining[first : first + more + 1]
        assert [left_out.data_step(step) for step in range(first)] == before
    assert [left_out.data_step(step) for step in range(len(remaining))] == remaining
    assert len(left_out) == len(cuts)


def test_the_file_is_read_as_it_was_written_or_refused(tmp_path):
    assert len(Gaps.read(tmp_path)) == 0
    left_out = Gaps([{**Gaps().and_steps(3, 5), "rows": [1, 2]}])
    left_out = Gaps([*left_out.told, left_out.and_steps(1, 1)])
    left_out.write(tmp_path)
    assert Gaps.read(tmp_path).told == left_out.told
    assert Gaps.read(tmp_path).spans == [(1, 2), (3, 6)]
    path = tmp_path / gaps.SKIPPED
    for text in (
        path.read_text()[:-9],
        "[]",
        "{}",
        '{"format_version": 2, "skipped": []}',
        '{"format_version": 1, "skipped": [{"batches": [5, 3]}]}',
        '{"format_version": 1, "skipped": [{"batches": [3, 3.5]}]}',
        '{"format_version": 1, "skipped": [{"batches": [3]}]}',
        '{"format_version": 1, "skipped": 7}',
        "\udcff",
        "[" * 100_000,
    ):
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(UserError, match=r"skipped_batches\.json is damaged"):
            Gaps.read(tmp_path)


@pytest.fixture
def accelerator() -> Accelerator:
    yield Accelerator(cpu=True)
    AcceleratorState._reset_state(reset_partial_state=True)


BATCH = 4
ORDER = Order(torch.full((5,), 40).numpy(), 7, OrderConfig(lanes=4))  # 50 steps an epoch
FOUND = RollBack(20, 24, Spike(22, 24, 9.0, 5.0, 0.1))


def run_folder(out: Path, steps: tuple[int, ...], teachers: tuple[int, ...] = ()) -> None:
    for step in steps:
        checkpoint.write_state(out / "checkpoints", {"x": torch.ones(1)}, step * BATCH, 9, {})
    for step in teachers:
        checkpoint.save_model(out / "teachers" / f"epoch-{step:03}", {"x": torch.ones(1)}, {"samples": step * BATCH})


def test_what_lies_behind_the_spike_is_deleted_and_its_batches_are_written_down(tmp_path, accelerator, capsys):
    run_folder(tmp_path, (10, 20, 21, 30), (15, 20, 25))
    (tmp_path / "teachers" / "epoch-025" / "stray").touch()
    gaps.roll_back(tmp_path, FOUND, ORDER, BATCH, 1, accelerator)
    assert [path.name for path in checkpoint.states(tmp_path / "checkpoints")] == [
        "samples-000000000040",
        "samples-000000000080",
    ]
    assert sorted(path.name for path in (tmp_path / "teachers").iterdir()) == ["epoch-015", "epoch-020"]
    (told,) = json.loads((tmp_path / gaps.SKIPPED).read_text())["skipped"]
    assert (told["steps"], told["batches"], told["positions"]) == ([20, 24], [20, 25], [80, 100])
    assert told["rows"] == [ORDER(position)[1] for position in range(80, 100)]
    assert told["loss"] == {"first": 22, "last": 24, "peak": 9.0, "mean": 5.0, "deviation": 0.1}
    assert capsys.readouterr().err == (
        "roll-back 1 of at most 1: loss 9 in steps 22 to 24, where 5 +- 0.1 is usual; going on from step 20, without "
        f"the batches of the steps 20 to 24 ({tmp_path / gaps.SKIPPED})\n"
    )
    with pytest.raises(UserError) as caught:
        gaps.roll_back(tmp_path, FOUND, ORDER, BATCH, 1, accelerator)
    assert str(caught.value) == (
        "the loss has spiked: loss 9 in steps 22 to 24, where 5 +- 0.1 is usual; this run went back 1 times already, "
        "and health.max_roll_backs = 1. Lower schedules.lr or schedules.teacher_temperature in a new run, or raise "
        "health.max_roll_backs"
    )
    assert len(Gaps.read(tmp_path)) == 1


def test_without_a_state_it_begins_anew_but_the_last_one_is_not_deleted(tmp_path, accelerator):
    gaps.roll_back(tmp_path, FOUND, ORDER, BATCH, 3, accelerator)
    assert Gaps.read(tmp_path).spans == [(20, 25)]
    run_folder(tmp_path, (21, 30))
    with pytest.raises(UserError, match="there is no checkpoint from before the spike in"):
        gaps.roll_back(tmp_path, FOUND, ORDER, BATCH, 3, accelerator)
    assert len(checkpoint.states(tmp_path / "checkpoints")) == 2
    assert len(Gaps.read(tmp_path)) == 1


def test_a_state_that_knows_of_more_roll_backs_than_the_file(tmp_path, accelerator):
    gaps.roll_back(tmp_path, FOUND, ORDER, BATCH, 3, accelerator)
    spikes = Spikes()
    assert gaps.begin(tmp_path, spikes, accelerator).data_step(20) == 25
    assert int(spikes.gaps) == 1
    (tmp_path / gaps.SKIPPED).unlink()
    with pytest.raises(UserError, match=r"tells of 0 roll-backs, the checkpoint of 1: bring the file back"):
        gaps.begin(tmp_path, spikes, accelerator)


def test_a_training_is_called_again_after_each_spike(tmp_path, accelerator):
    calls = []

    def train() -> None:
        calls.append(Gaps.read(tmp_path).spans)
        if len(calls) < 3:
            raise FOUND

    gaps.through(train, tmp_path, ORDER, BATCH, HealthConfig(), accelerator)
    assert calls == [[], [(20, 25)], [(20, 30)]]
    calls.clear()
    with pytest.raises(UserError, match=r"went back 2 times already, and health\.max_roll_backs = 2"):
        gaps.through(train, tmp_path, ORDER, BATCH, HealthConfig(max_roll_backs=2), accelerator)
