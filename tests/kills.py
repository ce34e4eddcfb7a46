"""Kill runs with -9 at many moments, resume them, and compare with a run that nobody killed.

    PYTHONPATH=. python tests/kills.py --moments 10    # of each kind; --seed 0, --kind NAME

A run is killed up to three times: at a random time, before a random step, while it validates, or
while it writes one of its files (as that is opened, half written, before and after it is renamed).
Then it is resumed to its end. Weights, optimiser, schedule, log (but the clocks) and best.pt must
be those of the unbroken run, bit for bit. Two processes are started as torchrun starts them, by
its environment variables. Prints a line a kind; ends with status 1 if one run came out otherwise.
"""

import argparse
import os
import random
import shutil
import signal
import socket
import tempfile
import time
from collections import Counter
from pathlib import Path

import torch
from conftest import TINY, same_tree

import data
import models
import predict
import train

FLAGS = ["--data", "demo", "--limit", "60", "--model", TINY, "--batch-size", "8", "--val", "0.3"]
FLAGS += ["--epochs", "4"]
KINDS = {  # flags, and how many processes
    "sgd and cosine": (["--lr", "0.1"], 1),
    "adam and plateau": (["--optimizer", "adam", "--schedule", "plateau", "--lr", "0.01"], 1),
    "cyclic": (["--schedule", "cyclic", "--lr", "0.1"], 1),
    "minutes": (["--lr", "0.1", "--minutes", "60"], 1),
    "two processes": (["--lr", "0.1"], 2),
}
STAGES = ["opened", "half written", "before it is renamed", "after it is renamed"]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


