"""The command line: a run's files, going on after a stop, fine-tuning, two processes, and what
users do wrong. A refusal is one line "error: ..." and the exit code 2."""
import io
import json
import multiprocessing
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import mdm
import sample
import train
from data import runs
from data.results import variance

ROOT = Path(train.__file__).parent
TINY = """--n_test=32 --n_layer=1 --n_head=2 --n_embd=16 --steps=4 --batch_size=8 --eval_every=2
    --method=mdm --seeds=1 --out_dir=o --device=cpu""".split()
SUMS = ["--dataset=add2", *TINY]
TEXT = ["--dataset=a.txt", "--block_size=12", *TINY[1:]]
CONTENT = "".join(f"{i} green bottles hanging on the wall,\n" for i in range(60))
ASK = ["--method=mdm", "--out_dir=o", "--device=cpu"]


@pytest.fixture(autouse=True)
def in_a_new_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("data.results.figures.write", lambda *_: "")
    Path("a.txt").write_text(CONTENT, encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an ARM and an MDM of the seeds 3 and 1, to be read only."""
    out_dir = str(tmp_path_factory.mktemp("trained"))
    run("--method=arm,mdm", "--seeds=3,1", f"--out_dir={out_dir}")
    return out_dir


def run(*flags):
    assert not train.main([*SUMS, *flags])


def refused(capsys, *flags, main=train.main, common=SUMS):
    """The message of a refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main([*common, *flags])
    said = capsys.readouterr().err
    assert error.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def not_sampled(capsys, *flags):
    return refused(capsys, *flags, main=sample.main, common=ASK)


def read_lines(path):
    """The dictionaries in a JSONL file; NaN and Infinity are no JSON."""
    content = Path(path).read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=pytest.fail) for line in content]


def results(out_dir):
    """The result lines by (method, start, seed)."""
    lines = read_lines(Path(out_dir, "results.jsonl"))
    found = {(line["method"], line["start"], line["seed"]): line for line in lines}
    assert len(found) == len(lines)
    return found


# ---- What a run writes


def test_result_lines_say_what_was_done(capsys):
    shape = {"mdm": (1, 8, 4), "mdm_batch2": (2, 16, 4), "mdm_steps2": (2, 8, 8),
             "multi2": (2, 8, 4), "ppots": (1, 8, 4)}  # fmt: skip
    run(f"--method={','.join(shape)}", "--seeds=3,1", "--n_test=600")
    assert "ETA" in capsys.readouterr().out
    lines = results("o")
    assert list(lines) == [(method, "", seed) for method in shape for seed in (3, 1)]
    pilot = 8 * 3 * 9  # no fewer than 8 sequences, 3 counts, 9 tokens
    embeddings = 13 * 16 + 9 * 16
    block = 12 * 16 * 16 + 9 * 16 + 2 * 32
    for (method, _, seed), line in lines.items():
        assert (line["passes"], line["batch_size"], line["steps"]) == shape[method]
        assert line["forward_tokens"] == 4 * 8 * 9 * line["passes"] + pilot * (method == "ppots")
        assert line["n_params"] == embeddings + block + 32 + 16 * 12 + 12
        assert [point["step"] for point in line["curve"]] == [*range(0, line["steps"] + 1, 2)]
        assert line["curve"][0]["loss"] is None
        assert line["curve"][-1]["nll"] == line["nll"] != lines[method, "", 4 - seed]["nll"]
        assert line["diverged"] is None and 0 <= line["gradclip"] <= 1
        assert line["seeds_trained_together"] == 2 and line["start"] == ""
    data = train.load_data(train.parse_args([*SUMS, "--n_test=600"])[0], ["mdm"])
    for seed in (3, 1):
        model, _, dataset = sample.load_model("o", "multi2", seed)
        nll = train.evaluate(model, data)["nll"]
        assert nll == pytest.approx([lines["multi2", "", seed]["nll"]])
    assert dataset == "add2" and len(data.test) == 600


