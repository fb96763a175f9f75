"""The rules of the house: who may import whom, what lives where, and how files look. Each failure names the file and the line."""

from __future__ import annotations

import ast
import collections
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "proglora_jax"
FLOORS = {
    "__init__": 0, "core": 1, "data": 1, "adapters": 2, "models": 2, "evaluation": 2, "methods": 3, "checkpoints": 3,
    "training": 4, "continual": 5, "main": 6, "tools": 6,
}  # fmt: skip
NEVER = [("adapters", "models"), ("methods", "models"), ("models", "methods"), ("models", "adapters"), ("models", "data")]
USES_JAX = {"jax", "jaxlib", "flax", "optax", "orbax", "chex"}
MESH_MAKERS = {"Mesh", "AbstractMesh", "make_mesh", "NamedSharding", "SingleDeviceSharding", "PositionalSharding", "GSPMDSharding"}
TOO_LONG = 360


class Import(NamedTuple):
    """One imported name: the file and line that import it, and the module (and name in it) that they ask for."""

    path: Path
    line: int
    name: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line} imports {self.name}"


def python_files(folder: str) -> list[Path]:
    return sorted(p for p in (ROOT / folder).rglob("*.py") if "__pycache__" not in p.parts)


# Programs that an export hands to others: they run without the package, and in torch.
HANDED_OUT = python_files(f"{PACKAGE}/assets")
PRODUCT = [path for path in python_files(PACKAGE) if path not in HANDED_OUT]
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for folder in (PACKAGE, "configs", "tests") for path in python_files(folder)}
MODULES = {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in PRODUCT}


def imports_of(path: Path) -> Iterator[Import]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            yield from (Import(path, node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = "." * node.level + (node.module or "")
            yield from (Import(path, node.lineno, f"{module}.{alias.name}") for alias in node.names)


def room_of(module_or_path: str | Path) -> str:
    if isinstance(module_or_path, Path):
        return module_or_path.relative_to(ROOT / PACKAGE).with_suffix("").parts[0]
    parts = module_or_path.split(".")
    known = len(parts) > 1 and f"{PACKAGE}.{parts[1]}" in MODULES
    return parts[1] if known else "__init__"


def inside(imports: Iterator[Import]) -> list[Import]:
    return [i for i in imports if i.name.split(".")[0] == PACKAGE]


ALL_IMPORTS = [i for path in PRODUCT for i in imports_of(path)]


def listed(problems: list[object]) -> str:
    return "\n" + "\n".join(map(str, problems))


def test_every_room_has_a_floor():
    problems = [f"{p.relative_to(ROOT)}: its room has no floor in FLOORS" for p in PRODUCT if room_of(p) not in FLOORS]
    assert not problems, listed(problems)


def test_imports_go_down_or_stay_in_the_room():
    problems = []
    for i in inside(iter(ALL_IMPORTS)):
        here, there = room_of(i.path), room_of(i.name)
        if here != there and FLOORS[there] >= FLOORS[here]:
            problems.append(f"{i}: floor {FLOORS[here]} may not import {there}/ on floor {FLOORS[there]}")
    assert not problems, listed(problems)


def test_rooms_that_never_meet():
    problems = [i for i in inside(iter(ALL_IMPORTS)) if (room_of(i.path), room_of(i.name)) in NEVER]
    assert not problems, listed(problems)


def test_models_import_only_core():
    problems = [i for i in inside(iter(ALL_IMPORTS)) if room_of(i.path) == "models" and room_of(i.name) not in ("models", "core")]
    assert not problems, listed(problems)


def test_imports_are_absolute():
    problems = [i for i in ALL_IMPORTS if i.name.startswith(".")]
    assert not problems, listed(problems)


def test_data_never_imports_jax():
    problems = [i for i in ALL_IMPORTS if room_of(i.path) == "data" and i.name.split(".")[0] in USES_JAX]
    assert not problems, listed(problems)


def test_only_models_import_nnx():
    problems = [i for i in ALL_IMPORTS if room_of(i.path) != "models" and re.match(r"flax\.nnx\b", i.name)]
    assert not problems, listed(problems)


def test_the_product_never_imports_torch():
    problems = [i for i in ALL_IMPORTS if i.name.split(".")[0] in {"torch", "torchvision", "peft", "accelerate", "tensorflow"}]
    assert not problems, listed(problems)


def test_what_is_handed_out_stands_alone():
    known = {"torch", "transformers", "safetensors", "numpy", "PIL"} | set(sys.stdlib_module_names) | {path.stem for path in HANDED_OUT}
    assert HANDED_OUT
    problems = [i for path in HANDED_OUT for i in imports_of(path) if i.name.split(".")[0] not in known]
    assert not problems, listed(problems)


def test_scores_take_strings_and_numbers():
    files = {p for name in ("scores*.py", "boxes.py", "sequence.py") for p in (ROOT / PACKAGE / "evaluation").glob(name)}
    problems = [i for i in ALL_IMPORTS if i.path in files and i.name.split(".")[0] in USES_JAX | {"numpy", "einops"}]
    assert not problems, listed(problems)


def test_only_core_mesh_makes_meshes_and_shardings():
    problems = []
    for path in [p for p in PRODUCT if p != ROOT / PACKAGE / "core" / "mesh.py"]:
        froms = [n for n in ast.walk(TREES[path]) if isinstance(n, ast.ImportFrom) and (n.module or "").startswith(f"{PACKAGE}.core")]
        ours = {alias.asname or alias.name for n in froms for alias in n.names}
        for node in [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Call)]:
            called = ast.unparse(node.func).split(".")
            if called[-1] in MESH_MAKERS and called[0] not in ours:
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno} makes a {called[-1]}")
    assert not problems, listed(problems)


