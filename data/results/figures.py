"""The pictures of --report, and those of the pages, drawn by `python -m data.results.figures`."""
import json
from pathlib import Path

import numpy as np

import mdm
from data import runs
from data.results import report

try:
    from matplotlib import rc_context
    from matplotlib.animation import PillowWriter
    from matplotlib.figure import Figure
except ImportError:
    Figure = None

HERE = Path(__file__).resolve().parent
BLUE = "#0072B2"  # all colors here are distinct for the color-blind, too
ORANGE = "#D55E00"
FAMILIES = {"clipped": "#CC79A7", "sqrtk": "#56B4E9", "exactk": BLUE, "ppots": "#009E73",
            "mirror": ORANGE, "multi2": "#E69F00", "mdm": "black"}  # fmt: skip
TITLES = {"arm": "autoregressive", "mdm": "plain masked diffusion", "sqrtk": "sqrtk (ours)",
          "ppots_mirror": "P-POTS + MIRROR"}  # fmt: skip
STYLE = {"font.size": 10, "axes.titlesize": 10, "axes.spines.top": False,
         "axes.spines.right": False, "figure.constrained_layout.use": True}  # fmt: skip


def colors(results):
    """The color of each method in results: blue for one pass a step, orange for more."""
    return {line["method"]: BLUE if line["passes"] == 1 else ORANGE for line in results}


def seeds(results):
    """Every run's final score by method, with the mean and its 95 % interval."""
    key = report.score(results)
    color = colors(results)
    order = sorted(color, key=lambda method: color[method] == ORANGE)[::-1]  # 0 is at the bottom
    figure = Figure(figsize=(8, 0.32 * len(order) + 1.2))
    ax = figure.subplots()
    rng = np.random.default_rng(0)
    for method, x in report.wide(results, key)[2].items():
        y = order.index(method)
        jitter = y + rng.uniform(-0.25, 0.25, x.size)
        ax.scatter(x.ravel(), jitter, s=14, color=color[method], alpha=0.6, lw=0)
        mean, low, high = report.t_test(report.sample_of(x))[0]
        ax.plot([low, high], [y, y], color="black", lw=1.5)
        ax.plot(mean, y, "D", color="white", mec="black", ms=5)
    ax.set_yticks(range(len(order)), order)
    if key == "accuracy":
        ax.set_xlim(*np.clip(ax.get_xlim(), -0.02, 1.02))
    ax.set_xlabel(f"final {key} of all runs, mean and interval (blue: one pass; orange: more)")
    return figure


def curves(results, methods=None):
    """The score by step: a panel for each method (else for the first 8), a thin line for a run."""
    key = report.score(results)
    color = colors(results)
    methods = methods or list(color)[:8]
    n_rows = (len(methods) + 3) // 4
    figure = Figure(figsize=(8, 1.9 * n_rows + 0.5))
    panels = figure.subplots(n_rows, 4, sharex=True, sharey=True, squeeze=False).ravel()
    for ax, method in zip(panels, methods):
        ax.set_title(TITLES.get(method, method))
        for line in results:
            if line["method"] == method:
                steps = [at["step"] for at in line["curve"]]
                scores = np.array([at.get(key) for at in line["curve"]], float)  # None becomes nan
                ax.plot(steps, scores, color=color[method], lw=0.7, alpha=0.6)
    for ax in panels[len(methods):]:
        ax.axis("off")
    figure.supxlabel("step")
    figure.supylabel(key)
    return figure


def write(folders):
    """--report: draw seeds.png and curves.png into each folder, and return a line that says where,
    or why not. folders: [(out_dir, settings, results), ...]"""
    if Figure is None:
        return "no figures: they need matplotlib (pip install matplotlib)"
    paths = []
    with rc_context(STYLE):
        for out_dir, _, results in folders:
            for draw in (seeds, curves):
                paths.append(str(Path(out_dir) / f"{draw.__name__}.png"))
                draw(results).savefig(paths[-1], dpi=130)
    return "figures: " + ", ".join(paths)


def animate(figure, path):
    """Let the lines of a figure grow from left to right for 40 frames, and stay for 20."""
    lines = [line for ax in figure.axes for line in ax.lines]
    whole = [line.get_data() for line in lines]
    for ax in figure.axes:
        ax.autoscale(False)
    last = max(x[-1] for x, _ in whole)
    writer = PillowWriter(fps=10)
    with writer.saving(figure, path, dpi=100):
        writer.grab_frame()  # the whole picture first, for a viewer that stands still
        for end in np.linspace(0, 1.5 * last, 60).clip(max=last):
            for line, (x, y) in zip(lines, whole):
                here = min(end, x[-1])
                shown = np.append(x[x < here], here)
                line.set_data(shown, np.interp(shown, x, y))
            writer.grab_frame()


