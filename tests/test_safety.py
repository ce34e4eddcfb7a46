"""Nothing lost, nobody let in: full disks, two runs at once, hostile checkpoints and data."""

import contextlib
import errno
import gzip
import io
import os
import pickle
import resource
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
import zlib

import pytest
import torch
from conftest import ROOT, TINY, run, same_tree, save_picture
from PIL import Image

import data
import models
import predict
import train

SENTENCE = 400  # characters; a path of pytest's is a hundred of them


def refused(function, *arguments, most=SENTENCE):
    """The one sentence in which something is refused, within ten seconds."""
    begin = time.monotonic()
    with pytest.raises((ValueError, OSError)) as error:
        function(*arguments)
    assert time.monotonic() - begin < 10
    sentence = data.one_sentence(error.value)
    assert len(sentence) <= most, sentence
    return sentence


def stopped(capsys, argv, status, script=train):
    """What a script says on stderr, in one line, when it ends with this status."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        script.main([str(x) for x in argv])
    error = capsys.readouterr().err
    assert stop.value.code == status and error.count("\n") == 1, error
    return error


def short_run(source, out, *more):
    """Flags of a run of two epochs on the homework, 6 steps each."""
    return [
        "--data", str(source), "--model", TINY, "--epochs", "2", "--lr", "0.1", "--val", "0.2",
        "--batch-size", "16", "--out", str(out), *more,
    ]  # fmt: skip


# ---------------------------------------------------------------- checkpoints from strangers


class Hostile:
    """An object whose pickle calls something."""

    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call[0], self.call[1:]


def repacked(source, target, method=zipfile.ZIP_STORED, replace=None, more=()):
    """A checkpoint's zip with other contents or another compression."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", method) as new:
        for name in old.namelist():
            new.writestr(name, (replace or {}).get(name.split("/")[-1], old.read(name)))
        for name, content in more:
            new.writestr(name, content)
    return target


def test_a_checkpoint_cut_anywhere_is_one_sentence(trained, tmp_path):
    whole = (trained[1] / "ckpt.pt").read_bytes()
    path = tmp_path / "cut.pt"
    for end in [*range(0, len(whole), 1000), len(whole) - 1]:
        path.write_bytes(whole[:end])
        assert "is not a checkpoint" in refused(models.load_checkpoint, path)


