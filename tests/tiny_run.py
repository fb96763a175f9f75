"""Whole runs at tiny size: a random LLaVA folder with the embedded benchmark's tokenizer, a config for it, and what a run leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import logging
from jax.sharding import Mesh

from proglora_jax import main
from proglora_jax.checkpoints.hf_export import save_llava
from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.continual import session
from proglora_jax.core import mesh as meshes
from proglora_jax.data.synthetic import tokenizer as pieces
from proglora_jax.models.llava import Llava
from proglora_jax.models.presets import ClipConfig, LlamaConfig, LlavaConfig
from proglora_jax.training import fisher, step
from proglora_jax.training.base_recipe import initial_tree, processor_files

CONFIGS = Path(__file__).parents[1] / "configs"
BASE = Path(main.__file__).parent / "assets" / "coin_mini_base"
# The embedded model's own: to draw the words anew takes seconds.
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
# Three tasks, eight steps each: every moment of a run comes within seconds.
SMALL = {
    "method.rank": 2, "method.alpha": 4.0, "data.tasks": "TextVQA,ImageNet,OCRVQA", "data.embedded_train_size": 20,
    "data.embedded_test_size": 6, "data.max_length": 92, "data.buckets": ((92, 24),), "train.batch_size": 4, "train.epochs": 1,
    "train.max_steps": 8, "evaluate.batch_size": 2, "evaluate.max_new_tokens": 5, "evaluate.prompt_lengths": (88,),
    "run.checkpoint_every_steps": 2, "run.log_every_steps": 1, "run.tensorboard": False, "similarity.max_samples": 4,
    "mesh.data": 1,
}  # fmt: skip
# What a run in this process may change of JAX's settings.
CHANGED = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
DYNAMIC = {"method.proj_width": 4, "method.recall_per_task": 4}


def save_model(folder: Path) -> Path:
    """Writes a random LLaVA of two narrow layers that reads the embedded benchmark's words and pictures."""
    vocabulary = json.loads((BASE / "config.json").read_text(encoding="utf-8"))["text_config"]["vocab_size"]
    text = LlamaConfig(
        vocab_size=vocabulary, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, max_position_embeddings=128
    )
    vision = ClipConfig(
        hidden_size=16, intermediate_size=24, projection_dim=8, num_hidden_layers=2, num_attention_heads=2, image_size=48, patch_size=16
    )
    config = LlavaConfig(
        text_config=text, vision_config=vision, image_token_id=pieces.IMAGE, pad_token_id=pieces.PAD, tie_word_embeddings=False
    )
    tree = initial_tree(config, 0)
    head = {"lm_head": {"kernel": tree["language"]["embed_tokens"].T}}
    save_llava(Llava.from_tree(config, tree | {"language": tree["language"] | head}), folder)
    for name in TOKENIZER:
        shutil.copyfile(BASE / name, folder / name)
    for name, content in processor_files(config).items():
        (folder / name).write_text(json.dumps(content))
    return folder


def config_module(name: str = "coin_mini"):
    """A file of configs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, CONFIGS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def changes(model: Path, root: Path, method: str = "proglora_dynamic", **fields: Any) -> dict[str, Any]:
    """{"section.field": value} that make configs/coin_mini.py tiny; `fields` are written section__field."""
    routing = DYNAMIC if method == "proglora_dynamic" else {"method.recall_per_task": 4} if method == "proglora_static" else {}
    own = {name.replace("__", "."): value for name, value in fields.items()}
    return SMALL | routing | {"model.path": str(model), "data.root": str(root)} | own


def config(model: Path, root: Path, method: str = "proglora_dynamic", **fields: Any) -> dict[str, dict[str, Any]]:
    """The tiny config as plain dicts; arguments as for `changes`."""
    made = config_module().get_config(f"method={method}").to_dict()
    for name, value in changes(model, root, method, **fields).items():
        section, field = name.split(".")
        made[section][field] = value
    return made


def flags(model: Path, root: Path, method: str = "proglora_dynamic", **fields: Any) -> list[str]:
    """The tiny config as flags of proglora_jax.main."""
    overrides = [f"--config.{name}={value}" for name, value in changes(model, root, method, **fields).items()]
    return [f"--config={CONFIGS / 'coin_mini.py'}:method={method}", *overrides]


def stage_folders(workdir: Path) -> list[Path]:
    """The stages' folders in order."""
    return sorted((workdir / "stages").iterdir())