def test_text_end_to_end(capsys):
    methods = "--method=arm,mdm,isad,ppots_mirror"
    assert not train.main([*TEXT, methods, "--steps=40", "--eval_every=20", "--lr=1e-2"])
    for line in results("o").values():
        assert line["nll"] < line["curve"][0]["nll"] and 0 < line["nll_se"] < 0.5
        assert "accuracy" not in line

    def sampled(*flags):
        capsys.readouterr()
        assert sample.main([*ASK, *flags]) == 0
        return capsys.readouterr().out

    assert sampled("--method=arm", "--prompt=12 gr").startswith("12 gr")
    steps = sampled("--prompt=12 gr", "--steps=3", "--show")
    assert [step.count("_") for step in steps.split("12 gr")[1:]] == [7, 4, 2, 0]
    filled = sampled("--prompt=12 __een _")
    assert filled[:3] == "12 " and filled[5:9] == "een " and len(filled) == 11 and "_" not in filled
    warm = [sampled("--temperature=1", f"--sample_seed={seed}") for seed in (0, 0, 1)]
    assert warm[0] == warm[1] != warm[2]
    assert "13 tokens" in not_sampled(capsys, "--prompt=" + "1" * 13)
    assert "'Q'" in not_sampled(capsys, "--prompt=Q")
    Path("b.txt").write_text(CONTENT.replace("w", "W"), encoding="utf-8")
    said = refused(capsys, "--dataset=b.txt", "--init_from=o", "--out_dir=f", common=TEXT)
    assert "other tokens" in said


def test_the_closing_lines_can_be_pasted_into_a_shell(capsys):
    """With the method's own settings, a * in the prompt, and an odd folder."""
    run("--dataset=mul2", "--method=mdm,ppots", "--ppots_fit=grid", "--out_dir=it's here")
    said = capsys.readouterr().out.splitlines()
    report, ask = [shlex.split(line.split(": python ")[1]) for line in said if ": python " in line]
    assert (report[0], ask[0]) == ("train.py", "sample.py")
    assert not train.main(report[1:])
    assert not sample.main([*ask[1:], "--device=cpu"])
    assert "*" in capsys.readouterr().out.splitlines()[-1]


@pytest.mark.parametrize("common", [SUMS, TEXT])
def test_the_variance_of_the_gradient(common, monkeypatch):
    """A, B and C of sums at the first and at the last weights; for text a total with its error."""
    monkeypatch.setattr(variance, "METHODS", ["sqrtk"])
    monkeypatch.setattr(variance, "N_SEQUENCES", 6)
    flags = [*common, "--method=arm,mdm,ppots", "--lr=0.1", "--eps=0.01", "--seeds=3,1"]
    assert not train.main([*flags, "--variance"])
    rows = {row["method"]: row for row in read_lines("o/variance.jsonl")}
    assert list(rows) == ["mdm", "arm", "ppots", "sqrtk"]
    assert all(row["seed"] == 3 for row in rows.values())
    cfg, _, _ = train.parse_args(flags)
    data = train.load_data(cfg, ["mdm"])
    assert rows["arm"]["start_law"] == 1
    for method in ("mdm", "arm"):
        first, pos = train.build(cfg, method, [3], data, "cpu")
        last, _, _ = sample.load_model("o", method, 3)
        for at, model in (("start", first), ("end", last)):
            if common is TEXT:
                assert rows[method][f"{at}_error"] > 0
                continue
            K, K_mean = mdm.grams(model, data.test[:6], pos)
            exact = mdm.exact_variance(method, (K, K_mean), 3, eps=0.01)
            assert rows[method][at] == pytest.approx(exact["total"], rel=1e-5)
            assert rows[method][f"{at}_A"] == pytest.approx(exact["A"], rel=1e-5)
            shared = mdm.exact_variance(method, (K_mean, K_mean), 3, eps=0.01)
            assert rows[method][f"{at}_shared"] == pytest.approx(shared["A"] + shared["B"], rel=1e-5)
    assert rows["mdm"]["end_law"] == pytest.approx(mdm.noise_in_arms("mdm", len(pos), eps=0.01))


# ---- One folder is one comparison


