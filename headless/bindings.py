"""Columns of a table -> inputs of nodes.

    --set "Positive prompt.text=a photo of {product}, {style}"     node title, input, and what goes in
    --set "#9.seed={seed}"                                         the node's number instead of its title
    --set "Apply EasyControl.image={outline}"                      a file of a picture, for an input that takes pictures

A column alone, as in `{seed}`, is taken as it is; a number stays a number. `{{` and `}}` stand for braces. An empty
cell leaves the workflow's own value, save in a text, where it is an empty text. Everything is checked before anything
runs.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from .errors import Refused
from .tables import Row
from .workflow import Prompt, inputs_of

LOADERS = {  # what an input that only takes a wire gets its file through: node, its input, other inputs
    "IMAGE": ("LoadImage", "image", {}),
    "MASK": ("LoadImageMask", "image", {"channel": "red"}),
}
UPLOADS = ("image_upload", "video_upload", "audio_upload", "animated_image_upload", "file_upload")
MEDIA = {
    ".png",
    ".jpg",
    ".jpeg",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".avif",
    ".exr",
    ".mp4",
    ".webm",
    ".mov",
    ".mkv",
    ".avi",
    ".m4v",
    ".wav",
    ".mp3",
    ".flac",
    ".ogg",
    ".m4a",
    ".opus",
}
UPLOADED = "headless"  # the folder inside ComfyUI's input that files go to
PART = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")
YES, NO = {"true", "yes", "on", "1"}, {"false", "no", "off", "0"}
SHOWN = 5  # near misses


@dataclass(frozen=True)
class File:
    """A file that a job needs, and the name that ComfyUI will know it by: the same wherever it is uploaded."""

    path: str
    name: str


@dataclass(frozen=True)
class Template:
    """What goes into an input: texts and columns, in turn."""

    text: str

    @cached_property
    def parts(self) -> list[tuple[str, bool]]:
        """Each text as it stands, and each column's name with True."""
        parts, position = [], 0
        for match in PART.finditer(self.text):
            parts.append((self.text[position : match.start()], False))
            position = match.end()
            if match[0] in ("{{", "}}"):
                parts.append((match[0][0], False))
            elif match[0] in ("{", "}"):
                raise Refused(
                    f"'{self.text}': a brace stands alone. Columns are {{name}}, braces themselves {{{{ and }}}}."
                )
            else:
                parts.append((match[1], True))
        parts.append((self.text[position:], False))
        return [part for part in parts if part[0] or part[1]]

    @property
    def columns(self) -> list[str]:
        return [name for name, is_column in self.parts if is_column]

    @property
    def column(self) -> str | None:
        """The column, where there is nothing else."""
        return self.columns[0] if len(self.parts) == 1 and self.columns else None

    def value(self, row: Row) -> Any:
        if self.column is not None:
            return row[self.column]
        return "".join(_text(row[part]) if is_column else part for part, is_column in self.parts)


def _text(value: Any) -> str:
    return "" if value is None else str(value)


@dataclass(frozen=True)
class Binding:
    """One input of one node, and what each row puts there."""

    node: str  # id
    input: str
    label: str  # as the user named it
    template: Template
    kind: str  # STRING, INT, FLOAT, BOOLEAN, COMBO, FILE, IMAGE, MASK, or "" for what cannot be checked
    options: Mapping[str, Any]
    choices: tuple = ()

    def value(self, row: Row, files: Files, place: str) -> Any:
        """What goes into the input: a value, a File, or None where the cell leaves the workflow's own."""
        value = self.template.value(row)
        if value is None or (value == "" and self.kind != "STRING"):
            return None
        try:
            return getattr(self, f"_{self.kind.lower() or 'any'}")(value, files)
        except ValueError as error:
            raise Refused(f"{place}: {self.label} {error}") from None

    def _any(self, value: Any, _) -> Any:
        return value

    def _string(self, value: Any, _) -> str:
        return _text(value)

    def _int(self, value: Any, _) -> int:
        try:
            number = float(value) if isinstance(value, float) else int(value)
            if isinstance(value, bool) or number != int(number):
                raise ValueError
        except ValueError:
            raise ValueError(f"needs a whole number, not {_shown(value)}.") from None
        return self._in_range(int(number))

    def _float(self, value: Any, _) -> float:
        try:
            number = float(value)
            if isinstance(value, bool) or not math.isfinite(number):
                raise ValueError
        except ValueError:
            raise ValueError(f"needs a number, not {_shown(value)}.") from None
        return self._in_range(number)

    def _in_range(self, number: Any) -> Any:
        low, high = self.options.get("min"), self.options.get("max")
        if (low is not None and number < low) or (high is not None and number > high):
            raise ValueError(f"is {number}, and must be from {low} to {high}.")
        return number

    def _boolean(self, value: Any, _) -> bool:
        word = _text(value).strip().lower()
        if word not in YES | NO:
            raise ValueError(f"needs yes or no, not {_shown(value)}.")
        return word in YES

    def _combo(self, value: Any, _) -> Any:
        if value in self.choices and not isinstance(value, bool):
            return next(each for each in self.choices if each == value)
        for choice in self.choices:  # a table's numbers are texts
            if _text(choice) == _text(value):
                return choice
        raise ValueError(f"has no choice {_shown(value)}. {near(_text(value), map(_text, self.choices))}")

    def _file(self, value: Any, files: Files) -> Any:
        found = files.find(_text(value))
        if found is None:
            if value in self.choices:  # it lies in ComfyUI's input folder
                return value
            raise ValueError(files.why_not(_text(value)))
        return found

    def _image(self, value: Any, files: Files) -> File:
        found = files.find(_text(value))
        if found is None:
            raise ValueError(files.why_not(_text(value)))
        return found

    _mask = _image


