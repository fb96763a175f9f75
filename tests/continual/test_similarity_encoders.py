"""Tasks embedded by a ViT and a BERT, against transformers; embeddings that are kept; methods that need none."""

from __future__ import annotations

import dataclasses
import signal

import jax
import numpy as np
import pytest
import tiny_encoders
import tiny_run
import torch
import transformers
from jax.sharding import Mesh
from PIL import Image
from tiny_run import here  # noqa: F401

from proglora_jax.checkpoints.stage import load_checkpoint
from proglora_jax.continual import phases, runner, similarity
from proglora_jax.continual.run_record import load_run
from proglora_jax.continual.session import open_session
from proglora_jax.continual.similarity_encoders import Encoders, open_encoders
from proglora_jax.continual.stage_data import own_rows
from proglora_jax.continual.stages import plan_stages
from proglora_jax.data.errors import UserError
from proglora_jax.methods.registry import METHODS
from proglora_jax.training.log import RunLogger
from proglora_jax.training.loop import Stopped
from proglora_jax.training.settings import from_config

SHORT = {"data__tasks": "TextVQA,OCRVQA", "train__max_steps": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The fields that name a tiny ViT and a tiny BERT."""
    path = tmp_path_factory.mktemp("encoders")
    tiny_encoders.vit(path / "vit", image_size=32, patch_size=8)
    tiny_encoders.bert(path / "bert")
    return {"similarity__encoders": "vit_bert", "similarity__vit_path": str(path / "vit"), "similarity__bert_path": str(path / "bert")}


@pytest.fixture(scope="module")
def session(here, folders):  # noqa: F811
    """An open session with a task that has records without images and one with several turns a record."""
    fields = folders | {"data__tasks": "ScienceQA,GQA", "similarity__max_samples": 9, "evaluate__batch_size": 4}
    opened = open_session(from_config(here.config("proglora_static", **fields)), here.folder / "session", resumed=False)
    yield opened
    opened.logger.close()


def with_similarity(session, **fields):
    settings = dataclasses.replace(session.settings, similarity=dataclasses.replace(session.settings.similarity, **fields))
    return dataclasses.replace(session, settings=settings)


def expected_embedding(session, rows, numbers):
    """The means by transformers' own processor, tokenizer and models, one image and one text at a time."""
    settings = session.settings.similarity
    processor = transformers.ViTImageProcessorPil.from_pretrained(settings.vit_path)
    vit = transformers.ViTModel.from_pretrained(settings.vit_path).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(settings.bert_path)
    bert = transformers.BertModel.from_pretrained(settings.bert_path).eval()
    examples = [rows.rows[number].example for number in numbers]

    @torch.no_grad()
    def text(value):
        states = bert(**tokenizer(value, truncation=True, max_length=40, return_tensors="pt")).last_hidden_state[0]
        return (states[0] if settings.text_pool == "cls" else states.mean(0)).numpy()

    @torch.no_grad()
    def image(path):
        states = vit(**processor(Image.open(path).convert("RGB"), return_tensors="pt")).last_hidden_state[0]
        return (states[0] if settings.pool == "cls" else states[1:].mean(0)).numpy()

    turns = [turn for example in examples for turn in example.turns]
    return {
        "image": np.mean([image(example.image) for example in examples if example.image], axis=0),
        "instruction": np.mean([text(human) for human, _ in turns], axis=0), "answer": np.mean([text(gpt) for _, gpt in turns], axis=0),
    }  # fmt: skip


@pytest.mark.parametrize(("pool", "text_pool"), [("cls", "mean"), ("mean", "cls")])
def test_vit_and_bert_embed_a_task_as_transformers_does(session, pool, text_pool):
    session = with_similarity(session, pool=pool, text_pool=text_pool)
    embed = open_encoders(session).embed
    for stage in plan_stages(session.tasks, session.method, "sequential"):
        rows = own_rows(session, stage)
        without = np.flatnonzero([row.example.image is None for row in rows.rows])
        numbers = np.union1d(np.arange(1, 6), without[:2])
        examples = [rows.rows[number].example for number in numbers]
        assert {example.image is None for example in examples} == ({True, False} if stage.name == "ScienceQA" else {False})
        assert all("<image>" not in human for example in examples for human, _ in example.turns)
        ours, theirs = embed(rows, numbers), expected_embedding(session, rows, numbers)
        for part, value in theirs.items():
            np.testing.assert_allclose(ours[part], value, rtol=1e-4, atol=1e-4, err_msg=f"{stage.name} {part}")


def test_a_batch_split_over_eight_devices_gives_the_same_means(session):
    rows, numbers = own_rows(session, plan_stages(session.tasks, session.method, "sequential")[1]), np.arange(3)
    mesh = Mesh(np.asarray(jax.devices()).reshape(8, 1, 1), session.mesh.axis_names)
    settings = dataclasses.replace(session.settings, evaluate=dataclasses.replace(session.settings.evaluate, batch_size=8))
    found = open_encoders(dataclasses.replace(session, mesh=mesh, settings=settings)).embed(rows, numbers)
    for part, value in open_encoders(session).embed(rows, numbers).items():
        np.testing.assert_allclose(found[part], value, rtol=1e-5, atol=1e-5, err_msg=part)


def test_records_without_any_image_give_a_zero_image_part(session):
    rows = own_rows(session, plan_stages(session.tasks, session.method, "sequential")[0])
    without = np.flatnonzero([row.example.image is None for row in rows.rows])
    found = open_encoders(session).embed(rows, without)
    assert len(without) > 1 and found["image"].shape == (20,) and not found["image"].any() and found["instruction"].any()


def refuse(*_):
    raise AssertionError("embedded again")


def test_an_embedding_is_kept_until_data_or_encoders_change(session, caplog):
    session = dataclasses.replace(session, workdir=session.workdir / "kept")
    rows = own_rows(session, plan_stages(session.tasks, session.method, "sequential")[1])
    encoders, again = open_encoders(session), lambda fingerprint: Encoders(fingerprint, refuse)
    first = similarity.task_embedding(session, encoders, "GQA", rows)
    kept = similarity.task_embedding(session, again(encoders.fingerprint), "GQA", rows)
    assert all(kept[part].tobytes() == first[part].tobytes() and kept[part].dtype == np.float32 for part in first)
    assert not caplog.records
    other_rows = dataclasses.replace(rows, tokens=rows.tokens[::-1])
    for changed in ((session, "other", rows), (session, encoders.fingerprint, other_rows),
                    (with_similarity(session, pool="cls"), encoders.fingerprint, rows),
                    (with_similarity(session, max_samples=3), encoders.fingerprint, rows)):
        with pytest.raises(AssertionError, match="embedded again"):
            similarity.task_embedding(changed[0], again(changed[1]), "GQA", changed[2])
    assert "GQA.json is computed again: it was made from other records or encoders." in caplog.text
    path = session.workdir / "similarity" / "GQA.json"
    path.write_text(path.read_text().replace("0.", "1.", 1))
    mended = similarity.task_embedding(session, encoders, "GQA", rows)
    assert "GQA.json is computed again: its contents do not match the checksum inside it" in caplog.text
    assert all(mended[part].tobytes() == first[part].tobytes() for part in first)


def test_a_resume_in_mid_stage_embeds_nothing_again(here, folders, monkeypatch):  # noqa: F811
    step = RunLogger.step

    def stop(self, number, *rest, **more):
        step(self, number, *rest, **more)
        if self._phase["stage"] == 1 and number == 2:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(RunLogger, "step", stop)
        with pytest.raises(Stopped, match="of the stage OCRVQA; the progress is saved"):
            here.run("resumed", "proglora_static", **folders, **SHORT)
    real = runner.open_encoders
    monkeypatch.setattr(runner, "open_encoders", lambda session: Encoders(real(session).fingerprint, refuse))
    workdir = here.run("resumed", "proglora_static", **folders, **SHORT)
    metas = [load_checkpoint(folder / "adapter")[1]["meta"] for folder in tiny_run.stage_folders(workdir)]
    assert [len(meta["similarity"]) for meta in metas] == [0, 1] and 0 <= metas[1]["similarity"][0] <= 1
    assert metas[0]["encoders"] == metas[1]["encoders"] != ""
    assert load_run(workdir).finished

    # ---- with another encoder in the same folder, what is there cannot be compared with what would come
    monkeypatch.setattr(runner, "open_encoders", lambda session: Encoders("others", refuse))
    for leftover in (workdir / "stages" / "01_ocrvqa" / "adapter").rglob("*.json"):
        leftover.unlink()
    with pytest.raises(UserError, match="config.similarity: the tasks before OCRVQA were embedded by other encoders than"):
        here.run("resumed", "proglora_static", **folders, **SHORT)


def test_methods_that_do_not_ask_for_similarity_embed_nothing(here, monkeypatch):  # noqa: F811
    monkeypatch.setattr(runner, "open_encoders", refuse)
    fields = {"method__weights": "ones", "method__recall_count": "fixed"}
    fields |= {"similarity__encoders": "vit_bert"}  # and the folders are not missed
    workdir = here.run("none", "proglora_static", **fields, **SHORT)
    assert not (workdir / "similarity").exists()
    found = [load_checkpoint(folder / "adapter") for folder in tiny_run.stage_folders(workdir)]
    assert all(records["meta"]["similarity"] == [] and records["meta"]["encoders"] == "" for _, records in found)
    monkeypatch.setattr(phases, "train_phase", refuse)  # both stages are read back, none is trained again
    here.run("none", "proglora_static", **fields, **SHORT)


def test_which_methods_ask_for_similarity():
    static, dynamic = METHODS["proglora_static"], METHODS["proglora_dynamic"]
    assert static().uses_similarity and dynamic().uses_similarity
    assert not dynamic(recall_count="fixed").uses_similarity and not dynamic(recall_enabled=False).uses_similarity
    assert static(recall_enabled=False).uses_similarity and static(weights="ones").uses_similarity
    assert not static(weights="ones", recall_count="random_phi").uses_similarity
    assert not static(weights="ones", recall_enabled=False).uses_similarity
    assert not any(METHODS[name]().uses_similarity for name in ("lora", "multi_task", "zero_shot"))


@pytest.mark.parametrize(("changes", "sentence"), [
    ({"similarity__vit_path": ""}, "config.similarity.vit_path='': not set; give the Hugging Face folder of a ViT"),
    ({"similarity__bert_path": "/nowhere"}, "config.similarity.bert_path=/nowhere: no such folder"),
    ({"similarity__encoders": "backbone"}, "config.similarity.vit_path='.*vit': the backbone's own encoders need no folder; set config"),
    ({"similarity__encoders": "backbone", "similarity__vit_path": "", "similarity__bert_path": "", "similarity__text_pool": "cls"},
     "config.similarity.text_pool='cls': the backbone's word embedd"),
])
def test_wrong_encoders_are_named_before_anything_is_loaded(here, folders, changes, sentence):  # noqa: F811
    with pytest.raises(UserError, match=sentence):
        here.run("wrong", "proglora_static", **folders | changes)
    assert not (here.folder / "wrong" / "stages").exists()
