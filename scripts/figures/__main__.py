"""Fill the marked places of README, docs and model card from the results files."""

from __future__ import annotations

import argparse
import re
import sys

from .. import places
from . import results
from .tables import FORMATS, TABLES, pages

BLOCK = re.compile(r"(<!-- figures: (.+?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)
NUMBER = re.compile(r"(<!--= (.+?) as (.+?) -->)(.*?)(<!--/-->)", re.DOTALL)


def filled(text: str, found: results.Tree, without: frozenset[str] = frozenset()) -> str:
    """The page with all its marked places filled. Tables in `without` stay as they are.

    Raises:
        KeyError: a place names a table, a number or a way to write it that is not there.
    """

    def block(match: re.Match) -> str:
        name = match[2]
        if name not in TABLES:
            raise KeyError(f"no table '{name}'; there are {', '.join(TABLES)}")
        if name in without:
            return match[0]
        made = TABLES[name](found)
        return f"{match[1]}{made}\n{match[4]}" if made else f"{match[1]}{match[4]}"

    def number(match: re.Match) -> str:
        if match[3] not in FORMATS:
            raise KeyError(f"no way to write a number '{match[3]}'; there are {', '.join(FORMATS)}")
        return f"{match[1]}{FORMATS[match[3]](results.look_up(match[2], found))}{match[5]}"

    return NUMBER.sub(number, BLOCK.sub(block, text))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a page disagrees")
    options = parser.parse_args(argv)
    sys.path.append(str(places.comfyui()))
    from comfy.cli_args import args

    args.cpu = True
    found, changed = results.tree(), []
    for page in pages(places.ROOT):
        before = page.read_text(encoding="utf-8")
        try:
            after = filled(before, found)
        except KeyError as error:
            print(f"{page.relative_to(places.ROOT)}: {error.args[0]}", file=sys.stderr)
            return 1
        if after != before:
            changed.append(page)
            if not options.check:
                page.write_text(after, encoding="utf-8")
    for page in changed:
        print(f"{page.relative_to(places.ROOT)}: {'disagrees with its results' if options.check else 'filled'}")
    if not changed:
        print("All figures are those of the results files.")
    return 1 if options.check and changed else 0


if __name__ == "__main__":
    sys.exit(main())
