"""The launch files start what exists, and a job that is told to end is saved and queued again.

Slurm itself is not there: `srun` and `scontrol` are stand-ins of a few lines.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from helpers import ENV, ROOT, losses, steps, wait_for
from smallgpt import settings
from train_fsdp import MeshTrainSettings

STAND_INS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >> "$CALLS"; fi',
    # srun passes its signals on, as here the process it becomes gets them
    "srun": 'while [ "${1#-}" != "$1" ]; do shift; done; exec "$@"',
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
}


@pytest.mark.slow
def test_a_slurm_job_near_its_end_is_saved_and_queued_again(tmp_path, tiny):
    """The job would be killed at its time limit, and nobody would start it again."""
    for name, body in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n", encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    env = {
        **ENV,
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "CALLS": str(tmp_path / "calls"),
        "SLURM_JOB_NODELIST": "localhost",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_NNODES": "1",
        "SLURM_GPUS_ON_NODE": "2",
    }
    args = tiny(tmp_path, run="job", max_steps=5000, eval_every=5000, save_every=5000)
    words = ["bash", "scripts/launch/slurm.sh", "train.py", *args]
    job = subprocess.Popen(words, cwd=ROOT, env=env, stdout=subprocess.PIPE, text=True)
    folder = tmp_path / "job"
    log = folder / "metrics.jsonl"
    wait_for(lambda: log.exists() and len(losses(folder, "train")) >= 3, "three steps")
    job.send_signal(signal.SIGTERM)
    text, _ = job.communicate(timeout=60)
    assert "the same command continues" in text
    assert steps(folder) == [max(losses(folder, "train"))]
    calls = (tmp_path / "calls").read_text(encoding="utf-8")
    assert calls == f"requeue {os.getpid()}\n"


def test_the_job_of_kubernetes_is_a_valid_command():
    """A setting was renamed, and the pods end with "unknown key"."""
    text = (ROOT / "scripts/launch/kubernetes.yaml").read_text(encoding="utf-8")
    job = yaml.safe_load(text)
    (container,) = job["spec"]["pytorchReplicaSpecs"]["Worker"]["template"]["spec"]["containers"]
    launcher, script, config, *changes = container["command"]
    assert (launcher, script) == ("torchrun", "train_fsdp.py")
    s = settings.load(MeshTrainSettings, [str(Path(ROOT, config)), *changes])
    mounted = container["volumeMounts"][0]["mountPath"]
    assert all(path.startswith(f"{mounted}/") for path in (s.out_dir, s.data.cache, s.data.path))
