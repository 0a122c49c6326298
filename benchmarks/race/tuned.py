"""The tuned race: every method with the settings it documents, and with those that are best for it here.

The settings of a method's grid are measured on calibration prompts: all of them on the first picture, and on all
pictures those that are not clearly behind. Those that no other one of the method beats are its tuned settings. They and
the documented ones are then judged on other prompts and other noise. There is no clock.

Every measurement is a line in a file as soon as it is there, and is not made again: a run may be stopped at any time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from .arena import Arena, Heat, together
from .contenders import Task
from .curves import CEILING, Point, Run, curves, promising, tuned
from .grids import Knobs, Method
from .measure import Seen, evaluations_of, judge, look

CALIBRATION, JUDGED = "calibration", "judged"


@dataclass(frozen=True)
class Measured:
    computed: float
    psnr_db: float | None
    ssim: float | None

    @property
    def point(self) -> Point:
        return self.computed, CEILING if self.psnr_db is None else self.psnr_db


class Diary:
    """Measurements by what they are of, kept in a file of JSON lines."""

    def __init__(self, file: Path | None):
        self.file, self.lines = file, {}
        if file is not None and file.is_file():
            for line in file.read_text(encoding="utf-8").splitlines():
                key, value = json.loads(line)
                self.lines[json.dumps(key)] = Measured(**value)

    def __call__(self, key: list, measure: Callable[[], Measured]) -> Measured:
        name = json.dumps(key)
        if name not in self.lines:
            self.lines[name] = found = measure()
            if self.file is not None:
                self.file.parent.mkdir(parents=True, exist_ok=True)
                with self.file.open("a", encoding="utf-8") as file:
                    file.write(json.dumps([key, asdict(found)]) + "\n")
        return self.lines[name]


class Ground:
    """A run on one set of pictures: drawn without a cache at most once, and only if something is to be compared."""

    def __init__(self, task: Task, heats: list[Heat]):
        self.task, self.heats = task, heats
        self._plain: dict[bool, Seen] = {}

    def look(self, model: Any, steps: int, planned: bool = False) -> Seen:
        task, heats = self.task, [together(self.heats)] if planned else self.heats
        return look(task.arena, model, steps, task.sampler, task.cfg, heats, memory=False)

    def plain(self, twin: bool) -> Seen:
        if twin not in self._plain:
            self._plain[twin] = self.look(self.task.arena.twin if twin else self.task.arena.model, self.task.steps)
        return self._plain[twin]

    def measure(self, method: Method, knobs: Knobs) -> Measured:
        model, steps = method.run(self.task, *knobs)
        seen, base = self.look(model, steps, method.planned), self.plain(method.twin)
        quality = judge(seen.pictures, self.plain(False).pictures)
        return Measured(seen.multiplications / base.multiplications, quality.psnr_db, quality.ssim)


def settings(method: Method) -> list[Knobs]:
    """All that may be chosen: the grid and what is documented."""
    return list(dict.fromkeys([*method.grid, *method.documented])) if method.grid else []


def race(
    arena: Arena, methods: Iterable[Method], run: Run, diary: Diary, tell: Callable[[dict], None], note: Callable
) -> None:
    """Tell the row of every judged setting. `note`: gets words on what was measured last."""
    task = Task(arena, run.sampler, run.steps, evaluations_of(arena, run.steps, run.sampler), run.cfg)
    first, calibration = Ground(task, task.calibration[:1]), Ground(task, task.calibration)
    judged = Ground(task, arena.heats)

    def measured(ground: Ground, method: Method, knobs: Knobs) -> Measured:
        stage = JUDGED if ground is judged else CALIBRATION
        key = [stage, len(ground.heats), *asdict(run).values(), method.name, method.peer, list(knobs)]
        found = diary(key, lambda: ground.measure(method, knobs))
        note(f"{run.title}, {stage}: {method.name}, {method.words(knobs)}: {found.computed:.2f}, {found.point[1]:.1f}")
        return found

    for method in methods:
        looks = {knobs: measured(first, method, knobs).point for knobs in settings(method)}
        points = {knobs: measured(calibration, method, knobs).point for knobs in promising(looks)}
        choices = {"documented": method.documented, "tuned": tuned(points)}
        for choice, chosen in choices.items():
            for knobs in chosen:
                tell(row_of(arena, method, knobs, choice, run, measured(judged, method, knobs)))


def row_of(arena: Arena, method: Method, knobs: Knobs, choice: str, run: Run, found: Measured) -> dict:
    return {
        "method": f"{method.name}, {method.words(knobs)}",
        "peer": method.peer,
        "choice": choice,
        "model": arena.name,
        **asdict(run),
        "computed": round(found.computed, 4),
        "psnr_db": None if found.psnr_db is None else round(found.psnr_db, 2),
        "ssim": None if found.ssim is None else round(found.ssim, 4),
    }


def save(rows: list[dict], calibration: int, judged: int, file: Path) -> Path:
    """Rows and curves as JSON, one a line, with the number of pictures behind them."""

    def listed(entries: list[dict]) -> str:
        return "[\n" + ",\n".join(f"  {json.dumps(entry)}" for entry in entries) + "\n ]"

    file.parent.mkdir(parents=True, exist_ok=True)
    pictures = json.dumps({"calibration": calibration, "judged": judged})
    text = f'{{\n "pictures": {pictures},\n "curves": {listed(curves(rows))},\n "rows": {listed(rows)}\n}}\n'
    file.write_text(text, encoding="utf-8")
    return file
