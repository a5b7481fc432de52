"""Corners that the other test files leave out: a second setting or word beside a first, defaults
and flags, rows whose values differ, several prompts."""
import itertools
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch

import mdm
import sample
import train
from data import runs, text
from data.results import report, variance
from test_estimators import draw, float64, seeded
from test_faults import ASK, SUMS, TEXT, in_a_new_directory, read_lines, refused, results, run  # noqa: F401
import test_model
import test_report


# ---- mdm


@pytest.mark.parametrize("rest", ["mdm", "ppots", "clipped", "exactk"])
def test_strata_join_every_law_of_rates(rest):
    u = 1 - torch.rand(3, 16, generator=seeded())
    r = torch.rand(3, 16, 5, generator=seeded(1))
    for got, wanted in zip(draw(f"{rest}_strats", u, r), draw(rest, mdm.stratify(u), r)):
        assert torch.equal(got, wanted)


def test_the_epr_fit_knows_eps():
    counts = torch.arange(1, 5)
    H = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    q = (mdm.second_moment(counts, H, mdm.CELLS, 4, 0.2) * mdm.CELLS).sqrt()
    q = q / q.sum()
    assert (q * (q / mdm.ppots_table(counts, H, 4, eps=0.2)).log()).sum() < 0.01


def test_the_demonstrations_columns_are_in_order():
    """Two independent masks halve the noise A, and leave B and C."""
    said = subprocess.check_output([sys.executable, mdm.__file__], text=True)
    found = re.findall(r"^(\w+) +\d +[\d.]+" + r" +(\d+)%" * 5 + "$", said, re.M)
    percent = {method: list(map(int, numbers)) for method, *numbers in found}
    A, B, C = percent["mdm"][2:]
    assert percent["multi2"][2:] == [pytest.approx(A / 2, abs=1), pytest.approx(B, abs=1), C]


def test_different_lengths_have_the_median_curve():
    t = float64([0.1, 0.3, 0.9])
    n = torch.tensor([8, 16, 64])
    counts = 1 + (torch.linspace(0, 1, 16) * (n[:, None] - 1)).round().long()
    wanted = 4 * (1 + (1 - t) / (16 * t))
    torch.testing.assert_close(mdm.second_moment(counts, 2 * counts, t, n, eps=0), wanted)


@pytest.mark.parametrize("method", ["exactk", "sqrtk"])
def test_the_last_u_hides_all(method):
    """u = 1 hides all n tokens, though rounding may leave the last CDF value below 1."""
    for n in range(1, 65):
        mask, weight = draw(method, torch.ones(2), torch.rand(2, n))
        assert mask.all() and torch.isfinite(weight).all()


def test_the_law_knows_eps():
    assert mdm.noise_in_arms("mdm", 4, eps=0.1) == pytest.approx(math.log(10) / 0.9, rel=0.005)


def test_confidence_is_that_of_the_drawn_token():
    """At a temperature of 3 the model draws tokens. It keeps the one that it finds likeliest."""
    model = test_model.make()
    x = test_model.tokens(3, 9, 9)
    x[..., 4:] = 7  # hidden
    first = next(mdm.generate(model, x, test_model.POS, None, 3.0, generator=seeded()))
    logits = model(x, test_model.POS)
    warm = (logits / 3).softmax(-1).flatten(0, -2)
    token = warm.multinomial(1, generator=seeded()).view(3, 9, 5)
    chance = logits.softmax(-1).gather(-1, token[..., None])[..., 0]
    kept = (first[..., 4:] < 7).int().argmax(-1)
    assert torch.equal(kept, chance.argmax(-1))


@pytest.mark.parametrize("causal", [False, True])
def test_both_branches_are_residual(causal):
    """Both branches of a block are added to what comes in: without them a token is its embedding."""
    model = test_model.make(causal)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "proj" in name:
                p.zero_()
    idx = test_model.tokens(3, 2, 9)
    seeds = torch.arange(3)[:, None, None]
    x = model.wte[seeds, idx] + model.wpe[:, None]
    wanted = model.head(model.ln_f(x))[:, :, test_model.POS]
    torch.testing.assert_close(model(idx, test_model.POS), wanted)


def test_no_pair_of_words_is_quietly_one_of_them():
    """No method of two words is quietly one of them, or plain."""
    u = 1 - torch.rand(1, 16, generator=seeded())
    for a, b in itertools.combinations(mdm.MASKING, 2):
        try:
            mdm.parse_method(f"{a}_{b}")
        except ValueError:
            continue
        found = {}
        for name in ("mdm", a, b, f"{a}_{b}"):
            shape = (2, 1, 16, 5) if "multi2" in name else (1, 16, 5)
            mask, weight = draw(name, u, torch.rand(shape, generator=seeded(1)))
            found[name] = (mask * weight).mean(0)
        for name in ("mdm", a, b):
            assert not torch.equal(found[name], found[f"{a}_{b}"]), (name, a, b)


