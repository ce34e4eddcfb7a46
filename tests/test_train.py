"""Runs: killed and resumed, stopped, refused; the schedules; what a run writes and leaves alone."""

import contextlib
import copy
import csv
import inspect
import math
import re
import signal
import sys
import time

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, TINY, run, same_tree, write_homework
from PIL import Image

import data
import models
import predict
import train


def flags(source, out, *more):
    """A run of four epochs on the homework, 24 steps each where it has 60 pictures."""
    return [
        "--data", str(source), "--model", TINY, "--epochs", "4", "--lr", "0.1", "--val", "0.2",
        "--batch-size", "4", "--out", str(out), *more,
    ]  # fmt: skip


def columns(path, leave_out=("images_per_second", "seconds")):
    with open(path, newline="") as file:
        return [
            {k: v for k, v in row.items() if k not in leave_out} for row in csv.DictReader(file)
        ]


def plain_content(path):
    """A checkpoint without what may differ: the clock's part of its log, and its folder."""
    content = torch.load(path, weights_only=True)
    for row in content["log"]:
        row.pop("seconds"), row.pop("images_per_second")
    content["args"].pop("out"), content["args"].pop("resume")
    return content


# train.py, but for a signal that the process gets in the middle of its second epoch.
CUT = """
import os, signal, sys, data, train
epoch = data.Batches.epoch
def cut(self, number, start=0):
    for step, batch in enumerate(epoch(self, number, start), start):
        if (number, step) == (1, 11):
            os.kill(os.getpid(), signal.{})
        yield batch
data.Batches.epoch = cut
train.main(sys.argv[1:])
"""


