"""What a comparison's results say: statistics over seeds, tables, figures. Reads results.jsonl; trains nothing.

    python train.py --report --out_dir=out         the table printed at the end of a comparison, intervals, figures

Accuracies of a tiny model over seeds are near 0 or near 1, so nothing here assumes a normal law: intervals are 95 % bootstrap
intervals over seeds (percentiles of 10,000 resamples, from a fixed generator), resampled by seed where methods are
compared, since a seed has the same data and, but for the ARM's, the same initial weights under every method. No seed is
ever left out.
"""
import json
import math
import os

import numpy as np

# ---------------------------------------------------------------------------------------------------------------
# Statistics. Arrays (..., n): the last axis is the seeds.


def iqm(x):
    """Interquartile mean (..., n) -> (...): the mean of the middle half; where a quarter of n is not whole, the outermost
    of it count by the fraction (Agarwal et al. 2021, arXiv 2108.13264)."""
    n = x.shape[-1]
    weight = np.clip(np.minimum(np.arange(1, n + 1), np.arange(n, 0, -1)) - n / 4, 0, 1)
    return np.sort(x, -1) @ weight / weight.sum()


def sd(x):
    """Standard deviation with n - 1; nan for a single seed, infinite if a seed is."""
    if x.shape[-1] < 2:
        return np.full(x.shape[:-1], np.nan)
    lost = np.isinf(x).any(-1)
    return np.where(lost, np.inf, np.where(np.isinf(x), 0, x).std(-1, ddof=1))


def sd_ratio(a, b):
    with np.errstate(divide="ignore", invalid="ignore"):
        return sd(a) / sd(b)


def improvement(a, b):
    """Probability that a random seed of a beats a random seed of b, ties counting half: (..., n), (..., m) -> (...)."""
    a, b = a[..., :, None], b[..., None, :]
    return ((a > b) + 0.5 * (a == b)).mean((-2, -1))


def interval(statistic, *samples, n_resamples=10_000, level=0.95):
    """Bootstrap interval (low, high) of statistic(*samples), samples (n,) each, the same seeds resampled in all of them."""
    rng, n = np.random.default_rng(0), len(samples[0])
    draws = rng.integers(0, n, (n_resamples, n))
    values = np.concatenate([statistic(*(x[part] for x in samples)) for part in np.array_split(draws, 10)])
    values = values[~np.isnan(values)]  # a ratio of nothing to nothing has no value
    if not len(values):
        return math.nan, math.nan
    return tuple(np.quantile(values, [(1 - level) / 2, (1 + level) / 2], method="inverted_cdf"))  # values may be infinite


def noise_floor(accuracy, n_problems=512):
    """The SD that testing on n_problems only, and not on all there are, adds at most to the seeds' own: binomial. (At most,
    since all seeds meet the same problems, and what makes some of them hard for all does not tell seeds apart.)"""
    return np.sqrt((accuracy * (1 - accuracy)).mean(-1) / n_problems)


def rank_correlation(x, y):
    """Spearman's: 1 when y rises wherever x does, -1 when it falls; equal values share their ranks."""
    rank = lambda v: (np.subtract.outer(v, v) > 0).sum(1) + 0.5 * (np.subtract.outer(v, v) == 0).sum(1)
    return np.corrcoef(rank(x), rank(y))[0, 1]


# ---------------------------------------------------------------------------------------------------------------
# Results.


# What a results line says of the outcome; all else in it says which run it was.
OUTCOME = {"accuracy", "nll", "nll_se", "bits_per_char", "bits_per_char_se", "diverged", "forward_tokens", "passes", "seconds",
           "seeds_trained_together", "n_params", "torch", "device", "curve"}  # fmt: skip


def column(rows, key):
    """A number per seed. What is null in the results was not finite: the worst there is."""
    worst = 0.0 if key == "accuracy" else math.inf
    return np.array([worst if r.get(key) is None else r[key] for r in rows], dtype=float)


def is_text(rows):
    return "bits_per_char" in rows[0]


def steps_to(row, accuracy=0.9):
    """The first evaluation at which a seed had this accuracy, in steps; infinite if there is none."""
    return next((c["step"] for c in row["curve"] if (c.get("accuracy") or 0) >= accuracy), math.inf)


