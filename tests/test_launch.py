"""The launch scripts parse, pass what they are given to main, and queue an interrupted job again."""

from __future__ import annotations

import configparser
import dataclasses
import os
import re
import shlex
import shutil
import signal
import subprocess
import sysconfig
import time
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from proglora_jax.continual.row_split import check_rows
from proglora_jax.core import mesh as meshes
from proglora_jax.data.tasks import task_order
from proglora_jax.training.config_file import load_config
from proglora_jax.training.processes import LOST
from proglora_jax.training.settings import from_config

LAUNCH = Path(__file__).parents[1] / "launch"
SCRIPTS = ["local.sh", "slurm.sbatch", "tpu_vm.sh", "k8s/run.sh"]


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


def examples(name: str) -> list[list[str]]:
    """The commands that the first lines of a script show, in words; not those that only print."""
    text = (LAUNCH / name).read_text().replace("\\\n#", "")
    return [shlex.split(line) for line in re.findall(r"^#   (.*)", text, re.MULTILINE) if "configs/" in line and "--dry-run" not in line]


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_commands_that_a_script_shows_could_run_every_task(name):
    shown = examples(name)
    assert any("configs/coin.py" in word for words in shown for word in words)
    for words in shown:
        place = next(i for i, word in enumerate(words) if word.startswith("configs/"))
        given = dict(word.lstrip("-").split("=", 1) for word in words[:place] if "=" in word)
        devices = {
            "local.sh": len(given.get("CUDA_VISIBLE_DEVICES", "0").split(",")), "slurm.sbatch": 8 * int(given.get("nodes", 1)),
            "k8s/run.sh": int(given.get("PODS", 1)) * int(given.get("GPUS", 8)), "tpu_vm.sh": int(given.get("TYPE", "-0").split("-")[1]),
        }[name]  # fmt: skip
        values = load_config(f"{LAUNCH.parent}/{words[place]}", words[place + 2 :])
        assert values["model"]["path"] and values["data"]["root"]
        settings = from_config(values)
        mesh = meshes.abstract_mesh(dataclasses.asdict(settings.mesh), devices)
        check_rows(settings, task_order("coin"), mesh)
        assert settings.evaluate.batch_size % meshes.batch_ways(mesh) == 0


SRUN = """[[ " $* " == *" --cpus-per-task=${SLURM_CPUS_PER_TASK:-none} "* ]] || [[ -z ${SLURM_CPUS_PER_TASK:-} && $* != *cpus* ]] || exit 99
while [[ $1 == --* ]]; do shift; done
SLURM_NTASKS=2 SLURM_PROCID=1 exec "$@" """


def slurm(environment: dict) -> dict:
    return {**environment, "SLURM_JOB_ID": "45678", "SLURM_JOB_NODELIST": "n[1-2]"}


@pytest.mark.parametrize("code, cpus", [(0, {}), (3, {"SLURM_CPUS_PER_TASK": "32"})])
def test_slurm_starts_one_process_per_node_with_its_cpus_and_keeps_the_exit_code(stubs, code, cpus):
    environment, make, calls = stubs
    environment |= cpus
    make("scontrol", "echo node1; echo node2")
    make("srun", SRUN)
    make("python", f"exit {code}")
    done = subprocess.run(["bash", LAUNCH / "slurm.sbatch", "c.py", "my run", "--config.a=b c"], env=slurm(environment))
    assert done.returncode == code
    expected = ["-m", "proglora_jax.main", "--config", "c.py", "--workdir", "my run", "--coordinator_address", "node1:25678"]
    assert calls("python") == [[*expected, "--num_processes", "2", "--process_id", "1", "--config.a=b c", "--stopped_exit_code", "75"]]
    assert not any("requeue" in call for call in calls("scontrol"))


