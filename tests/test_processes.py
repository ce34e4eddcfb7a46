"""Runs of several processes, started by torchrun as a user does it: the same curve, none left."""

import csv

import pytest
import torch
from conftest import run, same_tree
from test_data import batches_of

pytestmark = pytest.mark.usefixtures("on_cpu")  # of which a machine has more than GPUs

# A network without batch norm and dropout, whose curve is the same however a batch is shared out;
# and a train.py of which process 1 can die, or get a signal, before some step of some epoch.
SCRIPT = """
import os, pathlib, signal, time
import numpy as np
import torch
from torch import nn
from torchvision import datasets
import models, predict, train

class Plain(models.Network):
    def __init__(self, num_classes):
        super().__init__()
        first = [nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
        self.all = nn.Sequential(*first, nn.Flatten(), nn.Linear(32 * 16, num_classes))

    def forward(self, x):
        return self.all(self.normalise(x))

class SlowlyDownloaded:
    classes, targets = ["a", "b"], [0, 1] * 20

    def __init__(self, root, train, download):
        file = pathlib.Path("pictures.npy")
        if not file.exists():
            file.touch()
            time.sleep(3)
            np.save(file, np.random.default_rng(0).integers(0, 255, (40, 16, 16, 3), np.uint8))
        self.data = np.load(file)

def unlucky(run, epoch, step, *batch):
    if os.environ.get("RANK") == "1" and [epoch, step] == [1, 3] and not run.args.resume:
        if os.environ.get("FATE") == "death":
            os._exit(9)
        if os.environ.get("FATE") == "signal":
            os.kill(os.getpid(), signal.SIGTERM)
    return train_step(run, epoch, step, *batch)

models.MODELS["plain"] = Plain
predict.choose_precision = lambda device: torch.float32  # some processors have bfloat16
datasets.CIFAR10 = SlowlyDownloaded
train_step, train.train_step = train.train_step, unlucky
train.main()
"""
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]
FLAGS = ["--data", "demo", "--model", "plain", "--lr", "0.05", "--val", "0.2", "--epochs", "3"]


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    path = tmp_path_factory.mktemp("script") / "plain.py"
    path.write_text(SCRIPT)
    return path


def log_of(folder):
    with open(folder / "log.csv", newline="") as file:
        return [{**row, "images_per_second": 0, "seconds": 0} for row in csv.DictReader(file)]


def weights_of(folder):
    """models.load_checkpoint would not know the network."""
    return torch.load(folder / "ckpt.pt", weights_only=True)


@pytest.mark.parametrize("count, batch_size", [(1000, 64), (333, 32), (71, 64), (8, 8)])
@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_out_each_batch_and_lose_no_picture(count, batch_size, world):
    def epoch(rank, world):
        batches = batches_of(count, "clean+hflip", batch_size, share=(rank, world))
        return [y.tolist() for _, y in batches.epoch(2)]

    parts = [epoch(rank, world) for rank in range(world)]
    together = [sorted(sum(step, [])) for step in zip(*parts)]
    train = count - count // 10
    assert sorted(sum(together, [])) == sorted([*range(train)] * 2)
    for step in zip(*parts):
        sizes = list(map(len, step))
        assert max(sizes) - min(sizes) <= 1 and min(sizes) >= 2
    if 2 * train >= batch_size:  # one process has the same batches
        assert together == [sorted(y) for y in epoch(0, 1)]


def test_two_processes_have_the_curve_of_one_with_twice_the_batch(script, tmp_path):
    flags = [*FLAGS, "--augment", "clean", "--limit", 290]  # batches of 9 and 10: 4 + 5, 5 + 5
    assert run(script, *flags, "--batch-size", 10, "--out", tmp_path / "one")[0] == 0
    status, said, _ = run(*TORCHRUN, script, *flags, "--batch-size", 5, "--out", tmp_path / "two")
    assert status == 0 and said.count("model: plain") == 1 and "2 processes" in said
    for a, b in zip(log_of(tmp_path / "one"), log_of(tmp_path / "two")):
        assert all(float(a[key]) == pytest.approx(float(b[key]), rel=1e-4) for key in a)
    one, two = (weights_of(tmp_path / name)["weights"] for name in ("one", "two"))
    assert list(one) == list(two)
    assert all(torch.allclose(one[key], two[key], atol=1e-4) for key in one)


def test_one_process_alone_downloads(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    status, said, errors = run(*TORCHRUN, script, *FLAGS, "--data", "cifar10", "--batch-size", 8)
    assert status == 0, errors
    assert "data: cifar10, 2 classes" in said and weights_of(tmp_path)["epoch"] == 3


def test_a_signal_to_one_process_stops_all_and_nothing_is_lost(script, tmp_path, monkeypatch):
    flags = [*FLAGS, "--augment", "clean+hflip", "--batch-size", "16"]
    assert run(*TORCHRUN, script, *flags, "--out", tmp_path / "whole")[0] == 0
    out = ["--out", tmp_path / "stopped"]
    monkeypatch.setenv("FATE", "signal")
    status, _, errors = run(*TORCHRUN, script, *flags, *out)
    assert status == 1 and errors.count("train.py: error") == 1
    assert "stopped by a signal to another process in epoch 2 after step 4; --resume" in errors
    monkeypatch.delenv("FATE")
    assert run(*TORCHRUN, script, "--resume", *out)[0] == 0
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "stopped")
    whole, stopped = weights_of(tmp_path / "whole"), weights_of(tmp_path / "stopped")
    assert same_tree(whole["weights"], stopped["weights"])
    assert same_tree(whole["resume"], stopped["resume"])


def test_a_process_that_dies_ends_the_run_which_goes_on_with_another_number(
    script, tmp_path, monkeypatch
):
    flags = [*FLAGS, "--augment", "clean", "--batch-size", "16", "--out", tmp_path]
    monkeypatch.setenv("FATE", "death")
    status, _, errors = run(*TORCHRUN, script, *flags)
    assert status == 1 and "train.py: error: another process of this run ended; --resume" in errors
    assert weights_of(tmp_path)["epoch"] == 1
    monkeypatch.delenv("FATE")
    status, said, _ = run(script, "--resume", "--out", tmp_path)
    assert status == 0 and "the last bits will differ" in said
    assert weights_of(tmp_path)["epoch"] == 3  # and as many steps an epoch as before
    assert weights_of(tmp_path)["resume"]["schedule"]["last_epoch"] == 3 * 14
