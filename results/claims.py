"""Each checkable sentence of the paper as one line, with a verdict by a rule that is fixed here, before any run.

A claim is a sum of cells with signs, such as MoCo v2 less MoCo v2 without head; "less than" is a positive difference of two
differences. By the t-interval of the sum, of 95 % or, for the two kinds with a margin, of 90 %:

    positive    shown above zero, contradicted below it
    large       shown above COLLAPSE points, contradicted below that
    zero        shown within MARGIN points of zero, contradicted outside of that
    not above   shown below MARGIN points, contradicted above that

and else not resolved. The standard deviation is pooled over all runs of the item that have two seeds or more, collapsed or
not; without one nothing is resolved. Cells of the same runs (three probes of one encoder) and measures of the same images
are compared pair by pair. Pictures are of one pair of encoders: their n is images, not seeds. Nothing is corrected for the
number of claims: of twenty that are not so, one is shown by chance.
"""

import json
import math
import statistics

from scipy import stats

MARGIN = 1.                                                     # points of top-1 that count as no difference
COLLAPSE = 10.                                                  # points of top-1 whose loss counts as a collapse
SMALL, LARGE, MIDDLE = 0, -1, "middle"                          # columns of Table 3, or points of Figure 4's ladder
# the claim, where it stands, the paper's numbers, kind, and the cells: (sign, item, row, column)
CLAIMS = (
    ("a projection head helps", "Sec. 3, Table 1 (a)", "64.4 against 59.2", "positive",
     (+1, "table1", "MoCo v2"), (-1, "table1", "(a) without head")),
    ("a fixed random head beats none", "Sec. 3, Table 1 (b)", "62.9 against 59.2", "positive",
     (+1, "table1", "(b) fixed head"), (-1, "table1", "(a) without head")),
    ("a deeper head does not help", "Sec. 3, Table 1 (c)", "63.9 against 64.4", "not above",
     (+1, "table1", "(c) more hidden layers"), (-1, "table1", "MoCo v2")),
    ("a narrow head loses less than none", "Sec. 3, Table 1 (d)", "-2.2 against -5.2", "positive",
     (+1, "table1", "(d) narrow"), (-1, "table1", "(a) without head")),
    ("a probe on h beats one on hidden", "Sec. 3", "said, no number", "positive", (+1, "section3", "h"),
     (-1, "section3", "hidden")),
    ("a probe on h beats one on z", "Sec. 3", "said, no number", "positive", (+1, "section3", "h"), (-1, "section3", "z")),
    ("extreme crops hurt supervised more than MoCo", "Sec. 4, Table 2a", "-23.5 against -17.3", "positive",
     (+1, "table2a", "20 % to 100 %", 1), (-1, "table2a", "2 % to 10 %", 1),
     (-1, "table2a", "20 % to 100 %", 0), (+1, "table2a", "2 % to 10 %", 0)),
    ("jitter helps MoCo", "Sec. 4, Table 2b", "64.3 against 63.1", "positive",
     (+1, "table2b", "1", 0), (-1, "table2b", "jitter 1/8", 0)),
    ("jitter hurts supervised", "Sec. 4, Table 2b", "74.6 against 75.8", "positive",
     (+1, "table2b", "jitter 1/8", 1), (-1, "table2b", "1", 1)),
    ("MoCo v2 is flat in K", "Sec. 5, Table 3", "67.3 and 67.5", "zero", (+1, "table3", "MoCo v2", LARGE),
     (-1, "table3", "MoCo v2", SMALL)),
    ("MoCo falls with few negatives", "Sec. 5, Fig. 4", "a curve", "positive", (+1, "figure4", "MoCo", LARGE),
     (-1, "figure4", "MoCo", SMALL)),
    ("InstDisc falls with few negatives", "Sec. 5, Fig. 4", "a curve", "positive", (+1, "figure4", "InstDisc", LARGE),
     (-1, "figure4", "InstDisc", SMALL)),
    ("SimCLR falls at the small end", "Sec. 5, Fig. 4", "a curve", "positive", (+1, "figure4", "SimCLR", MIDDLE),
     (-1, "figure4", "SimCLR", SMALL)),
    ("and not above", "Sec. 5, Fig. 4", "a curve", "zero", (+1, "figure4", "SimCLR", LARGE),
     (-1, "figure4", "SimCLR", MIDDLE)),
    ("hard negatives change nothing", "Sec. 5, Fig. 4", "a curve", "zero",
     (+1, "figure4", "MoCo v2, hard negatives", LARGE), (-1, "figure4", "MoCo v2", LARGE)),
    ("the hardest alone collapse", "Sec. 5", "said, no number", "large",
     (+1, "section5", "MoCo v2", LARGE), (-1, "section5", "hardest negatives only", LARGE)),
    ("without the head few negatives hurt", "Sec. 5, Table 3 (a)", "61.7 against 63.6", "positive",
     (+1, "table3", "(a) no MLP", LARGE), (-1, "table3", "(a) no MLP", SMALL)),
    ("with momentum .5 few negatives hurt", "Sec. 5, Table 3 (d)", "59.8 against 64.5", "positive",
     (+1, "table3", "(d) m = .5", LARGE), (-1, "table3", "(d) m = .5", SMALL)),
    ("blur matters less than the head", "Sec. 5, Table 3 (b)", "65.5 against 61.7", "positive",
     (+1, "table3", "(b) no blur", SMALL), (-1, "table3", "(a) no MLP", SMALL)),
    ("the cosine matters less than the head", "Sec. 5, Table 3 (c)", "67.2 against 61.7", "positive",
     (+1, "table3", "(c) no cosine", SMALL), (-1, "table3", "(a) no MLP", SMALL)),
    ("without a momentum encoder it fails", "Sec. 7", "cannot converge", "large",
     (+1, "section7", "MoCo v2", LARGE), (-1, "section7", "m = 0", LARGE)),
)
PICTURED = (  # the claim, where, file, measure, and which of its columns should be above which
    ("h of the encoder with head inverts better than h without", "Sec. 3, Fig. 2", "figure2.json", "structure", 1, 0),
    ("h inverts better than hidden, the paper's z", "Sec. 3, Fig. 2", "figure2.json", "structure", 1, 2),
    ("strong augmentation merges the classes", "Sec. 4, Fig. 3", "figure3.json", "agreement", 0, 2),
)
NOT_RUN = (
    ("a shallow MLP does not help supervised learning", "Secs. 1, 3", "asserted without a measurement"),
    ("adaptive sampling of negatives is no better", "Sec. 5", "not defined in the paper"),
    ("detection on VOC is the same at both K", "Sec. 5", "needs detectron2"),
)


