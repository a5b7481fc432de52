"""The report by hand: every number of its tables from a few shuffled lines, and its figures."""
import json
import math
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data import runs
from data.results import figures, report

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"dataset": "add3", "steps": 20, "batch_size": 8, "n_test": 100}
ARM = {3: 0.9, 1: 1.0, 2: 0.8}  # accuracies by seed
MDM = {1: 0.2, 2: 0.6, 3: 0.1}


def line(method="mdm", seed=1, accuracy=0.5, nll=1.0, start="", **changes):
    curve = [{"step": 0, "loss": None, "accuracy": 0.0, "nll": 2.0},
             {"step": 20, "loss": 1.5, "accuracy": accuracy, "nll": nll}]  # fmt: skip
    run = {"method": method, "seed": seed, "start": start, "passes": 1, "curve": curve}
    run |= {"accuracy": accuracy, "nll": nll, "diverged": None, "gradclip": 0.25}
    return run | {"seconds": 6.0, "seeds_trained_together": 3} | changes


def shuffled(**methods):
    """A line for each seed of each method, in a random order that is always the same."""
    lines = [line(name, seed, x) for name, scores in methods.items() for seed, x in scores.items()]
    random.Random(1).shuffle(lines)
    return lines


def text_only(lines):
    return [{k: v for k, v in line.items() if k != "accuracy"} for line in lines]


def cells(text, method):
    """The cells of a method's row by their heads."""
    split = [[cell.strip() for cell in row.split("  ") if cell.strip()] for row in text.split("\n")]
    (row,) = [row for row in split if row[0] == method]
    return dict(zip(split[0], row))


def write_folder(folder, lines, **changes):
    folder.mkdir(exist_ok=True)
    (folder / "settings.json").write_text(json.dumps(SETTINGS | changes))
    (folder / "results.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(folder)


def test_intervals():
    """Quantiles of Student's t from scipy.stats.t.ppf(0.975, df)."""
    known = {1: 12.706205, 2: 4.302653, 3: 3.182446, 4: 2.776445, 7: 2.364624, 8: 2.306004,
             15: 2.131450, 200: 1.971896}  # fmt: skip
    for df, t in known.items():
        sample = np.arange(df + 1.0)
        mean, low, high = report.t_test(sample)[0]
        error = np.std(sample, ddof=1) / (df + 1) ** 0.5
        assert mean == df / 2
        assert ((high - mean) / error, (mean - low) / error) == pytest.approx((t, t), rel=1e-6)
    assert np.isnan(report.t_test(np.array([1.0]))[0][1])
    assert np.isnan(report.t_test(np.array([]))[0]).all()
    # Wilson's, of 16 in 32: 16 -+ 1.96 * sqrt(8 + .96) / (1 + 3.84 / 32) = 16 -+ 5.24.
    assert report.solved(np.repeat([0.9, 0.899], 16)) == "16 [11, 21] of 32"
    assert report.solved(np.full(32, 0.1)) == "0 [0, 3] of 32"
    assert report.solved(np.full(4, 1.0)) == "4 [2, 4] of 4"


def sample_with(t, df):
    """A sample of df + 1 numbers, with a mean of t standard errors."""
    sample = np.arange(df + 1.0)
    return sample - sample.mean() + t * np.std(sample, ddof=1) / (df + 1) ** 0.5


@pytest.mark.parametrize("t, df, p", [
    (2, 1, 0.2951672), (2, 2, 0.1835034), (0.5, 3, 0.6514480), (5, 3, 0.01539244),
    (5, 7, 0.001565278), (2, 15, 0.06394501), (5, 15, 0.0001583695), (2, 200, 0.04685319),
])  # fmt: skip
def test_p_values(t, df, p):
    """2 * scipy.stats.t.sf(t, df)."""
    assert report.t_test(sample_with(t, df))[1] == pytest.approx(p, rel=1e-5)
    assert report.t_test(sample_with(-t, df))[1] == pytest.approx(p, rel=1e-5)


def test_p_values_at_the_edge():
    """The interval and p are of one mind: an interval that just touches 0 has a p of .05."""
    assert report.t_test(sample_with(3.182446, 3))[1] == pytest.approx(0.05, rel=1e-5)
    assert report.t_test(np.zeros(4))[1] == 1
    assert report.t_test(np.array([1, 1, 1, 1.01]))[1] < 1e-5
    for nothing in ([], [1.0], [1.0, math.inf], [-math.inf, math.inf], [0.1, 0.1, 0.1]):
        (_, low, high), p = report.t_test(np.array(nothing))
        assert math.isnan(low) and math.isnan(high) and p == 1


def test_holm_by_hand():
    """.005 * 4, .01 * 3, .03 * 2, and .04 * 1, which is below the one before."""
    adjusted = report.holm({"a": 0.01, "b": 0.04, "c": 0.03, "d": 0.005})
    assert adjusted == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06, "d": 0.02})
    assert report.holm({"a": 0.6, "b": 0.7}) == {"a": 1, "b": 1}
    assert report.holm({"a": 0.04}) == {"a": 0.04}