# What stands for a run whose end is asked for: it saves and says that it stopped; it could not listen yet; it was at its end anyway; it fails.
@pytest.mark.parametrize("code, queued, ends", [(75, True, 0), (143, True, 0), (0, False, 0), (1, False, 1)])
def test_slurm_queues_an_interrupted_run_again(stubs, tmp_path, code, queued, ends):
    environment, make, calls = stubs
    (tmp_path / "run").mkdir()
    make("scontrol", "echo node1")
    make("srun", SRUN)
    make("scancel", f"touch {tmp_path / 'stop'}")
    make("python", f"while [[ ! -e {tmp_path / 'stop'} ]]; do sleep 0.02; done; sleep 0.1; exit {code}")
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "c.py", str(tmp_path / "run")], env=slurm(environment))
    until = time.monotonic() + 10
    while not calls("python") and time.monotonic() < until:
        time.sleep(0.02)
    job.send_signal(signal.SIGTERM)
    assert job.wait(timeout=10) == ends
    assert calls("scancel") == [["--signal=TERM", "45678"]]
    assert (["requeue", "45678"] in calls("scontrol")) is queued
    assert not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("code, queued", [(0, True), (1, False)])  # of srun: another node's run may fail when it is asked to stop
def test_slurm_queues_a_run_again_whose_steps_alone_were_asked_to_stop(stubs, tmp_path, code, queued):
    """Preemption with grace and `scancel --signal=TERM` do not reach the batch shell; the nodes' shells get the signal with their runs."""
    environment, make, calls = stubs
    (tmp_path / "run").mkdir()
    make("scontrol", "echo node1")
    make("srun", SRUN.replace("exec ", "setsid --wait ") + f" || exit\nexit {code}")
    make("python", f"echo $PPID > {tmp_path / 'shell'}; trap 'sleep 0.1; exit 75' TERM; while :; do sleep 0.02; done")
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "c.py", str(tmp_path / "run")], env=slurm(environment))
    until = time.monotonic() + 10
    while not (tmp_path / "shell").exists() or not (tmp_path / "shell").read_text():
        assert time.monotonic() < until
        time.sleep(0.02)
    time.sleep(0.1)  # until the run listens
    os.killpg(int((tmp_path / "shell").read_text()), signal.SIGTERM)
    assert job.wait(timeout=10) == code
    assert (["requeue", "45678"] in calls("scontrol")) is queued and not calls("scancel")
    assert not list((tmp_path / "run").iterdir())


def manifests(environment: dict, *arguments: str) -> list[dict]:
    """What launch/k8s/run.sh would apply."""
    done = subprocess.run(["bash", LAUNCH / "k8s" / "run.sh", "--dry-run", *arguments], env=environment, capture_output=True, check=True)
    return list(yaml.safe_load_all(done.stdout.decode()))


