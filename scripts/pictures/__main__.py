"""Make pictures: `python -m scripts.pictures [--list] [--times] [WORD ...]`."""

from __future__ import annotations

import argparse
import datetime
import json
import sys
import time

from ..figures.results import RESULTS
from ..places import ROOT, comfyui
from . import sheet, table, thumbnails
from .studio import Studio


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("words", nargs="*", metavar="WORD", help="make those with one of these words in their path")
    parser.add_argument("--list", action="store_true", help="say what there is, and make nothing")
    parser.add_argument("--times", action="store_true", help="the thumbnails; save how long the CPU workflows take")
    options = parser.parse_args(argv)
    if options.list:
        for name, how in sorted(table.entries().items()):
            print(f"{name}: {how}")
        return 0
    names = table.chosen(options.words)
    stems, makers = table.thumbnails(), table.makers()
    if options.times:
        names = [name for name in names if name in stems]
    if not names:
        print(f"No picture has {' or '.join(options.words)} in its path.", file=sys.stderr)
        return 1
    sys.path.append(str(comfyui()))
    from comfy.cli_args import args

    args.cpu = True  # what is imported here runs beside the server
    times: dict[str, float] = {}
    failed = []
    with Studio() as studio:
        for name in names:
            start = time.monotonic()
            try:
                if name in stems:
                    thumbnails.make(studio, stems[name], times)
                else:
                    sheet.save(makers[name](studio), ROOT / name)
            except Exception as error:  # the others are still wanted; the run fails at its end
                failed.append(name)
                print(f"  {name}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
                continue
            print(f"  {name}: {time.monotonic() - start:.1f} s", flush=True)
    if options.times and times:
        file = RESULTS / f"workflows-{datetime.date.today().isoformat()}-cpu.json"
        file.write_text(json.dumps(dict(sorted(times.items())), indent=1) + "\n", encoding="utf-8")
        print(f"Saved as {file.relative_to(ROOT)}")
    if failed:
        print(f"{len(failed)} of {len(names)} pictures could not be made.", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