def groups(lines):
    """Results that can be compared: a list of {method: lines by seed}, one for each setting of everything but the method."""
    found = {}
    for line in lines:
        own = {k: v for k, v in line.items() if k.startswith(("ppots_", "isad_"))}
        setting = {k: v for k, v in line.items() if k not in OUTCOME | {"method", "seed", "eval_every"} | set(own)}
        method = line["method"].split("_")
        for k, word in (("steps", "steps2"), ("batch_size", "batch2")):
            setting[k] = line[k] // 2 if word in method else line[k]
        group = found.setdefault(json.dumps(setting, sort_keys=True), {})
        group.setdefault(line["method"], {}).setdefault(json.dumps(own, sort_keys=True), []).append(line)
    groups = []
    for group in found.values():
        groups.append({})
        for name, variants in group.items():
            for i, rows in enumerate(variants.values()):  # the same method with other settings of its own
                groups[-1][name if i == 0 else f"{name} ({i + 1})"] = sorted(rows, key=lambda r: r["seed"])
    return groups


def heading(results):
    """A line saying what the runs of a group have in common."""
    r = next(iter(results.values()))[0]
    words = r["method"].split("_")
    steps, batch_size = r["steps"] // (2 if "steps2" in words else 1), r["batch_size"] // (2 if "batch2" in words else 1)
    line = f"{r['dataset']}: {steps} steps of {batch_size}, {r['n_layer']} layers of width {r['n_embd']}, learning rate {r['lr']}, eps {r['eps']}"
    line += f", from {r['init_from']}" if r.get("init_from") else ""
    for name, rows in results.items():
        own = {k: v for k, v in rows[0].items() if k.startswith(("ppots_", "isad_"))}
        line += f"\n{name} is {own}" if name.endswith(")") else ""
    return line


def same_seeds(a, b):
    """The rows of two methods for the seeds that both have, in the same order."""
    common = {r["seed"] for r in a} & {r["seed"] for r in b}
    return [r for r in a if r["seed"] in common], [r for r in b if r["seed"] in common]


def comparable(results, ours, base):
    return ours in results and base in results and bool(same_seeds(results[ours], results[base])[0])


def table(results, seeds=None):
    """The final table of a comparison, as text. results {method: result lines}; seeds: their order, if few."""
    text, few = is_text(next(iter(results.values()))), seeds is not None and len(seeds) <= 4
    head = [f"seed {s}" for s in seeds] if few else [] if text else ["solved"]
    last = "bits/char" if text else "nll"
    lines = [f"{'method':22}passes{'n':>4}" + "".join(f"{h:>11}" for h in head) + "    mean     +-     SD    min    max"
             f"{last:>10}  Mtokens  seconds"]  # fmt: skip
    for name, rows in results.items():
        a = column(rows, "nll" if text else "accuracy")
        values = [f"{x:.3f}" for x in a] if few else [] if text else [f"{(a >= 0.9).sum()}/{len(a)}"]
        lines.append(f"{name:22}{rows[0]['passes']:^6}{len(a):4}" + "".join(f"{v:>11}" for v in values)
                     + f"{a.mean():8.3f}{sd(a) / len(a) ** 0.5:7.3f}{sd(a):7.3f}{a.min():7.3f}{a.max():7.3f}"
                     + f"{column(rows, 'bits_per_char' if text else 'nll').mean():10.4f}"
                     + f"{sum(r['forward_tokens'] for r in rows) / 1e6:9.1f}{rows[0]['seconds']:9.1f}")  # fmt: skip
    what = "accuracy: whole response right (solved: in 90 % of problems or more); nll: nats per response token (MDM: the bound)"
    if text:
        error = max(column(rows, "nll_se").max() for rows in results.values())
        what = f"nats per token (MDM: the bound; each seed's standard error over the validation blocks: up to {error:.3f})"
    lines += [what, "+-: standard error of the mean; SD: over seeds; Mtokens: forwarded in training, all seeds; seconds: all seeds trained together"]
    for name, rows in results.items():
        gone = [f"{r['seed']} (step {r['diverged']})" for r in rows if r.get("diverged")]
        if gone:
            lines.append(f"{name}: loss or gradient not finite, no gradient from there on, counted as it stands: seed {', '.join(gone)}")
    return "\n".join(lines)


