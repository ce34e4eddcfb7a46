"""Shared by the tests: small data sets on disk, in every layout, made from the demo's textures."""

import os

# Tiny networks gain nothing from threads, and lose much of their speed where others want the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

import data
import predict
import train

ROOT = Path(__file__).resolve().parent.parent
TINY = "v14:width=8,groups=2,stem_kernel=3"  # quick to train, and every part of v14 is in it


def write_homework(folder, labelled=60, test=9, header="Id,Category"):
    """labels.csv, trainval/ and test/ as the homework has them: PNG, categories 8, 9 and 10."""
    demo = data.load("demo")
    three = (demo.labels < 3).nonzero().flatten()
    (folder / "trainval").mkdir(parents=True)
    (folder / "test").mkdir()
    rows = [header]
    for n, i in enumerate(three[:labelled].tolist()):
        save_picture(demo.images[i], folder / "trainval" / f"trainval_{n:05d}.png")
        rows.append(f"trainval_{n:05d}.png,{demo.labels[i] + 8}")
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")
    for n in range(test):
        save_picture(demo.test_images[n], folder / "test" / f"test_{n:05d}.png")
    return folder


def save_picture(image, path):
    Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)


@pytest.fixture
def on_cpu(monkeypatch):
    """Where there is a GPU too: for what a CPU alone promises, such as the same bits again."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # other processes
    monkeypatch.setattr(predict, "choose_device", lambda: torch.device("cpu"))  # this one


@pytest.fixture
def homework(tmp_path):
    return write_homework(tmp_path / "homework")


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """(the homework's folder, a folder with a finished run of two epochs on it)"""
    source = write_homework(tmp_path_factory.mktemp("source") / "homework")
    out = tmp_path_factory.mktemp("run")
    flags = ["--data", str(source), "--model", TINY, "--epochs", "2", "--lr", "0.1", "--val", "0.2"]
    train.main([*flags, "--batch-size", "16", "--out", str(out)])
    return source, out


def run(*argv, threads=1):
    """(exit status, stdout, stderr) of a python command in another process, as a user runs it."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        env={**environment, "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
        timeout=300,
    )
    return done.returncode, done.stdout, done.stderr


def same_tree(a, b):
    """Whether two nested checkpoints are equal, tensors to the last bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same_tree(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same_tree, a, b))
    return a == b
