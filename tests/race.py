"""The race: what accuracy so many minutes give, for our recipe and for the report's, side by side.

    python tests/race.py --data PATH --minutes 15 30             # a run of each racer and budget
    python tests/race.py --data PATH --ablate --minutes 15       # `quick` with a part left out
    python tests/race.py --only quick --minutes 15 --seeds 3

Minutes are by the wall clock, from the start of the process to its last checkpoint. Accuracy is
that of the last epoch on a tenth of the labelled pictures. Each run has the machine to itself;
finished ones are kept in race.csv (in --results, by default tests/) and not made again on the same
--machine; one that was killed begins anew. After each run race.md and race.png are drawn anew.
"""

import argparse
import itertools
import math
import os
import platform
import shlex
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import data  # noqa: E402
import predict  # noqa: E402
import train  # noqa: E402

# Name: flags of train.py, and its colour (told apart by the colour-blind: Okabe and Ito).
RACERS = {
    "quick": ("--recipe quick", "#0072B2"),
    "long": ("--recipe long", "#009E73"),
    "resnet18": ("--model resnet18 --lr 0.1 --augment clean+hflip --schedule cyclic", "#E69F00"),
    "v14": ("--recipe report", "#D55E00"),
}
# What is left out of `quick`, or changed: name and flags.
MODEL = f"--model {train.RECIPES['quick']['model']}"
ABLATIONS = {
    "quick": "",
    "32 px, growing from 16": "--size 32 --grow 16",
    "no growing: 40 px all along": "--grow 40",
    "each block starts as the identity, Kaiming convolutions": f"{MODEL},zero_init=true",
    "skips that leave pixels out": f"{MODEL},avg_down=false",
    "no bottleneck in the last group": f"{MODEL},tail=0",
    "convolutions of one path": f"{MODEL},path_width=0",
    "a first group of 64 channels": f"{MODEL},first=1",
    "no warm-up": "--warmup 0",
    "cosine instead of linear": "--schedule cosine",
    "no label smoothing": "--label-smoothing 0",
    "no shift": "--augment hflip",
    "no shift, no label smoothing": "--augment hflip --label-smoothing 0",
    "clean + mirrored": "--augment clean+hflip:1",
    "shift by 2": "--augment hflip,shift=2",
    "clean + augmented": "--augment clean+hflip,shift",
    "four groups instead of three": f"{MODEL},groups=4",
    "two blocks a group": f"{MODEL},depth=2",
    "more weight decay": "--weight-decay 5e-4",
    "batches of 256": "--batch-size 256",
}
LINES = {
    0.43: "the report (test), about three hours of a GPU",
    0.563: "the best public result, 13.4 hours of a GPU",
}
COLUMNS = "data racer flags minutes seed val_acc epochs took gflops date machine settings".split()
KEY = "data settings minutes seed machine".split()  # of two runs that are the same


def settings(flags):
    """All that the flags come to: a recipe may change after a run was made by its name."""
    args = vars(train.parse_args(shlex.split(flags)))
    left_out = {"given", "recipe", "epochs", "out", "seed"}
    return " ".join(f"{k}={v}" for k, v in sorted(args.items()) if v and k not in left_out)


def gigaflops(side=4096):
    """What a large matrix product reaches here, by which minutes of machines can be compared."""
    a = torch.rand(side, side, dtype=predict.choose_precision(torch.device("cpu")))
    seconds = predict.median_seconds(torch.device("cpu"), lambda: a @ a)
    return 2 * side**3 / seconds / 1e9


def race(name, flags, minutes, seed, args):
    """One run from start to end: its row of race.csv; None where it fails, as where no epoch fits
    into the minutes (train.py says why).
    """
    words = "".join(c if c.isalnum() else "-" for c in name)
    out = args.out / f"{words}-{minutes:g}-{seed}"
    given = ["--data", args.data, *shlex.split(flags), "--val", "0.1", "--minutes", f"{minutes:g}"]
    given += ["--seed", str(seed), "--out", str(out)]
    begin = time.time()
    command = [sys.executable, str(HERE.parent / "train.py"), *given]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        return None
    log = predict.read_table(out / "log.csv")
    took = (out / "ckpt.pt").stat().st_mtime - begin
    return dict(
        data=Path(args.data).name, racer=name, flags=flags, minutes=f"{minutes:g}", seed=seed,
        val_acc=log[-1]["val_acc"], epochs=log[-1]["epoch"], took=round(took / 60, 1),
        gflops=round(args.gflops), date=time.strftime("%Y-%m-%d"), machine=args.machine,
        settings=settings(flags),
    )  # fmt: skip


# ---------------------------------------------------------------- table and picture


def summarised(rows):
    """{(racer, machine, minutes): its rows, a seed each}, sorted."""
    found = {}
    for row in rows:
        key = row["racer"], row["machine"], float(row["minutes"])
        found.setdefault(key, []).append(row)
    return dict(sorted(found.items()))


def accuracies(runs):
    return [float(row["val_acc"]) for row in runs]


def between(runs, column):
    least, most = (pick(int(row[column]) for row in runs) for pick in (min, max))
    return f"{least} to {most}" if least < most else f"{least}"


def write_table(rows, path):
    """The runs as Markdown: mean and spread over seeds."""
    head = "what | minutes | seeds | validation accuracy | epochs | GFLOP/s | machine".split(" | ")
    lines = [head, ["---"] * len(head)]
    for (racer, machine, minutes), runs in summarised(rows).items():
        accuracy = f"{statistics.mean(accuracies(runs)):.4f}"
        if len(runs) > 1:
            accuracy += f" ± {statistics.stdev(accuracies(runs)):.4f}"
        counts = [between(runs, "epochs"), between(runs, "gflops")]
        lines.append([racer, f"{minutes:g}", len(runs), accuracy, *counts, machine])
    lines = ["| " + " | ".join(map(str, line)) + " |" for line in lines]
    text = ("\n".join(lines) + "\n").encode()
    data.write_file(path, lambda file: file.write(text))


