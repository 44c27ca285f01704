"""The paper's checkable claims, and the rule that gives each a verdict.

Not all of the rule was fixed before the runs that it judges. As the git history shows, pairing and
the kinds `large` and `not above` were added after the runs of Tables 1 and 3 on the textures.

A claim is a difference of cells of a table. It is judged by the t-interval of this difference, of
95 %, or of 90 % for `zero` and `not above`:

    positive    shown above zero, contradicted below it
    large       shown above COLLAPSE points, contradicted below that
    zero        shown within MARGIN points of zero, contradicted outside of that
    not above   shown below MARGIN points, contradicted above that

and not resolved otherwise. The standard deviation is pooled over all runs of the item that have two
seeds or more; without these, nothing is resolved. Cells of the same runs (three probes of one
encoder) are compared in pairs. There is no correction for the number of claims: of twenty claims
that do not hold, one is shown by chance.
"""

import math
import statistics

from scipy import stats

from reproduce import plan

MARGIN = 1.                     # points of top-1 that count as no difference
COLLAPSE = 10.                  # points of top-1 whose loss counts as a collapse
# Where the interval must lie; a claim is contradicted if it lies outside.
RANGES = {"positive": (0., math.inf), "large": (COLLAPSE, math.inf), "zero": (-MARGIN, MARGIN),
          "not above": (-math.inf, MARGIN)}
# claim, section, kind, item, and cells ("row" or "row | column"), of which the second is subtracted
# from the first, and the fourth from the third
CLAIMS = (
    ("a projection head helps", "Sec. 3, Table 1 (a)", "positive", "table1",
     "MoCo v2", "(a) without head"),
    ("a fixed random head beats none", "Sec. 3, Table 1 (b)", "positive", "table1",
     "(b) fixed head", "(a) without head"),
    ("a deeper head does not help", "Sec. 3, Table 1 (c)", "not above", "table1",
     "(c) more hidden layers", "MoCo v2"),
    ("a narrow head loses less than none", "Sec. 3, Table 1 (d)", "positive", "table1",
     "(d) narrow", "(a) without head"),
    ("a probe of h beats one of hidden", "Sec. 3", "positive", "section3",
     "MoCo v2, h", "MoCo v2, hidden"),
    ("a probe of h beats one of z", "Sec. 3", "positive", "section3",
     "MoCo v2, h", "MoCo v2, z"),
    ("extreme crops hurt supervised training more than MoCo", "Sec. 4, Table 2 (a)", "positive",
     "table2a",
     "20 % to 100 % | supervised", "2 % to 10 % | supervised", "2 % to 10 %", "20 % to 100 %"),
    ("jitter helps MoCo", "Sec. 4, Table 2 (b)", "positive", "table2b",
     "1", "jitter 1/8"),
    ("jitter hurts supervised training", "Sec. 4, Table 2 (b)", "positive", "table2b",
     "jitter 1/8 | supervised", "1 | supervised"),
    ("MoCo v2 is flat in K", "Sec. 5, Table 3", "zero", "table3",
     "MoCo v2 | largest K", "MoCo v2 | smallest K"),
    ("MoCo falls with few negatives", "Sec. 5, Fig. 4", "positive", "figure4",
     "MoCo | largest K", "MoCo | smallest K"),
    ("InstDisc falls with few negatives", "Sec. 5, Fig. 4", "positive", "figure4",
     "InstDisc | largest K", "InstDisc | smallest K"),
    ("SimCLR falls below the middle of the ladder", "Sec. 5, Fig. 4", "positive", "figure4",
     "SimCLR | middle K", "SimCLR | smallest K"),
    ("SimCLR does not fall above the middle", "Sec. 5, Fig. 4", "zero", "figure4",
     "SimCLR | largest K", "SimCLR | middle K"),
    ("hard negatives change nothing", "Sec. 5, Fig. 4", "zero", "figure4",
     "MoCo v2, hard negatives | largest K", "MoCo v2 | largest K"),
    ("the hardest negatives alone collapse", "Sec. 5", "large", "section5",
     "MoCo v2 | largest K", "hardest negatives only | largest K"),
    ("without the head, few negatives hurt", "Sec. 5, Table 3 (a)", "positive", "table3",
     "(a) no MLP | largest K", "(a) no MLP | smallest K"),
    ("with momentum .5, few negatives hurt", "Sec. 5, Table 3 (d)", "positive", "table3",
     "(d) m = .5 | largest K", "(d) m = .5 | smallest K"),
    ("blur matters less than the head", "Sec. 5, Table 3 (b)", "positive", "table3",
     "(b) no blur | smallest K", "(a) no MLP | smallest K"),
    ("the cosine schedule matters less than the head", "Sec. 5, Table 3 (c)", "positive", "table3",
     "(c) no cosine | smallest K", "(a) no MLP | smallest K"),
    ("without a momentum encoder it fails", "Sec. 7", "large", "section7",
     "MoCo v2 | largest K", "m = 0 | largest K"),
)
UNMEASURED = (
    ("h of the encoder with head inverts better than h without", "Sec. 3, Fig. 2",
     "see the picture"),
    ("h inverts better than hidden, the paper's z", "Sec. 3, Fig. 2", "see the picture"),
    ("strong augmentation merges the classes", "Sec. 4, Fig. 3", "see the picture"),
    ("a shallow MLP does not help supervised learning", "Secs. 1, 3",
     "not run: asserted without a measurement"),
    ("adaptive sampling of negatives is no better", "Sec. 5", "not run: not defined in the paper"),
    ("detection on VOC is the same at both K", "Sec. 5", "not run: needs detectron2"),
)


