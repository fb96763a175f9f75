"""The front door: every config builds, every field of a config is known and read, and the command line does what it says."""

from __future__ import annotations

import ast
import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny_run

from proglora_jax import main
from proglora_jax.data.errors import UserError
from proglora_jax.methods.registry import METHODS, NAMES
from proglora_jax.training import settings as sections
from proglora_jax.training.settings import build, from_config

ROOT = Path(__file__).parents[1]
CONFIGS = sorted(path.stem for path in (ROOT / "configs").glob("*.py") if "def get_config" in path.read_text(encoding="utf-8"))
CLASSES = {
    "model": sections.ModelSettings, "data": sections.DataSettings, "train": sections.TrainSettings, "evaluate": sections.EvalSettings,
    "similarity": sections.SimilaritySettings, "mesh": sections.MeshSettings, "run": sections.RunSettings,
}  # fmt: skip


def arguments_of(name: str) -> list[str]:
    """The arguments that a config's own text shows, and each method."""
    text = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    return ["", *re.findall(rf"{name}\.py:(\S+)", text), *(f"method={method},seed=3" for method in NAMES)]


# -------------------------------------------------------------------------------------------------------------- the configs


@pytest.mark.parametrize("name, argument", [(name, argument) for name in CONFIGS for argument in arguments_of(name)])
def test_every_config_builds_and_fits_the_code(name, argument):
    config = tiny_run.config_module(name).get_config(argument)
    assert config.is_locked
    values = config.to_dict()
    values["data"]["root"] = values["data"]["root"] or "somewhere"
    settings = from_config(values)
    wanted = dict(pair.split("=") for pair in argument.split(",") if "=" in pair)
    assert settings.method.name == wanted.get("method", settings.method.name)
    assert settings.run.seed == int(wanted.get("seed", settings.run.seed))
    assert settings.run.protocol == ("isolated" if "isolated" in argument.split(",") else "sequential")


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_refuses_what_it_does_not_know(name):
    for argument in ("smokes", "smoke=1", "method", "seed=one", "method=lore", "seeds=1"):
        with pytest.raises(ValueError, match=argument.split("=")[0]):
            tiny_run.config_module(name).get_config(argument)


def fields(cls: type) -> set[str]:
    """Names of a dataclass's fields."""
    return {field.name for field in dataclasses.fields(cls)}


@pytest.mark.parametrize("section", CLASSES)
def test_the_configs_list_every_field_and_no_other(section):
    common = tiny_run.config_module("common")
    assert set(common.SECTIONS) == set(CLASSES)
    assert set(common.SECTIONS[section]) == fields(CLASSES[section])
    assert build(CLASSES[section], common.SECTIONS[section], "config")


@pytest.mark.parametrize("name", NAMES)
def test_the_configs_list_every_hyper_parameter_and_no_other(name):
    common = tiny_run.config_module("common")
    assert set(common.METHODS) == set(NAMES)
    assert set(common.METHODS[name]) == fields(METHODS[name])
    assert build(METHODS[name], common.METHODS[name], "config.method")


def test_recipes():
    common = tiny_run.config_module("common")
    config = common.apply_recipe(common.base("lora"), "coin_effective")
    assert (config.train.schedule, config.train.grad_clip, config.train.projector_learning_rate) == ("constant_log_warmup", 1.0, 2e-4)
    config.data.root = "somewhere"
    assert from_config(config.to_dict()).train.grad_clip == 1.0
    with pytest.raises(ValueError, match="recipe=papers: choose proglora or coin_effective"):
        common.apply_recipe(config, "papers")


# ------------------------------------------------------------------------------------------------- every field is read

# Sections that are handed on whole, by dataclasses.asdict.
WHOLE = {"mesh": "meshes.make_mesh(dataclasses.asdict(settings.mesh))"}
PRODUCT = [p for p in sorted((ROOT / "proglora_jax").rglob("*.py")) if p.name != "settings_check.py"]


