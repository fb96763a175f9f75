"""The launch scripts parse, pass what they are given to main, and queue an interrupted job again."""

from __future__ import annotations

import configparser
import dataclasses
import fnmatch
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
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
    assert os.access(path, os.X_OK) and len(path.read_text().splitlines()) <= 100


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


# Runs a command for every task as srun of SLURM 22.05 was seen to do: with --disable-status it hands SIGINT on, SIGTERM kills the tasks, a
# task that ends badly makes it ask the others to end, and its own exit code is the highest.
SRUN = """import os, signal, subprocess, sys
first = next(place for place in range(1, len(sys.argv)) if not sys.argv[place].startswith("--"))
flags, words = sys.argv[1:first], sys.argv[first:]
cpus = ["--cpus-per-task=" + os.environ["SLURM_CPUS_PER_TASK"]] if "SLURM_CPUS_PER_TASK" in os.environ else []
assert sorted({"--disable-status", *flags}) == sorted(["--disable-status", "--kill-on-bad-exit=1", *cpus]), flags
send = lambda number: [os.killpg(step.pid, number) for step in steps if step.poll() is None]
signal.signal(signal.SIGINT, lambda *_: send(signal.SIGINT) if "--disable-status" in flags else None)
signal.signal(signal.SIGTERM, lambda *_: send(signal.SIGKILL))
count = int(os.environ.get("TASKS", "1"))
places = [{"SLURM_NTASKS": str(count), "SLURM_PROCID": str(number)} for number in range(count)]
steps = [subprocess.Popen(words, env=os.environ | place, start_new_session=True) for place in places]
bad = False
while any(step.poll() is None for step in steps):
    if not bad and any(step.poll() for step in steps):
        bad = True
        send(signal.SIGTERM)
    signal.sigtimedwait([], 0.02)
sys.exit(max(step.poll() if step.poll() >= 0 else 128 - step.poll() for step in steps))
"""
# Stands for a run: notes that it listens, and ends when it is told to, with what its process is given; a second signal ends it at once.
RUN = """import os, pathlib, signal, sys, time
here, ends = pathlib.Path(os.environ["HERE"]), os.environ["ENDS"].split()[int(os.environ["SLURM_PROCID"])]
def asked(number, _frame):
    signal.signal(signal.SIGTERM, signal.SIG_DFL), signal.signal(signal.SIGINT, signal.SIG_DFL)
    (here / "asked").touch()
    time.sleep(0.3)
    os._exit(int(ends.lstrip("!")))
signal.signal(signal.SIGTERM, asked), signal.signal(signal.SIGINT, asked)
(here / ("listens" + os.environ["SLURM_PROCID"])).write_text(str(os.getppid()))
if ends.startswith("!"):  # by itself
    while not (here / "listens0").exists() or not (here / ("listens" + str(len(os.environ["ENDS"].split()) - 1))).exists():
        time.sleep(0.02)
    os._exit(int(ends[1:])) if ends != "!137" else os.kill(os.getpid(), 9)
time.sleep(20)
"""


class Slurm:
    """launch/slurm.sbatch with stubs of SLURM's commands and of the run.

    Args:
        ends: for every process the exit code with which its run ends when it is asked to; "!1" ends by itself with 1.
        state: what squeue says.
        scripts: bodies of further stubs.
    """

    def __init__(self, stubs, folder: Path, ends: str, state: str = "echo RUNNING", **scripts: str):
        environment, make, self.calls = stubs
        self.folder, self.workdir, self.count = folder, folder / "my run", len(ends.split())
        for name, text in (("srun", SRUN), ("python", RUN)):
            (folder / f"{name}.py").write_text(text)
            make(name, f'exec {sys.executable} {folder / name}.py "$@"')
        bodies = {"scontrol": "echo node1; echo node2", "squeue": state, "sleep": "exec /bin/sleep 0.02", "scancel": "exit 1"} | scripts
        for name, body in bodies.items():
            make(name, body)
        given = {"SLURM_JOB_ID": "45678", "SLURM_JOB_NODELIST": "n[1-2]", "TASKS": str(self.count), "ENDS": ends,
                 "HERE": str(folder), "SLURM_JOB_NUM_NODES": str(self.count)}
        self.environment = environment | given

    def run(self, signals=lambda job: None, **environment: str) -> int:
        """Exit code of the script; signals: called with it when every run listens."""
        command = ["bash", LAUNCH / "slurm.sbatch", "c.py", str(self.workdir), "--config.a=b c"]
        job = subprocess.Popen(command, env=self.environment | environment)
        wait_for(lambda: all(self.shell(number) for number in range(self.count)) or job.poll() is not None)
        signals(job)
        code = job.wait(timeout=20)
        assert not list(self.workdir.iterdir()), "no note is left"
        return code

    def shell(self, number: int) -> int:
        """The process id of a node's shell, whose run listens."""
        path = self.folder / f"listens{number}"
        return int(path.read_text() or 0) if path.exists() else 0

    @property
    def queued(self) -> bool:
        """Whether the job is queued again."""
        return ["requeue", "45678"] in self.calls("scontrol")


