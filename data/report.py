"""What a comparison's results say: statistics over seeds and tables. Trains nothing.

Accuracies of a tiny model are near 0 or near 1, so intervals are 95 % bootstrap intervals over
seeds (percentiles of 10,000 resamples, always the same); normal laws are assumed of pretrainings
and below 8 seeds. Methods are compared on the same seeds (for honesty); none is left out."""
import contextlib
import glob
import json
import math
import os

import numpy as np

from data.machine import fail

# --------------------------------------------------------------------------------------------------
# Statistics. Arrays (..., n): the last axis is the seeds.


def mean(x):
    return x.mean(-1)


def sd(x):
    """Standard deviation with n - 1; nan for a single seed, infinite if a seed is."""
    if x.shape[-1] < 2:
        return np.full(x.shape[:-1], np.nan)
    lost = np.isinf(x).any(-1)
    return np.where(lost, np.inf, np.where(np.isinf(x), 0, x).std(-1, ddof=1))


def difference(a, b):
    return mean(a) - mean(b)


@np.errstate(divide="ignore", invalid="ignore")
def sd_ratio(a, b):
    return sd(a) / sd(b)


def interval(statistic, *samples):
    """95 % interval of statistic(*samples), samples (n,), the same seeds in each: by bootstrap, of
    means of fewer than 8 seeds, for which that is too narrow, by Student's t."""
    if len(samples[0]) < 8 and statistic in (mean, difference) and np.isfinite(samples).all():
        return t_interval(samples[0] - sum(samples[1:]))[1:]
    draws = np.random.default_rng(0).integers(0, len(samples[0]), (10_000, len(samples[0])))
    values = statistic(*(x[draws] for x in samples))
    values = values[~np.isnan(values)]  # a ratio of nothing to nothing has no value
    if not len(values):
        return math.nan, math.nan
    return tuple(np.quantile(values, [0.025, 0.975], method="inverted_cdf"))  # of infinities too


def t_interval(x):
    """The mean of x (n,) and its 95 % interval by Student's t."""
    t = np.random.default_rng(0).standard_t(max(1, len(x) - 1), 1_000_000)
    half = np.quantile(abs(t), 0.95) * sd(x) / len(x) ** 0.5
    return x.mean(), x.mean() - half, x.mean() + half


def between_and_within(x):
    """Analysis of variance of x (pretrainings, fine-tunings of each): the SD between pretrainings
    and that within, with 95 % intervals: of each mean square over draws of its chi-square."""
    G, n = x.shape
    df = np.array([G - 1, G * (n - 1)])
    squares = np.array([n * x.mean(1).var(ddof=1), x.var(1, ddof=1).mean()])
    draws = squares * df / np.random.default_rng(0).chisquare(df, (10_000, 2))
    total, within = np.vstack([squares, draws]).T
    sds = np.sqrt([np.maximum(total - within, 0) / n, within])
    return [(sd[0], *np.quantile(sd[1:], [0.025, 0.975])) for sd in sds]


# --------------------------------------------------------------------------------------------------
# Results.

# What a line says of the outcome; all else says which run it was.
OUTCOME = """accuracy nll nll_se bits_per_char bits_per_char_se diverged clipped_steps n_test passes
    forward_tokens seconds seeds_trained_together n_params torch device curve eval_every""".split()
OWN = ("ppots_", "isad_")  # settings that are one method's own
NAMES = {"data": "dataset", "init": "init_from"}  # fingerprints, and what people call these
HEADING = "dataset data steps batch_size n_layer n_embd lr grad_clip eps init_from n_train".split()


def read_lines(path):
    """The dictionaries in a JSONL file, none if it is not there; damaged lines are left out."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8", errors="replace") as f:
            for text in f:
                with contextlib.suppress(json.JSONDecodeError):
                    lines.append(json.loads(text))
    return [line for line in lines if isinstance(line, dict)]


def made_from(line):
    """What a line's run was made from: its settings, and the fingerprints of its data and of the
    weights it started from, not their names. A line of an older version has nothing but names."""
    data, model = (f"unknown, {line.get(name)}" for name in NAMES.values())
    old = {"data": data, "init": [model] * 2 if line.get("init_from") else None}
    return {k: v for k, v in (old | line).items() if k not in {*OUTCOME, *NAMES.values()}}


def run_key(line):
    return json.dumps(made_from(line), sort_keys=True)


def read_results(out_dir):
    """All results, of all processes' shares; where a run is there twice the newer file counts."""
    paths = glob.glob(os.path.join(glob.escape(out_dir), "results*.jsonl"))
    lines = [line for path in sorted(paths, key=os.path.getmtime) for line in read_lines(path)]
    needed = {"method", "seed", "dataset", "steps", "batch_size", "passes", "nll", "curve"}
    return list({run_key(line): line for line in lines if needed <= set(line)}.values())


