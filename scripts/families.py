"""Prints the table of model families in docs/model-families.md, and of what a step cache reaches in each.

    python -m scripts.families

Families that no test has run are left out: they count among all others.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from . import places

if TYPE_CHECKING:
    from dit_toolkit.host.families.family import Family

COLUMNS = ("prediction", "last block", "first-block gate", "block span", "every module")


def table() -> str:
    """In Markdown, a row for all families that offer the same."""
    from dit_toolkit.host.families import FAMILIES, OTHER

    rows: dict[tuple[bool, ...], list[str]] = {}
    for family in FAMILIES:
        if family.tested:
            rows.setdefault(offered(family), []).append(family.listed or family.name)
    rows.setdefault(offered(OTHER), []).append("and all others")

    lines = [f"| model | {' | '.join(COLUMNS)} |", "|---" * (1 + len(COLUMNS)) + "|"]
    for cells, names in rows.items():
        lines.append(f"| {', '.join(names)} |" + "".join(" yes |" if cell else " |" for cell in cells))
    return "\n".join(lines)


def offered(family: Family) -> tuple[bool, ...]:
    """For each column, whether a family offers it."""
    from dit_toolkit.host.families import flux

    blocks = bool(family.kinds)
    return True, blocks, blocks, blocks, family is flux.FLUX1


def main() -> None:
    sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    args.cpu = True
    print(table())


if __name__ == "__main__":
    main()
