"""Read thousands of damaged files of each kind, which must do no harm.

    PYTHONPATH=. python tests/fuzz.py --files 2000      # of each kind; --seed 0, --kind NAME

Archives, tables and pictures go through data.load and data.load_pictures, checkpoints through
predict.load_run (models.load_checkpoint and the checks of what scoring and resuming take) and once
through the network. A file is a good one with bytes flipped, cut, repeated, moved or replaced by
extremes; archives and checkpoints are also packed anew around such contents, so that checksums
fit. Each is a function of (seed, kind, number), and is read or refused by a ValueError or OSError
in one line of at most 400 characters, within 10 seconds and 2 GB, and writes nothing. Prints a line
a kind; ends with status 1 if there was anything else. Then come bombs of full size (--kind bombs).
"""

import argparse
import contextlib
import functools
import gzip
import io
import lzma
import os
import random
import resource
import signal
import tarfile
import tempfile
import time
import traceback
import zipfile
from pathlib import Path

import torch
from PIL import Image

import data
import predict
import train

EXTREMES = [b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\x80", b"\0\1\0\0"]
PICTURES = {"jpeg": "JPEG", "png": "PNG", "gif": "GIF", "bmp": "BMP", "webp": "WEBP",
            "tiff": "TIFF", "ppm": "PPM"}  # fmt: skip
SECONDS, KILOBYTES, CHARACTERS = 10, 2_000_000, 400


def damaged(chance, content):
    """The bytes with one to four things wrong."""
    content = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        size = len(content)
        i, j = sorted(chance.randrange(size + 1) for _ in range(2))
        j = min(j, i + chance.choice([1, 4, 64, size]))
        how = chance.randrange(7)
        if how == 0:
            for _ in range(chance.randint(1, 20)):
                if size:
                    content[chance.randrange(size)] ^= 1 << chance.randrange(8)
        elif how == 1:
            del content[i:]
        elif how == 2:
            del content[i:j]
        elif how == 3:
            content[i:i] = content[i:j] * chance.choice([1, 2, 50])
        elif how == 4:
            content[i : i + 4] = chance.choice(EXTREMES)
        elif how == 5:
            content[i:j] = chance.randbytes(j - i)
        else:
            content[i:j] = bytes(j - i)
        if len(content) > 1 << 20:
            del content[1 << 20 :]
    return bytes(content)


# ---------------------------------------------------------------- good files


def picture(form="PNG", seed=0):
    buffer = io.BytesIO()
    noise = random.Random(seed).randbytes(24 * 20 * 3)
    Image.frombytes("RGB", (24, 20), noise).save(buffer, form)
    return buffer.getvalue()


TABLE = "Id,Category\n" + "".join(f"{i}.png,{i % 3}\n" for i in range(9))


def members():
    """The homework's files, small."""
    files = {"x/labels.csv": TABLE.encode()}
    files.update({f"x/trainval/{i}.png": picture(seed=i) for i in range(9)})
    return {**files, "x/test/0.png": picture(seed=9)}


def packed(kind, files):
    """The bytes of an archive."""
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    else:
        with tarfile.open(fileobj=buffer, mode="w" + kind[3:].replace(".", ":")) as archive:
            for name, content in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def checkpoint(folder):
    """The path of a good one."""
    flags = ["--data", "demo", "--limit", "40", "--model", "v14:width=2,groups=2,stem_kernel=3"]
    with contextlib.redirect_stdout(io.StringIO()):
        train.main([*flags, "--epochs", "2", "--lr", "0.01", "--out", str(folder)])
    return folder / "ckpt.pt"


# ---------------------------------------------------------------- bad files


def bad_archive(kind):
    files = members()
    whole = packed(kind, files)

    def make(chance):
        if chance.random() < 0.4:
            return damaged(chance, whole)
        if kind != "zip" and chance.random() < 0.5:  # the tar within the compression
            pack = {"tar": bytes, "tar.gz": gzip.compress, "tar.xz": lzma.compress}[kind]
            return pack(damaged(chance, packed("tar", files)))
        names = chance.sample(sorted(files), chance.randint(1, 3))
        changed = {name: damaged(chance, files[name]) for name in names}
        return packed(kind, {**files, **changed})

    return f"x.{kind}", make, data.load


def bad_table():
    pictures = {name: content for name, content in members().items() if name.endswith("png")}

    def make(chance):
        table = damaged(
            chance, TABLE.encode(chance.choice(["utf-8", "utf-8", "utf-16", "latin-1"]))
        )
        return packed("zip", {**pictures, "x/labels.csv": table})

    return "x.zip", make, data.load


def bad_picture(kind):
    whole = picture(PICTURES[kind])
    return (
        f"x.{kind}",
        lambda chance: damaged(chance, whole),
        lambda path: data.load_pictures(path, 16),
    )


def bad_checkpoint():
    with tempfile.TemporaryDirectory() as folder:
        whole = checkpoint(Path(folder)).read_bytes()
    with zipfile.ZipFile(io.BytesIO(whole)) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    outline = next(name for name in parts if name.endswith("data.pkl"))

    def make(chance):
        if chance.random() < 0.4:
            return damaged(chance, whole)
        name = outline if chance.random() < 0.8 else chance.choice(sorted(parts))
        content = bytearray(parts[name])
        if chance.random() < 0.5 and content:  # a byte or a number: most still unpickle
            i = chance.randrange(len(content))
            content[i : i + 1] = chance.randbytes(1)
        else:
            content = damaged(chance, content)
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w") as archive:
            for key, value in {**parts, name: bytes(content)}.items():
                archive.writestr(key, value)
        return buffer.getvalue()

    def read(path):
        network, it = predict.load_run(path)
        predict.logits(network, torch.zeros(1, 3, it["size"], it["size"], dtype=torch.uint8))

    return "x.pt", make, read


# ---------------------------------------------------------------- bombs, as large as they come


def header(name, size=0, kind=tarfile.REGTYPE):
    member = tarfile.TarInfo(name)
    member.size, member.type = size, kind
    return member.tobuf()


def zeros_in(pack, before=b"", count=10):
    """A stream compressed in parts: each part's header, if any, and 100 MB of zeros."""
    part = pack(before) + pack(bytes(100 << 20)) if before else pack(bytes(100 << 20))
    return part * count


def many_in_zip(count):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i in range(count):
            archive.writestr(zipfile.ZipInfo(f"a/{i}.png"), b"")
    return buffer.getvalue()


def zeros_in_zip(name, *others):
    """A zip with 1 GB of zeros under this name, and other, empty files."""
    buffer = io.BytesIO()
    archive = zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED, compresslevel=1)
    for other in others:
        archive.writestr(other, b"")
    with archive, archive.open(name, "w") as file:
        for _ in range(10):
            file.write(bytes(100 << 20))
    return buffer.getvalue()


