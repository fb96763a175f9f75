"""Whatever a user can get wrong gives one clear sentence, and loses nothing that was computed before."""

from __future__ import annotations

import copy
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from safetensors.numpy import load_file, save_file
from tiny_run import here  # noqa: F401 (a fixture)

from proglora_jax import main
from proglora_jax.checkpoints import stage as checkpoints
from proglora_jax.continual import answering, session
from proglora_jax.core import mesh as meshes
from proglora_jax.data.errors import UserError
from proglora_jax.data.synthetic.benchmark import write_benchmark
from proglora_jax.training.settings import from_config

ROOT = Path(__file__).parents[1]
COIN_MINI = ROOT / "configs" / "coin_mini.py"
INSTRUCTIONS = Path("playground/Instructions_Original")
ONE = {"data__benchmark": "coin", "data__tasks": "TextVQA", "train__max_steps": 2, "run__checkpoint_every_steps": 1}


def sentence(error: pytest.ExceptionInfo) -> str:
    """The message, which must be a single sentence for people: one line, not too long, no Python in it."""
    text = str(error.value)
    assert "\n" not in text and 20 < len(text) < 900, text
    assert not any(word in text for word in ("Traceback", "Error(", "<class", "NoneType")), text
    return text


@pytest.fixture
def refuse(here, tmp_path):
    """A function that runs a config and returns the sentence with which it is refused."""

    def refused(method: str = "lora", workdir: Path = tmp_path / "run", **fields) -> str:
        with pytest.raises(UserError) as error:
            main.run(here.config(method, **fields), workdir)
        return sentence(error)

    return refused


# --------------------------------------------------------------------------------------------------------- the command line

# Each case runs in a fork of one process, before jax is imported.
DRIVER = """
import json, os, sys
from proglora_jax import main
commands, children, codes = json.loads(sys.argv[1]), {}, {}
for number, arguments in enumerate(commands):
    while len(children) == 4:
        pid, status = os.wait()
        codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
    child = os.fork()
    if not child:
        os.dup2(os.open(f"{number}.txt", os.O_WRONLY | os.O_CREAT), 2)
        sys.argv = ["main", *arguments]
        main.entry()
    children[child] = number
while children:
    pid, status = os.wait()
    codes[children.pop(pid)] = os.waitstatus_to_exitcode(status)
print(json.dumps([codes[number] for number in range(len(commands))]))
"""
FILES = {
    "syntax.py": "def get_config():\n    return (1\n",
    "name.py": "def get_config():\n    return undefined\n",
    "imports.py": "import no_such_package\n",
    "empty.py": "x = 1\n",
    "number.py": "def get_config():\n    return 3\n",
    "field.py": "{base}    config['train']['batchsize'] = 4\n    return ml_collections.ConfigDict(config)\n",
    "typed.py": "{base}    typed = ml_collections.ConfigDict(config)\n    typed.train.batch_size = '4'\n    return typed\n",
}
BASE = "import importlib.util, ml_collections\nspec = importlib.util.spec_from_file_location('coin_mini', {path!r})\n"
BASE += "module = importlib.util.module_from_spec(spec)\nspec.loader.exec_module(module)\n"
BASE += "def get_config():\n    config = module.get_config('smoke').to_dict()\n"
COMMANDS = [
    (["--config={coin_mini}", "--config.train.batchsize=4"], "config.train.batchsize: unknown field; did you mean 'batch_size'?"),
    (["--config={coin_mini}", "--config.nope.x=4"], "config.nope.x: unknown field; configs/common.py lists all fields"),
    (["--config", "{coin_mini}", "--config.train.batch_size=many"], "flag --config.train.batch_size=many: invalid literal"),
    (["--config", "{coin_mini}:method=loora"], "method=loora: no such method; known: zero_shot, multi_task, lora"),
    (["--config={coin_mini}:smok"], "smok: the config knows no such argument; it knows method=..., seed=..., isolated, smoke"),
    (["--config={coin_mini}:seed=x"], "seed=x: seed must be a whole number >= 0"),
    (["--config={coin_mini}", "--confg=x"], "Unknown command line flag 'confg'. Did you mean: config ?"),
    (["--config={coin_mini}", "more"], "unexpected arguments: more; flags begin with --, see --help"),
    (["--config={coin_mini}:smoke", "--num_processes=2"], "--num_processes=2: needs --coordinator_address=host:port and"),
    (["--config={coin_mini}:smoke", "--num_processes=2", "--coordinator_address=a:1", "--process_id=2"], "--num_processes=2: needs --coo"),
    (["--config={coin_mini}:smoke", "--distributed"], "--distributed: JAX finds no other processes here"),
    ([], "--config is missing: give a config file, e.g. --config configs/coin_mini.py"),
    (["--config=no/such.py:smoke"], "--config=no/such.py: no such file; give a config file, e.g. configs/coin_mini.py"),
    (["--config={tmp}/syntax.py"], "{tmp}/syntax.py, line 2: '(' was never closed; mend the config file"),
    (["--config={tmp}/name.py"], "{tmp}/name.py, line 2: NameError: name 'undefined' is not defined; mend the config file"),
    (["--config={tmp}/imports.py"], "{tmp}/imports.py, line 1: ModuleNotFoundError: No module named 'no_such_package'; mend the config"),
    (["--config={tmp}/empty.py"], "--config={tmp}/empty.py: has no function get_config; see configs/coin_mini.py"),
    (["--config={tmp}/number.py"], "--config={tmp}/number.py: get_config must return a ConfigDict, not int"),
    (["--config={tmp}/field.py"], "config.train.batchsize: unknown field; did you mean 'batch_size'?"),
    (["--config={tmp}/typed.py"], "{tmp}/typed.py: sets the field 'batch_size' to 4 of the type str; it must be of the type int"),
]  # fmt: skip