def test_pairs_are_of_the_same_seed():
    """By hand: 1.0 - .2, .8 - .6, .9 - .1 are .8, .2, .8. Any other pairing has another SD."""
    lines = shuffled(arm=ARM, mdm=MDM)
    starts, seeds, columns = report.wide(lines, "accuracy")
    assert (starts, seeds) == ([""], [1, 2, 3])
    assert columns["arm"].tolist() == [[1.0, 0.8, 0.9]]
    assert columns["mdm"].tolist() == [[0.2, 0.6, 0.1]]
    difference, _, n, p = report.compare(SETTINGS, lines, "arm", "mdm")
    half = 4.302653 * np.std([80, 20, 80], ddof=1) / 3**0.5
    assert difference == pytest.approx((60, 60 - half, 60 + half))
    assert n == 3
    assert p == pytest.approx(0.0954660, rel=1e-5)  # t = 3 with 2 degrees of freedom
    # The ratio of spreads is that of logits.
    a = np.log([100.5 / 0.5, 80.5 / 20.5, 90.5 / 10.5])
    b = np.log([20.5 / 80.5, 60.5 / 40.5, 10.5 / 90.5])
    ratio, low, high = report.compare(SETTINGS, lines, "arm", "mdm")[1]
    assert ratio == pytest.approx(np.std(a) / np.std(b))
    assert ratio / low == pytest.approx(39.0**0.5, rel=0.06)  # scipy.stats.f.ppf(0.975, 2, 2)
    assert high / ratio == pytest.approx(39.0**0.5, rel=0.06)
    lines = text_only([line("a", 1, nll=1.0), line("a", 2, nll=math.e), line("b", 1, nll=3.0),
                       line("b", 2, nll=3 * math.e**2)])  # fmt: skip
    assert report.compare(SETTINGS, lines, "a", "b")[1][0] == pytest.approx(0.5)


def test_seeds_that_agree_by_chance_have_no_interval_and_no_ratio():
    agreed = {seed: 17 / 512 for seed in (1, 2, 3)}
    settings = SETTINGS | {"n_test": 512}
    for baseline in ("mdm", "arm"):
        row = cells(report.table(settings, shuffled(mdm=agreed, arm=ARM), baseline), "mdm")
        assert row["mean accuracy"] == "0.033" and row["SD ratio"] == "-"