def test_what_a_checkpoints_zip_may_not_hold(trained, tmp_path):
    good, path = trained[1] / "ckpt.pt", tmp_path / "x.pt"
    with zipfile.ZipFile(good) as archive:
        outline = archive.read(next(name for name in archive.namelist() if "data.pkl" in name))
    assert models.load_checkpoint(repacked(good, path))
    repacked(good, path, zipfile.ZIP_DEFLATED)
    assert "packed otherwise" in refused(models.load_checkpoint, path)
    bomb = pickle.dumps({"a": Hostile(bytearray, 10**11)}, 2)
    repacked(good, path, replace={"data.pkl": bomb})
    assert "it holds code" in refused(models.load_checkpoint, path)
    repacked(good, path, replace={"data.pkl": outline + b"0" * (5 << 20)})
    assert "more memory" in refused(models.load_checkpoint, path)
    repacked(good, path, more=[("archive/DATA.PKL", outline)])
    assert "packed otherwise" in refused(models.load_checkpoint, path)
    whole = bytearray(good.read_bytes())
    whole[len(whole) // 2] ^= 255  # in some tensor: only the checksum knows
    path.write_bytes(whole)
    assert "is not a checkpoint" in refused(models.load_checkpoint, path)
    path.unlink()
    path.symlink_to("/etc/passwd")
    assert "is not a checkpoint" in refused(models.load_checkpoint, path)
    path.unlink()
    path.symlink_to(path)
    assert "there is no checkpoint" in refused(models.load_checkpoint, path)
    os.mkfifo(tmp_path / "pipe.pt")  # which would never end
    assert "there is no checkpoint" in refused(models.load_checkpoint, tmp_path / "pipe.pt")


def huge(*shape):
    """A tensor of any shape whose every element is the same four bytes."""
    return torch.zeros(()).expand(shape)


LOLS = ["lol"]
for _ in range(40):
    LOLS = [LOLS] * 10

RESNET = models.build_model("resnet18", 3).state_dict()
CHANGES = {
    "no dict": lambda c: [c],
    "no args": lambda c: {k: v for k, v in c.items() if k != "args"},
    "a mean of names": lambda c: {**c, "mean": ["a", "b", "c"]},
    "many classes": lambda c: {**c, "num_classes": 10**9},
    "names that are none": lambda c: {**c, "classes": [8, 9, 10]},
    "two of one name": lambda c: {**c, "classes": ["a", "a", "b"]},
    "a wide network": lambda c: {**c, "options": {"width": 10**9}},
    "another width": lambda c: {**c, "options": {**c["options"], "width": 1024, "groups": 4}},
    "nested options": lambda c: {**c, "options": {"width": LOLS}},
    "huge weights": lambda c: {
        **c, "model": "resnet18", "options": {}, "num_classes": 3,
        "weights": {k: huge(*w.shape).to(w.dtype) for k, w in RESNET.items()},
    },
    "a weight that is none": lambda c: {**c, "weights": {**c["weights"], "fc.bias": "x"}},
    "a huge size": lambda c: {**c, "size": 10**9},
    "a seed that is none": lambda c: {**c, "args": {**c["args"], "seed": "x"}},
    "a share that is none": lambda c: {**c, "args": {**c["args"], "val": 7.0}},
    "nested args": lambda c: {**c, "args": {**c["args"], "lr": LOLS}},
    "args of no name": lambda c: {**c, "args": {**c["args"], 5: None}},
    "numbers to resume from": lambda c: {**c, "resume": torch.ones(5)},
    "a log of huge numbers": lambda c: {
        **c, "log": [{**row, "val_acc": 10**400} for row in c["log"]]},
    "a log of tensors": lambda c: {
        **c, "log": [{**row, "lr": huge(10**5, 10**5)} for row in c["log"]]},
    "many epochs": lambda c: {**c, "epoch": 10**10},
    "a log of strings": lambda c: {**c, "log": ["a", "b"]},
    "a log without losses": lambda c: {**c, "log": [{"epoch": 1}, {"epoch": 2}]},
    "a log that is too short": lambda c: {**c, "log": c["log"][:1]},
    "a log of words": lambda c: {**c, "log": [{**row, "val_acc": "much"} for row in c["log"]]},
}  # fmt: skip


@pytest.mark.parametrize("how", CHANGES)
def test_a_checkpoint_with_something_else_in_it_is_one_sentence(trained, tmp_path, how):
    content = CHANGES[how](torch.load(trained[1] / "ckpt.pt"))
    torch.save(content, tmp_path / "x.pt")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "x.pt is not a checkpoint" in refused(predict.load_run, tmp_path / "x.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000  # kB


def stored(content, **changes):
    return {**content, "resume": {**content["resume"], **changes}}


def moved(content, momentum):
    state = {0: {"momentum_buffer": momentum}}
    return stored(content, optimizer={**content["resume"]["optimizer"], "state": state})


RESUMED = {
    "a rate that is none": lambda c: {**c, "args": {**c["args"], "lr": "much"}},
    "a rate below zero": lambda c: {**c, "args": {**c["args"], "lr": -3.0}},
    "a flag that is none": lambda c: {**c, "args": {**c["args"], "colour": "red"}},
    "another model": lambda c: {**c, "args": {**c["args"], "model": "v14:width=4,groups=2"}},
    "a mix that is none": lambda c: {**c, "args": {**c["args"], "augment": "x" * 10_000}},
    "no resume": lambda c: {k: v for k, v in c.items() if k != "resume"},
    "a word for resume": lambda c: {**c, "resume": "x"},
    "a step too far": lambda c: stored(c, step=10**9),
    "a step before the first": lambda c: stored(c, step=-1),
    "no sums": lambda c: stored(c, step=3, totals=torch.zeros(3, dtype=torch.float64)),
    "sums of another shape": lambda c: stored(c, totals=huge(10**6, 10**6)),
    "no optimizer": lambda c: stored(c, optimizer=[]),
    "huge momentum": lambda c: moved(c, huge(10**5, 10**5)),
    "momentum of words": lambda c: moved(c, "x"),
    "rates of words": lambda c: stored(
        c, optimizer={**c["resume"]["optimizer"], "param_groups": [{"lr": "x", "params": [0]}]}),
    "a schedule of words": lambda c: stored(c, schedule={"last_epoch": "x", "step": 5}),
}  # fmt: skip


@pytest.mark.parametrize("how", RESUMED)
def test_a_checkpoint_that_was_edited_is_not_resumed(trained, tmp_path, capsys, how):
    torch.save(RESUMED[how](torch.load(trained[1] / "ckpt.pt")), tmp_path / "ckpt.pt")
    kept = (tmp_path / "ckpt.pt").read_bytes()
    error = stopped(capsys, ["--resume", "--out", tmp_path], 2)
    assert len(error) < SENTENCE and "train.py: " in error
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt.pt"]
    assert (tmp_path / "ckpt.pt").read_bytes() == kept


# ---------------------------------------------------------------- data from strangers


def tar(path, *members, mode="w"):
    """A tar of (name, content or a function that makes another kind of member of it)."""
    with tarfile.open(path, mode) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            if callable(content):
                content(member)
                archive.addfile(member)
            else:
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def kind(type_, linkname=""):
    def change(member):
        member.type, member.linkname = type_, linkname

    return change


def png(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


RED = png(Image.new("RGB", (20, 20), "red"))


def png_header(width, height):
    """A PNG that says it is so large, and holds next to nothing."""

    def chunk(name, body):
        check = struct.pack(">I", zlib.crc32(name + body))
        return struct.pack(">I", len(body)) + name + body + check

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    rest = chunk(b"IDAT", zlib.compress(bytes(10**6), 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + rest


GOOD = [("a/1.png", RED), ("a/2.png", RED), ("b/1.png", RED), ("b/2.png", RED)]


def test_nothing_in_an_archive_reaches_out_of_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    away = [("../c/1.png", RED), ("/c/1.png", RED), ("a/../../c/1.png", RED)]
    links = [("c/1.png", kind(tarfile.SYMTYPE, "/etc/passwd"))]
    links += [("c/2.png", kind(tarfile.LNKTYPE, "a/1.png"))]
    others = [("c/3.png", kind(tarfile.CHRTYPE)), ("c/4.png", kind(tarfile.FIFOTYPE))]
    tar("x.tar", *GOOD, *away, *links, *others)
    with zipfile.ZipFile("x.zip", "w") as archive:
        for name, content in GOOD + away:
            archive.writestr(name, content)
    (tmp_path / "folder" / "a").mkdir(parents=True)
    for name, content in GOOD[:2]:
        (tmp_path / "folder" / name).write_bytes(content)
    before = sorted(tmp_path.rglob("*"))
    for name in ("x.tar", "x.zip"):
        assert data.load(name).ids == [name for name, _ in GOOD]
    os.mkfifo("folder/a/3.png")
    (tmp_path / "folder" / "b").mkdir()
    (tmp_path / "folder" / "b" / "1.png").symlink_to("/dev/zero")
    assert "is no file of at most" in refused(data.load, "folder")
    assert len(sorted(tmp_path.rglob("*"))) == len(before) + 3


def test_an_archive_that_unpacks_to_very_much_is_refused(tmp_path, monkeypatch):
    zeros = bytes(100 << 20)
    packed = gzip.compress(zeros, 1)
    with zipfile.ZipFile(tmp_path / "x.zip", "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("a/1.png", zeros)
    assert data.TOO_MUCH in refused(data.load, tmp_path / "x.zip")
    path = tmp_path / "x.tar.gz"
    for name in ("a/1.png", "a/1.bin"):  # what isn't wanted has to be unpacked as well
        member = tarfile.TarInfo(name)
        member.size = len(zeros)
        path.write_bytes((gzip.compress(member.tobuf()) + packed) * 3)
        assert data.TOO_MUCH in refused(data.load, path)
    monkeypatch.setattr(data, "MOST_USELESS", 1000)
    with zipfile.ZipFile(tmp_path / "y.zip", "w") as archive:
        for i in range(data.MOST_USELESS + 1):
            archive.writestr(zipfile.ZipInfo(f"{i}"), b"")
    assert data.TOO_MUCH in refused(data.load, tmp_path / "y.zip")
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    monkeypatch.setattr(data, "MOST_USELESS", 5)
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as archive:  # by macOS: two entries a picture
        for name in (f"{label}/{i}.png" for label in "ab" for i in range(4)):
            archive.writestr(name, picture.getvalue())
            archive.writestr(f"__MACOSX/._{name}", b"what else it knows of the picture")
        archive.writestr("features.csv", bytes(1001))  # a table that nobody reads may be large
    monkeypatch.setattr(data, "MOST_BYTES", 1000)
    assert len(data.load(tmp_path / "mac.zip").ids) == 8
    monkeypatch.setattr(data, "MOST_USELESS", 1000)
    header = tarfile.TarInfo("x").tobuf()
    (tmp_path / "x.tar").write_bytes(header * (data.MOST_USELESS + 1) + bytes(1024))
    assert data.TOO_MUCH in refused(data.load, tmp_path / "x.tar")


def test_a_sparse_file_is_not_unpacked(tmp_path):
    """GNU tar's: a terabyte of hole in one header."""
    member = tarfile.TarInfo("a/9.png")
    header = bytearray(member.tobuf(tarfile.GNU_FORMAT))
    header[156:157] = b"S"
    header[386:483] = bytes(97)
    header[483:495] = b"\x80" + (1 << 40).to_bytes(11, "big")
    header[148:156] = b"        "
    header[148:156] = b"%06o\0 " % sum(header)
    tar(tmp_path / "x.tar", *GOOD)
    rest = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(bytes(header) + rest)
    assert len(data.load(tmp_path / "x.tar").ids) == 4


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (png_header(100_000, 100_000), "can't be decoded"),
        (png_header(9_000, 9_000), "9,000 x 9,000 pixels are too many"),
        (b"", "not a picture"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not a picture"),
        (png_header(0, 20), "can't be decoded"),
    ],
    ids=["a bomb", "a large one", "empty", "a program", "no width"],
)
def test_a_picture_that_is_none_is_named(homework, content, words):
    (homework / "trainval" / "trainval_00003.png").write_bytes(content)
    sentence = refused(data.load, homework)
    assert "trainval_00003.png" in sentence and words in sentence


def test_a_picture_cut_anywhere_is_named_and_another_suffix_does_no_harm(tmp_path):
    image = Image.effect_noise((24, 24), 50).convert("RGB")
    for form in ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM"):
        buffer = io.BytesIO()
        image.save(buffer, form)
        whole, path = buffer.getvalue(), tmp_path / "x.png"
        path.write_bytes(whole)
        assert data.load_pictures(path, 16)[0].shape == (1, 3, 16, 16)
        for end in range(0, len(whole) - 1, max(1, len(whole) // 40)):
            path.write_bytes(whole[:end])
            with contextlib.suppress(ValueError):  # some formats may lack their last bytes
                data.load_pictures(path, 16)


@pytest.mark.parametrize(
    "table",
    [
        "Id,Category\n" + "x" * 10_000_000 + ",8\n",
        "Id,Category\n../../etc/passwd,8\n",
        'Id,Category\n"trainval_00000\n\n\n.png",8\n',
        "Id,Category\n" + "trainval_00000.png,8\n" * 1000,
        "Id,Category\n",
        "\n" * 1_000_000,
        "Id,Category\ntrainval_00000.png\0,8\n",
        "Id,Category\n" + "".join(f"{'9' * 5000}{i},{'7' * 5000}\n" for i in range(3)),
        "Id,Category\n\x1b[31m" + "y" * 100_000 + ",8\n",
        "",
    ],
    ids="long leaves lines doubled header blank nul digits escape empty".split(),
)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-32"])
def test_a_table_that_is_none_is_one_sentence(homework, table, encoding):
    (homework / "labels.csv").write_bytes(table.encode(encoding))
    sentence = refused(data.load, homework)
    assert "labels.csv" in sentence and sentence.isprintable()


def test_names_of_many_digits_are_sorted_too():
    names = ["9", "10", "0" * 5000 + "7", "8" * 6000]
    assert len(sorted(names, key=data.natural)) == 4


# ---------------------------------------------------------------- the disk


@pytest.mark.parametrize("name", ["ckpt.pt", "best.pt", "log.csv", "curves.png"])
def test_on_a_full_disk_a_run_ends_in_a_sentence_and_can_be_resumed(
    homework, trained, tmp_path, monkeypatch, capsys, name
):
    first, seen = data.write_file, []

    def limited(path, write):
        seen.append(path.name == name)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if sum(seen) > 1 and seen[-1]:  # the second time, after 50 bytes
            resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
        try:
            first(path, write)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    monkeypatch.setattr(predict, "best_row", lambda rows: rows[-1])  # best.pt in each epoch
    with monkeypatch.context() as patch:
        patch.setattr(data, "write_file", limited)
        error = stopped(capsys, short_run(homework, tmp_path), 1)
    assert f"{name} can't be written: File too large; what it held before" in error
    assert models.load_checkpoint(tmp_path / "ckpt.pt")[1]["epoch"] == 1
    assert models.load_checkpoint(tmp_path / "best.pt")
    assert list(tmp_path.glob("*.tmp")) == []
    train.main(["--resume", "--out", str(tmp_path)])
    ends = [torch.load(out / "ckpt.pt")["weights"] for out in (tmp_path, trained[1])]
    assert same_tree(*ends)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EIO])
def test_where_nothing_can_be_written_the_file_is_named(
    homework, tmp_path, monkeypatch, capsys, number
):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    error = stopped(capsys, short_run(homework, tmp_path / "out"), 1)
    assert f"best.pt can't be written: {os.strerror(number)}" in error


def test_a_folder_that_vanishes_ends_a_run_in_a_sentence(homework, tmp_path, monkeypatch, capsys):
    first, out = train.finish_epoch, tmp_path / "out"

    def vanish(run):
        out.rename(tmp_path / "away")
        return first(run)

    monkeypatch.setattr(train, "finish_epoch", vanish)
    error = stopped(capsys, short_run(homework, out), 1)
    assert "best.pt can't be written: No such file" in error and not out.exists()


# ---------------------------------------------------------------- never overwritten


def test_two_runs_at_once_in_one_folder(homework, tmp_path, monkeypatch, capsys):
    first, errors, out = train.train_steps, [], tmp_path / "out"

    def another(*arguments):
        monkeypatch.setattr(train, "train_steps", first)
        before = sorted(out.iterdir())
        for more in ([], ["--resume"], ["--search", "2"]):
            errors.append(stopped(capsys, [*short_run(homework, out), *more], 2))
        assert sorted(out.iterdir()) == before
        return first(*arguments)

    monkeypatch.setattr(train, "train_steps", another)
    train.main(short_run(homework, out))
    assert len(errors) == 3
    assert all(f"another run writes to {out}: wait for its end" in error for error in errors)
    train.main(["--resume", "--out", str(out)])  # afterwards it is free


def test_a_run_does_not_write_among_its_own_pictures(homework, tmp_path, monkeypatch, capsys):
    (tmp_path / "classes").mkdir()
    demo = data.load("demo")
    for i in range(8):
        (tmp_path / "classes" / str(i % 2)).mkdir(exist_ok=True)
        save_picture(demo.images[i], tmp_path / "classes" / str(i % 2) / f"{i}.png")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(homework)
    for source, out in [
        (homework, homework), (homework, homework / "trainval"), (homework, "."),
        (tmp_path / "classes", tmp_path / "classes" / "0"),
    ]:  # fmt: skip
        assert "holds the data itself" in stopped(capsys, short_run(source, out), 2)
    assert sorted(tmp_path.rglob("*")) == before
    train.main(short_run(homework, homework / "run", "--epochs", "1"))  # beside them it may
    assert data.load(homework).fingerprint == torch.load("run/ckpt.pt")["fingerprint"]


def test_what_is_set_aside_is_never_overwritten(tmp_path):
    for content in "abc":
        (tmp_path / "x").write_text(content)
        data.set_aside(tmp_path / "x", tmp_path / "none")
    (tmp_path / "x").symlink_to("nowhere")
    data.set_aside(tmp_path / "x")
    assert [(tmp_path / f"earlier-{i}" / "x").read_text() for i in (1, 2, 3)] == ["a", "b", "c"]
    assert (tmp_path / "earlier-4" / "x").is_symlink()


# ---------------------------------------------------------------- signals, pipes, surroundings


def test_a_second_interrupt_ends_a_run_at_once(homework, tmp_path):
    code = (
        "import os, signal, sys, time, train\n"
        "def late(run, *batch):\n"
        "    for _ in range(2): os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
        "train.train_step = late\n"
        "train.main(sys.argv[1:])\n"
    )
    begin = time.monotonic()
    status, _, error = run("-c", code, *short_run(homework, tmp_path))
    assert status == 1 and time.monotonic() - begin < 40
    assert error.startswith("train.py: error: interrupted; if an epoch was finished, --resume")


def test_after_a_loss_that_is_not_finite_the_last_epoch_is_intact(
    homework, tmp_path, monkeypatch, capsys
):
    first = train.train_step

    def overflow(run, epoch, *batch):
        loss, right = first(run, epoch, *batch)
        return (loss * float("nan"), right) if epoch else (loss, right)

    monkeypatch.setattr(train, "train_step", overflow)
    error = stopped(capsys, short_run(homework, tmp_path), 1)
    assert "loss is no longer finite in epoch 2 at a rate of" in error
    assert "try a lower --lr; ckpt.pt still holds epoch 1" in error
    assert models.load_checkpoint(tmp_path / "ckpt.pt")[1]["epoch"] == 1


def test_a_console_without_a_classs_letters_ends_nothing(tmp_path):
    for n, name in enumerate(["кот", "犬"]):
        (tmp_path / "x" / name).mkdir(parents=True)
        save_picture(
            torch.full((3, 16, 16), 60 * n, dtype=torch.uint8), tmp_path / f"x/{name}/1.png"
        )
    command = [sys.executable, str(ROOT / "data.py"), "x"]
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True)
    assert (ended.returncode, ended.stderr) == (0, b"")
    assert b"classes     2: ???, ?" in ended.stdout


def test_predict_into_a_closed_pipe_ends_quietly(trained):
    picture = trained[0] / "test" / "test_00000.png"
    process = subprocess.Popen(
        [sys.executable, ROOT / "predict.py", trained[1] / "ckpt.pt", "--data", picture],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    error = process.stderr.read()
    assert process.wait(60) == 1 and error == b""


@pytest.mark.usefixtures("on_cpu")
def test_a_run_is_the_same_wherever_and_whenever_it_runs(homework, tmp_path):
    """Neither the clock, the locale, the folder, the order of file names, PYTHONHASHSEED nor the
    number of decoding threads changes a bit of the weights or the log."""
    code = (
        "import os, sys, time\n"
        "walk, count, shift = os.walk, os.cpu_count, {shift}\n"
        "def other(top, **rest):\n"
        "    for folder, folders, names in walk(top, **rest):\n"
        "        folders.reverse(), names.sort(key=hash)\n"
        "        yield folder, folders, names\n"
        "os.walk, os.cpu_count = other, lambda: {threads}\n"
        "now = time.time\n"
        "time.time = lambda: now() + shift\n"
        "sys.path.insert(0, {root!r})\n"
        "import train\n"
        "train.main(sys.argv[1:])\n"
    )
    ends = []
    settings = [(0, 1, "1", "C", "UTC"), (10**8, 7, "2", "tr_TR.UTF-8", "Asia/Kathmandu")]
    for i, (shift, threads, seed, place, zone) in enumerate(settings):
        (tmp_path / str(i)).mkdir()
        script = code.format(shift=shift, threads=threads, root=str(ROOT))
        environment = dict(OMP_NUM_THREADS="1", PYTHONHASHSEED=seed, LC_ALL=place, TZ=zone)
        subprocess.run(
            [sys.executable, "-c", script, *short_run(homework, "out")],
            env={**os.environ, **environment}, cwd=tmp_path / str(i), check=True,
            capture_output=True, timeout=120,
        )  # fmt: skip
        end = torch.load(tmp_path / str(i) / "out" / "ckpt.pt")
        for row in end["log"]:
            row.pop("seconds"), row.pop("images_per_second")
        ends.append(end)
    assert same_tree(*ends)
