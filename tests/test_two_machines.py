"""Two launchers on loopback stand for two machines: one run of two processes, whose results are those of one."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import small

SETTINGS = ["schedules.epochs=1", "checkpoint.every_epochs=1"]  # 8 steps
# of each machine: the documented line for other numbers than those of the file, and the same without a file. One run
# takes both, because starting it is what takes the time
NODES = (
    ["--config_file", str(small.ROOT / "recipes/accelerate/nodes.yaml")],
    ["--multi_gpu", "--mixed_precision", "no"],
)
PATIENCE_S = 300.0


def start(rank: int, port: str, command: list[str], folder: Path) -> subprocess.Popen:
    """The launcher of one machine, in a working folder of its own."""
    folder.mkdir()
    here = ["--num_machines", "2", "--num_processes", "2", "--machine_rank", str(rank)]
    meeting = ["--main_process_ip", "127.0.0.1", "--main_process_port", port]
    return subprocess.Popen(
        [sys.executable, "-m", "accelerate.commands.launch", *NODES[rank], *here, *meeting, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=folder,
        # the name of a machine may not lead back to it, so gloo is told the interface
        env=small.environment(ACCELERATE_USE_CPU="true", GLOO_SOCKET_IFNAME="lo"),
        start_new_session=True,
    )


@pytest.fixture(scope="module")
def crops(tmp_path_factory) -> Path:
    return small.drawn(tmp_path_factory.getbasetemp(), small.UNLABELED)


@pytest.fixture(scope="module")
def alone(tmp_path_factory, crops) -> list[dict[str, float]]:
    """The lines of the same pretraining by one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    assert small.run(small.arguments("pretrain/run.py", out, crops, *SETTINGS)) == 0
    return small.metrics(out)


def losses(lines: list[dict[str, float]]) -> list[float]:
    return [line[term] for line in lines for term in ("loss", "loss_cls", "loss_patch")]


def test_two_machines_learn_what_one_does(alone, crops, tmp_path):
    out, port = tmp_path / "run", small.free_port()
    command = small.arguments("pretrain/run.py", out, crops, *SETTINGS)
    machines = [start(rank, port, command, tmp_path / f"machine-{rank}") for rank in range(2)]
    try:
        printed = [machine.communicate(timeout=PATIENCE_S) for machine in machines]
    finally:
        for machine in machines:
            with contextlib.suppress(ProcessLookupError):  # the launcher and what it has started
                os.killpg(machine.pid, signal.SIGKILL)
            machine.wait()
    for rank, machine in enumerate(machines):
        assert machine.returncode == 0, printed[rank][1][-3000:]

    for told, _ in printed:
        assert "2 process(es) x 1 micro-batch(es) x 8 images" in told
    facts = small.json_of(out / "environment.json")
    assert facts["processes"] == 2
    assert not facts.get("earlier"), "a second writer would look like a second launch"
    lines = small.metrics(out)
    assert [line["step"] for line in lines] == list(range(8)), "two writers would write each line twice"
    assert len(list(out.rglob("events.out.tfevents.*"))) == 1
    assert [list((tmp_path / f"machine-{rank}").iterdir()) for rank in range(2)] == [[], []]
    assert (out / "teacher" / "model.safetensors").is_file()

    assert losses(lines)[:3] == pytest.approx(losses(alone)[:3], rel=1e-5)
    assert losses(lines) == pytest.approx(losses(alone), rel=1e-3)