def test_shapes_are_checked():
    u = torch.ones(4)
    right = {"is_rare": torch.ones(4, 3) > 0, "response": torch.ones(4, 3) > 0}
    for name in right:
        wrong = right | {name: torch.ones(3) > 0}
        with pytest.raises(ValueError, match=f"{name} has the shape"):
            mdm.draw_masks("isad", u, torch.rand(4, 3), **wrong)
    with pytest.raises(TypeError, match="positional"):  # a response could pass for a table
        mdm.draw_masks("sqrtk", u, torch.rand(4, 3), torch.ones(4, 3) > 0)


@pytest.mark.parametrize("fit", ["epr", "grid"])
def test_a_better_model_has_the_same_table(fit):
    """A model that is better by a factor has the same table."""
    counts = torch.arange(1, 5)
    H = torch.tensor([[1.0, 6.0, 27.0, 108.0]]).double()
    wanted = mdm.ppots_table(counts, H, 4, fit)
    better = mdm.ppots_table(counts, 1e-6 * H, 4, fit)
    torch.testing.assert_close(better, wanted, rtol=1e-4, atol=0)


# ---- train


def test_resume_knows_the_starting_weights(capsys):
    """A fine-tuning that was stopped before its first result line, and a start of the same name."""
    run("--out_dir=pre")
    run("--init_from=pre", "--out_dir=f")
    os.remove("f/results.jsonl")
    run("--out_dir=other/pre", "--lr=0.1")
    capsys.readouterr()
    run("--init_from=other/pre", "--out_dir=f", "--resume")
    assert " step " in capsys.readouterr().out  # it does not go on from the first start's weights
    assert len(list(Path("f/mdm").glob("*.pt"))) == 2


def test_totals_are_of_the_steps_done():
    """Shares and totals are of the steps done, not of those asked for."""
    run("--until_nll=9", "--grad_clip=1e-6", "--steps=400")
    line = results("o")["mdm", "", 1]
    assert line["curve"][-1]["step"] == 2 and line["gradclip"] == 1
    assert line["forward_tokens"] == 2 * 8 * 9


def test_gradclip_counts_clipped_steps_only():
    run("--grad_clip=1e6")
    assert results("o")["mdm", "", 1]["gradclip"] == 0


def test_a_fine_tuning_has_a_folder_of_its_own():
    run("--out_dir=pre")
    run("--out_dir=", "--init_from=pre")
    (folder,) = Path("out").iterdir()
    assert folder.name.endswith("_from_pre")


def test_settings_say_how_many_problems_there_are():
    run("--n_test=3000")
    assert runs.read_settings("o")["n_test"] == 1000


def test_the_eta_is_of_the_rest():
    """Three of four steps took 90 seconds."""
    point = {"step": 3, "loss": [1.0], "nll": [1.5], "nll_se": [9.0]}
    state = {"step": 3, "steps": 4, "done": False, "seconds": 90.0, "curve": [point]}
    line = train.progress("mdm", state)
    assert line.split("mdm ")[1] == "step     3/4  loss 1.00  nll 1.50  ETA 0:30"


def test_chunks_do_not_depend_on_the_seeds():
    def numbers(seeds):
        return train.random_numbers(frozenset(), seeds, 0, 2**12, 4, 10**5, False, "cpu")

    for alone, together, _ in zip(numbers([7]), numbers([1, 2, 7]), range(40)):
        for a, b in zip(alone, together):
            assert torch.equal(a[0], b[2])


def test_compile_compiles(monkeypatch):
    compiled = Mock(side_effect=lambda f: f)
    monkeypatch.setattr(torch, "compile", compiled)
    run("--compile", "--out_dir=c")
    compiled.assert_called_once_with(train.sequence_loss)
    run()
    compiled.assert_called_once()


