"""Training and the command line: seeds, streams, resuming, files, refusals. Tiny budgets."""
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import mdm
import sample
import train
from data import machine

TRAIN = Path(train.__file__)
FLAGS = """--dataset=add2 --steps=6 --batch_size=8 --n_layer=1 --n_head=2 --n_embd=16 --eval_every=3
    --ppots_refits=2 --device=cpu""".split()
METHODS = """arm mdm ppots_mirror exactk_strats_mirror ppots_strats syrm ema isad multi2 mdm_batch2
    mdm_steps2""".split()


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def settings(*flags):
    cfg, methods, _ = train.parse_args([*FLAGS, "--isad_tokens=12", *flags])
    return cfg, train.load_data(cfg, methods)


def states(method, *flags, seeds=(42, 7), state=None):
    cfg, data = settings(*flags)
    return list(map(dict, train.train(cfg, method, list(seeds), data, state=state)))


def same(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_seeds_is_the_seeds_one_by_one(method):
    together = states(method, seeds=[42, 7, 3])[-1]
    for s, seed in enumerate([42, 7, 3]):
        alone = states(method, seeds=[seed])[-1]
        for c, d in zip(alone["curve"], together["curve"]):
            assert c["loss"][0] == pytest.approx(d["loss"][s], rel=1e-3)
            assert c["nll"][0] == pytest.approx(d["nll"][s], rel=1e-3)
        plain = states("mdm", seeds=[seed])[-1]  # as which EMA trains to the bit, and no other
        assert same(alone, plain) == (method in ("mdm", "ema"))
        assert (alone["curve"] == plain["curve"]) == (method == "mdm")
    assert len(set(together["curve"][-1]["nll"])) == 3  # and different seeds differ


def test_strata_are_equally_filled():
    u = train.draw_block("strats", [1, 2, 3], 0, 1, 64, 9, 3, "cpu")[1][0]
    assert all((row.bincount(minlength=8) == 8).all() for row in (u * 8).ceil().long() - 1)
    assert [mdm.n_strata(b) for b in (1, 7, 12, 64, 100)] == [1, 1, 3, 8, 10]


def test_equal_runs_are_equal_to_the_bit_and_evaluation_leaves_them_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    often, once = states("ppots_mirror", "--eval_every=1"), states("ppots_mirror", "--eval_every=6")
    assert same(often[-1], once[-1]) and len(often) == 6 and len(once) == 1
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn from the global stream


@pytest.mark.parametrize("method", ["mdm", "ppots_mirror", "ema", "exactk_strats"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_stopped_and_continued_is_uninterrupted(method, at):
    cfg, data = settings("--eval_every=1")
    for state in train.train(cfg, method, [42, 7], data):
        if state["step"] == at:
            torch.save(state, "state.pt")
    stopped = torch.load("state.pt", weights_only=True)
    *_, resumed = train.train(cfg, method, [42, 7], data, state=stopped)
    assert same(resumed, state) and resumed["curve"] == state["curve"]
    assert resumed["pilot"] == state["pilot"] and torch.equal(resumed["clipped"], state["clipped"])


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device_between_evaluations(method, monkeypatch):
    """Fake tensors have shapes but no values: torch refuses to read one, for which a GPU would have
    to be waited for. (P-POTS' few measurements are left out.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode  # at worst it breaks this test alone

    class Evaluated(Exception):
        pass

    def evaluate(*_, **quick):
        raise Evaluated

    cfg, data = settings()
    monkeypatch.setattr(type(data), "structural", [0])
    table = torch.full((2, mdm.N_CELLS), 1 / mdm.N_CELLS)
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(train, "measure_table", lambda *_: table)  # numpy reads values
    monkeypatch.setattr(mdm.GPT, "to", lambda model, device: model)  # a fake model cannot be moved
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Evaluated):
        list(train.train(cfg, method, [42, 7], data))


def test_the_gradient_is_clipped_for_each_seed_by_itself():
    p = torch.nn.Parameter(torch.zeros(3, 3))
    p.grad = torch.tensor([[3.0, 0, 4.0], [0.3, 0, 0.4], [torch.inf, 0, 0]])
    alive, over = train.clip_per_seed([p], torch.ones(3) > 0, 1.0)
    assert alive.tolist() == [True, True, False] and over.tolist() == [True, False, False]
    wanted = torch.tensor([[0.6, 0, 0.8], [0.3, 0, 0.4], [0, 0, 0]])
    torch.testing.assert_close(p.grad, wanted, rtol=1e-5, atol=0)


def test_a_seed_that_diverges_harms_no_other_and_counts_as_the_worst():
    cfg, data = settings()
    model, _ = train.build(cfg, "mdm", [1, 2], data, "cpu")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["head.weight"][0] = 1e38
    *_, state = train.train(cfg, "mdm", [1, 2], data, state={"model": weights})
    assert state["diverged"].tolist() == [1, 0] and state["step"] == 6
    alone = states("mdm", seeds=[2])[-1]
    assert state["curve"][-1]["nll"][1] == pytest.approx(alone["curve"][-1]["nll"][0], rel=1e-4)
    weights["head.weight"][1] = 1e38  # and where all do, training ends
    *_, state = train.train(cfg, "mdm", [1, 2], data, state={"model": weights})
    assert state["done"] and state["step"] == 3


def test_nll_estimates_the_bound_and_accuracy_counts_what_is_right(monkeypatch):
    """evaluate's nll against (2), mask by mask with Beta integrals; for an ARM the chain rule."""
    cfg, data = settings()
    model, pos = train.build(cfg, "mdm", [1, 2], data, "cpu")
    n, x0, total = len(pos), data.test.expand(2, -1, -1), 0.0
    for mask in mdm.all_masks(n)[1:]:
        k = int(mask.sum())
        beta = math.gamma(k) * math.gamma(n - k + 1) / math.gamma(n + 1)
        nll = mdm.token_nll(model, x0, pos, mask.expand(2, len(data.test), n))
        total = total + beta * (nll * mask).sum(-1).mean(1) / n
    assert train.evaluate(model, data)["nll"] == pytest.approx(total.tolist(), rel=2e-3)
    arm, _ = train.build(cfg, "arm", [1], data, "cpu")
    logits = arm(data.test[None, :, :-1], pos - 1)[0]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.test[:, pos].flatten())
    assert train.evaluate(arm, data)["nll"] == [pytest.approx(wanted.item(), rel=1e-5)]

    def fill_in(_, question, pos):  # the first seed knows all answers, the other those of others
        assert (question[..., pos] == model.config.vocab_size).all()
        yield torch.stack([data.test, data.test.roll(1, 0)])

    monkeypatch.setattr(mdm, "generate", fill_in)
    assert train.evaluate(model, data)["accuracy"] == [1, 0]


@pytest.mark.parametrize("steps, refits", [(400, 4), (40, 1)])
def test_the_pilot_keeps_to_its_budget(steps, refits):
    """Also on a short run, for which the four measurements asked for would be too many."""
    flags = [f"--steps={steps}", f"--eval_every={steps}", "--ppots_refits=4", "--batch_size=32"]
    state = states("ppots", *flags)[-1]
    assert 0 < state["pilot"] <= 0.01 * 3 * steps * 32
    assert train.pilot_size(settings(*flags)[0], steps, 32, 3)[0] == steps / refits


def test_methods_and_seeds():
    for name in ("arm_mirror", "arm_mdm", "nonsense", "", "ppots_ppots", "exactk_isad", "lowdisc",
                 "reclipped", "exactk_ppots", "clipped_ppots", "batch2_steps2"):  # fmt: skip
        with pytest.raises(SystemExit):
            train.parse_method(name)
    for name in ("pposts_mirror", "mirror_ppots", "mdm_mirror_ppots"):
        assert train.parse_method(name) == "ppots_mirror"
    for name in ("mdm", "arm", "arm_batch2", "mdm_batch2", "exactk_strats_mirror", "multi2"):
        assert train.parse_method(name) == name
    assert train.parse_args(["--seeds=5,3"])[2] == [5, 3]
    assert train.parse_args(["--n_seeds=0"])[2] == train.PAPER_SEEDS
    assert train.parse_args(["--n_seeds=6"])[2] == [42, 731, 20231, 0, 1, 2]


# ---- the command line


def refused(capsys, main, *args):
    """The exit code must be 2, and the message one line without a traceback."""
    with pytest.raises(SystemExit) as e:
        main(list(args))
    err = capsys.readouterr().err
    assert e.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    return err


def lines_of(path, drop=()):
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [{k: v for k, v in line.items() if k not in drop} for line in lines]


def test_end_to_end(capsys):
    out, flags = Path("out put"), [*FLAGS, "--out_dir=out put"]
    assert train.main([*flags, "--method=arm,mdm,pposts_mirror", "--variance"]) == 0
    text, words = capsys.readouterr().out, ["points of accuracy", "ETA", "gradient"]
    assert all(word in text for word in [*words, "--out_dir='out put'"])
    lines = lines_of(out / "results.jsonl")
    asked = [(m, s) for m in ("arm", "mdm", "ppots_mirror") for s in train.PAPER_SEEDS]
    assert [(x["method"], x["seed"]) for x in lines] == asked
    assert [c["step"] for c in lines[0]["curve"]] == [3, 6]
    assert lines[3]["forward_tokens"] == 6 * 8 * 9 and lines[6]["forward_tokens"] > 2 * 6 * 8 * 9
    rows = lines_of(out / "variance.jsonl")
    assert {row["at"] for row in rows} == {"initialisation", "end"} and rows[0]["method"] == "arm"

    for method, seed in (("pposts_mirror", 731), ("arm", 42), ("mdm", 20231)):
        args = ["--out_dir=out put", f"--method={method}", f"--seed={seed}", "--device=cpu"]
        assert sample.main([*args, "--prompt=12+34=", "--prompt=99+01="]) == 0
        answers = capsys.readouterr().out.splitlines()
        assert [a[:6] for a in answers] == ["12+34=", "99+01="]
        assert all(len(a) == 9 and "_" not in a for a in answers)
        Path("prompts.txt").write_text("12+34=\n99+01=\n", encoding="utf-8")
        assert sample.main([*args, "--file=prompts.txt", "--show"]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert [s.count("_") for s in shown[::2]] == [3, 2, 1, 0] and shown[-2:] == answers
    assert sample.main([*args, "--prompt=12+34=_5", "--steps=1", "--show"]) == 0
    assert [s[7] for s in capsys.readouterr().out.splitlines()] == ["5", "5"]

    # What is there is not lost: other methods add lines, the same one replaces its own.
    assert train.main([*flags, "--method=mdm,exactk", "--seeds=42"]) == 0
    assert len(lines_of(out / "results.jsonl")) == 10
    capsys.readouterr()
    assert train.main([*flags, "--method=arm", "--resume"]) == 0
    assert " step " not in capsys.readouterr().out  # nothing is trained again


def test_resume_after_kill_9():
    """At random moments, with a checkpoint after every step, a run loses nothing."""
    flags = [*FLAGS, "--steps=15", "--eval_every=1", "--method=mdm,ppots_mirror", "--seeds=1,2"]
    flags, rng = [*flags, "--resume"], random.Random(0)
    for _ in range(2):
        process = subprocess.Popen([sys.executable, TRAIN, *flags], stdout=subprocess.PIPE)
        for _ in range(rng.randrange(2, 12)):  # lines, one after each checkpoint
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
    for name in ("out", "ref"):
        assert train.main([*flags, f"--out_dir={name}"]) == 0
    a, b = (lines_of(Path(name, "results.jsonl"), {"seconds"}) for name in ("out", "ref"))
    assert a == b and len(a) == 4 and not list(Path().glob("**/*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C in another way")
def test_ctrl_c_says_how_to_go_on_and_a_second_run_is_turned_away(capsys):
    flags = [*FLAGS, "--steps=100000", "--eval_every=10", "--method=mdm"]
    process = subprocess.Popen([sys.executable, TRAIN, *flags], stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if " step " in line)
    assert "in use" in refused(capsys, train.main, *flags)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in out.splitlines()[-1]
    step = machine.find_checkpoint("out", "mdm")["state"]["step"]
    assert step > 0 and step % 10 == 0


def test_what_is_wrong_is_one_line(capsys, monkeypatch):
    for flag in """--method=nonsense --method=arm_mirror --method= --dataset=add9 --lr=x --seeds=1,1
            --seeds=-1 --n_seeds=-1 --steps=0 --lr=-1 --eps=1 --n_embd=63 --ppots_fit=f --ste=5
            --device=moon --nonsense=1 --method=isad --isad_tokens=x --n_train=10000000 --variance
            --init_from=nowhere --dataset=. --method=exactk_ppots --report""".split():
        refused(capsys, train.main, *FLAGS, flag, *["--method=arm"] * (flag == "--variance"))
    Path("file").write_text("")
    refused(capsys, train.main, *FLAGS, "--out_dir=file/out")
    monkeypatch.setattr(train, "build", lambda *_: torch.empty(2**60))
    assert "--n_embd" in refused(capsys, train.main, *FLAGS)
    monkeypatch.setattr(train, "build", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # a bug, not to be mistaken for it
        train.main(FLAGS)


def test_resume_and_sample_refuse_what_does_not_fit(capsys):
    flags = [*FLAGS, "--method=mdm,arm", "--seeds=1"]
    assert "no checkpoint" in refused(capsys, sample.main, "--method=mdm", "--prompt=12+34=")
    assert train.main(flags) == 0
    assert train.main([*flags, "--ppots_fit=grid", "--resume"]) == 0  # no concern of this method's
    for args in """--prompt=12+3x= | --prompt=12 | --prompt=12+34=0000 | --prompt=_2+34= | |
            --prompt=12+34= --seed=9 | --prompt=12+34= --steps=0 | --file=/nonexistent |
            --temperature=-1 | --method=x | --method=arm --prompt=12+34=0_""".split("|"):
        refused(capsys, sample.main, "--method=mdm", *args.split())
    ckpt = Path("out/mdm/ckpt.pt")
    good = torch.load(ckpt, weights_only=True)
    bad = [ckpt.read_bytes()[:1000], b"not a checkpoint", b"", b"abc", b"soup", b"."]
    bad += [{"step": 3}, good | {"version": 1}, good | {"a class that is not torch's": Path("x")}]
    for content in bad:
        if isinstance(content, bytes):
            ckpt.write_bytes(content)
        else:
            torch.save(content, ckpt)
        assert "delete it" in refused(capsys, sample.main, "--method=mdm", "--prompt=12+34=")
        assert "delete it" in refused(capsys, train.main, *flags, "--resume")


def test_fine_tuning_and_until_nll(capsys):
    """Every seed starts at the first seed of another run, which ended at the first evaluation that
    was good enough."""
    before = [*FLAGS, "--out_dir=a", "--dataset=mix3", "--method=arm,mdm", "--seeds=5,6"]
    before += ["--steps=300", "--eval_every=10", "--until_nll=2.2"]
    assert train.main(before) == 0 and train.main([*before, "--resume"]) == 0
    curve = machine.find_checkpoint("a", "arm")["state"]["curve"]
    nll = [sum(point["nll"]) / 2 for point in curve]
    assert len(nll) < 30 and nll[-1] <= 2.2 < min(nll[:-1])
    start = machine.find_checkpoint("a", "mdm")["state"]["model"]
    fine = [*FLAGS, "--dataset=add3", "--init_from=a", "--seeds=1,2", "--method=arm,ppots_mirror"]
    assert train.main([*fine, "--lr=1e-12"]) == 0
    end = machine.find_checkpoint("out", "ppots_mirror")["state"]["model"]
    for k in start:
        torch.testing.assert_close(end[k], start[k][:1].expand_as(end[k]), rtol=0, atol=1e-9)
    for flag in ("--n_embd=32", "--n_layer=2", "--n_head=4", "--dataset=mul2", "--dataset=add4"):
        assert "--init_from" in refused(capsys, train.main, *fine, flag)


TEXT = "".join(f"{i} green bottles hanging on the wall,\n" for i in range(60))


def test_text_end_to_end(capsys):
    """Every kind of method; then sample from nothing, go on from a beginning, fill in gaps."""
    Path("a.txt").write_text(TEXT, encoding="utf-8")
    flags = [*FLAGS, "--dataset=a.txt", "--block_size=12", "--eval_every=20", "--steps=40"]
    flags += ["--seeds=1,2", "--method=arm,mdm,isad,ppots_mirror,exactk_strats"]
    assert train.main([*flags, "--variance"]) == 0
    assert "nats" in capsys.readouterr().out
    for x in lines_of(Path("out/results.jsonl")):
        assert x["bits_per_char"] == pytest.approx(x["nll"] / 0.6931472) and x["nll"] < 4.2
        assert "accuracy" not in x and 0 < x["nll_se"] < 0.5 and x["nll"] < x["curve"][0]["nll"]
    assert all("total_error" in row["gradient"] for row in lines_of(Path("out/variance.jsonl")))
    assert train.main(["--report"]) == 0

    def ask(*args):
        capsys.readouterr()
        assert sample.main(["--device=cpu", *args]) == 0
        return capsys.readouterr().out

    for method in ("arm", "mdm"):
        whole = ask(f"--method={method}", "--temperature=1")
        assert len(whole) == 12 + 1 and set(whole) <= set(TEXT)
        assert ask(f"--method={method}", "--temperature=1", "--sample_seed=1") != whole
        assert ask(f"--method={method}", "--prompt=12 gr").startswith("12 gr")
    shown = ["--prompt=12 gr", "--steps=3", "--show", "--order=random", "--mask_char=?"]
    steps = ask("--method=mdm", *shown)
    assert [s.count("?") for s in steps.split("12 gr")[1:]] == [7, 4, 2, 0]
    filled = ask("--method=mdm", "--prompt=12 __een _")
    assert len(filled) == 11 and filled[:3] == "12 " and filled[5:9] == "een " and "_" not in filled
    assert len(ask("--method=mdm", "--length=5")) == 6
    for method, flag, word in [("mdm", "--prompt=Q", "'Q'"), ("arm", "--prompt=1_", "ARM"),
                               ("mdm", "--prompt=" + "1" * 13, "13 tokens")]:  # fmt: skip
        assert word in refused(capsys, sample.main, f"--method={method}", flag)
    assert "syrm" in refused(capsys, train.main, *flags, "--method=syrm")


# A run is what it was made from, not what its path was called. Steps are runs of the plain MDM, or
# what happens to files; then the last one is refused, or the report has these tables.
START = [*FLAGS, "--block_size=12", "--method=mdm", "--seeds=1,2", "--steps=2"]
RUNS = {"run": "--out_dir=o", "pre": "--out_dir=pre --method=arm,mdm",
        "fine": "--init_from=pre --out_dir=o", "text": "--dataset=d.txt --out_dir=o"}  # fmt: skip
MADE_FROM = {
    "run; run --n_embd=32 --resume": "refused: --n_embd (16, now 32)",
    "run; run --seeds=1 --resume": "refused: --seeds ([1, 2], now [1])",
    "run --out_dir=a; mv a o; run --method=mdm,exactk --resume": "mdm exactk",
    "run; forget; run --method=exactk": "mdm | exactk",  # an old file, without fingerprints
    "run; fine --init_from=./o": "refused: overwritten",
    "pre; fine; pre --seeds=7,8; fine --method=mdm,exactk --resume": "refused: --init_from (",
    "pre; fine; pre --seeds=7,8; fine --method=arm,exactk": "mdm | arm exactk",
    "pre; fine; cp pre p; fine --init_from=p --method=mdm,arm,exactk --resume": "mdm arm exactk",
    "pre; pre --seeds=7,8 --out_dir=p; fine; fine --init_from=p": "mdm",
    "text; edit; text --resume": "refused: --dataset (",
    "text; edit; text --method=exactk": "mdm | exactk",
    "text; text --dataset=./d.txt --method=mdm,exactk --resume": "mdm exactk",
    "text; text --dataset=./d.txt --method=exactk,mdm": "mdm exactk",
}


@pytest.mark.parametrize("story, outcome", MADE_FROM.items())
def test_a_run_is_what_it_was_made_from(story, outcome, capsys, monkeypatch):
    monkeypatch.setattr("data.figures.write", lambda *_: "")
    results, text = Path("o", "results.jsonl"), Path("d.txt")
    text.write_text(TEXT, encoding="utf-8")
    *steps, last = [step.split() for step in story.split("; ")]
    for word, *args in steps:
        if word == "edit":
            text.write_text(TEXT.replace("w", "h"), encoding="utf-8")
        elif word == "forget":
            machine.write_lines(str(results), lines_of(results, drop={"data", "init"}))
        elif word in ("cp", "mv"):
            (shutil.move if word == "mv" else shutil.copytree)(*args)
        else:
            assert train.main([*START, *RUNS[word].split(), *args]) == 0
    last = [*START, *RUNS[last[0]].split(), *last[1:]]
    if outcome.startswith("refused"):
        assert outcome.split(": ")[1] in refused(capsys, train.main, *last)
        return
    assert train.main(last) == 0
    assert train.main(["--report", "--out_dir=o"]) == 0
    tables = train.report.groups(lines_of(results))
    assert " | ".join(map(" ".join, tables)) == outcome
    assert capsys.readouterr().out.count("kept apart") == len(tables) - 1


def test_mdm_py_stands_alone():
    """Copied anywhere, it runs and prints the table of variances."""
    shutil.copy(mdm.__file__, ".")
    out = subprocess.check_output([sys.executable, "mdm.py"], text=True)
    assert all(word in out for word in ("ppots_mirror", "exactk_mirror", "gradient", "1e-06"))


def test_torchrun_shares_the_seeds():
    """Three seeds over two processes; one dies, and each share goes on by --resume."""
    flags = [*FLAGS, "--method=ppots_mirror,ema", "--eval_every=1"]

    def torchrun():
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", TRAIN]
        return subprocess.run([*command, *flags, "--resume"], stdout=subprocess.DEVNULL).returncode

    assert train.main([*flags, "--out_dir=one"]) == 0
    wanted = {(x["method"], x["seed"]): x for x in lines_of(Path("one/results.jsonl"))}
    Path("out/ema").mkdir(parents=True)
    Path("out/ema/ckpt.2of2.pt").touch()  # so that the second process fails
    assert torchrun() != 0
    Path("out/ema/ckpt.2of2.pt").unlink()
    assert torchrun() == 0
    found = train.report.read_results("out")
    assert len(found) == 6 and len(list(Path("out").glob("results.*.jsonl"))) == 2
    for x in found:
        for c, d in zip(x["curve"], wanted[x["method"], x["seed"]]["curve"]):
            assert c == pytest.approx(d, rel=1e-2)
    for seed in train.PAPER_SEEDS:
        assert sample.main([f"--seed={seed}", "--prompt=12+34="]) == 0
    fourth = os.environ | {"RANK": "3", "WORLD_SIZE": "4"}  # for which there is no seed
    assert subprocess.run([sys.executable, TRAIN, *flags], env=fourth).returncode == 0
    assert len(list(Path("out").glob("results.*.jsonl"))) == 2
