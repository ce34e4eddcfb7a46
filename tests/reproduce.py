"""The ledger: every claim of the report as train.py command lines, run again, with a verdict.

    python tests/reproduce.py --data PATH                 # all rows: six hours of two CPU cores
    python tests/reproduce.py --data PATH --scale full    # the report's own setting, for a GPU
    python tests/reproduce.py --only F4 --dry-run         # what one row would run

A finished run is kept in tests/runs.csv and never made again; one that was killed goes on where it
was. After each run the table (tests/ledger.csv and ledger.md) is drawn anew. Give the same --out
again to go on.

A row is decided by rules such as `F4 > F3`: the accuracy on validation after the last epoch of two
runs, compared seed by seed (the same seed means the same split). The noise is twice the standard
error of that difference, its spread being pooled over all the rules of the ledger.
"""

import argparse
import csv
import math
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from PIL import Image

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import train as train_py  # noqa: E402

BIG = "vflip,elastic,gray,invert,equalize,hflip"  # the report's first big augmentation set
FINAL = "hflip,vflip,gray"

# Classes (None: all), epochs for the rows B, V and F, and the width of v14 (64: the report's).
# The report gives no epochs for B and V; for F it has 40.
SCALES = {
    "small": dict(classes=10, B=10, V=8, F=12, width=16, seeds=2),
    "full": dict(classes=None, B=40, V=40, F=40, width=64, seeds=3),
}


def b(augment="clean", schedule="cyclic", epochs=1.0, classes="some"):
    """A run of resnet18 (report: B1 to B8). epochs: in units of the scale's."""
    return dict(
        kind="B", model="resnet18", lr=0.1, schedule=schedule, augment=augment, epochs=epochs,
        classes=classes,
    )  # fmt: skip


def v(version, augment=f"clean+{BIG}", **other):
    """A run of v2 to v13, whose optimisation we take to be B2's."""
    return {**dict(kind="V", model=version, lr=0.1, schedule="cyclic", augment=augment), **other}


def f(model="v14", augment=BIG, groups=3, stem_kernel=3, dropout=0.25, **other):
    """A run of v14, with torch's plain initialisation as the report most likely had it."""
    options = f"groups={groups},stem_kernel={stem_kernel},dropout={dropout},zero_init=false"
    run = dict(kind="F", model=f"{model}:{options}", lr=0.5, schedule="cosine", augment=augment)
    return {**run, **other}


BEST = dict(stem_kernel=5, dropout=0.1)  # what F4 and F6 end with

RUNS = {
    "B1": b(schedule="constant"),
    "B1all": b(schedule="constant", epochs=0.4, classes="all"),
    "B2": b(),
    "B3": b(schedule="lambda"),
    "B4": b(schedule="cosine"),
    "B5": b("clean+hflip"),
    "B6": b("clean+hflip+gray"),
    "B7": b("clean+hflip,gray"),
    "B8": b("clean+hflip+perspective"),
    # V1's data aren't told: B5's, the best of the eight. The big set comes with v8.
    **{f"v{n}": v(f"v{n}", "clean+hflip") for n in range(2, 8)},
    **{f"v{n}": v(f"v{n}") for n in range(8, 14)},
    "v8clean": v("v8", "clean"),
    "v9clean": v("v9", "clean"),
    "adam": v("v9", optimizer="adam"),
    "adam.001": v("v9", optimizer="adam", lr=0.001),
    "v9long": v("v9", epochs=2.0),
    "F0": f("v14:max_pool=true", f"clean+{BIG}", groups=4),
    "cyclic": f(augment=f"clean+{BIG}", groups=4, lr=0.1, schedule="cyclic"),
    "F1": f(augment=f"clean+{BIG}", groups=4),
    "F2": f(groups=4),
    "three": f(),
    "two": f(groups=2),
    "F4": f(dropout=0.1),
    "F5": f("v15", dropout=0.1),
    "F6": f(**BEST),
    "F7": f(stem_kernel=5, dropout=0.15),
    "F8": f(**BEST, lr=0.0001),
    "F9": f(**BEST, epochs=2.5),
    "F10": f(augment="vflip,rotate,resizedcrop,hflip", **BEST),
    "F11": f(**BEST, search=2),
    "F12": f(**BEST, weight_decay=1e-4),
    "half": f(augment=FINAL, **BEST, weight_decay=1e-4),
    "E1": f(augment=FINAL, **BEST, weight_decay=1e-4, val=0.1),
    "E2": f(augment=f"clean+{FINAL}", **BEST, weight_decay=1e-4, val=0.1),
}


