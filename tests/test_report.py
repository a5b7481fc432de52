"""The statistics against closed forms, the report against results of known content."""
import json
import math

import numpy as np
import pytest

import train
from data import report


def test_iqm():
    assert report.iqm(np.array([100.0, 1, 2, -50])) == 1.5  # the middle half
    assert report.iqm(np.arange(8.0)) == 3.5 and report.iqm(np.array([7.0])) == 7
    five = np.array([0.0, 10, 20, 30, 1000])  # a quarter is 1.25 seeds: the 2nd and 4th count 3/4
    assert report.iqm(five) == pytest.approx((0.75 * 10 + 20 + 0.75 * 30) / 2.5)
    assert report.iqm(np.stack([five, five + 1])).tolist() == pytest.approx([20, 21])


def test_sd_and_improvement():
    assert report.sd(np.array([1.0, 2, 3, 4])) == pytest.approx(math.sqrt(5 / 3)) and math.isnan(report.sd(np.array([1.0])))
    a, b = np.array([1.0, 2.0]), np.array([0.0, 1.0, 3.0])
    assert report.improvement(a, b) == pytest.approx((1 + 0.5 + 0 + 1 + 1 + 0) / 6)
    assert report.improvement(a, b) + report.improvement(b, a) == pytest.approx(1)
    assert report.sd_ratio(np.array([0.0, 2]), np.array([0.0, 1])) == 2


