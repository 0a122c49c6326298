"""One line at the terminal: how many jobs are done, how fast, how long it will take."""

from __future__ import annotations

import sys
import time
from typing import TextIO

WIDTH = 24  # characters of the bar
EVERY = 30.0  # seconds between two lines where there is no terminal


class Progress:
    """`rest`: jobs to be done in this run; `before`: done in earlier ones."""

    def __init__(self, rest: int, before: int, out: TextIO = sys.stderr, clock=time.monotonic):
        self.rest, self.before, self.out, self.clock = rest, before, out, clock
        self.ended = self.failed = 0
        self._start = clock()
        self._first: float | None = None  # when the first job ended: what is before is start-up
        self._shown = clock()
        self._bar = out.isatty()
        self._drawn = 0

    def end(self, failed: bool) -> None:
        self.ended += 1
        self.failed += failed
        now = self.clock()
        self._first = self._first or now
        if self._bar and (now - self._shown > 0.2 or self.ended == self.rest):
            self._draw()
        elif not self._bar and now - self._shown > EVERY:
            self.say(self.line())

    def say(self, text: str) -> None:
        """A line above the bar."""
        if self._drawn:
            self.out.write("\r" + " " * self._drawn + "\r")
            self._drawn = 0
        self._shown = self.clock()
        print(text, file=self.out, flush=True)

    def close(self) -> None:
        if self._drawn:
            self.out.write("\n")
            self._drawn = 0

    def rate(self) -> float | None:
        """Jobs per minute since the first one ended."""
        if self._first is None or self.ended < 2 or self.clock() <= self._first:
            return None
        return 60 * (self.ended - 1) / (self.clock() - self._first)

    def line(self) -> str:
        parts = [f"{self.before + self.ended}/{self.before + self.rest}"]
        if self.failed:
            parts.append(f"{self.failed} failed")
        if rate := self.rate():
            parts.append(f"{rate:.0f} jobs/min" if rate >= 10 else f"{rate:.1f} jobs/min")
            parts.append(f"{span(60 * (self.rest - self.ended) / rate)} left")
        return " · ".join(parts)

    def _draw(self) -> None:
        share = (self.before + self.ended) / max(1, self.before + self.rest)
        text = f"[{'#' * int(WIDTH * share):{WIDTH}}] {self.line()}"
        self.out.write("\r" + text.ljust(self._drawn))
        self.out.flush()
        self._drawn, self._shown = len(text), self.clock()


def span(seconds: float) -> str:
    """As people say it: 40 s, 12 min, 3 h 20 min."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"
