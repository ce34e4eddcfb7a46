"""Answers of trained networks: a submission, one picture, a folder, or a score.

    python predict.py ckpt.pt                       # the source's test pictures -> submission.csv
    python predict.py ckpt.pt --data cat.png        # the five likeliest classes
    python predict.py a.pt b.pt --views 10          # two networks averaged, ten views a picture
    python predict.py best.pt --score               # how well it does on what training didn't see
    python predict.py --compare run-1 run-2         # the curves of several runs in one picture

logits() is the one inference path: what train.py reports as validation comes from it as well.
What training shares with it stands here too: the choice of device and precision, what several
processes of a run say to each other; and the words, comparisons and charts of training.
"""

import csv
import io
import itertools
import math
import os
import signal
import statistics
import threading
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageColor, ImageDraw, ImageFont

import augment
import data
import models

# Test-time views as (flip, rows down, columns right), in the order in which --views takes them.
SHIFTS = (0, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)
VIEWS = [(flip, *shift) for shift in SHIFTS for flip in (False, True)]

# ---------------------------------------------------------------- device, precision, processes


def choose_device():
    """The first GPU (of several processes, each its own) if this torch can use it, else the CPU;
    ValueError for a GPU that it can't use.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    number = int(os.environ.get("LOCAL_RANK", torch.cuda.current_device()))
    if number >= torch.cuda.device_count():
        raise ValueError(f"process {number + 1} of this machine has no GPU: start fewer of them")
    device = torch.device("cuda", number)
    capability, kernels = torch.cuda.get_device_capability(device), torch.cuda.get_arch_list()
    if not (torch.version.hip or has_kernels(capability, kernels)):
        raise ValueError(
            f"this torch has no kernels for {torch.cuda.get_device_name(device)} "
            f"(sm_{capability[0]}{capability[1]}, it has {' '.join(kernels)}): install an older "
            'torch, choose another card, or set CUDA_VISIBLE_DEVICES="" to use the CPU'
        )
    return device


def has_kernels(capability, kernels):
    """Whether a torch built with such kernels ("sm_80", "compute_90") runs on a card.

    Machine code runs on later cards of the same generation, "compute" code on all later cards.
    """
    for kernel in kernels:
        kind, _, number = kernel.partition("_")
        built = divmod(int("".join(filter(str.isdigit, number))), 10)
        if built <= capability and (kind == "compute" or built[0] == capability[0]):
            return True
    return False


def processor_flags():
    """What the processor can do, in Linux's words; empty on other systems."""
    with suppress(OSError):
        return {*Path("/proc/cpuinfo").read_text().split()}
    return set()


def choose_precision(device):
    """The dtype that convolutions and matrix products are computed in: bfloat16 on GPUs from Ampere
    on and on processors that multiply in it (AVX-512 BF16 or AMX), float16 on Volta and Turing
    (T4), else float32. Not torch.cuda.is_bf16_supported(), which is true by emulation on a T4.
    """
    if device.type == "cuda":
        major = torch.cuda.get_device_capability(device)[0]
        return torch.bfloat16 if major >= 8 else torch.float16 if major == 7 else torch.float32
    multiplies = processor_flags() & {"avx512_bf16", "amx_bf16"}
    return torch.bfloat16 if multiplies else torch.float32


def memory_format(network, device):
    """How a network's weights lie in memory: channels last, where that is sound and not slow.

    On a CPU, 1x1 convolutions of fewer than 8 channels then write past the end of their memory
    (torch 2.14 with AVX2). With AVX-512 BF16 a step was seen to take 3 to 23 % less time, on
    another processor 70 % more: with AMX, where it was not measured, contiguous is the safe one.
    """
    convolutions = (m for m in network.modules() if isinstance(m, torch.nn.Conv2d))
    thin = any(m.kernel_size == (1, 1) and m.in_channels < 8 for m in convolutions)
    if device.type == "cpu" and (thin or "amx_bf16" in processor_flags()):
        return torch.contiguous_format
    return torch.channels_last


def autocast(device, precision):
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


def computed_on(device, precision, compiled=False):
    """'cpu, 2 threads, float32': what must be the same for a resumed run to give the same bits."""
    threads, world = torch.get_num_threads(), processes()[1]
    cpu = f"cpu, {threads} thread{'s' * (threads > 1)}"
    words = [torch.cuda.get_device_name(device) if device.type == "cuda" else cpu]
    words += [f"{world} processes"] * (world > 1) + [str(precision).replace("torch.", "")]
    return ", ".join(words + ["compiled"] * bool(compiled))