def test_a_run_with_other_settings_is_refused(capsys):
    run()
    before = Path("o/results.jsonl").read_bytes()
    for flag, words in {
        "--n_test=33": "n_test 32, not 33", "--eval_every=1": "eval_every 2, not 1",
        "--lr=1": "lr 0.003, not 1.0", "--n_train=100": "n_train 0, not 100", "--dataset=add3": "data ",
    }.items():  # fmt: skip
        assert words in refused(capsys, flag, "--resume")
    settings = json.loads(Path("o/settings.json").read_text("utf-8"))
    Path("o/settings.json").write_text(json.dumps(settings | {"device": "cuda"}), "utf-8")
    assert "device cuda, not cpu" in refused(capsys)
    assert Path("o/results.jsonl").read_bytes() == before
    for damaged in ("[1]", "{}", "7", "", "{"):
        Path("o/settings.json").write_text(damaged, "utf-8")
        for flags in ([], ["--report"]):
            assert "o/settings.json" in refused(capsys, *flags)
    os.remove("o/settings.json")
    assert "older version" in refused(capsys)
    assert not train.main([*TEXT, "--out_dir=t"])
    said = refused(capsys, "--out_dir=t", "--block_size=13", common=TEXT)
    assert "block_size 12, not 13" in said
    Path("a.txt").write_text(CONTENT.replace("w", "h"), encoding="utf-8")
    assert "data " in refused(capsys, "--out_dir=t", common=TEXT)


def test_methods_and_seeds_share_a_folder_and_other_settings_get_another(capsys):
    run("--out_dir=", "--method=mdm,ppots")
    run("--out_dir=", "--lr=0.1")
    run("--out_dir=", "--method=ppots,exactk", "--ppots_fit=grid", "--seeds=5,1")
    name = "add2_n_test32_n_layer1_n_head2_n_embd16_steps4_batch_size8{}_eval_every2_devicecpu"
    folder = Path("out", name.format(""))
    assert {path.name for path in Path("out").iterdir()} == {folder.name, name.format("_lr0.1")}
    grid = "ppots ppots_fit=grid"
    runs_there = [("mdm", "", 1), ("ppots", "", 1), (grid, "", 5), (grid, "", 1),
                  ("exactk", "", 5), ("exactk", "", 1)]  # fmt: skip
    before = results(folder)
    assert list(before) == runs_there
    assert runs.newest_folder() == str(folder)
    assert "comma" in refused(capsys, "--out_dir=a,b")
    Path("c,d.txt").write_text(CONTENT, "utf-8")
    assert not train.main([*TEXT, "--dataset=c,d.txt", "--out_dir="])
    assert not train.main(["--report"])  # of the newest folder, whose name has no comma
    run("--out_dir=", "--method=mdm")
    after = results(folder)
    assert list(after) == runs_there  # replaced, not doubled
    assert after["mdm", "", 1]["curve"] == before["mdm", "", 1]["curve"]


KEYS = ("method", "start", "seed", "passes", "diverged", "curve")
INCOMPLETE = [json.dumps({key: 1 for key in KEYS if key != missing}) for missing in KEYS]


@pytest.mark.parametrize("damaged", ['{"method": "m', "[1]", "5", "", "\udcff", *INCOMPLETE])
def test_a_damaged_line_is_found_before_the_training(damaged, capsys):
    run("--seeds=1,2")
    path = Path("o/results.jsonl")
    first, second = path.read_text("utf-8").splitlines()
    content = f"{first}\n{damaged}\n{second}\n"
    content = content.encode("utf-8", "surrogateescape")  # the one that is no UTF-8, too
    path.write_bytes(content)
    for flags in (["--method=arm"], ["--report"]):
        said = refused(capsys, *flags)
        assert "line 2 of" in said and "results.jsonl" in said
    assert path.read_bytes() == content and not Path("o/arm").exists()


# ---- Going on. Processes are forked from one that has imported torch, which takes seconds.


def program(folder, flags):
    """In a new process: train.py, with its output in said.txt."""
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & ignores it
    sys.stdout = open("said.txt", "w", buffering=1)
    sys.stderr = sys.stdout
    sys.exit(runs.guarded(lambda: train.main(flags)))


def start(*flags):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo"])
    process = context.Process(target=program, args=(os.getcwd(), [*SUMS, *flags]))
    process.start()
    return process


def wait_for(n_evaluations, process):
    said = Path("said.txt")
    while not said.exists() or said.read_text().count(" step ") < n_evaluations:
        assert process.is_alive()
        time.sleep(0.002)


no_fork = pytest.mark.skipif(os.name == "nt", reason="Windows cannot fork")


