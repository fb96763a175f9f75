"""setup.cfg holds what it promises (requirements cover the imports, markers pick what works, entry points exist); CI runs the README."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import proglora_jax

ROOT = Path(__file__).parents[1]
# where the name to import differs from the name to install
DISTRIBUTIONS = {"absl": "absl-py", "google": "protobuf", "ml_collections": "ml-collections", "orbax": "orbax-checkpoint", "PIL": "pillow"}
# brought by jax, at the version that jax needs
WITH_JAX = {"jaxlib", "ml_dtypes"}


@pytest.fixture(scope="module")
def config() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg")
    return parser


def requirements(lines: str) -> list[Requirement]:
    return [Requirement(line) for line in lines.splitlines() if line and not line.startswith("#")]


def third_party_imports() -> set[str]:
    names = set()
    handed_out = ROOT / "proglora_jax" / "assets"  # torch programs beside an export, no part of the package
    for path in [path for path in (ROOT / "proglora_jax").rglob("*.py") if handed_out not in path.parents]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                names |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names.add((node.module or "").split(".")[0])
    return names - set(sys.stdlib_module_names) - {"proglora_jax"}


def test_every_import_of_the_package_is_a_requirement(config):
    declared = {r.name for r in requirements(config["options"]["install_requires"])}
    needed = {DISTRIBUTIONS.get(name, name) for name in third_party_imports() - WITH_JAX}
    assert needed <= declared, f"not in setup.cfg: {sorted(needed - declared)}"


@pytest.mark.parametrize(
    "python, works, breaks",
    [("3.11", ["0.12.8"], ["0.12.7", "0.12.9", "0.12.11", "0.13.0"]),
     ("3.12", ["0.12.10", "0.12.12"], ["0.12.8", "0.12.9", "0.12.11", "0.13.0"])],
)  # fmt: skip
def test_flax_versions_that_cannot_import_nnx_are_excluded(config, python, works, breaks):
    flax = [r for r in requirements(config["options"]["install_requires"]) if r.name == "flax"]
    (chosen,) = [r for r in flax if r.marker.evaluate({"python_version": python})]
    assert all(version in chosen.specifier for version in works)
    assert not any(version in chosen.specifier for version in breaks)


def test_python_and_test_extras(config):
    assert config["options"]["python_requires"] == ">=3.11" and "3.11.0" in SpecifierSet(config["options"]["python_requires"])
    extras = config["options.extras_require"]
    assert {"test", "cuda12", "cuda13", "tpu"} <= set(extras)
    torch = [r for r in requirements(extras["test"]) if r.name == "torch"]
    assert [str(r.specifier) for r in torch if r.marker.evaluate({"python_version": "3.11"})] == ["==2.13.0"]
    assert {"pytest", "peft"} <= {r.name for r in requirements(extras["test"])}


def test_pyproject_holds_only_the_build_backend():
    import tomllib

    assert list(tomllib.loads((ROOT / "pyproject.toml").read_text())) == ["build-system"]


def test_version_and_entry_points_exist(config):
    assert re.fullmatch(r"\d+\.\d+\.\d+", proglora_jax.__version__)
    for line in config["options.entry_points"]["console_scripts"].split("\n"):
        if line:
            module, function = line.split("=")[1].strip().split(":")
            path = ROOT / Path(*module.split(".")).with_suffix(".py")
            path = path if path.exists() else path.with_suffix("") / "__init__.py"
            tree = ast.parse(path.read_text(encoding="utf-8"))
            bound = {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
            bound |= {a.asname or a.name for n in tree.body if isinstance(n, ast.ImportFrom) for a in n.names}
            assert function in bound, line


def test_ci_runs_the_command_of_the_readme():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    assert "http" not in script.read_text() and "index" not in script.read_text()
    shown = subprocess.run(["bash", script, "--show"], capture_output=True, text=True, check=True).stdout
    assert shown.strip() in (ROOT / "README.md").read_text()
    assert "venv" in shown and "pip install" in shown and "[test]" in shown and "pytest" in shown
