"""Prompts with a description, and how a subject is called."""

from __future__ import annotations

import pytest

from dit_toolkit.models.control.subject_description import named, prompt_with_description


@pytest.mark.parametrize(
    ("prompt", "joined"),
    [
        ("a doll, waving", "a doll, waving. red hair"),
        ("a doll.;", "a doll. red hair"),
        ("Who is it?", "Who is it? red hair"),
        ("Look! ", "Look! red hair"),
        (" ... ", "red hair"),
        ("", "red hair"),
    ],
)
def test_a_prompt_and_a_description_are_two_sentences(prompt, joined):
    assert prompt_with_description(prompt, " red hair\n") == joined
    assert prompt_with_description(prompt, "") == prompt.strip()


@pytest.mark.parametrize(
    ("subject", "name"),
    [
        ("teapot", "the teapot"), ("The teapot", "the teapot"), ("an Owl", "the Owl"), ("A  cat ", "the cat"),
        ("theatre", "the theatre"), ("android", "the android"), ("", "the subject"),
    ],
)  # fmt: skip
def test_a_subject_has_one_article(subject, name):
    assert named(subject) == name