def pooled(samples):
    """Standard deviation over all of `samples` (lists), each about its own mean, and its degrees of freedom."""
    df = sum(len(v) - 1 for v in samples if v)
    squares = sum(sum((x - statistics.mean(v)) ** 2 for x in v) for v in samples if v)
    return (math.sqrt(squares / df), df) if df else (None, 0)


def judge(kind, signs, samples, sd, df):
    """`(sum, half width, verdict)` of the cells' samples (lists of percent) with their signs."""
    if not samples or not all(samples):
        return None, None, "not run"
    value = sum(sign * statistics.mean(v) for sign, v in zip(signs, samples))
    if not df:
        return value, None, "not resolved (one seed)"
    half = stats.t.ppf(.975 if kind in ("positive", "large") else .95, df) * sd * math.sqrt(sum(1 / len(v) for v in samples))
    low, high = value - half, value + half
    shown, contradicted = {"positive": (low > 0, high < 0), "large": (low > COLLAPSE, high < COLLAPSE),
                           "zero": (-MARGIN < low and high < MARGIN, low > MARGIN or high < -MARGIN),
                           "not above": (high < MARGIN, low > MARGIN)}[kind]
    return value, half, "shown" if shown else "contradicted" if contradicted else "not resolved"


def paired(signs, samples):
    """The arguments of `judge` for samples of the same runs or images: their sum, one by one, is one sample."""
    one = [sum(sign * x for sign, x in zip(signs, each)) for each in zip(*samples)]
    return (1,), [one], *pooled([one])


def table(found, names, out):
    """Markdown of all claims: `found` {(item, row, column): [top-1]}, `names` of their runs, `out` with pictures' JSON."""
    lines = ["| claim | where | the paper | ours | verdict |", "|---|---|---|---|---|"]
    for claim, where, paper, kind, *terms in CLAIMS:
        keys, item = [], terms[0][1]
        for _, _, row, *column in terms:
            columns = [c for i, r, c in found if (i, r) == (item, row)]
            at = column[0] if column else 0
            keys.append((item, row, columns[len(columns) // 2 if at == MIDDLE else at]))
        signs, samples = [t[0] for t in terms], [found[key] for key in keys]
        first = [next(k for k in names if k[0] == item and k[2] == column) for _, _, column in keys]
        if len({tuple(names[key]) for key in keys}) == 1:
            value, half, verdict = judge(kind, *paired(signs, samples))
        elif any(key != base and names[key] == names[base] for key, base in zip(keys, first)):
            value, half, verdict = None, None, "n/a"            # a row that changes nothing at this scale
        else:
            runs = {tuple(names[key]): v for key, v in found.items() if key[0] == item}
            value, half, verdict = judge(kind, signs, samples, *pooled(list(runs.values())))
        ours = verdict if value is None else f"{value:+.2f}" + (f" ± {half:.2f}" if half is not None else "") + \
            f", n = {'/'.join(str(len(v)) for v in samples)}"
        lines.append(f"| {claim} | {where} | {paper} | {ours} | {verdict} |")
    for claim, where, name, measure, more, less in PICTURED:
        ours, verdict = "not run", "not run"
        if (out / name).exists():
            saved = json.loads((out / name).read_text())
            panels = saved["panels"] if "panels" in saved else saved["rows"][0]["panels"]
            a, b = ([panels[i][measure][0]] if measure == "agreement" else panels[i][measure] for i in (more, less))
            ours = f"{measure} {statistics.mean(a):.2f} against {statistics.mean(b):.2f}, n = {len(a)}"
            verdict = judge("positive", *paired((1, -1), (a, b)))[2].replace("one seed", "one picture")
        lines.append(f"| {claim} | {where} | a picture | {ours} | {verdict} |")
    lines += [f"| {claim} | {where} | | not run: {why} | not run |" for claim, where, why in NOT_RUN]
    return "\n".join(lines) + "\n"
