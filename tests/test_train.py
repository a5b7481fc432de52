"""Training and the command line: seeds, streams, resuming, files, refusals. Tiny budgets: seconds, not minutes."""
import dataclasses
import json
import os
import random
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
from data import arith

ROOT = Path(__file__).parent.parent
TINY = dict(dataset="add2", steps=6, batch_size=8, n_layer=1, n_head=2, n_embd=16, eval_every=3, ppots_refits=2, device="cpu")
FLAGS = [f"--{k}={v}" for k, v in TINY.items()]
METHODS = ["arm", "mdm", "ppots_mirror", "exactk_strats_mirror", "ppots_strats", "isad", "syrm", "ema", "multi2", "exactk_ppots", "mdm_batch2"]


@pytest.fixture(scope="module")
def data():
    return arith.make("add2")


def go(data, method="ppots_mirror", seeds=(42, 7), **changes):
    cfg = train.Config(**{**TINY, **changes})
    return train.train(cfg, mdm.parse_method(method), list(seeds), data)


def same(a, b):
    return all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


@pytest.mark.parametrize("method", METHODS)
def test_a_batch_of_seeds_is_the_seeds_one_by_one(method, data):
    together = go(data, method, seeds=[42, 7, 3])
    for s, seed in enumerate([42, 7, 3]):
        alone = go(data, method, seeds=[seed])
        for c, d in zip(alone["curve"], together["curve"]):
            assert c["loss"][0] == pytest.approx(d["loss"][s], rel=1e-3)
            assert c["nll"][0] == pytest.approx(d["nll"][s], rel=1e-3)
    assert len({c for c in together["curve"][-1]["nll"]}) == 3  # and different seeds differ


def test_equal_runs_are_equal_to_the_bit(data):
    assert same(go(data), go(data))


def test_evaluation_leaves_training_alone(data):
    often, once = go(data, eval_every=1), go(data, eval_every=6)
    assert same(often, once) and len(often["curve"]) == 6 and len(once["curve"]) == 1
    torch.manual_seed(0)
    before = torch.get_rng_state()
    go(data)
    assert torch.equal(before, torch.get_rng_state())  # nothing is drawn from the global stream


@pytest.mark.parametrize("method", ["mdm", "ppots_mirror", "ema", "exactk_strats"])
@pytest.mark.parametrize("at", [1, 3, 5])
def test_stopped_and_continued_is_uninterrupted(method, at, data, tmp_path):
    calls, cfg = [], train.Config(**TINY)
    save = lambda state: torch.save(state, tmp_path / "state.pt")
    stopped = train.train(cfg, mdm.parse_method(method), [42, 7], data, save=save, stop=lambda: calls.append(1) or len(calls) == at)
    assert stopped["step"] == at
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, whole = train.train(cfg, mdm.parse_method(method), [42, 7], data, state=state), go(data, method)
    assert same(resumed, whole)
    assert resumed["curve"] == whole["curve"] and resumed["forward_tokens"] == whole["forward_tokens"]


@pytest.mark.parametrize("method", METHODS)
def test_nothing_waits_for_the_device_between_evaluations(method, data, monkeypatch):
    """Fake tensors have shapes but no values. Whoever reads one, for which a GPU would have to be waited for, or makes a
    shape of one, is told off by torch; only the evaluation may. (The `.cpu()` of P-POTS' ten measurements passes.)"""
    from torch._subclasses.fake_tensor import FakeTensorMode  # not part of torch's promises: at worst it breaks this test alone

    class Evaluated(Exception):
        pass

    def evaluate(*_, **__):
        raise Evaluated

    rare = torch.tensor(data.rare)
    monkeypatch.setattr(train, "rare_tokens", lambda *_: rare)
    monkeypatch.setattr(arith.Arithmetic, "structural", [0])
    monkeypatch.setattr(train, "evaluate", evaluate)
    monkeypatch.setattr(mdm.GPT, "to", lambda model, device: model)  # a fake model cannot be moved
    with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(Evaluated):
        go(data, method, ppots_fit="grid")