def statistics(results, key, baseline="mdm"):
    """Of "accuracy" or "nll": intervals, spreads and comparisons, each method against `baseline` on the same seeds."""
    show = lambda x, i, w=5: f"{x:{w}.3f} [{i[0]:.3f},{i[1]:.3f}]"
    ratio = lambda x: f"{x:.2f}" if x < 10 else f"{x:.0f}"
    better = improvement if key == "accuracy" else lambda p, q: improvement(q, p)
    bases = list(dict.fromkeys([baseline, "arm"]))
    width = [20] * 3 + [8] * 2 + [24, 22] + [22] * len(bases)
    head = ["mean", "IQM", "SD", "min", "max", "minus base", "P(better)", *(f"SD / {base}'s" for base in bases)]
    if key == "accuracy":
        head, width = head + ["to 90 %"], width + [9]
    lines = [f"{key}; base: {baseline}", f"{'method':22}" + "".join(f"{h:>{w}}" for h, w in zip(head, width))]
    for name, rows in results.items():
        a = column(rows, key)
        cells = [show(f(a), interval(f, a)) for f in (lambda x: x.mean(-1), iqm, sd)] + [f"{a.min():.3f}", f"{a.max():.3f}"]
        for base in bases:
            if name == base or not comparable(results, name, base):
                cells += ["-"] * (3 if base == baseline else 1)
                continue
            x, y = (column(r, key) for r in same_seeds(rows, results[base]))
            if base == baseline:
                cells += [show(f(x, y), interval(f, x, y), 6) for f in (lambda p, q: (p - q).mean(-1), better)]
            cells += ["{} [{},{}]".format(*map(ratio, (sd_ratio(x, y), *interval(sd_ratio, x, y))))]
        if key == "accuracy":
            cells += [f"{np.median([steps_to(r) for r in rows]):.0f}"]
        lines.append(f"{name:22}" + "".join(f"{c:>{w}}" for c, w in zip(cells, width)))
    lines.append("[95 % bootstrap interval over seeds]; minus base: by seed; P(better): that a random seed beats a random one of the base"
                 + ("; to 90 %: median steps, inf unless more than half get there" if key == "accuracy" else ""))  # fmt: skip
    if key == "accuracy":
        floors = ", ".join(f"{name} {noise_floor(column(rows, key)):.3f}" for name, rows in results.items())
        lines.append(f"SD that testing on 512 problems only adds to these, at most: {floors}")
    return "\n".join(lines)


def verdict(results, ours="ppots_mirror", base="mdm"):
    """One sentence on the paper's claim, or None when the methods it is about were not both run."""
    if not comparable(results, ours, base):
        return None
    text = is_text(results[base])
    key, unit, by, places = ("nll", "nats per token", 1, 3) if text else ("accuracy", "points of accuracy", 100, 1)
    a, b = (column(rows, key) for rows in same_seeds(results[ours], results[base]))
    gain = by * (a - b)  # paired: the same seed has the same initial weights and data
    line = f"P-POTS+MIRROR minus MDM: {gain.mean():+.{places}f} {unit}"
    if len(a) > 1:
        line += f" (standard error {sd(gain) / len(a) ** 0.5:.{places}f}, {len(a)} seeds); spread over seeds (SD) {sd(a):.3f} against {sd(b):.3f}"
        line += f", ratio {sd(a) / sd(b):.2f}" if sd(b) > 0 else ""
    wins = a.max() < b.min() if text else a.min() > b.max()
    line += f"; its worst seed {'beats' if wins else 'does not beat'} MDM's best. It takes two forward passes a step"
    controls = [name for name in ("mdm_batch2", "mdm_steps2", "multi2") if comparable(results, ours, name)]
    if controls:
        rest = []
        for name in controls:
            x, y = (by * column(rows, key) for rows in same_seeds(results[ours], results[name]))
            low, high = interval(lambda p, q: (p - q).mean(-1), x, y)
            rest.append(f"{name} {(x - y).mean():+.{places}f} [{low:+.{places}f},{high:+.{places}f}]")
        return line + ": against controls of the same compute the difference is " + ", ".join(rest) + " (95 % intervals)."
    return line + ": for controls of the same compute add mdm_batch2,mdm_steps2,multi2 to --method."


def prediction(results, variance):
    """A line: does the gradient's variance at a frozen model tell how training ends? Unbiased MDM methods of equally many
    steps, the variance of a step (two passes count as they reduce it); beside it the number of passes, which tells something
    as well. None when fewer than four were measured."""
    dataset = next(iter(results.values()))[0]["dataset"]
    at = lambda when: {row["method"]: row["gradient"]["total"] for row in variance if row["at"] == when and row["dataset"] == dataset}
    start, end = at("initialisation"), at("end")
    names = [m for m in results if m in start and m in end and not set(m.split("_")) & {"arm", "isad", "syrm", "clipped", "steps2"}]
    if len(names) < 4:
        return None
    key = "nll" if is_text(results[names[0]]) else "accuracy"
    outcome = [column(results[m], key).mean() for m in names]
    correlation = lambda of: f"{rank_correlation([of(m) for m in names], outcome):.2f}"
    passes = lambda m: results[m][0]["passes"]
    alone = f"; of the passes alone: {correlation(passes)}" if len(set(map(passes, names))) > 1 else ""
    return (f"Rank correlation, over {len(names)} methods with equally many steps, of a step's gradient variance with the mean {key} that "
            f"training ends with: {correlation(start.get)} at initialisation, {correlation(end.get)} at the plain MDM's final weights{alone}")  # fmt: skip


