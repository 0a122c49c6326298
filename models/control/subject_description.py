"""Words for a subject: questions to language models about its picture, and the prompt that carries the answer.

In FreeCus, arXiv:2507.15249, one language model describes the subject and another keeps its physical traits. The
instructions here ask for the same in our own words. The maths of FreeCus is in `freecus.py`.
"""

from __future__ import annotations

import re
from typing import Literal

Aspect = Literal["subject", "style"]


def prompt_with_description(prompt: str, description: str) -> str:
    """The prompt to draw: "prompt. description", or the one that is not empty. ? and ! need no full stop."""
    prompt, description = prompt.strip(), description.strip()
    if not (prompt and description):
        return prompt or description
    prompt = prompt.rstrip(".,;: ")
    if not prompt:
        return description
    return f"{prompt}{' ' if prompt[-1] in '?!' else '. '}{description}"


def instruction_to_describe(subject: str, aspect: Aspect = "subject") -> str:
    """The instruction for a model that sees the picture."""
    thing = named(subject)
    if aspect == "style":
        return (
            f"Describe the artistic style in which {thing} is shown, in about 20 words: medium, technique, line, "
            "palette, texture, mood. Do not say what is shown. Answer with the description only, on one line."
        )
    return (
        f"Describe {thing} in this picture in about 20 words: the overall appearance first, then what sets it apart. "
        "Name colours, materials, shapes and parts. Answer with the description only, on one line."
    )


def instruction_to_keep(subject: str, description: str, aspect: Aspect = "subject") -> str:
    """The instruction for a model that reads a description and keeps the part for another picture."""
    thing = named(subject)
    if aspect == "style":
        keep = "what says how the picture is made: medium, technique, line, palette, texture, mood"
        drop = "everything that is shown: things, people, places, actions"
    else:
        keep = f"what belongs to {thing} and can be seen on it: colours, materials, shapes, parts, clothing, marks"
        drop = "actions, pose, place, light, camera, and all other things"
    return (
        f"Below is a description of {thing}. Keep only {keep}. Drop {drop}. Add nothing. "
        f"Answer with one line.\n\n{description.strip()}"
    )


def named(subject: str) -> str:
    """ "the teapot", or "the subject" if it has no name."""
    word = re.sub(r"^(the|an?)\s+", "", subject.strip(), flags=re.IGNORECASE)
    return f"the {word or 'subject'}"