@pytest.fixture(scope="module")
def answers(tmp_path_factory) -> list[tuple[int, str, str]]:
    """(exit code, stderr, folder of the files) of each command."""
    tmp = tmp_path_factory.mktemp("configs")
    for name, text in FILES.items():
        (tmp / name).write_text(text.replace("{base}", BASE.format(path=str(COIN_MINI))))
    commands = [[part.format(coin_mini=COIN_MINI, tmp=tmp) for part in command] for command, _ in COMMANDS]
    done = subprocess.run(
        [sys.executable, "-c", DRIVER, json.dumps(commands)], env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        timeout=200, cwd=tmp,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return [(code, (tmp / f"{number}.txt").read_text().rstrip(), str(tmp)) for number, code in enumerate(json.loads(done.stdout))]


@pytest.mark.parametrize("number", range(len(COMMANDS)), ids=[" ".join(command)[-40:] or "nothing" for command, _ in COMMANDS])
def test_mistakes_on_the_command_line_and_in_the_config_file(answers, number):
    code, text, tmp = answers[number]
    expected = COMMANDS[number][1].replace("{tmp}", tmp)
    assert code == 1 and text.startswith(f"error: {expected}"), text
    assert "\n" not in text and "Traceback" not in text


# --------------------------------------------------------------------------------------------------------------- the fields

WRONG = {
    "model.dtype": "float31", "model.param_dtype": "f32", "model.attention": "flash", "model.remat": "some", "model.unroll": -1,
    "data.benchmark": "mini", "data.root": "", "data.instruction_set": "original", "data.template": "vicuna", "data.max_length": 0,
    "data.buckets": ((64,),), "data.train_examples": -1, "data.embedded_train_size": 0, "data.embedded_test_size": 0,
    "data.embedded_seed": -1, "data.max_labels": -1, "data.grouping": "length", "data.remainder": "keep", "data.on_bad_image": "skip",
    "data.on_bad_record": "skip", "data.on_unsupervised": "keep", "data.empty_answer": "keep", "data.threads": -1,
    "data.image_cache_mb": -1, "data.image_cache_dir": "root/.", "train.batch_size": 0,
    "train.batch_sizes": {"GQA": 0}, "train.micro_batches": 0, "train.epochs": 0, "train.max_steps": -1, "train.learning_rate": 0.0,
    "train.projector_learning_rate": -1.0, "train.schedule": "linear", "train.warmup_fraction": 1.0, "train.weight_decay": -0.1,
    "train.beta1": 1.0, "train.beta2": -0.1, "train.epsilon": -1.0, "train.grad_clip": -1.0, "train.loss_norm": "mean",
    "train.loss_group_size": 0, "evaluate.batch_size": 0, "evaluate.max_new_tokens": -1, "evaluate.prompt_lengths": ("64",),
    "evaluate.image_mode": "crop", "evaluate.also_image_mode": "both", "evaluate.scienceqa_rule": "mcit",
    "evaluate.grounding_rule": "qwen",
    "evaluate.subset_size": -1, "evaluate.share_prefix": "always", "evaluate.subset_seed": -1, "evaluate.subset_except": ("Gqa",),
    "similarity.encoders": "bert",
    "similarity.text_pool": "max",
    "similarity.pool": "max", "similarity.max_samples": 0, "run.seed": -1, "run.protocol": "parallel", "run.checkpoint_every_steps": 0,
    "run.log_every_steps": 0, "model.preset": "llava16_7b", "train.loss_groups": -1, "run.published_row": "proglora",
    "method.rank": 0, "method.alpha": 0.0, "method.dropout": 1.0, "method.a_init": "zeros",
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_value_that_does_not_fit_is_named(name):
    section, field = name.split(".")
    config = tiny_run.config(Path("model"), Path("root"), "lora")
    config[section][field] = WRONG[name]
    with pytest.raises(UserError, match=rf"^config\.{section}\.{field}=|^config\.{section}\.{field}\W") as error:
        from_config(config)
    sentence(error)


def test_prefixes_are_shared_on_request_only_where_that_changes_nothing():
    config = lambda method, choice: tiny_run.config(Path("model"), Path("root"), method, evaluate__share_prefix=choice)
    refused = r"^config\.evaluate\.share_prefix='on': the adapter of proglora_dynamic depends on the prompt"
    with pytest.raises(UserError, match=refused) as error:
        from_config(config("proglora_dynamic", "on"))
    sentence(error)
    for method, choice in (("proglora_dynamic", "auto"), ("proglora_dynamic", "off"), ("proglora_static", "on"), ("lora", "on")):
        from_config(config(method, choice))


@pytest.mark.parametrize("name", [*WRONG, "data.tasks", "evaluate.grounding_truncate", "run.tensorboard", "mesh.data"])
def test_a_value_of_another_kind_is_named(name):
    section, field = name.split(".")
    config = tiny_run.config(Path("model"), Path("root"), "lora")
    config[section][field] = object() if name != "train.batch_sizes" else "none"
    with pytest.raises(UserError, match=rf"^config\.{section}\.{field}="):
        from_config(config)


@pytest.mark.parametrize(
    "section, value, expected",
    [
        ("optimiser", {}, "config.optimiser: unknown section; known: method, model, data, train, evaluate"),
        ("train", 3, "config.train=3: must be a section with fields, not int"),
        ("method", {"name": "loora"}, "config.method.name='loora': no such method; known: zero_shot, multi_task, lora"),
        ("method", {}, "config.method.name='': no such method; known: zero_shot"),
        ("data", {"roots": "x"}, "config.data.roots: unknown field; did you mean 'root'?"),
        ("mesh", {"pipeline": 2}, "config.mesh.pipeline: unknown field; known: data, fsdp, model"),
    ],
)
def test_sections_that_do_not_fit(section, value, expected):
    config = tiny_run.config(Path("model"), Path("root"), "lora") | {section: value}
    with pytest.raises(UserError) as error:
        from_config(config)
    assert sentence(error).startswith(expected)


def test_methods_name_their_own_fields(here):
    for field, value in {"temperature": "warm", "recall_kl": "js", "gate_bonus_fraction": 0.0, "routing_layer": -1}.items():
        with pytest.raises(UserError, match=rf"^config\.method\.{field}="):
            from_config(here.config(**{f"method__{field}": value}))
    config = here.config()
    config["method"]["proj_with"] = 4
    with pytest.raises(UserError, match="config.method.proj_with: unknown field; did you mean 'proj_width'?"):
        from_config(config)


# ---------------------------------------------------------------------------------------------------------------- the model


@pytest.fixture
def model(here, tmp_path) -> Path:
    """A copy of the model's folder to break."""
    shutil.copytree(here.model, tmp_path / "model")
    return tmp_path / "model"


def edit(path: Path, change) -> None:
    """Rewrites a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(change(content) or content))


def test_no_model_folder(refuse, tmp_path):
    assert refuse(model__path="no/model") == (
        "config.model.path=no/model: no such folder; give a Hugging Face LLaVA folder, or 'embedded' for the small model")
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize(
    "file, sentence",
    [
        ("config.json", "config.json is missing"),
        ("preprocessor_config.json", "holds no preprocessor_config.json or processor_config.json"),
        ("tokenizer.json", "holds no tokenizer.json or tokenizer.model"),
        ("model.safetensors", "holds no model.safetensors"),
    ],
)
def test_files_that_are_missing_from_the_model(refuse, model, file, sentence):
    (model / file).unlink()
    (model / "processor_config.json").unlink()
    assert sentence in refuse(model__path=str(model))


def test_truncated_weights(refuse, model):
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    text = refuse(model__path=str(model))
    assert f"{model}/model.safetensors: cannot be read as safetensors" in text and "download or write it again" in text


def test_weights_of_another_shape(refuse, model):
    tensors = load_file(model / "model.safetensors")
    name = next(name for name in tensors if "q_proj" in name and "language" in name)
    save_file(tensors | {name: np.zeros((3, 3), np.float32)}, model / "model.safetensors")
    text = refuse(model__path=str(model))
    assert f"{name} has shape [3, 3], but config.json asks for [16, 16]" in text


def test_a_tokenizer_of_another_model(refuse, model):
    rows = json.loads((model / "config.json").read_text())["text_config"]["vocab_size"]
    edit(model / "config.json", lambda c: c["text_config"].update(vocab_size=rows - 9))
    assert "lm_head.weight has shape [612, 16], but config.json asks for [603, 16]" in refuse(model__path=str(model))
    tensors = load_file(model / "model.safetensors")
    cut = {name: array[: rows - 9] if array.shape[0] == rows else array for name, array in tensors.items()}
    save_file(cut, model / "model.safetensors")
    assert f"the tokenizer has {rows} ids but the model's vocabulary has {rows - 9} rows" in refuse(model__path=str(model))


def test_a_tokenizer_without_an_image_token(refuse, model):
    text = (model / "tokenizer.json").read_text()
    (model / "tokenizer.json").write_text(text.replace("<image>", "<picture>"))
    edit(model / "tokenizer_config.json", lambda c: {k: v for k, v in c.items() if k != "extra_special_tokens"})
    (model / "special_tokens_map.json").unlink(missing_ok=True)
    assert "the tokenizer has no <image> token; add it as a special token" in refuse(model__path=str(model))


def test_a_tokenizer_whose_image_token_is_another(refuse, model):
    edit(model / "config.json", lambda c: c.update(image_token_index=7))
    text = refuse(model__path=str(model))
    assert "the tokenizer's <image> has the id 4, but config.json says image_token_index=7; use the tokenizer that belongs" in text


def test_a_processor_of_another_model(refuse, model):
    edit(model / "preprocessor_config.json", lambda c: c.update(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64}))
    assert "the image processor makes 64 pixels, but config.json says image_size=48" in refuse(model__path=str(model))


# ----------------------------------------------------------------------------------------------------------------- the data


@pytest.fixture
def root(here, tmp_path) -> Path:
    """A copy of the benchmark's folder to break, to be read as real data."""
    if not here.root.exists():
        write_benchmark(str(here.root), 0, 20, 6)
    shutil.copytree(here.root, tmp_path / "root", ignore=shutil.ignore_patterns("Instructions_10Type", "Instructions_Diverse"))
    return tmp_path / "root"


def records(root: Path, task: str, file: str = "train") -> Path:
    """A file of records."""
    return root / INSTRUCTIONS / task / f"{file}.json"


@pytest.mark.parametrize(
    "task, file, change, expected",
    [
        ("TextVQA", "train", lambda r: r[3].pop("conversations"), r"train.json: 1 .*: record 3 \(id 10000003\): no 'conversations' list"),
        ("TextVQA", "train", lambda r: r[3].update(image="../up.jpg"), "image path '../up.jpg' leaves the image root"),
        ("TextVQA", "val", lambda r: r[2].pop("text"), r"val.json: 1 problem\(s\): record 2 \(id .*\): no 'text'"),
        ("ImageNet", "test", lambda r: r[4].pop("answer"), r"references of imagenet: 1 problem\(s\): question_id .*: has no 'answer'"),
        ("Grounding", "test", lambda r: r[1].update(answer_bbox="[0.1, 0.2, 1.7, 0.4]"), "box '.*1.7.*' must be four numbers between 0"),
        ("Grounding", "train", lambda r: r[3]["conversations"][1].update(value="[0.1, nan, 0.3, 0.4]"),
         r"train.json: 1 problem\(s\): record 3 \(id .*\): answer of turn 0: box '\[0.1, nan, .*' must be four numbers between 0 and 1. "
         "Repair or remove these records, or download the file again, or set config.data.on_bad_record=skip_and_count"),
        ("ScienceQA", "test", lambda r: r[0].update(question_id="nobody"), "references: 1 .*: question nobody: its id is not in problems"),
        ("TextVQA", "train", lambda r: r.clear(), "train.json: the file holds no records"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_used(refuse, root, tmp_path, task, file, change, expected):
    edit(records(root, task, file), lambda r: change(r) and None)
    # the broken task comes last: it must show before the first one is trained
    fields = ONE | {"data__root": str(root), "data__tasks": f"OCRVQA,{task}"}
    text = refuse(**fields)
    assert re.search(expected, text), text
    assert not (tmp_path / "run" / "stages").exists()


@pytest.mark.parametrize("key, rule", [("answer_bbox", "coin"), ("origin_answer_bbox", "minigpt")])
def test_boxes_that_scoring_needs_are_missed_before_training(refuse, root, tmp_path, key, rule):
    edit(records(root, "Grounding", "test"), lambda r: r[2].pop(key) and None)
    fields = ONE | {"data__root": str(root), "data__tasks": "OCRVQA,Grounding", "evaluate__grounding_rule": rule}
    assert re.search(r"references of grounding: 1 problem\(s\): question_id \w+: ", refuse(**fields))
    assert not (tmp_path / "run" / "stages").exists()


def test_bad_training_records_are_left_out_and_counted_where_that_is_asked_for(here, refuse, root, tmp_path, caplog):
    path = records(root, "Grounding")
    edit(path, lambda r: r[3]["conversations"][1].update(value="[0.1, 0.2, 1.3, 0.4]") and None)
    edit(path, lambda r: r[5].pop("conversations") and None)
    fields = ONE | {"data__root": str(root), "data__tasks": "Grounding", "data__on_bad_record": "skip_and_count"}
    main.run(here.config("lora", **fields), tmp_path / "run")
    assert f"{path}: 2 of 20 records are left out (config.data.on_bad_record=skip_and_count): record 3 (id" in caplog.text
    assert "box '[0.1, 0.2, 1.3, 0.4]' must be four numbers between 0 and 1; record 5 (id" in caplog.text
    read = json.loads((tmp_path / "run" / "results.json").read_text())["data"][0]
    assert (read["rows"], read["bad_records"], read["unsupervised"]) == (18, 2, 0)
    assert re.search(r"\| 1 Grounding +\| +18 +\| +2 +\|", (tmp_path / "run" / "report.md").read_text())
    # questions are never left out, and a file of which nothing is left is refused
    edit(records(root, "Grounding", "test"), lambda r: r[1].update(answer_bbox="[0.1, 0.2, 1.7, 0.4]") and None)
    assert re.search("test.json: 1 problem.*box '.*1.7.*' must be four numbers", refuse(**fields))
    shutil.copy(here.root / INSTRUCTIONS / "Grounding" / "test.json", records(root, "Grounding", "test"))
    edit(path, lambda r: [one.pop("conversations", None) for one in r] and None)
    assert re.search(r"train.json: 20 problem\(s\): record 0", refuse(**fields))


def test_files_of_records_that_are_broken_or_missing(refuse, root, tmp_path):
    path = records(root, "TextVQA")
    whole = path.read_text()
    path.write_text(whole[:200])
    text = refuse(data__root=str(root), **ONE)
    assert f"{path}: not valid JSON (line" in text and "download it again" in text
    shutil.rmtree(path.parent)
    text = refuse(data__root=str(root), **ONE)
    assert f"{root}: no files for task TextVQA of instruction set Original; looked for train.json or val.json in" in text
    assert "set config.data.root to the folder that holds playground/ and cl_dataset/" in text
    assert "task TextVQAA: unknown; choose from ScienceQA, TextVQA" in refuse(**ONE | {"data__root": str(root), "data__tasks": "TextVQAA"})


def image_of(root: Path, file: str, number: int = 0) -> Path:
    """The image of a TextVQA record."""
    return root / "cl_dataset" / json.loads(records(root, "TextVQA", file).read_text())[number]["image"]


@pytest.mark.parametrize("damage", ["missing", "corrupt"])
def test_a_bad_training_image_is_named_with_its_record(refuse, here, root, tmp_path, damage, caplog):
    image = image_of(root, "train", 4)
    image.unlink() if damage == "missing" else image.write_bytes(b"not an image")
    text = refuse(data__root=str(root), **ONE | {"train__max_steps": 5})
    what = "no such image; check config.data.root" if damage == "missing" else "cannot be read as an image (UnidentifiedImageError)"
    assert text.startswith(f"TextVQA record 10000004 (number 4 of its file): {image}: {what}")
    # the same workdir goes on with a blank image in its place, and says so
    main.run(here.config("lora", data__root=str(root), data__on_bad_image="blank", **ONE | {"train__max_steps": 5}), tmp_path / "run")
    assert "A blank image stands in (number 1 of this run)" in caplog.text
    assert (tmp_path / "run" / "report.md").exists()


def test_a_bad_evaluation_image_loses_no_training(refuse, here, root, tmp_path, caplog):
    image = image_of(root, "val", 5)
    original = image.read_bytes()
    image.unlink()
    text = refuse(data__root=str(root), **ONE)
    assert text.startswith(f"TextVQA question {image.stem}: {image}: no such image; check config.data.root"), text
    (stage,) = tiny_run.stage_folders(tmp_path / "run")
    trained = (stage / "adapter" / "manifest.json").read_bytes()
    assert (stage / "answers" / "TextVQA.partial.jsonl").read_text().count("\n") == 5  # two batches of two, and the header
    image.write_bytes(original)
    main.run(here.config("lora", data__root=str(root), **ONE), tmp_path / "run")
    assert (stage / "adapter" / "manifest.json").read_bytes() == trained
    assert (tmp_path / "run" / "report.md").exists()


def test_a_prompt_that_is_too_long_loses_no_training(refuse, here, tmp_path):
    text = refuse(**ONE | {"data__benchmark": "embedded", "evaluate__prompt_lengths": (20,)})
    assert text.startswith("config.evaluate.prompt_lengths=[20]: the prompt of TextVQA question") and "enlarge the last one" in text
    record = (tmp_path / "run" / "metrics.jsonl").read_text()
    main.run(here.config("lora", **ONE | {"data__benchmark": "embedded"}), tmp_path / "run")
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(record)
    assert [p.name for p in (tmp_path / "run" / "stages").iterdir()] == ["00_textvqa"]


def test_a_conversation_that_is_too_long(refuse, root):
    edit(records(root, "TextVQA"), lambda r: r[6]["conversations"][0].update(value="<image>\n" + "what does the sign say " * 40))
    fields = ONE | {"data__root": str(root)}
    text = refuse(data__on_unsupervised="raise", **fields)
    assert "training rows: 1 problem(s): TextVQA record 10000006: no answer left within 92 positions" in text
    assert "raise config.data.max_length, or set config.data.on_unsupervised=drop" in text
    assert "config.data.max_length=9: must be above the 9 positions of one image" in refuse(data__max_length=9, **fields)


def test_empty_answers(refuse, here, root, tmp_path, caplog):
    edit(records(root, "TextVQA"), lambda r: r[2]["conversations"][1].update(value="  "))
    fields = ONE | {"data__root": str(root)}
    assert "TextVQA record 10000002: no answer that is not empty" in refuse(data__on_unsupervised="raise", **fields)
    main.run(here.config("lora", **fields), tmp_path / "dropped")
    assert "Of 20 training rows, empty answers: 1." in caplog.text and "Of 20 training rows, unsupervised: 1." in caplog.text
    assert "Left out: TextVQA record 10000002: no answer that is not empty" in caplog.text
    caplog.clear()
    main.run(here.config("lora", data__empty_answer="eos", **fields), tmp_path / "eos")
    assert "empty answers: 1." in caplog.text and "unsupervised" not in caplog.text


# ---------------------------------------------------------------------------------------- sizes, devices, numbers, the disk


def test_buckets_that_are_too_small(refuse, here):
    text = refuse(data__buckets=((30, 4),), data__tasks="OCRVQA")
    assert text.startswith("config.data.buckets: ") and "do not fit the largest bucket (30, 4); the longest row has" in text


def test_sizes_that_do_not_fit_the_devices(refuse, monkeypatch):
    assert refuse(mesh__data=3, mesh__fsdp=1) == "config.mesh={'data': 3, 'fsdp': 1, 'model': 1}: needs 3 devices, 1 are there"
    whole = lambda shape: meshes.Mesh(np.asarray(jax.devices()).reshape([8, 1, 1]), meshes.AXES)
    monkeypatch.setattr(meshes, "make_mesh", whole)
    assert refuse(train__batch_size=8) == "config.evaluate.batch_size=2: must be a multiple of the 8 devices that share a batch"
    text = refuse(evaluate__batch_size=8, train__batch_size=12)
    assert text == (
        "config.train: batches of 12 rows cannot be split over 8 devices: use 1, 2, 3, 4, 6 or 12 device(s), or other "
        "config.train.batch_sizes (TextVQA 8 or 16, ImageNet 8 or 16, OCRVQA 8 or 16; or configs/coin.py:batches=coin_scripts)")
    text = refuse(evaluate__batch_size=8, train__batch_size=16, train__micro_batches=4)
    assert text == "config.train: micro-batches are split unevenly over 8 devices: --config.train.micro_batches=1 is even"


def test_a_batch_larger_than_the_data(refuse):
    assert "config.train.batch_size=40: only 20 rows; lower it or set config.data.remainder=wrap" in refuse(train__batch_size=40)


def test_a_loss_that_is_not_finite_names_the_examples_and_keeps_the_progress(refuse, tmp_path):
    wild = {"train__learning_rate": 1e30, "train__max_steps": 6, "train__schedule": "constant"}
    text = refuse(**ONE | {"data__benchmark": "embedded"} | wild)
    assert text.startswith("loss is nan at step ") or text.startswith("loss is inf at step "), text
    assert "of the stage TextVQA; the batch held TextVQA record 1000" in text and "lower config.train.learning_rate" in text
    saved = [p.name for p in (tmp_path / "run" / "stages" / "00_textvqa" / "progress").iterdir()]
    assert saved and not any("tmp" in name for name in saved)


def test_another_config_in_the_workdir(refuse, here, tmp_path):
    with main.claim_workdir(tmp_path / "run", here.config("lora", run__seed=1)):
        pass
    with main.claim_workdir(tmp_path / "run", here.config("lora")):
        pass  # nothing was computed with the first one, so the folder is free
    (tmp_path / "run" / "stages" / "00_textvqa" / "progress").mkdir(parents=True)
    text = refuse(train__learning_rate=0.5, method__rank=3, data__max_length=50, run__seed=4)
    assert text.startswith(f"--workdir={tmp_path}/run: belongs to another config: config.data.max_length is 92 there and 50 here; config.")
    assert "and 1 more. Choose another folder, or run with that config" in text
    with main.claim_workdir(tmp_path / "run", here.config("lora", run__log_every_steps=7, evaluate__prompt_lengths=(99,), mesh__data=8)):
        pass
    (tmp_path / "run" / "config.json").write_text("[]")
    assert refuse() == f"{tmp_path}/run/config.json: is not the config of a run; put the file back, or choose another folder"
    (tmp_path / "run" / "config.json").write_text("{")
    assert f"{tmp_path}/run/config.json is damaged: it is not JSON" in refuse()
    (tmp_path / "run" / "config.json").unlink()
    assert refuse() == f"--workdir={tmp_path}/run: holds stages but no config.json; choose an empty folder"


def test_a_folder_of_images_that_cannot_be_written(refuse, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "load_source", None)  # long before the model is loaded
    (tmp_path / "file").write_text("in the way")
    text = refuse(data__image_cache_dir=str(tmp_path / "file" / "images"))
    assert text == (f"config.data.image_cache_dir={tmp_path}/file/images: cannot be written (Not a directory); "
                    "give a folder that can, or leave it out")


def test_a_workdir_that_cannot_be_written(refuse, tmp_path):
    (tmp_path / "file").write_text("")
    text = refuse(workdir=tmp_path / "file" / "run")
    assert text == f"--workdir={tmp_path}/file/run: cannot be written (Not a directory); choose another folder"
    assert "cannot be written (File exists)" in refuse(workdir=tmp_path / "file")


def test_a_full_disk_while_saving_loses_nothing_that_was_saved(refuse, here, tmp_path, monkeypatch):
    fields = ONE | {"data__benchmark": "embedded", "train__max_steps": 3}
    write = checkpoints._orbax_save
    saves = []

    def full(path, leaves):
        saves.append(path)
        if len(saves) > 2:
            raise OSError(28, "No space left on device", str(path))
        write(path, leaves)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "_orbax_save", full)
        text = refuse(**fields)
    assert "could not be written: No space left on device. What was there before is untouched." in text
    progress = tmp_path / "run" / "stages" / "00_textvqa" / "progress"
    assert [p.name for p in progress.iterdir()] == ["train_0000001"]
    main.run(here.config("lora", **fields), tmp_path / "run")
    assert (tmp_path / "run" / "report.md").exists() and not progress.exists()


def test_a_full_disk_while_answering(refuse, here, tmp_path):
    """Files may not grow past what the answers need: as a full disk, at a moment when no checkpoint is written."""
    fields = ONE | {"data__benchmark": "embedded", "train__max_steps": 2, "evaluate__subset_size": 4}
    config = here.config("lora", **fields)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    def limited(*args, **rest):
        resource.setrlimit(resource.RLIMIT_FSIZE, (700, before[1]))
        return original(*args, **rest)

    original = answering._reopen
    answering._reopen = limited
    try:
        text = refuse(**fields)
    finally:
        answering._reopen = original
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "File too large; mend that and run the same command again: it goes on from what was saved" in text
    main.run(copy.deepcopy(config), tmp_path / "run")
    assert (tmp_path / "run" / "report.md").exists()


def test_a_setting_that_the_model_or_the_dtype_cannot_do(refuse):
    assert "config.method.routing_layer=99: the model has 2 layers" in refuse("proglora_dynamic", method__routing_layer=99)
    assert "config.model.attention='cudnn': computes in 16 bits only" in refuse(model__attention="cudnn", model__dtype="float32")