def test_the_table_by_hand():
    many = shuffled(both=dict(zip(range(5), [0.9, 0.95, 0.7, 0.85, 1.0])), mdm={4: 0.3} | MDM)
    many = [line | {"passes": 2 if line["method"] == "both" else 1} for line in many]
    many.sort(key=lambda line: line["method"], reverse=True)
    text = report.table(SETTINGS, many, "mdm")
    assert text.index("\nmdm") < text.index("\nboth")  # by passes
    row = cells(text, "both")
    assert row["passes"] == "2"
    assert row["reach .9"] == "3 [1, 4] of 5"
    assert row["mean accuracy"] == "0.880 [0.737, 1.023]"  # 2.776 * .1151 / sqrt(5) = .143
    assert row["minus mdm"] == "+57.5 [7.0, 108.0]"  # of 75, 10, 75, 70: 3.182 * 31.75 / 2 = 50.5
    assert row["SD ratio"] == report.show(report.compare(SETTINGS, many, "both", "mdm")[1], 2)
    assert row["diverged"] == "0"
    mdm = cells(text, "mdm")
    assert (mdm["minus mdm"], mdm["SD ratio"]) == ("-", "-")
    assert cells(report.table(SETTINGS, many, "both"), "mdm")["minus both"] == "-57.5 [-108.0, -7.0]"
    assert cells(report.table(SETTINGS, many, "none"), "both")["minus none"] == "-"


def test_few_seeds_have_a_column_each():
    lines = shuffled(two={1: 0.95, 2: 0.7}, mdm=MDM)
    row = cells(report.table(SETTINGS, lines, "mdm"), "two")
    assert [row[f"seed {seed}"] for seed in (1, 2, 3)] == ["0.950", "0.700", "-"]
    assert "reach .9" not in row
    text = report.table(SETTINGS, text_only([line(seed=s, nll=s / 2) for s in range(1, 6)]), "mdm")
    assert cells(text, "mdm")["mean nll"] == "1.500 [0.518, 2.482]"  # 2.776 * .7906 / sqrt(5)


def test_pretrainings_are_the_units():
    """Differences by start: 30 and 20 in a, 0 in b, hence 25 and 0."""
    lines = [line("mdm", 1, 0.4, start="a"), line("mdm", 2, 0.6, start="a"),
             line("mdm", 1, 0.5, start="b"), line("x", 1, 0.7, start="a"),
             line("x", 2, 0.8, start="a"), line("x", 1, 0.5, start="b")]  # fmt: skip
    difference, ratio, n, p = report.compare(SETTINGS, lines[::-1], "x", "mdm")
    half = 12.706205 * 12.5
    assert difference == pytest.approx((12.5, 12.5 - half, 12.5 + half))
    assert (n, p) == (2, pytest.approx(0.5))  # t = 1 with one degree of freedom
    assert not math.isnan(ratio[0])
    assert report.wide(lines[::-1], "nll")[0] == ["a", "b"]
    sd, df = report.spread(np.array([[0.4, 0.6, 0.8], [0.5, 0.5, np.nan], [np.nan] * 3]))
    assert (sd, df) == (pytest.approx((0.08 / 3) ** 0.5), 3)
    assert "seed 1" not in report.table(SETTINGS, lines, "mdm")
    assert "reach .9" not in report.table(SETTINGS, lines, "mdm")  # runs of one start are no sample
    # The verdict has the same unit.
    renamed = [run | {"method": {"x": "ppots_mirror"}.get(run["method"], "mdm")} for run in lines]
    row = cells(report.verdict(SETTINGS, renamed), "ppots_mirror minus mdm")
    assert (row["n"], row["p"]) == ("2", "0.5")


def test_a_missing_run():
    lines = shuffled(arm={seed: ARM[seed] for seed in (3, 1)}, mdm=MDM)
    difference, ratio, n, _ = report.compare(SETTINGS, lines, "arm", "mdm")
    assert (difference[0], n) == (pytest.approx(80), 2)
    pairs = shuffled(arm={seed: ARM[seed] for seed in (3, 1)}, mdm={1: MDM[1], 3: MDM[3]})
    assert ratio == report.compare(SETTINGS, pairs, "arm", "mdm")[1]  # seed 2 is left out of both
    row = cells(report.table(SETTINGS, lines, "mdm"), "arm")
    assert (row["seed 1"], row["seed 2"], row["mean accuracy"][:5]) == ("1.000", "-", "0.950")