def column(rows, key):
    """A number per seed. A seed that diverged, or whose number is null, is the worst there is."""
    worst = 0.0 if key == "accuracy" else math.inf
    lost = [row.get("diverged") or row.get(key) is None for row in rows]
    return np.array([worst if gone else row[key] for gone, row in zip(lost, rows)], dtype=float)


def score(results):
    """What methods are compared by: "accuracy", or "nll" for text."""
    return "accuracy" if "accuracy" in next(iter(results.values()))[0] else "nll"


def groups(lines):
    """Results that can be compared: a list of {method: lines by seed}, one for each setting of all
    but the method. Fine-tunings of several models are one sample if all had the same methods, else
    each model has its own. An ARM goes with MDMs whose pretraining differs in nothing else. The
    same method with other settings of its own has these after its name."""
    made, found, pools, result = [made_from(line) for line in lines], {}, {}, []
    mdm = {of["init"][0]: of["init"] for of in made if of["init"] and "arm" not in of["method"]}
    for line, setting in zip(lines, made):
        method, start = setting.pop("method"), setting.pop("init")
        if start and "arm" in method:
            start = mdm.get(start[0], start)
        own = tuple((k, setting.pop(k)) for k in sorted(setting) if k.startswith(OWN))
        setting["steps"] //= 2 if "steps2" in method else 1
        setting |= {"seed": 0, "batch_size": batch_size({method: [line]}), "tuned": bool(start)}
        group = found.setdefault((json.dumps(setting, sort_keys=True), str(start)), {})
        group.setdefault((method, own), []).append(line | {"start": start})
    for (setting, _), group in found.items():
        pool = pools.setdefault((setting, *sorted(group)), {})
        for variant, rows in group.items():
            pool[variant] = sorted(pool.get(variant, []) + rows, key=run)
    for pool in pools.values():
        result.append({})
        for (method, own), rows in pool.items():
            first = min(other for name, other in pool if name == method)
            result[-1][method + "".join(f" {v}" for k, v in own if (k, v) not in first)] = rows
    return result


def changes(lines):
    """A line for each name that did not mean the same data or weights in all of these results."""
    found = {}
    for line in lines:
        for key, name in NAMES.items():
            label = f"{name} {line.get(name)}", key == "init" and "arm" in line["method"]
            found.setdefault(label, set()).add(str(made_from(line)[key]))
    return [f"{label} changed between these runs, which are kept apart: {', '.join(sorted(of))}"
            for (label, _), of in found.items() if len(of) > 1]


def batch_size(results):
    """The batch size of the methods of a group; mdm_batch2's is twice that."""
    method, (row, *_) = next(iter(results.items()))
    return row["batch_size"] // (2 if "batch2" in method else 1)


def heading(results, but=""):
    """What the runs of a group have in common, `but` left out."""
    every = [row for rows in results.values() for row in rows]
    models = [f"{row['init_from']} ({row['start'][1]})" for row in every if row.get("start")]
    row = every[0] | {"init_from": " ".join(dict.fromkeys(models)), but: None}
    return f"{row['method']}: " + ", ".join(f"{k} {row[k]}" for k in HEADING if row.get(k))


def run(row):
    return row["seed"], str(row.get("start"))


def same_seeds(results, a, b):
    """The rows of two methods for the seeds that both have, in the same order."""
    a, b = results.get(a, []), results.get(b, [])
    common = set(map(run, a)) & set(map(run, b))
    return [[row for row in rows if run(row) in common] for rows in (a, b)]


# --------------------------------------------------------------------------------------------------
# Tables.


def table(results, seeds=()):
    """The final table of a comparison, with a column per seed if they are few."""
    key, few = score(results), 0 < len(seeds) <= 4
    head = [f"seed {seed}" for seed in seeds] if few else ["solved"] * (key == "accuracy")
    lines = [f"{'method':22}passes" + "".join(f"{h:>11}" for h in head)
             + "     mean     SD    min    max     nll gradclip  seconds"]
    for name, rows in results.items():
        a = column(rows, key)
        cells = [f"{x:.3f}" for x in a] if few else [f"{sum(a >= 0.9)}/{len(a)}"] * len(head)
        line = f"{name:22}{rows[0]['passes']:^6}" + "".join(f"{cell:>11}" for cell in cells)
        line += f"{a.mean():9.3f}{sd(a):7.3f}{a.min():7.3f}{a.max():7.3f}"
        clipped = [row.get("clipped_steps", math.nan) for row in rows]
        line += f"{column(rows, 'nll').mean():8.3f}{np.mean(clipped):9.0%}"
        lines.append(line + f"{rows[0]['seconds']:9.1f}")
    lines.append("accuracy: whole response right; solved: .9 or more of these; nll: nats per token "
                 "(MDM: the bound)\ngradclip: share of clipped steps; seconds: all seeds together")
    for name, rows in results.items():
        for row in [row for row in rows if row.get("diverged")]:
            lines.append(f"{name}, seed {row['seed']}: not finite at step {row['diverged']}: worst")
    return "\n".join(lines)


