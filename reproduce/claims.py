"""The checkable claims: the paper's, and ours on Section 3, detection and the length of training.

Each claim is a statement about differences of cells of the paper's tables. `reproduce/verdicts.py`
decides it; the kinds of claims are

    positive      the difference is above 0
    not above     the difference is at most MARGIN points
    equivalent    the difference is within MARGIN points of 0, for every K
    collapse      half of the gain over the untrained network, or more, is lost

MARGIN is 1 point of top-1 (of AP for detection): a smaller difference would not change what a
reader does. It is about three times the standard deviation of a row of Table 1 on CIFAR-10 over
seeds. A verdict needs two seeds in every cell; verdicts.py says how often it is wrong. The last
column of the table says which verdicts remain after Holm's correction, which is made separately for
the paper's claims and for ours. Probes of one encoder are compared in pairs.

These rules and claims were committed before the runs that they judge: those with seeds from 10 on.
Runs with other seeds are not used for verdicts. The number of seeds is fixed, too: on the textures
three in every cell (10, 11, 12). At the scale `cifar10-laptop`, cells of Table 2, Figure 4,
supervised training and 100 epochs have two, all others three. Until all have been run, a claim has
no verdict. docs/choices.md lists all changes of the rules.
"""

import collections

from reproduce import plan, verdicts