def compute(settings, results):
    """The gain over plain training. Twice the batch and twice the steps cost two passes as well."""
    color = colors(results)
    names = [name for name in color if name not in ("arm", "mdm") and name.isidentifier()]
    gain = {name: report.compare(settings, results, name, "mdm")[0] for name in names}
    names.sort(key=lambda name: (color[name] == BLUE, gain[name]))  # 0 is at the bottom
    figure = Figure(figsize=(8, 0.22 * len(names) + 0.9))
    ax = figure.subplots()
    for y, name in enumerate(names):
        mean, low, high = gain[name]
        is_control = name in ("mdm_batch2", "mdm_steps2")
        paint = "black" if is_control else color[name]
        ax.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", color=paint)
        if is_control:
            ax.axvline(mean, color="black", lw=0.8, ls=":")
    ax.axvline(0, color="black", lw=0.8)
    ax.set_yticks(range(len(names)), names)
    ax.set_xlabel("accuracy minus plain, in points")
    ax.set_title("blue: the cost of plain training; orange: twice; black, dotted: plain at twice")
    return figure


def law(files):
    """The law against the measured noise, in shares of plain's. files: the rows of each file."""
    figure = Figure(figsize=(8, 3.9))
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for ax, at, title in zip(panels, ["start", "end"], ["before training", "after training"]):
        ax.plot([0.1, 1.2], [0.1, 1.2], color="black", lw=0.8)
        for rows, marker in zip(sorted(files, key=lambda rows: rows[0]["n"]), "os^Dv<>P"):
            ax.plot([], [], marker, color="grey", label=f"{rows[0]['n']} tokens")
            plain = rows[0]  # measure() puts it first
            for row in rows:
                if row["method"] != "arm":
                    words = mdm.parse_method(row["method"])
                    family = next((word for word in FAMILIES if word in words), "mdm")
                    x = row[f"{at}_law"] / plain[f"{at}_law"]
                    fill = FAMILIES[family] if row["passes"] == 1 else "none"
                    ax.plot(x, row[at] / plain[at], marker, color=FAMILIES[family], mfc=fill)
        for word, color in FAMILIES.items():
            ax.plot([], [], "_", color=color, label=word, mew=4)
        ax.set(xscale="log", yscale="log", aspect="equal", title=title, xlabel="noise by the law")
    panels[0].set_xticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
    panels[0].set_yticks([0.1, 0.2, 0.5, 1], ["0.1", "0.2", "0.5", "1"])
    panels[0].set_ylabel("measured noise (plain: 1; hollow: two masks)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    return figure


def example():
    """The four tokens of mdm.py's docstring: a mask, its mirror image, and their mean weights."""
    figure = Figure(figsize=(8, 2.4))
    ax = figure.subplots()
    centre = {"ha": "center", "va": "center"}
    r = np.array([0.1, 0.8, 0.4, 0.6])
    for left, title, numbers in [(0, "a mask", r), (5, "its mirror image", 1 - r)]:
        ax.text(left + 1.5, 3, title, weight="bold", **centre)
        for x, number in enumerate(numbers):
            hidden = number < 0.5
            word = "?" if hidden else ["the", "cat", "sat", "down"][x]
            ax.scatter(left + x, 1, s=1050, marker="s", color=BLUE if hidden else "#E0E0E0")
            ax.text(left + x, 2, f"{number:.1f}", **centre)
            ax.text(left + x, 1, word, color="white" if hidden else "black", **centre)
            ax.text(left + x, 0, "2" if hidden else "0", **centre)
    for x in range(10, 14):
        ax.text(x, 0, "1", weight="bold", **centre)
    ax.text(11.5, 1, "their mean,\nat t = 0.5", weight="bold", **centre)
    for y, name in enumerate(["weight", "hidden below 0.5", "random number"]):
        ax.text(-1, y, name, ha="right", va="center")
    ax.set(xlim=(-4.2, 14), ylim=(-0.5, 3.5))
    ax.axis("off")
    return figure


def main():
    """Draw the pictures of the pages, from the lines beside this file."""
    fine_tuned = runs.read_results(HERE / "finetune")
    measured = []
    for path in sorted(HERE.glob("*/variance.jsonl")):
        measured.append([json.loads(line) for line in path.open()])
    with rc_context(STYLE):
        pictures = {
            "noise": curves(runs.read_results(HERE / "add3"), list(TITLES)),
            "compute": compute(runs.read_settings(HERE / "finetune"), fine_tuned),
            "law": law(measured),
            "example": example(),
        }
        for name, figure in pictures.items():
            figure.savefig(HERE / f"{name}.png", dpi=130)
        animate(pictures["noise"], HERE / "noise.gif")


if __name__ == "__main__":
    main()
