"""Prompts for DiT4SR: what is left of a caption, and what is put behind it."""

from __future__ import annotations

import pytest

from dit_toolkit.models.restore.dit4sr_prompt import NEGATIVE, SUFFIXES, TELLING, prompts, without_telling

CAPTION = "A red fox in snow. The background is Blurred! Is it in focus? It looks left."


def test_sentences_that_tell_of_the_photo_as_a_photo_are_left_out():
    assert without_telling(CAPTION) == "A red fox in snow. It looks left."


@pytest.mark.parametrize("word", TELLING)
def test_every_word_counts_whatever_its_case_and_whatever_it_is_part_of(word):
    for written in (word, word.upper(), f"un{word}ly"):
        assert without_telling(f"A house. It is {written}. A tree!") == "A house. A tree!"


@pytest.mark.parametrize(
    ("caption", "left"),
    [
        ("", ""),
        ("   ", ""),
        ("a cat", "a cat"),
        ("a blurred cat", ""),
        ("...", "..."),
        ("A cat... A dog?! Blur.", "A cat... A dog?!"),
        ("Blur. A cat.\nA dog.", "A cat.\nA dog."),
        ("?A cat", "?A cat"),
    ],
)
def test_any_text_is_taken(caption, left):
    assert without_telling(caption) == left


def test_presets_are_those_of_the_authors():
    made = prompts(CAPTION)
    assert made.positive.startswith("A red fox in snow. It looks left. Cinematic, hyper sharpness, highly detailed, ")
    assert made.positive.endswith("extreme meticulous detailing, skin pore detailing.")
    assert made.negative == NEGATIVE
    assert NEGATIVE.startswith("motion blur, noisy, dotted, bokeh, pointed, CG Style, 3D render")
    assert prompts("A fox.", "demo") == (f"A fox. {SUFFIXES['demo']}", NEGATIVE)
    assert prompts("A fox.", "none") == ("A fox.", "")
    assert prompts("", "none") == ("", "")
    assert prompts("").positive == SUFFIXES["published"]


def test_without_the_filter_the_caption_stays_as_it_is():
    assert prompts(CAPTION, "none", filtered=False).positive == CAPTION


def test_a_long_caption_takes_no_time():
    """The search for sentences goes through the text once."""
    assert without_telling("." * 200_000) == "." * 200_000
    assert without_telling("a" * 200_000) == "a" * 200_000
