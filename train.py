"""Train a small-picture classifier from scratch.

    python train.py --model v14 --lr 0.5 --epochs 40     # the report's final recipe
    python train.py --recipe quick --minutes 20          # our own network, in 20 minutes
    python train.py --resume                             # go on where a run was stopped or killed

It reads top to bottom: recipes, schedules, the run's state, its checkpoint, the loop, the runs of
a search, the command line. In --out it leaves ckpt.pt, best.pt, log.csv and curves.png.

Everything random is a function of (seed, epoch, step), so a resumed run ends with an unbroken one's
bits, given the same CPU, torch and number of threads (on a GPU, cuDNN's algorithms decide).
"""

import argparse
import functools
import io
import itertools
import math
import os
import platform
import time
import warnings
from contextlib import ExitStack, redirect_stdout
from pathlib import Path

STARTED = time.monotonic()  # before torch is imported, which may take seconds of --minutes
# A waiting thread lets go of its core soon: beside other work a step took 0.9 s and not 4.
if __name__ == "__main__":
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import torch
import torch.nn.functional as F
import torchvision
from torch.nn.parallel import DistributedDataParallel
from torch.optim import lr_scheduler

import augment
import data
import models
import predict

# A recipe is a row of defaults; flags given beside --recipe win. What all of our own share:
OURS = dict(augment="hflip,shift", grow=24, schedule="linear", warmup=0.1, batch_size=128,
            nesterov=True, label_smoothing=0.1)  # fmt: skip
RECIPES = {
    # The report's final model (F1 rate and schedule, F9 epochs, F12 weight decay, E2 mix).
    "report": dict(
        model="v14", augment=augment.REPORT_MIX, optimizer="sgd", lr=0.5, schedule="cosine",
        epochs=40, batch_size=64, momentum=0.9, weight_decay=1e-4,
    ),
    # For a CPU or a small GPU, from five minutes to two hours.
    "quick": dict(OURS, model="v16:tail=1,path_width=32", lr=0.45, epochs=20, weight_decay=2e-4),
    # From two hours to a night of these: wider, since each picture is seen often, more regularised.
    "long": dict(OURS, model="v16:tail=1,path_width=32,width=160", lr=0.2, epochs=45,
                 weight_decay=5e-4, mixup=0.1),
    # For minutes of a large GPU or a night of a small one: wide, deep, with pictures mixed.
    "best": dict(OURS, model="v16:stride=1,depth=2,width=128,first=1,dropout=0.1", lr=0.2,
                 warmup=0.025, batch_size=256, epochs=200, weight_decay=1e-3, mixup=0.2,
                 cutmix=1.0),
}  # fmt: skip
DEFAULTS = dict(RECIPES["report"], recipe="report", out=".", seed=0)
DEFAULTS.update(warmup=0, label_smoothing=0, mixup=0, cutmix=0)
FILES = ["ckpt.pt", "best.pt", "log.csv", "curves.png"]  # what a run writes into --out
WARMED = "cosine linear constant".split()  # schedules that --warmup goes before
MAY_CHANGE = "data out resume minutes compile".split()  # flags that --resume may give anew


class Diverged(data.Failed):
    """The loss or the weights are no longer finite."""


# ---------------------------------------------------------------- optimiser and schedule


def make_optimizer(network, args):
    """SGD with momentum, or Adam with torch's usual betas (report V4)."""
    weights, options = network.parameters(), dict(weight_decay=args.weight_decay, fused=True)
    if args.optimizer == "adam":
        return torch.optim.Adam(weights, args.lr, **options)
    sgd = torch.optim.SGD(weights, args.lr, args.momentum, nesterov=bool(args.nesterov), **options)
    for weight in network.parameters() if args.momentum else ():
        # torch leaves it as memory happens to be where float16 overflows in the first step
        sgd.state[weight]["momentum_buffer"] = torch.zeros_like(weight)
    return sgd


