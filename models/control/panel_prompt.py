"""The joint prompt of several panels: one flowing sentence in which a tag introduces each panel.

Source: the published prompts of In-Context LoRA, arXiv:2410.23775; see `panel_layout.py`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from .panel_layout import Layout

# Full-width marks as escapes: shipped files stay readable in cp1252.
STOPS = ".\u3002"  # the layout's joint replaces them between two panels
JOINTS = ",;:\uff0c\uff1b\uff1a\u3001"  # stay between two panels; dropped at the end
ENDS = "!?\uff01\uff1f\u2026"  # stay
QUOTES = "\"'\u201d\u2019\u00bb\u300d\u300f"  # no full stop after one that follows a stop


def panel_texts(lines: str, count: int) -> tuple[str, ...]:
    """One text per panel from one line per panel. Lines may be empty, or missing at the end.

    Raises:
        ValueError: more lines than panels.
    """
    texts = [line.strip() for line in lines.rstrip().splitlines()]
    if len(texts) > count:
        raise ValueError(
            f"'panel_prompts' has {len(texts)} lines for {count} panels. Write one line per panel, without line breaks "
            "inside a panel's text."
        )
    return tuple(texts + [""] * (count - len(texts)))


def joint_prompt(layout: Layout, summary: str, texts: Sequence[str]) -> str:
    """One flowing sentence: the prefix, a sentence on the whole set, then each panel's tag and text.

    The layout's joint replaces a full stop at the end of a part; a comma, semicolon, `!` or `?` there stays. A text
    that has its tag already keeps it in place ("while [RIGHT] a white cat"), as in some published prompts. So does a
    summary that has the prefix as a word of its own ("This [FOUR-PANEL] image ..."). A panel without text keeps its
    tag, because panels without tags tend to run together.

    Raises:
        ValueError: there is not one text per panel.
    """
    if len(texts) != layout.count:
        raise ValueError(f"{layout.count} panels need {layout.count} texts, got {len(texts)}.")
    summary = one_line(summary)
    parts = [summary] if summary.strip(f" {STOPS}") else []
    for tag, text in zip(layout.tags, texts, strict=True):
        text = one_line(text)
        parts.append(text if tag in text else f"{tag} {text}".rstrip())
    sentence = parts[0]
    for part in parts[1:]:
        sentence = sentence.rstrip(f" {STOPS}")
        sentence += (" " if sentence.endswith((*JOINTS, *ENDS)) else layout.joint) + part
    sentence = sentence.rstrip(f" {JOINTS}")
    sentence += "" if sentence.rstrip(QUOTES).endswith((*STOPS, *ENDS)) else "."
    return f"{layout.prefix} {sentence}" if layout.prefix and not has_word(summary, layout.prefix) else sentence


def has_word(text: str, word: str) -> bool:
    """Whether `word` stands in `text` by itself, as "sks" does in "a sks dog", but not in "tasks"."""
    at = text.find(word)
    while at >= 0:
        end = at + len(word)
        if not re.match(r"\w", text[max(at - 1, 0) : at]) and not re.match(r"\w", text[end : end + 1]):
            return True
        at = text.find(word, at + 1)
    return False


def one_line(text: str) -> str:
    return " ".join(text.split())