@contextmanager
def environment(device, compiled=False):
    """Join the processes that torchrun started, if it did, and let a GPU choose its algorithms;
    afterwards all is as it was. (Where a process fails, they stay joined until they end.)
    """
    if compiled:  # what a notebook compiled before counts towards torch's eight variants
        torch.compiler.reset()
    before = torch.backends.cudnn.benchmark, torch.get_float32_matmul_precision()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True  # shapes stay the same: worth a try of each algorithm
        torch.set_float32_matmul_precision("high")  # TF32, for what isn't in half precision anyway
    try:
        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            nccl = device.type == "cuda" and dist.is_nccl_available()  # Windows has none
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo")
        yield
        if processes()[1] > 1:  # where all came to the end: one alone might wait for the others
            time.sleep(0.1)  # while a thread of torch 2.4 holds the last sum, what follows hangs
            dist.destroy_process_group()
    finally:
        torch.backends.cudnn.benchmark = before[0]
        torch.set_float32_matmul_precision(before[1])


def median_seconds(device, function, budget=0.0):
    """Median seconds of a call, the first not counted: of two, or of more within a budget."""
    times = []
    while len(times) < 3 or (sum(times) < budget and len(times) < 50):
        begin = time.perf_counter()  # finer than monotonic() on Windows
        function()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    return statistics.median(times[1:])


def processes():
    """(number of this process, how many there are): (0, 1) where there is one."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def over_all(values, how="SUM"):
    """The sum, or "MAX", of each number of a tensor over all processes; in place."""
    if processes()[1] > 1:
        dist.all_reduce(values, getattr(dist.ReduceOp, how))
    return values


def largest(*values):
    """The largest of each number over all processes, as floats."""
    return over_all(torch.tensor(values, dtype=torch.float64), "MAX").tolist()


@contextmanager
def stop_signals():
    """A list that Ctrl-C and SIGTERM add to, for the loop to look at; Ctrl-C again interrupts."""
    received, before = [], {}

    def note(number, frame):
        received.append(signal.Signals(number).name)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    if threading.current_thread() is threading.main_thread():
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for number, handler in before.items():  # None: of a program that Python runs in
            signal.signal(number, handler or signal.SIG_DFL)


# ---------------------------------------------------------------- inference


def shifted(images, flip, down, right):
    """Float pictures, mirrored if flip, moved by a pixel at most; the edge is reflected."""
    height, width = images.shape[-2:]
    images = F.pad(images, (1, 1, 1, 1), mode="reflect")
    images = images[..., 1 - down : 1 - down + height, 1 - right : 1 - right + width]
    return images.flip(-1) if flip else images


@torch.no_grad()
def logits(network, images, view=VIEWS[0], precision=None, progress=None, side=0):
    """The network's answers as float32 [N, classes], on its device.

    images: uint8 [N, 3, H, W], or float in [0, 1], on any device. network: in either mode, which
    it has again afterwards. precision: of the products, None chooses it by device. progress: a
    data.Progress to be told of each batch. side: in pixels, to resize to; 0: their own.
    """
    device = next(network.parameters()).device
    precision = precision or choose_precision(device)
    # A CPU is fastest while a batch's activations are small enough for malloc to keep (32 MB).
    # On a GPU, a batch of the largest pictures takes as much memory as 1000 of 64 px.
    most = 64 if device.type == "cpu" else min(1000, 2**22 // images.shape[-2:].numel())
    was_training, answers = network.training, []
    network.eval()
    for x in images.split(most):
        x = x.to(device, non_blocking=True)
        x = data.resized(x if x.is_floating_point() else x.float().div_(255), side or x.shape[-1])
        with autocast(device, precision):
            answers.append(network(x if view == VIEWS[0] else shifted(x, *view)).float())
        if progress:
            progress.add(len(x))
    network.train(was_training)
    return torch.cat(answers)


def evaluate(network, images, labels, precision=None, side=0):
    """float64 [sum of the losses, right answers] on labelled pictures; the others: logits()'s."""
    if not len(labels):
        return torch.zeros(2, dtype=torch.float64)
    answers = logits(network, images, precision=precision, side=side)
    loss = F.cross_entropy(answers, labels, reduction="sum").double()
    return torch.stack([loss, (answers.argmax(1) == labels).sum()])


def predict(networks, images, views=1, precision=None, side=0):
    """Probabilities float32 [N, classes] on the CPU, averaged over networks and test-time views.

    views: 1 the picture itself, 2 its mirror image too, up to 10 with both moved by a pixel along
    the diagonals. side: in pixels, to resize to; 0: their own.
    """
    if not 1 <= views <= len(VIEWS):
        raise ValueError(f"--views {views} should be from 1 to {len(VIEWS)}")
    progress = data.Progress("answering", len(images) * len(networks) * views)
    total = 0
    for network, view in itertools.product(networks, VIEWS[:views]):
        answers = logits(network, images, view, precision, progress=progress, side=side)
        total = total + answers.softmax(1).cpu()
    progress.close()
    return total / (len(networks) * views)


