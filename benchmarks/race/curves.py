"""From settings to a curve: which settings are worth having, and what a method keeps at a given fraction.

Everything here is about points: the computed part of the multiplications, and the PSNR in dB that is left. Nothing here
needs ComfyUI.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import log
from typing import TypeVar

Point = tuple[float, float]
Key = TypeVar("Key")

FRACTIONS = {"half": 1 / 2, "third": 1 / 3, "quarter": 1 / 4, "fifth": 1 / 5, "seventh": 1 / 7}
HEADS = ("1/2", "1/3", "1/4", "1/5", "1/7")
CEILING = 100.0  # dB: of pictures that do not differ
REACH = (0.1, 0.62)  # tuned settings that compute less or more than this say nothing of the fractions that are read
BEHIND = 3.0  # dB on one picture, behind a setting that computes no more: not worth measuring on others
CHOICES = {"documented": "as documented", "tuned": "tuned"}
SLACK = 0.03  # a curve is read that far beyond its ends, and says there what it says at the end


def undominated(points: Sequence[Point]) -> list[int]:
    """Indices of the points that no other one beats: none computes less and is at least as near. Of twins the first."""

    def beaten(i: int) -> bool:
        computed, near = points[i]
        return any(
            less <= computed and nearer >= near and ((less, nearer) != (computed, near) or j < i)
            for j, (less, nearer) in enumerate(points)
            if j != i
        )

    return [i for i in range(len(points)) if not beaten(i)]


def read_off(points: Sequence[Point], fraction: float) -> float | None:
    """What a method keeps at `fraction`: straight lines over the logarithm between its undominated points.

    None outside of what was measured.
    """
    line = sorted(points[i] for i in undominated(points))
    if not line:
        return None
    (least, low), (most, high) = line[0], line[-1]
    if fraction <= least:
        return low if least <= fraction * (1 + SLACK) else None
    if fraction >= most:
        return high if fraction <= most * (1 + SLACK) else None
    for (a, at_a), (b, at_b) in pairwise(line):
        if a <= fraction <= b:
            part = (log(fraction) - log(a)) / (log(b) - log(a))
            return at_a + part * (at_b - at_a)
    raise AssertionError("a fraction between the ends lies between two points")


def curve(points: Sequence[Point]) -> dict[str, float | None]:
    return {name: read_off(points, fraction) for name, fraction in FRACTIONS.items()}


# Which settings to take


def usable(found: Mapping[Key, Point]) -> dict[Key, Point]:
    least, most = REACH
    return {knobs: point for knobs, point in found.items() if least <= point[0] <= most}


def promising(found: Mapping[Key, Point]) -> list[Key]:
    """The settings that are not clearly behind another one, as far as they are of use."""
    points = usable(found)
    return [
        knobs
        for knobs, (computed, near) in points.items()
        if not any(less <= computed and nearer > near + BEHIND for less, nearer in points.values())
    ]


def tuned(found: Mapping[Key, Point]) -> list[Key]:
    """The settings that no other one beats, as far as they are of use: those next to the fractions that are read."""
    points = usable(found)
    names = list(points)
    best = sorted((names[i] for i in undominated([points[knobs] for knobs in names])), key=lambda knobs: points[knobs])
    kept = set()
    for fraction in FRACTIONS.values():
        below = [knobs for knobs in best if points[knobs][0] <= fraction]
        above = [knobs for knobs in best if points[knobs][0] >= fraction]
        kept |= {*below[-1:], *above[:1]}
    return [knobs for knobs in best if knobs in kept]


# Tables


@dataclass(frozen=True)
class Run:
    """What is compared: everything drawn with one sampler, number of steps and guidance scale."""

    sampler: str
    steps: int
    cfg: float

    @property
    def title(self) -> str:
        return f"{self.sampler}, {self.steps} steps, cfg {self.cfg:g}"


def curves(rows: list[dict]) -> list[dict]:
    """For each run, method and choice what is kept at the fixed fractions: `at`, by `curves.FRACTIONS`."""
    groups: dict[tuple, list[Point]] = {}
    for row in rows:
        key = (row["sampler"], row["steps"], row["cfg"], row["method"].split(",")[0], row["peer"], row["choice"])
        groups.setdefault(key, []).append((row["computed"], CEILING if row["psnr_db"] is None else row["psnr_db"]))
    names = ("sampler", "steps", "cfg", "method", "peer", "choice")
    return [
        dict(zip(names, key, strict=True))
        | {"at": {name: None if db is None else round(db, 2) for name, db in curve(points).items()}}
        for key, points in groups.items()
    ]


def table(entries: list[dict]) -> str:
    """Markdown, one table for each run, of what `curves` gives. Best of each column bold."""
    parts = []
    for run in dict.fromkeys(Run(each["sampler"], each["steps"], each["cfg"]) for each in entries):
        lines = [each for each in entries if Run(each["sampler"], each["steps"], each["cfg"]) == run]
        parts.append(f"**{run.title}**\n\n{run_table(lines)}\n\n{verdict(lines)}")
    return "\n\n".join(parts)


def verdict(lines: list[dict]) -> str:
    """A sentence for each fraction at which ours are not the nearest, or one that says that they always are."""
    said = []
    for name, head in zip(FRACTIONS, HEADS, strict=True):
        read = [each for each in lines if each["at"][name] is not None]
        if not read:
            continue
        best = max(read, key=lambda each: each["at"][name])
        ours = max((each for each in read if each["peer"] is None), key=lambda each: each["at"][name], default=None)
        if best["peer"] is None:
            continue
        if ours is None:
            said.append(f"At {head} nothing of ours can be read; {named(best, name)} is the nearest.")
        elif round(ours["at"][name], 1) < round(best["at"][name], 1):
            said.append(f"At {head} ours are behind: {named(ours, name)} against {named(best, name)}.")
    return "\n".join(said or ["Ours are at least level with everybody at every fraction."])


def named(line: dict, fraction: str) -> str:
    whose = f" ({line['peer']})" if line["peer"] else ""
    return f"{line['method']}{whose}, {CHOICES[line['choice']]}, {line['at'][fraction]:.1f} dB"


def run_table(lines: list[dict]) -> str:
    """One table, of the lines of one run, ours last."""
    lines = sorted(lines, key=lambda each: each["peer"] is None)
    head = f"| method | whose | settings | {' | '.join(HEADS)} |\n|---|---|---|{'---:|' * len(HEADS)}"
    best = {name: max((each["at"][name] or 0.0 for each in lines), default=0.0) for name in FRACTIONS}
    rows = []
    for each in lines:
        cells = []
        for name, most in best.items():
            kept = each["at"][name]
            shown = "" if kept is None else f"{kept:.1f}"
            cells.append(f"**{shown}**" if shown and shown == f"{most:.1f}" else shown)
        rows.append(f"| {' | '.join([each['method'], each['peer'] or 'ours', CHOICES[each['choice']], *cells])} |")
    return "\n".join([head, *rows]).replace("|  |", "| |").replace("|  |", "| |")