def difference(values):
    """The second subtracted from the first, the fourth from the third and so on."""
    return sum(values[::2]) - sum(values[1::2])


def pooled(samples):
    """Standard deviation over all samples (lists), each about its mean, and degrees of freedom."""
    residuals = [x - statistics.mean(values) for values in samples for x in values]
    df = len(residuals) - len(samples)
    return math.hypot(*residuals) / math.sqrt(max(df, 1)), df


def judge(kind, samples, sd, df):
    """`(difference, half width, verdict)` of samples: lists of percent, or None.

    The verdict is n/a if a sample is None.
    """
    if not all(samples):
        return None, None, "n/a" if None in samples else "not run"
    value = difference([statistics.mean(values) for values in samples])
    if not df:
        return value, None, "not resolved (one seed)"
    bottom, top = RANGES[kind]
    t = stats.t.ppf(.975 if top == math.inf else .95, df)       # 95 or 90 %, see above
    half = t * sd * math.sqrt(sum(1 / len(values) for values in samples))
    verdict = "not resolved"
    if bottom < value - half and value + half < top:
        verdict = "shown"
    elif value + half < bottom or value - half > top:
        verdict = "contradicted"
    return value, half, verdict


def key_of(item, cell, scale):
    """The key (item, row, column) of "row" or "row | column" in CLAIMS."""
    row, _, column = cell.partition(" | ")
    columns = plan.columns(item, scale)
    index = {"largest K": -1, "middle K": len(columns) // 2, "supervised": -1}.get(column, 0)
    return item, row, columns[index]


def judge_cells(kind, keys, found, cells):
    """`judge` for cells of the results `found`, with the standard deviation of their item."""
    item, samples = keys[0][0], [found[key] for key in keys]
    runs = {cells[key].name: values for key, values in found.items() if key[0] == item and values}
    if item == "section3":                                      # probes of the same runs: in pairs
        samples = [[difference(pair) for pair in zip(*samples)]]
        runs = {item: samples[0]}
    return judge(kind, samples, *pooled(runs.values()))


def table(found, scale):
    """Lines of markdown: all claims with the paper's difference, ours and the verdict.

    `found` as `report.results` returns it.
    """
    lines = ["| claim | section | the paper | ours | verdict |", "|---|---|---|---|---|"]
    cells = plan.cells(scale)
    for claim, section, kind, item, *names in CLAIMS:
        keys = [key_of(item, name, scale) for name in names]
        value, half, verdict = judge_cells(kind, keys, found, cells)
        ours, paper = "", "no number"
        if value is not None:
            width = "" if half is None else f" ± {half:.2f}"
            ours = f"{value:+.2f}{width}, n = {'/'.join(str(len(found[key])) for key in keys)}"
        numbers = [cells[key].paper for key in keys]
        if all(isinstance(number, float) for number in numbers):
            paper = f"{difference(numbers):+.1f}"
        lines.append(f"| {claim} | {section} | {paper} | {ours} | {verdict} |")
    for claim, section, remark in UNMEASURED:
        lines.append(f"| {claim} | {section} | | | {remark} |")
    return lines
