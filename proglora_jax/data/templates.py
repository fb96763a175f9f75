"""Conversation templates and instruction sets, as data, with the few functions that put them into text."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

from proglora_jax.data.errors import UserError
from proglora_jax.data.instruction_sets import wording
from proglora_jax.data.schema import IMAGE_PLACEHOLDER, Example, Question


@dataclass(frozen=True, slots=True)
class Template:
    """How turns become one text: `<system> <user><message> <assistant> <answer></s><user>...`.

    Attributes:
        name: name in the config.
        system: opening sentence; followed by one space unless empty.
        user: what stands before a human message, its trailing space included.
        assistant: what stands before an answer, without the space that follows it; a prompt ends with it.
    """

    name: str
    system: str
    user: str = "USER: "
    assistant: str = "ASSISTANT:"

    def user_text(self, message: str, first: bool, image: bool = False) -> tuple[str, str, str]:
        """One human turn as (before the message, the message, after the message).

        Args:
            message: the human text without placeholder.
            first: whether this is the conversation's first turn (the system sentence goes before it).
            image: whether the `<image>` line goes before the message.
        """
        before = (f"{self.system} " if first and self.system else "") + self.user
        return before + (f"{IMAGE_PLACEHOLDER}\n" if image else ""), message, f" {self.assistant}"

    def render(self, turns: Sequence[tuple[str, str]], image: bool, eos: str = "</s>") -> str:
        """The whole conversation as one text, for messages and tests; a turn with answer "" stays open (a prompt)."""
        text = ""
        for number, (message, answer) in enumerate(turns):
            text += "".join(self.user_text(message, number == 0, image and number == 0))
            text += f" {answer}{eos}" if answer else ""
        return text


_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

TEMPLATES = {
    "vicuna_v1": Template("vicuna_v1", _VICUNA_SYSTEM),
    # For models with a short context: the same roles without the system sentence.
    "vicuna_v1_bare": Template("vicuna_v1_bare", ""),
}


def get_template(name: str) -> Template:
    """The conversation template of that name.

    Raises:
        UserError: "data.template=x: unknown; choose one of vicuna_v1, vicuna_v1_bare"
    """
    if name not in TEMPLATES:
        raise UserError(f"data.template={name}: unknown; choose one of {', '.join(TEMPLATES)}")
    return TEMPLATES[name]


_SHORT = ("Answer the question using a single word or phrase",)
_LETTER = ("Answer with the option's letter from the given choices directly",)
_BOX = ("Please provide the bounding box coordinate of the region this sentence describes",)
_OCR_DIVERSE = "Condense your answer for each question into a single word or concise phrase"

# {set: {task: instructions}}, without the final period that the files add (Grounding: colon and expression instead).
# Source: CoIN's instruction files and table 14 of the ProgLoRA paper.
INSTRUCTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "Original": {
        "ScienceQA": _LETTER,
        "TextVQA": _SHORT,
        "ImageNet": _SHORT,
        "GQA": _SHORT,
        "VizWiz": _SHORT,
        "Grounding": _BOX,
        "VQAv2": _SHORT,
        "OCRVQA": _SHORT,
    },
    "Diverse": {
        "ScienceQA": _LETTER,
        "TextVQA": ("Capture the essence of your response in a single word or a concise phrase",),
        "ImageNet": ("Express your answer in a single word or a short, descriptive phrase",),
        "GQA": ("Respond to the question briefly, using only one word or a phrase",),
        "VizWiz": ("Provide a succinct response with a single word or phrase",),
        "Grounding": _BOX,
        "VQAv2": _SHORT,
        "OCRVQA": (_OCR_DIVERSE,),
    },
    "10Type": {
        "ScienceQA": (
            "Answer with the option's letter from the given choices directly",
            "Select the correct answer from the given choices and respond with the letter of the chosen option",
            "Determine the correct option from the provided choices and reply with its corresponding letter",
            "Pick the correct answer from the listed options and provide the letter of the selected option",
            "Identify the correct choice from the options below and respond with the letter of the correct option",
            "From the given choices, choose the correct answer and respond with the letter of that choice",
            "Choose the right answer from the options and respond with its letter",
            "Select the correct answer from the provided options and reply with the letter associated with it",
            "From the given choices, select the correct answer and reply with the letter of the chosen option",
            "Identify the correct option from the choices provided and respond with the letter of the correct option",
            "From the given choices, pick the correct answer and respond by indicating the letter of the correct option",
        ),
        "TextVQA": (
            "Answer the question with just one word or a brief phrase",
            "Use one word or a concise phrase to respond to the question",
            "Answer using only one word or a short, descriptive phrase",
            "Provide your answer in the form of a single word or a brief phrase",
            "Use a single word or a short phrase to respond to the question",
            "Summarize your response in one word or a concise phrase",
            "Respond to the question using a single word or a brief phrase",
            "Provide your answer in one word or a short, descriptive phrase",
            "Answer the question with a single word or a brief, descriptive phrase",
            "Capture the essence of your response in one word or a short phrase",
            "Capture the essence of your response in a single word or a concise phrase",
        ),
        "ImageNet": (
            "Express your answer in a single word or a short, descriptive phrase",
            "Provide your answer using a single word or a brief phrase",
            "Describe the content of the image using one word or a concise phrase",
            "Respond to the question with a single word or a short, descriptive phrase",
            "Classify the image content using only one word or a brief phrase",
            "Give your answer in the form of a single word or a concise phrase",
            "Use a single word or a short phrase to categorize the image content",
            "Express your answer with one word or a short, descriptive phrase",
            "Identify the type of content in the image using one word or a concise phrase",
            "Summarize your response in a single word or a brief phrase",
            "Use one word or a short phrase to classify the content of the image",
        ),
        "GQA": (
            "Respond to the question with a single word or a short phrase",
            "Respond to the question using only one word or a concise phrase",
            "Answer the question with a single word or a brief phrase",
            "Respond with one word or a short phrase",
            "Provide your answer in the form of a single word or a concise phrase",
            "Respond to the question with just one word or a brief phrase",
            "Answer the question using a single word or a concise phrase",
            "Provide your response using only one word or a short phrase",
            "Respond to the question with a single word or a brief phrase",
            "Respond to the question using just one word or a concise phrase",
            "Respond to the question using just one word or a concise phrase",
        ),
        "VizWiz": (
            "Answer the question using only one word or a concise phrase",
            "Respond to the question using only one word or a concise phrase",
            "Respond to the question with a single word or a brief phrase",
            "Provide your answer using just one word or a short phrase",
            "Respond with one word or a concise phrase",
            "Respond with one word or a concise phrase",
            "Answer the question with just one word or a brief phrase",
            "Use a single word or a short phrase to answer the question",
            "Provide your answer in the form of one word or a brief phrase",
            "Reply to the question using one word or a concise phrase",
            "Answer with a single word or a short phrase",
            "Use one word or a brief phrase to answer the question",
        ),
        "Grounding": (
            "Identify and provide the bounding box coordinates that match the description given in this sentence",
            "Extract and provide the bounding box coordinates based on the region described in the sentence",
            "Please provide the bounding box coordinates of the region mentioned in the sentence",
            "Find and provide the bounding box coordinates for the region mentioned in the sentence",
            "Provide the coordinates of the bounding box that correspond to the region described in the sentence",
            "Give the bounding box coordinates as described in the sentence",
            "Determine and provide the bounding box coordinates based on the description in the sentence",
            "Identify and provide the coordinates of the bounding box described in the sentence",
            "Provide the coordinates for the bounding box described in the sentence",
            "Extract and provide the coordinates for the bounding box described in the sentence",
            "Identify and give the coordinates of the bounding box as described by the sentence",
        ),
        "VQAv2": (
            "Answer the question using a single word or phrase",
            "Answer the question with a single word or a brief phrase",
            "Use one word or a short phrase to respond to the question",
            "Answer the question using just one word or a concise phrase",
            "Provide your answer to the question using only one word or a brief phrase",
            "Respond to the question with a single word or a short phrase",
            "Use a single word or phrase to answer the question",
            "Provide an answer using only one word or a brief phrase",
            "Answer the question succinctly with one word or a brief phrase",
            "Answer the question with just one word or a short phrase",
            "Respond to the question using a single word or a concise phrase",
        ),
    },
}
# The paper prints ScienceQA's letter instructions for OCR-VQA, which cannot fit open questions; VQAv2's list plus the
# Diverse string stands in.
INSTRUCTIONS["10Type"]["OCRVQA"] = (*INSTRUCTIONS["10Type"]["VQAv2"], _OCR_DIVERSE)
SUBSTITUTED = frozenset({("10Type", "OCRVQA")})
INSTRUCTION_SETS = tuple(INSTRUCTIONS)


def instructions(instruction_set: str, task: str) -> tuple[str, ...]:
    """The instructions of a task in a set, without final punctuation.

    Raises:
        UserError: "config.data.instruction_set=x: unknown; choose one of Original, Diverse, 10Type, ..." or the same for the task.
    """
    instruction_set = wording(instruction_set)
    if task not in INSTRUCTIONS[instruction_set]:
        raise UserError(f"task {task}: no instructions in set {instruction_set}; tasks are {', '.join(INSTRUCTIONS[instruction_set])}")
    return INSTRUCTIONS[instruction_set][task]


def with_instruction(question: str, instruction: str, task: str) -> str:
    """The prompt text of a bare question: `question`, newline, `instruction.`, or `instruction: expression` for Grounding.

    Args:
        question: question (with options) or, for Grounding, the referring expression.
        instruction: without final punctuation.
        task: task name.
    """
    return f"{instruction}: {question}" if task == "Grounding" else f"{question}\n{instruction}."


def replace_instruction(text: str, instruction: str, task: str) -> str:
    """Puts another instruction into a prompt text: its last line, or for Grounding what stands before the first `: `."""
    return with_instruction(bare_question(text, task), instruction, task)


def bare_question(text: str, task: str) -> str:
    """A prompt text without its instruction; a text that has none is returned as it is."""
    return (text.partition(": ")[2] if task == "Grounding" else text.rpartition("\n")[0]) or text


def re_template(record: Example | Question, instruction_set: str, seed: int) -> Example | Question:
    """The record with an instruction of another set; which one depends on seed, set, task and record id only.

    Args:
        record: training example (its first human turn changes) or question.
        instruction_set: Original, Diverse or 10Type.
        seed: any integer.

    Raises:
        UserError: for an unknown set or task.
    """
    choices = instructions(instruction_set, record.task)
    digest = hashlib.sha256(f"{seed}:{instruction_set}:{record.task}:{record.id}".encode()).digest()
    chosen = choices[int.from_bytes(digest[:8], "big") % len(choices)]
    if isinstance(record, Question):
        return replace(record, text=replace_instruction(record.text, chosen, record.task))
    (human, gpt), *rest = record.turns
    return replace(record, turns=((replace_instruction(human, chosen, record.task), gpt), *rest))