def statistics(results, key, baseline="mdm"):
    """Of "accuracy" or "nll": intervals, spreads, and each method against `baseline`."""

    def show(f, *samples):
        return "{:.3f} [{:.3f},{:.3f}]".format(f(*samples), *interval(f, *samples))

    head = ["mean", "SD", f"minus {baseline}", f"SD / {baseline}'s"]
    lines = [f"{key:22}" + "".join(f"{h:>25}" for h in head)]
    for name, rows in results.items():
        a, cells = column(rows, key), ["-", "-"]
        pair = [column(part, key) for part in same_seeds(results, name, baseline)]
        if name != baseline and len(pair[0]):
            spread = pair if key == "accuracy" else np.log(pair)
            cells = [show(difference, *pair), show(sd_ratio, *spread)]
        lines.append(("{:22}" + 4 * "{:>25}").format(name, show(mean, a), show(sd, a), *cells))
    lines.append("[95 % interval: bootstrap; means below 8 seeds: t]; SD / SD of nll: of log nll")
    return "\n".join(lines)


def nested(results, baseline="mdm"):
    """Of several pretrainings, fine-tuned equally often: is it these that seeds differ by? And what
    would new ones give: the mean against `baseline`'s, with the pretrainings as the sample."""
    key, found = score(results), {}
    for name, rows in results.items():
        parts = {}
        for row in rows:
            parts.setdefault(run(row)[1], []).append(row)
        x = [column(part, key) for part in parts.values()]
        if len(x) > 1 and len(set(map(len, x))) == 1 < len(x[0]):
            found[name] = dict(zip(parts, x))
    head = f"{'SD between pretrainings':>25}{'SD within':>25}{f'minus {baseline} (by t)':>25}"
    lines = [f"{key:22}{head}   mean of each"]
    for name, parts in found.items():
        rows = list(between_and_within(np.array([*parts.values()])))
        if name != baseline and set(parts) == set(found.get(baseline, ())):
            pairs = [(a, found[baseline][start]) for start, a in parts.items()]
            rows.append(t_interval(np.array([difference(*pair) for pair in pairs])))
        cells = ["{:.3f} [{:.3f},{:.3f}]".format(*row) for row in rows] + ["-"] * (3 - len(rows))
        means = " ".join(f"{a.mean():.3f}" for a in parts.values())
        lines.append(f"{name:22}" + "".join(f"{cell:>25}" for cell in cells) + f"   {means}")
    return "\n".join(lines) if found else ""


def verdict(results, ours="ppots_mirror", base="mdm"):
    """The sentence on the paper's claim."""
    pair = same_seeds(results, ours, base)
    if not pair[0]:
        return "For the paper's claim run --method=arm,mdm,ppots_mirror."
    key = score(results)
    unit, by, places = ("points of accuracy", 100, 1) if key == "accuracy" else ("nats", 1, 3)
    a, b = (column(rows, key) for rows in pair)
    line = f"P-POTS+MIRROR minus MDM: {by * difference(a, b):+.{places}f} {unit}"
    if len(a) > 1:
        wins = a.min() > b.max() if key == "accuracy" else a.max() < b.min()
        line += f" ({len(a)} seeds, SD {sd(a):.3f} against {sd(b):.3f}); its worst seed "
        line += f"{'beats' if wins else 'does not beat'} MDM's best"
    line, controls = line + ". It takes two passes a step: ", []
    for name in ("mdm_batch2", "mdm_steps2", "multi2"):
        pair = [column(rows, key) for rows in same_seeds(results, ours, name)]
        if len(pair[0]):
            found = by * np.array([difference(*pair), *interval(difference, *pair)])
            controls.append(name + " {:+.{p}f} [{:+.{p}f},{:+.{p}f}]".format(*found, p=places))
    if controls:
        return line + "against controls of the same compute it is " + ", ".join(controls) + "."
    return line + "add mdm_batch2,mdm_steps2,multi2 to --method for controls of the same compute."


def main(out_dir, baseline):
    """--report: tables and figures of the results in out_dir."""
    from data import figures

    lines = read_results(out_dir)
    if not lines:
        fail(f"there are no results in {out_dir}: train something first, or check --out_dir")
    print(*changes(lines), sep="\n")
    for results in groups(lines):
        if baseline not in results:
            print(f"--baseline={baseline} is not among these, {', '.join(results)}:")
        print(f"{heading(results)}\n\n{table(results)}\n")
        for key in ("accuracy", "nll") if score(results) == "accuracy" else ("nll",):
            print(f"{statistics(results, key, baseline)}\n")
        print(f"{nested(results, baseline)}\n\n{verdict(results)}\n")
    print(figures.write(out_dir, groups(lines)))
    return 0