def ramp(shape):
    """A schedule that rises to lr over the share --warmup of all steps, then follows shape(p) from
    p = 0 to 1: a rate that is at once at its height makes large batches diverge (arXiv:1706.02677).
    """

    def schedule(optimizer, args, steps):
        def factor(step):  # anew at each step, since replan() changes args.epochs
            rise, end = args.warmup * args.epochs * steps, args.epochs * steps
            return (step + 1) / (rise + 1) if step < rise else shape((step - rise) / (end - rise))

        return lr_scheduler.LambdaLR(optimizer, factor)

    return schedule


# name: function of the optimizer, the arguments and the number of steps in an epoch.
SCHEDULES = {
    # Half a cosine from lr to zero over the whole run, falling at every step (arXiv:1608.03983).
    "cosine": ramp(lambda p: (1 + math.cos(math.pi * p)) / 2),
    # A straight line to zero, the best for a given budget (Budgeted Training, arXiv:1905.04753).
    "linear": ramp(lambda p: 1 - p),
    "constant": ramp(lambda p: 1.0),
    # lr/10 to lr and back, the report's 0.01 to 0.1 (B2). Half a cycle is 2,000 steps, or half the
    # run; momentum falls by 0.1 and rises: torch's defaults, our reading (arXiv:1506.01186).
    "cyclic": lambda optimizer, args, steps: lr_scheduler.CyclicLR(
        optimizer, args.lr / 10, args.lr, max(1, min(2000, args.epochs * steps // 2)),
        cycle_momentum=args.momentum > 0,
        base_momentum=max(0.0, args.momentum - 0.1), max_momentum=args.momentum),
    # 0.95 of the rate after each epoch. The report doesn't give its lambda (B3): this one is ours.
    "lambda": lambda optimizer, args, steps: lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.95 ** (step // steps)),
    # A tenth of the rate when the validation loss has not fallen for ten epochs: torch's defaults.
    "plateau": lambda optimizer, args, steps: lr_scheduler.ReduceLROnPlateau(optimizer),
}  # fmt: skip


# ---------------------------------------------------------------- the state of a run


class Run:
    """All that a run consists of: args, data, network, optimiser, and how far it has come."""

    def __init__(self, args, checkpoint=None, dataset=None, started=None):
        """Read the data and build everything; a checkpoint gives back what it holds."""
        self.args, self.out = args, Path(args.out)
        self.rank, self.world = predict.processes()
        if not checkpoint:
            args.processes = self.world
        if args.warmup and args.schedule not in WARMED:
            raise ValueError(f"--warmup goes before {', '.join(WARMED)}, not {args.schedule}")
        self.deadline = (started or time.monotonic()) + 60 * (args.minutes or math.inf)
        self.pace = self.finishing = self.reserve = 0.0  # seconds: a step, an epoch's end, at least
        self.budget = self.costs = None  # plan(): seconds for its epochs, and in one at each side
        self.model, self.options = models.parse(args.model)
        self.device = predict.choose_device()
        self.precision = predict.choose_precision(self.device)
        self.computed_on = predict.computed_on(self.device, self.precision, args.compile)
        self.epoch, self.step, self.rows = 0, 0, []  # epochs done, steps of the next one, the log
        self.rate = args.lr  # of the last step
        # Sums over this epoch: of the loss, of right answers, of pictures; read once an epoch.
        self.totals = torch.zeros(3, dtype=torch.float64, device=self.device)
        self.read(augment.parse(args.augment), checkpoint, dataset)
        if args.minutes:
            args.epochs = plan(self, args.epochs)
        self.build()
        if checkpoint:
            self.restore(checkpoint)

    def read(self, pipelines, checkpoint, dataset):
        """The pictures, split into what is trained on and what validates."""
        args = self.args
        if args.data in data.CIFAR and self.rank:
            predict.largest(0)  # waits while the first process alone downloads
        dataset = dataset or data.load(args.data, args.size, args.limit, test=False)
        if args.data in data.CIFAR and not self.rank:
            predict.largest(0)
        if checkpoint:
            data.require_same(dataset, checkpoint)
        data.require_apart(self.out, dataset)
        train, val = data.parts(dataset, args.val, args.seed)
        if len(train) < 2 * self.world:
            raise ValueError(f"only {len(train)} left to train on: lower --val or raise --limit")
        # What was left to the data is kept with the run, so that --resume may name it.
        args.size = dataset.images.shape[-1]
        args.val = 0.1 if args.val is None and dataset.is_val is None else args.val
        self.source, self.classes = dataset.source, dataset.classes
        self.fingerprint, self.sides = dataset.fingerprint, data.growing(args.grow, args.size)
        self.side = self.sides[0][0]  # of the pictures of the last step, and of validation
        self.mean, self.std = data.statistics(dataset.images, train)
        images, labels = data.on_device(dataset.images, self.device), dataset.labels.to(self.device)
        self.val_count, val = len(val), val[self.rank :: self.world]
        self.val_images, self.val_labels = images[val.to(images.device)], labels[val]
        # What one step sees stays the same when a run is resumed with more processes or fewer.
        batch_size, share = args.batch_size * args.processes, (self.rank, self.world)
        if batch_size < 2 * self.world:
            raise ValueError(f"a batch of {batch_size} is too small for {self.world} processes")
        self.batches = data.Batches(
            images, labels, train, pipelines, batch_size, args.seed, self.device, share
        )

    def build(self):
        """The network with its initial weights, and what moves them."""
        args = self.args
        torch.manual_seed(data.seed_from(args.seed))  # the weights are drawn on the CPU
        network = models.build_model(
            self.model, len(self.classes), self.mean, self.std, **self.options
        )
        layout = predict.memory_format(network, self.device)
        self.network = self.forward = network.to(self.device, memory_format=layout)
        if self.world > 1:  # averages gradients; each process's batch norm sees its own part
            self.forward = DistributedDataParallel(self.network)
        if args.compile:
            # On a GPU by CUDA graphs, replayed at once: small batches wait for the host otherwise.
            mode = "reduce-overhead" if self.device.type == "cuda" and self.world == 1 else None
            self.forward = torch.compile(self.forward, dynamic=False, mode=mode)
        self.optimizer = make_optimizer(self.network, args)
        self.schedule = SCHEDULES[args.schedule](self.optimizer, args, len(self.batches))
        scaled = self.precision == torch.float16  # whose smallest gradients would vanish
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=scaled)

    def done(self, step):
        """The share of all steps before this one of the epoch."""
        return (self.epoch + step / len(self.batches)) / self.args.epochs

    def state(self):
        """The checkpoint: plain tensors, numbers, strings, lists and dicts only."""
        resume = dict(
            step=self.step, rate=self.rate, totals=self.totals,
            optimizer=self.optimizer.state_dict(),
            # without its functions, which load_checkpoint would refuse to read
            schedule={k: v for k, v in self.schedule.state_dict().items() if not callable(v)},
            scaler=self.scaler.state_dict(),
        )  # fmt: skip
        versions = {module.__name__: str(module.__version__) for module in (torch, torchvision)}
        return dict(
            format=1, model=self.model, options=self.options, num_classes=len(self.classes),
            classes=self.classes, size=self.side, mean=self.mean, std=self.std,
            weights=self.network.state_dict(), source=self.source, fingerprint=self.fingerprint,
            args={k: v for k, v in vars(self.args).items() if k != "given"},
            epoch=self.epoch, log=self.rows, computed_on=self.computed_on,
            versions={"python": platform.python_version(), **versions}, resume=resume,
        )  # fmt: skip

    def restore(self, checkpoint):
        """Take over the weights and all else that changes while training."""
        then, now = checkpoint["computed_on"], self.computed_on
        if then != now:
            print(f"computed on {then} until now and on {now} from here: the last bits will differ")
        for weight in self.network.parameters():  # a step for nothing, to see what a state holds
            weight.grad = torch.zeros_like(weight)
        self.optimizer.step()
        self.optimizer.zero_grad()
        resume = predict.fitting(self.state()["resume"], checkpoint.get("resume") or None)
        other = (self.model, self.options) != (checkpoint["model"], checkpoint["options"])
        if other or not 0 <= resume["step"] <= min(len(self.batches), resume["totals"][2]):
            raise ValueError("ckpt.pt can't be resumed from: its model or its step isn't the run's")
        self.network.load_state_dict(checkpoint["weights"])
        self.optimizer.load_state_dict(resume["optimizer"])
        for weight, state in self.optimizer.state.items():
            for key in state.keys() - {"step"}:  # the fused step checks neither shape nor layout
                state[key] = torch.empty_like(weight).copy_(state[key])
        self.schedule.load_state_dict({**self.schedule.state_dict(), **resume["schedule"]})
        if resume["scaler"]:  # none where the precision needs none
            self.scaler.load_state_dict(resume["scaler"])
        self.epoch, self.rows = checkpoint["epoch"], checkpoint["log"]
        self.step, self.rate, self.side = int(resume["step"]), resume["rate"], checkpoint["size"]
        self.totals = resume["totals"].to(self.device) * (self.rank == 0)


# ---------------------------------------------------------------- what a run writes


def save(run, name="ckpt.pt"):
    """Write a checkpoint, whole or not at all; only ckpt.pt can be resumed from."""
    state = {k: v for k, v in run.state().items() if k != "resume" or name == "ckpt.pt"}
    if run.rank == 0:
        data.write_file(run.out / name, lambda file: torch.save(state, file))


def require_finite(run, loss=0.0):
    """Stop all processes before weights are saved that aren't finite, or after such a loss."""
    weights = torch.stack([w.isfinite().all() for w in run.network.state_dict().values()])
    wrong = predict.largest(not weights.all(), not math.isfinite(loss))
    if any(wrong):
        what = "loss is" if wrong[1] else "weights are"
        kept = f"ckpt.pt still holds epoch {run.epoch}" if run.epoch else "nothing was saved"
        where = f"in epoch {run.epoch + 1} at a rate of {run.rate:g}"
        raise Diverged(f"the {what} no longer finite {where}: try a lower --lr; {kept}")


# ---------------------------------------------------------------- the loop


def plan(run, epochs):
    """The epochs that fit into --minutes, by a few steps of a run that is then thrown away."""
    run.args.epochs = epochs or 1
    run.build()
    run.network.train()
    batches = itertools.chain.from_iterable(map(run.batches.epoch, itertools.count()))

    def three_steps(side):
        for x, y in itertools.islice(batches, 3):
            train_step(run, 0, 0, data.resized(x, side), y)

    # Several processes must make the same number of steps: as few as median_seconds() takes.
    trying = 0.03 * (run.deadline - time.monotonic()) / len(run.sides) if run.world == 1 else 0
    run.costs, usual = [], 0.0
    for side, share in run.sides:  # the last, the slowest, is the pace that is kept
        steps = functools.partial(three_steps, side)
        run.pace = predict.median_seconds(run.device, steps, trying) / 3
        finishing = predict.seconds_to_finish(run, side)
        usual += share * finishing
        run.costs.append(share * (len(run.batches) * run.pace + finishing))
    # Machines aren't always equally fast, and why_stop() keeps the last end free, the dearest.
    left = 0.95 * (run.deadline - time.monotonic()) - (1.5 * finishing - usual)
    epoch, late, finishing = predict.largest(sum(run.costs), -left, finishing)
    run.finishing = run.reserve = 1.5 * finishing
    left = -late  # all processes plan for the slowest
    if epochs:
        return epochs
    if epoch > left:
        rest = f"of --minutes {run.args.minutes:g} {max(0, left):,.0f} s are left for it"
        hint = "give more, or fewer pictures with --limit"
        raise ValueError(f"an epoch takes {epoch:,.0f} s here, and {rest}: {hint}")
    if run.args.schedule != "cyclic":  # whose cycle depends on the number of epochs
        run.begin, run.budget = time.monotonic(), left
    print(f"planned: {int(left / epoch)} epochs of {epoch:.1f} s")
    return int(left / epoch)


def replan(run):
    """Plan again after each epoch but the last, by the slowest speed; a stall halves it at most."""
    planned, spent = run.args.epochs, (time.monotonic() - run.begin) / run.budget
    done = data.time_at(run.sides, spent, run.costs, reverse=True)  # the steps due by now
    fitting = max(run.epoch + 1, planned / 2, -predict.largest(-run.epoch / max(done, 1e-9))[0])
    if int(fitting) != planned and abs(fitting - planned) >= 0.02 * planned:
        run.args.epochs = int(fitting)
        print(f"planned anew: {run.args.epochs} epochs of {run.budget / run.args.epochs:.1f} s")


def train_step(run, epoch, step, x, y):
    """One step of the optimiser: (loss, number of right answers), both on the device."""
    torch.manual_seed(data.seed_from(run.args.seed, epoch, step, 2 * run.rank + 1))  # for dropout
    x, y = data.mixed(x, y, len(run.classes), run.args.mixup, run.args.cutmix)
    with predict.autocast(run.device, run.precision):
        logits = run.forward(x)
    loss = F.cross_entropy(logits.float(), y, label_smoothing=run.args.label_smoothing)
    # Gradients are averaged over processes, whose parts of a batch differ by a picture at most.
    weight = len(y) * run.world / run.batches.batch_size(step)
    run.scaler.scale(loss * weight).backward()
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad()
    return loss.detach(), (logits.argmax(1) == (y.argmax(1) if y.dim() > 1 else y)).sum()


def train_steps(run, stop, progress):
    """Train to the end of the epoch, or until the run is to stop: why, if so."""
    run.network.train()
    first, begin = run.step, time.monotonic()
    for x, y in run.batches.epoch(run.epoch, first):
        if why := why_stop(run, stop, run.pace):
            return why
        run.side = data.side_at(run.sides, run.done(run.step))
        loss, right = train_step(run, run.epoch, run.step, data.resized(x, run.side), y)
        run.rate = run.optimizer.param_groups[0]["lr"]
        if run.args.schedule != "plateau":
            run.schedule.step()
        run.totals += torch.stack([loss * len(y), right, torch.full_like(right, len(y))])
        run.step += 1
        progress.done += run.batches.batch_size(run.step - 1)
        predict.show_progress(run, progress, first)
        run.pace, begin = time.monotonic() - begin, time.monotonic()
    return why_stop(run, stop)


def why_stop(run, stop, pace=0.0):
    """Why the run is to stop before `pace` more seconds of work, or None; all processes agree."""
    late = time.monotonic() + pace + run.finishing > run.deadline
    signalled, late = predict.largest(bool(stop), late)
    if signalled:
        return stop[0] if stop else "a signal to another process"
    return f"--minutes {run.args.minutes:g}" if late else None


def finish_epoch(run):
    """Validate; returns the epoch's figures for the log."""
    loss, right, count = predict.over_all(run.totals).tolist()
    require_finite(run, loss)
    if run.world > 1:  # what is validated and saved is the first process's network
        for buffer in run.network.buffers():
            torch.distributed.broadcast(buffer, 0)
    row = dict(epoch=run.epoch + 1, lr=run.rate, train_loss=loss / count)
    row.update(train_acc=right / count, val_loss="", val_acc="")
    if run.val_count:
        labelled = run.val_images, run.val_labels
        sums = predict.evaluate(run.network, *labelled, run.precision, run.side)
        loss, right = predict.over_all(sums.to(run.device)).tolist()
        row.update(val_loss=loss / run.val_count, val_acc=right / run.val_count)
    if run.args.schedule == "plateau":
        run.schedule.step(row["train_loss"] if row["val_loss"] == "" else row["val_loss"])
    run.epoch, run.step, run.totals = run.epoch + 1, 0, torch.zeros_like(run.totals)
    return row


def fit(run):
    """Train to the last epoch, writing after each: best.pt, log.csv, curves.png, ckpt.pt last."""
    predict.print_start(run)
    predict.write_log(run)  # resumed: cut back to what the checkpoint knows
    with predict.stop_signals() as stop, warnings.catch_warnings():
        # Where float16 overflows, the scaler skips the optimizer's step, and torch wonders.
        warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step")
        while run.epoch < run.args.epochs:
            progress = data.Progress()
            why = train_steps(run, stop, progress)
            run.totals.tolist()  # waits until a GPU has done all steps
            speed = progress.speed()
            progress.close()
            if why:
                predict.over_all(run.totals)
                require_finite(run)
                save(run)
                where = f"epoch {run.epoch + 1} after step {run.step}"
                raise data.Failed(f"stopped by {why} in {where}; --resume goes on from there")
            begin = time.monotonic()
            row = finish_epoch(run)
            row.update(images_per_second=speed, seconds=time.monotonic() - progress.start)
            row = {k: float(f"{x:.6g}") if isinstance(x, float) else x for k, x in row.items()}
            run.rows.append(row)
            if run.budget and run.epoch < run.args.epochs:
                replan(run)
            if predict.best_row(run.rows) is row:
                save(run, "best.pt")
            predict.write_log(run)
            save(run)
            print(predict.table_row(row))
            run.finishing = max(run.reserve, 1.5 * (time.monotonic() - begin))
    print(predict.summary(run))


# ---------------------------------------------------------------- the runs of a search


def prepare_search(args):
    """The arguments of a search, or of the one that it goes on with, and the data."""
    out = Path(args.out)
    models.parse(args.model)  # before anything is moved aside
    runs = sorted(out.glob("run-[0-9]*"), key=data.natural)
    if args.resume:
        begun = [path for path in runs if (path / "ckpt.pt").is_file()]
        checkpoint = to_resume(begun[0] if begun else out / "run-1")
        if begun[:1] != [out / "run-1"]:  # it diverged: what the search is of, the table alone says
            try:
                row = predict.read_table(out / "search.csv")[0]
                checkpoint["args"].update(augment=row["mix"], seed=int(row["seed"]))
            except (ValueError, LookupError, TypeError):
                raise ValueError(f"{out / 'search.csv'} is not as the search wrote it") from None
        args = resumed_args(args, checkpoint)
    if not predict.without_one(args.augment):
        raise ValueError(f"--augment {args.augment} has nothing that a search could leave out")
    dataset = data.load(args.data, args.size, args.limit, test=False)
    if not Run(args, dataset=dataset).val_count:  # or what else is wrong with the flags
        raise ValueError("a search compares validation accuracies: give a larger --val")
    if not args.resume:
        data.set_aside(out / "search.csv", out / "search.png", *runs)
    return args, dataset


def search_run(args, dataset, mix, seed, folder):
    """The last epoch's validation accuracy of one run of a search; chance if it diverges."""
    given = dict(augment=mix, seed=seed, data=args.data)
    changes = dict(out=str(folder), resume=(folder / "ckpt.pt").is_file(), given=given)
    run = prepare(argparse.Namespace(**{**vars(args), **given, **changes}), dataset)
    if run.epoch < args.epochs:
        print(f"\n{folder.name}: {mix}, seed {seed}")
        try:
            with data.claimed(folder):
                fit(run)
        except Diverged as error:
            print(f"{error}; it counts as chance")
            return 1 / len(run.classes)
    return run.rows[-1]["val_acc"]


# ---------------------------------------------------------------- command line

SEVERAL, ONE_OR_MORE = data.at_least(2), data.at_least(1)
POSITIVE = data.number(float, "a number above 0", lambda x: 0 < x < 1e38)  # float32 ends there
SHARE = data.number(float, "at least 0 and below 1", lambda x: 0 <= x < 1)
DECAY = data.number(float, "a number, 0 or more", lambda x: 0 <= x < math.inf)
SEED = data.number(int, "a whole number from 0 to 2**63 - 1", lambda x: 0 <= x < 2**63)

# Group, flag, what its value is called, its type or choices, the report's section on it, help.
FLAGS = [
    ("data", "--data", "PATH", str, "", "folder, archive, cifar10, cifar100 or demo (default: the "
     "one data set below data/ or /kaggle/input/, else the demo)"),
    ("data", "--val", "SHARE", SHARE, "E1", "share of the labelled pictures for validation, 0 for "
     "none (default: the source's own part, else 0.1)"),
    ("data", "--augment", "MIX", str, "E2", "copies of the data: + concatenates, a comma composes, "
     f"=S is a strength, :P a probability; clean, {', '.join(augment.AUGMENTATIONS)}"),
    ("data", "--size", "S", data.SIDE, "", "pixels of each side (default: their own)"),
    ("data", "--limit", "N", SEVERAL, "", "at most N labelled pictures, each class its share"),
    ("data", "--grow", "S", data.SIDE, "", "from S pixels to --size, by three parts of the time"),
    ("data", "--mixup", "ALPHA", DECAY, "", "mix pictures in pairs"),
    ("data", "--cutmix", "ALPHA", DECAY, "", "paste a part of a picture into another"),
    ("model", "--model", "NAME", str, "F1 to F7",
     f"{', '.join(models.MODELS)}; with options: v14:groups=4,width=32"),
    ("optimisation", "--optimizer", "NAME", ["sgd", "adam"], "V4", "sgd or adam"),
    ("optimisation", "--lr", "RATE", POSITIVE, "F1, F8", "highest learning rate"),
    ("optimisation", "--schedule", "NAME", list(SCHEDULES), "B1 to B4, F1", ", ".join(SCHEDULES)),
    ("optimisation", "--warmup", "SHARE", SHARE, "", "of the steps, while the rate rises to --lr"),
    ("optimisation", "--epochs", "N", ONE_OR_MORE, "F9", "passes over the training set"),
    ("optimisation", "--batch-size", "N", SEVERAL, "", "pictures a step, of each process"),
    ("optimisation", "--momentum", "M", SHARE, "", "of SGD"),
    ("optimisation", "--nesterov", "", bool, "", "Nesterov's momentum"),
    ("optimisation", "--weight-decay", "D", DECAY, "F12", "L2 penalty on all weights"),
    ("optimisation", "--label-smoothing", "SHARE", SHARE, "", "of an answer, for all classes"),
    ("run", "--recipe", "NAME", list(RECIPES), "", "report (these defaults), quick, long or best"),
    ("run", "--minutes", "M", POSITIVE, "", "end within M minutes: by as many epochs as fit; with "
     "--epochs by stopping in time, to be resumed"),
    ("run", "--resume", "", bool, "", "go on with the ckpt.pt in --out, with its flags"),
    ("run", "--compile", "", bool, "", "by torch.compile (a minute at first); --resume drops it"),
    ("run", "--search", "SEEDS", SEVERAL, "F11", "leave augmentations out of the mix one at a "
     "time, with so many seeds each, while that gains more than the noise"),
    ("run", "--out", "DIR", str, "", "where the files go (default: here)"),
    ("run", "--seed", "N", SEED, "", "of the split, the weights and all that is drawn"),
]  # fmt: skip


def parse_args(argv=None, script="train.py"):
    """The flags, completed from the recipe; args.given maps those that the user gave."""
    flags = []
    for group, flag, metavar, kind, section, text in FLAGS:
        default = DEFAULTS.get(flag[2:].replace("-", "_"))
        text += "" if default in (None, ".") else f" (default: {default})"
        flags.append((group, flag, metavar, kind, text + f" [report {section}]" * bool(section)))
    about = "Train a picture classifier: python train.py [flags] (for [report F1] see the README)"
    args = data.parse_flags(script, about, flags, argv)
    given = {name: value for name, value in vars(args).items() if value is not None}
    defaults = {**DEFAULTS, **RECIPES[args.recipe or "report"]}
    if args.minutes and not args.epochs:
        defaults["epochs"] = None  # plan() counts them
    # What a recipe has doesn't get in the way of a flag that it can't go with.
    defaults["warmup"] *= given.get("schedule", WARMED[0]) in WARMED
    if not given.get("momentum", True):
        defaults["nesterov"] = None
    return argparse.Namespace(**{**vars(args), **defaults, **given}, given=given)


def resumed_args(args, checkpoint):
    """The arguments of the run to be resumed; ValueError where a flag contradicts them."""
    stored, given = checkpoint["args"], args.given
    kept = {k: v for k, v in stored.items() if v is not None and k not in ("processes", "resume")}
    flags = [f"--{k.replace('_', '-')}" + ("" if v is True else f"={v}") for k, v in kept.items()]
    again = parse_args(flags, "train.py: ckpt.pt")  # as if they were given: somebody may edit them
    # What it did without, even if its recipe has got it since.
    vars(again).update({k: None for k in {*vars(again)} - {*DEFAULTS} if stored.get(k) is None})
    for name, value in given.items():
        if name not in MAY_CHANGE and value != getattr(again, name):
            flag = f"--{name.replace('_', '-')}"
            other = f"the run to be resumed, which has {stored.get(name)}"
            raise ValueError(f"{flag} {value} contradicts {other}: leave {flag} or --resume out")
    again.data = data.source_of(checkpoint, given.get("data"))
    again.minutes, again.processes = args.minutes or again.minutes, int(stored.get("processes", 1))
    again.out, again.compile, again.resume, again.given = args.out, args.compile, True, given
    return again


def to_resume(out):
    """The checkpoint of the run in a folder."""
    if not (out / "ckpt.pt").is_file():
        hint = "give --search too" if any(out.glob("run-*")) else "give the run's --out"
        raise ValueError(f"nothing to resume: there is no ckpt.pt in {out}/; {hint}")
    return predict.load_run(out / "ckpt.pt")[1]


def prepare(args, dataset=None, started=None):
    """Everything up to the first step: ValueError or OSError where a flag or the data is wrong."""
    out = Path(args.out)
    checkpoint = to_resume(out) if args.resume else None
    args = resumed_args(args, checkpoint) if checkpoint else args
    run = Run(args, checkpoint, dataset, started)
    out.mkdir(parents=True, exist_ok=True)
    if not checkpoint and run.rank == 0:
        data.set_aside(*(out / name for name in FILES))
    return run


def main(argv=None, started=None):
    """started: when --minutes began to count, by time.monotonic(); None: now."""
    args, started = parse_args(argv), started or time.monotonic()
    several = os.environ.get("WORLD_SIZE", "1") not in ("", "1")
    quiet = several and os.environ.get("LOCAL_RANK") != "0"  # the first process says it
    interrupted = "interrupted; if an epoch was finished, --resume goes on after it"
    with data.sentences("train.py", quiet, interrupted), ExitStack() as settings:
        if args.search and (args.minutes or several):
            raise ValueError("--search takes one process, and --epochs instead of --minutes")
        # The caller's settings and random numbers stay as they were.
        settings.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
        settings.enter_context(predict.environment(predict.choose_device(), args.compile))
        rank = predict.processes()[0]  # the first alone prints and claims the folder
        settings.enter_context(redirect_stdout(io.StringIO()) if rank else data.claimed(args.out))
        if args.search:
            args, dataset = prepare_search(args)
            seeds = range(args.seed, args.seed + args.search)
            one = functools.partial(search_run, args, dataset)
            predict.search(args.augment, seeds, Path(args.out), one)
        else:
            fit(prepare(args, None, started))


if __name__ == "__main__":
    main(started=STARTED)