def _shown(value: Any) -> str:
    """A value in a sentence: short, and without what a terminal would obey."""
    text = "".join(each if each.isprintable() else "?" for each in _text(value)[:61])
    return f"'{text[:60]}...'" if len(text) > 60 else f"'{text}'"


class Files:
    """Files that a table names: below `folder`, and nowhere else."""

    def __init__(self, folder: Path):
        self.folder = folder.resolve()
        self._found: dict[str, File | None] = {}

    def find(self, name: str) -> File | None:
        if name not in self._found:
            self._found[name] = self._read(name)
        return self._found[name]

    def _read(self, name: str) -> File | None:
        path = self._path(name)
        try:
            if path is None or not path.is_file() or path.suffix.lower() not in MEDIA:
                return None
            with path.open("rb") as opened:
                digest = hashlib.sha256()
                while block := opened.read(1 << 20):
                    digest.update(block)
        except OSError:  # `why_not` says it
            return None
        stem = re.sub(r"[^A-Za-z0-9_-]+", "_", path.stem)[:40]
        return File(str(path), f"{stem}_{digest.hexdigest()[:16]}{path.suffix.lower()}")

    def _path(self, name: str) -> Path | None:
        """Where it lies, links followed; None outside of the folder."""
        try:
            path = (self.folder / name).resolve()
        except (OSError, ValueError, RuntimeError):
            return None
        return path if path.is_relative_to(self.folder) else None

    def why_not(self, name: str) -> str:
        path = self._path(name)
        if path is None:
            return f"names the file {_shown(name)}, which lies outside of {self.folder}. Set that folder with --files."
        try:
            if path.is_file():
                return f"names the file {_shown(name)}, which is no picture, video or sound."
            here = [each.name for each in path.parent.iterdir()] if path.parent.is_dir() else []
        except OSError as error:
            return f"names the file {_shown(name)}, which cannot be read: {error.strerror}."
        return f"names the file {_shown(name)}, which is not in {self.folder}. {near(Path(name).name, here)}"


def near(word: str, known: Iterable[str]) -> str:
    """The sentence that names what was probably meant."""
    words = list(dict.fromkeys(known))
    by_case = {each.lower(): each for each in reversed(words)}
    found = [by_case[each] for each in difflib.get_close_matches(word.lower(), by_case, SHOWN, 0.5)]
    found += [each for each in words if word and word.lower() in each.lower() and each not in found]
    shown = (found or words)[:SHOWN]
    if not shown:
        return "There is none."
    rest = "" if found or len(words) <= SHOWN else f" and {len(words) - SHOWN} more"
    return f"{'Near misses' if found else 'There are'}: {', '.join(shown)}{rest}."


# From what the user wrote to bindings


def bind(settings: Iterable[str], prompt: Prompt, known: dict, columns: Iterable[str] | None) -> list[Binding]:
    """The bindings of `--set`, on this prompt, for a table with these columns."""
    bindings = [_bind(setting, prompt, known) for setting in settings]
    seen: dict[tuple[str, str], str] = {}
    for binding in bindings:
        if before := seen.get((binding.node, binding.input)):
            raise Refused(f"{before} and {binding.label} are one and the same input. Set it once.")
        seen[binding.node, binding.input] = binding.label
        for column in binding.template.columns:
            check_column(column, columns)
    return bindings