def owners(tree: ast.AST, classes: dict[str, type]) -> dict[str, set[str]]:
    """{section: names in a file that hold it}: its own name, parameters annotated with its class, and `name = settings.section`."""
    found = {section: {section} for section in classes}
    for node in ast.walk(tree):
        if isinstance(node, ast.arg) and node.annotation is not None:
            kind = ast.unparse(node.annotation).rpartition(".")[2]
            for section, cls in classes.items():
                if kind == cls.__name__:
                    found[section].add(node.arg)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute) and node.value.attr in classes:
            found[node.value.attr] |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return found


def reads(tree: ast.AST) -> Iterator[tuple[str, str]]:
    """(owner, attribute) of every attribute that is read outside of checks: `settings.data.root` gives ("data", "root")."""
    if isinstance(tree, ast.FunctionDef) and tree.name == "__post_init__":
        return
    if isinstance(tree, ast.Attribute) and isinstance(tree.ctx, ast.Load):
        owner = tree.value.attr if isinstance(tree.value, ast.Attribute) else getattr(tree.value, "id", "")
        yield owner, tree.attr
    for child in ast.iter_child_nodes(tree):
        yield from reads(child)


def unread_settings(classes: dict[str, type]) -> list[str]:
    """Fields of the sections that no file of the product reads."""
    read: set[tuple[str, str]] = set()
    for path in PRODUCT:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = owners(tree, classes)
        read |= {(section, attribute) for owner, attribute in reads(tree) for section in classes if owner in names[section]}
        for node in ast.walk(tree):  # what a section's own methods read of it
            own = [section for section, cls in classes.items() if isinstance(node, ast.ClassDef) and node.name == cls.__name__]
            read |= {(section, attribute) for section in own for owner, attribute in reads(node) if owner == "self"}
    return [f"{section}.{field}" for section, cls in classes.items() for field in sorted(fields(cls)) if (section, field) not in read]


def unread_hyper_parameters(classes: dict[str, type]) -> list[str]:
    """Fields of methods that neither a method nor what uses methods reads."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in PRODUCT]
    read = {attribute for tree in trees for owner, attribute in reads(tree) if owner in ("self", "method")}
    return [f"{name}.{field}" for name, cls in classes.items() for field in sorted(fields(cls)) if field not in read]


def test_every_field_of_a_config_is_read():
    assert unread_settings({name: cls for name, cls in CLASSES.items() if name not in WHOLE}) == []
    text = "".join(path.read_text(encoding="utf-8") for path in PRODUCT)
    assert all(use in text for use in WHOLE.values())


def test_every_hyper_parameter_is_read():
    assert unread_hyper_parameters(METHODS) == []


def test_a_field_that_nothing_reads_is_found():
    extra = dataclasses.make_dataclass("TrainSettings", [("momentum", float), ("beta1", float)])
    assert unread_settings({"train": extra}) == ["train.momentum"]
    method = dataclasses.make_dataclass("Planted", [("rank", int), ("sharpness", float)])
    assert unread_hyper_parameters({"planted": method}) == ["planted.sharpness"]


# --------------------------------------------------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["--config=configs/coin_mini.py"], "runs/coin_mini_lora_seed2"),
        (["--config", "configs/coin_mini.py:method=lora,seed=2"], "runs/coin_mini_lora_seed2"),
        (["--config=/far/away/coin.py:smoke, isolated,method=lora", "--config.train.epochs=1"], "runs/coin_smoke_isolated_lora_seed2"),
        (["-config", "other.py:variant=3"], "runs/other_variant-3_lora_seed2"),
        (["--config.run.isolated_results=runs/x", "--config=a.py"], "runs/a_lora_seed2"),
        ([], "runs/run_lora_seed2"),
    ],
)
def test_the_default_workdir_tells_runs_apart(arguments, expected):
    assert main.default_workdir(arguments, {"method": {"name": "lora"}, "run": {"seed": 2}}) == expected


def test_help_is_quick_and_names_the_flags():
    done = subprocess.run(
        [sys.executable, "-m", "proglora_jax.main", "--help"], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=60,
    )  # fmt: skip
    text = done.stdout
    assert done.returncode == 0 and done.stderr == ""
    for flag in ("--config", "--workdir", "--[no]distributed", "--coordinator_address", "--num_processes", "--process_id",
                 "--stopped_exit_code"):
        assert flag in text
    code = "import sys, proglora_jax.main; assert 'jax' not in sys.modules and 'flax' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60).returncode == 0


def test_what_is_settled_before_jax_is_there():
    """Where JAX looks for devices, its share of a GPU, and that transformers finds no torch."""
    code = """