@no_fork
def test_resume_after_kill_9():
    """At random moments, with a checkpoint after every step, a run loses nothing."""
    flags = ["--steps=15", "--eval_every=1", "--method=mdm,ppots_mirror", "--seeds=1,2", "--resume"]
    rng = random.Random(0)
    for _ in range(3):
        process = start(*flags)
        wait_for(rng.randrange(2, 10), process)
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.join()
        os.remove("said.txt")
    run(*flags)
    run(*flags, "--out_dir=reference")
    found = results("o")
    wanted = results("reference")
    assert list(found) == list(wanted) and len(found) == 4
    for key, line in found.items():
        for name in ("curve", "nll", "gradclip", "forward_tokens"):
            assert line[name] == wanted[key][name]


@no_fork
def test_ctrl_c_says_how_to_go_on_and_a_second_run_is_turned_away(capsys):
    flags = ["--steps=100000", "--eval_every=10"]
    process = start(*flags)
    wait_for(2, process)
    assert "in use" in refused(capsys, *flags)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == 130
    assert "--resume" in Path("said.txt").read_text().splitlines()[-1]
    assert "--resume it" in refused(capsys, "--init_from=o", "--out_dir=f")


@no_fork
def test_two_processes_share_a_folder():
    """At the same time, with different seeds or methods: nothing is lost, nothing mixed up."""
    shares = [["--seeds=3,1"], ["--seeds=2"], ["--seeds=3,1", "--method=arm"]]
    processes = [start(*flags) for flags in shares]
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    run("--seeds=3,1,2", "--method=mdm,arm", "--out_dir=alone")
    wanted = results("alone")
    found = results("o")
    assert set(found) == set(wanted) - {("arm", "", 2)}
    for key, line in found.items():
        assert line["nll"] == pytest.approx(wanted[key]["nll"], rel=1e-3)
    smallest = runs.find_checkpoint("o", "mdm")["weights"]
    first = runs.find_checkpoint("alone", "mdm", 1)["weights"]
    torch.testing.assert_close(smallest, first, rtol=1e-3, atol=1e-4)


def test_resume_trains_nothing_again(capsys):
    """Neither where all steps are done, nor where --until_nll has ended a training."""
    for common in (["--out_dir=o"], ["--out_dir=u", "--until_nll=9"]):
        run(*common, "--method=mdm,arm")
        before = results(common[0][-1])
        capsys.readouterr()
        run(*common, "--method=mdm,arm,exactk", "--resume")
        said = capsys.readouterr().out.splitlines()
        assert {line.split()[0] for line in said if " step " in line} == {"exactk"}
        after = results(common[0][-1])
        assert {key: after[key] for key in before} == before
    for trained_first in (True, False):  # other seeds have a checkpoint of their own
        run("--seeds=1,2", "--resume")
        assert (" step " in capsys.readouterr().out) == trained_first


@pytest.mark.parametrize("main, place", [(sample.main, "mdm.generate"),
                                         (train.main, "data.results.report.main")])  # fmt: skip
def test_ctrl_c_while_sampling_or_reporting_is_one_line(main, place, trained, monkeypatch, capsys):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    flags = ["--prompt=12+34="] if main is sample.main else ["--report"]
    flags += [f"--out_dir={trained}", "--method=mdm"]
    assert runs.guarded(lambda: main(flags)) == 130
    assert capsys.readouterr().err.startswith("\nstopped")


# ---- Fine-tuning


