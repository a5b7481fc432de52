"""The command line: a run's files, going on after a stop, fine-tuning, several processes, and what
users do wrong. Every refusal is one line "error: ..." and exit code 2."""
import io
import json
import math
import os
import random
import shlex
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
from data import runs
from data.results import variance

ROOT = Path(train.__file__).parent
FLAGS = """--dataset=add2 --n_test=32 --n_layer=1 --n_head=2 --n_embd=16 --steps=4 --batch_size=8
    --eval_every=2 --device=cpu""".split()
FOLDER = "out/add2_n_test32_n_layer1_n_head2_n_embd16_steps4_batch_size8_eval_every2_devicecpu"
TEXT = "".join(f"{i} green bottles hanging on the wall,\n" for i in range(60))
ON_TEXT = [*FLAGS[2:], "--dataset=a.txt", "--block_size=12"]
ASK = ["--device=cpu", "--prompt=12+34="]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    Path("a.txt").write_text(TEXT, encoding="utf-8")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with an ARM and an MDM of the seeds 3 and 1, to be read only."""
    out_dir = str(tmp_path_factory.mktemp("trained"))
    assert train.main([*FLAGS, "--method=arm,mdm", "--seeds=3,1", f"--out_dir={out_dir}"]) == 0
    return out_dir


def run(*flags):
    assert train.main([*FLAGS, "--method=mdm", "--seeds=1", "--out_dir=o", *flags]) == 0


def refused(capsys, main, *flags):
    """The message of a refusal."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as error:
        main(list(flags))
    said = capsys.readouterr().err
    assert error.value.code == 2
    assert said.startswith("error: ") and said.count("\n") == 1, said
    return said


def train_refused(capsys, *flags):
    return refused(capsys, train.main, *FLAGS, "--method=mdm", "--seeds=1", "--out_dir=o", *flags)


def lines_of(out_dir, name="results.jsonl"):
    """The lines of a file by (method, seed); NaN and Infinity are no JSON."""

    def no_number(constant):
        raise AssertionError(constant)

    content = Path(out_dir, name).read_text(encoding="utf-8").splitlines()
    lines = [json.loads(line, parse_constant=no_number) for line in content]
    found = {(line["method"], line["seed"]): line for line in lines}
    assert len(found) == len(lines)
    return found


def edit_checkpoint(path, **changes):
    """Change a checkpoint's own entries, or those of its state."""
    content = torch.load(path, weights_only=True)
    for name, value in changes.items():
        (content if name in content else content["state"])[name] = value
    torch.save(content, path)


# ---- What a run writes


def test_result_lines_say_what_was_done(capsys):
    methods = ["mdm", "mdm_batch2", "mdm_steps2", "multi2", "ppots"]
    run(f"--method={','.join(methods)}", "--ppots_fit=grid", "--seeds=3,1", "--n_test=600")
    assert "ETA" in capsys.readouterr().out
    lines = lines_of("o")
    methods[-1] = "ppots ppots_fit=grid"
    assert list(lines) == [(method, seed) for method in methods for seed in (3, 1)]
    shape = {"mdm": (1, 8, 4), "mdm_batch2": (2, 16, 4), "mdm_steps2": (2, 8, 8),
             "multi2": (2, 8, 4), "ppots ppots_fit=grid": (1, 8, 4)}  # fmt: skip
    pilot = 8 * 3 * 9  # no fewer than 8 sequences, 3 counts, 9 tokens
    embeddings = 13 * 16 + 9 * 16
    attention = 4 * 16 * 16 + 4 * 16
    mlp = 8 * 16 * 16 + 4 * 16 + 16
    norms_and_head = 3 * 32 + 16 * 12 + 12
    for (method, seed), line in lines.items():
        assert (line["passes"], line["batch_size"], line["steps"]) == shape[method]
        assert line["forward_tokens"] == 4 * 8 * 9 * line["passes"] + pilot * ("ppots" in method)
        assert line["n_params"] == embeddings + attention + mlp + norms_and_head
        assert [point["step"] for point in line["curve"]] == [*range(0, line["steps"] + 1, 2)]
        assert line["curve"][0]["loss"] is None
        assert line["curve"][-1]["nll"] == line["nll"] != lines[method, 4 - seed]["nll"]
        assert line["diverged"] is None and 0 <= line["gradclip"] <= 1
        assert line["start"] == "" and line["seeds_trained_together"] == 2
    model, _, name = sample.load_model("o", "multi2", 1)
    _, data = data_of("--n_test=600")
    assert train.evaluate(model, data)["nll"] == pytest.approx([lines["multi2", 1]["nll"]])
    assert name == "add2" and len(data.test) == 600


