"""The paper's checkable claims, and the rule that gives each a verdict.

Not all of the rule was fixed before the runs that it judges. As the git history shows, pairing and
the kinds `large` and `not above` were added after the runs of Tables 1 and 3 on the textures.

A claim is the sum of some cells of a table minus the sum of others; it is judged by the t-interval
of this difference, of 95 %, or of 90 % for `zero` and `not above`:

    positive    shown above zero, contradicted below it
    large       shown above COLLAPSE points, contradicted below that
    zero        shown within MARGIN points of zero, contradicted outside of that
    not above   shown below MARGIN points, contradicted above that

and not resolved otherwise. The standard deviation is pooled over all runs of the item that have two
seeds or more; without these, nothing is resolved. Cells of the same runs (three probes of one
encoder) and measures of the same images are compared in pairs. Pictures are of one pair of
encoders: their n counts images, not seeds. There is no correction for the number of claims: of
twenty claims that do not hold, one is shown by chance.
"""

import json
import math
import statistics

from scipy import stats

from reproduce import plan

MARGIN = 1.                     # points of top-1 that count as no difference
COLLAPSE = 10.                  # points of top-1 whose loss counts as a collapse
NOTE = ("Each verdict follows from the rule in `reproduce/claims.py`. Not all of this rule was "
        "fixed before the runs: pairing and the kinds `large` and `not above` were added after the "
        "runs of Tables 1 and 3 on the textures.")
# claim, section, kind, item, cells, cells that are subtracted: "row" or "row | column"
CLAIMS = (
    ("a projection head helps", "Sec. 3, Table 1 (a)", "positive", "table1",
     ["MoCo v2"], ["(a) without head"]),
    ("a fixed random head beats none", "Sec. 3, Table 1 (b)", "positive", "table1",
     ["(b) fixed head"], ["(a) without head"]),
    ("a deeper head does not help", "Sec. 3, Table 1 (c)", "not above", "table1",
     ["(c) more hidden layers"], ["MoCo v2"]),
    ("a narrow head loses less than none", "Sec. 3, Table 1 (d)", "positive", "table1",
     ["(d) narrow"], ["(a) without head"]),
    ("a probe of h beats one of hidden", "Sec. 3", "positive", "section3", ["h"], ["hidden"]),
    ("a probe of h beats one of z", "Sec. 3", "positive", "section3", ["h"], ["z"]),
    ("extreme crops hurt supervised training more than MoCo", "Sec. 4, Table 2 (a)", "positive",
     "table2a", ["20 % to 100 % | supervised", "2 % to 10 %"],
     ["2 % to 10 % | supervised", "20 % to 100 %"]),
    ("jitter helps MoCo", "Sec. 4, Table 2 (b)", "positive", "table2b", ["1"], ["jitter 1/8"]),
    ("jitter hurts supervised training", "Sec. 4, Table 2 (b)", "positive", "table2b",
     ["jitter 1/8 | supervised"], ["1 | supervised"]),
    ("MoCo v2 is flat in K", "Sec. 5, Table 3", "zero", "table3",
     ["MoCo v2 | largest K"], ["MoCo v2 | smallest K"]),
    ("MoCo falls with few negatives", "Sec. 5, Fig. 4", "positive", "figure4",
     ["MoCo | largest K"], ["MoCo | smallest K"]),
    ("InstDisc falls with few negatives", "Sec. 5, Fig. 4", "positive", "figure4",
     ["InstDisc | largest K"], ["InstDisc | smallest K"]),
    ("SimCLR falls below the middle of the ladder", "Sec. 5, Fig. 4", "positive", "figure4",
     ["SimCLR | middle K"], ["SimCLR | smallest K"]),
    ("SimCLR does not fall above the middle", "Sec. 5, Fig. 4", "zero", "figure4",
     ["SimCLR | largest K"], ["SimCLR | middle K"]),
    ("hard negatives change nothing", "Sec. 5, Fig. 4", "zero", "figure4",
     ["MoCo v2, hard negatives | largest K"], ["MoCo v2 | largest K"]),
    ("the hardest negatives alone collapse", "Sec. 5", "large", "section5",
     ["MoCo v2 | largest K"], ["hardest negatives only | largest K"]),
    ("without the head, few negatives hurt", "Sec. 5, Table 3 (a)", "positive", "table3",
     ["(a) no MLP | largest K"], ["(a) no MLP | smallest K"]),
    ("with momentum .5, few negatives hurt", "Sec. 5, Table 3 (d)", "positive", "table3",
     ["(d) m = .5 | largest K"], ["(d) m = .5 | smallest K"]),
    ("blur matters less than the head", "Sec. 5, Table 3 (b)", "positive", "table3",
     ["(b) no blur | smallest K"], ["(a) no MLP | smallest K"]),
    ("the cosine schedule matters less than the head", "Sec. 5, Table 3 (c)", "positive", "table3",
     ["(c) no cosine | smallest K"], ["(a) no MLP | smallest K"]),
    ("without a momentum encoder it fails", "Sec. 7", "large", "section7",
     ["MoCo v2 | largest K"], ["m = 0 | largest K"]),
)
# claim, section, file, measure, and the panels of which the first should have more
PICTURED = (
    ("h of the encoder with head inverts better than h without", "Sec. 3, Fig. 2", "figure2.json",
     "structure", 1, 0),
    ("h inverts better than hidden, the paper's z", "Sec. 3, Fig. 2", "figure2.json", "structure",
     1, 2),
    ("strong augmentation merges the classes", "Sec. 4, Fig. 3", "figure3.json", "agreement", 0, 2),
)
NOT_RUN = (
    ("a shallow MLP does not help supervised learning", "Secs. 1, 3",
     "asserted without a measurement"),
    ("adaptive sampling of negatives is no better", "Sec. 5", "not defined in the paper"),
    ("detection on VOC is the same at both K", "Sec. 5", "needs detectron2"),
)