def test_a_diverged_seed_is_the_worst():
    ours = "ppots_mirror"
    lines = [line(seed=1, accuracy=0.9), line(seed=2, accuracy=0.9, diverged=7),
             line(seed=3, nll=None), line(ours, 1, 0.9), line(ours, 2, 0.9, diverged=1),
             line(ours, 3, nll=math.nan)]  # fmt: skip
    assert report.wide(lines, "accuracy")[2]["mdm"].tolist() == [[0.9, 0.0, 0.5]]
    assert report.wide(lines, "nll")[2]["mdm"].tolist() == [[1.0, math.inf, math.inf]]
    assert report.wide(lines, "nll")[2][ours].tolist() == [[1.0, math.inf, math.inf]]
    assert cells(report.table(SETTINGS, lines, "mdm"), "mdm")["diverged"] == "1"
    lines = text_only(lines)
    difference, _, n, p = report.compare(SETTINGS, lines, ours, "mdm")
    assert (difference, n, p) == ((0, 0, 0), 3, 1)
    assert report.t_test(np.array([1.0, math.inf]))[0][0] == math.inf
    text = report.table(SETTINGS, lines, "mdm")
    assert "inf" in text
    assert "nan" not in text + report.verdict(SETTINGS, lines[1:4])


def test_the_verdict():
    by_seed = {1: 0.9, 2: 0.9, 3: 0.8}
    said = report.verdict(SETTINGS, shuffled(ppots_mirror=by_seed, mdm=MDM, multi2=by_seed))
    row = cells(said, "ppots_mirror minus mdm")
    assert row["role"] == "primary"
    assert row["n"] == "3"
    assert row["points of accuracy"] == "+56.7 [-0.7, 114.0]"
    assert row["p"] == "0.051"  # of 70, 30, 70: t = 4.25
    assert row["Holm"] == "-"
    row = cells(said, "ppots_mirror minus multi2")
    assert row["role"] == "exploratory"
    assert (row["points of accuracy"], row["p"]) == ("+0.0 [0.0, 0.0]", "1")
    assert "add --method=clipped,mdm_batch2,mdm_steps2,sqrtk" in said
    assert "does not mean that they are equal" in said
    pair = [line("ppots_mirror", nll=0.5), line("mdm", nll=0.75)]
    row = cells(report.verdict(SETTINGS, pair), "ppots_mirror minus mdm")
    assert (row["n"], row["p"], row["points of accuracy"]) == ("1", "-", "+0.0")
    row = cells(report.verdict(SETTINGS, text_only(pair)), "ppots_mirror minus mdm")
    assert row["nats per token"] == "-0.250"
    assert report.verdict(SETTINGS, [line("arm")]).startswith("To fill in the comparisons, add")


def test_the_family_is_corrected_and_the_primary_comparison_is_not():
    """Differences to ppots_mirror of 10 +- d have t = 10 sqrt(3) / d. sqrtk minus clipped is not
    there: it counts as a test with p = 1. So the smallest p is multiplied by four."""
    ours = {1: 0.9, 2: 0.9, 3: 0.9}
    lines = shuffled(ppots_mirror=ours, sqrtk=ours, mdm={1: 0.8, 2: 0.78, 3: 0.82},
                     mdm_batch2={1: 0.8, 2: 0.79, 3: 0.81},
                     mdm_steps2={1: 0.8, 2: 0.75, 3: 0.85})  # fmt: skip
    said = report.verdict(SETTINGS, lines)
    rows = {b: cells(said, f"{a} minus {b}") for a, b in [
        ("ppots_mirror", "mdm_batch2"), ("ppots_mirror", "mdm_steps2"), ("sqrtk", "mdm")]}
    p = {name: float(row["p"]) for name, row in rows.items()}
    assert p == {"mdm_batch2": 0.0033, "mdm": 0.013, "mdm_steps2": 0.074}
    holm = {name: float(row["Holm"]) for name, row in rows.items()}
    assert holm == {"mdm_batch2": 0.013, "mdm": 0.039, "mdm_steps2": 0.15}
    assert [row["role"] for row in rows.values()] == ["family"] * 3
    primary = cells(said, "ppots_mirror minus mdm")
    assert (primary["p"], primary["Holm"]) == ("0.013", "-")