def data_of(*flags):
    cfg, methods, _ = train.parse_args([*FLAGS, *flags])
    return cfg, train.load_data(cfg, methods)


def test_a_number_that_is_not_finite_is_null():
    run("--n_test=1")  # so that there is no standard error
    assert lines_of("o")["mdm", 1]["nll_se"] is None


def test_the_closing_lines_can_be_pasted_into_a_shell(capsys, monkeypatch):
    """With the method's own settings, a * in the prompt, and an odd folder."""
    monkeypatch.setattr("data.results.figures.write", lambda *_: "")
    run("--dataset=mul2", "--method=mdm,ppots", "--ppots_fit=grid", "--out_dir=it's here")
    said = capsys.readouterr().out.splitlines()
    closing = [line for line in said if line.startswith(("More of it: ", "Try it: "))]
    report, ask = [shlex.split(line.split(": python ")[1]) for line in closing]
    assert (report[0], ask[0]) == ("train.py", "sample.py")
    assert train.main(report[1:]) == 0
    assert sample.main([*ask[1:], "--device=cpu"]) == 0
    assert "*" in capsys.readouterr().out.splitlines()[-1]


def test_text_end_to_end(capsys):
    flags = [*ON_TEXT, "--steps=40", "--eval_every=20", "--lr=1e-2", "--out_dir=t", "--seeds=1,2"]
    assert train.main([*flags, "--method=arm,mdm,isad,ppots_mirror"]) == 0
    for line in lines_of("t").values():
        assert line["bits_per_char"] == pytest.approx(line["nll"] / math.log(2))
        assert line["nll"] < line["curve"][0]["nll"] and 0 < line["nll_se"] < 0.5
        assert "accuracy" not in line
    capsys.readouterr()
    assert sample.main(["--out_dir=t", "--method=arm", "--prompt=12 gr", "--device=cpu"]) == 0
    assert capsys.readouterr().out.startswith("12 gr")
    assert "13 tokens" in refused(capsys, sample.main, "--out_dir=t", "--method=mdm", f"--prompt={'1' * 13}")
    assert "'Q'" in refused(capsys, sample.main, "--out_dir=t", "--method=mdm", "--prompt=Q")
    assert "arm" in refused(capsys, sample.main, "--out_dir=t", "--method=arm", "--prompt=1_").lower()


@pytest.mark.parametrize("dataset", ["add2", "a.txt"])
def test_the_variance_of_the_gradient(dataset, monkeypatch, capsys):
    """A, B and C of sums at the first and at the last weights; for text a total with its error."""
    monkeypatch.setattr(variance, "METHODS", ["sqrtk"])
    monkeypatch.setattr(variance, "N_SEQUENCES", 6)
    flags = FLAGS if dataset == "add2" else ON_TEXT
    flags = [*flags, "--lr=0.1", "--seeds=3,1", "--out_dir=v"]
    assert train.main([*flags, "--method=arm,mdm,ppots", "--variance"]) == 0
    rows = lines_of("v", "variance.jsonl")
    assert list(rows) == [(method, 3) for method in ("mdm", "arm", "ppots", "sqrtk")]
    cfg, _, _ = train.parse_args(flags)
    data = train.load_data(cfg, ["mdm"])
    start, pos = train.build(cfg, "mdm", [3], data, "cpu")
    end, _, _ = sample.load_model("v", "mdm", 3)
    for row in rows.values():
        assert row["law"] == pytest.approx(mdm.cost_in_arms(row["method"], len(pos))) \
            or row["method"] in ("arm", "ppots")  # fmt: skip
        for at in ("start", "end"):
            if dataset == "add2":
                parts = [row[f"{at}_{part}"] for part in "ABC"]
                assert sum(parts) == pytest.approx(row[at]) and row[at] > 0
            else:
                assert row[f"{at}_error"] > 0
    assert rows["arm", 3]["law"] == 1
    if dataset == "add2":
        for at, model in (("start", start), ("end", end)):
            exact = mdm.exact_variance("mdm", mdm.grams(model, data.test[:6], pos), 3)
            assert rows["mdm", 3][at] == pytest.approx(exact["total"], rel=1e-5)
    assert "sqrtk" in capsys.readouterr().out