def table_of_commas():
    return packed("zip", {"x/labels.csv": b"a,b\n" * (15 << 20), "x/trainval/1.png": picture()})


QUICK_GZIP = functools.partial(gzip.compress, compresslevel=1)
BOMBS = {  # name of the file, its content, what reads it
    "1 GB of zeros in a zip": ("x.zip", lambda: zeros_in_zip("a/1.png"), data.load),
    "1 GB of zeros in a tar.gz, as pictures": ("x.tar.gz", lambda: zeros_in(
        QUICK_GZIP, header("a/1.png", 100 << 20)), data.load),
    "1 GB of zeros in a tar.gz, as something else": ("x.tar.gz", lambda: zeros_in(
        QUICK_GZIP, header("a/1.bin", 100 << 20)), data.load),
    "1 GB of zeros in a tar.xz, as a header": ("x.tar.xz", lambda: lzma.compress(
        header("a", 1 << 30, tarfile.XHDTYPE), preset=0) + zeros_in(
        functools.partial(lzma.compress, preset=0)), data.load),
    "a million empty files in a tar": (
        "x.tar", lambda: header("a/1.png") * 1_000_000 + bytes(1024), data.load),
    "a million links in a tar.gz": ("x.tar.gz", lambda: gzip.compress(
        header("a/1.png", 0, tarfile.SYMTYPE) * 1_000_000, 1), data.load),
    "a million empty files in a zip": ("x.zip", lambda: many_in_zip(1_000_000), data.load),
    "a table of sixteen million rows": ("x.zip", table_of_commas, data.load),
    "1 GB of zeros in a checkpoint": (
        "x.pt", lambda: zeros_in_zip("x/data/0", "x/data.pkl"), predict.load_run),
}  # fmt: skip