def read_lines(path):
    """The dictionaries in a JSONL file, none if it is not there; a torn line is left out."""
    lines = []
    if os.path.exists(path):
        with open(path, encoding="utf-8") as f:
            for text in f:
                try:
                    lines += [line] if isinstance(line := json.loads(text), dict) else []
                except json.JSONDecodeError:
                    pass
    return lines


# ---------------------------------------------------------------------------------------------------------------
# Figures, with matplotlib if it is there. Colours are Okabe and Ito's, which colour-blind readers can tell apart.

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#999999"


def figures(out_dir, lines):
    """Write the figures into out_dir; returns a line saying which, or why not."""
    try:
        import matplotlib
    except ImportError:
        return "no figures: they need matplotlib (pip install matplotlib)"
    matplotlib.use("Agg")  # files only, no screen needed
    matplotlib.rcParams.update({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False})
    names = []
    for i, results in enumerate(groups(lines)):
        end = f"_{i + 1}" if i else ""
        names += [save(curves(results), out_dir, f"curves{end}.png"), save(strips(results), out_dir, f"seeds{end}.png")]
    variance = [row for row in read_lines(os.path.join(out_dir, "variance.jsonl")) if row["at"] == "end"]
    laws = read_lines(os.path.join(out_dir, "ppots.jsonl"))
    names += [save(bars(variance), out_dir, "variance.png")] if variance else []
    names += [save(law(laws), out_dir, "ppots.png")] if laws else []
    return "figures: " + ", ".join(names)


def save(figure, out_dir, name):
    path = os.path.join(out_dir, name)
    figure.savefig(path, dpi=130, bbox_inches="tight", metadata={"Software": None})
    return path


def by_compute(results):
    """Method names, one pass before two, the ARM first, the best last."""
    key = "nll" if is_text(next(iter(results.values()))) else "accuracy"
    sign = -1 if key == "nll" else 1
    return sorted(results, key=lambda m: (results[m][0]["passes"], m != "arm", sign * column(results[m], key).mean()))


def shown(results):
    """What to plot, (key, axis label, limits)."""
    return ("nll", "nll, nats per token", None) if is_text(next(iter(results.values()))) else ("accuracy", "accuracy, share of problems", (-0.03, 1.03))


def curves(results):
    """One panel per method: a thin line per seed, the interquartile mean and its 95 % bootstrap band."""
    from matplotlib.figure import Figure

    names, (key, label, limits) = by_compute(results), shown(results)
    columns = min(4, len(names))
    rows = math.ceil(len(names) / columns)
    figure = Figure(figsize=(2.4 * columns + 0.4, 1.75 * rows + 0.5))
    axes = figure.subplots(rows, columns, sharex=False, sharey=True, squeeze=False)
    for ax in axes.flat[len(names) :]:
        ax.axis("off")
    for i, (name, ax) in enumerate(zip(names, axes.flat)):
        lines = results[name]
        at = [{c["step"]: math.nan if c[key] is None else c[key] for c in r["curve"]} for r in lines]
        steps = np.array(sorted(set.intersection(*map(set, at))))
        values = np.array([[curve[step] for step in steps] for curve in at])
        color = BLUE if lines[0]["passes"] == 1 else ORANGE
        ax.plot(steps, values.T, color=color, lw=0.5, alpha=0.35)
        if len(lines) > 1:
            low, high = np.array([interval(iqm, v, n_resamples=2000) for v in values.T]).T
            ax.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
        ax.plot(steps, iqm(values.T), color=color, lw=2)
        ax.set_title(f"{name} ({lines[0]['passes']})", fontsize=9)
        ax.set_xlim(0, steps[-1])
        ax.locator_params(axis="x", nbins=4)
        if limits:
            ax.set_ylim(*limits)
        if i % columns == 0:
            ax.set_ylabel(key)
        if i + columns >= len(names):
            ax.set_xlabel("optimizer steps")
    n = max(map(len, results.values()))
    figure.suptitle(f"{label}: {n} seeds, their interquartile mean and its 95 % band; blue: one forward pass a step, orange: more", fontsize=9)
    figure.tight_layout()
    return figure