# ---- One folder is one comparison


def test_a_run_with_other_settings_is_refused(capsys):
    run()
    before = Path("o/results.jsonl").read_text("utf-8")
    for flag, words in {
        "--n_test=33": "n_test 32, not 33", "--eval_every=1": "eval_every 2, not 1",
        "--lr=1": "lr 0.003, not 1.0", "--n_train=100": "data ", "--dataset=add3": "data ",
        "--until_nll=1": "until_nll 0.0, not 1.0",
    }.items():  # fmt: skip
        assert words in train_refused(capsys, flag, "--resume")
    settings = json.loads(Path("o/settings.json").read_text("utf-8"))
    Path("o/settings.json").write_text(json.dumps(settings | {"device": "cuda"}), "utf-8")
    assert "device cuda, not cpu" in train_refused(capsys)
    assert Path("o/results.jsonl").read_text("utf-8") == before
    assert train.main([*ON_TEXT, "--seeds=1", "--method=mdm", "--out_dir=t"]) == 0
    on_text = [*ON_TEXT, "--seeds=1", "--method=mdm", "--out_dir=t"]
    assert "block_size 12, not 13" in refused(capsys, train.main, *on_text, "--block_size=13")
    Path("a.txt").write_text(TEXT.replace("w", "h"), encoding="utf-8")
    assert "data " in refused(capsys, train.main, *on_text)


def test_methods_and_seeds_share_a_folder_and_other_settings_get_another():
    run("--out_dir=", "--method=mdm,ppots")
    run("--out_dir=", "--method=ppots,exactk", "--ppots_fit=grid", "--seeds=5,1")
    run("--out_dir=", "--method=mdm", "--lr=0.1")
    labels = [("mdm", 1), ("ppots", 1)]
    for method in ("ppots ppots_fit=grid", "exactk"):
        labels += [(method, 5), (method, 1)]
    assert list(lines_of(FOLDER)) == labels
    assert sorted(path.name for path in Path("out").iterdir()) == sorted(
        [Path(FOLDER).name, Path(FOLDER.replace("_eval", "_lr0.1_eval")).name]
    )
    first = lines_of(FOLDER)["mdm", 1]
    run("--out_dir=", "--method=mdm")
    again = lines_of(FOLDER)
    assert list(again) == labels  # replaced, not doubled
    assert again["mdm", 1]["curve"] == first["curve"]
    assert runs.newest_folder() == str(Path(FOLDER))


def test_damaged_lines_are_reported_and_kept(capsys):
    run("--seeds=1,2")
    path = Path("o/results.jsonl")
    first, second = path.read_text("utf-8").splitlines()
    damaged = [second[:50], first + second, '{"method": "mdm"}', "[1]", "5"]
    path.write_text("\n".join(["\ufeff" + first, *damaged, "", second]), "utf-8")
    run("--method=arm")
    said = capsys.readouterr().err
    for number in range(2, 7):
        assert f"line {number} of o/results.jsonl" in said or f"o/results.jsonl, line {number}" in said
    content = path.read_text("utf-8").splitlines()
    assert [line for line in content if line in damaged] == damaged
    assert len(content) == 3 + len(damaged)
    assert json.loads(content[0])["seed"] == 1 and json.loads(content[1])["seed"] == 2


