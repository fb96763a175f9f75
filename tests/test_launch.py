"""The launch scripts parse, pass what they are given to main, and queue an interrupted job again."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ["local.sh", "slurm.sbatch", "cloud_tpu.sh"]


@pytest.fixture
def stubs(tmp_path):
    """A folder of commands that note their arguments, to be found before the real ones; returns (environment, make, calls)."""
    folder, notes = tmp_path / "bin", tmp_path / "calls"
    folder.mkdir()

    def make(name: str, body: str = "") -> None:
        (folder / name).write_text(f'#!/usr/bin/env bash\nprintf "%s\\n" "{name}$(printf "|%s" "$@")" >> {notes}\n{body}\n')
        (folder / name).chmod(0o755)

    def calls(name: str) -> list[list[str]]:
        lines = notes.read_text().splitlines() if notes.exists() else []
        return [line.split("|")[1:] for line in lines if line.split("|")[0] == name]

    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}"}, make, calls


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_say_how_to_use_them(name, stubs):
    path = LAUNCH / name
    assert subprocess.run(["bash", "-n", path], check=True, capture_output=True).stderr == b""
    done = subprocess.run(["bash", path], capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 2 and "CONFIG" in done.stderr and "WORKDIR" in done.stderr
    assert os.access(path, os.X_OK) and len(path.read_text().splitlines()) < 80


def test_local_passes_everything_on(stubs):
    environment, make, calls = stubs
    make("python", "exit 7")
    done = subprocess.run(["bash", LAUNCH / "local.sh", "c.py", "my run", "--config.seed=1"], env=environment)
    assert done.returncode == 7
    assert calls("python") == [["-m", "proglora_jax.main", "--config", "c.py", "--workdir", "my run", "--config.seed=1"]]


SRUN = """while [[ $1 == --* ]]; do shift; done
SLURM_NTASKS=2 SLURM_PROCID=1 exec "$@" """


def slurm(environment: dict) -> dict:
    return {**environment, "SLURM_JOB_ID": "45678", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize("code", [0, 3])
def test_slurm_starts_one_process_per_node_and_keeps_the_exit_code(stubs, code):
    environment, make, calls = stubs
    make("scontrol", "echo node1; echo node2")
    make("srun", SRUN)
    make("python", f"exit {code}")
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "c.py", "my run", "--config.a=b c"], env=slurm(environment))
    assert done.returncode == code
    expected = ["-m", "proglora_jax.main", "--config", "c.py", "--workdir", "my run", "--coordinator_address", "node1:25678"]
    assert calls("python") == [[*expected, "--num_processes", "2", "--process_id", "1", "--config.a=b c"]]
    assert not any("requeue" in call for call in calls("scontrol"))


def test_slurm_queues_an_interrupted_run_again(stubs, tmp_path):
    environment, make, calls = stubs
    make("scontrol", "echo node1")
    make("srun", SRUN)
    make("scancel", f"touch {tmp_path / 'stop'}")
    # stands for a run that saves on SIGTERM and exits with 0
    make("python", f"while [[ ! -e {tmp_path / 'stop'} ]]; do sleep 0.02; done; sleep 0.1")
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "c.py", "run"], env=slurm(environment))
    until = time.monotonic() + 10
    while not calls("python") and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=10) == 0
    assert calls("scancel") == [["--signal=TERM", "45678"]]
    assert ["requeue", "45678"] in calls("scontrol")


def test_kubernetes_job_is_consistent():
    service, job = yaml.safe_load_all((LAUNCH / "kubernetes.yaml").read_text())
    assert (service["kind"], job["kind"]) == ("Service", "Job")
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    arguments = pod["containers"][0]["args"][0]
    assert arguments.startswith("exec python -m proglora_jax.main --config configs/") and "\n" not in arguments
    assert int(re.search(r"--num_processes (\d+)", arguments)[1]) == spec["completions"] == spec["parallelism"]
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    assert f"--coordinator_address {name}-0.{pod['subdomain']}:{port} " in arguments
    mounted = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}


def test_cloud_tpu_makes_the_slice_once_and_runs_on_all_hosts(stubs, tmp_path):
    environment, make, calls = stubs
    make("gcloud", '[[ $4 != describe ]]')
    make("git")  # no files: the archive is empty
    environment |= {"NAME": "n", "ZONE": "z", "TYPE": "t", "RUNTIME": "r", "NFS": "10.0.0.2:/share"}
    subprocess.run(["bash", LAUNCH / "cloud_tpu.sh", "c.py", "runs/a", "--config.a=b c"], env=environment, check=True)
    verbs = [call[3] for call in calls("gcloud") if len(call) > 3]
    assert verbs[:3] == ["describe", "create", "scp"] and set(verbs[3:]) == {"ssh"}
    last = (tmp_path / "calls").read_text().rpartition("proglora_jax.main")[2].replace("\\\n", " ")
    assert last.split() == "--config c.py --workdir /mnt/proglora/runs/a --distributed --config.a=b\\ c".split()
