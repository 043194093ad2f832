"""examples/cluster/: what each example starts, and what the Slurm script does near its limit.

The shell scripts run for real, with stand-ins for torchrun and for Slurm's commands. Whether the
YAML files have the form that their readers want: `python -m tests.examples.schemas`.
"""

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from tests.helpers import ROOT
from training.command_line import read_command_line

yaml = pytest.importorskip("yaml")

CLUSTER = ROOT / "examples" / "cluster"
EXAMPLES = sorted(f.name for f in CLUSTER.iterdir() if f.suffix in (".sh", ".yaml"))
SETTINGS = {
    "DATA": "/shared/text.txt", "RUNS": "/shared/runs", "FIRST": "host1",
    "SLURM_JOB_ID": "12", "SLURM_JOB_NAME": "gpt2", "SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "8",
    "SLURM_JOB_NODELIST": "node[1-2]", "SKYPILOT_NUM_GPUS_PER_NODE": "8",
}  # fmt: skip
SLURM = {"srun": 'exec "$@"', "scontrol": 'echo "$@" >> scontrol.txt; echo node1'}
SHOW = "import json, sys; print(json.dumps(sys.argv[1:]))"
SHOW = f'exec {shlex.quote(sys.executable)} -c {shlex.quote(SHOW)} "$@"'


def stand_ins(folder: Path, **programs: str) -> dict[str, str]:
    """An environment in which these are found first, and a virtual environment in `folder`."""
    (folder / ".venv" / "bin").mkdir(parents=True)
    (folder / ".venv" / "bin" / "activate").write_text("")
    for name, text in programs.items():
        file = folder / "bin" / name
        file.parent.mkdir(exist_ok=True)
        file.write_text(f"#!/bin/bash\n{text}\n")
        file.chmod(0o755)
    return {**os.environ, **SETTINGS, "PATH": f"{folder / 'bin'}:{os.environ['PATH']}"}


def torchrun_of(name: str, folder: Path) -> list[str]:
    """The arguments that an example gives to torchrun."""
    if name.endswith(".yaml"):
        task = yaml.safe_load((CLUSTER / name).read_text())
        if "trainer" in task.get("spec", {}):
            return task["spec"]["trainer"]["args"]
        if "spec" in task:
            worker = task["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]
            return worker["containers"][0]["command"][1:]
        shell = ["-c", task["run"]]
    else:
        shell = [str(CLUSTER / name), "--max_steps", "5"]
    environment = stand_ins(folder, torchrun=SHOW, **SLURM)
    done = subprocess.run(
        ["bash", *shell], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    assert not done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXAMPLES)
def test_torchrun_and_train_py_take_the_flags(name, tmp_path, monkeypatch):
    launch = get_args_parser().parse_args(torchrun_of(name, tmp_path))
    assert Path(launch.training_script).name == "train.py"
    assert launch.max_restarts > 0 or name == "pytorchjob.yaml"  # where the operator sets it
    monkeypatch.chdir(ROOT)
    argv = [flag.replace("/triptych/", "") for flag in launch.training_script_args]
    spec = read_command_line(lambda _: None, [*argv, "--runs_dir", str(tmp_path)])
    assert spec.run == tmp_path / "gpt2"
    assert spec.config.model.d_model == 768
    for processes in (8, 16):
        spec.config.train.share_of(processes)
    assert (spec.config.max_steps == 5) == name.endswith(".sh")  # further flags are for train.py


@pytest.mark.parametrize(
    ("status", "requeued"), [(1, True), (0, False)], ids=["stopped", "at its end"]
)
def test_near_its_limit_the_slurm_job_stops_and_goes_back_to_the_queue(tmp_path, status, requeued):
    """As it does only if it was signalled, and not when the run has come to its end."""
    wait = f"""trap 'echo signalled > torchrun.txt; sleep 0.3; exit {status}' USR1
    touch started
    while :; do sleep 0.05; done"""
    environment = stand_ins(tmp_path, torchrun=wait, **SLURM)
    job = subprocess.Popen(["bash", CLUSTER / "slurm.sh"], cwd=tmp_path, env=environment)
    while not (tmp_path / "started").exists():
        assert job.poll() is None
        time.sleep(0.01)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(60) == 0
    assert (tmp_path / "torchrun.txt").exists()
    assert ("requeue 12" in (tmp_path / "scontrol.txt").read_text()) == requeued


def test_a_slurm_job_that_fails_stays_failed(tmp_path):
    environment = stand_ins(tmp_path, torchrun="exit 3", **SLURM)
    done = subprocess.run(["bash", CLUSTER / "slurm.sh"], cwd=tmp_path, env=environment)
    assert done.returncode == 3
    assert "requeue" not in (tmp_path / "scontrol.txt").read_text()