def check_column(column: str, columns: Iterable[str] | None) -> None:
    if columns is not None and column not in (columns := list(columns)):
        raise Refused(f"The table has no column '{column}'. {near(column, columns)}")


def _bind(setting: str, prompt: Prompt, known: dict) -> Binding:
    target, equals, template = setting.partition("=")
    if not equals or "." not in target:
        raise Refused(f'--set "{setting}" is not understood. It reads "Node title.input={{column}}".')
    target = target.strip()
    problems = []
    for position in reversed([number for number, character in enumerate(target) if character == "."]):
        name, field = target[:position].strip(), target[position + 1 :].strip()
        nodes = _nodes_named(name, prompt)
        if not nodes:
            problems.append(f"No node is named '{name}'. {near(name, _names(prompt))}")
            continue
        if len(nodes) > 1:
            numbers = ", ".join(f"#{node}" for node in nodes)
            raise Refused(
                f"{len(nodes)} nodes are '{name}': {numbers}. Write its number: --set \"#{nodes[0]}.{field}=...\"."
            )
        inputs = inputs_of(prompt[nodes[0]], known)
        if field in inputs:
            return Binding(nodes[0], field, target, Template(template), *_kind(inputs[field]))
        problems.append(f"'{name}' has no input '{field}'. {near(field, inputs)}")
    raise Refused(problems[0])


def _nodes_named(name: str, prompt: Prompt) -> list[str]:
    """Ids of the nodes with a title, or of the one with a number. Those inside subgraphs come second."""
    if name.startswith("#"):
        return [name[1:]] if name[1:] in prompt else []
    found = [node_id for node_id, node in prompt.items() if node["_meta"]["title"] == name]
    found = found or [node_id for node_id, node in prompt.items() if node["class_type"] == name]
    return [node_id for node_id in found if ":" not in node_id] or found


def _names(prompt: Prompt) -> list[str]:
    titles = [node["_meta"]["title"] for node in prompt.values()]
    return [
        title if titles.count(title) == 1 else f"#{node_id} ({title})"
        for node_id, title in zip(prompt, titles, strict=True)
    ]


def _kind(spec: list) -> tuple[str, Mapping[str, Any], tuple]:
    if not spec:
        return "", {}, ()
    kind, options = spec[0], spec[1] if len(spec) > 1 and isinstance(spec[1], dict) else {}
    if isinstance(kind, list):
        kind, choices = "COMBO", tuple(kind)
    else:
        choices = tuple(options.get("options") or ())
    if any(options.get(each) for each in UPLOADS):
        return "FILE", options, choices
    known = ("STRING", "INT", "FLOAT", "BOOLEAN", "COMBO", "IMAGE", "MASK")
    if kind in known and not (kind == "COMBO" and options.get("multiselect")):
        return kind, options, choices
    if kind.isupper() and kind not in ("*",) and not options.get("widgetType"):
        raise Refused(
            f"An input of the type {kind} takes a wire. A table can set texts, numbers, choices, pictures and masks."
        )
    return "", options, choices


# From a row to its prompt


def apply(
    prompt: Prompt, bindings: Iterable[Binding], values: Iterable[Any], loaders: Mapping[int, str]
) -> tuple[Prompt, list[File]]:
    """The prompt of a row, and the files that it needs. `loaders`: ids of the nodes put in front of picture inputs."""
    made = {node_id: {**node, "inputs": dict(node["inputs"])} for node_id, node in prompt.items()}
    files = []
    for number, (binding, value) in enumerate(zip(bindings, values, strict=True)):
        if value is None:
            continue
        if isinstance(value, File):
            files.append(value)
            value = f"{UPLOADED}/{value.name}"
        if binding.kind in LOADERS:
            kind, field, others = LOADERS[binding.kind]
            title = f"{binding.label}"
            made[loaders[number]] = {"inputs": {field: value, **others}, "class_type": kind, "_meta": {"title": title}}
            value = [loaders[number], 0]
        made[binding.node]["inputs"][binding.input] = value
    return made, files


def loader_ids(prompt: Prompt, bindings: Iterable[Binding], above: int = 0) -> dict[int, str]:
    """Ids for the nodes that load pictures and masks, by the binding's place. `above`: the highest of the graph."""
    numbers = [int(part) for node_id in prompt for part in node_id.split(":") if part.isascii() and part.isdecimal()]
    taken = max([above, *numbers])
    wanted = [number for number, binding in enumerate(bindings) if binding.kind in LOADERS]
    return {number: str(taken + 1 + place) for place, number in enumerate(wanted)}