def outcome(workdir: Path) -> dict[str, Any]:
    """Everything that a run computes and that must not depend on when it was stopped: adapters, digests, answers, scores; no times."""
    found: dict[str, Any] = {}
    for folder in stage_folders(workdir):
        trees, records = load_checkpoint(folder / "adapter")
        found[f"{folder.name}/digest"] = records["meta"]["digest"]
        found[f"{folder.name}/similarity"] = records["meta"]["similarity"]
        found |= {f"{folder.name}/{path}": leaf for path, leaf in flat(trees["adapter"]).items()}
        for answers in sorted((folder / "answers").iterdir()):
            found[f"{folder.name}/{answers.name}"] = answers.read_text()
        for scores in sorted((folder / "scores").iterdir()):
            content = json.loads(scores.read_text())
            found[f"{folder.name}/{scores.name}"] = {k: v for k, v in content.items() if k not in ("seconds", "sha256")}
    results = json.loads((workdir / "results.json").read_text())
    return found | {name: results[name] for name in ("scoring", "gates", "counts", "tasks")}


def flat(tree: dict, prefix: str = "") -> dict[str, np.ndarray]:
    """{path: leaf} of nested dicts."""
    pairs: dict[str, np.ndarray] = {}
    for name, value in tree.items():
        pairs |= flat(value, f"{prefix}{name}/") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return pairs


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Names under which two outcomes are not bit-identical."""
    names = sorted(set(first) ^ set(second))
    for name in sorted(set(first) & set(second)):
        a, b = first[name], second[name]
        same = a.dtype == b.dtype and a.tobytes() == b.tobytes() if isinstance(a, np.ndarray) else a == b
        names += [] if same else [name]
    return names


def compiled() -> str:
    """The folder of compiled programs that all tests of this session share."""
    return os.environ["JAX_COMPILATION_CACHE_DIR"]


def xla_flags(devices: int) -> str:
    """The flags of this process, with another number of simulated devices."""
    return re.sub(r"(platform_device_count=)\d+", rf"\g<1>{devices}", os.environ["XLA_FLAGS"])


class Here:
    """Tiny runs in this process, on one of its devices, with one model, one benchmark and one compile cache."""

    def __init__(self, folder: Path):
        self.folder, self.model, self.root = folder, save_model(folder / "model"), folder / "data"

    def config(self, method: str = "proglora_dynamic", **fields: Any) -> dict[str, dict[str, Any]]:
        """The tiny config with changes; `fields` are written section__field."""
        return config(self.model, self.root, method, **{"run__compilation_cache": compiled()} | fields)

    def run(self, name: str, method: str = "proglora_dynamic", **fields: Any) -> Path:
        """Runs in the workdir of that name, or goes on there; returns the workdir."""
        main.run(self.config(method, **fields), self.folder / name, f"run {name}")
        return self.folder / name


def remembered(make: Callable) -> Callable:
    """`make`, which gives the same program for the same arguments: a second run in this process neither traces nor compiles it again."""
    known: dict[tuple, Any] = {}

    def made(*arguments: Any) -> Any:
        key = tuple(argument if isinstance(argument, Mesh) else repr(argument) for argument in arguments)
        if key not in known:
            known[key] = make(*arguments)
        return known[key]

    return made


# Where a run's programs come from.
PROGRAMS = ((step, "make_train_step"), (step, "make_probe"), (step, "make_generator"), (session, "make_prefix_generator"),
            (fisher, "make_squared_gradients"))  # fmt: skip


@pytest.fixture(scope="module")
def here(tmp_path_factory) -> Iterator[Here]:
    """Import it into a test file: its runs take the first of the simulated devices, and trace and compile each program once."""
    options = {name: getattr(jax.config, name) for name in CHANGED}
    make, level = meshes.make_mesh, logging.get_verbosity()
    meshes.make_mesh = lambda shape, devices=None: make(shape, devices or jax.devices()[:1])
    own = {(module, name): getattr(module, name) for module, name in PROGRAMS}
    for (module, name), function in own.items():
        setattr(module, name, remembered(function))
    yield Here(tmp_path_factory.mktemp("here"))
    for (module, name), function in own.items():
        setattr(module, name, function)
    meshes.make_mesh = make
    logging.set_verbosity(level)
    for name, value in options.items():
        jax.config.update(name, value)