@pytest.mark.parametrize("method", METHODS)
def test_a_step_launches_as_many_kernels_for_many_seeds_as_for_one(method, data, monkeypatch):
    """On a GPU a step of so small a model takes as long as it takes to launch its kernels, so they are counted here, as the
    operations that are more than a view: fewer than 400 for two blocks, whatever the number of seeds."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Count(TorchDispatchMode):
        n = 0

        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            self.n += not op.is_view
            return op(*args, **(kwargs or {}))

    monkeypatch.setattr(arith.Arithmetic, "structural", [0])
    after_step = {1: [], 5: []}
    for n_seeds, counts in after_step.items():
        with Count() as count:
            stop = lambda: counts.append(count.n) or len(counts) == 2  # neither the first step nor the last: they do more
            train.train(train.Config(**{**TINY, "n_layer": 2}), mdm.parse_method(method), list(range(n_seeds)), data, stop=stop)
    one, many = (b - a for a, b in after_step.values())
    assert one == many < 400


def test_streams_are_private():
    draw = lambda *a: torch.rand(5, generator=train.stream(*a)).tolist()
    draws = [draw(seed, purpose, block) for seed in (0, 1) for purpose in train.STREAMS for block in (0, 1)]
    assert len({tuple(d) for d in draws}) == len(draws)
    assert draw(1, "mask", 2) == draw(1, "mask", 2)


def test_the_gradient_is_clipped_for_each_seed_by_itself():
    p = torch.nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[3.0, 0, 4.0], [0.3, 0, 0.4]])
    assert train.clip_per_seed([p], 1.0, torch.ones(2) > 0).tolist() == [True, True]
    torch.testing.assert_close(p.grad, torch.tensor([[0.6, 0, 0.8], [0.3, 0, 0.4]]), rtol=1e-5, atol=0)


def test_a_seed_that_diverges_stops_and_harms_no_other(data):
    """One seed's weights are too large to train: it is marked and left alone, the other trains as if by itself."""
    cfg, method = train.Config(**TINY), frozenset()
    model, _ = train.build(cfg, method, [1, 2], data, "cpu")
    weights = {k: v.clone() for k, v in model.state_dict().items()}
    weights["head.weight"][0] = 1e38
    state = train.train(cfg, method, [1, 2], data, state={"model": weights})
    assert state["diverged"].tolist() == [1, 0] and all(torch.isfinite(v[1]).all() for v in state["model"].values())
    alone = go(data, "mdm", seeds=[2])
    assert state["curve"][-1]["nll"][1] == pytest.approx(alone["curve"][-1]["nll"][0], rel=1e-4)
    first, second = train.result_lines(cfg, method, [1, 2], state, "cpu", 1.0)
    assert first["diverged"] == 1 and second["diverged"] is None and json.loads(json.dumps(first, allow_nan=False))["curve"][0]["loss"] is None


def test_nll_is_the_exact_bound(data):
    """evaluate's nll against equation (2), mask by mask with Beta integrals; and it does not depend on chunking."""
    model, pos = train.build(train.Config(**TINY), frozenset(), [1, 2], data, "cpu")
    scores = train.evaluate(model, data, n_nll=20)
    accuracy, nll = scores["accuracy"], scores["nll"]
    n, x0, total = len(pos), data.test[:20].expand(2, -1, -1), 0.0
    for mask in mdm.all_masks(n)[1:]:
        k = int(mask.sum())
        beta = torch.lgamma(torch.tensor([k, n - k + 1.0])).sum() - torch.lgamma(torch.tensor(n + 1.0))
        total = total + beta.exp() * (mdm.token_nll(model, x0, pos, mask.expand(2, 20, n)) * mask).sum(-1).mean(1) / n
    assert nll == pytest.approx(total.tolist(), rel=1e-4)
    small = train.evaluate(model, data, n_nll=20, rows=50)
    assert small["accuracy"] == accuracy and small["nll"] == pytest.approx(nll, rel=1e-5)