FIRST_SEED = 10                 # runs with lower seeds are older than the rules, or exploratory
N_SEEDS = {"cifar10-laptop": 3, "textures": 3}      # elsewhere: all seeds, two or more
# Cells that belong only to these items have two seeds.
TWO_SEEDS = {"cifar10-laptop": ("table2a", "table2b", "supervised", "figure4")}
UNTRAINED = "section3", "untrained, h", "class"
# `cells` are "row" or "row | column" of the item; the second is subtracted from the first, the
# fourth from the third. "A | every K" and "B | same K" compare A with B at each K in turn; "every K
# of Table 3 on" begins with the smaller K of Table 3. For `collapse`: the baseline, and the cell
# that is said to collapse.
Claim = collections.namedtuple("Claim", "text section kind item cells")
PAPER = [Claim(*fields) for fields in (
    ("a projection head helps", "Sec. 3, Table 1 (a)", "positive", "table1",
     ("MoCo v2", "(a) without head")),
    ("a fixed random head beats none", "Sec. 3, Table 1 (b)", "positive", "table1",
     ("(b) fixed head", "(a) without head")),
    ("a deeper head does not help", "Sec. 3, Table 1 (c)", "not above", "table1",
     ("(c) more hidden layers", "MoCo v2")),
    ("a narrow head loses less than none", "Sec. 3, Table 1 (d)", "positive", "table1",
     ("(d) narrow", "(a) without head")),
    ("an MLP head does not help supervised training", "Secs. 1, 3", "not above", "supervised",
     ("MLP head", "one layer")),
    ("extreme crops hurt supervised training more than MoCo", "Sec. 4, Table 2 (a)", "positive",
     "table2a", ("20 % to 100 % | supervised", "2 % to 10 % | supervised",
                 "2 % to 10 %", "20 % to 100 %")),
    ("jitter helps MoCo", "Sec. 4, Table 2 (b)", "positive", "table2b", ("1", "jitter 1/8")),
    ("jitter hurts supervised training", "Sec. 4, Table 2 (b)", "positive", "table2b",
     ("jitter 1/8 | supervised", "1 | supervised")),
    ("MoCo v2 is as good with few negatives", "Sec. 5, Table 3", "equivalent", "table3",
     ("MoCo v2 | smallest K", "MoCo v2 | largest K")),
    ("MoCo v2 is flat from the smaller K of Table 3 upwards", "Sec. 5, Fig. 4", "equivalent",
     "figure4", ("MoCo v2 | every K of Table 3 on", "MoCo v2 | largest K")),
    ("MoCo falls with few negatives", "Sec. 5, Fig. 4", "positive", "figure4",
     ("MoCo | largest K", "MoCo | smallest K")),
    ("InstDisc falls with few negatives", "Sec. 5, Fig. 4", "positive", "figure4",
     ("InstDisc | largest K", "InstDisc | smallest K")),
    ("SimCLR falls below the middle K", "Sec. 5, Fig. 4", "positive", "figure4",
     ("SimCLR | middle K", "SimCLR | smallest K")),
    ("SimCLR is flat above the middle K", "Sec. 5, Fig. 4", "equivalent", "figure4",
     ("SimCLR | middle K", "SimCLR | largest K")),
    ("hard negatives change nothing", "Sec. 5, Fig. 4", "equivalent", "figure4",
     ("MoCo v2, hard negatives | every K", "MoCo v2 | same K")),
    ("training collapses with the hardest tenth only (our sampling), few negatives", "Sec. 5",
     "collapse", "section5",
     ("MoCo v2 | smallest K", "hardest negatives only | smallest K")),
    ("training collapses with the hardest tenth only (our sampling), many negatives", "Sec. 5",
     "collapse", "section5",
     ("MoCo v2 | largest K", "hardest negatives only | largest K")),
    ("random negatives are no better", "Sec. 5", "not above", "section5",
     ("random negatives | every K", "MoCo v2 | same K")),
    ("detection is as good with few negatives", "Sec. 5", "equivalent", "detection",
     ("MoCo v2, few negatives", "MoCo v2, many negatives")),
    ("without the head, few negatives hurt", "Sec. 5, Table 3 (a)", "positive", "table3",
     ("(a) no MLP | largest K", "(a) no MLP | smallest K")),
    ("with momentum .5, few negatives hurt", "Sec. 5, Table 3 (d)", "positive", "table3",
     ("(d) m = .5 | largest K", "(d) m = .5 | smallest K")),
    ("with few negatives, removing the head costs more than removing blur", "Sec. 5, Table 3 (b)",
     "positive", "table3", ("(b) no blur | smallest K", "(a) no MLP | smallest K")),
    ("with few negatives, m = .5 costs more than removing blur", "Sec. 5, Table 3 (b)",
     "positive", "table3", ("(b) no blur | smallest K", "(d) m = .5 | smallest K")),
    ("with few negatives, the head gains more than blur", "Sec. 5, Table 3 (b)", "positive",
     "table3", ("MoCo v2 | smallest K", "(a) no MLP | smallest K",
                "MoCo v2 | smallest K", "with blur | smallest K")),
    ("with few negatives, m above .5 gains more than blur", "Sec. 5, Table 3 (b)", "positive",
     "table3", ("MoCo v2 | smallest K", "(d) m = .5 | smallest K",
                "MoCo v2 | smallest K", "with blur | smallest K")),
    ("with few negatives, removing the head costs more than removing the cosine schedule",
     "Sec. 5, Table 3 (c)", "positive", "table3",
     ("(c) no cosine | smallest K", "(a) no MLP | smallest K")),
    ("with few negatives, m = .5 costs more than removing the cosine schedule",
     "Sec. 5, Table 3 (c)", "positive", "table3",
     ("(c) no cosine | smallest K", "(d) m = .5 | smallest K")),
    ("training fails without a momentum encoder, few negatives", "Sec. 7", "collapse", "section7",
     ("MoCo v2 | smallest K", "m = 0 | smallest K")),
    ("training fails without a momentum encoder, many negatives", "Sec. 7", "collapse", "section7",
     ("MoCo v2 | largest K", "m = 0 | largest K")),
)]
OURS = [Claim(*fields) for fields in (
    ("a probe of h beats one of hidden", "Sec. 3", "positive", "section3",
     ("MoCo v2, h", "MoCo v2, hidden")),
    ("a probe of h beats one of z", "Sec. 3", "positive", "section3",
     ("MoCo v2, h", "MoCo v2, z")),
    ("a probe of h predicts grey better than one of z", "Sec. 3", "positive", "section3",
     ("MoCo v2, h | grey", "MoCo v2, z | grey")),
    ("a probe of h predicts the hue better than one of z", "Sec. 3", "positive", "section3",
     ("MoCo v2, h | hue", "MoCo v2, z | hue")),
    ("a probe of h predicts the rotation better than one of z", "Sec. 3", "positive", "section3",
     ("MoCo v2, h | rotation", "MoCo v2, z | rotation")),
    ("h predicts grey better with a head than without", "Sec. 3", "positive", "section3",
     ("MoCo v2, h | grey", "(a) without head, h | grey")),
    ("h predicts the rotation better with a head than without", "Sec. 3", "positive", "section3",
     ("MoCo v2, h | rotation", "(a) without head, h | rotation")),
    ("pre-training helps detection", "Sec. 5", "positive", "detection",
     ("MoCo v2, many negatives", "untrained")),
    ("the gain from the head grows with training", "Table 1 (a)", "positive", "length",
     ("MoCo v2 | longest", "(a) without head | longest",
      "(a) without head | shortest", "MoCo v2 | shortest")),
)]
# Claims that are not tested: the pictures show n = 1 encoder of each kind, and some images. Claims
# are not added after the runs that would judge them.
UNTESTED = (
    ("a narrow head lowers accuracy", "Sec. 3, Table 1 (d)", "not on the list before the runs"),
    ("a fixed random head is nearly as good as a trained one", "Sec. 3, Table 1 (b)",
     "not on the list before the runs"),
    ("extreme crops hurt MoCo v2", "Sec. 4, Table 2 (a)", "not on the list before the runs"),
    ("h of the encoder with head inverts better than h without", "Sec. 3, Fig. 2",
     "see the picture and its table"),
    ("h inverts better than hidden, the paper's z", "Sec. 3, Fig. 2",
     "see the picture and its table"),
    ("strong augmentation merges the classes", "Sec. 4, Fig. 3", "see the picture"),
    ("without the head, or with momentum .5, few negatives hurt more than with MoCo v2", "Sec. 5",
     "only whether they hurt is tested"),
    ("adaptive sampling of negatives is no better", "Sec. 5", "not defined in the paper"),
)
ENDS = {"smallest K": 0, "shortest": 0, "largest K": -1, "longest": -1}       # of the columns


