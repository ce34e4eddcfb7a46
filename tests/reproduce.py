"""The ledger: every claim of the report as train.py command lines, run again, with a verdict.

    python tests/reproduce.py --data PATH                 # all rows: about six hours of two cores
    python tests/reproduce.py --data PATH --scale full    # the report's own setting, for a GPU
    python tests/reproduce.py --only F4 --dry-run         # what one row would run

A finished run is kept in runs.csv (in --results, by default tests/) and never made again; one that
was killed goes on where it was, given the same --out. After each run the table, ledger-small.csv
and ledger-small.md, is drawn anew.

A row is decided by rules such as `F4 > F3`: the accuracy on validation after the last epoch of two
runs, compared seed by seed (where both hold out the same share, the same seed is the same split).
The noise is half the 95 % interval of the mean difference, its spread pooled over all the rules of
a kind of row (B, V, F, E).
"""

import argparse
import math
import os
import platform
import shlex
import shutil
import signal
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
import predict  # noqa: E402
from train import POSITIVE  # noqa: E402

BIG = "vflip,elastic,gray,invert,equalize,hflip"  # the report's first big augmentation set
FINAL = "hflip,vflip,gray"

# Classes (None: all), epochs for the rows B, V, F and E, and what v14 and v15 are given: torch's
# plain initialisation, as the report most likely had it, or where that can't decide a row (small:
# at a rate of 0.5 nothing is learnt in 12 epochs), ours.
# The report gives no epochs for B and V; for F and E it has 40.
SCALES = {
    "small": dict(
        classes=10, B=10, V=8, F=12, E=12, v14="width=16", seeds=dict(B=2, V=2, F=2, E=2)
    ),
    "full": dict(
        classes=None, B=40, V=40, F=40, E=40, v14="zero_init=false", seeds=dict(B=3, V=3, F=3, E=3)
    ),
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
    """A run of v14 (report: F0 to F12, E1, E2)."""
    options = f"groups={groups},stem_kernel={stem_kernel},dropout={dropout}"
    run = dict(kind="F", model=f"{model}:{options}", lr=0.5, schedule="cosine", augment=augment)
    return {**run, **other}


BEST = dict(stem_kernel=5, dropout=0.1)  # what F4 and F6 end with

RUNS = {
    "B1": b(schedule="constant"),
    "B1all": b(schedule="constant", epochs=0.6, classes="all"),
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
    "half": f(augment=FINAL, **BEST, weight_decay=1e-4, kind="E"),
    "E1": f(augment=FINAL, **BEST, weight_decay=1e-4, kind="E", val=0.1),
    "E2": f(augment=f"clean+{FINAL}", **BEST, weight_decay=1e-4, kind="E", val=0.1),
}


class Row(NamedTuple):
    """A claim, which holds if all its rules do.

    `>` more than by chance. `>>` so, and by STRONG or more. `=` by less than STRONG either way,
    `<=` by less than STRONG above: both only if the noise leaves no room for more.
    """

    id: str
    claim: str
    figure: str  # the report's
    rules: str  # separated by ;


STRONG = 0.03  # of accuracy: what "much" and "no strong gain" are taken to mean

LEDGER = [
    Row("B1", "resnet18 from scratch, SGD at 0.1", "0.19802", "best(B1all) > 0.198"),
    Row("B2", "CyclicLR between 0.01 and 0.1: a little better", "0.20004", "B2 > B1"),
    Row("B3", "LambdaLR: much worse", "0.1452", "B3 << B1"),
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
    Row("V4", "Adam instead of SGD: a big mistake", "curve", "adam << v9; adam.001 << v9"),
    Row("V5", "more epochs: no gain", "curve", "v9long <= v9"),
    Row("F0", "v14 with the max-pool after the stem: worse", "", "F0 < F1"),
    Row("F1", "cosine from 0.5 beats cyclic by about 0.05", "+0.05", "F1 >> cyclic"),
    Row("F2", "one augmented copy instead of clean + augmented: worse", "curve", "F2 < F1"),
    Row("F3", "four groups a little better than three, two worse", "curve",
        "F2 > three; two < three"),
    Row("F4", "dropout 0.25 to 0.1: better", "curve", "F4 > three"),
    Row("F5", "v15: terrible", "curve", "F5 << F4"),
    Row("F6", "stem kernel 5: much better, and overfits more", "curve",
        "F6 >> F4; gap(F6) > gap(F4)"),
    Row("F7", "dropout a little higher again (0.15): not kept", "curve", "F7 <= F6"),
    Row("F8", "lr 0.0001 instead of 0.5: very bad", "curve", "F8 << F6"),
    Row("F9", "2.5 times the epochs (100): the peak comes at 40 of 100 (before 60)", "curve",
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
    "scale data command seed epochs val_acc best_val_acc best_epoch train_acc seconds date machine"
).split()


# ---------------------------------------------------------------- running


def command(name, scale):
    """The train.py flags of a run, without --data, --seed and --out."""
    run, sizes = RUNS[name], SCALES[scale]
    network, _, options = run["model"].partition(":")
    if network in ("v14", "v15"):
        options += f",{sizes['v14']}"
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
    if classes is None or folder.is_dir():
        return folder if classes else source
    dataset = data.load(source, test=False)
    unfinished = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(unfinished, ignore_errors=True)
    (unfinished / "trainval").mkdir(parents=True)
    rows = []
    for i in (dataset.labels < classes).nonzero().flatten().tolist():
        picture = Image.fromarray(dataset.images[i].permute(1, 2, 0).numpy())
        rows.append((f"{i:06d}.png", dataset.classes[dataset.labels[i]]))
        picture.save(unfinished / "trainval" / rows[-1][0])
    predict.write_table(unfinished / "labels.csv", ("Id", "Category"), rows)
    return unfinished.rename(folder)


def train(name, seed, args):
    """One run from start, or from where it was killed, to end; its row for runs.csv, if any."""
    flags, searching = command(name, args.scale), "search" in RUNS[name]
    out = args.out / f"{name}-{args.scale}-{seed}"
    classes = SCALES[args.scale]["classes"] if RUNS[name].get("classes") != "all" else None
    source = subset(args.data, classes, args.out / f"classes-{classes}")
    words = ["--data", source, *shlex.split(flags), "--seed", seed, "--out", out]
    if any((folder / "ckpt.pt").is_file() for folder in (out, out / "run-1")):
        words.append("--resume")  # train.py refuses if its flags were others
    status, error = call([sys.executable, HERE.parent / "train.py", *words], args.jobs)
    if searching:
        for end in ("csv", "png"):
            if (out / f"search.{end}").is_file():
                shutil.copy(out / f"search.{end}", args.results / f"search-{args.scale}.{end}")
    known = dict(
        scale=args.scale, data=Path(args.data).name, command=flags, seed=seed,
        date=time.strftime("%Y-%m-%d"), machine=args.machine,
    )  # fmt: skip
    if "no longer finite" in error and not searching:  # a claim may be decided by that: as chance
        chance = dict.fromkeys(("val_acc", "best_val_acc", "train_acc"), 1 / (classes or 200))
        return {**known, **chance, "epochs": 1, "best_epoch": 1, "seconds": 0}
    if status:
        raise RuntimeError((error.strip() or "no message").splitlines()[-1])
    if searching:
        return None
    log = predict.read_table(out / "log.csv")
    last, best = log[-1], max(log, key=lambda row: float(row["val_acc"]))
    return dict(
        **known, epochs=last["epoch"], val_acc=last["val_acc"], best_val_acc=best["val_acc"],
        best_epoch=best["epoch"], train_acc=last["train_acc"],
        seconds=round(sum(float(row["seconds"]) for row in log)),
    )  # fmt: skip


CHILDREN = set()  # the runs of this moment, which end with us


def call(words, jobs):
    """(exit status, what it said on stderr) of a child with its share of the cores."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    child = subprocess.Popen(
        list(map(str, words)),
        env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONIOENCODING": "utf-8"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    CHILDREN.add(child)
    error = child.communicate()[1]
    CHILDREN.discard(child)
    return child.returncode, error


# ---------------------------------------------------------------- judging


class Results:
    """What runs.csv knows about a scale and a data set: name of a run -> seed -> row."""

    def __init__(self, rows, scale, source):
        commands = {command(name, scale): name for name in RUNS}
        self.scale, self.runs = scale, {name: {} for name in RUNS}
        for row in rows:
            if (row["scale"], row["data"]) == (scale, source) and row["command"] in commands:
                self.runs[commands[row["command"]]][int(row["seed"])] = row
        self.differences_of = {}  # (kind of row, what is compared) -> lists of differences
        for row in LEDGER:
            for rule in row.rules.split("; ") if row.id != "F11" else []:
                what, found = self.differences(rule)
                if not rule.split()[2][0].isdigit() and not self.failed(rule):
                    self.differences_of.setdefault((row.id[0], what), []).append(found)

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

    def failed(self, rule):
        """Whether a run of the rule learnt nothing on any seed, which is no measure of noise."""
        names = [side.strip(")").split("(")[-1] for side in rule.split()[::2]]
        classes = SCALES[self.scale]["classes"] or 200
        runs = [self.runs[name].values() for name in names if self.runs.get(name)]
        return any(all(float(row["val_acc"]) < 1.5 / classes for row in rows) for rows in runs)

    def differences(self, rule):
        """(what is compared, the differences between the rule's two sides, seed by seed)"""
        left, _, right = rule.split()
        what, ours = self.values(left)
        if right[0].isdigit():
            return what, [value - float(right) for value in ours.values()]
        theirs = self.values(right)[1]
        return what, [ours[seed] - theirs[seed] for seed in sorted(ours.keys() & theirs.keys())]

    def judge(self, rule, kind):
        """(verdict, what was seen) of one rule of a row of this kind."""
        relation, limit = rule.split()[1:]
        what, found = self.differences(rule)
        if not found:
            return "not run", rule
        mean = statistics.mean(found)
        seeds = f"({len(found)} seed{'s' * (len(found) > 1)})"
        if limit[0].isdigit():  # each seed against a number
            right = [(x > 0) == (relation == ">") for x in found]
            seen = f"{rule}: {mean + float(limit):.3f} {seeds}"
            if len(found) < 2:
                return "one seed only", seen
            return "holds" if all(right) else "within noise" if any(
                right
            ) else "does not hold", seen
        noise = predict.noise(self.differences_of.get((kind, what), []), len(found))
        if math.isnan(noise) or len(found) < 2:
            return "one seed only", f"{rule}: {mean:+.3f} {seeds}"
        return decide(relation, mean, noise), f"{rule}: {mean:+.3f} ± {noise:.3f} {seeds}"


def decide(relation, difference, noise):
    """The verdict on `left relation right` for left - right and its noise."""
    if relation in ("=", "<="):
        above = abs(difference) if relation == "=" else difference
        if above + noise <= STRONG:
            return "holds"
        return "does not hold" if above - noise >= STRONG else "within noise"
    difference = -difference if relation[0] == "<" else difference
    if len(relation) == 2 and difference + noise < STRONG:
        return "does not hold"
    if difference > noise and (len(relation) == 1 or difference >= STRONG):
        return "holds"
    return "does not hold" if difference < -noise else "within noise"


# Of a row's rules the verdict that stands first here decides.
ORDER = ["not run", "not finished", "one seed only", "does not hold", "within noise", "holds"]


def verdict(row, results, args):
    """(verdict, what was seen) of a row of the ledger."""
    if row.id == "F11":
        return search_verdict(args)
    judged = [results.judge(rule, row.id[0]) for rule in row.rules.split("; ")]
    return min((v for v, _ in judged), key=ORDER.index), "; ".join(seen for _, seen in judged)


def search_verdict(args):
    """F11 from the log of the search: the rounds as train.py judged them."""
    log = predict.read_table(args.results / f"search-{args.scale}.csv")
    known = {(row["mix"], int(row["seed"])): float(row["val_acc"]) for row in log}
    mix, seeds = RUNS["F11"]["augment"], range(RUNS["F11"]["search"])
    out, seen = [], []
    while True:
        mixes = {"the mix": mix, **predict.without_one(mix)}
        if any((m, seed) not in known for m in mixes.values() for seed in seeds):
            return "not finished", "; ".join(seen)
        rows, noise = predict.compare(mixes, known, seeds)
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


def ran(row, scale):
    """'width=16, 12 epochs': what distinguishes the runs of a row at this scale."""
    kind, sizes = row.id[0], SCALES[scale]
    commands = [command(name, scale).split() for name in names_in(row)]
    epochs = {words[words.index("--epochs") + 1] for words in commands}
    network = f"v14:{sizes['v14']}, " if kind in "FE" else ""
    return f"{network}{' and '.join(sorted(epochs, key=int))} epochs"


def write_table(args):
    """The ledger as CSV and Markdown, from runs.csv."""
    results = Results(
        predict.read_table(args.results / "runs.csv"), args.scale, Path(args.data).name
    )
    header = ["id", "claim", "the report's figure", "runs", "verdict", "seen"]
    rows = [
        [row.id, row.claim, row.figure, ran(row, args.scale), *verdict(row, results, args)]
        for row in LEDGER
    ]
    predict.write_table(args.results / f"ledger-{args.scale}.csv", header, rows)
    lines = ["| " + " | ".join(line) + " |" for line in [header, ["---"] * len(header), *rows]]
    text = ("\n".join(lines) + "\n").encode()
    data.write_file(args.results / f"ledger-{args.scale}.md", lambda file: file.write(text))


# ---------------------------------------------------------------- command line


def names_in(row):
    """The names of the runs in a row's rules."""
    words = row.rules.replace("(", " ").replace(")", " ").replace(";", " ").split()
    return [word for word in words if word in RUNS]


def to_do(args):
    """(name, seed) of the runs that the asked rows need and runs.csv lacks."""
    rows = predict.read_table(args.results / "runs.csv")
    done = {(row["scale"], row["data"], row["command"], int(row["seed"])) for row in rows}
    asked = [row for row in LEDGER if not args.only or row.id in args.only]
    asked.sort(key=lambda row: "all" in row.rules)  # the longest last
    names = list(dict.fromkeys(name for row in asked for name in names_in(row)))
    seeds = SCALES[args.scale]["seeds"]
    return [
        (name, seed)
        for seed in range(args.seeds or max(seeds.values()))
        for name in names
        if (args.seeds or seed < seeds[RUNS[name]["kind"]])
        and (args.scale, Path(args.data).name, command(name, args.scale), seed) not in done
        # The search has its seeds within, and is done once its last round is.
        and not ("search" in RUNS[name] and (seed or search_verdict(args)[0] != "not finished"))
    ]


def run_all(todo, args):
    """Make the runs, several at a time, and draw the table after each."""
    lock, start = threading.Lock(), time.monotonic()

    def finish(job):
        if time.monotonic() - start > args.minutes * 60:
            return
        try:
            row = train(*job, args)
        except (RuntimeError, OSError, ValueError) as error:
            print(f"{job[0]}, seed {job[1]}: failed: {error}", flush=True)
            return
        with lock:
            if row:
                rows = [*predict.read_table(args.results / "runs.csv"), row]
                rows = [[row[key] for key in COLUMNS] for row in rows]
                predict.write_table(args.results / "runs.csv", COLUMNS, rows)
            write_table(args)
            print(f"{time.strftime('%H:%M')} {job[0]}, seed {job[1]}: done", flush=True)

    pool = ThreadPoolExecutor(args.jobs)
    try:
        list(pool.map(finish, todo))
    finally:  # also where we are interrupted: train.py saves where it is
        pool.shutdown(wait=False, cancel_futures=True)
        for child in list(CHILDREN):
            child.terminate()
        pool.shutdown()


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="PATH", help="as in train.py (default: what it finds)")
    parser.add_argument("--scale", choices=SCALES, default="small", help="(default: small)")
    parser.add_argument("--only", metavar="ID", nargs="+", help="these rows alone, such as F4")
    parser.add_argument(
        "--seeds", type=data.at_least(1), help="seeds of each run (default: the scale's)"
    )
    parser.add_argument(
        "--jobs", type=data.at_least(1), default=os.cpu_count(),
        help="runs at a time (default: one a core)",
    )  # fmt: skip
    parser.add_argument(
        "--minutes", type=POSITIVE, default=math.inf, help="start no run after these"
    )
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
    args, stopped = parse_args(argv), "stopped; the same command goes on from here"
    with data.sentences("reproduce.py", interrupted=stopped):
        args.data = args.data or data.find_source()
        args.out /= Path(args.data).resolve().name  # the runs of other data are others
        todo = to_do(args)
        for name, seed in todo if args.dry_run else []:
            print(f"{name:<9} python train.py {command(name, args.scale)} --seed {seed}")
        if args.dry_run:
            return
        args.out.mkdir(parents=True, exist_ok=True)
        args.results.mkdir(parents=True, exist_ok=True)
        if todo:
            classes = SCALES[args.scale]["classes"]
            subset(args.data, classes, args.out / f"classes-{classes}")
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        run_all(todo, args)
        write_table(args)


if __name__ == "__main__":
    main()