def dot(pen, x, y, colour, number):
    """Of the first machine full, of the others hollow."""
    pen.ellipse([x - 8, y - 8, x + 8, y + 8], "white" if number else colour, colour, 4)


def draw(rows):
    """Accuracy against minutes, logarithmic; every run a dot, means of a machine joined: a Pillow
    picture.
    """
    title = "Validation accuracy against minutes"
    machines = sorted({row["machine"] for row in rows})
    # In half pixels, as predict.py's charts.
    canvas, pen = data.blank(2080, 1080 + 36 * len(machines), title, 28)
    left, right, top, low = 160, 1920, 120, 980
    minutes = [float(row["minutes"]) for row in rows]
    first, last = math.log(min(minutes) / 1.3), math.log(max(minutes) * 1.3)

    def point(x, y):
        across = (math.log(x) - first) / (last - first)
        return left + (right - left) * across, low - (low - top) * min(y, 0.6) / 0.6

    for value in (0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6):
        y = point(minutes[0], value)[1]
        pen.line([(left, y), (right, y)], "#dddddd", 2)
        pen.text((left - 16, y), f"{value:g}", "black", anchor="rm")
    for value in sorted(set(minutes)):
        pen.text((point(value, 0)[0], low + 16), f"{value:g}", "black", anchor="ma")
    pen.text(((left + right) / 2, low + 64), "minutes", "black", anchor="ma")
    for value, text in LINES.items():
        y = point(minutes[0], value)[1]
        pen.line([(left, y), (right, y)], "#666666", 2)
        pen.text((right - 16, y - 6), f"{value:g}: {text}", "#444444", anchor="rs")
    for number, machine in enumerate(machines):
        dot(pen, 180, 1076 + 36 * number, "black", number)
        pen.text((204, 1076 + 36 * number), machine, "black", anchor="lm")
    for (name, (_, colour)), machine in itertools.product(RACERS.items(), machines):
        known = [(m, r) for (*of, m), r in summarised(rows).items() if of == [name, machine]]
        means = [point(m, statistics.mean(accuracies(runs))) for m, runs in known]
        if len(means) > 1:
            pen.line(means, colour, 4)
        for m, value in ((m, value) for m, runs in known for value in accuracies(runs)):
            dot(pen, *point(m, value), colour, machines.index(machine))
        if means:
            pen.text((means[-1][0] + 20, means[-1][1]), name, colour, anchor="lm")
    return canvas.reduce(2)


# ---------------------------------------------------------------- command line


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--data", metavar="PATH", help="as in train.py (default: what it finds)")
    parser.add_argument(
        "--minutes", type=train.POSITIVE, nargs="+", default=[15.0], help="(default: 15)"
    )
    parser.add_argument("--seeds", type=data.at_least(1), default=1, help="of each (default: 1)")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these alone")
    parser.add_argument("--ablate", action="store_true", help="quick with a part left out")
    parser.add_argument("--out", type=Path, default=Path("race"), help="for the runs' files")
    parser.add_argument("--results", type=Path, default=HERE, help="for the table (default: tests)")
    parser.add_argument("--machine", default=platform.processor() or platform.machine())
    args = parser.parse_args(argv)
    args.known = {name: flags for name, (flags, _) in RACERS.items()}
    if args.ablate:
        args.known = {name: f"--recipe quick {more}".strip() for name, more in ABLATIONS.items()}
    unknown = set(args.only or []) - set(args.known)
    if unknown:
        parser.error(f"no such racer: {', '.join(unknown)}; there are {', '.join(args.known)}")
    return args


def record(row, rows, table, args):
    """Add a run to the table, and draw the runs on these data by the settings that are ours now."""
    rows = [*rows, row]
    predict.write_table(table, COLUMNS, [[r[column] for column in COLUMNS] for r in rows])
    ours = {name: settings(flags) for name, flags in args.known.items()}
    shown = [r for r in rows if (r["data"], r["settings"]) == (row["data"], ours.get(r["racer"]))]
    write_table(shown, table.with_suffix(".md"))
    if not args.ablate:
        picture = draw(shown)
        data.write_file(table.with_suffix(".png"), lambda file: picture.save(file, "PNG"))


def main(argv=None):
    args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    table = args.results / ("ablations.csv" if args.ablate else "race.csv")
    with data.sentences("race.py", interrupted="stopped; the same command goes on from here"):
        args.data = str(args.data or data.find_source())
        args.out.mkdir(parents=True, exist_ok=True)
        args.gflops, failed = gigaflops(), []
        print(f"a matrix product here: {args.gflops:.0f} GFLOP/s, {os.cpu_count()} cores")
        for seed, minutes, racer in itertools.product(
            range(args.seeds), args.minutes, args.only or args.known
        ):
            rows, flags = predict.read_table(table), args.known[racer]
            run = [Path(args.data).name, settings(flags), f"{minutes:g}", str(seed), args.machine]
            if run in [[r[key] for key in KEY] for r in rows]:
                continue
            row = race(racer, flags, minutes, seed, args)
            print(f"{racer}, {minutes:g} minutes, seed {seed}: {row and row['val_acc']}")
            if row:
                record(row, rows, table, args)
            else:
                failed.append(racer)
        if failed:
            raise data.Failed(f"no result of {', '.join(failed)}: see above why")


if __name__ == "__main__":
    main()