def test_rank_correlation():
    x = np.array([3.0, 1, 2, 4])
    assert report.rank_correlation(x, np.exp(x)) == pytest.approx(1) and report.rank_correlation(x, -x) == pytest.approx(-1)
    assert report.rank_correlation([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert report.rank_correlation([1, 1, 2], [5, 7, 9]) == pytest.approx(1.5 / (1.5 * 2) ** 0.5)  # ranks 0.5, 0.5, 2: ties share


def test_prediction():
    results = {m: [line(m, s, a) for s in range(3)] for m, a in zip(("mdm", "ppots", "mirror", "exactk", "arm"), (0.1, 0.2, 0.4, 0.3, 0.9))}
    variance = [{"at": at, "dataset": "add3", "method": m, "gradient": {"total": v}} for at, totals in
                (("initialisation", (9, 8, 1, 2, 0)), ("end", (9, 5, 3, 1, 0))) for m, v in zip(results, totals)]  # fmt: skip
    said = report.prediction(results, variance)
    assert "over 4 methods" in said and "-1.00 at initialisation, -0.80 at the plain MDM's final weights" in said
    assert report.prediction(results, [row for row in variance if row["method"] != "ppots"]) is None


def test_noise_floor_is_binomial():
    rng = np.random.default_rng(0)
    accuracy = rng.binomial(512, 0.7, 20_000) / 512
    assert report.noise_floor(accuracy) == pytest.approx(report.sd(accuracy), rel=0.03)


def test_the_interval_of_a_mean():
    """For the mean the bootstrap law is known: its SD is that of the sample over sqrt(n), nearly normal for n = 200."""
    x = np.random.default_rng(1).normal(3, 2, 200)
    low, high = report.interval(lambda v: v.mean(-1), x)
    half = 1.96 * x.std() / 200**0.5
    assert low == pytest.approx(x.mean() - half, abs=0.03) and high == pytest.approx(x.mean() + half, abs=0.03)
    assert report.interval(lambda v: v.mean(-1), x) == (low, high)  # a fixed generator
    # two of three values equal: a resample's median is the lone one when it is drawn at least twice, in 7 of 27
    assert report.interval(lambda v: np.median(v, -1), np.array([0.0, 0.0, 1.0])) == (0, 1)
    assert report.interval(lambda v: np.median(v, -1), np.array([0.0, 0.0, 1.0]), level=0.4) == (0, 0)


def test_the_interval_of_a_difference_is_paired():
    x = np.random.default_rng(2).normal(0, 5, 30)
    assert report.interval(lambda a, b: (a - b).mean(-1), x + 1, x) == pytest.approx((1, 1))


def test_the_interval_covers():
    """In 95 % of samples of 32, within what 300 samples can show and a little less, as bootstrap intervals are known to."""
    rng = np.random.default_rng(3)
    hits = 0
    for sample in rng.normal(0, 1, (300, 32)):
        low, high = report.interval(report.sd, sample, n_resamples=500)
        hits += low <= 1 <= high
    assert 0.84 < hits / 300 < 0.98


def line(method, seed, accuracy, nll=0.1, passes=1, **more):
    curve = [{"step": s, "loss": 1.0, "accuracy": (accuracy or 0) * s / 20, "nll": nll} for s in (10, 20)]
    return {"method": method, "seed": seed, "dataset": "add3", "steps": 20, "batch_size": 8, "lr": 0.003, "n_layer": 2, "n_embd": 64, "eps": 0.001,
            "accuracy": accuracy, "nll": nll, "passes": passes, "forward_tokens": 10, "seconds": 1.0, "curve": curve, **more}  # fmt: skip


LINES = ([line("arm", s, 1.0) for s in range(4)] + [line("mdm", s, a) for s, a in enumerate([0.0, 0.1, 0.9, 1.0])]
         + [line("mdm_batch2", s, 0.5, passes=2, batch_size=16) for s in range(4)]
         + [line("ppots_mirror", s, 1.0, passes=2, ppots_fit="epr", diverged=17 if s == 2 else None) for s in range(4)]
         + [line("mdm", 0, 0.3, lr=0.1)])  # fmt: skip


def test_groups_hold_what_can_be_compared():
    first, second = report.groups(LINES)
    assert list(first) == ["arm", "mdm", "mdm_batch2", "ppots_mirror"] and list(second) == ["mdm"]
    assert [r["seed"] for r in first["mdm"]] == [0, 1, 2, 3]


def test_groups_tell_a_methods_own_settings_apart():
    group, = report.groups([line("ppots", s, 0.5, ppots_fit=fit) for fit in ("epr", "grid") for s in (1, 2)] + [line("mdm", 7, 0.1)])
    assert list(group) == ["ppots", "ppots (2)", "mdm"] and len(group["ppots"]) == len(group["ppots (2)"]) == 2
    assert "grid" in report.heading(group) and report.verdict({"ppots_mirror": group["ppots"], "mdm": group["mdm"]}) is None  # no common seed
    assert "nan" not in report.statistics(group, "accuracy").split("\n")[2]


def test_a_lost_seed_counts_as_the_worst():
    lost = [line("mdm", s, None if s == 0 else 1.0, None if s == 0 else 1.0) for s in range(3)]
    assert report.column(lost, "accuracy").tolist() == [0, 1, 1] and report.column(lost, "nll").tolist() == [math.inf, 1, 1]
    assert report.sd(report.column(lost, "nll")) == math.inf and report.sd(np.array([1.0, 3])) == pytest.approx(2**0.5)
    assert report.interval(lambda x: x.mean(-1), report.column(lost, "nll"))[1] == math.inf


def test_steps_to():
    assert report.steps_to(line("mdm", 0, 1.0)) == 20 and report.steps_to(line("mdm", 0, 1.0), 0.5) == 10
    assert report.steps_to(line("mdm", 0, 0.2)) == math.inf


def test_tables():
    results = report.groups(LINES)[0]
    table, statistics, verdict = report.table(results), report.statistics(results, "accuracy"), report.verdict(results)
    assert " 2/4" in table and "2 (step 17)" in table
    row = next(r for r in statistics.splitlines() if r.startswith("mdm "))
    assert "0.500 [0.050,0.950]" in row  # the mean; of four draws it is 0 or .025 in 5 of 256, .05 in 6 more
    row = next(r for r in report.statistics(results, "accuracy", "mdm_batch2").splitlines() if r.startswith("ppots_mirror "))
    assert "0.500 [0.500,0.500]" in row and "1.000 [1.000,1.000]" in row  # minus the base, always; better than it, always
    assert "+50.0 points" in verdict and "mdm_batch2 +50.0" in verdict and "does not beat" in verdict
    assert report.verdict({"arm": results["arm"]}) is None
    text = [{**line(m, s, 0.0, nll), "dataset": "a.txt", "bits_per_char": nll / math.log(2), "nll_se": 0.01}
            for m, nll in (("mdm", 2.0), ("ppots_mirror", 1.5)) for s in range(3)]  # fmt: skip
    results = report.groups(text)[0]
    assert "2.8854" in report.table(results) and "beats" in report.verdict(results) and "-0.500 nats" in report.verdict(results)
    assert "1.000 [1.000,1.000]" in report.statistics(results, "nll")  # less nll is better


def test_figures(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="figures are an optional extra")
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES) + '{"torn', encoding="utf-8")
    parts = {"A": 1.0, "B": 0.5, "C": 0.2, "total": 1.7, "mean": 1.0}
    rows = [{"at": at, "dataset": "add3", "method": m, "passes": 1, "loss": parts, "gradient": parts} for at in ("initialisation", "end") for m in ("mdm", "ppots")]
    (tmp_path / "variance.jsonl").write_text("".join(json.dumps(x) + "\n" for x in rows), encoding="utf-8")
    laws = [{"method": "ppots", "seed": 42, "step": s, "fitted": [1 / 128] * 128, "measured": [1 / 128] * 128} for s in (0, 5)]
    (tmp_path / "ppots.jsonl").write_text("".join(json.dumps(x) + "\n" for x in laws), encoding="utf-8")
    assert train.main(["--report", f"--out_dir={tmp_path}"]) == 0
    assert "learning rate 0.1" in capsys.readouterr().out
    assert train.main(["--report", f"--out_dir={tmp_path}", "--baseline=pposts_mirror"]) == 0
    assert "base: ppots_mirror" in capsys.readouterr().out
    assert train.main(["--report", f"--out_dir={tmp_path}", "--baseline=multi2"]) == 2 and "arm, mdm, mdm_batch2" in capsys.readouterr().err
    for name in ("curves", "curves_2", "seeds", "seeds_2", "variance", "ppots"):
        assert (tmp_path / f"{name}.png").stat().st_size > 5000


def test_the_report_without_matplotlib(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES), encoding="utf-8")
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert train.main(["--report", f"--out_dir={tmp_path}"]) == 0
    assert "need matplotlib" in capsys.readouterr().out and not list(tmp_path.glob("*.png"))
    assert train.main(["--report", f"--out_dir={tmp_path / 'nothing'}"]) == 2