def test_a_folder_of_an_older_version_is_left_alone(capsys):
    run()
    os.remove("o/settings.json")
    assert "older version" in train_refused(capsys)
    assert not Path("o/settings.json").exists()


# ---- Going on


def test_resume_trains_nothing_again(capsys):
    run("--method=mdm,arm")
    before = lines_of("o")
    capsys.readouterr()
    run("--method=mdm,arm,exactk", "--resume")
    said = capsys.readouterr().out
    assert " step " not in "".join(line for line in said.splitlines() if "exactk" not in line)
    after = lines_of("o")
    assert {key: after[key] for key in before} == before
    assert "seeds [1], not [1, 2]" in train_refused(capsys, "--resume", "--seeds=1,2")


def test_resume_after_kill_9():
    """At random moments, with a checkpoint after every step, a run loses nothing."""
    flags = [*FLAGS, "--steps=15", "--eval_every=1", "--method=mdm,ppots_mirror", "--seeds=1,2"]
    flags += ["--resume"]
    rng = random.Random(0)
    for _ in range(2):
        command = [sys.executable, ROOT / "train.py", *flags, "--out_dir=o"]
        process = subprocess.Popen(command, stdout=subprocess.PIPE)
        for _ in range(rng.randrange(4, 14)):  # lines, one after each checkpoint
            process.stdout.readline()
        time.sleep(rng.uniform(0, 0.03))
        process.kill()
        process.communicate()
    for out_dir in ("o", "reference"):
        assert train.main([*flags, f"--out_dir={out_dir}"]) == 0
    found = [lines_of("o"), lines_of("reference")]
    assert list(found[0]) == list(found[1])
    for key, line in found[0].items():
        for name in ("curve", "nll", "gradclip", "forward_tokens"):
            assert line[name] == found[1][key][name]
    assert not list(Path("o").glob("**/*.tmp"))


