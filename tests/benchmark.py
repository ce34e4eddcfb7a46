"""Timings, side by side in one run, on whatever this machine has.

    python tests/benchmark.py                     # everything: a quarter of an hour of two cores
    python tests/benchmark.py input step          # some of it
    python tests/benchmark.py --out figures.csv   # as a table too

Each figure is a median of repeats, those of a row taken in turn, so that a slow moment hits both
sides. Nothing here is a test: a figure says something about the machine that it was measured on,
and about that machine on that day.
"""

import argparse
import csv
import itertools
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment
import data
import models
import predict

HERE = Path(__file__).resolve().parent
FINAL, BIG = augment.REPORT_MIX, "vflip,elastic,gray,invert,equalize,hflip"  # the report's mixes
ONE_AT_A_TIME = dict(
    vflip=transforms.RandomVerticalFlip(), elastic=transforms.ElasticTransform(),
    gray=transforms.RandomGrayscale(), invert=transforms.RandomInvert(),
    equalize=transforms.RandomEqualize(), hflip=transforms.RandomHorizontalFlip(),
)  # fmt: skip
NETWORKS = ("v14", "resnet18")


class Table:
    """Rows of name, ours, the other, unit, ratio: printed as they come, kept for a file."""

    def __init__(self):
        self.rows = []

    def add(self, name, ours, other="", unit="", better="higher"):
        """A row; its ratio is above 1 where ours is the better."""
        ratio = ""
        if other != "":
            ratio = ours / other if better == "higher" else other / ours
        self.rows.append((name, ours, other, unit, ratio))
        shown = [f"{x:,.4g}" if x < 100 else f"{x:,.0f}" for x in (ours, other) if x != ""]
        times = f"   {ratio:.3g} times" if ratio != "" else ""
        print(f"{name:<66} {' against '.join(shown)} {unit}{times}", flush=True)


def alternate(repeats, *functions):
    """Median seconds of each function, called in turn; the first round warms up."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):
        for function, record in zip(functions, times):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


# ---------------------------------------------------------------- input


class OneAtATime(torch.utils.data.Dataset):
    """The report's way: a Pillow picture a time, opened from its file or decoded beforehand."""

    def __init__(self, mix, paths, opened, count):
        def compose(pipeline):
            steps = [ONE_AT_A_TIME[step.name] for step in pipeline.steps]
            return transforms.Compose([*steps, transforms.ToTensor()])

        self.copies = [compose(pipeline) for pipeline in augment.parse(mix)]
        self.paths, self.count = paths, count
        self.pictures = None if opened else [Image.open(path).convert("RGB") for path in paths]

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        n = i * 7919 % len(self.paths)  # in no order
        picture = self.pictures[n] if self.pictures else Image.open(self.paths[n]).convert("RGB")
        return self.copies[i % len(self.copies)](picture), 0


def loader_speed(mix, paths, opened, workers, args, seconds=4.0):
    """Pictures a second of a DataLoader, start-up and first batches left out."""
    dataset = OneAtATime(mix, paths, opened, args.batch_size * 100_000)
    batches = iter(DataLoader(dataset, args.batch_size, num_workers=workers))
    for _ in range(2 + 4 * workers):
        next(batches)
    start, done = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        next(batches)
        done += 1
    return args.batch_size * done / (time.perf_counter() - start)


def batches_of(mix, args, device, count=20_000):
    """A function that makes the next batch of a mix from resident pictures."""
    shape = (count, 3, args.size, args.size)
    images = torch.randint(0, 256, shape, dtype=torch.uint8, device=device)
    labels, everything = torch.zeros(count, dtype=torch.int64, device=device), torch.arange(count)
    batches = data.Batches(
        images, labels, everything, augment.parse(mix), args.batch_size, 0, device
    )
    endless = itertools.chain.from_iterable(map(batches.epoch, itertools.count()))
    return lambda: next(endless)