def test_a_line_may_hold_any_character(tmp_path):
    """Some characters of Unicode end a line elsewhere, but not here."""
    content = json.dumps(line(note="a\u2028b\x85c"), ensure_ascii=False) + "\n"
    (tmp_path / "results.jsonl").write_text(content, encoding="utf-8")
    runs.save_lines(str(tmp_path), [line(seed=9)])
    lines = runs.read_results(str(tmp_path))
    assert [line["seed"] for line in lines] == [1, 9]
    assert lines[0]["note"] == "a\u2028b\x85c"


def test_folders(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "[a]", [line(nll=1.0), line(seed=2, nll=5.0), line(nll=2.0)])
    assert [line["nll"] for line in runs.read_results(folder)] == [2.0, 5.0]
    (tmp_path / "[a]" / "settings.json").unlink()
    for bad in (str(tmp_path), folder, write_folder(tmp_path / "empty", [])):
        with pytest.raises(ValueError, match="has no results"):
            report.main([bad], "mdm")
    monkeypatch.setattr(figures, "Figure", None)
    lines = shuffled(ppots_mirror=ARM, mdm=MDM)
    assert report.main([write_folder(tmp_path / "b", lines)], "mdm") == 0
    said = capsys.readouterr().out
    for words in ("batch_size 8", "minus mdm", "1.59 [0.27, 9.52]", "pip install matplotlib"):
        assert words in said


def test_the_report_does_without_matplotlib():
    script = "import sys; sys.modules['matplotlib'] = None; from data.results import figures; "
    script += "print(figures.write([]))"
    said = subprocess.check_output([sys.executable, "-c", script], text=True, cwd=ROOT)
    assert "pip install matplotlib" in said


# ---- Pictures


def drawn(figure):
    """The figure as its axes, after a look that nothing fails when it is painted."""
    figure.canvas.draw()
    return figure.axes


