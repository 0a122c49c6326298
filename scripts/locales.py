"""Writes `locales/<language>/nodeDefs.json` and `main.json`: names, descriptions and tooltips in four languages.

    python -m scripts.locales

English comes from the schemas of the nodes, the others from `locales/table.json`, by the English text. Names of inputs
and outputs stay as they are: help pages, notes of workflows and error messages call them so.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from . import places

FOLDER = places.ROOT / "locales"
TABLE = FOLDER / "table.json"
LANGUAGES = ("en", "zh", "ja", "ko")


def table(part: str = "texts") -> dict[str, dict[str, str]]:
    """The rows by their English text: of the nodes, or "categories" of the node menu that the page does not know."""
    return {row["en"]: row for row in json.loads(TABLE.read_text(encoding="utf-8"))[part]}


def definitions(schemas: list[Any]) -> dict[str, Any]:
    """What the page translates, in English: by the id of the node, of the input, and the number of the output."""
    found = {}
    for schema in schemas:
        node: dict[str, Any] = {"display_name": schema.display_name, "description": schema.description}
        node["inputs"] = {entry.id: {"tooltip": entry.tooltip} for entry in schema.inputs}
        node["outputs"] = {str(place): {"tooltip": output.tooltip} for place, output in enumerate(schema.outputs)}
        found[schema.node_id] = node
    return found


def translated(value: Any, language: str, rows: dict[str, dict[str, str]]) -> Any:
    """The same with every text in `language`."""
    if isinstance(value, dict):
        return {key: translated(inner, language, rows) for key, inner in value.items()}
    return value if language == "en" else rows[value][language]


def texts(value: Any) -> Iterator[str]:
    """All texts in it."""
    if isinstance(value, dict):
        for inner in value.values():
            yield from texts(inner)
    else:
        yield value


def files(schemas: list[Any]) -> dict[Path, str]:
    """All files and what is in them."""
    english, rows, made = definitions(schemas), table(), {}
    for language in LANGUAGES:
        made[FOLDER / language / "nodeDefs.json"] = written(translated(english, language, rows))
        words = {name: row[language] for name, row in table("categories").items()}
        made[FOLDER / language / "main.json"] = written({"nodeCategories": words})
    return made


def written(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=1) + "\n"


def main() -> int:
    sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    args.cpu = True
    from dit_toolkit.nodes import DiTToolkit  # pyright: ignore[reportMissingImports]

    schemas = [node.GET_SCHEMA() for node in asyncio.run(DiTToolkit().get_node_list())]
    missing = sorted(set(texts(definitions(schemas))) - set(table()))
    if missing:
        print(f"{TABLE.name} lacks:", *missing, sep="\n", file=sys.stderr)
        return 1
    made = files(schemas)
    for path, text in made.items():
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    print(f"{len(made)} files in {FOLDER.relative_to(places.ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