def strips(results):
    """Every seed's final result, method by method, grouped by compute; the mean and its 95 % bootstrap interval."""
    from matplotlib.figure import Figure

    names, (key, label, limits) = by_compute(results)[::-1], shown(results)
    figure = Figure(figsize=(8.5, 0.3 * len(names) + 1.2))
    ax = figure.subplots()
    rng = np.random.default_rng(0)
    for y, name in enumerate(names):
        a, color = column(results[name], key), BLUE if results[name][0]["passes"] == 1 else ORANGE
        ax.scatter(a, y + rng.uniform(-0.25, 0.25, len(a)), s=12, color=color, alpha=0.6, lw=0)
        low, high = interval(lambda x: x.mean(-1), a)
        ax.plot([low, high], [y, y], color="black", lw=1.5)
        ax.plot(a.mean(), y, "D", color="white", mec="black", ms=5)
    passes = [results[name][0]["passes"] for name in names]
    ax.axhline(len(names) - passes.count(1) - 0.5, color=GREY, lw=0.8, ls=":") if 0 < passes.count(1) < len(names) else None
    ax.set_yticks(range(len(names)), [f"{name} ({p})" for name, p in zip(names, passes)])
    ax.set_xlabel(f"{label}, at the end of training (a dot per seed; diamond: mean, bar: 95 % interval)")
    ax.set_ylabel("method (forward passes a step)")
    if limits and min(column(rows, key).min() for rows in results.values()) < 0.5:  # where all do well, only the upper end
        ax.set_xlim(*limits)
    return figure


def bars(rows):
    """A, B and C of loss and gradient at the end of training, stacked; a tick where the total times the passes is."""
    from matplotlib.figure import Figure

    rows = [r for r in rows if r["method"] != "arm"][::-1]
    figure = Figure(figsize=(9, 0.26 * len(rows) + 1.3))
    axes = figure.subplots(1, 2, sharey=True)
    unit = {"loss": "variance of the loss, nats²", "gradient": "variance of the gradient (trace)"}
    for ax, what in zip(axes, unit):
        left = np.zeros(len(rows))
        for part, color, hatch in (("A", BLUE, ""), ("B", ORANGE, "////"), ("C", GREY, "")):
            v = np.array([max(0.0, r[what][part]) for r in rows])
            name = {"A": "A masking pattern", "B": "B masking rate", "C": "C data"}[part]
            ax.barh(range(len(rows)), v, left=left, color=color, hatch=hatch, edgecolor="white", lw=0.3, label=name)
            left += v
        ax.plot([r[what]["total"] * r["passes"] for r in rows], range(len(rows)), "k|", ms=9, mew=1.6, label="total × passes")
        ax.set_xlabel(unit[what] + ", per sequence")
        ax.locator_params(axis="x", nbins=5)
    axes[0].set_yticks(range(len(rows)), [r["method"] for r in rows])
    figure.legend(*axes[0].get_legend_handles_labels(), loc="upper center", ncols=4, frameon=False)
    figure.tight_layout(rect=(0, 0, 1, 0.94))
    return figure


def law(lines):
    """P-POTS' p(t) over training: the law that is sampled beside the one that was measured."""
    from matplotlib.figure import Figure

    lines = [line for line in lines if line["method"] == lines[0]["method"]]
    lines = [lines[i] for i in sorted({0, 1, len(lines) // 2, len(lines) - 1} & set(range(len(lines))))]
    cells = len(lines[0]["fitted"])
    s = (np.arange(cells) + 0.5) / cells  # sqrt(t), in which the cells are equal
    figure = Figure(figsize=(2.4 * len(lines) + 0.4, 2.5))
    for i, (ax, line) in enumerate(zip(figure.subplots(1, len(lines), sharey=True, squeeze=False).flat, lines)):
        density = lambda mass: np.array(mass) * cells / (2 * s)
        ax.plot(s**2, density(line["measured"]), color=ORANGE, lw=2.5, alpha=0.6, label="measured")
        ax.plot(s**2, density(line["fitted"]), color=BLUE, lw=1.2, ls="--", label="sampled")
        ax.axhline(1, color=GREY, lw=0.8, ls=":", label="uniform (plain MDM)")
        ax.set(yscale="log", xlim=(0, 1), ylim=(0.2, 8), xlabel="masking rate t")
        ax.set_title(f"step {line['step']}", fontsize=9)
        ax.set_yticks([0.25, 0.5, 1, 2, 4, 8], ["1/4", "1/2", "1", "2", "4", "8"])
        ax.minorticks_off()
        if i == 0:
            ax.set_ylabel("density p(t)")
            ax.legend(fontsize=7, frameon=False)
    figure.suptitle(f"{lines[0]['method']}, seed {lines[0]['seed']}", fontsize=9)
    figure.tight_layout()
    return figure