def measure_input(args, device, table):
    """Both mixes: batched over tensors, against one picture at a time."""
    with tempfile.TemporaryDirectory() as folder:
        paths = write_pictures(Path(folder), 2000, args.size)
        for name, mix in (("final mix", FINAL), ("big set", BIG)):
            for opened in (True, False):
                for workers in (0, 2):
                    ours, theirs = [], []
                    for _ in range(max(1, args.repeats // 3)):
                        batch = batches_of(mix, args, device)
                        ours.append(args.batch_size / alternate(50, batch)[0])
                        theirs.append(loader_speed(mix, paths, opened, workers, args))
                    how = "opening each file" if opened else "decoded before"
                    table.add(
                        f"{name}, batched, against a DataLoader, {workers} workers, {how}",
                        statistics.median(ours), statistics.median(theirs), "pictures/s",
                    )  # fmt: skip


def write_pictures(folder, count, size):
    """Files of noise (a photograph of this size is no larger): their paths."""
    random = np.random.default_rng(0)
    paths = []
    for i in range(count):
        paths.append(folder / f"{i:06d}.jpg")
        coarse = random.integers(0, 256, (size // 4, size // 4, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((size, size), Image.Resampling.BICUBIC).save(paths[-1])
    return paths


# ---------------------------------------------------------------- a step of training


def a_step(name, args, device, precision, layout=None, compiled=False, batch=None):
    """A function that makes one training step of a network on one resident batch, or on batch()."""
    network = models.build_model(name, 200)
    layout = layout or predict.memory_format(network, device)
    network = network.to(device, memory_format=layout)
    optimizer = torch.optim.SGD(network.parameters(), 0.01, momentum=0.9, weight_decay=1e-4)
    resident = torch.rand(args.batch_size, 3, args.size, args.size, device=device)
    labels = torch.randint(0, 200, (args.batch_size,), device=device)
    forward = torch.compile(network, dynamic=False) if compiled else network

    def step():
        x, y = batch() if batch else (resident, labels)
        with predict.autocast(device, precision):
            answers = forward(x)
        F.cross_entropy(answers.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure_step(args, device, table):
    """What a step takes, and what each way of making it is worth."""
    precision = predict.choose_precision(device)
    n = 4096 if device.type == "cpu" else 8192
    square = torch.rand(n, n, device=device, dtype=precision)
    (seconds,) = alternate(args.repeats, lambda: square @ square)
    limit = 2 * n**3 / seconds
    table.add(f"a product of two {n} x {n} matrices, {precision}", limit / 1e9, "", "GFLOP/s")
    for name in NETWORKS:
        step = a_step(name, args, device, precision)
        with FlopCounterMode(display=False) as counter:
            step()
        real = a_step(name, args, device, precision, batch=batches_of(FINAL, args, device))
        batch = batches_of(FINAL, args, device)
        resident, fed, alone = alternate(args.repeats, step, real, batch)
        n = args.batch_size
        table.add(f"{name}: real input, against one resident batch", n / fed, n / resident,
                  "pictures/s")  # fmt: skip
        table.add(f"{name}: a batch of the final mix, against the step", alone * 1e3,
                  resident * 1e3, "ms", "lower")  # fmt: skip
        work = counter.get_total_flops()
        table.add(f"{name}: arithmetic of {work / n / 1e9:.2f} GFLOP a picture, against the limit",
                  work / resident / 1e9, limit / 1e9, "GFLOP/s")  # fmt: skip
        ways = {"channels_last, against contiguous": dict(layout=torch.channels_last)}
        if precision != torch.float32:
            ways[f"{precision}, against float32"] = dict(precision=precision)
        if shutil.which("c++") or device.type == "cuda":
            ways["compiled, against not"] = dict(compiled=True)
        for way, changed in ways.items():
            plain = dict(precision=precision)
            if "layout" in changed:
                plain["layout"] = torch.contiguous_format
            if "precision" in changed:
                plain["precision"] = torch.float32
            ours = a_step(name, args, device, **{"precision": precision, **changed})
            a, b = alternate(args.repeats, ours, a_step(name, args, device, **plain))
            table.add(f"{name}: {way}", n / a, n / b, "pictures/s")


# ---------------------------------------------------------------- the whole


def train(folder, *flags, processes=1):
    """The last row of the log of train.py, run as a user does."""
    words = [sys.executable]
    if processes > 1:
        words += ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)]
    threads = str(max(1, (os.cpu_count() or 1) // processes))
    words += [HERE.parent / "train.py", "--data", "demo", *flags, "--out", folder]
    environment = {**os.environ, "OMP_NUM_THREADS": threads}
    subprocess.run(list(map(str, words)), env=environment, check=True, capture_output=True)
    with open(Path(folder) / "log.csv", newline="") as file:
        return list(csv.DictReader(file))[-1]


def measure_epoch(args, device, table):
    """An epoch as the log has it, validation included, against its steps alone."""
    pictures = 2 * int((~data.load("demo").is_val).sum())  # a clean and another copy
    for name in NETWORKS:
        with tempfile.TemporaryDirectory() as folder:
            flags = ["--model", name, "--size", args.size, "--epochs", 2, "--lr", 0.01]
            row = train(folder, *flags, "--batch-size", args.batch_size)
        whole = float(row["seconds"])
        steps = pictures / float(row["images_per_second"])
        table.add(
            f"{name}: an epoch with validation, against its steps", whole, steps, "s", "lower"
        )


def measure_processes(args, device, table):
    """Two processes, against one: the same pictures a step, the same cores."""
    flags = ["--model", "resnet18", "--size", args.size, "--epochs", 3, "--lr", 0.01]
    with tempfile.TemporaryDirectory() as folder:
        two = train(f"{folder}/2", *flags, "--batch-size", args.batch_size // 2, processes=2)
        one = train(f"{folder}/1", *flags, "--batch-size", args.batch_size)
    speeds = (float(row["images_per_second"]) for row in (two, one))
    table.add("resnet18: two processes, against one", *speeds, "pictures/s")


def measure_reading(args, device, table):
    """Pictures a second from a folder, a zip and a tar.xz, as data.load reads them."""
    count = 5000
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "source"
        (source / "trainval").mkdir(parents=True)
        paths = write_pictures(source / "trainval", count, args.size)
        rows = [("Id", "Category"), *((path.name, i % 10) for i, path in enumerate(paths))]
        predict.write_table(source / "labels.csv", rows[0], rows[1:])
        files = sorted(path for path in source.rglob("*") if path.is_file())
        with zipfile.ZipFile(f"{folder}/a.zip", "w") as archive:
            for path in files:
                archive.write(path, path.relative_to(source))
        with tarfile.open(f"{folder}/a.tar.xz", "w:xz") as archive:
            archive.add(source, "source")
        for place in (source, f"{folder}/a.zip", f"{folder}/a.tar.xz"):
            (seconds,) = alternate(min(3, args.repeats), lambda place=place: data.load(place))
            table.add(f"reading {Path(place).name}", count / seconds, "", "pictures/s")


def measure_growth(args, device, table):
    """An epoch of the final mix from 10,000 to 1,000,000 pictures, each in a process of its own."""
    first = None
    for count in (10_000, 100_000, 1_000_000):
        words = [sys.executable, __file__, "--grown", str(count), "--size", str(args.size)]
        done = subprocess.run(words, check=True, capture_output=True, encoding="utf-8")
        seconds, memory = map(float, done.stdout.split()[-2:])
        first = first or seconds
        table.add(f"{count:,} pictures: time each, against that of 10,000", seconds * 1e6,
                  first * 1e6, "microseconds", "lower")  # fmt: skip
        pictures = count * 3 * args.size**2 / 2**30
        table.add(f"{count:,} pictures: peak memory beside torch, against the pictures' own",
                  memory, pictures, "GiB", "lower")  # fmt: skip


def grown(count, args):
    """Print seconds a picture and GiB, from data in memory to the end of an epoch (Linux only)."""
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    images = torch.empty(count, 3, args.size, args.size, dtype=torch.uint8)
    for part in images.split(10_000):
        part.random_(0, 256)
    labels = torch.arange(count) % 200
    start = time.perf_counter()
    train, _ = data.split(labels, 0.1, 0)
    data.statistics(images, train)
    batches = data.Batches(images, labels, train, augment.parse(FINAL), args.batch_size, 0, "cpu")
    for _ in batches.epoch(0):
        pass
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(seconds / count, (peak - before) / 2**30)


PARTS = dict(
    input=measure_input, step=measure_step, epoch=measure_epoch, reading=measure_reading,
    growth=measure_growth, processes=measure_processes,
)  # fmt: skip


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)"
    )
    parser.add_argument("--size", type=int, default=40, help="side of the pictures (default: 40)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--repeats", type=data.at_least(1), default=9, help="(default: 9)")
    parser.add_argument("--out", metavar="FILE", help="a CSV file for the table")
    parser.add_argument("--grown", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    unknown = set(args.parts) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    if args.grown:
        grown(args.grown, args)
        return
    device, table = predict.choose_device(), Table()
    precision = predict.choose_precision(device)
    print(f"torch {torch.__version__}, {predict.computed_on(device, precision)}\n")
    with predict.environment(device):
        for part in args.parts or PARTS:
            PARTS[part](args, device, table)
    if args.out:
        predict.write_table(args.out, ["name", "ours", "other", "unit", "ratio"], table.rows)


if __name__ == "__main__":
    main()