def test_fine_tuning_starts_every_seed_at_one_model(trained, capsys):
    tune = ["--lr=0", "--weight_decay=0", "--method=arm,ppots_mirror", "--seeds=7,8", "--out_dir=f"]
    run(*tune, f"--init_from={trained}")
    run(*tune, f"--init_from={trained}", "--init_seed=3")  # another start, in the same folder
    found = results("f")
    assert list(found) == [
        (method, begin, seed)
        for begin in ("add2-1", "add2-3")
        for method in ("arm", "ppots_mirror")
        for seed in (7, 8)
    ]
    assert len({line["start_weights"] for line in found.values()}) == 4
    for base, method in (("arm", "arm"), ("mdm", "ppots_mirror")):
        for seed in (1, 3):
            weights = runs.find_checkpoint(trained, base, seed)["weights"]
            known_by = found[method, f"add2-{seed}", 7]["start_weights"]
            begin = {"name": f"add2-{seed}", "fingerprint": known_by}
            path = runs.checkpoint_path("f", method, begin, [7, 8])
            for name, value in runs.load_checkpoint(path)["state"]["model"].items():
                assert torch.equal(value, weights[name].expand_as(value))
    capsys.readouterr()
    run(*tune, f"--init_from={trained}", "--resume")
    said = capsys.readouterr().out
    assert " step " not in said and " begins" not in said
    run(*tune, f"--init_from={trained}", "--resume", "--seeds=9")
    assert "begins, as there is no f/arm/ckpt_add2-1" in capsys.readouterr().out
    run("--n_test=2", "--out_dir=two")
    assert "begins" not in capsys.readouterr().out
    assert "three" in refused(capsys, "--n_test=2", "--out_dir=two", "--variance")
    run("--out_dir=pre", "--lr=0.1", "--method=arm,mdm")  # another one with the name add2-1
    assert "another add2-1" in refused(capsys, *tune, "--init_from=pre")
    assert "fine_tuned True, not False" in refused(capsys, *tune)
    said = refused(capsys, "--out_dir=pre", "--lr=0.1", "--init_from=./pre")  # the same folder
    assert "fine_tuned False, not True" in said


@pytest.mark.parametrize("flag, words", {
    "--n_embd=32": "n_embd", "--n_layer=2": "n_layer", "--n_head=4": "n_head",
    "--dataset=add3": "block_size", "--dataset=sum8": "vocab", "--init_seed=9": "seed 9",
    "--init_from=nowhere": "no checkpoint",
}.items())  # fmt: skip
def test_a_start_that_does_not_fit_is_refused(flag, words, trained, capsys):
    assert words in refused(capsys, f"--init_from={trained}", flag)
    run("--steps=1")  # a run that was refused has not taken the folder


# ---- What users do wrong


@pytest.mark.parametrize("flags, words", {
    "--method=nonsense": "unknown method", "--method=arm_mirror": "no masks",
    "--method=mdm_batch2_steps2": "choose one", "--baseline=nonsense": "unknown method",
    "--nonsense=1": "unrecognized", "--ste=5": "unrecognized", "--lr=x": "invalid float",
    "--lr=nan": "between", "--beta2=1": "beta2", "--steps=0": "not between 1 and 1000000000",
    "--n_embd=18": "twice --n_head=2", "--ppots_fit=x --method=ppots": "epr or grid",
    "--seeds=1,01": "different whole numbers", "--seeds=-1": "different whole numbers",
    "--n_seeds=2": "give one of them", "--dataset=add9": "add9",
    "--n_train=20000000": "9000 training problems", "--block_size=32": "affects text",
    "--tokenizer=gpt2": "affects text", "--ppots_fit=grid": "affects ppots",
    "--isad_tokens=1": "affects isad", "--method=isad": "no rare tokens",
    "--method=isad --isad_tokens=x": "'x'",
    "--method=strats --batch_size=7": "no strata", "--init_seed=3": "affects init_from",
    "--device=moon": "device moon", "--method=arm --variance": "add mdm",
    "--out_dir=a.txt/o": "cannot", "--report --out_dir=nowhere": "nowhere",
}.items())  # fmt: skip
def test_training_refuses(flags, words, capsys):
    assert words in refused(capsys, *flags.split())


@pytest.mark.parametrize("flags, words", {
    "--n_train=5": "affects sums", "--method=syrm": "syrm",
}.items())  # fmt: skip
def test_training_on_text_refuses(flags, words, capsys):
    assert words in refused(capsys, flags, common=TEXT)


@pytest.mark.parametrize("flags, words", {
    "--prompt=12": "like 73+00=", "--prompt=12+34=0000": "like 73", "--prompt=_2+34=": "like 73",
    "--prompt=12+3x=": "'x'", "--prompt=12+34=0_ --method=arm": "gaps",
    "--seed=9": "[1, 3]", "--method=exactk": "no checkpoint", "--method=x": "unknown method",
    "--steps=0": "at least 1", "--temperature=-1": "at least 0", "--device=moon": "moon",
    "--out_dir=nowhere": "nowhere",
}.items())  # fmt: skip
def test_sampling_refuses(flags, words, trained, capsys):
    assert words in not_sampled(capsys, f"--out_dir={trained}", *flags.split())