class Row(NamedTuple):
    """A claim. It holds if all its rules do; `=` and `<=` leave room for the noise."""

    id: str
    claim: str
    figure: str  # the report's
    rules: str  # separated by ;


LEDGER = [
    Row("B1", "resnet18 from scratch, SGD at 0.1", "0.19802", "best(B1all) > 0.198"),
    Row("B2", "CyclicLR between 0.01 and 0.1: a little better", "0.20004", "B2 > B1"),
    Row("B3", "LambdaLR: much worse", "0.1452", "B3 < B1"),
    Row("B4", "CosineAnnealingLR: the same", "0.1994", "B4 = B1"),
    Row("B5", "clean + flip: the best of the eight", "0.23708",
        "B5 > B2; B5 > B6; B5 > B7; B5 > B8"),
    Row("B6", "clean + flip + gray: below flip alone", "0.21022", "B6 < B5; B6 > B2"),
    Row("B7", "clean + one copy with both: below flip alone", "0.2136", "B7 < B5; B7 > B2"),
    Row("B8", "clean + flip + perspective: below flip alone", "0.22146", "B8 < B5; B8 > B2"),
    Row("V1", "v2 to v7: each step helps", "", "v3 > v2; v4 > v3; v5 > v4; v6 > v5; v7 > v6"),
    Row("V2", "the big set on v8 and v9, and v9's initialisation: no strong gain", "",
        "v8 <= v8clean; v9 <= v9clean; v9 <= v8"),
    Row("V3", "v10 to v13: a plateau", "", "v10 <= v9; v11 <= v9; v12 <= v9; v13 <= v9"),
    Row("V4", "Adam instead of SGD: a big mistake", "curve", "adam < v9; adam.001 < v9"),
    Row("V5", "more epochs: no gain", "curve", "v9long <= v9"),
    Row("F0", "v14 with the max-pool after the stem: worse", "", "F0 < F1"),
    Row("F1", "cosine from 0.5 beats cyclic by about 0.05", "+0.05", "F1 > cyclic"),
    Row("F2", "one augmented copy instead of clean + augmented: worse", "curve", "F2 < F1"),
    Row("F3", "four groups a little better than three, two worse", "curve",
        "F2 > three; two < three"),
    Row("F4", "dropout 0.25 to 0.1: better", "curve", "F4 > three"),
    Row("F5", "v15: terrible", "curve", "F5 < F4"),
    Row("F6", "stem kernel 5: much better, and overfits more", "curve",
        "F6 > F4; gap(F6) > gap(F4)"),
    Row("F7", "dropout a little higher again (0.15): not kept", "curve", "F7 <= F6"),
    Row("F8", "lr 0.0001 instead of 0.5: very bad", "curve", "F8 < F6"),
    Row("F9", "2.5 times the epochs (100): the peak comes at 40 of 100", "curve",
        "peak(F9) < 0.6"),
    Row("F10", "vflip, rotate, resizedcrop, hflip: worse than the big set", "curve", "F10 < F6"),
    Row("F11", "greedy search: out with invert, elastic, equalize; gray and the flips stay",
        "curve", "search F11"),
    Row("F12", "weight decay 0.0001: the best so far", "curve", "F12 > F6"),
    Row("E1", "validation 0.1, one augmented copy: overfits badly", "curve",
        "gap(E1) > gap(half); gap(E1) > gap(E2)"),
    Row("E2", "the same with clean + augmented: the final model", "0.43 (test)", "E2 > E1"),
]  # fmt: skip

COLUMNS = (
    "scale command seed epochs val_acc best_val_acc best_epoch train_acc seconds date machine"
).split()
SEARCH = "search.csv"  # of F11: the log of train.py --search


