"""Conversation templates and instruction sets."""

from __future__ import annotations

import pytest

from proglora_jax.data.errors import UserError
from proglora_jax.data.schema import Example, Question
from proglora_jax.data.tasks import TASKS
from proglora_jax.data.templates import INSTRUCTIONS, get_template, instructions, re_template, replace_instruction, with_instruction

SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, and "
    "polite answers to the user's questions."
)


def test_vicuna_rendering():
    template = get_template("vicuna_v1")
    training = template.render([("Q1", "A1"), ("Q2", "A2")], image=True)
    assert training == f"{SYSTEM} USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT: A2</s>"
    assert template.render([("Q", "")], image=True) == f"{SYSTEM} USER: <image>\nQ ASSISTANT:"
    assert get_template("vicuna_v1_bare").render([("Q", "")], image=False) == "USER: Q ASSISTANT:"


def test_every_set_covers_every_task():
    for instruction_set, tasks in INSTRUCTIONS.items():
        assert set(tasks) == set(TASKS)
        for task in tasks:
            for text in instructions(instruction_set, task):
                assert text == text.strip() and not text.endswith(".") and ": " not in text
    assert len(instructions("10Type", "ImageNet")) == 11


def test_original_strings():
    assert with_instruction("Q?", instructions("Original", "GQA")[0], "GQA") == "Q?\nAnswer the question using a single word or phrase."
    assert with_instruction("cat", instructions("Original", "Grounding")[0], "Grounding") == (
        "Please provide the bounding box coordinate of the region this sentence describes: cat"
    )


def test_replace_instruction_keeps_question_and_expression():
    assert replace_instruction("Q?\nA. x\nB. y\nold.", "new", "ScienceQA") == "Q?\nA. x\nB. y\nnew."
    assert replace_instruction("old: man: left", "new", "Grounding") == "new: man: left"


def test_re_template_is_deterministic_and_varies():
    examples = [Example(str(i), "GQA", None, (("Q\nold.", "a"), ("Q2", "b"))) for i in range(60)]
    first = [re_template(e, "10Type", 0) for e in examples]
    assert first == [re_template(e, "10Type", 0) for e in examples] != [re_template(e, "10Type", 1) for e in examples]
    assert len({e.turns[0][0] for e in first}) > 5 and all(e.turns[1] == ("Q2", "b") for e in first)
    question = re_template(Question("1", "Grounding", None, "old: cat", ""), "10Type", 0)
    assert question.text.endswith(": cat") and not question.text.startswith("old")


def test_unknown_names():
    for call in (lambda: get_template("x"), lambda: instructions("x", "GQA"), lambda: instructions("Diverse", "x")):
        with pytest.raises(UserError, match="x"):
            call()