def keys_of(claim, scale):
    """For each contrast of a claim, the keys (item, row, column) of its cells.

    Empty if this scale has no such cells.
    """
    columns, found = plan.columns(claim.item, scale), []
    currents, small = columns[:1], min(plan.TABLE3_K[scale])
    if any("every K" in cell for cell in claim.cells):
        currents = columns
    if any("every K of Table 3 on" in cell for cell in claim.cells):
        currents = [column for column in columns if int(column.removeprefix("K = ")) >= small]
    for current in currents:
        keys = []
        for cell in claim.cells:
            row, _, column = cell.partition(" | ")
            if column.startswith("every K") or column == "same K":
                column = current
            if column in ENDS:
                column = columns[ENDS[column]]
            if column == "middle K":
                column = columns[len(columns) // 2]
            keys.append((claim.item, row, column or columns[0]))
        if keys[0] != keys[1]:                                  # not a cell against itself
            found.append(keys)
    return found


def family(cell):
    """The name of the cells whose spreads are moderated together."""
    if cell.feature == "detection":
        return cell.question
    return "class" if cell.question == "class" else "prediction"


def n_seeds(name, scale):
    """The number of seeds of a run, fixed in advance; None: all that there are, two or more."""
    keys = [key for key, cell in plan.cells(scale).items()
            if cell.name == name and key[0] not in plan.PICTURES]
    items = TWO_SEEDS.get(scale, ())
    if all(item in items or column == "100 epochs" for item, _, column in keys):
        return 2
    return N_SEEDS.get(scale)


def complete(values, n):
    """The results by which a cell is judged, in the order of seeds; empty if one is missing."""
    return values[:n] if len(values) >= (n or 2) else []


class Judge:
    """The results {key: samples} of a folder of runs, and the priors of their spread."""

    def __init__(self, found, scale):
        self.scale, self.cells = scale, plan.cells(scale)
        self.found = found = {
            key: values and complete(values, n_seeds(self.cells[key].name, scale))
            for key, values in found.items()}
        runs = collections.defaultdict(dict)
        for key, values in found.items():
            cell = self.cells[key]
            if values:
                runs[family(cell)][cell.name, cell.feature, cell.question] = values
        self.priors = {name: verdicts.moderate(list(cells.values()))
                       for name, cells in runs.items()}
        samples = {}
        for claim in (*PAPER, *OURS):
            for keys in keys_of(claim, scale):
                if self.of_one_encoder(keys) and all(found[key] for key in keys):
                    samples[tuple(keys)] = verdicts.paired(*(found[key] for key in keys))
        self.priors["pairs"] = verdicts.moderate(list(samples.values()))

    def of_one_encoder(self, keys):
        return len({self.cells[key].name for key in keys}) == 1

    def verdict(self, claim):
        """The `verdicts.Verdict` on a claim; None if this scale has no such cells."""
        every = keys_of(claim, self.scale)
        samples = {key: self.found[key] for keys in every for key in keys}
        if not every or None in samples.values():
            return None
        if claim.kind == "collapse":
            baseline, cell = samples.values()
            untrained, prior = self.found[UNTRAINED], self.priors.get("class")
            return verdicts.collapse(baseline, untrained, cell, prior)
        if not all(samples.values()):
            return verdicts.judge(claim.kind, [[1., -1.]], [[], []])           # not run
        if self.of_one_encoder(every[0]):
            pairs = verdicts.paired(*samples.values())
            return verdicts.judge(claim.kind, [[1.]], [pairs], self.priors["pairs"])
        contrasts = []
        for keys in every:
            contrast = dict.fromkeys(samples, 0.)
            for key, sign in zip(keys, (1., -1.) * 2):
                contrast[key] += sign                           # a cell may be named twice
            contrasts.append(list(contrast.values()))
        prior = self.priors.get(family(self.cells[every[0][0]]))
        return verdicts.judge(claim.kind, contrasts, list(samples.values()), prior)


def paper_difference(claim, judge):
    """The paper's difference as text."""
    every = keys_of(claim, judge.scale)
    numbers = [judge.cells[key].paper for key in every[0]] if len(every) == 1 else [None]
    if claim.kind == "collapse" or None in numbers:
        return ""
    return f"{sum(numbers[::2]) - sum(numbers[1::2]):+.1f}"


HEADER = ["| claim | section | the paper | ours | n | verdict | after Holm |",
          "|---|---|---|---|---|---|---|"]


def table(found, scale):
    """Lines of markdown: the claims with the paper's difference, ours and the verdict.

    `found` as `report.results` returns it, of the runs with seeds from FIRST_SEED on. Claims whose
    cells are not complete are named below the table; they count for Holm's correction, too.
    """
    judge, lines = Judge(found, scale), []
    for title, claims in (("Claims of the paper", PAPER), ("Our claims", OURS)):
        judged = {claim: judge.verdict(claim) for claim in claims}
        judged = {claim: verdict for claim, verdict in judged.items() if verdict}
        kept = verdicts.holm([verdict.p for verdict in judged.values()])
        rows, missing = [], []
        for (claim, verdict), remains in zip(judged.items(), kept):
            if verdict.estimate is None:
                missing.append(claim.text)
                continue
            text = verdict.verdict + (f"; {verdict.seeds} seeds" if verdict.seeds else "")
            decided = verdict.verdict in ("shown", "contradicted")
            n = "/".join(str(count) for count in verdict.n)
            rows.append(f"| {claim.text} | {claim.section} | {paper_difference(claim, judge)} | "
                        f"{verdict.estimate:+.1f} ± {verdict.half:.1f} | {n} | {text} | "
                        f"{'yes' if remains and decided else ''} |")
        lines += [f"### {title}", "", *(HEADER + rows + [""] if rows else [])]
        if missing:
            lines += [f"Runs are missing for: {'; '.join(missing)}.", ""]
        if claims is PAPER:
            remarks = "; ".join(f"{claim} ({remark})" for claim, _, remark in UNTESTED)
            lines += [f"Not tested: {remarks}.", ""]
    return lines[:-1]
