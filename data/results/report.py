"""Tables of results with 95 % intervals, and a verdict on the paper's claim. Trains nothing.

Each method has an array of scores, with a row for each start (the pretrained model of a run, if it
had one) and a column for each seed. So two methods are always compared run by run."""
import math
import textwrap

import numpy as np

from data import runs

UNITS = {  # factor, decimal places, unit
    "accuracy": (100, 1, "points of accuracy"),
    "nll": (1, 3, "nats per token"),
}
COMPARISONS = {  # all were planned; Holm corrects the family for being four tests
    ("ppots_mirror", "mdm"): "primary",
    ("ppots_mirror", "mdm_batch2"): "family",
    ("ppots_mirror", "mdm_steps2"): "family",
    ("sqrtk", "mdm"): "family",
    ("sqrtk", "clipped"): "family",
    ("ppots_mirror", "multi2"): "exploratory",  # so are all pairs not listed
}
Z975 = 1.959964  # the 97.5 % quantile of the normal law


def score(results):
    """The name of the number that compares methods: "accuracy", or "nll" for text."""
    return "accuracy" if "accuracy" in results[0] else "nll"


def wide(results, key):
    """Results as arrays: (starts, seeds, {method: array (starts, seeds)}), nan for a missing run.
    A diverged seed and a missing number are the worst: an accuracy of 0, or infinite nats."""
    starts = sorted({line["start"] for line in results})
    seeds = sorted({line["seed"] for line in results})
    columns = {line["method"]: np.full((len(starts), len(seeds)), np.nan) for line in results}
    for line in results:
        number = line.get(key)
        if number is None or math.isnan(number) or line["diverged"] is not None:
            number = 0.0 if key == "accuracy" else math.inf
        columns[line["method"]][starts.index(line["start"]), seeds.index(line["seed"])] = number
    return starts, seeds, columns


def sample_of(x):
    """The sample (n,) in x (starts, seeds): the starts' means if there are several, else seeds."""
    rows = x if len(x) > 1 else x.T  # of one start, each seed is its own mean
    return np.array([row[~np.isnan(row)].mean() for row in rows if not np.isnan(row).all()])


@np.errstate(divide="ignore", invalid="ignore")
def spread(x):
    """(SD, degrees of freedom) in x (starts, seeds), about the starts' means; nan if undefined."""
    there = ~np.isnan(x)
    means = x.sum(1, where=there, keepdims=True) / there.sum(1, keepdims=True)
    df = there.sum() - there.any(1).sum()
    return np.sqrt(((x - means) ** 2).sum(where=there) / df), df


@np.errstate(invalid="ignore")
def t_test(sample):
    """Student's t test of a sample (n,): its mean with the 95 % interval, (mean, low, high), and p,
    the chance of a mean this far from 0 by luck alone. Without a result: low and high nan, p 1."""
    n = len(sample)
    mean = sample.sum() / n if n else math.nan
    unknown = (mean, math.nan, math.nan), 1.0
    if n < 2 or not np.isfinite(sample).all():
        return unknown
    sd = sample.std()
    # Accuracies are counts, so a few seeds may agree by chance. (A mean of 0 stays: ema minus mdm.)
    if sd < 1e-9 * abs(mean):
        return unknown
    # By hand, to do without scipy. Let tan(angle) = mean / SD, where the SD divides by n. If luck
    # alone decides, the angle has the density cos^(n-2). That is Student's law with n - 1 degrees.
    angle = np.linspace(0, np.pi / 2, 20001)
    middle = (angle[1:] + angle[:-1]) / 2
    area = np.append(0, np.cumsum(np.cos(middle) ** (n - 2)))
    share = area / area[-1]  # the chance of a smaller angle, whatever its sign
    half = sd * math.tan(np.interp(0.95, share, angle))
    p = 1 - np.interp(math.atan2(abs(mean), sd), angle, share)
    return (mean, mean - half, mean + half), max(p, 1e-9)  # the table has no more digits


def holm(p_values):
    """Holm's correction for m tests, {name: p}. The smallest p is multiplied by m, the next by
    m - 1, and so on. No result is below an earlier one, or above 1."""
    names = sorted(p_values, key=p_values.get)
    products = [p_values[name] * (len(names) - i) for i, name in enumerate(names)]
    return dict(zip(names, np.maximum.accumulate(products).clip(max=1)))


