"""Whether a long run stays as it is: memory, open files and the time of an epoch.

    PYTHONPATH=. python tests/endurance.py --epochs 300

A tiny run; after each epoch its memory (of the process, as the system counts it), its open files
and its seconds are noted. Prints the median of the first and of the last sixth of
the epochs (the first ten not counted) and their ratio. Since others may want the machine as well,
the time is that of the processor, and given in units of a fixed computation beside it, too.
"""

import argparse
import contextlib
import io
import os
import statistics
import tempfile
import time
from pathlib import Path

import torch

import train

FLAGS = ["--data", "demo", "--limit", "200", "--batch-size", "16", "--lr", "0.05", "--val", "0.2"]
FLAGS += ["--model", "v14:width=8,groups=2,stem_kernel=3"]


def memory():
    """Megabytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def fixed_work():
    """Seconds that the same convolutions take now."""
    x, w = torch.ones(64, 16, 16, 16), torch.ones(16, 16, 3, 3)
    begin = time.process_time()
    for _ in range(30):
        torch.nn.functional.conv2d(x, w)
    return time.process_time() - begin


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=300)
    args = parser.parse_args()
    notes = {"MB": [], "open files": [], "s an epoch": [], "epoch by fixed work": []}
    save, steps = train.save, train.train_steps
    begin = [0.0]

    def noted(run, name="ckpt.pt"):
        save(run, name)
        if name == "ckpt.pt":  # the last thing in an epoch
            notes["MB"].append(memory())
            notes["open files"].append(sum(1 for _ in Path("/proc/self/fd").iterdir()))
            notes["s an epoch"].append(time.process_time() - begin[0])
            notes["epoch by fixed work"].append(notes["s an epoch"][-1] / fixed_work())

    def started(*arguments):
        begin[0] = time.process_time()  # of the processor: others may want the machine as well
        return steps(*arguments)

    train.save, train.train_steps = noted, started
    with tempfile.TemporaryDirectory() as out, contextlib.redirect_stdout(io.StringIO()):
        train.main([*FLAGS, "--epochs", str(args.epochs), "--out", out])
    part = max(1, args.epochs // 6)
    for what, values in notes.items():
        first, last = (statistics.median(x) for x in (values[10 : 10 + part], values[-part:]))
        print(
            f"{what}: first {part} epochs {first:.4g}, last {part} {last:.4g}, x {last / first:.3f}"
        )


if __name__ == "__main__":
    main()