def test_kubernetes_manifests_fit_the_published_schemas_and_each_other():
    made = manifests({**os.environ, "IMAGE": "r.io/x:1", "PODS": "4", "GPUS": "2"}, "c.py", "/runs/a", '--config.a=b "c" \\d & e')
    for manifest in made:
        kubernetes_validate.validate(manifest, "1.30", strict=True)
    service, job = made
    spec, pod = job["spec"], job["spec"]["template"]["spec"]
    train = pod["containers"][0]
    assert train["args"] == ["--config", "c.py", "--workdir", "/runs/a", '--config.a=b "c" \\d & e']
    assert (train["image"], train["resources"]["limits"]["nvidia.com/gpu"]) == ("r.io/x:1", 2)
    command = train["command"][2]
    assert command.startswith("exec python -m proglora_jax.main ") and "\n" not in command and command.endswith('"$@"')
    assert int(re.search(r"--num_processes (\d+)", command)[1]) == spec["completions"] == spec["parallelism"] == 4
    name, port = job["metadata"]["name"], service["spec"]["ports"][0]["port"]
    assert service["spec"]["selector"] == {"job-name": name} and service["spec"]["clusterIP"] == "None"
    assert pod["subdomain"] == service["metadata"]["name"] and spec["completionMode"] == "Indexed"
    assert f"--coordinator_address {name}-0.{pod['subdomain']}:{port} " in command
    assert {mount["name"] for mount in train["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    code = int(re.search(r"--stopped_exit_code (\d+)", command)[1])
    rules = [(rule["action"], rule.get("onExitCodes", {}).get("values")) for rule in spec["podFailurePolicy"]["rules"]]
    # evicted, stopped: no failure, the Job starts its pods again; what would fail again ends it; a loss counts for every pod, 16 times
    assert rules == [("Ignore", None), ("Ignore", [code]), ("FailJob", [1])] and LOST not in (0, 1, code)
    assert spec["backoffLimit"] == 16 * spec["completions"]


def test_a_manifest_that_does_not_fit_is_noticed():
    service, job = manifests(dict(os.environ), "c.py", "/runs/a")
    job["spec"]["parallelisms"] = 2
    service["spec"]["ports"][0]["port"] = "many"
    for manifest in (service, job):
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(manifest, "1.30", strict=True)


def test_kubernetes_replaces_the_job_of_before(stubs, tmp_path):
    environment, make, calls = stubs
    make("kubectl", f'if [[ $1 == apply ]]; then cat > {tmp_path / "applied"}; fi')
    subprocess.run(["bash", LAUNCH / "k8s" / "run.sh", "c.py", "/runs/a"], env=environment, check=True)
    assert [call[0] for call in calls("kubectl")] == ["delete", "apply"]
    assert [manifest["kind"] for manifest in yaml.safe_load_all((tmp_path / "applied").read_text())] == ["Service", "Job"]


def test_the_image_holds_the_package_and_its_gpu_extra():
    text = (LAUNCH / "k8s" / "Dockerfile").read_text()
    steps = re.findall(r"^(FROM|WORKDIR|COPY|RUN|ENV|ENTRYPOINT|CMD)\b(.*)", text, re.MULTILINE)
    assert steps[0][0] == "FROM" and steps[-1][0] == "CMD"
    copied = [name for verb, rest in steps if verb == "COPY" for name in rest.split()[:-1]]
    assert all((LAUNCH.parent / name).exists() for name in copied)
    extras = configparser.ConfigParser()
    extras.read(LAUNCH.parent / "setup.cfg")
    assert re.search(r"\[(\w+)\]'", text)[1] in extras["options.extras_require"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_has_nothing_to_say(name):
    tool = shutil.which("shellcheck", path=os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]]))
    if tool is None:
        pytest.skip("shellcheck is not installed: pip install -e '.[test]' brings it")
    done = subprocess.run([tool, "--severity=style", LAUNCH / name], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


def test_dry_runs_print_what_would_run_and_run_nothing(stubs):
    environment, make, calls = stubs
    for command in ("python", "srun", "scontrol", "gcloud", "kubectl"):
        make(command)
    make("git")
    environment |= {"NAME": "n", "ZONE": "z", "TYPE": "t", "RUNTIME": "r"}
    for name in SCRIPTS:
        arguments = ["bash", LAUNCH / name, "--dry-run", "c.py", "runs/a", "--config.a=b"]
        printed = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=True).stdout
        assert "proglora_jax.main" in printed and "c.py" in printed and "runs/a" in printed and "--config.a=b" in printed
    assert not any(calls(command) for command in ("python", "srun", "scontrol", "gcloud", "kubectl"))


TPU = {"NAME": "n", "ZONE": "z", "TYPE": "t", "RUNTIME": "r", "NFS": "10.0.0.2:/share", "PAUSE": "0"}


def test_cloud_tpu_makes_the_slice_once_and_runs_on_all_hosts(stubs, tmp_path):
    environment, make, calls = stubs
    make("gcloud")  # no state: the slice is not there
    make("git")  # no files: the archive is empty
    subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "c.py", "runs/a", "--config.a=b c"], env=environment | TPU, check=True)
    verbs = [call[3] for call in calls("gcloud") if len(call) > 3]
    assert verbs[:3] == ["describe", "create", "scp"] and set(verbs[3:]) == {"ssh"}
    last = (tmp_path / "calls").read_text().rpartition("proglora_jax.main")[2].split("--zone")[0].replace("\\\n", " ").split("|")[0]
    expected = "--config c.py --workdir /mnt/proglora/runs/a --distributed --stopped_exit_code 75 --config.a=b\\ c"
    assert last.split() == expected.split()


