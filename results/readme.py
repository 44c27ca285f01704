"""Fill in the README what was run, from results/*/, so that no number of ours in its tables is written by hand.

    python results/readme.py

Fills the last three columns of the paper's items, and what stands between <!-- FILE --> and <!-- end --> with the table
in FILE.
"""

import functools
import json
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from results import report, reproduce  # noqa: E402

PLACES = {"imagenet": "imagenet", "cifar10-short": "cifar10", "textures": "textures"}   # folder of results: its scale
SEEDS = range(10)


@functools.cache
def names_of(scale):
    """The names of all runs at a scale, as `reproduce.plan` has them."""
    return reproduce.plan(reproduce.CLAIMED, scale, SEEDS)[1]


def ours(script, flags):
    """A cell for each of PLACES, for a command at the scale of ImageNet; Table 3's columns of K are each scale's own."""
    items, found = reproduce.CLAIMED, []
    where = next(((item, *key) for item in items for key, (name, wanted, _) in reproduce.cells(item, "imagenet").items()
                  if (name, wanted) == (script, flags)), None)
    for place, scale in PLACES.items():
        if where is None:
            found.append("not run")
            continue
        item, row, column = where
        column = dict(zip((f"K = {K}" for K in reproduce.COLUMNS["imagenet"]),
                          (f"K = {K}" for K in reproduce.COLUMNS[scale]))).get(column, column)
        names = names_of(scale)
        first = next(key for key in names if (key[0], key[2]) == (item, column)) if (item, row, column) in names else None
        if first is None:
            found.append("—")
        elif first[1] != row and names[first] == names[item, row, column]:
            found.append("n/a")
        else:
            paths = [ROOT / f"results/{place}/runs/{name}.json" for name in names[item, row, column]]
            found.append(report.show([json.loads(path.read_text())["top1"] for path in paths if path.exists()]))
    return found


def fill(text):
    """The README's `text` with what was run."""
    def line(match):
        return " | ".join([match[1], *ours(match[2], shlex.split(match[3]))]) + " |"
    row = r"^(\| [^|\n]+ \| `python (moco_v2|simclr|instdisc|linear_probe)\.py IMAGENET ([^`\n]*)` \| [^|\n]+?) \|.*$"
    text = re.sub(row, line, text, flags=re.MULTILINE)

    def table(match):
        path = ROOT / match[1]
        lines = path.read_text().splitlines() if path.exists() else ["| not run |"]
        return "\n".join([f"<!-- {match[1]} -->", *(x for x in lines if x.startswith("|")), "<!-- end -->"])
    return re.sub(r"<!-- (results/\S+) -->\n.*?<!-- end -->", table, text, flags=re.DOTALL)


if __name__ == "__main__":
    (ROOT / "README.md").write_text(fill((ROOT / "README.md").read_text()))
