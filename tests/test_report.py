"""The report by hand: every number of its tables from a few shuffled lines, and its figures."""
import json
import math
import random

import numpy as np
import pytest

from data import runs
from data.results import figures, report

pytestmark = pytest.mark.filterwarnings("error::RuntimeWarning")
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
    """Quantiles of Student's t from scipy.stats.t.ppf(0.975, df), rounded up to df 7."""
    known = {1: 12.706, 2: 4.303, 3: 3.182, 7: 2.365, 8: 2.306004, 15: 2.131450, 200: 1.971896}
    for df, t in known.items():
        sample = np.arange(df + 1.0)
        mean, low, high = report.interval(sample)
        error = np.std(sample, ddof=1) / (df + 1) ** 0.5
        assert mean == df / 2
        assert ((high - mean) / error, (mean - low) / error) == pytest.approx((t, t), abs=1e-4)
    assert np.isnan(report.interval(np.array([1.0]))[1])
    assert np.isnan(report.interval(np.array([]))).all()
    # Wilson's, of 16 in 32: 16 -+ 1.96 * sqrt(8 + .96) / (1 + 3.84 / 32) = 16 -+ 5.24.
    assert report.solved(np.repeat([0.9, 0.899], 16)) == "16 [11, 21] of 32"
    assert report.solved(np.full(32, 0.1)) == "0 [0, 3] of 32"
    assert report.solved(np.full(4, 1.0)) == "4 [2, 4] of 4"


def test_pairs_are_of_the_same_seed():
    """By hand: 1.0 - .2, .8 - .6, .9 - .1 are .8, .2, .8. Any other pairing has another SD."""
    lines = shuffled(arm=ARM, mdm=MDM)
    starts, seeds, columns = report.wide(lines, "accuracy")
    assert (starts, seeds) == ([""], [1, 2, 3])
    assert columns["arm"].tolist() == [[1.0, 0.8, 0.9]]
    assert columns["mdm"].tolist() == [[0.2, 0.6, 0.1]]
    difference, _, size = report.compare(SETTINGS, lines, "arm", "mdm")
    half = 4.303 * np.std([80, 20, 80], ddof=1) / 3**0.5
    assert difference == pytest.approx((60, 60 - half, 60 + half))
    assert size == "seeds: 3"
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


def test_the_table_by_hand():
    many = shuffled(two=dict(zip(range(5), [0.9, 0.95, 0.7, 0.85, 1.0])), mdm={4: 0.3} | MDM)
    many = [line | {"passes": 2 if line["method"] == "two" else 1} for line in many]
    many.sort(key=lambda line: line["method"], reverse=True)
    text = report.table(SETTINGS, many, "mdm")
    assert text.index("\nmdm") < text.index("\ntwo")  # by passes
    row = cells(text, "two")
    assert row["passes"] == "2" and row["solved"] == "3 [1, 4] of 5"
    assert row["mean accuracy"] == "0.880 [0.737, 1.023]"  # 2.776 * .1151 / sqrt(5) = .143
    assert row["SD"] == "0.115" and row["worst"] == "0.700"
    assert row["minus mdm"] == "+57.5 [7.0, 108.0]"  # of 75, 10, 75, 70: 3.182 * 31.75 / 2 = 50.5
    assert row["gradclip"] == "25%" and row["seconds"] == "10" and row["nll"] == "1.000"
    assert cells(report.table(SETTINGS, many, "two"), "mdm")["minus two"] == "-57.5 [-108.0, -7.0]"
    assert cells(report.table(SETTINGS, many, "none"), "two")["minus none"] == "-"
    few = report.table(SETTINGS, [line for line in many if line["seed"] in (1, 2)], "mdm")
    assert (cells(few, "two")["seed 1"], cells(few, "two")["seed 2"]) == ("0.950", "0.700")
    assert "solved" not in cells(few, "two") and "worst" not in cells(few, "two")
    text = report.table(SETTINGS, text_only([line(seed=s, nll=s / 2) for s in range(1, 6)]), "mdm")
    assert cells(text, "mdm")["worst"] == "2.500" and "solved" not in cells(text, "mdm")


def test_pretrainings_are_the_units():
    """Differences by start: 30 and 20 in a, 0 in b, hence 25 and 0."""
    lines = [line("mdm", 1, 0.4, start="a"), line("mdm", 2, 0.6, start="a"),
             line("mdm", 1, 0.5, start="b"), line("x", 1, 0.7, start="a"),
             line("x", 2, 0.8, start="a"), line("x", 1, 0.5, start="b")]  # fmt: skip
    difference, ratio, size = report.compare(SETTINGS, lines[::-1], "x", "mdm")
    half = 12.706 * 12.5
    assert difference == pytest.approx((12.5, 12.5 - half, 12.5 + half))
    assert size == "pretrainings: 2"
    assert not math.isnan(ratio[0])
    assert report.wide(lines[::-1], "nll")[0] == ["a", "b"]
    sd, df = report.spread(np.array([[0.4, 0.6, 0.8], [0.5, 0.5, np.nan], [np.nan] * 3]))
    assert (sd, df) == (pytest.approx((0.08 / 3) ** 0.5), 3)
    assert "seed 1" not in report.table(SETTINGS, lines, "mdm")
    # A missing cell.
    lines = shuffled(arm={seed: ARM[seed] for seed in (3, 1)}, mdm=MDM)
    difference, _, size = report.compare(SETTINGS, lines, "arm", "mdm")
    assert (difference[0], size) == (pytest.approx(80), "seeds: 2")
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
    assert cells(report.table(SETTINGS, lines, "mdm"), "mdm")["gradclip"] == "25% (1 diverged)"
    lines = text_only(lines)
    assert report.compare(SETTINGS, lines, ours, "mdm")[0] == (0.0, 0.0, 0.0)
    assert report.interval(np.array([1.0, math.inf]))[0] == math.inf
    text = report.table(SETTINGS, lines, "mdm")
    assert "inf" in text and "nan" not in text + report.verdict(SETTINGS, lines[1:4])


