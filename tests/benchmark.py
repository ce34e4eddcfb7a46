"""Timings, side by side in one run, on whatever this machine has: python tests/benchmark.py

Each row is the median of alternating repeats. Nothing here is a test: a figure says something
about the machine that it was measured on, and about that machine on that day.
"""

import argparse
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torchvision import transforms

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import augment
import data
import models
import predict


def alternate(repeats, *functions):
    """Median seconds of each function, called in turn so that a slow moment hits all alike."""
    times = [[] for _ in functions]
    for repeat in range(repeats + 1):  # the first round warms up and isn't counted
        for function, record in zip(functions, times):
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if repeat:
                record.append(time.perf_counter() - start)
    return [statistics.median(record) for record in times]


def a_step(name, device, precision, size, batch_size):
    """A function that makes one training step of a network on one resident batch."""
    network = models.build_model(name, 200).to(device)
    optimizer = torch.optim.SGD(network.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    x = torch.rand(batch_size, 3, size, size, device=device)
    y = torch.randint(0, 200, (batch_size,), device=device)

    def step():
        with predict.autocast(device, precision):
            answers = network(x)
        F.cross_entropy(answers.float(), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def a_batch(device, size, batch_size, mix=augment.REPORT_MIX, count=20_000):
    """A function that makes the next batch of a mix from resident pictures."""
    images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, device=device)
    labels, everything = torch.zeros(count, dtype=torch.int64, device=device), torch.arange(count)
    pipelines = augment.parse(mix)
    batches = data.Batches(images, labels, everything, pipelines, batch_size, 0, device)
    epoch = batches.epoch(0)
    return lambda: next(epoch)


BIG_SET = "vflip,elastic,gray,invert,equalize,hflip"  # the report's, elastic included
ONE_AT_A_TIME = dict(
    vflip=transforms.RandomVerticalFlip(), elastic=transforms.ElasticTransform(),
    gray=transforms.RandomGrayscale(), invert=transforms.RandomInvert(),
    equalize=transforms.RandomEqualize(), hflip=transforms.RandomHorizontalFlip(),
)  # fmt: skip


class Pictures(torch.utils.data.Dataset):
    """The usual way: Pillow pictures, decoded beforehand, transformed one at a time."""

    def __init__(self, mix, size, count):
        random = np.random.default_rng(0)
        pixels = random.integers(0, 256, (100, size, size, 3), dtype=np.uint8)
        self.pictures, self.count = [Image.fromarray(picture) for picture in pixels], count
        steps = [ONE_AT_A_TIME[step.name] for step in augment.parse(mix)[0].steps]
        self.transform = transforms.Compose([*steps, transforms.ToTensor()])

    def __len__(self):
        return self.count

    def __getitem__(self, i):
        return self.transform(self.pictures[i % len(self.pictures)]), 0


def loader_speed(mix, size, batch_size, workers, batches=24):
    """Pictures a second from a DataLoader, its start and first batches left out."""
    dataset = Pictures(mix, size, batch_size * (batches + 8))
    loader = iter(torch.utils.data.DataLoader(dataset, batch_size, num_workers=workers))
    for _ in range(8):
        next(loader)
    start = time.perf_counter()
    for _ in range(batches):
        next(loader)
    return batch_size * batches / (time.perf_counter() - start)


def print_input(args, device):
    """The big set: ours against the DataLoader with two workers, in turn."""
    batch = a_batch(device, args.size, args.batch_size, BIG_SET)
    ours, theirs = [], []
    for _ in range(args.repeats):
        (seconds,) = alternate(50, batch)
        ours.append(args.batch_size / seconds)
        theirs.append(loader_speed(BIG_SET, args.size, args.batch_size, workers=2))
    ours, theirs = statistics.median(ours), statistics.median(theirs)
    print(
        f"big set   {ours:,.0f} pictures/s batched, {theirs:,.0f} one at a time in a DataLoader "
        f"with two workers: {ours / theirs:.1f} times"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--size", type=int, default=40, help="side of the pictures (default: 40)")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--repeats", type=int, default=9, help="(default: 9)")
    args = parser.parse_args(argv)
    device = predict.choose_device()
    precision = predict.choose_precision(device)
    kind = str(precision).replace("torch.", "")
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} threads, {kind}")
    print_input(args, device)
    batch = a_batch(device, args.size, args.batch_size)
    for name in ("v14", "resnet18"):
        step = a_step(name, device, precision, args.size, args.batch_size)
        batch_time, step_time = alternate(args.repeats, batch, step)
        speed = args.batch_size / step_time
        print(
            f"{name:<9} step {step_time * 1000:8.1f} ms, {speed:,.0f} pictures/s; a batch of "
            f"the final mix {batch_time * 1000:.2f} ms, {batch_time / step_time:.2%} of it"
        )


if __name__ == "__main__":
    main()