def pooled(samples):
    """Standard deviation over all samples (lists), each about its mean, and degrees of freedom."""
    squares = df = 0
    for values in filter(None, samples):
        squares += sum((x - statistics.mean(values)) ** 2 for x in values)
        df += len(values) - 1
    return (math.sqrt(squares / df), df) if df else (None, 0)


def judge(kind, signs, samples, sd, df):
    """`(difference, half width, verdict)` of samples (lists of percent) with signs +1 and -1."""
    if not samples or not all(samples):
        return None, None, "not run"
    value = sum(sign * statistics.mean(values) for sign, values in zip(signs, samples))
    if not df:
        return value, None, "not resolved (one seed)"
    t = stats.t.ppf(.975 if kind in ("positive", "large") else .95, df)
    half = t * sd * math.sqrt(sum(1 / len(values) for values in samples))
    low, high = value - half, value + half
    shown, contradicted = {
        "positive": (low > 0, high < 0),
        "large": (low > COLLAPSE, high < COLLAPSE),
        "zero": (-MARGIN < low and high < MARGIN, low > MARGIN or high < -MARGIN),
        "not above": (high < MARGIN, low > MARGIN)}[kind]
    if shown:
        return value, half, "shown"
    return value, half, "contradicted" if contradicted else "not resolved"


def paired(signs, samples):
    """The arguments of `judge` for samples of the same runs or images: one sample of sums."""
    sums = [sum(sign * x for sign, x in zip(signs, each)) for each in zip(*samples)]
    return (1,), [sums], *pooled([sums])


def key_of(item, cell, scale):
    """The key (item, row, column) of "row" or "row | column" in CLAIMS."""
    row, _, column = cell.partition(" | ")
    columns = plan.columns(item, scale)
    index = {"largest K": -1, "middle K": len(columns) // 2, "supervised": -1}.get(column, 0)
    return item, row, columns[index]


def judge_cells(kind, signs, keys, found, names):
    """`judge` for cells of the results `found`, with the standard deviation that applies to them.

    The verdict is n/a if a cell is the same run as the first row of its table.
    """
    item, samples = keys[0][0], [found[key] for key in keys]
    if len({names[key] for key in keys}) == 1:
        return judge(kind, *paired(signs, samples))
    for _, row, column in keys:
        first = next(iter(plan.ROWS[item]))
        if row != first and names[item, row, column] == names[item, first, column]:
            return None, None, "n/a"
    once = {names[key]: values for key, values in found.items() if key[0] == item}
    return judge(kind, signs, samples, *pooled(once.values()))


def compare_pictures(path, measure, more, less):
    """`(means and n as text, verdict)` for two panels of a picture, whose measures `path` holds."""
    if not path.exists():
        return "not run", "not run"
    saved = json.loads(path.read_text())
    panels = saved["panels"] if "panels" in saved else saved["rows"][0]["panels"]
    pair = [panels[i][measure] for i in (more, less)]
    if measure == "agreement":                                  # in the features, in the plane
        pair = [values[:1] for values in pair]
    a, b = map(statistics.mean, pair)
    verdict = judge("positive", *paired((1, -1), pair))[2].replace("one seed", "one picture")
    return f"{measure} {a:.2f} against {b:.2f}, n = {len(pair[0])}", verdict


def table(found, scale, folder):
    """Lines of markdown: all claims with the paper's difference, ours and the verdict.

    `found` {(item, row, column): [top-1]}; `folder` has the measures of Figures 2 and 3.
    """
    lines = ["| claim | section | the paper | ours | verdict |", "|---|---|---|---|---|"]
    names = {key: name for key, (name, *_) in plan.names(scale).items()}
    for claim, section, kind, item, more, less in CLAIMS:
        keys = [key_of(item, cell, scale) for cell in more + less]
        signs = [1] * len(more) + [-1] * len(less)
        value, half, verdict = judge_cells(kind, signs, keys, found, names)
        ours = verdict
        if value is not None:
            ours = f"{value:+.2f}" + (f" ± {half:.2f}" if half is not None else "")
            ours += f", n = {'/'.join(str(len(found[key])) for key in keys)}"
        numbers = [plan.cells(item, scale)[key[1:]].paper for key in keys]
        paper = "no number"
        if all(isinstance(number, float) for number in numbers):
            paper = f"{sum(sign * number for sign, number in zip(signs, numbers)):+.1f}"
        lines.append(f"| {claim} | {section} | {paper} | {ours} | {verdict} |")
    for claim, section, name, *panels in PICTURED:
        ours, verdict = compare_pictures(folder / name, *panels)
        lines.append(f"| {claim} | {section} | a picture | {ours} | {verdict} |")
    for claim, section, why in NOT_RUN:
        lines.append(f"| {claim} | {section} | | not run: {why} | not run |")
    return lines