def test_configs_import_nothing_of_the_package():
    problems = [i for path in python_files("configs") for i in imports_of(path) if i.name.split(".")[0] == PACKAGE]
    assert not problems, listed(problems)


def test_no_import_cycles():
    graph = collections.defaultdict(set)
    for i in inside(iter(ALL_IMPORTS)):
        source = next(name for name, path in MODULES.items() if path == i.path)
        target = i.name if i.name in MODULES else i.name.rpartition(".")[0]
        if target in MODULES and MODULES[target].name != "__init__.py" and target != source:
            graph[source].add(target)
    done: set[str] = set()

    def visit(module: str, trail: list[str]) -> None:
        assert module not in trail, "cycle: " + " -> ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for other in sorted(graph[module]):
                visit(other, [*trail, module])
            done.add(module)

    for module in sorted(MODULES):
        visit(module, [])


def test_files_are_short_and_lines_fit():
    problems = []
    for path in TREES:
        lines = path.read_text(encoding="utf-8").splitlines()
        if len(lines) >= TOO_LONG and "tests" not in path.relative_to(ROOT).parts:
            problems.append(f"{path.relative_to(ROOT)}: {len(lines)} lines; under {TOO_LONG}, please: what else lives in it?")
        wide = [(n, len(line)) for n, line in enumerate(lines, 1) if len(line) > 140]
        problems += [f"{path.relative_to(ROOT)}:{n}: {width} characters, at most 140" for n, width in wide]
    assert not problems, listed(problems)


def test_files_and_public_things_say_what_they_are_for():
    problems = []
    for path, tree in TREES.items():
        if tree.body and not ast.get_docstring(tree):
            problems.append(f"{path.relative_to(ROOT)}: no first sentence")
        for node in tree.body:
            public = isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) and not node.name.startswith("_")
            if public and "tests" not in path.relative_to(ROOT).parts and not ast.get_docstring(node):
                problems.append(f"{path.relative_to(ROOT)}:{node.lineno}: public {node.name} has no docstring")
    assert not problems, listed(problems)


def test_methods_are_named_in_their_own_files_only():
    """What a method needs of the rest is a hook; the papers' rows have names too."""
    from proglora_jax.methods.registry import NAMES

    found = [
        f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}"
        for path in PRODUCT if room_of(path) != "methods" and path.name != "published.py"
        for node in ast.walk(TREES[path]) if isinstance(node, ast.Constant) and node.value in NAMES
    ]  # fmt: skip
    assert not found, found


def test_user_input_is_never_checked_with_assert():
    found = [(p, n) for p in PRODUCT for n in ast.walk(TREES[p]) if isinstance(n, ast.Assert)]
    problems = [f"{p.relative_to(ROOT)}:{n.lineno}: assert; raise an error with a sentence" for p, n in found]
    assert not problems, listed(problems)


