"""Tables of results with 95 % intervals, and a verdict on the paper's claim. Trains nothing.

Each method has an array of scores, with a row for each start (the pretrained model of a run, if it
had one) and a column for each seed. So two methods are always compared run by run."""
import math
import textwrap

import numpy as np

from data import runs

UNITS = {"accuracy": (100, 1, "points of accuracy"), "nll": (1, 3, "nats per token")}
COMPARISONS = {  # the primary one and the family were named before the runs
    ("ppots_mirror", "mdm"): "primary",
    ("ppots_mirror", "mdm_batch2"): "family",
    ("ppots_mirror", "mdm_steps2"): "family",
    ("sqrtk", "mdm"): "family",
    ("sqrtk", "clipped"): "family",
    ("ppots_mirror", "multi2"): "exploratory",  # like all others
}
Z975 = 1.959964  # the 97.5 % quantile of the normal law


def score(results):
    """The name of the number that compares methods: "accuracy", or "nll" for text."""
    return "accuracy" if "accuracy" in results[0] else "nll"


def wide(results, key):
    """Pivot results: (starts, seeds, {method: array (starts, seeds)}), nan where a run is missing.
    A diverged seed and a null number are the worst: an accuracy of 0, or infinite nats."""
    starts = sorted({line["start"] for line in results})
    seeds = sorted({line["seed"] for line in results})
    columns = {line["method"]: np.full((len(starts), len(seeds)), np.nan) for line in results}
    for line in results:
        number = line.get(key)
        if number is None or math.isnan(number) or line["diverged"] is not None:
            number = 0.0 if key == "accuracy" else math.inf
        columns[line["method"]][starts.index(line["start"]), seeds.index(line["seed"])] = number
    return starts, seeds, columns


def units(x):
    """The sample (n,) in x (starts, seeds): the starts' means if there are several, else seeds."""
    rows = x if len(x) > 1 else x.T  # a mean of one seed is that seed
    return np.array([row[~np.isnan(row)].mean() for row in rows if not np.isnan(row).all()])


def spread(x):
    """(SD, degrees of freedom) in x (starts, seeds), about the starts' means; nan if undefined."""
    rows = [row[~np.isnan(row)] for row in x if not np.isnan(row).all()]
    df = sum(len(row) - 1 for row in rows)
    if df < 1 or np.isinf(x).any():
        return math.nan, df
    return math.sqrt(sum(len(row) * row.var() for row in rows) / df), df


@np.errstate(divide="ignore", invalid="ignore")
def t_test(sample):
    """Of a sample (n,): (mean, low, high) with the 95 % interval, and p, the chance of a mean this
    far from 0 by luck alone. If nothing can be said, low and high are nan, and p is 1."""
    n = len(sample)
    mean = sample.sum() / n if n else math.nan
    if n < 2 or not np.isfinite(sample).all():
        return (mean, math.nan, math.nan), 1.0
    # Student's law as a table. If t = sqrt(n - 1) tan(angle), the angle has a simple density.
    angle = np.linspace(0, np.pi / 2, 20001)
    density = np.cos(angle) ** (n - 2)
    area = np.cumsum(density) - density / 2 - density[0] / 2  # by the trapezoidal rule
    t = math.sqrt(n - 1) * np.tan(angle)
    share = area / area[-1]  # the chance of a number between -t and t
    error = sample.std(ddof=1) / math.sqrt(n)
    half = np.interp(0.95, share, t) * error
    p = 1 - np.interp(abs(mean) / error, t, share) if mean else 1.0
    return (mean, mean - half, mean + half), max(p, 1e-9)  # the table has no more digits


def interval(sample):
    return t_test(sample)[0]


def holm(p_values):
    """Holm's correction for m tests, {name: p}. The smallest p is multiplied by m, the next by
    m - 1, and so on. No result is below an earlier one."""
    adjusted = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p_values, key=p_values.get)):
        largest = max(largest, min(1.0, p_values[name] * (len(p_values) - rank)))
        adjusted[name] = largest
    return adjusted


@np.errstate(divide="ignore", invalid="ignore")
def compare(settings, results, method, other):
    """Method minus other, run by run: (difference, ratio of the SDs, size of the sample, p).
    The difference is in points or nats. It and the ratio are (mean, low, high). The SDs are taken
    on a scale without a ceiling: the logit of the accuracy, or the log of the nll."""
    key = score(results)
    starts, seeds, columns = wide(results, key)
    missing = np.full((len(starts), len(seeds)), np.nan)
    pair = np.array([columns.get(name, missing) for name in (method, other)])
    minus = np.where(np.isinf(pair).all(0), 0.0, pair[0] - pair[1])  # both diverged: no difference
    sample = units(UNITS[key][0] * minus)
    difference, p = t_test(sample)
    if key == "accuracy":
        right = pair * settings["n_test"] + 0.5  # half a problem from 0, and from all
        pair = right / (settings["n_test"] + 1 - right)
    (sd, df), (base, _) = [spread(np.where(np.isnan(minus), np.nan, np.log(x))) for x in pair]
    ratio = (math.nan, math.nan, math.nan)
    if sd > 0 and base > 0:
        # The log of an SD has a variance of nearly 1/(2 df) + 1/(2 df^2) + 1/(3 df^3).
        factor = math.exp(Z975 * math.sqrt(1 / df + 1 / df**2 + 2 / (3 * df**3)))
        ratio = (sd / base, sd / base / factor, sd / base * factor)
    return difference, ratio, len(sample), p


