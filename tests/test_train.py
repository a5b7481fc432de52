"""Training and the command line: seeds, streams, resuming, files, refusals. Tiny budgets: seconds, not minutes."""
import dataclasses
import json
import os
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
    stopped = train.train(cfg, mdm.parse_method(method), [42, 7], data, report=save, stop=lambda: calls.append(1) or len(calls) == at)
    assert stopped["step"] == at
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed, whole = train.train(cfg, mdm.parse_method(method), [42, 7], data, state=state), go(data, method)
    assert same(resumed, whole)
    assert resumed["curve"] == whole["curve"] and resumed["forward_tokens"] == whole["forward_tokens"]


def test_streams_are_private():
    draw = lambda *a: torch.rand(5, generator=train.stream(*a)).tolist()
    draws = [draw(seed, purpose, block) for seed in (0, 1) for purpose in train.STREAMS for block in (0, 1)]
    assert len({tuple(d) for d in draws}) == len(draws)
    assert draw(1, "mask", 2) == draw(1, "mask", 2)


def test_the_gradient_is_clipped_for_each_seed_by_itself():
    p = torch.nn.Parameter(torch.zeros(2, 3))
    p.grad = torch.tensor([[3.0, 0, 4.0], [0.3, 0, 0.4]])
    train.clip_per_seed([p], 1.0)
    torch.testing.assert_close(p.grad, torch.tensor([[0.6, 0, 0.8], [0.3, 0, 0.4]]), rtol=1e-5, atol=0)


def test_a_seed_that_explodes_harms_no_other(data):
    model, pos = train.build(train.Config(**TINY), frozenset(), [1, 2], data, "cpu")
    with torch.no_grad():
        model.wte[0] = torch.nan
    x0 = data.train[:4].expand(2, -1, -1)
    mask = torch.ones(2, 4, len(pos)) > 0
    mdm.token_nll(model, x0, pos, mask).mean((1, 2)).sum().backward()
    train.clip_per_seed(list(model.parameters()), 1.0)
    assert all(torch.isfinite(p.grad[1]).all() for p in model.parameters())


def test_nll_is_the_exact_bound(data):
    """evaluate's nll against equation (2), mask by mask with Beta integrals; and it does not depend on chunking."""
    model, pos = train.build(train.Config(**TINY), frozenset(), [1, 2], data, "cpu")
    accuracy, nll = train.evaluate(model, data, n_nll=20)
    n, x0, total = len(pos), data.test[:20].expand(2, -1, -1), 0.0
    for mask in mdm.all_masks(n)[1:]:
        k = int(mask.sum())
        beta = torch.lgamma(torch.tensor([k, n - k + 1.0])).sum() - torch.lgamma(torch.tensor(n + 1.0))
        total = total + beta.exp() * (mdm.token_nll(model, x0, pos, mask.expand(2, 20, n)) * mask).sum(-1).mean(1) / n
    assert nll == pytest.approx(total.tolist(), rel=1e-4)
    small = train.evaluate(model, data, n_nll=20, rows=50)
    assert small[0] == accuracy and small[1] == pytest.approx(nll, rel=1e-5)