@pytest.mark.skipif(os.name == "nt", reason="Windows sends Ctrl-C in another way")
def test_ctrl_c_says_how_to_go_on_and_a_second_run_is_turned_away(capsys):
    flags = ["--steps=100000", "--eval_every=10"]
    command = [sys.executable, ROOT / "train.py", *FLAGS, "--method=mdm", "--out_dir=o", *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    next(line for line in process.stdout if " step    10" in line)
    assert "in use" in train_refused(capsys, *flags)
    process.send_signal(signal.SIGINT)
    said, error = process.communicate(timeout=60)
    assert process.returncode == 130 and "--resume" in said.splitlines()[-1] and not error
    model, _, _ = sample.load_model("o", "mdm", 731)
    assert len(model.wte) == 1


@pytest.mark.parametrize("place", ["mdm.generate", "data.results.report.main"])
def test_ctrl_c_while_sampling_or_reporting_is_one_line(place, trained, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(place, interrupted)
    monkeypatch.setattr(sys, "argv", ["", f"--out_dir={trained}", "--method=mdm"])
    main = train.main
    if place == "mdm.generate":
        sys.argv += ASK
        main = sample.main
    else:
        sys.argv += ["--report"]
    assert runs.guarded(main) == 130
    assert capsys.readouterr().err == "\nstopped\n"


# ---- Fine-tuning


def test_fine_tuning_starts_every_seed_at_one_model(trained, capsys):
    begin = [*FLAGS, "--lr=0", "--weight_decay=0", "--method=arm,ppots_mirror", "--seeds=7,8"]
    begin += [f"--init_from={trained}", "--out_dir=f"]
    assert train.main(begin) == 0
    assert train.main([*begin, "--init_seed=3"]) == 0  # joins: another start, the same settings
    content = [json.loads(line) for line in Path("f/results.jsonl").read_text("utf-8").splitlines()]
    assert [(x["method"], x["start"], x["seed"]) for x in content] == [
        (method, start, seed)
        for start in ("add2-1", "add2-3")
        for method in ("arm", "ppots_mirror")
        for seed in (7, 8)
    ]
    fingerprints = {(x["method"], x["start"]): x["start_weights"] for x in content}
    assert len(set(fingerprints.values())) == 4
    for base, method in (("arm", "arm"), ("mdm", "ppots_mirror")):
        for seed in (1, 3):
            weights = runs.find_checkpoint(trained, base, seed)["weights"]
            path = Path("f", method, f"ckpt_add2-{seed}_7.pt")
            for name, value in runs.load_checkpoint(path)["state"]["model"].items():
                assert torch.equal(value, weights[name].expand_as(value))
    capsys.readouterr()
    assert train.main([*begin, "--resume"]) == 0
    assert " step " not in capsys.readouterr().out

    # Another pretraining of the same name, and a run that is not fine-tuned.
    other = [*FLAGS, "--out_dir=pre", "--lr=0.1", "--method=arm,mdm", "--seeds=1"]
    assert train.main(other) == 0
    assert "another add2-1" in refused(capsys, train.main, *begin, "--init_from=pre")
    assert "fine_tuned True, not False" in refused(capsys, train.main, *FLAGS, "--lr=0",
                                                   "--weight_decay=0", "--out_dir=f")  # fmt: skip
    assert "overwritten" in refused(capsys, train.main, *other, "--init_from=./pre")


def test_a_start_that_does_not_fit_is_refused(trained, capsys):
    start = f"--init_from={trained}"
    assert "n_embd" in train_refused(capsys, start, "--n_embd=32")
    assert "n_layer" in train_refused(capsys, start, "--n_layer=2")
    assert "n_head" in train_refused(capsys, start, "--n_head=4")
    assert "length" in train_refused(capsys, start, "--dataset=add3")
    assert "vocabulary" in train_refused(capsys, start, "--dataset=sum8")
    assert "seed 9" in train_refused(capsys, start, "--init_seed=9")
    assert "no checkpoint" in train_refused(capsys, "--init_from=nowhere")
    run()
    edit_checkpoint("o/mdm/ckpt_1.pt", done=False)
    assert "to the end" in train_refused(capsys, "--init_from=o", "--out_dir=f")


# ---- Several processes


def test_torchrun_shares_the_seeds(capsys):
    flags = [*FLAGS, "--method=mdm", "--seeds=3,1,2"]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2"]
    command += [ROOT / "train.py", *flags, "--out_dir=o"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert said.count("all goes to") == 1 and "seeds [3, 1]" in said
    assert train.main([*flags, "--out_dir=alone"]) == 0
    wanted = lines_of("alone")
    found = lines_of("o")
    assert set(found) == set(wanted)
    for key, line in found.items():
        assert line["nll"] == pytest.approx(wanted[key]["nll"], rel=1e-3)
    message = refused(capsys, train.main, *flags, "--out_dir=o", "--resume")
    assert "seeds [3, 1], not [3, 1, 2]" in message
    smallest, _, _ = sample.load_model("o", "mdm")
    first, _, _ = sample.load_model("o", "mdm", 1)
    assert all(torch.equal(a, b) for a, b in zip(smallest.parameters(), first.parameters()))
    assert Path("o/mdm/ckpt_2.pt").exists() and len(list(Path("o").glob("*.jsonl"))) == 1


def test_report_under_torchrun_prints_once(trained, monkeypatch, capsys):
    monkeypatch.setattr("data.results.figures.write", lambda *_: "")
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr(sys, "stdout", sys.stdout)  # main changes it
        assert train.main(["--report", f"--out_dir={trained}"]) == 0
        assert ("minus mdm" in capsys.readouterr().out) == (rank == "0")


@pytest.mark.parametrize("rank, world_size", [("abc", "2"), ("1", None), ("5", "4"), ("0", "0"),
                                              (None, "2"), ("-1", "2")])  # fmt: skip
def test_a_wrong_environment_is_refused(rank, world_size, monkeypatch, capsys):
    for name, value in (("RANK", rank), ("WORLD_SIZE", world_size)):
        if value is not None:
            monkeypatch.setenv(name, value)
    assert "torchrun" in train_refused(capsys)


def test_an_empty_environment_is_a_single_process(monkeypatch):
    monkeypatch.setenv("RANK", "")
    monkeypatch.setenv("WORLD_SIZE", "")
    assert runs.torchrun_share() == (0, 1)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert runs.torchrun_share() == (0, 1)


# ---- What users do wrong

REFUSED = {
    "--method=nonsense": "unknown method",
    "--method=": "unknown method",
    "--method=arm_mirror": "no masks",
    "--method=mdm_batch2_steps2": "choose one",
    "--baseline=nonsense": "unknown method",
    "--nonsense=1": "unrecognized",
    "--ste=5": "unrecognized",
    "--lr=x": "invalid float",
    "--lr=nan": "between",
    "--beta2=1": "beta2",
    "--steps=0": "not between 1 and 1000000000",
    "--n_test=1000001": "not between 1 and 1000000",
    "--n_head=3": "twice --n_head=3",
    "--ppots_fit=x --method=ppots": "none of epr, grid",
    "--seeds=1,01": "different whole numbers",
    "--seeds=-1": "different whole numbers",
    "--n_seeds=2": "give one of them",
    "--dataset=add9": "no data set",
    "--n_train=20000000": "9000 training problems",
    "--block_size=32": "has an effect on text",
    "--tokenizer=gpt2": "has an effect on text",
    "--ppots_fit=grid": "has an effect on ppots",
    "--isad_tokens=1": "has an effect on isad",
    "--method=isad": "none of its tokens",
    "--method=isad --isad_tokens=+=": "none of its tokens",
    "--method=isad --isad_tokens=x": "'x'",
    "--method=mdm,strats --batch_size=7": "no strata",
    "--init_seed=3": "--init_from",
    "--device=moon": "--device=moon",
    "--method=arm --variance": "add mdm",
    "--out_dir=a.txt/o": "cannot",
    "--report --out_dir=nowhere": "nowhere",
}
REFUSED_ON_TEXT = {"--n_train=5": "has an effect on sums", "--method=syrm": "syrm"}
SAMPLES_REFUSED = {
    "--prompt=12": "not like",
    "--prompt=12+34=0000": "not like",
    "--prompt=_2+34=": "not like",
    "--prompt=12+3x=": "'x'",
    "--prompt=12+34=0_ --method=arm": "gaps",
    "--seed=9": "there are [1, 3]",
    "--method=exactk": "no checkpoint",
    "--method=x": "unknown method",
    "--steps=0": "at least 1",
    "--temperature=-1": "at least 0",
    "--mask_char=ab": "one character",
    "--order=up": "up",
    "--file=nowhere": "nowhere",
    "--out_dir=nowhere": "nowhere",
    "--device=moon": "--device=moon",
}


@pytest.mark.parametrize("flags, words", REFUSED.items())
def test_training_refuses(flags, words, capsys):
    assert words in train_refused(capsys, *flags.split())


@pytest.mark.parametrize("flags, words", REFUSED_ON_TEXT.items())
def test_training_on_text_refuses(flags, words, capsys):
    assert words in refused(capsys, train.main, *ON_TEXT, "--method=mdm", *flags.split())


@pytest.mark.parametrize("flags, words", SAMPLES_REFUSED.items())
def test_sampling_refuses(flags, words, trained, capsys):
    ask = ["--device=cpu", f"--out_dir={trained}", "--method=mdm", *flags.split()]
    assert words in refused(capsys, sample.main, *ask)


def test_a_checkpoint_that_cannot_be_used(capsys, monkeypatch):
    """No message tells to delete it."""
    run()
    path = Path("o/mdm/ckpt_1.pt")
    whole = path.read_bytes()
    good = torch.load(path, weights_only=True)
    ask = [*ASK, "--out_dir=o", "--method=mdm"]
    mine = {"a class that is not torch's": Path("x")}
    for content in (whole[:1000], b"", b"soup", {"step": 3}, good | {"version": 1}, good | mine):
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            torch.save(content, path)
        for said in (refused(capsys, sample.main, *ask), train_refused(capsys, "--resume")):
            assert "ckpt_1.pt" in said and "delete" not in said
    assert "damaged" in said

    def denied(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(torch, "load", denied)
    assert "Permission denied" in refused(capsys, sample.main, *ask)


@pytest.mark.parametrize("what", ["diverged", "not finite"])
def test_a_diverged_model_is_neither_sampled_nor_started_from(what, capsys):
    run()
    changes = {"diverged": torch.tensor([3.0])}
    if what == "not finite":
        model = torch.load("o/mdm/ckpt_1.pt", weights_only=True)["state"]["model"]
        changes = {"model": model | {"wte": model["wte"] * torch.inf}}
    edit_checkpoint("o/mdm/ckpt_1.pt", **changes)
    assert "diverged" in refused(capsys, sample.main, *ASK, "--out_dir=o", "--method=mdm")
    assert "diverged" in train_refused(capsys, "--init_from=o", "--out_dir=f")


def test_out_of_memory_and_a_full_disk_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(torch, "save", lambda *_: torch.serialization.io.open("/dev/full", "x"))
    assert "cannot write" in train_refused(capsys)
    monkeypatch.setattr(train, "build", lambda *_: torch.empty(2**60))
    assert "--n_embd" in train_refused(capsys)
    monkeypatch.setattr(train, "build", lambda *_: torch.zeros(2) @ torch.zeros(3))
    with pytest.raises(RuntimeError, match="size"):  # a bug is not mistaken for it
        run()


def test_a_tilde_is_the_home_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    run("--out_dir=~/o")
    assert (tmp_path / "home" / "o" / "settings.json").exists()
    run("--init_from=~/o")
    assert sample.main([*ASK, "--out_dir=~/o", "--method=mdm"]) == 0


def test_an_accelerator_that_cannot_be_used(monkeypatch, capsys):
    """Without --device training goes on with the CPU. With it, the reason is given."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))

    def zeros(*_, device):
        if device != "cpu":
            raise RuntimeError("no kernel image\nand more lines")
        return torch.ones(1)

    monkeypatch.setattr(torch, "zeros", zeros)
    assert train.pick_device("auto") == "cpu"
    assert "no kernel image" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        train.pick_device("mps")
    said = capsys.readouterr().err
    assert "no kernel image" in said and "--device=cpu" in said and said.count("\n") == 1


def test_each_line_of_a_prompts_file_is_one_prompt():
    """Form feed, line separator, next line and file separator do not end a line."""
    lines = ["12+34=", "a\x0cb", "a\u2028b", "a\x85b", "a\x1cb"]
    Path("prompts").write_bytes(("\ufeff" + "\r\n".join([*lines, "", ""])).encode("utf-8"))
    assert sample.parse_args(["--file=prompts"]).prompt == lines


def test_any_terminal_and_a_closed_pipe(trained):
    """cp1252 lacks Russian letters. `| head -1` closes the pipe while more is to come."""
    Path("a.txt").write_text("".join(f"привет, мир {i}\n" for i in range(99)), encoding="utf-8")

    def start(script, *flags):
        env = os.environ | {"PYTHONIOENCODING": "cp1252", "PYTHONUNBUFFERED": "1"}
        command = [sys.executable, ROOT / script, *flags]
        pipe = subprocess.PIPE
        return subprocess.Popen(command, env=env, stdout=pipe, stderr=pipe)

    on_text = [*ON_TEXT, "--method=mdm", "--seeds=1", "--out_dir=t"]
    said, error = start("train.py", *on_text).communicate()
    assert b"??????, ???" in said and b"Try it" in said and not error
    for process in (
        start("train.py", *on_text, "--resume", "--steps=4", "--method=mdm,arm"),
        start("train.py", "--report", f"--out_dir={trained}"),
        start("sample.py", "--out_dir=t", "--method=mdm", "--show", "--length=12", "--device=cpu"),
    ):
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait() in (0, 1)
