"""What was run, as tables beside the paper's numbers, and as Figure 4."""

import math
import shlex
import statistics

COLOURS = {"MoCo v2": "#0072B2", "MoCo v2, hard negatives": "#56B4E9", "MoCo": "#E69F00", "InstDisc": "#D55E00",
           "SimCLR": "#009E73"}


def show(values, against=None):
    if not values:
        return "not run"
    text = f"{statistics.mean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "")
    if against and against is not values:
        text += f" ({statistics.mean(values) - statistics.mean(against):+.2f})"
    return f"{text}, n = {len(values)}"


def markdown(item, table, names, found, missing, quick, labels):
    """The item as a table: mean ± sd over seeds, the difference to the first row, and the paper's ImageNet number.

    `table` are its cells, `names` the runs of each, `found` their top-1, `missing` the commands (lists of words) of those
    that were not run, `labels` the paper's name for a column that is another K here.
    """
    rows, columns = ([*dict.fromkeys(key[i] for key in table)] for i in (0, 1))
    theirs = {c: f" | the paper's{f', {labels[c]}' if labels.get(c, c) != c else ''}" for c in columns}
    head = [f"{c}, ours" + (theirs[c] if any(table[r, c][2] for r in rows) else "") for c in columns]
    simclr = " SimCLR's points are of N = K / 2 images, at least 16, which have 2 (N - 1) negatives."
    lines = [f"# {item}", "", "Top-1 in percent (supervised rows: their own test accuracy; else the "
             f"{'quick' if quick else 'linear'} probe's); in brackets the difference to the first row. The "
             "paper's numbers are for ResNet-50 on ImageNet." + simclr * (item == "figure4"), "", f"| | {' | '.join(head)} |",
             "|---" * (1 + sum(h.count("|") + 1 for h in head)) + "|"]
    for row in rows:
        line = [row]
        for column, title in zip(columns, head):
            key, first, paper = (item, row, column), (item, rows[0], column), table[row, column][2]
            same = row != rows[0] and names[key] == names[first] and item != "section3"
            line.append("n/a (the baseline's setting)" if same else
                        show(found[key], found[first] if item != "figure4" else None))
            if "|" in title:
                line.append("" if paper is None else f"{paper}")
        lines.append(f"| {' | '.join(line)} |")
    return "\n".join(lines + [""] + [f"Not run: `{shlex.join(words)}`" + "\n" for words in missing]) + "\n"


def figure4(path, place, found, columns, paper=None):
    """Accuracy over K, a line a method, bars of one standard deviation, labels at their ends.

    `columns` are Table 3's K, `paper` what the paper states for MoCo v2 there; None at another scale than its own.
    """
    from matplotlib.figure import Figure                        # here: it takes a while to import
    figure = Figure(figsize=(8, 5), layout="constrained")
    axis, curves = figure.subplots(), {}
    for (item, what, column), values in found.items():
        if item == "figure4" and values:
            K = int(column.split()[-1])
            K = 2 * (max(16, K // 2) - 1) if what == "SimCLR" else K                        # K = 2 (N - 1)
            curves.setdefault(what, []).append((K, statistics.mean(values), statistics.stdev(values) if len(values) > 1 else 0))
    for i, (what, points) in enumerate(curves.items()):
        K, mean, spread = zip(*points)
        aside = [k * 1.03 ** (i - len(curves) // 2) for k in K]                             # or the bars would hide each other
        axis.errorbar(aside, mean, spread, marker="o", color=COLOURS[what], capsize=3)
    at, (low, high), ends = -math.inf, axis.get_ylim(), [K for points in curves.values() for K, _, _ in points] or columns
    for y, what in sorted((points[-1][1], what) for what, points in curves.items()):
        at = max(y, at + .05 * (high - low))                    # the lowest label first, each a line above the one below
        axis.text(max(ends) * 1.3, at, what, color=COLOURS[what], va="center")
    for K in columns:
        axis.axvline(K, color="gray", linestyle=":", linewidth=1)
    if paper:
        axis.plot(columns, paper, "o", color=COLOURS["MoCo v2"], fillstyle="none", markersize=9)
        axis.annotate("the paper, Table 3", (columns[0], paper[0]), (6, 8), textcoords="offset points", fontsize=8)
    axis.set_xscale("log", base=2)
    axis.set_xlim(min(ends) / 1.5, max(ends) * (max(ends) / min(ends)) ** .35)
    axis.set_xticks(sorted({K for K in ends if K & (K - 1) == 0} or columns), minor=False)
    axis.get_xaxis().set_major_formatter(lambda K, _: f"{K:.0f}")
    axis.set(xlabel="K negatives (dotted: Table 3's columns)", ylabel="top-1, %", title=f"Figure 4, {place}")
    axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110)
