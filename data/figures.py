"""The figures, with matplotlib if it is there. `python -m data.figures` draws the method itself."""
import os

import numpy as np
import torch

import mdm
from data import report

BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#BBBBBB"  # which the colour-blind can tell apart
STYLE = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}


def write(out_dir, groups):
    """Draw the results of each group, and how they depend on the batch size; says where."""
    try:
        from matplotlib import rc_context
    except ImportError:
        return "no figures: they need matplotlib (pip install matplotlib)"
    figures, alike = {}, {}
    with rc_context(STYLE):
        for i, results in enumerate(groups):
            figures[f"seeds{i + 1 if i else ''}.png"] = seeds(results)
            alike.setdefault(report.heading(results, but="batch_size"), []).append(results)
        several = [part for part in alike.values() if len(set(map(report.batch_size, part))) > 1]
        for i, part in enumerate(several):
            figures[f"batches{i + 1 if i else ''}.png"] = batches(part)
        for name, figure in figures.items():
            figure.savefig(os.path.join(out_dir, name), dpi=130, bbox_inches="tight")
    return "figures: " + ", ".join(os.path.join(out_dir, name) for name in figures)


def seeds(results):
    """Every seed's final result by method; the mean and its 95 % interval."""
    from matplotlib.figure import Figure

    key = report.score(results)
    rows = [(name, rows[0]["passes"], report.column(rows, key)) for name, rows in results.items()]
    rows = sorted(rows, key=lambda row: (-row[1], -row[2].mean()))  # two passes below one
    figure = Figure(figsize=(8.5, 0.3 * len(rows) + 1.2))
    ax, rng = figure.subplots(), np.random.default_rng(0)
    for y, (_, passes, a) in enumerate(rows):
        at, color = y + rng.uniform(-0.25, 0.25, len(a)), BLUE if passes == 1 else ORANGE
        ax.scatter(a, at, s=12, color=color, alpha=0.6, lw=0)
        ax.plot(report.interval(report.mean, a), [y, y], color="black", lw=1.5)
        ax.plot(a.mean(), y, "D", color="white", mec="black", ms=5)
    ax.set_yticks(range(len(rows)), [f"{name} ({passes})" for name, passes, _ in rows])
    ax.set_xlabel(f"final {key} by method (passes a step): seeds, mean, 95 % interval")
    return figure


def batches(groups):
    """Final results against the batch size: every seed, and a line through each method's means."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 4))
    ax, key = figure.subplots(), report.score(groups[0])
    names = list(dict.fromkeys(name for results in groups for name in results))
    for i, name in enumerate(names):
        found = {report.batch_size(g): report.column(g[name], key) for g in groups if name in g}
        sizes, columns = zip(*sorted(found.items()))
        x = np.array(sizes) * 1.03 ** (i - len(names) / 2)  # side by side
        passes = next(g[name][0]["passes"] for g in groups if name in g)
        style = {"color": f"C{i}", "ls": "-" if passes == 1 else "--", "marker": "o", "ms": 5}
        ax.plot(x, [a.mean() for a in columns], label=f"{name} ({passes})", lw=1, **style)
        for at, a in zip(x, columns):
            ax.scatter(np.full(len(a), at), a, s=7, alpha=0.5, lw=0, color=style["color"])
    sizes = sorted({report.batch_size(results) for results in groups})
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, sizes)
    ax.set_xlabel("batch size (batch2: twice that)")
    ax.set_ylabel(f"final {key}: seeds, mean")
    ax.legend(title="method (passes a step)", frameon=False, fontsize=8)
    return figure


def method():
    """The method in one picture: one sequence of one step, drawn by the code that trains."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    text, prompt = "47*86=282+3760=4042", 6
    n = len(text) - prompt
    counts = torch.arange(1, n + 1)
    H = counts.double() * np.log(12)  # of a model that knows nothing but 12 characters
    table = mdm.ppots_table(counts, H.view(1, 1, n), n, "grid")
    t, weight = (x.item() for x in mdm.ppots_sample(torch.tensor([[0.4]]).double(), table))
    r = torch.rand(1, n, generator=torch.Generator().manual_seed(4))
    p = mdm.rate_to_p_mask(t)
    masks = mdm.mirror(r) < p

    figure = Figure(figsize=(9, 3.2))
    left, right = figure.subplots(1, 2, width_ratios=[1, 2.4])
    density = table[0] * mdm.N_CELLS / (2 * mdm.CELLS.sqrt())
    left.plot(mdm.CELLS.numpy(), density.numpy(), color=ORANGE, label="P-POTS' p(t)")
    left.axhline(1, color=GREY, label="plain: uniform")
    left.axvline(t, color="black", lw=1, ls=":")
    left.text(t + 0.02, 1.9, f"t = {t:.2f},\nweight 1/p(t) = {weight:.2f}")
    left.set(ylim=(0, 4), xlim=(0, 1), xlabel="masking rate t", title="B: at which rate?")
    left.legend(frameon=False, loc="upper right", fontsize=8)

    right.axis("off")
    right.set(xlim=(-8, len(text)), ylim=(-1.4, 5.4))
    rows = [("C: which data?   x0", 4.4, None), ("A: which tokens?   r < p", 1.2, masks[0]),
            ("MIRROR   1 - r < p", 0, masks[1])]  # fmt: skip
    for label, y, mask in rows:
        right.text(-0.4, y + 0.4, label, ha="right", va="center")
        for i, char in enumerate(text):
            hidden = i >= prompt and mask is not None and bool(mask[i - prompt])
            color = GREY if i < prompt else ORANGE if hidden else "white"
            box = Rectangle((i + 0.05, y), 0.9, 0.8, facecolor=color, edgecolor="black", lw=0.6)
            right.add_patch(box)
            right.text(i + 0.5, y + 0.4, "?" if hidden else char, ha="center", va="center")
    right.bar(np.arange(n) + prompt + 0.5, 1.6 * r[0].numpy(), 0.6, 2.4, color=BLUE)
    right.text(-0.4, 3.2, "uniform numbers   r", ha="right", va="center")
    for name, level in {"p": p, "1 - p": 1 - p}.items():
        right.plot([prompt, len(text)], [2.4 + 1.6 * level] * 2, color="black", lw=1, ls=":")
        right.text(prompt - 0.2, 2.4 + 1.6 * level, name, ha="right", va="center")
    loss = "loss of each mask: 1/p(t) * 1/(n p) * sum of -log p(x0_i | xt) over the hidden tokens"
    right.text(len(text), -0.9, loss, ha="right", va="center", fontsize=8)
    return figure


if __name__ == "__main__":
    from matplotlib import rc_context

    with rc_context(STYLE):
        method().savefig("data/results/method.png", dpi=130, bbox_inches="tight")