class Dying:
    """A file that kills its process in the middle of what is written."""

    def __init__(self, file):
        self.file = file

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        self.file.write(content[: len(content) // 2])
        self.file.flush()
        die()


def arm(moment):
    """Have this process killed at a moment: ("write", file, stage, which time) and the like."""
    kind, *rest = moment
    seen = Counter()
    if kind == "write":
        name, stage, which = rest
        replace = Path.replace

        def opening(path, mode="r"):
            file = open(path, mode)  # noqa: SIM115 - as data.write_file does
            seen[path.name] += 1
            if path.name == f"{name}.tmp" and seen[path.name] == which:
                if stage == "opened":
                    die()
                return Dying(file) if stage == "half written" else file
            return file

        def renaming(self, target):
            now = Path(target).name == name and seen[self.name] == which
            if now and stage == "before it is renamed":
                die()
            replace(self, target)
            if now and stage == "after it is renamed":
                die()

        data.open, Path.replace = opening, renaming
    elif kind in ("train_step", "evaluate"):
        module = train if kind == "train_step" else predict
        first = getattr(module, kind)

        def hooked(*arguments):
            seen[kind] += 1
            if seen[kind] == rest[0]:
                die()
            return first(*arguments)

        setattr(module, kind, hooked)


def start(argv, world=1, moment=None, victim=0):
    """The ids of new processes that train, the victim among them to be killed at the moment."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(world):
        child = os.fork()
        if not child:
            try:
                if world > 1:
                    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world))
                    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
                os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
                os.dup2(1, 2)
                if moment and rank == victim:
                    arm(moment)
                train.main([str(x) for x in argv])
                os._exit(0)
            except SystemExit as error:
                os._exit(error.code or 0)
            except BaseException:
                os._exit(99)
        children.append(child)
    return children


def wait(children, patience=60):
    """The exit statuses; when one is killed, the others are stopped as torchrun stops them."""
    left, statuses, since = list(children), [], None
    begin = time.monotonic()
    while left:
        for child in list(left):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                left.remove(child)
                statuses.append(os.waitstatus_to_exitcode(status))
                if statuses[-1] and left and since is None:
                    since = time.monotonic()
                    for other in left:
                        os.kill(other, signal.SIGTERM)
        late = (since and time.monotonic() - since > 5) or time.monotonic() - begin > patience
        for child in left if late else ():
            os.kill(child, signal.SIGKILL)
        time.sleep(0.005)
    return statuses


def content(path):
    """A checkpoint without what may differ: the clocks, and the folder."""
    it = torch.load(path, weights_only=True)
    for row in it["log"]:
        del row["seconds"], row["images_per_second"]
    for name in ("out", "resume"):
        del it["args"][name]
    return it


def log(folder):
    lines = (folder / "log.csv").read_text().splitlines()
    return [line.rsplit(",", 2)[0] for line in lines]


def pick(chance, seconds, steps):
    """A random moment."""
    kind = chance.choice(["time", "train_step", "evaluate", "write", "write"])
    if kind == "time":
        return (kind, chance.uniform(0, seconds))
    if kind == "write":
        return (kind, chance.choice(train.FILES), chance.choice(STAGES), chance.randint(1, 4))
    return (kind, chance.randint(1, steps if kind == "train_step" else 4))


def attempt(chance, argv, world, seconds, steps, out):
    """Kill a run up to three times, then let it end; how often it was killed, and when first."""
    killed, moments = 0, []
    for _ in range(chance.randint(1, 3)):
        moment = pick(chance, seconds, steps)
        moments.append(moment)
        resume = (out / "ckpt.pt").is_file()
        go_on = ["--resume", "--out", out] if resume else [*argv, "--out", out]
        children = start(
            go_on, world, moment, victim=0 if moment[0] == "write" else chance.randrange(world)
        )
        if moment[0] == "time":
            time.sleep(moment[1])
            os.kill(chance.choice(children), signal.SIGKILL)
        statuses = wait(children)
        if -signal.SIGKILL not in statuses:
            if any(statuses):
                raise RuntimeError(f"{moment} never came: it ended with {statuses}")
            break  # it ended before that moment
        killed += 1
        if (out / "ckpt.pt").is_file():
            models.load_checkpoint(out / "ckpt.pt")
    resume = (out / "ckpt.pt").is_file()
    statuses = wait(start(["--resume", "--out", out] if resume else [*argv, "--out", out], world))
    if any(statuses):
        raise RuntimeError(f"the last run ended with {statuses}")
    return killed, moments


def differences(whole, out):
    """What isn't as in the unbroken run."""
    wrong = [name for name in train.FILES if not (out / name).is_file()]
    for name in ("ckpt.pt", "best.pt"):
        if not wrong and not same_tree(content(whole / name), content(out / name)):
            wrong.append(name)
    if not wrong and log(whole) != log(out):
        wrong.append("log.csv")
    names = {path.name for path in out.iterdir() if not path.name.startswith("earlier-")}
    return wrong + sorted(names - set(train.FILES))


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--moments", type=int, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=list(KINDS))
    args = parser.parse_args()
    failed = False
    for kind, (more, world) in KINDS.items():
        if args.kind not in (None, kind):
            continue
        chance = random.Random(f"{args.seed} {kind}")
        folder, argv = Path(tempfile.mkdtemp()), [*FLAGS, *more]
        begin = time.monotonic()
        if any(wait(start([*argv, "--out", folder / "whole"], world))):
            raise SystemExit(f"{kind}: the unbroken run failed")
        seconds = time.monotonic() - begin
        steps = 4 * (content(folder / "whole" / "ckpt.pt")["resume"]["schedule"]["last_epoch"] // 4)
        same, kills, where = 0, 0, Counter()
        for i in range(args.moments):
            out = folder / str(i)
            try:
                killed, moments = attempt(chance, argv, world, seconds, max(steps, 40), out)
                wrong = differences(folder / "whole", out)
            except (RuntimeError, ValueError, OSError) as error:
                killed, moments, wrong = 0, [], [str(error)]
            kills += killed
            where.update(moment[0] for moment in moments[:killed])
            same += not wrong
            if wrong:
                print(f"{kind}, number {i}, {moments}: {', '.join(wrong)}", flush=True)
        failed |= same < args.moments
        spent = time.monotonic() - begin
        print(
            f"{kind}: {same} of {args.moments} the same, {kills} kills {dict(where)}, {spent:.0f} s"
        )
        shutil.rmtree(folder)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