# ---------------------------------------------------------------- what a checkpoint holds


def load_run(path, device="cpu"):
    """models.load_checkpoint; a ValueError also where what scoring or resuming takes is unsound."""
    network, saved = models.load_checkpoint(path, device)
    run, rows, logged = saved["args"], saved["log"], ("lr", "train_loss", "train_acc")
    with suppress(KeyError, TypeError, AttributeError):
        if (
            {*map(type, run.values())} <= {str, int, float, bool, type(None)}
            and {*map(type, run)} == {str} and isinstance(saved.get("resume", {}), dict)
            and (run["val"] is None or 0 <= run["val"] < 1)
            and 0 <= run["seed"] < 2**63 and (run["limit"] or 2) > 1
            and data.SMALLEST <= saved["size"] <= run["size"] <= data.LARGEST
            and all({"val_loss", "val_acc"} <= row.keys() for row in rows)
            and all(type(x) is float or (type(x) is int and abs(x) < 1e99) or x == ""
                    for row in rows for x in row.values())  # before anything is compared
            and saved["epoch"] == len(rows) and in_order(rows)
            and all(0 <= row[key] < 1e99 for row in rows for key in logged)
        ):  # fmt: skip
            return network, saved
    raise ValueError(f"{path} is not a checkpoint of this train.py: its args or log are wrong")


def fitting(ours, theirs):
    """theirs, of a checkpoint, if it is built as ours is, else ValueError. Of dicts, what one side
    lacks is ours: other versions of torch have other entries.
    """
    kinds = [float if isinstance(x, (int, float)) else type(x) for x in (ours, theirs)]
    if isinstance(ours, dict) and isinstance(theirs, dict):
        both = {key: fitting(x, theirs.get(key, x)) for key, x in ours.items()}
        return {} if not theirs and 0 in ours else both  # an optimiser's, before its first step
    fits = kinds[0] is kinds[1] and getattr(ours, "shape", 0) == getattr(theirs, "shape", 0)
    if not fits or (isinstance(ours, (list, tuple)) and len(ours) != len(theirs)):
        kind = "its state is of another kind of run, or none (best.pt's)"
        raise ValueError(f"ckpt.pt can't be resumed from: {kind}")
    return kinds[0](map(fitting, ours, theirs)) if isinstance(ours, (list, tuple)) else theirs


# ---------------------------------------------------------------- submission, pictures