def wait_for(holds, seconds: float = 10) -> None:
    """Returns when it holds."""
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until
        time.sleep(0.02)


def terminate(job: subprocess.Popen) -> None:
    """What SLURM does to the batch shell before the end of the time."""
    job.send_signal(signal.SIGTERM)


@pytest.mark.parametrize("code, cpus", [(0, {}), (3, {"SLURM_CPUS_PER_TASK": "32"})])
def test_slurm_starts_one_process_per_node_with_its_cpus_and_keeps_the_exit_code(stubs, tmp_path, code, cpus):
    slurm = Slurm(stubs, tmp_path, f"!{code}")
    assert slurm.run(**cpus) == code
    expected = ["-m", "proglora_jax.main", "--config", "c.py", "--workdir", str(slurm.workdir), "--coordinator_address", "node1:25678"]
    expected += ["--num_processes", "1", "--process_id", "0", "--config.a=b c", "--stopped_exit_code", "75"]
    assert slurm.calls("python") == [expected]
    assert not slurm.queued


# What stands for a run whose end is asked for: it saves and says that it stopped; it could not listen yet; it was at its end; it fails,
# alone or before another, which srun then ends, has saved.
@pytest.mark.parametrize("ends, queued, succeeds", [
    ("75 75", True, True), ("130", True, True), ("0 0", False, True), ("1", False, False), ("75 1", False, False), ("143 1", False, False),
])  # fmt: skip
def test_slurm_queues_an_interrupted_run_again(stubs, tmp_path, ends, queued, succeeds):
    slurm = Slurm(stubs, tmp_path, ends)
    assert (slurm.run(terminate) == 0) is succeeds
    assert slurm.queued is queued and (tmp_path / "asked").exists()


def test_slurm_asks_a_run_to_stop_and_queues_it_again_though_the_controller_is_busy(stubs, tmp_path):
    refuse = f'if [[ $1 == requeue ]] && (( $(echo x >> {tmp_path}/no; wc -l < {tmp_path}/no) < 4 )); then exit 1; fi; echo node1'
    slurm = Slurm(stubs, tmp_path, "75", state="exit 1", scontrol=refuse)
    assert slurm.run(terminate) == 0
    assert [call[0] for call in slurm.calls("scontrol")] == ["show", *["requeue"] * 4]


def test_slurm_says_so_where_it_cannot_queue_a_run_again(stubs, tmp_path, capfd):
    slurm = Slurm(stubs, tmp_path, "75", scontrol="[[ $1 == show ]] && echo node1")
    assert slurm.run(terminate) == 1
    assert "SLURM does not queue job 45678 again" in capfd.readouterr().err


def test_slurm_leaves_a_job_alone_that_its_user_cancels(stubs, tmp_path):
    """`scancel JOB` sends SIGTERM to the batch shell and to the steps; a second signal would end the run before it has saved."""
    slurm = Slurm(stubs, tmp_path, "75", state="echo COMPLETING")

    def cancel(job):
        os.killpg(slurm.shell(0), signal.SIGTERM)
        terminate(job)

    assert slurm.run(cancel) == 0
    assert not slurm.queued and not slurm.calls("scancel")


@pytest.mark.parametrize("ends, queued", [("75 75", True), ("75 1", False)])  # another node's run may fail when it is asked to stop
def test_slurm_queues_a_run_again_whose_steps_alone_were_asked_to_stop(stubs, tmp_path, ends, queued):
    """Preemption with grace and `scancel --signal=TERM` do not reach the batch shell; the nodes' shells get the signal with their runs."""
    slurm = Slurm(stubs, tmp_path, ends)
    code = slurm.run(lambda job: [os.killpg(slurm.shell(number), signal.SIGTERM) for number in range(2)])
    assert slurm.queued is queued and (code == 0) is queued