@pytest.mark.usefixtures("on_cpu")
@pytest.mark.parametrize(
    ("threads", "more"),
    [
        (2, []),
        (1, ["--schedule", "cyclic"]),
        (1, ["--schedule", "plateau", "--optimizer", "adam", "--lr", "0.01"]),
        (1, ["--schedule", "lambda", "--augment", "clean+hflip,gray", "--val", "0"]),
        (1, [*"--recipe quick --size 32 --grow 16 --mixup 0.5 --cutmix 1".split()]),
    ],
    ids=["cosine", "cyclic", "plateau and adam", "lambda without validation", "quick and mixed"],
)
def test_killed_in_the_middle_of_an_epoch_and_resumed_it_ends_the_same_bit_for_bit(
    tmp_path, homework, threads, more
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    status, _, error = run(ROOT / "train.py", *flags(homework, whole, *more), threads=threads)
    assert status == 0, error
    status, _, _ = run("-c", CUT.format("SIGKILL"), *flags(homework, cut, *more), threads=threads)
    assert status == -signal.SIGKILL and len(columns(cut / "log.csv")) == 1
    status, printed, error = run(ROOT / "train.py", "--resume", "--out", cut, threads=threads)
    assert status == 0 and "resumed after epoch 1 and 0 steps" in printed, error
    assert columns(cut / "log.csv") == columns(whole / "log.csv")
    assert (cut / "curves.png").exists()
    for name in ["ckpt.pt"] + ([] if "0" in more else ["best.pt"]):
        assert same_tree(plain_content(whole / name), plain_content(cut / name)), name


@pytest.mark.usefixtures("on_cpu")
def test_sigterm_stops_within_an_epoch_and_resuming_ends_the_same(tmp_path, homework):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(ROOT / "train.py", *flags(homework, whole))[0] == 0
    status, _, error = run("-c", CUT.format("SIGTERM"), *flags(homework, cut))
    assert status == 1 and error.count("\n") == 1
    assert "stopped by SIGTERM in epoch 2 after step 1" in error and "--resume goes on" in error
    assert 11 <= torch.load(cut / "ckpt.pt", weights_only=True)["resume"]["step"] <= 12
    status, printed, _ = run(ROOT / "train.py", "--resume", "--out", cut)
    assert status == 0 and "resumed after epoch 1 and 1" in printed
    assert same_tree(plain_content(whole / "ckpt.pt"), plain_content(cut / "ckpt.pt"))


@pytest.mark.parametrize(
    ("more", "sides"),
    [("", [16]), ("--size 40", [24, 32, 40]), ("--size 40 --grow 16", [16, 28, 40])],
)
def test_quick_grows_pictures_to_their_size_and_flags_beside_it_win(homework, more, sides):
    given = ["--recipe", "quick", "--data", str(homework), "--val", "0.2", *more.split()]
    run = train.Run(train.parse_args(given))
    assert [side for side, _ in run.sides] == sides
    assert run.val_images.shape[-1] == sides[-1] and run.state()["size"] == sides[0]


def schedule_of(name, lr=0.1, epochs=4, steps=50, optimizer="sgd", losses=(), warmup=0):
    """The rate and the momentum at every step of a run."""
    args = train.parse_args(
        ["--schedule", name, "--lr", str(lr), "--epochs", str(epochs), "--optimizer", optimizer]
        + ["--warmup", str(warmup)]
    )
    optimizer = train.make_optimizer(torch.nn.Linear(1, 1), args)
    schedule = train.SCHEDULES[name](optimizer, args, steps)
    rates, momenta = [], []
    for step in range(epochs * steps):
        group = optimizer.param_groups[0]
        rates.append(group["lr"])
        momenta.append(group["momentum"] if "momentum" in group else group["betas"][0])
        optimizer.step()
        if name != "plateau":
            schedule.step()
        elif (step + 1) % steps == 0:
            schedule.step(losses[step // steps])
    return rates, momenta


def test_schedules_are_what_their_names_say():
    rates, _ = schedule_of("cosine", lr=0.5)
    expected = [0.25 * (1 + math.cos(math.pi * step / 200)) for step in range(200)]
    assert rates == pytest.approx(expected, abs=1e-9)
    rates, momenta = schedule_of("cyclic", epochs=5, steps=1000)
    assert rates[0] == pytest.approx(0.01) and rates[2000] == pytest.approx(0.1)
    assert rates[1000] == pytest.approx(0.055) and rates[4000] == pytest.approx(0.01)
    assert momenta[0] == pytest.approx(0.9) and momenta[2000] == pytest.approx(0.8)
    short, _ = schedule_of("cyclic", epochs=10, steps=10)  # one whole cycle
    assert max(short) == short[50] == pytest.approx(0.1) and short[-1] == pytest.approx(0.0118)
    assert schedule_of("cyclic", optimizer="adam")[0][0] == pytest.approx(0.01)
    rates, _ = schedule_of("lambda")
    assert rates[::50] == pytest.approx([0.1 * 0.95**epoch for epoch in range(4)])
    assert rates[49] == rates[0]
    rates, _ = schedule_of("plateau", epochs=14, losses=[1.0] * 14)
    assert rates[11 * 50] == pytest.approx(0.1) and rates[12 * 50] == pytest.approx(0.01)
    assert set(schedule_of("constant")[0]) == {0.1}
    rates, _ = schedule_of("linear")
    assert rates == pytest.approx([0.1 * (1 - step / 200) for step in range(200)])


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_a_warm_up_rises_in_equal_parts_and_the_schedule_has_what_is_left(name):
    rates, _ = schedule_of(name, epochs=5, warmup=0.2)
    assert rates[:50] == pytest.approx([0.1 * (step + 1) / 51 for step in range(50)])
    assert rates[50:] == pytest.approx(schedule_of(name)[0])


def test_pictures_grow_over_a_run_and_are_validated_at_the_side_of_the_moment(
    homework, tmp_path, monkeypatch, capsys
):
    trained, step = [], train.train_step
    monkeypatch.setattr(train, "train_step", lambda *a: trained.append(a[3].shape[-1]) or step(*a))
    save = train.save
    monkeypatch.setattr(
        train, "save", lambda run, *name: save(run, *name) or save(run, f"{run.epoch}.pt")
    )
    train.main(flags(homework, tmp_path, "--size", "32", "--grow", "16"))
    counts = [trained.count(side) for side in (16, 24, 32)]
    assert sum(counts) == 4 * 24 and trained == sorted(trained)
    times = [count * side**2 for count, side in zip(counts, (16, 24, 32))]
    assert max(times) < 1.1 * min(times)  # equally long, within a step's rounding
    assert "16 to 24 to 32 px" in capsys.readouterr().out
    dataset = data.load(homework, size=32)
    val = data.parts(dataset, 0.2, seed=0)[1]
    sides = [trained[24 * epoch - 1] for epoch in range(1, 5)]  # of each epoch's last step
    assert len(set(sides)) == 3
    resized, resize = [], data.resized
    monkeypatch.setattr(
        data, "resized", lambda x, side: resized.append((x.shape[-1], side)) or resize(x, side)
    )
    for epoch, side in enumerate(sides, 1):
        network, checkpoint = models.load_checkpoint(tmp_path / f"{epoch}.pt")
        assert checkpoint["size"] == side and checkpoint["args"]["size"] == 32
        loss, right = predict.evaluate(network, dataset.images[val], dataset.labels[val], side=side)
        row = checkpoint["log"][-1]
        assert row["val_acc"] == pytest.approx(right.item() / 12)
        assert row["val_loss"] == pytest.approx(loss.item() / 12, rel=1e-4)
        resized.clear()
        predict.main([str(tmp_path / f"{epoch}.pt"), "--score", "--out", str(tmp_path / "s.csv")])
        assert {*resized} == {(32, side)}  # scored from the same pixels as in training
        assert f"validation: accuracy {row['val_acc']:.4f}" in capsys.readouterr().out


def test_the_defaults_are_the_reports_final_recipe():
    args = vars(train.parse_args([]))
    final = dict(model="v14", lr=0.5, epochs=40, batch_size=64, momentum=0.9, weight_decay=1e-4)
    final.update(optimizer="sgd", schedule="cosine", augment="clean+hflip:0.5,vflip:0.5,gray:0.1")
    assert {name: args[name] for name in final} == final
    options = inspect.signature(models.V14).parameters
    assert options["stem_kernel"].default == 5 and options["groups"].default == 3
    optimizer = train.make_optimizer(torch.nn.Linear(1, 1), train.parse_args([]))
    assert isinstance(optimizer, torch.optim.SGD) and not optimizer.defaults["nesterov"]
    assert train.parse_args(["--lr", "0.2"]).lr == 0.2


def test_a_run_leaves_what_it_says(trained):
    source, out = trained
    assert sorted(path.name for path in out.iterdir()) == sorted(train.FILES)
    rows = columns(out / "log.csv", leave_out=())
    names = "epoch,lr,train_loss,train_acc,val_loss,val_acc,images_per_second,seconds"
    assert [",".join(row) for row in rows] == [names] * 2
    assert [row["epoch"] for row in rows] == ["1", "2"]
    with Image.open(out / "curves.png") as curves:
        colours = {colour for _, colour in curves.getcolors(1 << 20)}
        assert {(0xD5, 0x5E, 0), (0, 0x72, 0xB2)} <= colours  # train and validation
    network, checkpoint = models.load_checkpoint(out / "ckpt.pt")
    dataset = data.load(source)
    assert checkpoint["epoch"] == 2 and checkpoint["classes"] == dataset.classes
    assert not any(key.startswith(("module.", "_orig_mod.")) for key in checkpoint["weights"])
    _, val = data.parts(dataset, 0.2, seed=0)
    answers = predict.logits(network, dataset.images[val]).argmax(1)
    accuracy = (answers == dataset.labels[val]).double().mean().item()
    assert float(rows[-1]["val_acc"]) == pytest.approx(accuracy, abs=1e-6)
    best = models.load_checkpoint(out / "best.pt")[1]
    assert "resume" not in best
    top = max(float(row["val_acc"]) for row in rows)
    assert float(rows[best["epoch"] - 1]["val_acc"]) == top


def test_a_new_run_moves_an_earlier_ones_files_aside(tmp_path, homework, capsys):
    out = tmp_path / "out"
    small = [*flags(homework, out), "--epochs", "1", "--limit", "12"]
    train.main(small)
    first = {name: (out / name).read_bytes() for name in train.FILES}
    train.main([*small, "--seed", "1"])
    assert "moved to" in capsys.readouterr().out
    assert {name: (out / "earlier-1" / name).read_bytes() for name in train.FILES} == first
    assert (out / "ckpt.pt").read_bytes() != first["ckpt.pt"]


def test_main_leaves_the_process_as_it_found_it(tmp_path, homework):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    train.main([*flags(homework, tmp_path / "out"), "--epochs", "1", "--limit", "12"])
    assert torch.equal(torch.rand(3), expected)
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))
    assert (threads, dtype) == (torch.get_num_threads(), torch.get_default_dtype())


def test_weights_that_are_not_finite_are_never_saved(tmp_path, homework, capsys):
    out = tmp_path / "out"
    wild = [*flags(homework, out), "--lr", "1e30", "--model", TINY + ",zero_init=false"]
    with pytest.raises(SystemExit) as stop:
        train.main(wild)
    error = capsys.readouterr().err
    assert stop.value.code == 1 and "no longer finite in epoch 1 at a rate of" in error
    assert "try a lower --lr" in error and list(out.glob("*.pt")) == []


@pytest.mark.parametrize("model", [TINY, "v16:width=16,tail=1,path_width=8"])
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_weights_whole_and_resumes_with_its_loss_scale(
    tmp_path, homework, monkeypatch, precision, model
):
    monkeypatch.setattr(predict, "choose_precision", lambda device: precision)
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    small = ["--limit", "24", "--epochs", "3", "--model", model]
    train.main([*flags(homework, whole), *small])
    with monkeypatch.context() as patch:
        patch.setattr(predict, "write_log", interrupt_in_epoch(2))
        with pytest.raises(SystemExit):
            train.main([*flags(homework, cut), *small])
    assert torch.load(cut / "ckpt.pt", weights_only=True)["epoch"] == 1
    train.main(["--resume", "--out", str(cut)])
    checkpoint = plain_content(whole / "ckpt.pt")
    assert same_tree(checkpoint, plain_content(cut / "ckpt.pt"))
    assert str(precision).replace("torch.", "") in checkpoint["computed_on"]
    assert all(w.dtype in (torch.float32, torch.int64) for w in checkpoint["weights"].values())
    scaled = precision == torch.float16
    assert bool(checkpoint["resume"]["scaler"]) == scaled
    assert not scaled or checkpoint["resume"]["scaler"]["_growth_tracker"] > 20


def interrupt_in_epoch(number):
    """A write_log that acts as Ctrl-C in the epoch of this number."""
    write_log = predict.write_log

    def interrupted(run):
        if run.epoch == number:
            raise KeyboardInterrupt
        write_log(run)

    return interrupted


@pytest.mark.parametrize("schedule", ["cosine", "lambda", "cyclic"])
def test_training_learns_and_the_log_says_at_which_rate(tmp_path, homework, monkeypatch, schedule):
    seeds = []
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: seeds.append(seed) or manual_seed(seed))
    train.main([*flags(homework, tmp_path), "--schedule", schedule, "--epochs", "6"])
    rows = columns(tmp_path / "log.csv")
    steps = 24  # 48 pictures twice in batches of 4
    at = {
        "cosine": lambda step: 0.05 * (1 + math.cos(math.pi * step / (6 * steps))),
        "lambda": lambda step: 0.1 * 0.95 ** (step // steps),
        "cyclic": lambda step: 0.01 + 0.09 * (1 - abs(step / 72 - 1)),  # one whole cycle
    }[schedule]
    expected = [at(epoch * steps - 1) for epoch in range(1, 7)]  # of each epoch's last step
    assert [float(row["lr"]) for row in rows] == pytest.approx(expected, rel=1e-4)
    assert float(rows[-1]["train_loss"]) < 0.8 * float(rows[0]["train_loss"])
    assert float(rows[-1]["train_acc"]) > 0.6  # of three classes
    assert len(set(seeds)) == len(seeds) == 6 * steps + 1  # dropout: another seed at every step


@pytest.mark.usefixtures("on_cpu")
def test_best_is_the_best_epoch_and_each_file_is_written_in_its_turn(
    tmp_path, homework, monkeypatch
):
    right = iter([5, 8, 8, 2])  # of the twelve validation pictures, epoch by epoch

    def answer(network, images, precision, side):
        _, val = data.parts(data.load(homework), 0.2, seed=0)
        truth = data.load(homework).labels[val]
        wrong = torch.arange(12) >= next(right)
        return F.one_hot((truth + wrong) % 3, 3).float() * 9

    written = []
    write_file = data.write_file
    monkeypatch.setattr(predict, "logits", answer)
    monkeypatch.setattr(
        data, "write_file", lambda path, write: written.append(path.name) or write_file(path, write)
    )
    train.main(flags(homework, tmp_path))
    assert torch.load(tmp_path / "best.pt", weights_only=True)["epoch"] == 2
    assert torch.load(tmp_path / "ckpt.pt", weights_only=True)["epoch"] == 4
    log = ["log.csv", "curves.png", "ckpt.pt"]
    assert written == ["best.pt", *log, "best.pt", *log, *log, *log]


@pytest.mark.usefixtures("on_cpu")
def test_plateau_looks_at_the_validation_loss(tmp_path, homework, monkeypatch):
    monkeypatch.setattr(predict, "logits", lambda *_, **__: torch.zeros(12, 3))
    train.main([*flags(homework, tmp_path), "--schedule", "plateau", "--epochs", "13"])
    rows = columns(tmp_path / "log.csv")
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    assert [float(row["lr"]) for row in rows] == pytest.approx([0.1] * 12 + [0.01])


@pytest.mark.usefixtures("on_cpu")
def test_resuming_elsewhere_says_so_and_cuts_the_log_back(trained, tmp_path, capsys, monkeypatch):
    source, out = trained
    log = (out / "log.csv").read_text()
    for name in train.FILES:
        (tmp_path / name).write_bytes((out / name).read_bytes())
    (tmp_path / "log.csv").write_text(log + "3,0,0,0,0,0,0,0\n")
    (tmp_path / "curves.png").unlink()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    monkeypatch.chdir(tmp_path)
    train.main(["--resume", "--val", "0.2", "--size", "16"])  # the values in force
    said = capsys.readouterr().out
    assert "77 threads, " in said and " from here: the last bits will differ" in said
    assert (tmp_path / "log.csv").read_text() == log and (tmp_path / "curves.png").exists()


def refused(capsys, argv, *words, status=2):
    with pytest.raises(SystemExit) as stop:
        train.main([str(x) for x in argv])
    error = capsys.readouterr().err
    assert stop.value.code == status and error.count("\n") == 1 and "Traceback" not in error
    for word in words:
        assert word in error, error


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--epoch", "3"], "unknown argument --epoch: did you mean --epochs?"),
        (["--data", "nowhere"], "there is no nowhere"),
        (["--model", "v99"], "unknown model 'v99'"),
        (["--model", "v14:wide=3"], "no option 'wide'"),
        (["--augment", "clean+flip"], "unknown augmentation 'flip': did you mean"),
        (["--lr", "0"], "argument --lr: '0' should be a number above 0"),
        (["--lr", "nan"], "argument --lr: 'nan' should be a number above 0"),
        (["--epochs", "2.5"], "argument --epochs: '2.5' should be a whole number, 1 or more"),
        (["--batch-size", "1"], "argument --batch-size: '1' should be a whole number, 2 or more"),
        (["--val", "1"], "argument --val: '1' should be at least 0 and below 1"),
        (["--val", "0.999"], "left to train on: lower --val"),
        (["--schedule", "cosin"], "argument --schedule: invalid choice: 'cosin' (choose from"),
        (["--size", "8"], "argument --size: '8' should be a whole number of pixels from 16"),
        (["--recipe", "quik"], "argument --recipe: invalid choice: 'quik'"),
        (["--schedule", "cyclic", "--warmup", "0.1"], "--warmup goes before cosine, linear, con"),
        (["--nesterov", "--momentum", "0"], "Nesterov momentum requires a momentum"),
        (["--resume"], "nothing to resume: there is no ckpt.pt in out"),
        (["--out", "file"], "--out file is a file"),
    ],
)
def test_a_wrong_flag_is_one_sentence_and_nothing_is_written(
    tmp_path, monkeypatch, capsys, homework, argv, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("kept")
    before = sorted(tmp_path.rglob("*"))
    refused(capsys, ["--data", homework, "--out", "out", "--limit", "20", *argv], words)
    assert sorted(tmp_path.rglob("*")) == before and (tmp_path / "file").read_text() == "kept"


def test_resuming_with_other_data_or_flags_is_refused(trained, tmp_path, capsys):
    source, out = trained
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    other = write_homework(tmp_path / "other", labelled=57)
    resume = ["--resume", "--out", out]
    refused(capsys, [*resume, "--data", other], "is not the data that this checkpoint")
    refused(capsys, [*resume, "--lr", "0.3"], "--lr 0.3 contradicts the run to be resumed", "0.1")
    refused(capsys, [*resume, "--epochs", "9"], "--epochs 9 contradicts the run")
    best_only = tmp_path / "best"
    best_only.mkdir()
    (best_only / "ckpt.pt").write_bytes((out / "best.pt").read_bytes())
    refused(capsys, ["--resume", "--out", best_only], "can't be resumed from")
    (best_only / "ckpt.pt").write_bytes(b"no")
    refused(capsys, ["--resume", "--out", best_only], "ckpt.pt is not a checkpoint")
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    train.main(
        ["--resume", "--out", str(out), "--lr", "0.1", "--data", str(source)]
    )  # no contradiction


def test_what_a_run_did_without_it_goes_on_without():
    stored = vars(train.parse_args(["--recipe", "best", "--data", "demo"]))
    stored = {**stored, "grow": None, "processes": 1}  # as before the recipe had --grow
    stored.pop("given")
    checkpoint = dict(args=stored, source="demo")
    again = train.resumed_args(train.parse_args(["--resume"]), checkpoint)
    assert (again.grow, again.mixup, again.resume) == (None, 0.2, True)
    with pytest.raises(ValueError, match="--grow 24 contradicts the run .* which has None"):
        train.resumed_args(train.parse_args(["--resume", "--grow", "24"]), checkpoint)


def test_what_a_jupyter_kernel_puts_into_argv_is_dropped(monkeypatch):
    monkeypatch.setitem(sys.modules, "ipykernel", object())
    monkeypatch.setattr(sys, "argv", ["ipykernel_launcher.py", "-f", "/x/kernel-1234.json"])
    assert train.parse_args().lr == 0.5
    monkeypatch.setattr(sys, "argv", ["x", "-f", "/x/kernel-1.json", "--lr", "0.25"])
    assert train.parse_args().lr == 0.25


def test_every_file_can_be_imported_without_side_effects():
    code = (
        "import sys; sys.argv = ['x', '--nonsense']; import augment, data, models, predict, train"
    )
    assert run("-c", code) == (0, "", "")


def test_ticks_are_round_numbers_up_to_the_top():
    assert predict.ticks(1) == [0, 0.2, 0.4, 0.6, 0.8, 1]
    assert predict.ticks(40) == [0, 10, 20, 30, 40]
    assert predict.ticks(0.37) == [0, 0.1, 0.2, 0.3]


def test_mixes_without_one_leave_each_step_out_once():
    assert predict.without_one("hflip,gray") == {
        "without hflip": "gray:0.1",
        "without gray": "hflip:0.5",
    }
    assert predict.without_one("clean+hflip,rotate=30") == {
        "without hflip in copy 2": "clean+rotate=30:1",
        "without rotate in copy 2": "clean+hflip:0.5",
    }
    assert predict.without_one("gray+clean") == {"without gray in copy 1": "clean+clean"}


def test_a_search_compares_seed_by_seed_and_against_the_noise():
    mixes = {"the mix": "a", "without x": "b", "without y": "c", "without z": "d"}
    known = {("a", 0): 0.50, ("a", 1): 0.60}  # the second split is an easier one
    known.update({("b", 0): 0.551, ("b", 1): 0.649, ("c", 0): 0.501, ("c", 1): 0.599})
    known.update({("d", 0): 0.449, ("d", 1): 0.551})
    rows, noise = predict.compare(mixes, known, range(2))
    # Each gain differs by 0.002 between the seeds: spread 0.001414, over two seeds 0.001; the 0.975
    # quantile of Student's t with three degrees of freedom is 3.182.
    assert noise == pytest.approx(0.003182, rel=0.01)
    assert [row[4] for row in rows] == ["all of it", "better", "within noise", "worse"]
    assert [row[3] for row in rows] == pytest.approx([0, 0.05, 0, -0.05])
    assert rows[1][1:3] == pytest.approx((0.6, 0.098 / 2**0.5))


SEARCH = ["--augment", "hflip,invert", "--epochs", "2", "--lr", "0.1", "--val", "0.3"]


def test_a_search_that_was_killed_ends_as_an_unbroken_one(homework, tmp_path, monkeypatch, capsys):
    flags = ["--data", str(homework), "--model", TINY, *SEARCH, "--search", "2"]
    train.main([*flags, "--out", str(tmp_path / "whole")])
    said = capsys.readouterr().out
    assert "round 1, 2 seeds a mix, noise" in said and "without invert" in said
    with Image.open(tmp_path / "whole" / "search.png") as chart:
        assert chart.width == 1040

    first, steps = train.train_steps, []
    (tmp_path / "killed" / "run-best").mkdir(parents=True)  # not of the search
    (tmp_path / "killed" / "run-best" / "ckpt.pt").write_bytes(b"another")

    def killed(run, *rest):
        steps.append(run)
        if len(steps) == 6:  # the second epoch of the third run
            raise data.Failed("killed")
        return first(run, *rest)

    monkeypatch.setattr(train, "train_steps", killed)
    with pytest.raises(SystemExit):
        train.main([*flags, "--out", str(tmp_path / "killed")])
    monkeypatch.setattr(train, "train_steps", first)
    log = (tmp_path / "killed" / "search.csv").read_text().splitlines()
    assert len(log) == 3  # the header and two finished runs
    capsys.readouterr()
    train.main(["--search", "2", "--resume", "--out", str(tmp_path / "killed")])
    assert "run-3" in capsys.readouterr().out  # and neither run-1 nor run-2 again
    assert not (tmp_path / "killed" / "earlier-1").exists()
    logs = [(tmp_path / out / "search.csv").read_text() for out in ("whole", "killed")]
    assert logs[0] == logs[1] and logs[0].startswith("mix,seed,val_acc\n")
    assert same_tree(
        *(
            models.load_checkpoint(tmp_path / out / "run-3" / "ckpt.pt")[1]["weights"]
            for out in ("whole", "killed")
        )
    )
    # Neither other seeds nor no search at all goes on with it.
    for given, told in (["--search", "3"], "which has 2"), ([], "give --search too"):
        with pytest.raises(SystemExit) as stop:
            train.main([*given, "--resume", "--out", str(tmp_path / "killed")])
        assert stop.value.code == 2 and told in capsys.readouterr().err
    # A new search moves the old one aside, but none of which a run is writing; wrong flags move
    # nothing, and one without validation is refused.
    with data.claimed(tmp_path / "killed" / "run-2"), pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", str(tmp_path / "killed")])
    assert stop.value.code == 2 and "another run writes to" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        wrong = ["--warmup", "0.1", "--schedule", "cyclic"]
        train.main([*flags, *wrong, "--out", str(tmp_path / "killed")])
    assert stop.value.code == 2 and "--warmup goes before" in capsys.readouterr().err
    assert (tmp_path / "killed" / "search.csv").read_text() == logs[0]
    train.main([*flags, "--out", str(tmp_path / "killed")])
    assert (tmp_path / "killed" / "earlier-1" / "run-1" / "ckpt.pt").is_file()
    assert (tmp_path / "killed" / "run-best" / "ckpt.pt").read_bytes() == b"another"
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--val", "0.0001", "--out", str(tmp_path / "none")])
    assert stop.value.code == 2 and "give a larger --val" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stop:
        train.main(
            ["--search", "2", "--augment", "hflop", "--data", "demo", "--out", str(tmp_path)]
        )
    assert stop.value.code == 2 and "did you mean hflip" in capsys.readouterr().err


def test_in_a_search_what_diverges_counts_as_chance(homework, tmp_path, monkeypatch, capsys):
    first = train.finish_epoch

    def diverges(run):
        if "invert" not in run.args.augment or run.args.seed == 0:
            run.totals += math.nan
        return first(run)

    monkeypatch.setattr(train, "finish_epoch", diverges)
    flags = ["--data", str(homework), "--model", TINY, *SEARCH, "--search", "2"]
    train.main([*flags, "--out", str(tmp_path)])
    assert "no longer finite" in capsys.readouterr().out
    with open(tmp_path / "search.csv", newline="") as file:
        known = {(row["mix"], row["seed"]): row["val_acc"] for row in csv.DictReader(file)}
    classes = len(data.load(str(homework)).classes)
    assert [float(known["hflip:0.5", seed]) for seed in "01"] == [1 / classes] * 2
    # The first run has left nothing, the second is another seed's: the same command goes on.
    train.main([*flags, "--seed", "0", "--resume", "--out", str(tmp_path)])
    table = (tmp_path / "search.csv").read_text()
    header = table.splitlines()[0]
    texts = [
        table.replace(",", ";"),  # as some spreadsheets save it
        f"{header}\nhflip\n",  # cut short
        f"{header}\n{'x' * 200_000}\n",  # a field longer than csv reads
        "\0",
        "",
    ]
    for text in texts:
        (tmp_path / "search.csv").write_text(text)
        with pytest.raises(SystemExit) as stop:
            train.main([*flags, "--resume", "--out", str(tmp_path)])
        assert stop.value.code == 2
        assert "search.csv is not as the search wrote it" in capsys.readouterr().err


def test_a_search_without_anything_to_leave_out_is_refused(homework, tmp_path, capsys):
    flags = ["--data", str(homework), "--model", TINY, "--augment", "clean", "--search", "2"]
    with pytest.raises(SystemExit) as stop:
        train.main([*flags, "--out", str(tmp_path)])
    assert stop.value.code == 2 and "nothing that a search" in capsys.readouterr().err


@pytest.mark.parametrize("width", [2, 4, 7, 8])
def test_narrow_networks_train_in_memory_of_their_own(tmp_path, width):
    argv = ["--data", "demo", "--limit", "60", "--augment", "hflip", "--lr", "0.1", "--val", "0.3"]
    argv += ["--model", f"v14:width={width},groups=2,stem_kernel=3", "--epochs", "2"]
    status, _, stderr = run(ROOT / "train.py", *argv, "--out", tmp_path)
    assert (status, stderr) == (0, "")


def test_momentum_is_none_where_float16_overflows_in_the_first_step():
    network = torch.nn.Linear(50, 50)
    optimizer = train.make_optimizer(network, train.parse_args(["--recipe", "quick"]))
    for weight in network.parameters():
        weight.grad = torch.full_like(weight, math.inf)
    optimizer.found_inf, optimizer.grad_scale = torch.ones(1), torch.ones(1)  # as a scaler does
    optimizer.step()
    assert all(not state["momentum_buffer"].any() for state in optimizer.state.values())


def test_a_recipes_flags_give_way_to_those_beside_it():
    args = train.parse_args(["--recipe", "quick", "--schedule", "cyclic"])
    assert (args.schedule, args.warmup, args.nesterov) == ("cyclic", 0, True)
    assert train.parse_args([]).recipe == "report"
    args = train.parse_args(["--recipe", "quick", "--schedule", "cyclic", "--warmup", "0.2"])
    assert args.warmup == 0.2  # which Run refuses
    args = train.parse_args(["--recipe", "quick", "--momentum", "0"])
    assert not args.nesterov and train.make_optimizer(torch.nn.Linear(1, 1), args)


class Clock:
    """A clock that steps of training move on by a second, those after the first `since` epochs by
    `pace` (which may be a function of the pictures' side), and validation at full size by 5.
    """

    def __init__(self, monkeypatch, pace=1, since=1):
        self.now, self.pace, self.since, self.step = 100.0, pace, since, train.train_step
        monkeypatch.setattr(time, "monotonic", lambda: self.now)
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(train, "train_step", self.train_step)
        self.evaluate = predict.evaluate
        monkeypatch.setattr(predict, "evaluate", self.evaluated)

    def evaluated(self, network, images, labels, precision, side):
        # of the 12 that validate; as their area
        self.now += 5 * len(labels) / 12 * (side / images.shape[-1]) ** 2
        return self.evaluate(network, images, labels, precision, side)

    def train_step(self, run, *batch):
        pace = self.pace if run.epoch >= self.since else 1
        self.now += pace(batch[2].shape[-1], run.epoch) if callable(pace) else pace
        return self.step(run, *batch)


def test_minutes_plan_as_many_epochs_as_fit_and_the_run_is_as_if_they_were_given(
    homework, tmp_path, monkeypatch, capsys
):
    Clock(monkeypatch)
    # 24 steps an epoch, 5 s to validate and 0.2 s for the curves: 29.2 s. 9 steps and 3 validations
    # are tried; of the 216 s left 0.95 are used, less half of the 5.2 s that are kept as a reserve.
    given = ["--data", homework, "--model", TINY, "--lr", "0.1", "--val", "0.2"]
    given = [*map(str, given), "--batch-size", "4"]
    train.main([*given, "--minutes", "4", "--out", str(tmp_path / "planned")])
    assert "planned: 6 epochs of 29.2 s" in capsys.readouterr().out
    train.main([*given, "--epochs", "6", "--out", str(tmp_path / "given")])
    ends = [torch.load(tmp_path / out / "ckpt.pt") for out in ("planned", "given")]
    assert same_tree(ends[0]["weights"], ends[1]["weights"])
    assert same_tree(ends[0]["resume"], ends[1]["resume"])
    assert ends[0]["args"]["epochs"] == 6 and float(ends[0]["log"][-1]["lr"]) < 1e-3


def test_where_the_machine_slows_down_a_run_stops_in_time_to_be_resumed(
    homework, tmp_path, monkeypatch, capsys
):
    clock = Clock(monkeypatch, pace=3)  # from the second epoch on
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--val", "0.2"]
    given += ["--batch-size", "4", "--minutes", "2", "--out", str(tmp_path)]
    with pytest.raises(SystemExit) as stop:
        train.main(given)
    assert stop.value.code == 1 and 205 < clock.now <= 220
    assert "stopped by --minutes 2 in epoch 2 after step 19" in capsys.readouterr().err
    # Each session has the minutes anew, and the epochs as planned.
    clock.pace = 1
    train.main([*given, "--resume"])
    log = columns(tmp_path / "log.csv")
    assert len(log) == 3 and float(log[-1]["lr"]) < 1e-3


@pytest.mark.parametrize("grow", [[], ["--grow", "16", "--size", "24"]])
def test_a_plan_made_beside_other_work_is_made_anew(homework, tmp_path, monkeypatch, capsys, grow):
    clock = Clock(monkeypatch)
    measured = predict.median_seconds
    monkeypatch.setattr(  # a budget of time is given for the steps alone
        predict, "median_seconds", lambda *rest: measured(*rest) * (2 if len(rest) == 3 else 1)
    )
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--val", "0.2", *grow]
    train.main([*given, "--batch-size", "4", "--minutes", "4", "--out", str(tmp_path)])
    said, log = capsys.readouterr().out, columns(tmp_path / "log.csv")
    assert re.search("planned: [23] epochs of (53.2|51.4) s", said) and "planned anew: " in said
    assert len(log) >= 5 and float(log[-1]["lr"]) < 2e-3 and clock.now < 340
    assert torch.load(tmp_path / "ckpt.pt")["args"]["epochs"] == len(log)


@pytest.mark.parametrize("pace, fewest", [(0.5, 17), (1.5, 12)])
def test_a_run_ends_as_planned_where_the_machine_becomes_faster_or_slower_half_way(
    homework, tmp_path, monkeypatch, capsys, pace, fewest
):
    clock = Clock(monkeypatch, pace, since=8)
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--val", "0.2"]
    train.main([*given, "--batch-size", "4", "--minutes", "8", "--out", str(tmp_path)])
    assert "planned: 14 epochs" in capsys.readouterr().out
    log, taken = columns(tmp_path / "log.csv"), clock.now - 100
    assert len(log) >= fewest and float(log[-1]["lr"]) < 1e-3 and 0.85 * 480 < taken < 480


def test_the_plan_stays_calm_where_a_side_takes_longer_than_it_seemed(
    homework, tmp_path, monkeypatch, capsys
):
    def pace(side, epoch):  # in seconds; 40 px turn out a tenth dearer than in the trial
        return (side / 16) ** 2 * (1.1 if epoch and side == 40 else 1)

    clock = Clock(monkeypatch, pace, since=0)
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--val", "0.2"]
    given += ["--size", "64", "--grow", "16", "--batch-size", "8"]
    train.main([*given, "--minutes", "30", "--out", str(tmp_path)])
    taken, said = clock.now - 100, capsys.readouterr().out
    assert 0.9 * 1800 < taken < 1800
    plans = [int(n) for n in re.findall(r"planned.*: (\d+) epochs", said)]
    assert max(plans) - min(plans) <= 3, plans


@pytest.mark.parametrize("minutes", [1.6, 1.7, 1.8, 2.0, 3.0])
def test_a_short_plan_has_the_time_to_validate_at_full_size(
    homework, tmp_path, monkeypatch, minutes
):
    clock = Clock(monkeypatch, lambda side, epoch: (side / 64) ** 2, since=0)
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--val", "0.5"]
    given += ["--size", "64", "--grow", "16", "--batch-size", "4", "--minutes", str(minutes)]
    train.main([*given, "--out", str(tmp_path)])
    assert clock.now - 100 < 60 * minutes
    log = columns(tmp_path / "log.csv")
    assert len(log) == torch.load(tmp_path / "ckpt.pt")["args"]["epochs"]


def test_epochs_that_do_not_fit_into_the_minutes_are_refused_or_stopped(
    homework, tmp_path, monkeypatch, capsys
):
    Clock(monkeypatch)
    given = ["--data", str(homework), "--model", TINY, "--val", "0.2", "--batch-size", "4"]
    with pytest.raises(SystemExit) as stop:
        train.main([*given, "--minutes", "0.3", "--out", str(tmp_path)])
    assert stop.value.code == 2 and "of --minutes 0.3 0 s are left" in capsys.readouterr().err
    assert not (tmp_path / "ckpt.pt").exists()
    with pytest.raises(SystemExit) as stop:
        train.main([*given, "--minutes", "0.3", "--epochs", "9", "--out", str(tmp_path)])
    assert stop.value.code == 1 and "stopped by --minutes 0.3" in capsys.readouterr().err
    train.main(["--resume", "--minutes", "9", "--out", str(tmp_path)])
    assert len(columns(tmp_path / "log.csv")) == 9
    with pytest.raises(SystemExit) as stop:
        train.main(["--search", "2", "--minutes", "3"])
    assert stop.value.code == 2 and "--search takes one process" in capsys.readouterr().err


@pytest.mark.usefixtures("on_cpu")
def test_a_compiled_run_gives_a_checkpoint_like_any_other(homework, tmp_path, monkeypatch):
    network = f"{TINY},dropout=0"  # compiled, dropout draws otherwise
    given = ["--data", homework, "--model", network, "--epochs", "1", "--lr", "0.01"]
    status, said, stderr = run(ROOT / "train.py", *given, "--compile", "--out", tmp_path / "a")
    assert status == 0 and re.search("float(32|16), compiled", said), stderr
    monkeypatch.setattr(torch, "compile", lambda network, **how: pytest.fail("compiled"))
    with pytest.raises(pytest.fail.Exception):
        train.main([*map(str, given), "--compile", "--out", str(tmp_path / "c")])
    train.main([*map(str, given), "--out", str(tmp_path / "b")])
    a, b = (torch.load(tmp_path / out / "ckpt.pt")["weights"] for out in "ab")
    assert list(a) == list(b)
    assert all(torch.allclose(a[key].float(), b[key].float(), atol=1e-3) for key in a)


def test_a_run_goes_on_where_another_precision_is_computed_in(homework, tmp_path, monkeypatch):
    """From a laptop to a T4: float16 has a scaler, whose state no float32 run has."""
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(train.predict, "stop_signals", lambda: contextlib.nullcontext(["SIGTERM"]))
    with pytest.raises(SystemExit):
        train.main([*given, "--epochs", "2"])
    monkeypatch.undo()
    monkeypatch.setattr(predict, "choose_precision", lambda device: torch.float16)
    run = train.prepare(train.parse_args([*given, "--resume"]))
    assert run.scaler.is_enabled() and run.scaler.get_scale() > 1


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_a_run_goes_on_in_another_memory_layout_as_in_its_own(
    homework, tmp_path, monkeypatch, optimizer
):
    """As from a GPU to a CPU with bfloat16: momentum has to lie in memory as the weights do."""

    def prepared(layout):
        monkeypatch.setattr(predict, "memory_format", lambda *_: layout)
        args = [*flags(homework, tmp_path / "run"), "--optimizer", optimizer, "--lr", "0.01"]
        args += ["--model", f"{TINY},dropout=0"]  # which draws in the order of memory
        return train.prepare(train.parse_args(args))

    first = prepared(torch.channels_last)
    batches = list(first.batches.epoch(0))
    for step, batch in enumerate(batches[:5]):
        train.train_step(first, 0, step, *batch)
    state, ends = first.state(), []
    for layout in (torch.channels_last, torch.contiguous_format):
        run = prepared(layout)
        run.restore(copy.deepcopy(state))
        train.train_step(run, 0, 5, *batches[5])
        ends.append(run.network.state_dict())
    one, other = (torch.cat([w.flatten().double() for w in end.values()]) for end in ends)
    far = ((one - other).abs() > 1e-4).double().mean()  # Adam magnifies the rounding of some
    assert far < 0.01


def test_a_checkpoint_from_before_it_held_the_rate_is_resumed(trained, tmp_path):
    content = torch.load(trained[1] / "ckpt.pt")
    del content["resume"]["rate"]
    content["args"]["epochs"] = 3
    torch.save(content, tmp_path / "ckpt.pt")
    train.main(["--resume", "--out", str(tmp_path)])
    assert len(columns(tmp_path / "log.csv")) == 3


def test_a_run_stopped_behind_the_last_step_of_an_epoch_logs_the_rate_of_that_step(
    homework, tmp_path, monkeypatch
):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train.main(flags(homework, whole))
    why_stop = train.why_stop

    def stop(run, signals, pace=None):
        last = pace is None and run.epoch == 1
        return "SIGTERM" if last else why_stop(run, signals, pace or 0.0)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(train, "why_stop", stop)
        train.main(flags(homework, cut))
    train.main([*flags(homework, cut), "--resume"])
    assert columns(cut / "log.csv") == columns(whole / "log.csv")
    assert same_tree(plain_content(whole / "ckpt.pt"), plain_content(cut / "ckpt.pt"))


def test_the_recipe_best_has_the_network_that_was_measured():
    name, options = models.parse(train.RECIPES["best"]["model"])
    network = models.build_model(name, 200, **options)
    assert sum(p.numel() for p in network.parameters()) == 11_190_600
    assert (options["stride"], options["zero_init"], options["avg_down"]) == (1, False, True)
    assert (options["dropout"], train.RECIPES["best"]["weight_decay"]) == (0.1, 1e-3)
    assert [len(group) for group in network.groups] == [2, 2, 2]
    assert [group[0].conv1.out_channels for group in network.groups] == [128, 256, 512]


@pytest.mark.parametrize("recipe", list(train.RECIPES))
def test_every_recipe_trains_without_another_flag(recipe, tmp_path):
    few = ["--limit", "40", "--epochs", "1", "--out", str(tmp_path)]
    train.main(["--data", "demo", "--recipe", recipe, *few])
    network, checkpoint = models.load_checkpoint(tmp_path / "ckpt.pt")
    assert checkpoint["args"]["lr"] == train.RECIPES[recipe]["lr"]
    assert predict.predict([network], data.load("demo", limit=20).images).shape == (20, 10)


def test_what_overflows_is_named_with_its_epoch_and_not_saved(homework, tmp_path, monkeypatch):
    first = train.train_steps

    def overflow(run, stop, progress):
        why = first(run, stop, progress)
        if run.epoch == 1:
            run.network.fc.weight.data[0, 0] = math.inf
        return why

    monkeypatch.setattr(train, "train_steps", overflow)
    given = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--out", str(tmp_path)]
    run = train.prepare(train.parse_args([*given, "--epochs", "3"]))
    with pytest.raises(train.Diverged, match="weights are .* in epoch 2 .* still holds epoch 1"):
        train.fit(run)
    assert models.load_checkpoint(tmp_path / "ckpt.pt")[1]["epoch"] == 1