def write_table(path, header, rows):
    """A CSV file with \\n line ends, written whole or not at all."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    content = text.getvalue().encode("utf-8", "surrogateescape")  # a name need not be UTF-8
    data.write_file(path, lambda file: file.write(content))


def in_order(rows):
    """Whether the epochs of a log are 1, 2, 3 and so on."""
    return all(row["epoch"] == number for number, row in enumerate(rows, start=1))


def read_table(path):
    """The rows of a CSV file as dicts; none where there is no file; ValueError for no table."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    try:
        return list(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(f"{path} is not a table: {error}") from None


def submit(networks, checkpoint, args):
    """Answer the source's test pictures, a folder's or one file's."""
    source, classes = args.data, checkpoint["classes"]
    # Read as for training, which made the pictures smaller where they were growing.
    size, side = int(checkpoint["args"]["size"]), checkpoint["size"]
    alone, dataset = source and data.is_picture(source) and Path(source).is_file(), None
    with suppress(data.NotADataSet):
        dataset = data.load(data.source_of(checkpoint, source), size, labelled=False)
    if dataset and dataset.test_ids:
        images, ids, columns = dataset.test_images, dataset.test_ids, dataset.columns
    elif source:
        images, ids = data.load_pictures(source, size)
        columns = data.Dataset.columns
        if not alone:
            print(f"{source} has no test part: all its {len(ids):,} pictures are answered")
    else:
        other = "--score answers labelled ones that training did not see, --data FOLDER any"
        raise ValueError(f"{checkpoint['source']} has no test pictures to answer: {other}")
    probabilities = predict(networks, images, args.views, side=side)
    if alone:
        print(f"{source}:")
        for share, name in sorted(zip(probabilities[0].tolist(), classes), reverse=True)[:5]:
            print(f"  {share:6.1%}  {name}")
        if not args.out:
            return
    out = args.out or "submission.csv"
    data.set_aside(out)
    answers = probabilities.argmax(1).tolist()
    write_table(out, columns, ([i, classes[label]] for i, label in zip(ids, answers)))
    print(f"wrote {out}: {len(ids):,} answers ({','.join(columns)})")


# ---------------------------------------------------------------- score


def unseen(dataset, checkpoints):
    """[(name, images, labels, ids)] of the labelled parts that none of the networks trained on."""
    seen = torch.zeros(len(dataset.labels), dtype=torch.bool)
    for checkpoint in checkpoints:
        run = checkpoint["args"]
        seen[data.parts(dataset, run["val"], run["seed"])[0]] = True
    left = dataset.take((~seen).nonzero().flatten())
    parts = [("validation", left.images, left.labels, left.ids)] if left.ids else []
    if dataset.test_labels is not None:
        parts.append(("test", dataset.test_images, dataset.test_labels, dataset.test_ids))
    if not parts:
        raise ValueError("nothing to score: these networks trained on all that is labelled")
    return parts


def score(networks, checkpoints, args):
    """Print accuracy, classes and confusions of what training didn't see; write table and sheet."""
    run = checkpoints[0]["args"]
    source = data.source_of(checkpoints[0], args.data)
    dataset = data.load(source, int(run["size"]), run["limit"], test=None)
    for checkpoint in checkpoints:
        data.require_same(dataset, checkpoint)
    for name, images, labels, ids in unseen(dataset, checkpoints):
        probabilities = predict(networks, images, args.views, side=checkpoints[0]["size"])
        answers = probabilities.argmax(1)
        right = (answers == labels).float().mean()
        print(f"{name}: accuracy {right:.4f} on {len(ids):,} pictures")
    # The details are of the last part: the published test where there is one.
    rows, confusions = by_class(answers, labels, dataset.classes)
    print_details(name, rows, confusions)
    out = Path(args.out or "scores.csv")
    matrix, picture = out.with_name("confusions.png"), out.with_name("mistakes.png")
    data.set_aside(out, matrix, picture)
    write_table(out, ["class", "pictures", "accuracy", "most_often_taken_for", "times"], rows)
    print(f"wrote {out}: every class")
    if surest := mistakes(probabilities, labels):
        data.write_picture(matrix, *draw_confusions(images, labels, answers, dataset.classes))
        sheet = draw_mistakes(images, labels, ids, probabilities, surest, dataset.classes)
        data.write_picture(picture, sheet, f"the {len(surest)} surest mistakes")


def by_class(answers, labels, classes):
    """(rows a class: name, pictures, accuracy, most often taken for, times; Counter of pairs)."""
    names = [[classes[k] for k in some.tolist()] for some in (labels, answers)]
    counts, pairs, rows = Counter(names[0]), Counter(zip(*names)), []
    confusions = Counter({pair: times for pair, times in pairs.items() if pair[0] != pair[1]})
    worst = {a: [b, times] for (a, b), times in reversed(confusions.most_common())}
    for name in classes:
        accuracy = f"{pairs[name, name] / counts[name]:.4f}" if counts[name] else ""
        rows.append([name, counts[name], accuracy, *worst.get(name, ["", 0])])
    return rows, confusions


def print_details(name, rows, confusions, most=10):
    """The classes from worst to best (the ten worst of many) and the commonest confusions."""
    ordered = sorted((row for row in rows if row[1]), key=lambda row: float(row[2]))
    left_out = f", the {most} worst of {len(ordered)}" if len(ordered) > most else ""
    print(f"\n{name}, by class{left_out}:")
    for label, count, accuracy, taken_for, times in ordered[:most]:
        mostly = f"  mostly taken for {taken_for} ({times})" if times else ""
        print(f"  {label:<20.20} {accuracy} of {count:,}{mostly}")
    print("\ncommonest confusions:" if confusions else "\nno mistakes at all")
    for (label, taken_for), times in confusions.most_common(most):
        print(f"  {times:>5,} x  {label} taken for {taken_for}")
    print()


def mistakes(probabilities, labels, most=30):
    """Indices of the wrong answers, the surest first."""
    sureness, answers = probabilities.max(1)
    wrong = (answers != labels).nonzero().flatten()
    return wrong[sureness[wrong].argsort(descending=True)][:most].tolist()


def draw_mistakes(images, labels, ids, probabilities, chosen, classes):
    """A contact sheet: the picture, what it is, what it was taken for and how sure."""
    captions = []
    for i in chosen:
        sureness, answer = probabilities[i].max(0)
        name, label, taken_for = Path(ids[i]).name, classes[int(labels[i])], classes[int(answer)]
        captions.append(f"{name:.20}\nis {label:.16}\ntaken for {taken_for:.12}: {sureness:.0%}")
    title = f"The {len(chosen)} surest mistakes of {len(labels):,} answers"
    return data.sheet([images[i] for i in chosen], captions, columns=6, title=title)


def draw_confusions(images, labels, answers, classes):
    """(Pillow picture, what it shows): the matrix of up to 20 classes, of more the worst pairs."""
    if len(classes) > 20:
        return draw_pairs(images, labels, answers, classes), "the commonest confusions in pictures"
    counts = (labels * len(classes) + answers).bincount(minlength=len(classes) ** 2)
    return draw_matrix(counts.view(len(classes), -1).tolist(), classes), "what is taken for what"


def draw_matrix(counts, classes, cell=44):
    """counts[k][j]: pictures of class k that are answered j. The darker, the more of its row."""
    font, names = ImageFont.load_default(13), [f"{name:.24}" for name in classes]
    label, side = int(max(map(font.getlength, names))) + 12, cell * len(names)
    left, top = 12 + label, 48 + label
    title = "Rows: what it is; columns: what it was taken for. Blue is right, orange is wrong"
    canvas, draw = data.blank(max(left + side + 12, 700), top + side + 12, title)
    labels = Image.new("RGB", (label, side), "white")  # of the rows; turned, of the columns
    for k, (name, row) in enumerate(zip(names, counts)):
        y = top + cell * k
        ImageDraw.Draw(labels).text((4, y - top + cell // 2), name, "black", font, anchor="lm")
        for j, count in enumerate(row):
            share, x = count / max(1, sum(row)), left + cell * j
            colour = ImageColor.getrgb(VAL_COLOUR if j == k else TRAIN_COLOUR)
            shade = tuple(round(255 + (value - 255) * share) for value in colour)
            draw.rectangle([x, y, x + cell, y + cell], shade, "#dddddd")
            ink = "white" if share > 0.6 else "black" if count else "#bbbbbb"
            draw.text((x + cell // 2, y + cell // 2), str(count), ink, anchor="mm")
    canvas.paste(labels, (12, top))
    canvas.paste(labels.rotate(90, expand=True), (left, top - label))
    return canvas


def draw_pairs(images, labels, answers, classes, most=24, places=4):
    """The commonest confusions: pictures taken for another class, and pictures of that class."""
    strips, captions = [], []
    for (label, other), times in by_class(answers, labels, classes)[1].most_common(most):
        k, j = classes.index(label), classes.index(other)
        some = (labels == k) & (answers == j), labels == j
        left, right = (data.strip(images[chosen], places) for chosen in some)
        strips.append(torch.cat([left, torch.full_like(left[..., :3], 255), right], 2))
        count = int((labels == k).sum())
        captions.append(f"{label:.20} taken for {other:.20} ({times} of {count})")
    title = f"The {len(strips)} commonest confusions: left the pictures, right the class taken for"
    return data.sheet(strips, captions, columns=2, title=title, least=64)


# ---------------------------------------------------------------- what training says

HEADER = "epoch       lr  train loss   acc    val loss   acc    pictures/s  seconds"


def print_start(run):
    """What is about to be trained, on what, with what."""
    count = sum(p.numel() for p in run.network.parameters())
    train, val = len(run.batches.indices), run.val_count
    mix = " + ".join(map(str, run.batches.pipelines))
    sides = " to ".join(str(side) for side, _ in run.sides)
    print(
        f"data: {run.source}, {len(run.classes)} classes, {sides} px, {train:,} pictures to "
        f"train on, {val:,} for validation\n"
        f"mix: {mix}: {run.batches.total:,} pictures an epoch in {len(run.batches):,} steps\n"
        f"model: {run.args.model}, {count:,} parameters\n"
        f"computed on: {run.computed_on}"
    )
    if run.epoch or run.step:
        print(f"resumed after epoch {run.epoch} and {run.step} steps")
    print(HEADER)


def write_log(run):
    """log.csv and curves.png, from the rows of the run, which the checkpoint holds too."""
    if run.rows and not run.rank:
        write_table(run.out / "log.csv", run.rows[0], (row.values() for row in run.rows))
        curves = draw_curves(run.rows, f"{run.args.model} on {Path(run.source).name}")
        data.write_picture(run.out / "curves.png", curves)


def seconds_to_finish(run, side):
    """What validating and writing takes at the end of an epoch at this side, from a part of it."""
    few = slice(256 if run.device.type == "cpu" else 1000)  # on a GPU a whole batch of logits()
    part = run.network, run.val_images[few], run.val_labels[few], run.precision, side
    validating = median_seconds(run.device, lambda: evaluate(*part))
    validating *= max(1, len(run.val_labels) / few.stop)
    writing = median_seconds(run.device, lambda: torch.save(run.state(), io.BytesIO()))
    return validating + 2 * writing + 0.2  # ckpt.pt and best.pt, the curves


def show_progress(run, progress, first):
    """epoch 3/40 · step 120/563 · 84 pictures a second · 12:34 left"""
    begin, now = (data.time_at(run.sides, run.done(i), run.costs) for i in (first, run.step))
    left = (1 - now) * (time.monotonic() - progress.start) / (now - begin)
    minutes, seconds = divmod(round(left), 60)
    progress.show(
        f"epoch {run.epoch + 1}/{run.args.epochs} · step {run.step}/{len(run.batches)} · "
        f"{progress.speed():,.0f} pictures a second · {minutes}:{seconds:02d} left"
    )


def table_row(row):
    """A line of the table under HEADER."""
    loss, acc = row["val_loss"], row["val_acc"]
    val = f"{'-':>8} {'-':>7}" if acc == "" else f"{loss:8.4f} {acc:7.4f}"
    return (
        f"{row['epoch']:5} {row['lr']:8.5f}    {row['train_loss']:8.4f} {row['train_acc']:7.4f}"
        f"  {val}  {row['images_per_second']:10,.0f} {row['seconds']:8.1f}"
    )


def summary(run):
    """What the run came to, and which file and figure is which."""
    last, best = run.rows[-1], best_row(run.rows)
    text = f"ckpt.pt: the last epoch, {last['epoch']}"
    if best:
        text += (
            f", validation accuracy {last['val_acc']:.4f}\nbest.pt: the best epoch, "
            f"{best['epoch']}, {best['val_acc']:.4f} (chosen on validation, so a little flattered)"
        )
    return f"{text}\nnext: python predict.py {run.out / 'ckpt.pt'}, or the same with --score"


# ---------------------------------------------------------------- greedy search over a mix


def without_one(mix):
    """{label: mix} of the mixes that lack one augmentation; a copy left with none is clean."""
    mixes, pipelines = {}, augment.parse(mix)
    for i, pipeline in enumerate(pipelines):
        for j, step in enumerate(pipeline.steps):
            rest = augment.Pipeline(pipeline.steps[:j] + pipeline.steps[j + 1 :])
            label = f"without {step.name}" + (f" in copy {i + 1}" if len(pipelines) > 1 else "")
            mixes[label] = "+".join(map(str, [*pipelines[:i], rest, *pipelines[i + 1 :]]))
    return mixes


def noise(groups, count):
    """How far from zero a mean of `count` differences comes by chance: half its 95 % interval.

    Its spread is pooled over the groups (lists of differences, each about its own mean) since two
    or three tell little; NaN where none has two. Student's t is from its table or, from four
    degrees of freedom on, the first terms of its expansion (Abramowitz and Stegun 26.7.5).
    """
    squares = sum((x - statistics.mean(group)) ** 2 for group in groups for x in group)
    freedom = sum(len(group) - 1 for group in groups if group)
    if not freedom:
        return math.nan
    t = 1.960 + 2.372 / freedom + 2.823 / freedom**2 + 2.556 / freedom**3
    t = {1: 12.706, 2: 4.303, 3: 3.182}.get(freedom, t)
    return t * math.sqrt(squares / freedom / count)


def compare(mixes, known, seeds):
    """(a row for each mix: label, mean, spread, gain over the first, verdict; the noise of a gain).

    known: accuracy by (mix, seed). Mixes are compared seed by seed, since a seed is a split.
    """
    accuracies = [[known[mix, seed] for seed in seeds] for mix in mixes.values()]
    gains = [[a - b for a, b in zip(row, accuracies[0])] for row in accuracies]
    chance, rows = noise(gains[1:], len(seeds)), []
    for label, row, gain in zip(mixes, accuracies, map(statistics.mean, gains)):
        verdict = "better" if gain > chance else "worse" if gain < -chance else "within noise"
        verdict = verdict if rows else "all of it"
        rows.append((label, statistics.mean(row), statistics.stdev(row), gain, verdict))
    return rows, chance


def search(mix, seeds, out, accuracy):
    """Leave one augmentation out of the mix at a time while that gains more than the noise.

    The report's search, which its author did by hand (F11). accuracy(mix, seed, folder) trains in
    a folder below `out`; after each such run search.csv is written, after each round search.png.
    """
    title, known, rounds = f"validation accuracy, from {mix}", {}, []
    while without_one(mix):
        mixes = {"the mix": mix, **without_one(mix)}
        for key in itertools.product(mixes.values(), seeds):
            if key not in known:
                known[key] = accuracy(*key, out / f"run-{len(known) + 1}")
                rows = [(*run, value) for run, value in known.items()]
                write_table(out / "search.csv", ["mix", "seed", "val_acc"], rows)
        rows, chance = compare(mixes, known, seeds)
        rounds.append(rows)
        print(f"\nround {len(rounds)}, {len(seeds)} seeds a mix, noise {chance:.4f}")
        for label, mean, spread, gain, verdict in rows:
            print(f"{label:<24} {mean:.4f} ± {spread:.4f}   {gain:+.4f}  {verdict}")
        data.write_picture(out / "search.png", draw_bars(rounds, title))
        best = max(rows, key=lambda row: row[3])
        if best[4] != "better":
            break
        mix = mixes[best[0]]
    print(f"the search ends with --augment {mix}")


# ---------------------------------------------------------------- charts of training

# Told apart by the colour-blind (Okabe and Ito, without the yellow, which is too light for a line).
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
VAL_COLOUR, TRAIN_COLOUR = COLOURS[:2]
VERDICTS = {"better": "#009E73", "worse": "#D55E00", "within noise": "#999999"}
# Charts are drawn in half pixels, then reduced, since Pillow's lines have no antialiasing.


def ticks(top):
    """Round numbers from 0 up to top, about five of them."""
    steps = (m * 10.0**e for e in itertools.count(-9) for m in (1, 2, 5))
    step = next(step for step in steps if step >= top / 5)
    return [round(i * step, 10) for i in range(int(top / step + 1e-9) + 1)]


def plot(draw, left, right, low, title, curves, top):
    """Axes, epochs to the right and 0 to top upwards, and on them curves {name: (rows of a log,
    column, colour)}, beside each its last value and its name. What is above top is drawn there.
    """
    high, last = 140, max(rows[-1]["epoch"] for rows, *_ in curves.values())

    def point(epoch, value):
        return left + (right - left) * epoch / last, low - (low - high) * min(value / top, 1)

    draw.text((left, high - 52), title, "black")
    for value in ticks(top):
        y = point(0, value)[1]
        draw.line([(left, y), (right, y)], "#dddddd", 2)
        draw.text((left - 16, y), f"{value:g}", "black", anchor="rm")
    for epoch in ticks(max(last, 5)):
        if epoch <= last:
            draw.text((point(epoch, 0)[0], low + 12), f"{epoch:g}", "black", anchor="ma")
    draw.text(((left + right) / 2, low + 52), "epoch", "black", anchor="ma")
    draw.line([(left, high), (left, low), (right, low)], "black", 2)
    ends = []
    for name, (rows, key, colour) in curves.items():
        values = [(r["epoch"], r[key]) for r in rows if r[key] != "" and math.isfinite(r[key])]
        points = [point(*value) for value in values]
        if len(points) > 1:
            draw.line(points, colour, 4)
        for x, y in points[-1:]:  # none without a validation part
            draw.ellipse([x - 6, y - 6, x + 6, y + 6], colour)
            ends.append((y, x, f"{values[-1][1]:.4f}  {name[-34:]}", colour))
    y = 0
    for i, (end, x, text, colour) in enumerate(sorted(ends)):
        # A row of text each, from above, but never so low that the rest has no room.
        y = min(max(end, y + 40), low - 40 * (len(ends) - 1 - i))
        draw.line([(x, end), (right + 28, y)], colour, 1)
        draw.text((right + 36, y), text, colour, anchor="lm")


def best_row(rows):
    """The log's row of the best validation accuracy, the first if several; None without any."""
    rows = [row for row in rows if row["val_acc"] != ""]
    return max(rows, key=lambda row: row["val_acc"], default=None)


def draw_curves(rows, title):
    """Loss and accuracy of a log's rows against epochs: a Pillow picture of 1040 x 390 px."""
    canvas, draw = data.blank(2080, 780, f"{title:.110}", 26)
    accuracies = [row[key] for row in rows for key in ("train_acc", "val_acc") if row[key] != ""]
    best = best_row(rows)
    best = f"; best on validation: {best['val_acc']:.4f} in epoch {best['epoch']}" if best else ""
    for left, key, what, top in [
        # The first epochs' validation loss can be off the scale while batch norm's averages settle.
        (120, "loss", "loss", 1.1 * max(row["train_loss"] for row in rows) or 1),
        (1140, "acc", f"accuracy{best}", min(1, 1.1 * max(accuracies) or 1)),
    ]:
        curves = {"training": (rows, f"train_{key}", TRAIN_COLOUR)}
        curves["validation"] = (rows, f"val_{key}", VAL_COLOUR)
        plot(draw, left, left + 640, 660, what, curves, top)
    return canvas.reduce(2)


def draw_bars(rounds, title):
    """One bar a mix, the rounds of a search below each other: a Pillow picture, 1040 px wide.

    rounds: lists of (label, mean, spread, gain, verdict); the whisker is the spread either side.
    """
    bars = []
    for number, some in enumerate(rounds, 1):
        bars += [(f"round {number}", 0, 0, 0, ""), *some]
    canvas, draw = data.blank(2080, 120 + 52 * len(bars), f"{title:.110}", 26)
    scale = 1200 / (max(mean + spread for _, mean, spread, *_ in bars) or 1)
    for y, (label, mean, spread, _, verdict) in zip(itertools.count(120, 52), bars):
        draw.text((400, y), label, "black", anchor="rm")
        if verdict:  # a bar, and not the name of a round
            left, end, right = (420 + scale * x for x in (mean - spread, mean, mean + spread))
            draw.rectangle([420, y - 20, end, y + 20], VERDICTS.get(verdict, VAL_COLOUR))
            draw.line([(left, y), (right, y)], "black", 4)
            draw.text((right + 16, y), f"{mean:.4f} {verdict}", "black", anchor="lm")
    return canvas.reduce(2)


def draw_comparison(runs):
    """Validation accuracy of {name: rows of the log} against epochs, each named at its end."""
    height = max(780, 260 + 40 * len(runs))
    canvas, draw = data.blank(2080, height, f"{len(runs)} runs compared", 26)
    curves = {
        name: (rows, "val_acc", colour)
        for (name, rows), colour in zip(runs.items(), itertools.cycle(COLOURS))
    }
    top = min(1, 1.1 * max(best_row(rows)["val_acc"] for rows in runs.values()) or 1)
    title = "validation accuracy; beside each run its last"
    plot(draw, 120, 1400, height - 120, title, curves, top)
    return canvas.reduce(2)


def read_run(path):
    """The rows of a run's log, given its folder or a file in it; numbers, or "" for none."""
    if not Path(path).exists():
        raise ValueError(f"there is no {path}: --compare takes folders of runs, or files in them")
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    with suppress(ValueError, LookupError, TypeError):  # of something else, or no validation
        rows = read_table(folder / "log.csv")
        rows = [{k: float(x) if x else "" for k, x in row.items()} for row in rows]
        known = [r["train_acc"] >= 0 <= r["seconds"] and 0 <= r["val_acc"] <= 1 for r in rows]
        if rows and all(known) and in_order(rows):
            return rows
    raise ValueError(f"{path} holds no log.csv of a run with a validation part to compare")


def compare_runs(paths, out):
    """Draw and print the validation accuracy of several runs, the best at the end first."""
    data.check_out(out)
    runs = {path: read_run(path) for path in paths}
    runs = dict(sorted(runs.items(), key=lambda item: -item[1][-1]["val_acc"]))
    print("validation  best  at epoch  of  training  minutes  run")
    for path, rows in runs.items():
        last, best = rows[-1], best_row(rows)
        minutes = sum(row["seconds"] for row in rows) / 60
        print(
            f"{last['val_acc']:10.4f}  {best['val_acc']:.4f} {best['epoch']:5.0f} "
            f"{last['epoch']:6.0f}  {last['train_acc']:8.4f} {minutes:8.1f}  {path}"
        )
    data.set_aside(out)
    data.write_picture(out, draw_comparison(runs), "validation accuracy of these runs")


# ---------------------------------------------------------------- command line


VIEW_COUNT = data.number(int, f"from 1 to {len(VIEWS)}", lambda x: 1 <= x <= len(VIEWS))
FLAGS = [
    ("arguments", "checkpoints", "CKPT", "+", "ckpt.pt or best.pt of a run; several are averaged"),
    ("arguments", "--data", "PATH", str, "a data set, a folder or archive of pictures, or one "
     "picture (default: the source that the network was trained on)"),
    ("arguments", "--out", "FILE", str, "default: submission.csv, or scores.csv with --score, "
     "compare.png with --compare"),
    ("arguments", "--views", "N", VIEW_COUNT, "average over N views of each picture, 1 to "
     f"{len(VIEWS)}: itself, mirrored, moved by a pixel (default: 1)"),
    ("arguments", "--score", "", bool, "answer the labelled pictures that training did not see: "
     "accuracy, classes, confusions (confusions.png) and the surest mistakes (mistakes.png)"),
    ("arguments", "--compare", "", bool, "draw the validation accuracy of several runs, given "
     "their folders, into one picture (compare.png)"),
]  # fmt: skip


def parse_args(argv=None):
    about = "Answer pictures with trained networks: python predict.py ckpt.pt [flags]"
    return data.parse_flags("predict.py", about, FLAGS, argv, views=1)


def main(argv=None):
    args = parse_args(argv)
    with data.sentences("predict.py"):
        if args.compare:
            if args.score or args.data or args.views > 1:
                raise ValueError("--compare takes runs and --out alone")
            compare_runs(args.checkpoints, args.out or "compare.png")
            return
        data.check_out(args.out or ("scores.csv" if args.score else "submission.csv"), ".csv")
        device = choose_device()
        networks, checkpoints = zip(*(load_run(path, device) for path in args.checkpoints))
        takes = [(saved["classes"], saved["size"], saved["args"]["size"]) for saved in checkpoints]
        if other := [path for path, its in zip(args.checkpoints, takes) if its != takes[0]]:
            raise ValueError(f"{other[0]} has other classes or sizes than {args.checkpoints[0]}")
        if args.score:
            score(networks, checkpoints, args)
        else:
            submit(networks, checkpoints[0], args)


if __name__ == "__main__":
    main()