@np.errstate(divide="ignore", invalid="ignore")
def compare(settings, results, method, other):
    """Method minus other, run by run: (difference, ratio of the SDs, size of the sample, p).
    The difference, in points or nats, and the ratio are (value, low, high). The SDs are taken on a
    scale without a ceiling: the logit of the accuracy, or the log of the nll."""
    key = score(results)
    columns = wide(results, key)[2]
    missing = np.full_like(columns[results[0]["method"]], np.nan)
    pair = np.array([columns.get(name, missing) for name in (method, other)])
    minus = np.where(np.isinf(pair).all(0), 0.0, pair[0] - pair[1])  # both diverged: no difference
    sample = sample_of(UNITS[key][0] * minus)
    difference, p = t_test(sample)
    if key == "accuracy":
        right = pair * settings["n_test"] + 0.5  # so that the logit of 0, and of all, is finite
        pair = right / (settings["n_test"] + 1 - right)  # the odds
    log_pair = np.where(np.isnan(minus), np.nan, np.log(pair))
    sd, df = spread(log_pair[0])
    other_sd, _ = spread(log_pair[1])  # of the same runs, so df is the same
    ratio = (math.nan, math.nan, math.nan)
    if sd > 1e-9 and other_sd > 1e-9:  # less is rounding
        # The log of a normal sample's SD has the variance 1/(2 df) + 1/(2 df^2) + 1/(3 df^3).
        # The log of a ratio of two SDs has twice that.
        factor = math.exp(Z975 * math.sqrt(1 / df + 1 / df**2 + 2 / (3 * df**3)))
        ratio = (sd / other_sd, sd / other_sd / factor, sd / other_sd * factor)
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
    return f"{count} [{max(0, centre - half):.0f}, {centre + half:.0f}] of {n}"


def aligned(rows):
    """Rows, dictionaries with the same keys, as text. The first column is at the left."""
    columns = []
    for head in rows[0]:
        cells = [head, *(row[head] for row in rows)]
        width = max(len(cell) for cell in cells)
        side = ">" if columns else "<"
        columns.append([f"{cell:{side}{width}}" for cell in cells])
    return "\n".join("  ".join(line) for line in zip(*columns))


LEGEND = """
[ ]: the 95 % interval, over the pretrainings if there are several, else over the seeds.
minus: the difference between the same seeds, in points of accuracy or in nats.
SD ratio: the spread of the seeds within a pretraining, divided by that of the method after minus.
It is taken of the logit of the accuracy or the log of the nll. Its [ ] takes runs as independent.
A diverged run counts as the worst."""
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
        elif key == "accuracy" and len(starts) == 1:
            row["reach .9"] = solved(x[0, ~np.isnan(x[0])])
        row[f"mean {key}"] = show(t_test(sample_of(x))[0])
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
    adjusted = holm({pair: found[pair][3] for pair in family})  # one without runs has p = 1
    rows = [{"comparison": " minus ".join(pair), "role": COMPARISONS[pair], "n": str(n),
             unit: show(difference, places, "+"), "p": f"{p:.2g}" if n > 1 else "-",
             "Holm": f"{adjusted[pair]:.2g}" if pair in adjusted else "-"}
            for pair, (difference, _, n, p) in found.items() if n]  # fmt: skip
    missing = {name for pair in COMPARISONS for name in pair} - {x["method"] for x in results}
    text = aligned(rows) + READ_P if rows else ""
    if missing:
        text += f"\nTo fill in the comparisons, add --method={','.join(sorted(missing))}"
    return text.strip()


def main(out_dirs, baseline):
    """--report: print the results in the folders, and draw them. ValueError if there are none."""
    from data.results import figures  # here, because figures imports report

    folders = [(name, runs.read_settings(name), runs.read_results(name)) for name in out_dirs]
    for folder, settings, results in folders:
        if not settings or not results:
            raise ValueError(f"{folder} has no results yet: train, or --resume, or check --out_dir")
        pairs = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
        print(textwrap.fill(f"{folder}: {pairs}", 100))
        print(f"\n{table(settings, results, baseline)}\n\n{verdict(settings, results)}\n")
    print(figures.write(folders))
    return 0