import os, sys
from proglora_jax import main
from proglora_jax.core import host

def settle():
    print("jax" in sys.modules, os.environ.get("XLA_CLIENT_MEM_FRACTION"), sys.modules.get("torch", "there"))
    sys.exit()

host.settle_on_cpu = settle
sys.argv = ["main", "--config=configs/coin_mini.py:smoke"]
main.entry()
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False 0.94 None\n", done.stderr


def test_a_workdir_belongs_to_one_process_and_one_config(tmp_path):
    config = {"method": {"name": "lora"}, "run": {"seed": 1, "log_every_steps": 5}}
    with main.claim_workdir(tmp_path / "run", config, "the command"):
        with pytest.raises(UserError, match="another process is using it"):
            with main.claim_workdir(tmp_path / "run", config):
                pass
        with main.claim_workdir(tmp_path / "run", config, chief=False):
            pass  # the other processes of a run take no lock
    (tmp_path / "run" / "stages" / "00_gqa" / "progress").mkdir(parents=True)
    leftover = tmp_path / "run" / "stages" / ".results.json.tmp-0123abcd"
    leftover.write_text("half")
    with main.claim_workdir(tmp_path / "run", config | {"run": {"seed": 1, "log_every_steps": 9}}):
        assert not leftover.exists()
    with pytest.raises(UserError, match="belongs to another config: config.run.seed is 1 there and 2 here. Choose"):
        with main.claim_workdir(tmp_path / "run", config | {"run": {"seed": 2, "log_every_steps": 5}}):
            pass
    # a run that was out of memory, or moves to other devices, goes on with other parts; not where gates depend on a part's other rows
    with main.claim_workdir(tmp_path / "run", config | {"train": {"micro_batches": 8}}):
        pass
    mocl = {"method": {"name": "mocl", "batch_mean": True}}
    (tmp_path / "mocl" / "stages" / "00_gqa" / "progress").mkdir(parents=True)
    (tmp_path / "mocl" / "config.json").write_text(json.dumps({"config": mocl}))
    with pytest.raises(UserError, match="config.train.micro_batches is 1 there and 8 here"):
        with main.claim_workdir(tmp_path / "mocl", mocl | {"train": {"micro_batches": 8}}):
            pass
    # what an earlier version did not know has its default there
    with main.claim_workdir(tmp_path / "run", config | {"evaluate": {"subset_except": ()}, "method": {"name": "lora", "dropout": 0.05}}):
        pass
    with pytest.raises(UserError, match=r"config.evaluate.subset_except is \[\] there and \['GQA'\] here"):
        with main.claim_workdir(tmp_path / "run", config | {"evaluate": {"subset_except": ("GQA",)}}):
            pass
    with pytest.raises(UserError, match="config.run.fresh is absent there and None here"):
        with main.claim_workdir(tmp_path / "run", config | {"run": {"seed": 1, "fresh": None}}):
            pass


def test_a_reader_that_has_seen_enough_is_no_error():
    """As in `tools doctor ... | head -1`: no stack trace, whatever was still to be printed."""
    code = "from proglora_jax import tools; tools.main = lambda: [print('x' * 4096) for _ in range(99)] and 0; tools.entry()"
    first = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    first.stdout.close()
    assert (first.wait(60), first.stderr.read()) == (1, b"")