def test_a_checkpoint_that_cannot_be_used(capsys, monkeypatch):
    """No message tells to delete it."""
    run()
    (path,) = Path("o/mdm").glob("ckpt*.pt")
    good = torch.load(path, weights_only=True)
    mine = good | {"a class that is not torch's": Path("x")}
    cut = path.read_bytes()[:1000]
    for content in (cut, b"", b"soup", {"step": 3}, good | {"version": 1}, mine):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        for said in (not_sampled(capsys), refused(capsys, "--resume")):
            assert str(path) in said and "delete" not in said and "()" not in said
    monkeypatch.setattr(torch, "load", Mock(side_effect=PermissionError(13, "Permission denied")))
    said = not_sampled(capsys)
    assert str(path) in said and "Permission denied" in said


@pytest.mark.parametrize("change", ["diverged", "model"])
def test_a_diverged_model_is_neither_sampled_nor_started_from(change, capsys):
    """One that was given up, with weights that are finite, and one whose weights are not."""
    run()
    (path,) = Path("o/mdm").glob("ckpt*.pt")
    content = torch.load(path, weights_only=True)
    if change == "diverged":
        content["state"]["diverged"][0] = 3
    else:
        content["state"]["model"]["wte"][0, 0, 0] = torch.inf
    torch.save(content, path)
    assert "diverged" in not_sampled(capsys)
    assert "diverged" in refused(capsys, "--init_from=o", "--out_dir=f")


@pytest.mark.filterwarnings("error::UserWarning")
def test_out_of_memory_and_a_full_disk_are_one_line(capsys, monkeypatch):
    def guarded(flags):
        return runs.guarded(lambda: train.main(flags))

    run("--n_test=1", "--out_dir=p")  # one problem has no standard error, and NaN is no JSON
    assert results("p")["mdm", "", 1]["nll_se"] is None
    full = OSError(28, "No space left on device")
    monkeypatch.setattr(torch, "save", Mock(side_effect=full))
    assert "No space left" in refused(capsys, main=guarded)
    monkeypatch.setattr(train, "build", lambda *_: torch.empty(2**60))
    assert "--n_embd" in refused(capsys, main=guarded)
    said = ["CUBLAS_STATUS_ALLOC_FAILED", "CUDA error: out of memory", "not enough memory: you"]
    for error in (torch.OutOfMemoryError("CUDA"), MemoryError(), *map(RuntimeError, said)):
        monkeypatch.setattr(train, "build", Mock(side_effect=error))
        assert "--n_embd" in refused(capsys, main=guarded)
    for bug in ("illegal memory access", "in a CUDA graph, allocate it with pin_memory=True"):
        monkeypatch.setattr(train, "build", Mock(side_effect=RuntimeError(bug)))
        with pytest.raises(RuntimeError, match=bug):  # it is not mistaken for too little memory
            guarded(SUMS)


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run("--out_dir=~/o")
    assert (tmp_path / "home" / "o" / "settings.json").exists()
    run("--init_from=~/o")
    assert sample.main([*ASK, "--prompt=12+34=", "--out_dir=~/o"]) == 0


def test_an_accelerator_that_cannot_be_used(monkeypatch, capsys):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    monkeypatch.setattr(torch, "zeros", Mock(side_effect=RuntimeError("no kernel image\nand more")))
    for name in ("auto", "mps"):
        with pytest.raises(SystemExit):
            train.pick_device(name)
        said = capsys.readouterr().err
        assert "device mps" in said and "no kernel image" in said and said.count("\n") == 1
        assert "--device=cpu" in said


def test_any_terminal_and_a_closed_pipe(monkeypatch, trained):
    """cp1252 lacks Russian letters. `| head -1` closes the pipe while more is to come."""
    Path("a.txt").write_text("".join(f"мир {i}\n" for i in range(99)), encoding="utf-8")
    output = io.BytesIO()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding="cp1252"))
        assert runs.guarded(lambda: train.main(TEXT)) == 0
        assert "???" in output.getvalue().decode("cp1252")
    env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUNBUFFERED": "1"}
    for script, *flags in (
        ["train.py", *TEXT, "--resume", "--method=mdm,arm"],
        ["train.py", "--report", f"--out_dir={trained}"],
        ["sample.py", *ASK, "--show"],
    ):
        command = [sys.executable, ROOT / script, *flags]
        process = subprocess.Popen(command, env=env, stdout=-1, stderr=-1)
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 1)