def asserts(node: ast.AST, helpers: set[str]) -> bool:
    """Whether code has an assert statement, or calls pytest.raises, an assert_... of a library, or a helper that asserts."""
    for inner in ast.walk(node):
        if isinstance(inner, ast.Assert):
            return True
        if isinstance(inner, ast.Call):
            name = inner.func.attr if isinstance(inner.func, ast.Attribute) else getattr(inner.func, "id", "")
            if name in helpers or name == "raises" or name.startswith("assert_"):
                return True
    return False


def asserting_helpers() -> set[str]:
    """Names of functions and methods of the tests that assert, themselves or through one another."""
    functions = [n for p in python_files("tests") for n in ast.walk(TREES[p]) if isinstance(n, ast.FunctionDef)]
    found: set[str] = set()
    while more := {node.name for node in functions if node.name not in found and asserts(node, found)}:
        found |= more
    return found


@pytest.mark.parametrize("code", ["check = 1", "print('we verify and compare')", "compare(1, 2)", "visit('assert')"])
def test_a_word_is_no_assertion(code):
    assert not asserts(ast.parse(code), {"same"})
    assert asserts(ast.parse(f"{code}\nsame(1, 1)"), {"same"})


def test_test_files_have_names_of_their_own_and_every_test_asserts():
    helpers = asserting_helpers()
    tests = [p for p in python_files("tests") if p.name.startswith("test_")]
    names = collections.Counter(p.name for p in tests)
    problems: list[object] = [f"{p.relative_to(ROOT)}: another test file is called so too" for p in tests if names[p.name] > 1]
    for path in tests:
        for node in ast.walk(TREES[path]):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test"):
                if not asserts(node, helpers):
                    problems.append(f"{path.relative_to(ROOT)}:{node.lineno}: {node.name} asserts nothing")
    assert not problems, listed(problems)


def test_no_leftover_notes_and_no_paths_of_one_machine():
    kinds = {".py", ".md", ".cfg", ".toml", ".sh", ".sbatch", ".yaml", ".yml"}
    files = [p for p in ROOT.rglob("*") if p.suffix in kinds and not {".git", ".venv"} & set(p.relative_to(ROOT).parts)]
    notes = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b|(?<![\w.~$}/-])/(home|root|work|Users)/")
    problems = []
    for path in files:
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="ignore").splitlines(), 1):
            if notes.search(line):
                problems.append(f"{path.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not problems, listed(problems)


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True, timeout=120
    )


def test_importing_the_package_is_fast_and_light():
    code = "import sys, proglora_jax; heavy = {'jax', 'numpy', 'flax', 'torch', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    seconds = []
    for _ in range(2):  # the faster of two: the machine may be busy
        start = time.perf_counter()
        done = run_python(code)
        seconds.append(time.perf_counter() - start)
        assert done.returncode == 0, done.stderr
    assert min(seconds) < 1.0, seconds


def test_importing_every_module_touches_no_device():
    # JAX would raise at the first use of a device on a platform that does not exist
    names = sorted(MODULES)
    done = run_python(f"import importlib\nfor name in {names}: importlib.import_module(name)", JAX_PLATFORMS="no_such_platform")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("rule", ["floor", "nnx", "mesh"])
def test_the_rules_can_fail(tmp_path, monkeypatch, rule):
    """Plants a file that breaks a rule; the rule must notice it."""
    texts = {
        "floor": "from proglora_jax.core.types import Targets\nfrom proglora_jax.training import step\n",
        "nnx": "from flax import nnx\n",
        "mesh": "import jax\n\nmesh = jax.sharding.Mesh([], ())\n",
    }
    path = ROOT / PACKAGE / "adapters" / "planted.py"
    monkeypatch.setitem(TREES, path, ast.parse(texts[rule]))
    monkeypatch.setattr(sys.modules[__name__], "PRODUCT", [*PRODUCT, path])
    monkeypatch.setattr(sys.modules[__name__], "ALL_IMPORTS", [*ALL_IMPORTS, *imports_of(path)])
    test = {
        "floor": test_imports_go_down_or_stay_in_the_room,
        "nnx": test_only_models_import_nnx,
        "mesh": test_only_core_mesh_makes_meshes_and_shardings,
    }[rule]
    with pytest.raises(AssertionError, match=r"planted\.py:\d"):
        test()