def test_every_method_is_compiled(monkeypatch):
    """torch keeps a few programs of a function, here one, and then stops compiling it."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(torch._dynamo.config, "cache_size_limit", 1)
    for name in ("fail_on_cache_limit_hit", "fail_on_recompile_limit_hit"):  # old and new torch
        if hasattr(torch._dynamo.config, name):
            monkeypatch.setattr(torch._dynamo.config, name, True)
    run("--compile", "--method=mdm,sqrtk,arm")


def test_report_takes_folders_and_a_baseline(monkeypatch):
    told = Mock(return_value=0)
    monkeypatch.setattr(report, "main", told)
    assert train.main(["--report", "--out_dir=a,b", "--baseline=arm"]) == 0
    told.assert_called_once_with(["a", "b"], "arm")


def test_many_seeds_are_different():
    for n in (3, 33, 50, 1000):
        seeds = train.parse_args([f"--n_seeds={n}"])[2]
        assert len(set(seeds)) == len(seeds) == n and seeds[:3] == [42, 731, 20231]
    assert train.parse_args(["--n_seeds=5"])[2][3:] == [0, 1]


def test_text_has_its_own_defaults():
    cfg = train.parse_args(["--dataset=shakespeare_char", "--steps=7"])[0]
    assert (cfg.n_layer, cfg.n_embd, cfg.batch_size, cfg.steps) == (4, 128, 12, 7)
    cfg = train.parse_args([])[0]
    assert (cfg.n_layer, cfg.n_embd, cfg.batch_size, cfg.steps) == (2, 64, 64, 1000)


def test_pilots_keep_to_their_number_and_budget():
    cfg = train.parse_args(["--method=ppots", "--ppots_refits=7"])[0]
    for steps in (7, 13, 100, 1000):
        every, n_pilot = train.pilot_size(cfg, steps, 640, 3)
        assert math.ceil(steps / every) <= 7, steps
        assert math.ceil(steps / every) * n_pilot * 3 <= 0.01 * 3 * steps * 640


def test_sums_come_in_epochs_and_text_in_windows(monkeypatch):
    true = train.random_numbers
    seen = []
    monkeypatch.setattr(train, "random_numbers", lambda *a: seen.append(a[-2]) or true(*a))
    run("--steps=1")
    assert not train.main([*TEXT, "--steps=1", "--out_dir=t"])
    assert seen == [True, False]


def test_seed_0_is_a_seed(capsys):
    run("--seeds=3,1")
    assert "seed 0 of mdm" in refused(capsys, "--init_from=o", "--init_seed=0", "--out_dir=f")


def test_the_tokenizer_is_used(monkeypatch):
    made = Mock(side_effect=ValueError("asked"))
    monkeypatch.setattr(text, "make", made)
    with pytest.raises(SystemExit):
        train.main([*TEXT, "--tokenizer=gpt2"])
    made.assert_called_once_with("a.txt", 12, "gpt2")


# ---- runs


def test_the_newest_checkpoint_counts():
    """Seed 1 was trained twice: with seed 5, and alone."""
    run("--seeds=5,1")
    run("--seeds=1")
    paths = list(Path("o/mdm").glob("*.pt"))
    assert len(paths) == 2
    for newest in paths:
        for path in paths:
            os.utime(path, (9, 10 if path == newest else 9))
        wanted = torch.load(newest, weights_only=True)["seeds"]
        assert runs.find_checkpoint("o", "mdm", 1)["seeds"] == wanted


def test_the_newer_line_wins(tmp_path):
    for nll in (1.0, 2.0):
        runs.save_lines(tmp_path, [test_report.line(nll=nll)])
    assert [line["nll"] for line in runs.read_results(tmp_path)] == [2.0]


def test_a_failed_write_leaves_the_good_file(tmp_path, monkeypatch):
    path = tmp_path / "a"
    path.write_text("good")

    def write_half(file, content):
        file.write_text("half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_half)
    with pytest.raises(SystemExit):
        runs.write(str(path), b"new")
    assert path.read_text() == "good" and not list(tmp_path.glob("*.tmp"))


def test_a_fingerprint_is_of_all_parts():
    a = np.arange(3)
    contents = [(a, ["x"]), (a, ["y"]), (a,), (a + 1, ["x"])]
    assert len({runs.fingerprint(*parts) for parts in contents}) == 4


def test_divergence_is_looked_up_for_the_seed():
    run("--seeds=3,1")
    (path,) = Path("o/mdm").glob("ckpt*.pt")
    content = torch.load(path, weights_only=True)
    for diverged, healthy, steps in [(3, 1, [5, 0]), (1, 3, [0, 5])]:
        content["state"]["diverged"] = torch.tensor(steps)
        torch.save(content, path)
        assert runs.find_checkpoint("o", "mdm", healthy)["weights"]
        with pytest.raises(SystemExit):
            runs.find_checkpoint("o", "mdm", diverged)


def test_a_missing_setting_is_another_setting(capsys):
    run()
    settings = runs.read_settings("o")
    settings.pop("beta2")
    Path("o/settings.json").write_text(json.dumps(settings))
    assert "beta2 None, not 0.98" in refused(capsys)


# ---- report


def test_the_sd_ratio_is_of_pairs():
    """Two more seeds of one method change nothing."""
    found = []
    for more in ({}, {4: 0.99, 5: 0.01}):
        lines = test_report.shuffled(arm=test_report.ARM, mdm=test_report.MDM | more)
        found.append(report.compare(test_report.SETTINGS, lines, "arm", "mdm"))
    assert found[0] == found[1]


# ---- variance


@pytest.mark.parametrize("common", [SUMS, TEXT])
def test_variance_is_that_of_the_settings(common, monkeypatch, capsys):
    """P-POTS, with another eps and the other fit, before and after training."""
    monkeypatch.setattr(variance, "METHODS", [])
    monkeypatch.setattr(variance, "N_SEQUENCES", 6)
    flags = [*common, "--method=mdm,ppots,strats", "--lr=0.1", "--eps=0.2", "--ppots_fit=grid"]
    assert not train.main([*flags, "--variance"])
    said = capsys.readouterr().out
    assert "Not measured: strats (" in said
    rows = {row["method"]: row for row in read_lines("o/variance.jsonl")}
    shown = [line.split() for line in said.splitlines() if line.startswith("ppots  ")][-1]
    names = ("start_law", "start", "end_law", "end")
    wanted = [rows["ppots"][name] / rows["mdm"][name] for name in names]
    assert [float(cell) for cell in shown[2:]] == pytest.approx(wanted, abs=6e-4)

    cfg, _, _ = train.parse_args(flags)
    data = train.load_data(cfg, ["mdm"])
    x0 = data.test[:6]
    first, pos = train.build(cfg, "mdm", [1], data, "cpu")
    last, _, _ = sample.load_model("o", "mdm", 1)
    n = len(pos)
    for at, model in (("start", first), ("end", last)):
        draws = seeded(1)
        r = torch.rand(1, 6, min(n, 16), n, generator=draws)
        counts, H = mdm.pilot(model, x0[None], pos, r)
        table = mdm.ppots_table(counts, H, n, "grid", 0.2)[0]
        if common is SUMS:
            total = mdm.exact_variance("ppots", mdm.grams(model, x0, pos), n, table, 0.2)["total"]
        else:
            total, _ = variance.sampled_variance(model, x0, pos, "ppots", draws, table, 0.2)
            plain, _ = variance.sampled_variance(model, x0, pos, "mdm", seeded(1), None, 0.2)
            assert rows["mdm"][at] == pytest.approx(plain, rel=1e-5)
        assert rows["ppots"][at] == pytest.approx(total, rel=1e-5)


def test_variance_of_a_fine_tuning_starts_at_its_start(monkeypatch):
    """Of a fine-tuning with lr 0 the start is the end."""
    monkeypatch.setattr(variance, "METHODS", [])
    monkeypatch.setattr(variance, "N_SEQUENCES", 6)
    run("--out_dir=pre", "--lr=0.1", "--seeds=3")
    run("--init_from=pre", "--lr=0", "--weight_decay=0", "--seeds=7", "--variance")
    (row,) = read_lines("o/variance.jsonl")
    assert row["start"] == row["end"]


# ---- sample


def sampled(capsys, *flags):
    capsys.readouterr()
    assert sample.main([*ASK, *flags]) == 0
    return capsys.readouterr().out.splitlines()


def test_prompts_of_different_gaps_are_all_filled(capsys):
    run("--method=arm,mdm")
    said = sampled(capsys, "--prompt=12+34=", "--prompt=12+34=0_5", "--prompt=73+00=07")
    assert [len(line) for line in said] == [9, 9, 9] and "_" not in "".join(said)
    assert said[1][:7] == "12+34=0" and said[1][8] == "5" and said[2].startswith("73+00=07")
    assert not train.main([*TEXT, "--out_dir=t"])
    said = "\n".join(sampled(capsys, "--out_dir=t", "--prompt=12 _", "--prompt=12 __een"))
    assert "_" not in said and "een" in said


def test_every_step_is_shown(capsys):
    run("--method=arm")
    said = sampled(capsys, "--method=arm", "--prompt=12+34=", "--show")
    assert [line.find("_") for line in said] == [6, 7, 8, -1]  # an ARM goes from left to right


def test_the_newest_folder_is_sampled_from(capsys):
    run("--out_dir=")
    capsys.readouterr()
    assert sample.main(["--method=mdm", "--device=cpu", "--prompt=12+34="]) == 0
    assert capsys.readouterr().out.startswith("12+34=")


def test_many_kinds_of_characters_have_ids_of_their_own(tmp_path):
    content = "".join(chr(0x4E00 + i) for i in range(300)) * 3
    (tmp_path / "a.txt").write_text(content, encoding="utf-8")
    data = text.make(str(tmp_path / "a.txt"), block_size=16)
    assert data.decode(data.train) == content[:810] and len(data.vocabulary) == 300