def test_accuracy_counts_whole_responses(data):
    """A model that always answers 0 is right exactly where the answer is."""
    model, _ = train.build(train.Config(**TINY), frozenset(), [1], data, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.head.bias[..., data.encode("0")[0]] = 1
    test = data.test.clone()
    test[:100, data.prompt_len :] = data.encode("0")[0]
    right = (test[:, data.prompt_len :] == data.encode("0")[0]).all(1).float().mean().item()
    assert right >= 100 / 512
    assert train.evaluate(model, dataclasses.replace(data, test=test), 10)["accuracy"] == [pytest.approx(right)]


def test_ppots_law_is_refitted_and_costs_little(data):
    state = go(data, "ppots", steps=400, eval_every=400, ppots_refits=4, batch_size=16)
    pilot = state["forward_tokens"] - 400 * 16 * data.test.shape[1]
    assert 0 < pilot <= 0.01 * 3 * 400 * 16 * data.test.shape[1]
    assert not torch.equal(state["table"], go(data, "ppots", steps=100, eval_every=100, ppots_refits=1, batch_size=16)["table"])
    torch.testing.assert_close(state["table"].sum(-1), torch.ones(2))


# ---- the command line


def run(capsys, *args):
    code = train.main([*FLAGS, *args])
    out = capsys.readouterr()
    return code, out.out, out.err


def refused(capsys, main, args):
    """The exit code must be 2, and the message one line without a traceback."""
    try:
        code = main(args)
    except SystemExit as e:
        code = e.code
    err = capsys.readouterr().err
    assert code == 2 and err.count("\n") == 1 and err.startswith("error: ") and "Traceback" not in err, err
    return err


def test_end_to_end(tmp_path, capsys):
    out = tmp_path / "out"
    code, text, _ = run(capsys, f"--out_dir={out}", "--method=arm,mdm,pposts_mirror", "--variance")
    assert code == 0 and "ppots_mirror" in text and "points of accuracy" in text and "ETA" in text and "gradient" in text
    lines = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    assert [(x["method"], x["seed"]) for x in lines] == [(m, s) for m in ("arm", "mdm", "ppots_mirror") for s in train.PAPER_SEEDS]
    needed = "method seed dataset steps batch_size accuracy nll forward_tokens seconds n_params torch device curve".split()
    assert all(k in x for x in lines for k in needed)
    assert [c["step"] for c in lines[0]["curve"]] == [3, 6] and {"step", "accuracy", "nll"} <= set(lines[0]["curve"][0])
    assert lines[3]["forward_tokens"] == 6 * 8 * 9 and lines[6]["forward_tokens"] >= 2 * lines[3]["forward_tokens"]
    variance = [json.loads(line) for line in (out / "variance.jsonl").read_text("utf-8").splitlines()]
    assert {v["at"] for v in variance} == {"initialisation", "end"} and variance[0]["method"] == "arm"

    for method, seed in (("ppots_mirror", 731), ("pposts_mirror", 731), ("arm", 42), ("mdm", 20231)):
        args = [f"--out_dir={out}", f"--method={method}", f"--seed={seed}", "--device=cpu"]
        assert sample.main([*args, "--prompt=12+34=", "--prompt=99+01="]) == 0
        answers = capsys.readouterr().out.splitlines()
        assert [a[:6] for a in answers] == ["12+34=", "99+01="] and all(len(a) == 9 and "_" not in a for a in answers)
        (tmp_path / "prompts.txt").write_text("12+34=\n99+01=\n", encoding="utf-8")
        assert sample.main([*args, f"--file={tmp_path / 'prompts.txt'}", "--show"]) == 0
        shown = capsys.readouterr().out.splitlines()
        assert len(shown) == 2 * 4 and shown[0] == "12+34=___" and shown[-2:] == answers
        assert [s.count("_") for s in shown[::2]] == [3, 2, 1, 0]
    assert sample.main([*args, "--prompt=12+34=", "--steps=1", "--show"]) == 0
    assert capsys.readouterr().out.count("\n") == 2

    # what is there is not lost: other methods add lines, the same method replaces its own; a torn line is passed over
    with open(out / "results.jsonl", "a", encoding="utf-8") as f:
        f.write('{"method": "mdm", "se')
    run(capsys, f"--out_dir={out}", "--method=mdm,exactk", "--seeds=42")
    again = [json.loads(line) for line in (out / "results.jsonl").read_text("utf-8").splitlines()]
    assert len(again) == 10 and again[-1]["method"] == "exactk"

    code, text, _ = run(capsys, f"--out_dir={out}", "--method=arm", "--resume")
    assert code == 0 and "step" not in text.split("method")[0].split("\n", 1)[1]  # nothing is trained again


def test_resume_after_kill_9(tmp_path, capsys):
    """Killed hard at four random moments, a checkpoint being written after every step, and resumed each time: the accuracy,
    nll and curves of a run never stopped."""
    flags = [f for f in FLAGS if not f.startswith(("--steps", "--eval_every"))] + ["--steps=60", "--eval_every=1", "--method=mdm,ppots_mirror", "--seeds=1,2"]
    out, ref, rng = tmp_path / "out", tmp_path / "ref", random.Random(0)
    for _ in range(4):
        process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, f"--out_dir={out}", "--resume"], stdout=subprocess.PIPE)
        for _ in range(rng.randrange(1, 25)):  # lines, one after each checkpoint
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.05))
        process.kill()
        process.communicate()
    assert train.main([*flags, f"--out_dir={out}", "--resume"]) == 0
    assert train.main([*flags, f"--out_dir={ref}"]) == 0
    drop = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    a, b = ([drop(x) for x in (d / "results.jsonl").read_text("utf-8").splitlines()] for d in (out, ref))
    assert a == b and len(a) == 4
    assert not list(out.glob("**/*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL")
def test_resume_after_kill_9_in_the_middle_of_a_write(tmp_path):
    """The third checkpoint is half written, under its temporary name, when the end comes: the second one is still there."""
    flags = [*FLAGS, "--eval_every=1", "--method=mdm", "--seeds=1"]
    program = f"""if True:
        import os, signal, train
        calls = []
        def fsync(fd):
            calls.append(fd)
            if len(calls) == 3:
                os.ftruncate(fd, 1000)
                os.kill(os.getpid(), signal.SIGKILL)
        os.fsync = fsync
        train.main({[*flags, f"--out_dir={tmp_path / 'out'}"]!r})"""
    assert subprocess.run([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.DEVNULL).returncode == -signal.SIGKILL
    assert (tmp_path / "out" / "mdm" / "ckpt.pt.tmp").stat().st_size == 1000
    assert torch.load(tmp_path / "out" / "mdm" / "ckpt.pt", weights_only=True)["state"]["step"] == 2
    assert train.main([*flags, f"--out_dir={tmp_path / 'out'}", "--resume"]) == 0
    assert train.main([*flags, f"--out_dir={tmp_path / 'ref'}"]) == 0
    a, b = (torch.load(tmp_path / d / "mdm" / "ckpt.pt", weights_only=True)["state"] for d in ("out", "ref"))
    assert same(a, b) and a["curve"] == b["curve"] and not list(tmp_path.glob("**/*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C in another way")
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = [f for f in FLAGS if not f.startswith(("--steps", "--eval_every"))] + ["--steps=100000", "--eval_every=10", "--method=mdm", "--seeds=1"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, f"--out_dir={tmp_path}"], stdout=subprocess.PIPE, text=True)
    next(line for line in process.stdout if "loss" in line)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in rest.splitlines()[-1]
    state = torch.load(tmp_path / "mdm" / "ckpt.pt", weights_only=True)["state"]
    assert 0 < state["step"] < 100000


@pytest.mark.parametrize("args", [["--method=nonsense"], ["--method=arm_mirror"], ["--method="], ["--dataset=add9"], ["--seeds=1,1"],
                                  ["--seeds=x"], ["--seeds=-1"], ["--n_seeds=-2"], ["--seeds=1", "--n_seeds=2"], ["--steps=0"],
                                  ["--steps=1.5"], ["--lr=nan"], ["--lr=0"], ["--n_embd=15"], ["--device=cuda:99"], ["--nonsense=1"],
                                  ["--ppots_fit=x"], ["--isad_tokens=x", "--method=isad"], ["--method=arm", "--variance"],
                                  ["--eps=1"], ["--batch_size=-1"], ["--eps=0", "--variance"], ["--device=meta"], ["--lr=inf"],
                                  ["--until_nll=nan"], ["--n_embd=10000000000"], ["--n_embd=1000000"], ["--n_layer=1000000000"],
                                  ["--batch_size=1000000000"], ["--n_seeds=1000000000"], ["--seeds=99999999999999999999"],
                                  ["--dataset="], ["--dataset=/nonexistent.txt"], ["--dataset=."], ["--init_from=/nonexistent"],
                                  ["--report"], ["--n_seeds=1e3"], ["--seeds=1,,2"], ["--steps=" + "9" * 5000]])  # fmt: skip
def test_train_refuses(args, tmp_path, capsys):
    refused(capsys, train.main, [*FLAGS, f"--out_dir={tmp_path}", *args])
    assert {p.name for p in tmp_path.iterdir()} <= {"lock"}


def test_out_of_memory_is_one_line(tmp_path, capsys, monkeypatch):
    """torch's own errors, for tensors that no machine could hold."""
    for size in ((2**60,), (2**62, 2**62)):
        monkeypatch.setattr(train, "build", lambda *a: torch.empty(size))
        assert "--n_embd" in refused(capsys, train.main, [*FLAGS, f"--out_dir={tmp_path}", "--method=mdm"])

    def another_error(*a):
        raise RuntimeError("a bug of ours")

    monkeypatch.setattr(train, "load_data", another_error)
    with pytest.raises(RuntimeError, match="a bug of ours"):  # which must not be mistaken for it
        train.main([*FLAGS, f"--out_dir={tmp_path}"])


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_disk_full(tmp_path):
    """Files may not grow beyond a few kilobytes: the checkpoint cannot be written, one line says so, and what was there stays."""
    flags = [*FLAGS, f"--out_dir={tmp_path}", "--seeds=1"]
    assert train.main([*flags, "--method=mdm"]) == 0
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"}
    program = f"""if True:
        import resource, sys
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
        import train
        sys.exit(train.main({flags + ["--method=mdm,arm"]!r}))"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "cannot write" in done.stderr
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file() and p.name != "lock"} == before


def test_two_runs_in_one_out_dir(tmp_path, capsys):
    """The second is turned away and told who is in there, until the first is gone."""
    flags = [*FLAGS, f"--out_dir={tmp_path}", "--method=mdm", "--seeds=1"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, "--steps=1000000"], stdout=subprocess.DEVNULL)
    began = time.time()
    while not (tmp_path / "mdm" / "ckpt.pt").exists() and time.time() - began < 60:
        time.sleep(0.02)
    assert f"process {process.pid}" in refused(capsys, train.main, flags)
    process.kill()
    process.wait()
    assert train.main(flags) == 0


def test_fine_tuning_starts_from_the_first_seed_of_another_run(tmp_path, capsys):
    before, after = f"--out_dir={tmp_path / 'before'}", f"--out_dir={tmp_path / 'after'}"
    wide = [f for f in FLAGS if not f.startswith("--dataset")]
    assert train.main([*wide, before, "--dataset=mix3", "--method=arm,mdm", "--seeds=5,6"]) == 0
    start = torch.load(tmp_path / "before" / "mdm" / "ckpt.pt", weights_only=True)["state"]["model"]
    fine = [*wide, after, "--dataset=add3", f"--init_from={tmp_path / 'before'}", "--seeds=1,2,3"]
    assert train.main([*fine, "--method=arm,ppots_mirror", "--lr=1e-12", "--eval_every=1"]) == 0
    end = torch.load(tmp_path / "after" / "ppots_mirror" / "ckpt.pt", weights_only=True)["state"]["model"]
    for k in start:
        torch.testing.assert_close(end[k], start[k][:1].expand_as(end[k]), rtol=0, atol=1e-9)
    assert json.loads((tmp_path / "after" / "results.jsonl").read_text("utf-8").splitlines()[0])["init_from"] == str(tmp_path / "before")
    assert "--n_embd=16" in refused(capsys, train.main, [*fine, "--n_embd=32"])
    assert "vocabulary" in refused(capsys, train.main, [*fine, "--dataset=mul2"])
    assert "12 tokens" in refused(capsys, train.main, [*fine, "--dataset=add4"])


def test_until_nll(tmp_path, capsys):
    """Training ends at the first evaluation that is good enough, and counts as finished."""
    flags = [*FLAGS, f"--out_dir={tmp_path}", "--method=arm", "--seeds=1,2", "--steps=300", "--eval_every=10", "--until_nll=2.2"]
    assert train.main(flags) == 0 and train.main([*flags, "--resume"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "results.jsonl").read_text("utf-8").splitlines()]
    nll = [sum(c["nll"] for c in point) / 2 for point in zip(*(x["curve"] for x in lines))]
    assert len(nll) < 30 and nll[-1] <= 2.2 < min(nll[:-1])
    assert "--until_nll" in refused(capsys, train.main, [*[f for f in flags if not f.startswith("--until")], "--resume"])
    state = torch.load(tmp_path / "arm" / "ckpt.pt", weights_only=True)["state"]
    cfg, data = train.Config(**{**TINY, "dataset": "add2"}), arith.make("add2")
    model, _ = train.build(cfg, frozenset({"arm"}), [1, 2], data, "cpu")
    model.load_state_dict(state["model"])
    assert train.evaluate(model, data)["nll"] == pytest.approx([x["nll"] for x in lines], rel=1e-5)


TEXT = "".join(f"{i} green bottles hanging on the wall,\n" for i in range(300))


def test_text_end_to_end(tmp_path, capsys):
    """Train on a file, resume, measure variances by sampling; sample from nothing, go on from a beginning, fill in gaps."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    flags = [f"--dataset={tmp_path / 'a.txt'}", "--block_size=16", "--eval_every=20", "--steps=40", f"--out_dir={tmp_path / 'out'}"]
    code, out, _ = run(capsys, *flags, "--method=arm,mdm,ppots_mirror", "--seeds=1,2", "--variance")
    assert code == 0 and "bits/char" in out and "nats per token" in out and "ETA" in out
    lines = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == 6 and "accuracy" not in lines[0] and lines[0]["tokenizer"] == "char" and lines[0]["block_size"] == 16
    for x in lines:
        assert x["bits_per_char"] == pytest.approx(x["nll"] / 0.6931472) and 0 < x["nll_se"] < 0.5 and x["nll"] < x["curve"][0]["nll"]
    variance = [json.loads(x) for x in (tmp_path / "out" / "variance.jsonl").read_text("utf-8").splitlines()]
    assert all("gradient_error" in row for row in variance)
    assert train.main(["--report", f"--out_dir={tmp_path / 'out'}"]) == 0
    assert "P(better)" in capsys.readouterr().out

    base = [f"--out_dir={tmp_path / 'out'}", "--device=cpu"]

    def ask(*args):
        assert sample.main([*base, *args]) == 0
        return capsys.readouterr().out

    for method in ("arm", "mdm"):
        whole = ask(f"--method={method}", "--temperature=1")
        assert len(whole) == 16 + 1 and set(whole) <= set(TEXT)
        assert ask(f"--method={method}", "--temperature=1", "--sample_seed=1") != whole
        assert ask(f"--method={method}", "--prompt=12 gr").startswith("12 gr")
    steps = ask("--method=mdm", "--prompt=12 gr", "--steps=5", "--show", "--order=random", "--mask_char=?").split("12 gr")[1:]
    assert [s.count("?") for s in steps] == [11, 8, 6, 4, 2, 0]
    filled = ask("--method=mdm", "--prompt=12 __een __tt")
    assert len(filled) == 14 and filled[:3] == "12 " and filled[5:9] == "een " and filled[11:] == "tt\n" and "_" not in filled
    assert len(ask("--method=mdm", "--length=5")) == 6
    given = sample.main([*base, "--method=mdm", "--prompt=12 _reen b_ttl"]), capsys.readouterr().err
    assert given[0] == 0 and "2 tokens a sequence in 2 forward passes" in given[1]
    for args, message in (["--prompt=Q"], "'Q'"), (["--prompt=" + "1" * 17], "17 tokens"), (["--method=arm", "--prompt=1_"], "ARM"), (
        ["--mask_char=ab"], "one character"), (["--length=0"], "--length"):  # fmt: skip
        assert message in refused(capsys, sample.main, [*base, "--method=mdm", *args])

    (tmp_path / "a.txt").write_text(TEXT.replace("wall", "hall"), encoding="utf-8")  # another text, the same characters
    assert "has changed" in refused(capsys, train.main, [*FLAGS, *flags, "--method=mdm", "--seeds=1,2", "--resume"])
    assert "syrm" in refused(capsys, train.main, [*FLAGS, *flags, "--method=syrm"])
    assert "exponentially" in refused(capsys, train.main, [*FLAGS, *flags, "--block_size=17", "--method=reclipped"])
    assert train.main([*FLAGS, *flags, "--method=isad", "--seeds=1"]) == 0


def test_every_method_trains_on_text(tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    methods = "arm mdm strats lowdisc isad clipped ema multi2 mdm_batch2 mdm_steps2 ppots_mirror ppots_strats exactk_ppots_mirror exactk_strats"
    flags = [f"--dataset={tmp_path / 'a.txt'}", "--block_size=20", f"--method={methods.replace(' ', ',')}", "--seeds=1", f"--out_dir={tmp_path / 'out'}"]
    assert train.main([*FLAGS, *flags, "--ppots_fit=grid"]) == 0
    lines = [json.loads(x) for x in (tmp_path / "out" / "results.jsonl").read_text("utf-8").splitlines()]
    assert [x["method"] for x in lines] == methods.split() and all(x["nll"] < 4.2 for x in lines)


def test_an_arm_on_text_is_scored_as_nanogpt_scores(tmp_path):
    """nll of block_size tokens given the one before them, each from the tokens before it: written out by hand."""
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    data = train.load_data(train.Config(dataset=str(tmp_path / "a.txt"), block_size=8))
    model, pos = train.build(train.Config(**TINY), frozenset({"arm"}), [1], data, "cpu")
    logits = model(data.test[None, :, :-1], torch.arange(8))[0]
    wanted = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.test[:, 1:].flatten())
    assert train.evaluate(model, data)["nll"] == [pytest.approx(wanted.item(), rel=1e-5)]


def test_the_animation_redraws_its_lines(capsys):
    assert sample.show(["ab", "c\nd"], True, 0) == 3
    assert sample.show(["xy", "c\nd"], True, 3) == 3
    assert capsys.readouterr().out == "ab\nc\nd\n\x1b[3A\x1b[Jxy\nc\nd\n"


def test_unwritable_out_dir(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "out_dir" in refused(capsys, train.main, [*FLAGS, f"--out_dir={tmp_path / 'file' / 'out'}"])


def test_resume_refuses_another_run(tmp_path, capsys):
    flags = [*FLAGS, f"--out_dir={tmp_path}", "--method=mdm", "--seeds=1"]
    assert train.main(flags) == 0
    assert "--n_embd=16" in refused(capsys, train.main, [*flags, "--n_embd=32", "--resume"])
    assert "--seeds=1" in refused(capsys, train.main, [*flags, "--seeds=2", "--resume"])
    assert train.main([*flags, "--ppots_fit=grid", "--resume"]) == 0  # no concern of this method's
    assert train.main([*flags, "--resume"]) == 0


def test_sample_refuses(tmp_path, capsys):
    base = [f"--out_dir={tmp_path}", "--method=mdm"]
    assert "no checkpoint" in refused(capsys, sample.main, [*base, "--prompt=12+34="])
    train.main([*FLAGS, f"--out_dir={tmp_path}", "--method=mdm", "--seeds=1"])
    for args in (["--prompt=12+3x="], ["--prompt=12"], ["--prompt=12+34=0000"], ["--prompt=_2+34="], [], ["--prompt=12+34=", "--seed=9"],
                 ["--prompt=12+34=", "--steps=0"], ["--file=/nonexistent"], ["--prompt=12+34=", "--temperature=-1"], ["--method=x"]):  # fmt: skip
        refused(capsys, sample.main, [*base, *args])
    ckpt = tmp_path / "mdm" / "ckpt.pt"
    content = ckpt.read_bytes()
    for bad in (content[: len(content) // 2], b"not a checkpoint", b""):
        ckpt.write_bytes(bad)
        assert "not a checkpoint" in refused(capsys, sample.main, [*base, "--prompt=12+34="])
        refused(capsys, train.main, [*FLAGS, f"--out_dir={tmp_path}", "--method=mdm", "--seeds=1", "--resume"])
    torch.save({"step": 3}, ckpt)
    refused(capsys, sample.main, [*base, "--prompt=12+34="])
    for text in ("abc", "soup", "t", ".", "epoch 3"):  # which happen to be pickles, of a kind
        ckpt.write_text(text)
        assert "not a checkpoint" in refused(capsys, sample.main, [*base, "--prompt=12+34="])
    ckpt.write_bytes(content)
    evil = Evil(tmp_path / "evil")
    torch.save({**torch.load(ckpt, weights_only=True), "method": evil}, ckpt)  # a pickle that wants to run code
    assert "not a checkpoint" in refused(capsys, sample.main, [*base, "--prompt=12+34="])
    assert not (tmp_path / "evil").exists()
    torch.load(ckpt, weights_only=False)
    assert (tmp_path / "evil").exists()  # it would have


class Evil:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as e:
        train.parse_args(["--help"])
    text = capsys.readouterr().out
    assert e.value.code == 0
    assert all(f"--{f.name}" in text and f.metadata["help"][:20] in " ".join(text.split()) for f in dataclasses.fields(train.Config))
    assert all(word in text for word in mdm.INGREDIENTS)
    assert text.count("BIASED") == sum("BIASED" in what for *_, what in mdm.INGREDIENTS.values()) == 3


def test_seed_lists():
    seeds = lambda **k: train.parse_seeds(train.Config(**k))
    assert seeds() == [42, 731, 20231] and seeds(n_seeds=2) == [42, 731]
    assert seeds(n_seeds=6) == [42, 731, 20231, 0, 1, 2] and len(set(seeds(n_seeds=64))) == 64
    assert seeds(seeds="5,3") == [5, 3]


def test_mdm_py_stands_alone(tmp_path):
    """Copied anywhere, it runs and prints the table of variances."""
    (tmp_path / "mdm.py").write_text((ROOT / "mdm.py").read_text("utf-8"), encoding="utf-8")
    out = subprocess.run([sys.executable, "mdm.py"], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert all(word in out for word in ("ppots_mirror", "exactk_mirror", "gradient", "arm"))


def test_two_processes_are_one(tmp_path):
    """torchrun with 2 processes: the same seeds, the same numbers, one results file and one checkpoint, resumable by one."""
    flags = [*FLAGS, "--method=ppots_mirror,ema", "--n_seeds=3"]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", ROOT / "train.py", *flags]
    done = subprocess.run([*torchrun, f"--out_dir={tmp_path / 'two'}"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert train.main([*flags, f"--out_dir={tmp_path / 'one'}"]) == 0
    two, one = ([json.loads(x) for x in (tmp_path / d / "results.jsonl").read_text("utf-8").splitlines()] for d in ("two", "one"))
    assert [x["seed"] for x in two] == train.PAPER_SEEDS * 2
    for a, b in zip(two, one):
        assert a["forward_tokens"] == b["forward_tokens"] and a["method"] == b["method"]
        for c, d in zip(a["curve"], b["curve"]):
            assert c == pytest.approx(d, rel=1e-4)
    assert train.main([*flags, f"--out_dir={tmp_path / 'two'}", "--resume"]) == 0


def test_states_are_shared_out_and_joined(data):
    state = go(data, "ppots", seeds=[1, 2, 3])
    back = train.join([train.share_of(state, 0, 2), train.share_of(state, 2, 3)])
    assert torch.equal(back["laws"][1]["measured"], state["laws"][1]["measured"]) and back["diverged"].tolist() == [0, 0, 0]
    assert same(back, state) and back["curve"] == state["curve"] and torch.equal(back["theta"], state["theta"])
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"] and back["step"] == state["step"]
    one = train.share_of(state, 1, 2)
    assert torch.equal(one["optimizer"]["state"][0]["exp_avg"][0], state["optimizer"]["state"][0]["exp_avg"][1])
    assert one["curve"][-1]["nll"] == state["curve"][-1]["nll"][1:2]