def test_the_figures_of_a_report(tmp_path):
    pytest.importorskip("matplotlib")
    lines = shuffled(ppots_mirror=ARM, mdm=MDM) + [line("mdm", 4, nll=None, diverged=3)]
    small = write_folder(tmp_path / "small", lines)
    large = write_folder(tmp_path / "large", text_only(lines), batch_size=64)
    report.main([small, large], "mdm")
    for name in ("small/seeds.png", "small/curves.png", "large/seeds.png", "large/curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_every_run_is_in_the_figures():
    pytest.importorskip("matplotlib")
    lines = shuffled(mdm=MDM)
    (ax,) = drawn(figures.seeds(lines))
    assert sorted(ax.collections[0].get_offsets()[:, 0]) == [0.1, 0.2, 0.6]
    low, high = report.t_test(np.array([0.2, 0.6, 0.1]))[0][1:]
    assert ax.lines[0].get_xdata() == pytest.approx([low, high])
    two = [line("two", passes=2), line("one", passes=1)]
    names = drawn(figures.seeds(two))[0].get_yticklabels()
    assert [name.get_text() for name in names] == ["two", "one"]  # from the bottom
    lost = line("mdm", 4, curve=[{"step": 0, "accuracy": 0.0}, {"step": 20, "accuracy": None}])
    axes = drawn(figures.curves([*lines, lost, *(line(str(i)) for i in range(8))]))
    assert len(axes) == 8
    ends = [x.get_ydata()[-1] for x in axes[0].lines]
    assert ends[:3] == [line["accuracy"] for line in lines] and math.isnan(ends[3])
    axes = drawn(figures.curves(shuffled(sqrtk=ARM, mdm=MDM), ["mdm", "sqrtk"]))
    assert [ax.get_title() for ax in axes[:2]] == ["plain masked diffusion", "sqrtk (ours)"]
    assert [len(ax.lines) for ax in axes[:2]] == [3, 3]


def test_the_animation_grows_and_stays(tmp_path):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    longer = line("mdm", 4, curve=[{"step": 0, "accuracy": 0.0}, {"step": 40, "accuracy": 1.0}])
    figure = figures.curves([*shuffled(mdm=MDM), longer], ["mdm"])
    before = [x.get_xydata() for x in figure.axes[0].lines]
    figures.animate(figure, tmp_path / "a.gif")
    after = [x.get_xydata() for x in figure.axes[0].lines]
    assert all(np.array_equal(x, y) for x, y in zip(before, after))  # all of it in the last frame
    with image.open(tmp_path / "a.gif") as gif:
        times = []
        for i in range(gif.n_frames):
            gif.seek(i)
            times.append(gif.info["duration"])
    assert len(times) > 20
    assert sum(times) == 6100  # the whole picture comes first, for a moment
    assert times[-1] >= 2000


def test_compute_shows_gains_over_plain():
    pytest.importorskip("matplotlib")
    lines = shuffled(arm=ARM, mdm=MDM, sqrtk={1: 0.3, 2: 0.7, 3: 0.3},
                     mdm_batch2={1: 0.9, 2: 0.9, 3: 0.8},
                     mirror={1: 0.4, 2: 0.8, 3: 0.2})  # fmt: skip
    two = {"mdm_batch2", "mirror"}
    lines = [line | {"passes": 2 if line["method"] in two else 1} for line in lines]
    (ax,) = drawn(figures.compute(SETTINGS, lines))
    names = [x.get_text() for x in ax.get_yticklabels()]
    assert names == ["mirror", "mdm_batch2", "sqrtk"]  # from the bottom: one pass is on top
    points = [bar.lines[0].get_xdata()[0] for bar in ax.containers]
    assert points == pytest.approx([50 / 3, 170 / 3, 40 / 3])
    assert ax.lines[-1].get_xdata()[0] == 0


PLAIN_LAW = {"method": "mdm", "passes": 1, "n": 4, "start_law": 8, "end_law": 8, "start": 4,
             "end": 2}  # fmt: skip


def test_the_law_is_drawn_in_shares():
    pytest.importorskip("matplotlib")
    row = PLAIN_LAW | {"method": "sqrtk", "start_law": 4, "end_law": 2, "start": 1, "end": 1}
    row |= {"passes": 2}
    axes = drawn(figures.law([[PLAIN_LAW, row], [PLAIN_LAW, row]]))
    for ax, point in zip(axes, [(0.5, 0.25), (0.25, 0.5)]):
        marks = [x for x in ax.lines if len(x.get_xydata()) == 1]
        assert [tuple(x.get_xydata()[0]) for x in marks] == [(1, 1), point] * 2
        assert [x.get_markerfacecolor() == "none" for x in marks] == [False, True] * 2  # hollow


def test_the_pages_pictures(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(figures, "HERE", tmp_path)
    monkeypatch.setattr(figures, "animate", lambda figure, path: path.touch())  # it takes time
    lines = shuffled(mdm=MDM, ppots_mirror=ARM)
    write_folder(tmp_path / "add3", lines)
    write_folder(tmp_path / "finetune", lines)
    (tmp_path / "finetune" / "variance.jsonl").write_text(json.dumps(PLAIN_LAW) + "\n")
    figures.main()
    found = {path.name for path in tmp_path.glob("*.*")}
    pictures = {f"{name}.png" for name in ("noise", "compute", "law", "example")}
    assert found == pictures | {"noise.gif"}


def test_the_example_is_that_of_the_essay():
    pytest.importorskip("matplotlib")
    texts = drawn(figures.example())[0].texts
    rows = {}  # by height, from left to right
    for text in sorted(texts, key=lambda text: text.get_position()[0]):
        rows.setdefault(text.get_position()[1], []).append(text.get_text())
    assert " ".join(rows[2]) == "random number 0.1 0.8 0.4 0.6 0.9 0.2 0.6 0.4"
    assert " ".join(rows[1]) == "hidden below 0.5 ? cat ? down the ? sat ? their mean,\nat t = 0.5"
    assert " ".join(rows[0]) == "weight 2 0 2 0 0 2 0 2 1 1 1 1"
