"""Tables of results with 95 % intervals, and a sentence on the paper's claim. Trains nothing.

All numbers come from one table per method, with a row for each start (the pretraining of a run) and
a column for each seed. So no run can be compared with that of another seed or another start."""
import math
import textwrap

import numpy as np

from data import runs

UNITS = {"accuracy": (100, 1, "points of accuracy"), "nll": (1, 3, "nats per token")}
SCALES = {"accuracy": "the logit of the accuracy", "nll": "the log of the nll"}
CLAIM = ["mdm", "mdm_batch2", "mdm_steps2", "multi2"]  # the last three cost as much as MIRROR
Z975 = 1.959964  # the 97.5 % quantile of the normal law
T975 = [12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365]  # and of Student's t with 1 to 7 df
CORNISH_FISHER = [1.59, 2.556, 2.8225, 2.3723, Z975]  # above 7: about this polynomial in 1 / df


def score(results):
    """The name of the number that compares methods: "accuracy", or "nll" for text."""
    return "accuracy" if "accuracy" in results[0] else "nll"


def wide(results, key):
    """Pivot results, so that no two seeds can be mispaired: (starts, seeds, columns).

    columns: an array (starts, seeds) for each method, nan where a run is missing. A diverged seed
    and a null number are the worst: an accuracy of 0, or infinite nats."""
    starts = sorted({line["start"] for line in results})
    seeds = sorted({line["seed"] for line in results})
    columns = {line["method"]: np.full((len(starts), len(seeds)), np.nan) for line in results}
    for line in results:
        number = line.get(key)
        if number is None or math.isnan(number) or line["diverged"] is not None:
            number = 0.0 if key == "accuracy" else math.inf
        columns[line["method"]][starts.index(line["start"]), seeds.index(line["seed"])] = number
    return starts, seeds, columns


@np.errstate(invalid="ignore")
def units(x):
    """The sample (n,) in x (starts, seeds): the starts' means if there are several, else seeds."""
    rows = x if len(x) > 1 else x.T  # a mean of one seed is that seed
    return np.array([row[~np.isnan(row)].mean() for row in rows if not np.isnan(row).all()])


@np.errstate(invalid="ignore")
def interval(sample):
    """(mean, low, high) of a sample (n,) by Student's t. low and high are nan if n < 2."""
    n = len(sample)
    mean = sample.sum() / n if n else math.nan
    if n < 2:
        return mean, math.nan, math.nan
    t = T975[n - 2] if n <= 8 else np.polyval(CORNISH_FISHER, 1 / (n - 1))
    half = t * sample.std(ddof=1) / math.sqrt(n)
    return mean, mean - half, mean + half


def spread(x):
    """(SD, degrees of freedom) in x (starts, seeds), about the starts' means; nan if undefined."""
    rows = [row[~np.isnan(row)] for row in x if not np.isnan(row).all()]
    df = sum(len(row) - 1 for row in rows)
    if df < 1 or np.isinf(x).any():
        return math.nan, df
    return math.sqrt(sum(len(row) * row.var() for row in rows) / df), df


@np.errstate(divide="ignore", invalid="ignore")
def compare(settings, results, method, other):
    """Method minus other, run by run: (difference, ratio, size), each with (mean, low, high).

    difference: in points or nats. ratio: of the SDs, on a scale without a ceiling: the accuracy's
    logit (half a problem from 0 and 1) or the log of the nll. size: "seeds: 3", or "" if none."""
    key = score(results)
    starts, seeds, columns = wide(results, key)
    missing = np.full((len(starts), len(seeds)), np.nan)
    pair = np.array([columns.get(name, missing) for name in (method, other)])
    minus = np.where(np.isinf(pair).all(0), 0.0, pair[0] - pair[1])  # both diverged: no difference
    sample = units(UNITS[key][0] * minus)
    size = f"{'pretrainings' if len(starts) > 1 else 'seeds'}: {len(sample)}" if len(sample) else ""
    if key == "accuracy":
        right = (pair * settings["n_test"] + 0.5) / (settings["n_test"] + 1)
        pair = right / (1 - right)
    (sd, df), (base, _) = [spread(np.where(np.isnan(minus), np.nan, np.log(x))) for x in pair]
    if df < 1 or not (sd > 0 and base > 0):
        return interval(sample), (math.nan, math.nan, math.nan), size
    # F needs scipy. The log of an SD has a variance of nearly 1/(2 df) + 1/(2 df^2) + 1/(3 df^3).
    factor = math.exp(Z975 * math.sqrt(1 / df + 1 / df**2 + 2 / (3 * df**3)))
    return interval(sample), (sd / base, sd / base / factor, sd / base * factor), size


