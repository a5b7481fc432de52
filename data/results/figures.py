"""The figures of --report, drawn with matplotlib if it is installed."""
import os

import numpy as np

from data.results import report

BLUE = "#0072B2"  # The colour-blind can tell this blue from this orange.
ORANGE = "#D55E00"
STYLE = {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}


def write(folders):
    """Draw [(out_dir, settings, results), ...] and return a line that says where, or why not.
    seeds.png has a panel for each folder. It goes to the first folder, like curves.png."""
    try:
        from matplotlib import rc_context
    except ImportError:
        return "no figures: they need matplotlib (pip install matplotlib)"
    if len({report.score(results) for _, _, results in folders}) > 1:
        return "no figure: some of these folders have accuracies, and some have none"
    paths = []
    with rc_context(STYLE):
        for name, figure in [("seeds", seeds(folders)), ("curves", curves(folders[0][2]))]:
            paths.append(os.path.join(folders[0][0], f"{name}.png"))
            try:
                figure.savefig(paths[-1], dpi=130, bbox_inches="tight")
            except OSError as error:
                return f"no figures: {paths[-1]} cannot be written ({error.strerror})"
    return "figures: " + ", ".join(paths)


def colors(results):
    """The color of each method in results: blue for one pass a step, orange for two."""
    return {line["method"]: BLUE if line["passes"] == 1 else ORANGE for line in results}


def seeds(folders):
    """Every run's final score by method, with the mean and its 95 % interval; a panel a folder."""
    from matplotlib.figure import Figure

    key = report.score(folders[0][2])
    color = {}
    for _, _, results in folders:
        color |= colors(results)
    order = sorted(color, key=lambda method: color[method] == ORANGE)[::-1]  # from the bottom
    figure = Figure(figsize=(4 + 4 * len(folders), 0.32 * len(order) + 1.2), layout="constrained")
    panels = figure.subplots(1, len(folders), sharex=True, sharey=True, squeeze=False)[0]
    rng = np.random.default_rng(0)
    for ax, (out_dir, _, results) in zip(panels, folders):
        columns = report.wide(results, key)[2]
        for y, method in enumerate(order):
            if method in columns:
                x = columns[method]
                jitter = y + rng.uniform(-0.25, 0.25, x.size)
                ax.scatter(x.ravel(), jitter, s=14, color=color[method], alpha=0.6, lw=0)
                mean, low, high = report.interval(report.units(x))
                ax.plot([low, high], [y, y], color="black", lw=1.5)
                ax.plot(mean, y, "D", color="white", mec="black", ms=5)
        if len(folders) > 1:
            ax.set_title(os.path.basename(os.path.normpath(out_dir)), fontsize=10)
    panels[0].set_yticks(range(len(order)), order)
    figure.supxlabel(f"final {key} of every run, mean and 95 % interval (blue: one pass a step; "
                     "orange: two)", fontsize=10)  # fmt: skip
    return figure


def curves(results):
    """The score by step: a panel per method (8 at most), a thin line per run, the mean in bold."""
    from matplotlib.figure import Figure

    key = report.score(results)
    color = colors(results)
    methods = list(color)[:8]
    n_rows = (len(methods) + 3) // 4
    n_columns = min(4, len(methods))
    figure = Figure(figsize=(max(4, 2.1 * n_columns), 1.9 * n_rows + 0.5), layout="constrained")
    panels = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, method in zip(panels, methods):
        ax.set_title(method, fontsize=9)
        numbers = {}  # of all seeds, by step
        lines = [line for line in results if line["method"] == method]
        for line in lines:
            points = [(at["step"], at[key]) for at in line["curve"] if at.get(key) is not None]
            if points:
                ax.plot(*zip(*points), color=color[method], lw=0.6, alpha=0.5)
            for step, number in points:
                numbers.setdefault(step, []).append(number)
        whole = [step for step in sorted(numbers) if len(numbers[step]) == len(lines)]
        ax.plot(whole, [np.mean(numbers[step]) for step in whole], color="black", lw=2)
    for ax in panels[len(methods):]:
        ax.axis("off")
    figure.supxlabel("step", fontsize=10)
    figure.supylabel(key, fontsize=10)
    return figure