# A process is lost, and srun asks the other to end, which the loss ends too; one fails, which the other takes for a loss; both fail.
@pytest.mark.parametrize("ends, before, queued", [
    (f"!{LOST} {LOST}", 0, True), ("!134 137", 0, True), ("!139 137", 0, True), ("!137 75", 15, True), ("!137 134", 16, False),
    (f"!1 {LOST}", 0, False), ("!1 137", 0, False), ("!2 75", 0, False), ("!1 !1", 0, False),
    ("!137", 0, False), ("!139", 0, False),  # alone: memory is over, or a fault, which would come again
])  # fmt: skip
def test_slurm_queues_a_run_again_that_lost_a_process_and_none_that_failed(stubs, tmp_path, ends, before, queued):
    slurm = Slurm(stubs, tmp_path, ends)
    code = slurm.run(**({"SLURM_RESTART_COUNT": str(before)} if before else {}))
    assert slurm.queued is queued and (code == 0) is queued


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
    # what a pod has compiled is there for the one that takes its place
    cache = {entry["name"]: entry["value"] for entry in train["env"]}["JAX_COMPILATION_CACHE_DIR"]
    mounts = {mount["mountPath"]: mount["name"] for mount in train["volumeMounts"]}
    assert mounts[str(Path(cache).parent)] == "runs"


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


def left_out(path: str, patterns: list[str]) -> bool:
    """Whether Docker leaves a path out of a build, by patterns for one name: at the root, or after "**/" in any folder."""
    parts = path.split("/")
    return any(
        fnmatch.fnmatchcase(part, pattern.removeprefix("**/"))
        for pattern in patterns for part in (parts if pattern.startswith("**/") else parts[:1])
    )  # fmt: skip


def test_the_image_leaves_out_what_git_ignores_and_git_itself():
    root = LAUNCH.parent
    patterns = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert not any("/" in pattern.removeprefix("**/") for pattern in patterns)
    for ignored in ["/.git/", "**/.cache/", *(root / ".gitignore").read_text().split()]:
        name = re.sub(r"\[(\w)\w*\]", r"\1", ignored.removeprefix("**/").strip("/")).replace("*", "x")
        for path in (name, f"{name}/file", name if ignored.startswith("/") else f"folder/{name}"):
            assert left_out(path, patterns), f"{path}: .gitignore has {ignored}, .dockerignore does not"
    needed = [path.relative_to(root) for name in ("proglora_jax", "configs", "launch") for path in (root / name).rglob("*.*")]
    needed = [str(path) for path in needed if "__pycache__" not in path.parts]
    assert needed and not [path for path in [*needed, "setup.cfg", "README.md", "pyproject.toml"] if left_out(path, patterns)]


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


def test_cloud_tpu_takes_the_capacity_that_is_asked_for(stubs):
    environment, make, calls = stubs
    make("gcloud")
    make("git")
    command = ["bash", LAUNCH / "tpu_vm.sh", "c.py", "runs/a"]
    for name in ("", "spot", "reserved", "on-demand"):
        subprocess.run(command, env=environment | TPU | {"CAPACITY": name} if name else environment | TPU, check=True)
    flags = [[word for word in call if word in ("--spot", "--reserved")] for call in calls("gcloud") if call[3:4] == ["create"]]
    assert flags == [["--spot"], ["--spot"], ["--reserved"], []]
    done = subprocess.run(command, env=environment | TPU | {"CAPACITY": "cheap"}, capture_output=True, text=True)
    assert done.returncode == 2 and "CAPACITY=cheap: must be spot, on-demand or reserved" in done.stderr


# Stands for a run on a host: it saves half a second after the first signal, unless a second one ends it.
TPU_RUN = """#!{}
import os, pathlib, signal, sys, time
home = pathlib.Path.home()
def asked(number, _frame):
    signal.signal(number, signal.SIG_DFL)
    (home / "asked").touch()
    time.sleep(0.5)
    (home / "saved").touch()
    sys.exit(75)
signal.signal(signal.SIGTERM, asked)
with open(home / "listens", "a") as notes:
    notes.write(f"{{os.getpid()}}\\n")
time.sleep(20)
"""