def test_the_verdict():
    by_seed = {1: 0.9, 2: 0.9, 3: 0.8}
    said = report.verdict(SETTINGS, shuffled(ppots_mirror=by_seed, mdm=MDM, multi2=by_seed))
    assert "mdm: +56.7 [-0.7, 114.0] points of accuracy (seeds: 3), not told apart;" in said
    assert "multi2: +0.0 [0.0, 0.0] points of accuracy (seeds: 3), not told apart;" in said
    assert "add mdm_batch2,mdm_steps2 to" in said
    clear = report.verdict(SETTINGS, shuffled(ppots_mirror=by_seed, mdm={1: 0.1, 2: 0.1, 3: 0.1}))
    assert "mdm: +76.7 [62.3, 91.0] points of accuracy (seeds: 3);" in clear
    same = report.verdict(SETTINGS, shuffled(ppots_mirror=MDM, mdm=MDM))
    assert "SD ratio, of the logit of the accuracy: 1.00 [0.17, 5.98]" in same
    pair = [line("ppots_mirror", nll=0.5), line("mdm", nll=0.75)]
    one = report.verdict(SETTINGS, pair)
    assert "+0.0 points of accuracy (seeds: 1);" in one and "nan" not in one
    assert "mdm: -0.250 nats per token" in report.verdict(SETTINGS, text_only(pair))
    assert "add ppots_mirror,mdm,mdm_batch2" in report.verdict(SETTINGS, [line("arm")])


def test_lines_are_read_or_named(tmp_path, capsys):
    """Damaged lines are named once by number, and written back by the next run."""
    path = tmp_path / "results.jsonl"
    good = json.dumps(line(note="a\u2028b\x85c"), ensure_ascii=False)
    damaged = ['{"method": "md', "[1]", '{"start": "", "seed": 3}', "7"]
    content = "\n".join([good, "", *damaged, good]) + "\r\n"
    path.write_text(content, encoding="utf-8-sig", newline="")
    lines, texts = runs.read_lines(path)
    assert [line["note"] for line in lines] == ["a\u2028b\x85c"] * 2
    assert texts == damaged
    said = capsys.readouterr().err.splitlines()
    assert all(f"line {i} of {path}" in text for i, text in zip((3, 4, 5, 6), said))
    assert len(said) == 4
    runs.save_lines(tmp_path, [line(seed=9)])
    lines, texts = runs.read_lines(path)
    assert [line["seed"] for line in lines] == [1, 9]  # one line for each run
    assert texts == damaged
    path.write_bytes(b"\xff\n" + good.encode())
    assert len(runs.read_lines(path)[0]) == 1


def test_folders(tmp_path, capsys, monkeypatch):
    folder = write_folder(tmp_path / "[a]", [line(nll=1.0), line(seed=2, nll=5.0), line(nll=2.0)])
    assert [line["nll"] for line in runs.read_results(folder)] == [2.0, 5.0]
    (tmp_path / "[a]" / "settings.json").unlink()
    for bad in (str(tmp_path), folder, write_folder(tmp_path / "empty", [])):
        with pytest.raises(ValueError, match="has no results"):
            report.main([bad], "mdm")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    lines = shuffled(ppots_mirror=ARM, mdm=MDM)
    assert report.main([write_folder(tmp_path / "b", lines)], "mdm") == 0
    said = capsys.readouterr().out
    for words in ("batch_size 8", "minus mdm", "1.59 [0.27, 9.52]", "pip install matplotlib"):
        assert words in said


def test_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    lines = shuffled(ppots_mirror=ARM, mdm=MDM) + [line("mdm", 4, nll=None, diverged=3)]
    small = write_folder(tmp_path / "small", lines)
    large = write_folder(tmp_path / "large", text_only(lines), batch_size=64)
    report.main([small], "mdm")
    report.main([large], "mdm")
    for name in ("small/seeds.png", "small/curves.png", "large/seeds.png", "large/curves.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    folders = [(d, SETTINGS, runs.read_results(d)) for d in (small, large)]
    assert "some have none" in figures.write(folders)
    axes = figures.seeds([folders[0]] * 2).axes
    assert [ax.get_title() for ax in axes] == ["small"] * 2
    names = [label.get_text() for label in axes[0].get_yticklabels()]
    assert names == ["mdm", "ppots_mirror"] or names == ["ppots_mirror", "mdm"]
    lost = line("mdm", 4, curve=[{"step": 10, "accuracy": 0.0}])
    curves = figures.curves(shuffled(mdm=MDM) + [lost] + [line(str(i)) for i in range(8)])
    assert len(curves.axes) == 8 and curves.axes[0].lines[0].get_color() == figures.BLUE
    mean = figures.curves(shuffled(mdm=MDM)).axes[0].lines[-1]
    assert mean.get_xydata() == pytest.approx(np.array([[0, 0], [20, 0.3]]))
    assert len(curves.axes[0].lines[-1].get_xydata()) == 0  # no step has all four runs
    low, high = report.interval(np.array([0.2, 0.6, 0.1]))[1:]
    drawn = figures.seeds([("a", SETTINGS, shuffled(mdm=MDM))]).axes[0].lines[0]
    assert drawn.get_xdata() == pytest.approx([low, high])
    (tmp_path / "small" / "seeds.png").unlink()
    (tmp_path / "small" / "seeds.png").mkdir()
    assert "cannot be written" in figures.write(folders[:1])