def show(values, places=3, sign=""):
    """(mean, low, high) as text: "mean [low, high]". What is nan is left out."""
    mean, low, high = values
    text = f"{mean:{sign}.{places}f} [{low:.{places}f}, {high:.{places}f}]"
    return "-" if math.isnan(mean) else text.replace(" [nan, nan]", "")


def solved(scores):
    """The number of accuracies (n,) of .9 or more, with Wilson's 95 % interval, as text."""
    n = len(scores)
    count = int((scores >= 0.9).sum())
    centre = (count + Z975**2 / 2) / (1 + Z975**2 / n)
    half = Z975 * math.sqrt(count * (n - count) / n + Z975**2 / 4) / (1 + Z975**2 / n)
    return f"{count} [{abs(centre - half):.0f}, {centre + half:.0f}] of {n}"


def aligned(rows):
    """Rows, dictionaries with the same keys, as a table of text."""
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in rows[0]}
    texts = []
    for row in [dict(zip(widths, widths)), *rows]:
        first, *others = [cell.rjust(widths[head]) for head, cell in row.items()]
        texts.append("  ".join([first.strip().ljust(len(first)), *others]))
    return "\n".join(texts)


LEGEND = """
[ ]: 95 % interval, over the pretrainings if there are several, else the seeds. solved: runs with an
accuracy of .9 or more. minus: in points of accuracy, or nats, of the same seeds. SD ratio: within a
pretraining, of the logit of the accuracy, or the log of the nll. A diverged run is the worst."""
READ_P = """
n: pretrainings, or seeds if there is only one. p: of a paired t test. Holm: p, corrected for the
four tests of the family. All other comparisons are exploratory.
A p above .05 leaves open which of the two is better. It does not mean that they are equal."""


def table(settings, results, baseline):
    """The table as text: a row per method, methods of one pass first, and then the legend."""
    key = score(results)
    starts, seeds, columns = wide(results, key)
    rows = []
    for method, x in columns.items():
        lines = [line for line in results if line["method"] == method]
        row = {"method": method, "passes": str(lines[0]["passes"])}
        if len(starts) == 1 and len(seeds) <= 4:
            row |= {f"seed {seed}": f"{y:.3f}".replace("nan", "-") for seed, y in zip(seeds, x[0])}
        elif key == "accuracy":
            row["solved"] = solved(x[~np.isnan(x)])
        row[f"mean {key}"] = show(interval(units(x)))
        difference, ratio, _, _ = compare(settings, results, method, baseline)
        row[f"minus {baseline}"] = show(difference, UNITS[key][1], "+")
        row["SD ratio"] = show(ratio, 2)
        if method == baseline:
            row |= {f"minus {baseline}": "-", "SD ratio": "-"}
        row["diverged"] = str(sum(line["diverged"] is not None for line in lines))
        rows.append(row)
    rows.sort(key=lambda row: row["passes"])
    return aligned(rows) + LEGEND


def verdict(settings, results):
    """A row for each of the COMPARISONS, and how to read their p values."""
    _, places, unit = UNITS[score(results)]
    found = {pair: compare(settings, results, *pair) for pair in COMPARISONS}
    family = [pair for pair, role in COMPARISONS.items() if role == "family"]
    adjusted = holm({pair: found[pair][3] for pair in family})
    rows = []
    for pair, (difference, _, n, p) in found.items():
        row = {"comparison": " minus ".join(pair), "role": COMPARISONS[pair], "n": str(n)}
        row[unit] = show(difference, places, "+")
        row["p"] = f"{p:.2g}" if n > 1 else "-"
        row["Holm"] = f"{adjusted[pair]:.2g}" if pair in adjusted else "-"
        if n:
            rows.append(row)
    missing = {name for pair in COMPARISONS for name in pair} - {x["method"] for x in results}
    text = aligned(rows) + READ_P if rows else ""
    if missing:
        text += f"\nTo judge the paper's claim, add --method={','.join(sorted(missing))}"
    return text.strip()


def main(out_dirs, baseline):
    """--report: print the results in the folders, and draw them. ValueError if there are none."""
    from data.results import figures

    folders = [(name, runs.read_settings(name), runs.read_results(name)) for name in out_dirs]
    for folder, settings, results in folders:
        if not settings or not results:
            raise ValueError(f"{folder} has no results: train something first, or check --out_dir")
        pairs = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
        print(textwrap.fill(f"{folder}: {pairs}", 100))
        print(f"\n{table(settings, results, baseline)}\n\n{verdict(settings, results)}\n")
    print(figures.write(folders))
    return 0