# describe, create and delete follow a marker; the run ends with a code so many times, and then well
GCLOUD = """here={0}/here ran={0}/ran
case "$4" in
  create) touch $here ;;
  delete) rm $here ;;
  describe) if [[ -e $here ]]; then {1} echo READY; fi ;;
  ssh) if [[ $* == *proglora_jax.main* ]]; then echo x >> $ran; if (( $(wc -l < $ran) <= {2} )); then exit {3}; fi; rm -f $here.gone; fi ;;
esac"""


def tpu(stubs, gcloud: str) -> tuple[int, list[str], int]:
    """(exit code, gcloud's verbs, how often the run began) of launch/tpu_vm.sh with a stub of gcloud."""
    environment, make, calls = stubs
    make("gcloud", gcloud)
    make("git")
    done = subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "c.py", "runs/a"], env=environment | TPU, timeout=30)
    began = sum("proglora_jax.main" in call for call in (Path(environment["PATH"].split(":")[0]).parent / "calls").read_text().splitlines())
    return done.returncode, [call[3] for call in calls("gcloud") if len(call) > 3], began


@pytest.mark.parametrize("code, times, ends, begins", [
    (75, 1, 0, 2),  # stopped, to be continued
    (3, 1, 3, 1),  # failed, on a slice that is there
    (255, 3, 0, 4), (LOST, 1, 0, 2), (134, 1, 0, 2),  # the connection, or a process, is lost
    (LOST, 99, LOST, 17),  # again and again
])  # fmt: skip
def test_cloud_tpu_goes_on_on_a_slice_that_is_there_after_a_loss_and_not_after_a_failure(stubs, tmp_path, code, times, ends, begins):
    status, verbs, began = tpu(stubs, GCLOUD.format(tmp_path, "", times, code))
    assert (status, began, verbs.count("create"), verbs.count("delete")) == (ends, begins, 1, 0)


@pytest.mark.parametrize("code", [1, 75, 255])
def test_cloud_tpu_makes_a_slice_again_that_was_taken_away(stubs, tmp_path, code):
    """Also where its state says so only some time after the connection was lost."""
    late = 3 if code == 255 else 0
    asked = "$(echo >> $here.gone; wc -l < $here.gone)"
    gone = f"if [[ -e $ran && $(wc -l < $ran) == 1 ]] && (( {asked} > {late} )); then echo PREEMPTED; exit; fi;"
    status, verbs, began = tpu(stubs, GCLOUD.format(tmp_path, gone, 1, code))
    assert (status, began, verbs.count("create"), verbs.count("delete")) == (0, 2, 2, 1)


@pytest.mark.parametrize("verb, fails", [("create", 4), ("scp", 3), ("ssh", 2), ("delete", 2)])
def test_cloud_tpu_tries_again_where_there_is_no_room_or_a_host_does_not_answer_yet(stubs, tmp_path, verb, fails):
    gone = "if [[ -e $ran && $(wc -l < $ran) == 1 && ! -e $here.gone ]]; then echo PREEMPTED; exit; fi;"
    refuse = f'if [[ $4 == {verb} ]]; then echo x >> {tmp_path}/no; if (( $(wc -l < {tmp_path}/no) <= {fails} )); then exit 1; fi; fi\n'
    stub = GCLOUD.format(tmp_path, gone, 1, 255).replace("delete) rm $here", "delete) rm $here; touch $here.gone")
    status, verbs, began = tpu(stubs, refuse + stub)
    assert (status, began, verbs.count(verb) > fails) == (0, 2, True)


def test_cloud_tpu_does_not_try_for_ever(stubs, monkeypatch):
    monkeypatch.setitem(TPU, "TRIES", "5")
    status, verbs, began = tpu(stubs, '[[ $4 != create ]]')
    assert (status, began, verbs.count("create")) == (1, 0, 5)