class Host:
    """A folder that stands for the home of a TPU host, and the commands that launch/tpu_vm.sh would run there."""

    def __init__(self, stubs, folder: Path):
        self.environment, self.make, self.calls = stubs
        self.make("gcloud", f'if [[ $4 == ssh ]]; then for word; do if [[ ${{before:-}} == --command ]]; then printf "%s\\0" "$word" >> '
                            f'{folder}/commands; fi; before=$word; done; fi')  # fmt: skip
        self.make("git")
        subprocess.run(["bash", LAUNCH / "tpu_vm.sh", "c.py", "runs/my run"], env=self.environment | TPU, check=True)
        self.home = folder / "home"
        python = self.home / "environment" / "bin" / "python"
        python.parent.mkdir(parents=True)
        (self.home / "proglora").mkdir()
        python.write_text(TPU_RUN.format(sys.executable))
        python.chmod(0o755)
        self.environment |= {"HOME": str(self.home)}
        # where the share is mounted is not for tests to write
        self.prepare, self.run = (folder / "commands").read_text().replace("/mnt/proglora", str(folder / "share")).split("\0")[:2]

    def start(self, command: str) -> subprocess.Popen:
        """What sshd does with a command."""
        return subprocess.Popen(["bash", "-c", command], env=self.environment, cwd=self.home)

    def listening(self, times: int = 1) -> int:
        """The process id of the run of that number, once it listens."""
        wait_for(lambda: (self.home / "listens").exists() and (self.home / "listens").read_text().count("\n") >= times)
        return int((self.home / "listens").read_text().splitlines()[times - 1])


def test_cloud_tpu_does_not_start_a_run_beside_one_that_a_lost_connection_left(stubs, tmp_path):
    host = Host(stubs, tmp_path)
    first = host.start(host.run)
    assert host.listening() == first.pid == int((host.home / "proglora.pid").read_text())
    second = host.start(host.run)
    wait_for((host.home / "asked").exists)
    third = host.start(host.run)  # does not ask again: that would end the first unsaved
    assert first.wait(10) == 75 and (host.home / "saved").exists()
    assert second.wait(10) == third.wait(10) == LOST, "all hosts begin anew"
    assert (host.home / "listens").read_text().count("\n") == 1
    fourth = host.start(host.run)
    assert host.listening(2) == fourth.pid
    fourth.terminate()
    assert fourth.wait(10) == 75


@pytest.mark.parametrize("whose", ["nobody", "another program"])
def test_cloud_tpu_leaves_other_processes_alone_whose_number_was_a_runs(stubs, tmp_path, whose):
    host = Host(stubs, tmp_path)
    other = subprocess.Popen(["sleep", "20"])
    if whose == "nobody":
        other.kill()
        other.wait()
    (host.home / "proglora.pid").write_text(f"{other.pid}\n")
    run = host.start(host.run)
    assert host.listening() == run.pid and (whose == "nobody" or other.poll() is None)
    for process in (run, other):
        process.kill()
        process.wait()


def test_cloud_tpu_runs_outlive_the_end_of_their_session_until_they_have_saved(stubs, tmp_path):
    host = Host(stubs, tmp_path)
    run = host.start(host.run)
    host.listening()
    run.send_signal(signal.SIGTERM)
    run.send_signal(signal.SIGHUP)
    assert run.wait(10) == 75 and (host.home / "saved").exists()


@pytest.mark.parametrize("writable", [True, False])
def test_cloud_tpu_hosts_are_prepared_with_a_workdir_that_the_user_can_write(stubs, tmp_path, writable):
    host = Host(stubs, tmp_path)
    for name in ("tar", "python3.11", "mount.nfs", "mountpoint", "chown"):
        host.make(name)
    host.make("sudo", 'SUDO=1 exec "$@"')
    refused = "no" if writable else f"{tmp_path}/share"  # to all but root
    host.make("mkdir", f'if [[ ${{*: -1}} == {refused}* && -z ${{SUDO:-}} ]]; then exit 1; fi; exec /bin/mkdir "$@"')
    pip = host.home / "environment" / "bin" / "pip"
    pip.write_text("#!/bin/sh\n")
    pip.chmod(0o755)
    run = host.start(host.run)
    host.listening()
    prepare = host.start(host.prepare)
    assert run.wait(10) == 75 and (host.home / "saved").exists(), "what a lost connection left ends before"
    assert prepare.wait(10) == 0
    workdir = tmp_path / "share" / "runs" / "my run"
    assert workdir.is_dir()
    assert host.calls("chown") == ([] if writable else [[f"{os.getuid()}:{os.getgid()}", str(workdir)]])