# ---------------------------------------------------------------- running


def command(name, scale):
    """The train.py flags of a run, without --data, --seed and --out."""
    run, sizes = RUNS[name], SCALES[scale]
    network, _, options = run["model"].partition(":")
    if network in ("v14", "v15") and sizes["width"] != 64:
        options += f",width={sizes['width']}"
    flags = dict(
        model=network + (f":{options.replace(':', ',')}" if options else ""),
        augment=run["augment"], val=run.get("val", 0.5), optimizer=run.get("optimizer", "sgd"),
        lr=run["lr"], schedule=run["schedule"],
        epochs=round(sizes[run["kind"]] * run.get("epochs", 1.0)),
        weight_decay=run.get("weight_decay", 0),
    )  # fmt: skip
    if "search" in run:
        flags["search"] = run["search"]
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in flags.items())


def subset(source, classes, folder):
    """The first classes of a data set as a folder in the homework's layout, made once."""
    if classes is None:
        return source
    if not (folder / "labels.csv").is_file():
        dataset = data.load(source, test=False)
        (folder / "trainval").mkdir(parents=True, exist_ok=True)
        rows = [("Id", "Category")]
        for i in (dataset.labels < classes).nonzero().flatten().tolist():
            picture = Image.fromarray(dataset.images[i].permute(1, 2, 0).numpy())
            rows.append((f"{i:06d}.png", dataset.classes[dataset.labels[i]]))
            picture.save(folder / "trainval" / rows[-1][0])
        with open(folder / "labels.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder


def train(name, seed, args):
    """One run from start, or from where it was killed, to end; its row for runs.csv."""
    flags = command(name, args.scale)
    out = args.out / f"{name}-{args.scale}-{seed}"
    classes = SCALES[args.scale]["classes"] if RUNS[name].get("classes") != "all" else None
    source = subset(args.data, classes, args.out / f"classes-{classes}")
    new = ["--data", source, *shlex.split(flags), "--seed", seed]
    flagged = new if source else new[2:]
    if any((folder / "ckpt.pt").is_file() for folder in (out, out / "run-1")):
        flagged = [*flagged, "--resume"]  # train.py refuses if its flags were others
    threads = max(1, (os.cpu_count() or 1) // args.jobs)
    done = subprocess.run(
        [sys.executable, HERE.parent / "train.py", *map(str, flagged), "--out", out],
        env={**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONIOENCODING": "utf-8"},
        capture_output=True,
        encoding="utf-8",
    )
    known = dict(
        scale=args.scale, command=flags, seed=seed, date=time.strftime("%Y-%m-%d"),
        machine=args.machine,
    )  # fmt: skip
    if "search" in RUNS[name]:
        for file in filter(Path.is_file, (out / SEARCH, out / "search.png")):
            shutil.copy(file, args.results)
    elif "no longer finite" in done.stderr:  # a claim may be decided by that: it counts as chance
        chance = dict.fromkeys(("val_acc", "best_val_acc", "train_acc"), 1 / (classes or 200))
        return {**known, **chance, "epochs": 1, "best_epoch": 1, "seconds": 0}
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])
    if "search" in RUNS[name]:
        return None
    log = read(out / "log.csv")
    last, best = log[-1], max(log, key=lambda row: float(row["val_acc"]))
    return dict(
        **known, epochs=last["epoch"], val_acc=last["val_acc"], best_val_acc=best["val_acc"],
        best_epoch=best["epoch"], train_acc=last["train_acc"],
        seconds=round(sum(float(row["seconds"]) for row in log)),
    )  # fmt: skip


def read(path):
    """The rows of a CSV file as dicts; none where there is no file."""
    if not path.is_file():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def write(path, rows, columns):
    """A CSV file, replaced whole."""
    with open(path.with_suffix(".tmp"), "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    path.with_suffix(".tmp").replace(path)


# ---------------------------------------------------------------- judging


class Results:
    """What runs.csv knows about a scale: name of a run -> seed -> row."""

    def __init__(self, rows, scale):
        commands = {command(name, scale): name for name in RUNS}
        self.runs = {name: {} for name in RUNS}
        for row in rows:
            if row["scale"] == scale and row["command"] in commands:
                self.runs[commands[row["command"]]][int(row["seed"])] = row
        self.spread = {"val": 0.0, "gap": 0.0}
        for what in self.spread:
            self.spread[what] = self.pooled(what)

    def values(self, side):
        """'gap(F6)' -> ('gap', {seed: value}); a number stands for itself on any seed."""
        what, name = side[:-1].split("(") if "(" in side else ("val", side)
        measures = {
            "val": lambda row: float(row["val_acc"]),
            "best": lambda row: float(row["best_val_acc"]),
            "gap": lambda row: float(row["train_acc"]) - float(row["val_acc"]),
            "peak": lambda row: int(row["best_epoch"]) / int(row["epochs"]),
        }
        return what, {seed: measures[what](row) for seed, row in self.runs[name].items()}

    def differences(self, rule):
        """(what is compared, the differences between the rule's two sides, seed by seed)"""
        left, _, right = rule.split()
        what, ours = self.values(left)
        if right[0].isdigit():
            return what, [value - float(right) for value in ours.values()]
        theirs = self.values(right)[1]
        return what, [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def pooled(self, what):
        """The standard deviation of a difference between two runs on a seed, over all rules."""
        squares = count = 0
        for row in LEDGER:
            for rule in row.rules.split("; ") if row.id != "F11" else []:
                kind, found = self.differences(rule)
                if kind == what and len(found) > 1:
                    squares += sum((x - statistics.mean(found)) ** 2 for x in found)
                    count += len(found) - 1
        return math.sqrt(squares / count) if count else math.nan

    def judge(self, rule):
        """(verdict, what was seen) of one rule."""
        relation = rule.split()[1]
        what, found = self.differences(rule)
        if not found:
            return "not run", rule
        difference = statistics.mean(found)
        spread = self.spread.get(what, 0.0)
        if what == "best":
            spread = self.spread["val"]
        noise = 2 * spread / math.sqrt(len(found))
        seen = f"{rule}: {difference:+.3f}" + (f" ± {noise:.3f}" if noise > 0 else "")
        seen += f" ({len(found)} seed{'s' * (len(found) > 1)})"
        if math.isnan(noise) or len(found) < 2:
            return "one seed only", seen
        sign = 0 if abs(difference) <= noise else math.copysign(1, difference)
        if relation == "=":
            return ("holds" if sign == 0 else "does not hold"), seen
        if relation == "<=":
            return ("holds" if sign <= 0 else "does not hold"), seen
        wanted = 1 if relation == ">" else -1
        return {0: "within noise", wanted: "holds", -wanted: "does not hold"}[sign], seen


# Of a row's rules the verdict that stands first here decides.
ORDER = ["not run", "not finished", "one seed only", "does not hold", "within noise", "holds"]


def verdict(row, results, args):
    """(verdict, what was seen) of a row of the ledger."""
    if row.id == "F11":
        return search_verdict(args)
    judged = [results.judge(rule) for rule in row.rules.split("; ")]
    return min((v for v, _ in judged), key=ORDER.index), "; ".join(seen for _, seen in judged)


def search_verdict(args):
    """F11 from the log of the search: the rounds as train.py judged them."""
    known = {(r["mix"], int(r["seed"])): float(r["val_acc"]) for r in read(args.results / SEARCH)}
    mix, seeds = RUNS["F11"]["augment"], sorted({seed for _, seed in known})
    out, worse, seen = [], [], []
    while True:
        mixes = {"the mix": mix, **train_py.without_one(mix)}
        if len(seeds) < 2 or any((m, seed) not in known for m in mixes.values() for seed in seeds):
            return "not finished", "; ".join(seen)
        rows, noise = train_py.compare(mixes, known, seeds)
        label, _, _, gain, outcome = max(rows, key=lambda row: row[3])
        worse = [row[0].split()[1] for row in rows if row[4] == "worse"]
        if outcome != "better":
            break
        out.append(label.split()[1])
        seen.append(f"{label}: {gain:+.3f} ± {noise:.3f}")
        mix = mixes[label]
    seen.append(f"then no gain; worse without {', '.join(worse) or 'none'} ({len(seeds)} seeds)")
    theirs = {"invert", "elastic", "equalize"}
    if set(out) == theirs:
        return "holds", "; ".join(seen)
    against = {"gray", "hflip", "vflip"} & set(out) | theirs & set(worse)
    return ("does not hold" if against else "within noise"), "; ".join(seen)


def write_table(args):
    """ledger.csv and ledger.md from runs.csv."""
    results = Results(read(args.results / "runs.csv"), args.scale)
    rows = []
    for row in LEDGER:
        outcome, seen = verdict(row, results, args)
        rows.append(dict(id=row.id, claim=row.claim, report=row.figure, verdict=outcome, seen=seen))
    write(args.results / "ledger.csv", rows, list(rows[0]))
    lines = ["| id | claim | the report's figure | verdict | seen |", "|---|---|---|---|---|"]
    lines += ["| " + " | ".join(map(str, row.values())) + " |" for row in rows]
    (args.results / "ledger.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


# ---------------------------------------------------------------- command line


def wanted(args):
    """The names of the runs that the asked rows need."""
    names = []
    for row in sorted(LEDGER, key=lambda row: "all" in row.rules):  # the longest last
        if not args.only or row.id in args.only:
            words = row.rules.replace("(", " ").replace(")", " ").replace(";", " ").split()
            names += [word for word in words if word in RUNS]
    return list(dict.fromkeys(names))


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="PATH", help="as in train.py (default: what it finds)")
    parser.add_argument("--scale", choices=SCALES, default="small", help="(default: small)")
    parser.add_argument("--only", metavar="ID", nargs="+", help="these rows alone, such as F4")
    parser.add_argument("--seeds", type=int, help="runs of each kind (default: the scale's)")
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)"
    )
    parser.add_argument("--minutes", type=float, default=math.inf, help="start no run after these")
    parser.add_argument(
        "--out", type=Path, default=Path("ledger"), help="for the runs' files (default: ledger)"
    )
    parser.add_argument(
        "--results", type=Path, default=HERE, help="for runs.csv and the table (default: tests)"
    )
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    parser.add_argument("--dry-run", action="store_true", help="only print the commands")
    args = parser.parse_args(argv)
    unknown = set(args.only or []) - {row.id for row in LEDGER}
    if unknown:
        parser.error(f"no such row: {', '.join(sorted(unknown))}")
    return args


def main(argv=None):
    args = parse_args(argv)
    done = {
        (row["scale"], row["command"], int(row["seed"])) for row in read(args.results / "runs.csv")
    }
    seeds = range(args.seeds or SCALES[args.scale]["seeds"])
    todo = [
        (name, seed)
        for seed in seeds
        for name in wanted(args)
        if (args.scale, command(name, args.scale), seed) not in done
        # The search has its seeds within, and is done once its last round is.
        and not ("search" in RUNS[name] and (seed or search_verdict(args)[0] != "not finished"))
    ]
    if args.dry_run:
        for name, seed in todo:
            print(f"{name:<9} python train.py {command(name, args.scale)} --seed {seed}")
        return
    args.out.mkdir(parents=True, exist_ok=True)
    if todo:
        classes = SCALES[args.scale]["classes"]
        subset(args.data, classes, args.out / f"classes-{classes}")
    lock, start = threading.Lock(), time.monotonic()

    def finish(job):
        if time.monotonic() - start > args.minutes * 60:
            return
        try:
            row = train(*job, args)
        except (RuntimeError, OSError) as error:
            print(f"{job[0]}, seed {job[1]}: failed: {error}", flush=True)
            return
        with lock:
            if row:
                rows = [*read(args.results / "runs.csv"), row]
                write(args.results / "runs.csv", rows, COLUMNS)
            write_table(args)
            print(f"{time.strftime('%H:%M')} {job[0]}, seed {job[1]}: done", flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(finish, todo))
    write_table(args)


if __name__ == "__main__":
    main()