def show(values, places=3, sign=""):
    """(mean, low, high) as text: "mean [low, high]", or "mean", or "-", where the rest is nan."""
    mean, low, high = values
    if math.isnan(low):
        return "-" if math.isnan(mean) else f"{mean:{sign}.{places}f}"
    return f"{mean:{sign}.{places}f} [{low:.{places}f}, {high:.{places}f}]"


def solved(scores):
    """The number of accuracies (n,) of .9 or more, with Wilson's 95 % interval, as text."""
    n = len(scores)
    count = int((scores >= 0.9).sum())
    centre = (count + Z975**2 / 2) / (1 + Z975**2 / n)
    half = Z975 * math.sqrt(count * (n - count) / n + Z975**2 / 4) / (1 + Z975**2 / n)
    return f"{count} [{abs(centre - half):.0f}, {centre + half:.0f}] of {n}"


LEGEND = """
[ ]: the 95 % interval by Student's t, over the pretrainings if there are several, else the seeds.
SD: of runs, within a pretraining. minus: in points of accuracy, or nats, of the same seeds. solved:
runs with an accuracy of .9 or more. nll: nats per token; of an MDM a bound. gradclip: share of
steps whose gradient was clipped. seconds: of all runs together. diverged: counts as the worst."""


def table(settings, results, baseline):
    """The table as text: a row per method, methods of one pass first, and then the legend."""
    key = score(results)
    starts, seeds, columns = wide(results, key)
    few = len(starts) == 1 and len(seeds) <= 4
    rows = []
    for method, x in columns.items():
        lines = [line for line in results if line["method"] == method]
        scores = x[~np.isnan(x)]
        difference = compare(settings, results, method, baseline)[0]
        row = {"method": method, "passes": str(lines[0]["passes"])}
        if few:
            row |= {f"seed {seed}": show([y, math.nan, math.nan]) for seed, y in zip(seeds, x[0])}
        else:
            row["worst"] = f"{scores.min() if key == 'accuracy' else scores.max():.3f}"
        if key == "accuracy" and not few:
            row["solved"] = solved(scores)
        row[f"mean {key}"] = show(interval(units(x)))
        row["SD"] = show([spread(x)[0], math.nan, math.nan])
        minus = "-" if method == baseline else show(difference, UNITS[key][1], "+")
        row[f"minus {baseline}"] = minus
        if key == "accuracy":
            row["nll"] = f"{units(wide(lines, 'nll')[2][method]).mean():.3f}"
        row["gradclip"] = f"{np.mean([line['gradclip'] for line in lines]):.0%}"
        seconds = sum(line["seconds"] / line["seeds_trained_together"] for line in lines)
        row["seconds"] = f"{seconds:.0f}"
        if any(line["diverged"] for line in lines):
            row["gradclip"] += f" ({sum(bool(line['diverged']) for line in lines)} diverged)"
        rows.append(row)
    rows.sort(key=lambda row: int(row["passes"]))
    widths = {head: max(len(head), *(len(row[head]) for row in rows)) for head in rows[0]}
    texts = []
    for row in [dict(zip(widths, widths)), *rows]:
        cells = [cell.rjust(widths[head]) for head, cell in row.items()]
        texts.append("  ".join([row["method"].ljust(widths["method"]), *cells[1:]]))
    return "\n".join(texts) + LEGEND


def verdict(settings, results, method="ppots_mirror", others=CLAIM):
    """A line for each other method: the difference to it, and the ratio of the SDs."""
    key = score(results)
    _, places, unit = UNITS[key]
    said = []
    for other in others:
        difference, ratio, size = compare(settings, results, method, other)
        if size:
            apart = ", not told apart" if difference[1] <= 0 <= difference[2] else ""
            line = f"{method} minus {other}: {show(difference, places, '+')} {unit} ({size}){apart}"
            said.append(f"{line}; SD ratio, of {SCALES[key]}: {show(ratio, 2)}")
    there = {line["method"] for line in results}
    missing = [name for name in (method, *others) if name not in there]
    if missing:
        said.append(f"To judge the paper's claim, add {','.join(missing)} to --method.")
    return "\n".join(said)


def main(out_dirs, baseline):
    """--report: print the results in the folders, and draw them. ValueError if there are none."""
    from data.results import figures

    folders = []
    for out_dir in out_dirs:
        settings = runs.read_settings(out_dir)
        results = runs.read_results(out_dir)
        if not settings or not results:
            raise ValueError(f"{out_dir} has no results: train something first, or check --out_dir")
        folders.append((out_dir, settings, results))
        pairs = ", ".join(f"{name} {value}" for name, value in settings.items() if value)
        print(textwrap.fill(f"{out_dir}: {pairs}", 100) + "\n")
        print(table(settings, results, baseline) + "\n")
        print(verdict(settings, results) + "\n")
    print(figures.write(folders))
    return 0