def test_accuracy_counts_whole_responses(data):
    """A model that always answers 0 is right exactly where the answer is."""
    model, _ = train.build(train.Config(**TINY), frozenset(), [1], data, "cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
        model.head.bias[..., data.chars.index("0")] = 1
    test = data.test.clone()
    test[:100, data.prompt_len :] = data.chars.index("0")
    right = (test[:, data.prompt_len :] == data.chars.index("0")).all(1).float().mean().item()
    assert right >= 100 / 512
    assert train.evaluate(model, dataclasses.replace(data, test=test), 10)[0] == [pytest.approx(right)]


def test_ppots_law_is_refitted_and_costs_little(data):
    state = go(data, "ppots", steps=400, eval_every=400, ppots_refits=4, batch_size=16)
    pilot = state["forward_tokens"] - 400 * 16 * data.train.shape[1]
    assert 0 < pilot <= 0.01 * 3 * 400 * 16 * data.train.shape[1]
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
    """Killed hard in the middle, then resumed: the same accuracy, nll and weights as never stopped."""
    flags = [f for f in FLAGS if not f.startswith(("--steps", "--eval_every"))] + ["--steps=400", "--eval_every=5", "--method=mdm,ppots_mirror", "--seeds=1,2"]
    out, ref = tmp_path / "out", tmp_path / "ref"
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, f"--out_dir={out}"], stdout=subprocess.DEVNULL)
    began = time.time()
    while not (out / "mdm" / "ckpt.pt").exists() and time.time() - began < 60:
        time.sleep(0.02)
    time.sleep(0.3)
    process.kill()
    process.wait()
    assert not (out / "ppots_mirror" / "ckpt.pt").exists()
    assert train.main([*flags, f"--out_dir={out}", "--resume"]) == 0
    assert train.main([*flags, f"--out_dir={ref}"]) == 0
    drop = lambda line: {k: v for k, v in json.loads(line).items() if k != "seconds"}
    a, b = ([drop(x) for x in (d / "results.jsonl").read_text("utf-8").splitlines()] for d in (out, ref))
    assert a == b and len(a) == 4


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    flags = [f for f in FLAGS if not f.startswith(("--steps", "--eval_every"))] + ["--steps=100000", "--eval_every=10", "--method=mdm", "--seeds=1"]
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags, f"--out_dir={tmp_path}"], stdout=subprocess.PIPE, text=True)
    while "step" not in process.stdout.readline().split(";")[0]:
        pass
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=60)[0]
    assert process.returncode == 130 and "--resume" in rest.splitlines()[-1]
    state = torch.load(tmp_path / "mdm" / "ckpt.pt", weights_only=True)["state"]
    assert 0 < state["step"] < 100000


@pytest.mark.parametrize("args", [["--method=nonsense"], ["--method=arm_mirror"], ["--method="], ["--dataset=add9"], ["--seeds=1,1"],
                                  ["--seeds=x"], ["--seeds=-1"], ["--n_seeds=-2"], ["--seeds=1", "--n_seeds=2"], ["--steps=0"],
                                  ["--steps=1.5"], ["--lr=nan"], ["--lr=0"], ["--n_embd=15"], ["--device=cuda:99"], ["--nonsense=1"],
                                  ["--ppots_fit=x"], ["--isad_tokens=x", "--method=isad"], ["--method=arm", "--variance"],
                                  ["--eps=1"], ["--batch_size=-1"], ["--eps=0", "--variance"], ["--device=meta"]])  # fmt: skip
def test_train_refuses(args, tmp_path, capsys):
    refused(capsys, train.main, [*FLAGS, f"--out_dir={tmp_path}", *args])
    assert not list(tmp_path.iterdir())


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
    torch.save({"config": ROOT, "method": Evil(), "seeds": 1, "state": 1}, ckpt)  # a pickle that wants to run code
    refused(capsys, sample.main, [*base, "--prompt=12+34="])
    assert not (tmp_path / "evil").exists()


class Evil:
    def __reduce__(self):
        return os.system, ("echo this must never run",)


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
    subprocess.run([*torchrun, f"--out_dir={tmp_path / 'two'}"], check=True, capture_output=True, timeout=120)
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
    assert same(back, state) and back["curve"] == state["curve"] and torch.equal(back["theta"], state["theta"])
    assert back["optimizer"]["param_groups"] == state["optimizer"]["param_groups"] and back["step"] == state["step"]
    one = train.share_of(state, 1, 2)
    assert torch.equal(one["optimizer"]["state"][0]["exp_avg"][0], state["optimizer"]["state"][0]["exp_avg"][1])
    assert one["curve"][-1]["nll"] == state["curve"][-1]["nll"][1:2]
