"""R16: a pretraining whose set lies on a server that fails: the samples of one that has the set on its disk."""

from pathlib import Path

import faulty
import pytest
import small
import together
from forked import Server

LINE = ["schedules.epochs=2", "loader.workers=2"]
# small blocks, so that few images make many requests; the rest is as it comes
REMOTE = ["cache.remote.block_mb=0.004", "cache.remote.first_wait_s=0.01"]


def trained(forks: Server, shards: str, out: Path, *more: str) -> tuple[int, dict, list[dict], str]:
    """A pretraining: its exit status, its samples by step, its lines without times, what it told."""
    seen = out.with_name(f"{out.name}-samples")
    seen.mkdir()
    prepare = [("together", "samples", {"folder": str(seen)})]
    command = small.arguments("pretrain/run.py", out, Path("set"), *LINE, f"loader.shards=[{shards}]", *more)
    [run] = together.start(forks, command, 1, prepare)
    return run.wait(), together.steps_of(seen), small.repeatable(small.metrics(out)), run.told()


def planned(number: int) -> str | None:
    """Some of the requests are never answered, and one bit is wrong; a file with two such bits is refused by name."""
    return {8: "stall", 23: "flip", 30: "stall", 57: "stall"}.get(number)


def tried(forks: Server, base: Path) -> tuple[int, int, int, int]:
    """Faults of the server; samples lost; steps and lines that differ; files of the cache that are none of its own."""
    data = small.drawn(base.parent, small.UNLABELED)
    files = {f"set/{path.name}": path.read_bytes() for path in data.iterdir()}
    status, samples, lines, told = trained(forks, str(data), base / "local")
    assert status == 0, told
    with faulty.serving(files) as server:
        chance = faulty.seeded(0, 0.3, ("500", "503", "reset", "short", "cut"))
        server.fault = lambda path, number: planned(number) or chance(path, number)
        folder = [f"cache.folder={base / 'cache'}", *REMOTE]
        status, theirs, others, told = trained(forks, server.url("set"), base / "remote", *folder)
        assert status == 0, told
        faults = [request.fault for request in server.requests if request.fault]
        assert "flip" in faults
        stalls = server.count - len(server.requests)
        assert stalls == 3
    lost = sum(len(samples[step]) - len(theirs.get(step, ())) for step in samples)
    wrong = sum(samples[step] != theirs.get(step) for step in samples)
    wrong += sum(one != two for one, two in zip(lines, others, strict=True))
    kept = {path.read_bytes() for path in (base / "cache").rglob("*.shard")}
    return len(faults) + stalls, lost, wrong, len(kept - set(files.values()))


@pytest.mark.soak
@pytest.mark.row("R16")
def test_a_training_from_a_failing_server(forks, tmp_path, figures):
    pytest.importorskip("aiohttp")
    base = tmp_path / "run"
    base.mkdir()
    faults, lost, wrong, spoilt = tried(forks, base)
    note = "30 % of the requests fail, 3 stall for 10 s, a bit is wrong; samples and losses as from the disk"
    figures("R16", injected="a server that fails, in a run", times=faults, lost=lost, wrong=wrong + spoilt, note=note)
    assert (lost, wrong, spoilt) == (0, 0, 0)
    assert faults > 20