# ---------------------------------------------------------------- reading them


def read_one(path, read):
    """ "read" or "refused", else what is wrong."""
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            read(path)
        return "read"
    except (ValueError, OSError) as error:
        line = data.one_sentence(error)
        line = line.split("replace or remove them")[0]  # which names up to a hundred
        if len(line) > CHARACTERS:
            return f"{len(line)} characters: {line[:200]}"
        return "refused"
    except BaseException:
        return traceback.format_exc()


def read_all(name, make, read, args, kind, say):
    """Read so many files of a kind in this process, whose folder is empty; say each that isn't as
    it should be.
    """
    counts, slowest = {"read": 0, "refused": 0}, 0.0
    for number in range(args.files):
        Path(name).write_bytes(make(random.Random(f"{args.seed} {kind} {number}")))
        say(f"at {number}")
        signal.alarm(SECONDS)  # which ends the process
        begin = time.monotonic()
        result = read_one(name, read)
        signal.alarm(0)
        slowest = max(slowest, time.monotonic() - begin)
        if result in counts:
            counts[result] += 1
        else:
            say(f"wrong {number}: {result}")
        if [path.name for path in Path().iterdir()] != [name]:
            say(f"wrong {number}: something was written")
            break
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if peak > KILOBYTES:
        say(f"wrong: {peak} kB of memory")
    say(f"done {counts['read']} read, {counts['refused']} refused, slowest {slowest:.2f} s, "
        f"at most {peak / 1e6:.2f} GB")  # fmt: skip


def examine(kind, parts, args):
    """Read a kind's files in a process of its own; whether all was as it should be."""
    reader, writer = os.pipe()
    folder = tempfile.TemporaryDirectory()
    child = os.fork()
    if not child:
        os.close(reader)
        os.chdir(folder.name)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        read_all(*parts, args, kind, lambda line: os.write(writer, f"{line}\0".encode()))
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        lines = pipe.read().decode().split("\0")
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    folder.cleanup()  # bombs are large
    wrong = [line for line in lines if line.startswith("wrong")]
    if status:
        at = [line for line in lines if line.startswith("at")][-1]
        wrong.append(f"ended by {status} {at}")
    done = [line[5:] for line in lines if line.startswith("done")]
    print(f"{kind}: {len(wrong)} wrong of {args.files}; {' '.join(done)}", flush=True)
    for line in wrong[:5]:
        print(line, flush=True)
    return not wrong


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind")
    args = parser.parse_args()
    torch.set_num_threads(1)  # OpenMP's others, once used, would be missed after a fork
    kinds = {kind: bad_archive(kind) for kind in ("zip", "tar", "tar.gz", "tar.xz")}
    kinds["labels.csv"] = bad_table()
    kinds.update({kind: bad_picture(kind) for kind in PICTURES})
    kinds["checkpoint"] = bad_checkpoint()
    chosen = [kind for kind in kinds if args.kind in (None, kind)]
    good = [examine(kind, kinds[kind], args) for kind in chosen]
    if args.kind in (None, "bombs"):
        args.files = 1
        for name, (file, content, read) in BOMBS.items():
            bomb = content()
            good.append(examine(name, (file, lambda chance: bomb, read), args))  # noqa: B023
    raise SystemExit(0 if all(good) else 1)


if __name__ == "__main__":
    main()
