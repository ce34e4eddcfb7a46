"""Pictures and labels: from files to uint8 tensors, to a split, to batches on the device.

    dataset = load("bhw1.tar.xz")                       # or a folder, a .zip, "cifar10", "demo"
    train, val = split(dataset.labels, 0.1, seed=0)     # before anything is concatenated
    batches = Batches(dataset.images, dataset.labels, train, pipelines, 64, seed=0, device="cuda")
    for x, y in batches.epoch(0): ...                   # float [B, 3, S, S] in [0, 1], int64 [B]
    python data.py bhw1.tar.xz                          # what it holds, before anything is trained

Every picture is decoded once and then lives as uint8 where the arithmetic is. There are no worker
processes and nothing happens to a picture one at a time after that.
"""

import argparse
import csv
import difflib
import gzip
import hashlib
import io
import itertools
import lzma
import os
import re
import sys
import tarfile
import time
import warnings
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Optional

import numpy as np
import torch
import torchvision.transforms.v2 as transforms
from PIL import Image, ImageDraw, ImageFont, ImageOps

try:
    import fcntl
except ImportError:  # Windows, where two runs at once are not noticed
    fcntl = None

PICTURES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
OWN = {f"{name}.png" for name in "curves search compare confusions mistakes data augment".split()}
ANNOTATIONS = "val_annotations.txt"  # Tiny ImageNet's own labels of its validation part
CIFAR = {"cifar10": "cifar-10-batches-py", "cifar100": "cifar-100-python"}  # torchvision's folders
MOUNTS = {"competitions": "*", "datasets": "*/*", "notebooks": "*/*"}  # below Kaggle's input
PARTS = {  # of a data set, by what folders are called
    "train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
SMALLEST, LARGEST = 16, 512  # sides in pixels: below, no network fits; above, it isn't small
# What a stranger's files may take. Pillow has readers that start other programs: these don't.
FORMATS = ["JPEG", "PNG", "BMP", "GIF", "WEBP", "TIFF", "PPM"]
MOST_PIXELS = 50_000_000  # in a picture: a large photograph
MOST_BYTES = 64 << 20  # in a file: such a photograph, or a table of two million rows
MOST_USELESS = 100_000  # entries of an archive that hold nothing, beyond one a picture (macOS)
TOO_MUCH = "it unpacks to far more than pictures take: if you trust it, unpack it before"
HOW = "by --data, or after data.py"  # how a source is named
EXPECTED = "expected labels.csv with trainval/, train/<class>/*, <class>/* or Tiny ImageNet"


class Failed(Exception):
    """What was begun can't go on; the message says in one sentence why and what to try."""


class NotADataSet(ValueError):
    """A folder or a file in none of the layouts that describe() knows."""


@dataclass
class Dataset:
    """A source's pictures in memory; N labelled ones and M to be answered.

    images uint8 [N, 3, S, S], labels int64 [N] as indices into classes, ids the source's own names.
    is_val marks the validation part that the source itself brings (bool [N]), if it does.
    test_labels int64 [M] only where they are published. columns: the submission's header.
    """

    source: str
    classes: list
    labels: torch.Tensor
    ids: list
    images: Optional[torch.Tensor] = None
    is_val: Optional[torch.Tensor] = None
    test_ids: list = field(default_factory=list)
    test_images: Optional[torch.Tensor] = None
    test_labels: Optional[torch.Tensor] = None
    columns: tuple = ("Id", "Category")
    files: list = field(default_factory=list)  # names in the source, where pictures are files
    test_files: list = field(default_factory=list)
    left_out: list = field(default_factory=list)  # pictures that lie outside the layout
    layout: str = "built in"  # how the source holds them, in words
    sizes: Counter = field(default_factory=Counter)  # (width, height) of its files, or of a sample

    @property
    def val_indices(self):
        """The source's own validation part as int64 indices, or None where it brings none."""
        return None if self.is_val is None else self.is_val.nonzero().flatten()

    @property
    def fingerprint(self):
        """A hash of the labelled ids and their classes: what a resumed run must find again."""
        lines = (f"{i}\t{self.classes[y]}\n" for i, y in zip(self.ids, self.labels.tolist()))
        return hashlib.sha256("".join(lines).encode("utf-8", "surrogatepass")).hexdigest()

    def take(self, indices):
        """The same source with only these of its labelled pictures; all classes stay."""
        chosen = indices.tolist()
        return replace(
            self,
            labels=self.labels[indices],
            ids=[self.ids[i] for i in chosen],
            files=[self.files[i] for i in chosen] if self.files else [],
            images=None if self.images is None else self.images[indices],
            is_val=None if self.is_val is None else self.is_val[indices],
        )


# ---------------------------------------------------------------- from a source to a data set


def load(source=None, size=None, limit=None, labelled=True, test=True):
    """Read a source into memory; a ValueError or OSError says in one sentence what is wrong.

    source: a folder, an archive, "cifar10", "cifar100", "demo", or None to look for one.
    size: side in pixels that pictures are resized to; None: the most common one.
    limit: at most this many labelled pictures, stratified, always the same ones.
    labelled, test: which parts to decode; labels and ids are there in any case. test None: where
    the answers are published.
    """
    source = find_source() if source is None else str(source)
    if source == "demo":
        dataset = draw_demo(size or SMALLEST)
    elif source in CIFAR:
        dataset = load_cifar(source, size)
    else:
        files = Files(source)
        dataset = describe(files)
    if labelled and len(dataset.classes) < 2:
        raise ValueError(f"{source} has only the class {dataset.classes[0]!r}: it takes two")
    if labelled and (left := dataset.left_out):
        print(f"{len(left)} pictures are in no class folder: {listed(left)}")
    if limit is not None and limit < len(dataset.labels):
        own = dataset.labels  # each class in proportion, and in each part that the source brings
        own = own if dataset.is_val is None else own + dataset.is_val * len(dataset.classes)
        dataset = dataset.take(stratified(own, limit, seed=0).nonzero().flatten())
    if dataset.files:
        dataset.sizes = picture_sizes(files.read, dataset.files)
        size = size or common_side(dataset.sizes)
        if labelled:
            dataset.images = decode(files.read, dataset.files, size)
        test = dataset.test_labels is not None if test is None else test
        if test and dataset.test_files:
            dataset.test_images = decode(files.read, dataset.test_files, size)
    return dataset


def find_source(places=("data", "/kaggle/input")):
    """The one data set below data/ or /kaggle/input/, else "demo"; says which was taken."""
    strange = []
    for place in filter(Path.is_dir, map(Path, places)):
        # load_cifar() looks in data/ alone; on Kaggle each input is a source by itself.
        ours, mounts = (CIFAR, {}) if place == Path("data") else ({}, MOUNTS)
        found = [name for name, folder in ours.items() if (place / folder).is_dir()]
        below = [path for path in place.iterdir() if path.name not in mounts]
        below += [path for name in mounts for path in (place / name).glob(mounts[name])]
        below = sorted(path for path in below if not path.name.startswith("."))
        found += [str(x) for x in below if is_archive(x) or (x.is_dir() and has_layout(x))]
        names = [path.name for path in below]
        itself = {"labels.csv", "trainval"} & {*names} or "train" in map(part_of, names)
        if itself or (not found and has_layout(place)):
            found = [str(place)]
        if not found:
            found = [str(x) for child in below for x in sorted(child.glob("*")) if is_archive(x)]
        if len(found) > 1:
            raise ValueError(f"several data sets, {' and '.join(found)}: name one ({HOW})")
        if found:
            print(f"data: {found[0]} (found below {place}/)")
            return found[0]
        strange += [place] if any(map(is_picture, Files(place).names)) else []
    if strange:
        unknown = "holds pictures, but as no data set known here"
        raise ValueError(f"{strange[0]} {unknown}: name another, or demo ({HOW})")
    print("*** Nothing named, nothing in data/ or /kaggle/input/: this is the built-in DEMO, ***")
    print("*** ten classes of drawn textures. Its figures say nothing about real pictures. ***")
    return "demo"


def is_archive(path):
    """Whether it may be a data set in one file; those that torchvision unpacks are none."""
    return path.name.lower().endswith(ARCHIVES) and not re.match(r"\.|cifar-100?-python", path.name)


def has_layout(folder):
    """Whether describe() knows the layout of a folder, be it faulty or not."""
    try:
        describe(Files(folder))
    except ValueError as error:
        return not isinstance(error, NotADataSet)
    return True


class Files:
    """The files below a folder or in an archive: their names, with / between parts, and bytes.

    A zip and a folder are read on demand. A tar can only be read from its start, so its pictures
    are kept as they are, compressed: 130 MB for the homework's 110,000.
    """

    def __init__(self, path):
        self.path, self.contents = Path(path), {}
        if self.path.is_dir():
            found, seen, top = [], set(), self.path.resolve()
            for folder, folders, names in os.walk(self.path, followlinks=True):
                below, place = Path(folder).relative_to(self.path), Path(folder).resolve()
                # A folder counts once, and under its own name, not under those of links to it.
                if place in seen or (top in place.parents and place != top / below):
                    folders.clear()
                    continue
                seen.add(place)
                folders.sort()
                found += [(below / name).as_posix() for name in names]
        elif not self.path.exists():
            known = f"a folder, an archive, {', '.join(CIFAR)} or demo"
            raise FileNotFoundError(f"there is no {path}: expected {known}")
        elif not self.path.is_file() or not self.path.name.lower().endswith(ARCHIVES):
            raise NotADataSet(f"{path} is no data set: expected a folder or {' '.join(ARCHIVES)}")
        else:
            try:
                self.open_archive()
            except Exception as error:  # whatever a damaged archive makes its reader raise
                raise ValueError(f"{path} can't be read as an archive: {error!s:.150}") from error
            found = self.contents
        self.names = sorted(filter(is_wanted, found), key=natural)

    def open_archive(self):
        most = max(4 * MOST_BYTES, 20 * self.path.stat().st_size)  # pictures are compressed already
        if self.path.name.lower().endswith(".zip"):
            self.zip = zipfile.ZipFile(self.path)
            entries = self.zip.infolist()  # maybe with \ in names (Windows), or a name twice
            self.contents = {entry.filename.replace("\\", "/"): entry for entry in entries}
            sizes = [x.file_size for name, x in self.contents.items() if is_wanted(name)]
            useless = len(entries) - 2 * sum(size > 0 for size in sizes)
            if useless > MOST_USELESS or max(sizes, default=0) > MOST_BYTES or sum(sizes) > most:
                raise ValueError(TOO_MUCH)
            return
        useless, progress = 0, Progress(f"reading {self.path.name}")
        openers = {".gz": gzip.open, ".tgz": gzip.open, ".xz": lzma.open, ".txz": lzma.open}
        with openers.get(self.path.suffix.lower(), open)(self.path, "rb") as file:

            def read(size):  # what headers unpack to as well
                if file.tell() > most:
                    raise ValueError(TOO_MUCH)
                return file.read(size)

            with tarfile.open(fileobj=SimpleNamespace(read=read), mode="r|") as archive:
                for member in archive:
                    name = member.name[2:] if member.name.startswith("./") else member.name
                    wanted = member.isreg() and not member.issparse() and is_wanted(name)
                    useless += -1 if wanted and member.size else 1
                    if useless > MOST_USELESS or (wanted and member.size > MOST_BYTES):
                        raise ValueError(TOO_MUCH)
                    if wanted:
                        self.contents[name] = archive.extractfile(member).read()
                        progress.add(1)
            while read(1 << 20):  # to the end, where the checksum is
                pass
            if self.path.suffix.lower() == ".tar":  # no checksum, but it ends in zeros
                file.seek(-512, os.SEEK_END)
                if any(file.read()):
                    raise EOFError("it is cut short")
        progress.close()

    def read(self, name):
        """The bytes of one file; safe to call from several threads."""
        if self.path.is_dir():
            return read_small(self.path / name)
        content = self.contents[name]
        try:
            return content if isinstance(content, bytes) else self.zip.read(content)
        except Exception as error:  # damaged, encrypted, or packed in a way unknown here
            raise ValueError(f"{name:.80} in {self.path} can't be read: {error!s:.80}") from error


def read_small(path):
    """The bytes of a file; ValueError where it may not end, or is larger than any picture here."""
    if not path.is_file() or path.stat().st_size > MOST_BYTES:
        raise ValueError(f"{path} is no file of at most {MOST_BYTES:,} bytes")
    return path.read_bytes()


def is_wanted(name):
    """Pictures and tables, but nothing hidden, absolute or reaching out, and nothing of our own."""
    path = PurePosixPath(name)
    hidden = any(re.match(r"\.|__MACOSX|earlier-\d+$", part) for part in path.parts)
    is_known = is_picture(name) or path.name in ("labels.csv", ANNOTATIONS)
    return is_known and not (hidden or path.is_absolute() or path.name in OWN or name[-1] == "/")


def is_picture(name):
    return PurePosixPath(name).suffix.lower() in PICTURES


def natural(text):
    """A sort key under which 9 comes before 10."""
    parts = re.split(r"(\d+)", str(text))
    return [(part.isdecimal(), int(part[:99]) if part.isdecimal() else 0, part) for part in parts]


def describe(files):
    """The data set that a tree of files holds, its pictures not yet decoded."""
    for name, layout in LAYOUTS.items():  # the first that fits wins
        if (dataset := layout(files)) is not None:
            return replace(dataset, layout=name)
    raise NotADataSet(f"{files.path} holds no data set: {EXPECTED}")


def homework_layout(files):
    """labels.csv (id, category; any header), trainval/ (else train/), maybe test/, at any depth."""
    tables = [name for name in files.names if PurePosixPath(name).name == "labels.csv"]
    has_trainval = any("/trainval/" in f"/{name}" for name in files.names)
    if not tables:
        if has_trainval:
            raise ValueError(f"{files.path} has a folder trainval/ but no labels.csv")
        return None
    if len(tables) > 1:
        raise ValueError(f"{files.path} has several labels.csv: {listed(tables)}; name one folder")
    folder = "trainval" if has_trainval else "train"
    pictures, test = pictures_below(files, folder)
    columns, rows = read_labels(files.read(tables[0]), tables[0], 2 * len(pictures) + 10_000)
    if not any(i in pictures for _, i, _ in rows):  # ids without suffix, in the submission as well
        pictures, test = pictures_below(files, folder, bare=True)
    if columns[0] in pictures:
        raise ValueError(f"{tables[0]} has no header: its first row already names a picture")
    missing = [f"row {n} ({i})" for n, i, _ in rows if i not in pictures]
    if missing:
        hint = "; where each class has a folder, name the one that holds these"
        text = f"{len(missing)} rows of {tables[0]} name no picture in {folder}/: {listed(missing)}"
        raise ValueError(text + hint * (len(missing) == len(rows)))
    rows = [(i, category, pictures[i]) for _, i, category in rows]
    return labelled_by(files, rows, test, columns=columns)


def pictures_below(files, folder, bare=False):
    """({name below the folder: full name} of its pictures, at any depth, also doubled; the same of
    test/). bare: names without suffix.
    """
    found = {folder: {}, "test": {}}
    for name in filter(is_picture, files.names):
        if match := re.fullmatch(rf"(?s)(?:.*/)?({folder}|test)/(.+)", str(PurePosixPath(name))):
            there, i = found[match[1]], match[2].rpartition(".")[0] if bare else match[2]
            if i in there:
                raise ValueError(f"two pictures are {i}: {there[i]} and {name}; keep one")
            there[i] = name
    return found[folder], found["test"]


def read_labels(content, name, most):
    """((id column, category column), [(row number, id, category)]) of a file of `most` rows."""
    numbered = []
    try:
        rows = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), strict=True)
        for n, row in enumerate(rows, start=1):  # the first wrong one ends it, however many follow
            if n > most:
                raise ValueError(f"{name} has far more rows than there are pictures")
            if any(cell.strip() for cell in row):
                numbered.append((n, row := [cell.strip() for cell in row[:2]]))
                if len(row) < 2 or not all(row):
                    row = ",".join(row)
                    raise ValueError(f"row {n} of {name} should be id,category: {row:.80}")
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"{name} is no table of ids and categories in UTF-8: {error}") from error
    if len(numbered) < 2:
        raise ValueError(f"{name} has no rows below its header")
    doubled = [i for i, count in Counter(row[0] for _, row in numbered[1:]).items() if count > 1]
    if doubled:
        raise ValueError(f"{name} has ids in several rows: {listed(doubled)}")
    return tuple(numbered[0][1]), [(n, *row) for n, row in numbered[1:]]


def tiny_imagenet_layout(files):
    """train/<wnid>/images/*, val/images/* with their classes in a table, test/images/*.

    It is read as one folder a class: without images/, and with val/<wnid>/ from the table (or as
    it is, where someone has sorted it).
    """
    pictures = [PurePosixPath(name) for name in files.names if is_picture(name)]
    tables = [name for name in files.names if PurePosixPath(name).name == ANNOTATIONS]
    if not tables and not any(path.match("train/*/images/*") for path in pictures):
        return None
    wnids, found = {}, {}
    for table in tables:
        lines = files.read(table).decode("utf-8-sig", "replace").splitlines()
        for n, line in enumerate(lines, start=1):
            name, tab, rest = line.partition("\t")
            if not tab:
                raise ValueError(f"row {n} of {table} should be file, tab, wnid: {line[:80]}")
            wnids[PurePosixPath(table).parent / name] = rest.split("\t")[0]
    for path in pictures:
        folder = path.parent.parent if path.parent.name == "images" else path.parent
        wnid = wnids.pop(folder / path.name, "")
        found[str(folder / wnid / path.name)] = str(path)
    names = {path.name for path in pictures}  # a sorted val/ may have its table still
    missing = [path for path in wnids if path.name not in names]
    if missing:
        raise ValueError(f"{tables[0]} names pictures that are not there: {listed(missing)}")
    return folder_layout(files, found)


def part_of(name):
    """'train', 'val' or 'test' where a folder is called like such a part, else None."""
    return PARTS.get(name.lower())


def train_folder(files, paths):
    """The one train/ (else one called like it) with class folders: its path's parts, () if none."""
    for fits in ("train".__eq__, lambda name: part_of(name) == "train"):
        places = ((path, [i for i, name in enumerate(path[:-2]) if fits(name)]) for path in paths)
        trains = {path[: at[0] + 1] for path, at in places if at}
        if len(trains) > 1:
            shown = listed(sorted(map("/".join, trains)))
            raise ValueError(f"{files.path} has several train/: {shown}; name one folder")
        if trains:
            return trains.pop()
    return ()


def folder_layout(files, found=None):
    """train/<class>/* (with val/<class>/*, if there), or <class>/* alone; test/* isn't a class.

    found: {path in this layout: file}, where the pictures lie otherwise in the source.
    """
    found = found or {name: name for name in files.names if is_picture(name)}
    paths = [PurePosixPath(path).parts for path in found]
    train = train_folder(files, paths)
    root = train[:-1] if train else os.path.commonprefix([parts[:-1] for parts in paths])
    # What lies elsewhere keeps its name alone, which is in no class folder.
    top = [x[len(root) :] if x[:-1][: len(root)] == root else x[-1:] for x in paths]
    has_train = any(parts[:1] == train[-1:] and len(parts) == 3 for parts in top)
    rows, test, left_out, doubled = [], {}, [], []
    for name, parts in zip(found.values(), top):
        in_train, part = parts[:1] == train[-1:], part_of(parts[0])
        if has_train and len(parts) == 3 and (in_train or part == "val"):
            rows.append(("/".join(parts), parts[1], name))
        elif part == "test" and len(parts) > 1:
            i = "/".join(parts[1:])
            doubled += [f"{i}: {test[i]} and {name}"] if i in test else []  # as of Test/ and test/
            test[i] = name
        elif not has_train and len(parts) == 2:
            rows.append(("/".join(parts), parts[0], name))
        else:
            left_out.append(name)
    if not rows:
        return None
    if doubled:
        raise ValueError(f"two pictures are {doubled[0]}; keep one")
    is_val = torch.tensor([has_train and part_of(i.split("/")[0]) == "val" for i, _, _ in rows])
    is_val = is_val if is_val.any() else None
    dataset = labelled_by(files, rows, test, is_val=is_val, left_out=left_out)
    # Folders called like parts of a data set are no classes (one alone may be).
    alike = [x for x in dataset.classes if part_of(re.sub("[_-]?(images?|set|data)$", "", x))]
    if not has_train and len(alike) > 1:
        what = f"{listed(alike)} in {files.path} look like parts of a data set, not like classes"
        raise NotADataSet(f"{what}: {EXPECTED}")
    index = {f"{category}/": k for k, category in enumerate(dataset.classes)}
    labels = [index.get(i[: i.find("/") + 1]) for i in test]
    if labels and None not in labels:  # test/<class>/*: the answers are there
        dataset.test_labels = torch.tensor(labels)
    return dataset


def labelled_by(files, rows, test, **rest):
    """The Dataset of rows (id, class, file), one a labelled picture, and test {id: file}."""
    ids, categories, names = map(list, zip(*rows))
    classes = sorted({*categories}, key=natural)
    index = {category: k for k, category in enumerate(classes)}
    labels = torch.tensor([index[category] for category in categories])
    rest.update(files=names, test_ids=list(test), test_files=list(test.values()))
    return Dataset(str(files.path.resolve()), classes, labels, ids, **rest)


LAYOUTS = {
    "labels.csv and its pictures": homework_layout,
    "Tiny ImageNet's": tiny_imagenet_layout,
    "one folder a class": folder_layout,
}


def load_pictures(path, size):
    """(images uint8 [N, 3, S, S], ids): the pictures of a folder or an archive, or one file."""
    path = Path(path)
    if is_picture(path.name) and path.is_file():
        return decode(lambda name: read_small(path), [path.name], size), [path.name]
    files = Files(path)
    names = [name for name in files.names if is_picture(name)]
    if not names:
        raise ValueError(f"{path} holds no pictures ({' '.join(sorted(PICTURES))})")
    return decode(files.read, names, size), names


def load_cifar(name, size):
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009), downloaded into data/ and checked by torchvision."""
    from torchvision import datasets

    parts = []
    for train in (True, False):
        try:
            part = getattr(datasets, name.upper())("data", train=train, download=True)
        except (OSError, RuntimeError) as error:
            raise ValueError(f"{name} is not in data/ and can't be downloaded: {error}") from error
        images = np.stack([fit(Image.fromarray(x), size) for x in part.data]) if size else part.data
        parts.append((torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), part))
    (images, train), (test_images, test) = parts
    return Dataset(
        name, list(train.classes), torch.tensor(train.targets),
        ids=[f"train_{i}" for i in range(len(images))], images=images,
        test_ids=[f"test_{i}" for i in range(len(test_images))], test_images=test_images,
        test_labels=torch.tensor(test.targets),
    )  # fmt: skip


# ---------------------------------------------------------------- decoding


def opened(content):
    """The Pillow picture in these bytes, not yet decoded; ValueError for one that is too large."""
    image = Image.open(io.BytesIO(content), formats=FORMATS)
    if image.width * image.height > MOST_PIXELS:
        raise ValueError(f"{image.width:,} x {image.height:,} pixels are too many")
    return image


def fit(image, size):
    """uint8 [size, size, 3]: a Pillow picture's middle square, as a viewer on white paper shows it.

    Upright where a camera noted how it was held, on white where it is transparent, and 16 bits of
    grey scaled to 8, where Pillow's own conversion cuts off all above 255.
    """
    image.load()  # where a damaged one raises, which would be suppressed below
    with suppress(Exception):  # a damaged note about the picture, which itself may be whole
        ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        raise ValueError("its pixels are fractions, of which it isn't known what is white")
    if image.mode.startswith("I"):
        grey = np.asarray(image).clip(0, 65535)
        image = Image.fromarray((grey / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def picture_sizes(read, names, sample=1000):
    """Counter of (width, height), from the headers of about `sample` pictures of all."""
    sizes = Counter()
    for name in names[:: max(1, len(names) // sample)]:
        with suppress(Exception), opened(read(name)) as image:  # decode() lists what can't be read
            sizes[image.size] += 1
    return sizes


def common_side(sizes):
    """The most common shorter side of pictures of such sizes."""
    sides = Counter(map(min, sizes.elements()))
    side = max([SMALLEST, *(side for side, _ in sides.most_common(1))])
    if side > LARGEST:
        raise ValueError(f"the pictures' shorter side is {side} px: say --size 64, for instance")
    if sizes and set(sizes) != {(side, side)}:
        print(f"pictures of {sizes_listed(sizes)}: the middle square is brought to {side}x{side}")
    return side


def sizes_listed(sizes):
    """'3 sizes, the commonest 16x16, 40x16, 9x20'"""
    names = [f"{width}x{height}" for (width, height), _ in sizes.most_common()]
    several = f"{len(names)} sizes, the commonest " if len(names) > 1 else ""
    return several + listed(names, 3)


def decode(read, names, size):
    """uint8 [N, 3, size, size], decoded in threads; one ValueError names all that can't be."""
    images = np.empty((len(names), 3, size, size), np.uint8)
    broken = {}

    def decode_some(indices):
        for i in indices:
            try:
                with opened(read(names[i])) as image:
                    images[i] = fit(image, size).transpose(2, 0, 1)
            except Exception as error:  # whatever a damaged file makes a decoder raise
                unknown = isinstance(error, Image.UnidentifiedImageError)
                broken[i] = f"{names[i]:.80} ({'not a picture' if unknown else error!s:.80})"
            progress.add(1)

    progress = Progress("decoding", len(names))
    chunks = [range(i, min(i + 250, len(names))) for i in range(0, len(names), 250)]
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count()) as pool:
        warnings.simplefilter("ignore")  # Pillow's, of what is either decoded or reported below
        list(pool.map(decode_some, chunks))  # Ctrl-C ends it, and what hasn't begun is dropped
    progress.close()
    if broken:
        wrong = f"{len(broken)} of {len(names)} pictures can't be decoded; replace or remove them"
        named = listed([broken[i] for i in sorted(broken)], most=100, width=170)
        raise ValueError(f"{wrong}: {named}")
    return torch.from_numpy(images)


# ---------------------------------------------------------------- the demo


def draw_demo(size, seed=0, train=36, val=20, test=20):
    """Ten classes of textures, so many of each, drawn from a seed in two colours, with noise.

    They are told apart by their pattern alone, whatever its colours, place and scale, and a flip
    or a grey picture leaves each in its class.
    """
    random, each = np.random.default_rng(seed), train + val + test
    drawn = np.stack([draw_texture(name, each, size, random) for name in TEXTURES], axis=1)
    images = torch.from_numpy(drawn).flatten(0, 1)  # [each, class, 3, S, S]: classes take turns
    labels = torch.arange(len(TEXTURES)).repeat(each)
    known = (train + val) * len(TEXTURES)
    return Dataset(
        "demo", list(TEXTURES), labels[:known], [f"demo_{i:04d}.png" for i in range(known)],
        images[:known], is_val=torch.arange(known) >= train * len(TEXTURES),
        test_ids=[f"test_{i:04d}.png" for i in range(len(images) - known)],
        test_images=images[known:], test_labels=labels[known:],
    )  # fmt: skip


def wave(x):
    """A wave of period 1 between -1 and 1."""
    return np.cos(2 * np.pi * x)


def clouds(u, v, random):
    """Smooth noise: a few waves of random direction added up."""
    waves = random.uniform(0, 2 * np.pi, (6, 2, len(u), 1, 1))  # an angle and a phase each
    return sum(wave(0.7 * (u * np.cos(a) + v * np.sin(a)) + phase) for a, phase in waves) / 2


# Each gives a height, positive in one colour and negative in the other, over coordinates u
# (rightwards) and v (downwards) that are counted in periods of the pattern.
TEXTURES = {
    "horizontal": lambda u, v, random: wave(v),
    "vertical": lambda u, v, random: wave(u),
    "diagonal": lambda u, v, random: wave(0.7 * (u + v * random.choice([-1, 1], (len(u), 1, 1)))),
    "chessboard": lambda u, v, random: 2 * wave(u / 1.4) * wave(v / 1.4),
    "dots": lambda u, v, random: wave(u) + wave(v) - 0.8,
    "grid": lambda u, v, random: np.maximum(wave(u), wave(v)) * 2 - 1,
    "rings": lambda u, v, random: wave(np.hypot(u, v)),
    "rays": lambda u, v, random: wave(np.arctan2(v, u) * 4 / np.pi),
    "zigzag": lambda u, v, random: wave(v + 0.8 * np.abs((u * 0.7) % 1 - 0.5) * 2),
    "clouds": clouds,
}


def draw_texture(name, count, size, random):
    """uint8 [count, 3, size, size] of one texture."""

    def draw(low, high, *shape):
        return random.uniform(low, high, (count, *(shape or (1, 1))))

    y, x = np.mgrid[:size, :size] / size - 0.5
    angle = draw(-0.15, 0.15)  # radians: too little to turn one class into another
    periods = draw(2.2, 4.0)
    u = (x * np.cos(angle) - y * np.sin(angle)) * periods + draw(-0.5, 0.5)
    v = (x * np.sin(angle) + y * np.cos(angle)) * periods + draw(-0.5, 0.5)
    height = np.clip(TEXTURES[name](u, v, random) * 1.5, -1, 1)[:, None]
    middle, contrast = draw(0.3, 0.7, 3, 1, 1), draw(-0.35, 0.35, 3, 1, 1)
    contrast += np.sign(contrast.sum(1, keepdims=True)) * 0.1  # seen in grey too
    noise = random.normal(0, 0.12, (count, 3, size, size))
    return (np.clip(middle + contrast * height + noise, 0, 1) * 255).astype(np.uint8)


# ---------------------------------------------------------------- split, statistics, batches


def stratified(labels, count, seed):
    """bool [N]: `count` of the pictures at random, each class within one of its share."""
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(labels), generator=generator)
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    # Every so many of the list, from a drawn place on: no class is favoured where shares round.
    n = max(1, len(labels))
    i = torch.arange(len(labels)) * count + torch.randint(n, (), generator=generator)
    evenly = (i + count) // n > i // n
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    chosen[by_class] = evenly
    return chosen


def split(labels, fraction, seed):
    """(train, val): sorted int64 indices, stratified, together everything; fraction 0: no val."""
    is_val = stratified(labels, round(len(labels) * fraction), seed)
    return (~is_val).nonzero().flatten(), is_val.nonzero().flatten()


def parts(dataset, val, seed):
    """A run's (train, val), by --val and --seed; val None: the source's own part, else a tenth."""
    if val is None and dataset.is_val is not None:
        return (~dataset.is_val).nonzero().flatten(), dataset.val_indices
    return split(dataset.labels, 0.1 if val is None else val, seed)


def source_of(checkpoint, given=None):
    """Where to read what a checkpoint was trained on: at the path given now, else where it was."""
    source = given or checkpoint["source"]
    if not given and source not in ("demo", *CIFAR) and not Path(source).exists():
        raise ValueError(f"{source}, which it was trained on, is not here: name it with --data")
    return source


def require_same(dataset, checkpoint):
    """ValueError if these are not the pictures and labels that the checkpoint's run saw."""
    if dataset.fingerprint != checkpoint["fingerprint"]:
        wrong = "is not the data that this checkpoint was trained on: ids or labels differ from"
        raise ValueError(f"{dataset.source} {wrong} those of {checkpoint['source']}")


def statistics(images, indices):
    """(mean, std): a float a channel over all pixels of these pictures, in units of [0, 1].

    Counted by value, exactly, so that the order and the number of threads make no difference.
    """
    counts = torch.zeros(3, 256, dtype=torch.int64)
    for chunk in indices.split(1024):
        counts += torch.stack([x.ravel().bincount(minlength=256) for x in images[chunk].unbind(1)])
    share, value = counts.double() / counts[0].sum(), torch.arange(256, dtype=torch.float64)
    mean, square = share @ value, share @ value**2
    std = (square - mean**2).sqrt().clamp(min=1)  # a channel of one value would divide by zero
    return (mean / 255).tolist(), (std / 255).tolist()


def seed_from(*numbers):
    """One 63-bit seed from several numbers, such as (seed, epoch, step)."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0]) >> 1


def on_device(images, device):
    """The pictures where the arithmetic is, if they take at most half of the memory free there."""
    if device.type == "cuda" and images.nbytes * 2 < torch.cuda.mem_get_info(device)[0]:
        return images.to(device)
    return images


class Batches:
    """The epochs of a training set that is a concatenation of copies, one pipeline a copy.

    One epoch shows every picture once per copy, shuffled as one. Its order is a function of
    (seed, epoch), and what a pipeline draws one of (seed, epoch, step, rank). A batch is shared
    out over the processes of a run: this one is number `rank` of `world`.
    """

    def __init__(self, images, labels, indices, pipelines, batch_size, seed, device, share=(0, 1)):
        self.images, self.labels, self.indices = images, labels, indices
        self.pipelines, self.seed, self.device = pipelines, seed, torch.device(device)
        self.rank, self.world = share
        self.total = len(indices) * len(pipelines)
        # The remainder is spread over the batches, and no picture is alone in a process's part of
        # one: batch norm has nothing to normalise by there.
        self.steps = max(1, min(-(-self.total // batch_size), self.total // (2 * self.world)))
        self.bounds = [self.total * i // self.steps for i in range(self.steps + 1)]
        self.generator = torch.Generator(device)
        apart = images.device.type != self.device.type  # then a stream of their own copies them
        self.stream = torch.cuda.Stream(self.device) if apart else None

    def __len__(self):
        return self.steps

    def batch_size(self, step):
        """Pictures in a batch, those of all processes together."""
        return self.bounds[step + 1] - self.bounds[step]

    def order(self, epoch):
        """(this process's pictures in the order of an epoch, how many [steps][copies]).

        Within a batch in order of copy: so each copy is one contiguous slice, its length known
        without asking the device.
        """
        generator = torch.Generator().manual_seed(seed_from(self.seed, epoch))
        order = torch.randperm(self.total, generator=generator)
        lows, sizes = torch.tensor(self.bounds[:-1]), torch.tensor(self.bounds).diff()
        step = torch.arange(self.steps).repeat_interleave(sizes)
        place, size = torch.arange(self.total) - lows[step], sizes[step]
        first, last = size * self.rank // self.world, size * (self.rank + 1) // self.world
        mine = (place >= first) & (place < last)
        order, step = order[mine], step[mine]
        copies, pictures = order // len(self.indices), self.indices[order % len(self.indices)]
        groups = step * len(self.pipelines) + copies
        counts = groups.bincount(minlength=self.steps * len(self.pipelines))
        by_group = groups.argsort(stable=True)
        return pictures[by_group], counts.view(self.steps, len(self.pipelines)).tolist()

    def fetch(self, chosen):
        """uint8 pictures on the device: from the host's memory by a stream that copies ahead."""
        if self.stream is None:
            return self.images.index_select(0, chosen)  # on a CPU much faster than [chosen]
        shape = (len(chosen), *self.images.shape[1:])
        pinned = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        torch.index_select(self.images, 0, chosen, out=pinned)
        with torch.cuda.stream(self.stream):
            return pinned.to(self.device, non_blocking=True)

    def epoch(self, epoch, start=0):
        """Yield (x float [B, 3, S, S] in [0, 1], y int64 [B]) on the device, from step start on."""
        pictures, counts = self.order(epoch)
        sizes = [sum(lengths) for lengths in counts]
        labels = self.labels[pictures.to(self.labels.device)].split(sizes)
        pictures = pictures.to(self.images.device).split(sizes)
        ahead = self.fetch(pictures[start]) if start < self.steps else None
        for step in range(start, self.steps):
            if self.stream:
                torch.cuda.current_stream(self.device).wait_stream(self.stream)
                ahead.record_stream(torch.cuda.current_stream(self.device))
            x = ahead.float().div_(255)
            ahead = self.fetch(pictures[step + 1]) if step + 1 < self.steps else None
            self.generator.manual_seed(seed_from(self.seed, epoch, step, 2 * self.rank))
            for part, pipeline in zip(x.split(counts[step]), self.pipelines):
                if len(part):
                    part.copy_(pipeline(part, self.generator))
            yield x, labels[step]


def growing(first, last):
    """[(side in pixels, share of a run's steps)]: from first (None: last) to last in three.

    Each gets about the same time, since a step costs as its area does (progressive resizing).
    """
    first = min(first or last, last)
    sides = sorted({first, (first + last) // 8 * 4, last} - set(range(first)))
    weights = [side**-2 for side in sides]
    return [(side, weight / sum(weights)) for side, weight in zip(sides, weights)]


def side_at(sides, done):
    """The side of growing() after this share of a run's steps."""
    until = itertools.accumulate(share for _, share in sides)
    return next((side for (side, _), end in zip(sides, until) if done < end), sides[-1][0])


def time_at(sides, done, costs=None, reverse=False):
    """The share of a run's time after this share of its steps, or the reverse, given what each side
    takes of the time; None: each takes equally long.
    """
    shares, costs = [share for _, share in sides], costs or [1] * len(sides)
    steps, times = (np.cumsum([0, *x]) / sum(x) for x in (shares, costs))
    return float(np.interp(done, times, steps) if reverse else np.interp(done, steps, times))


def resized(images, side):
    """Float pictures [B, 3, S, S] at another side; unchanged at their own."""
    return images if images.shape[-1] == side else transforms.functional.resize(images, [side] * 2)


def mixed(images, labels, classes, mixup=0.0, cutmix=0.0):
    """A batch mixed in pairs, the labels as shares [B, classes], by Mixup (arXiv:1710.09412) or
    CutMix (arXiv:1905.04899) with these alphas, either at random; as it was where both are 0.
    """
    kinds = {transforms.MixUp: mixup, transforms.CutMix: cutmix}
    kinds = [kind(alpha=alpha, num_classes=classes) for kind, alpha in kinds.items() if alpha]
    if not kinds:
        return images, labels
    # torchvision pairs neighbours, which here are of one copy of the data.
    order = torch.randperm(len(images), device=images.device)
    return transforms.RandomChoice(kinds)(images[order], labels[order])


# ---------------------------------------------------------------- what is said and written


def parse_flags(script, description, flags, argv, **defaults):
    """The arguments of a script, by a sentence to stderr if wrong; None where none is given and
    there is no default.

    flags: rows (group, flag, what its value is called, kind, help). kind: a function of the text,
    a list of choices, bool for a flag without value, or how many there are ("?" or "+") of what
    comes without a flag. What Jupyter adds to sys.argv is dropped.
    """
    parser = argparse.ArgumentParser(script, argparse.SUPPRESS, description, allow_abbrev=False)
    groups = {group: parser.add_argument_group(group) for group, *_ in flags}
    for group, flag, metavar, kind, text in flags:
        key = {list: "choices", str: "nargs"}.get(type(kind), "type")
        values = {key: kind, "metavar": metavar}
        if kind is bool:
            values = {"action": "store_true", "default": None}
        groups[group].add_argument(flag, help=text, **values)
    parser.set_defaults(**defaults)
    if argv is None:
        argv = sys.argv[1:]
        if "ipykernel" in sys.modules:  # it brings -f .../kernel-1234.json, and may bring more
            argv = [x for x in argv if x != "-f" and not (x.endswith(".json") and "kernel" in x)]
            argv = [] if "kernel_launcher" in sys.argv[0] else argv
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        known = [flag for _, flag, *_ in flags if flag.startswith("--")]
        close = difflib.get_close_matches(unknown[0].split("=")[0], known, 1)
        hint = f"did you mean {close[0]}?" if close else "--help lists them all"
        parser.error(f"unknown argument {unknown[0]}: {hint}")
    return args


@contextmanager
def sentences(script, quiet=False, interrupted="interrupted"):
    """End the process with one sentence on what goes wrong inside: with status 2 where the flags or
    the data are wrong, 1 where the work failed (unsaid if quiet, for processes that agree on it).
    """
    with suppress(AttributeError):  # a notebook's has neither that nor letters that it can't show
        sys.stdout.reconfigure(errors="replace")
    try:
        yield
        sys.stdout.flush()
        return
    except BrokenPipeError:  # as of | head: what is printed from here on goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        message, status = None, 1
    except (ValueError, OSError) as error:
        message, status = error, 2
    except Failed as error:
        message, status = None if quiet else error, 1
    except KeyboardInterrupt:
        message, status = interrupted, 1
    except (RuntimeError, MemoryError) as error:
        message, status = explained(error), 1
    if message:
        print(f"{script}: error: {one_sentence(message)}", file=sys.stderr)
    raise SystemExit(status)


def explained(error):
    """A sentence for what torch can only stumble over; other errors are raised again."""
    text = str(error).lower()
    if isinstance(error, MemoryError) or re.search("(out of|enough|allocate) memory", text):
        return "out of memory: try a smaller network, or train.py's --batch-size or --size"
    if re.search("connection closed|reset by peer|broken pipe|timed out", text):
        return "another process of this run ended; --resume goes on after a finished epoch"
    if re.search("(torch.compile|dynamo) .*support", text):  # a Python too new for this torch
        return f"{error}: leave --compile out"
    if re.search("compiler|triton", text):
        return "--compile needs a C++ compiler, on a GPU triton: leave it out, or install one"
    raise error


def number(kind, expected, fits):
    """An argparse type: a number for which fits(number) is true, else a sentence."""

    def parse(text):
        with suppress(ValueError):
            if fits(value := kind(text)):
                return value
        raise argparse.ArgumentTypeError(f"{text!r} should be {expected}")

    return parse


def at_least(low):
    """An argparse type: a whole number from `low` on."""
    return number(int, f"a whole number, {low} or more", lambda x: x >= low)


SIDE = number(int, f"a whole number of pixels from {SMALLEST} to {LARGEST}",
              lambda x: SMALLEST <= x <= LARGEST)  # fmt: skip


def one_sentence(text):
    """What may hold names or words of somebody else's file, as one line of printable characters."""
    words = " ".join(word[:200] for word in str(text)[:10_000].split())
    return "".join(x if x.isprintable() else "?" for x in words)


def listed(items, most=5, width=60):
    """'a, b, c and 7 more'"""
    more = f" and {len(items) - most:,} more" if len(items) > most else ""
    return ", ".join(str(item)[:width] for item in items[:most]) + more


class Progress:
    """One line that rewrites itself, at most every half second; every five seconds in a log file
    and in a notebook (also from a process that it started), which keep all that was ever shown.
    """

    def __init__(self, what="", total=None):
        self.pause = 0.5 if sys.stdout.isatty() and "JPY_PARENT_PID" not in os.environ else 5
        self.what, self.of = what, f" of {total:,}" if total else ""
        self.start = self.last = time.monotonic()
        self.done = self.width = 0

    def add(self, count):
        """So many more are done."""
        self.done += count
        self.show(f"{self.what} {self.done:,}{self.of} · {self.speed():,.0f} a second")

    def speed(self):
        return self.done / max(time.monotonic() - self.start, 1e-9)

    def show(self, text):
        now = time.monotonic()
        if now - self.last > self.pause:
            self.last, self.width = now, max(self.width, len(text))
            print("\r" + text.ljust(self.width), end="", flush=True)

    def close(self):
        """Leave an empty line for what comes next."""
        if self.width:
            print("\r" + " " * self.width, end="\r", flush=True)


def write_file(path, write):
    """Have write(buffer) give a file's content; write it beside path, flush it, rename it to path.

    So path holds either what it held before or all of the new content, whatever happens. Failed
    where it can't be written, and never what torch.save makes of a full disk.
    """
    path, buffer = Path(path), io.BytesIO()
    write(buffer)
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(buffer.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        reason = f"{error.strerror or error}; what it held before, if anything, is kept"
        raise Failed(f"{path} can't be written: {reason}") from error
    finally:
        with suppress(OSError):  # there is none any more where all went well
            temporary.unlink()


def write_picture(path, picture, what=""):
    """A PNG file of a Pillow picture, written whole or not at all; what it shows is said."""
    write_file(path, lambda file: picture.save(file, "PNG"))
    if what:
        print(f"wrote {path}: {what}")


@contextmanager
def claimed(folder):
    """Keep a folder to one run, by a lock that ends with the process, however that ends; it is made
    if need be, and removed if nothing comes into it. ValueError where another run has it.
    """
    folder = Path(folder)
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"--out {folder} is a file: name a folder")
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder, os.O_RDONLY) if fcntl else None
    try:
        if fcntl:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                busy = f"another run writes to {folder}: wait for its end, or name another --out"
                raise ValueError(busy) from None
            except OSError:  # a file system without locks
                pass
        yield
    finally:
        if fcntl:
            os.close(handle)
        with suppress(OSError):  # the first folder that holds something ends it
            for path in made:
                path.rmdir()


def require_apart(folder, dataset):
    """ValueError where a run would write among its own pictures, and so change the data."""
    names = [*dataset.files, *dataset.test_files, "labels.csv"]
    holding = {Path(dataset.source, name).parent for name in names}
    if dataset.files and Path(folder).resolve() in {path.resolve() for path in holding}:
        raise ValueError(f"--out {folder} holds the data itself: name another folder")


def check_out(path, suffix=".png"):
    """ValueError where no such file can be written: before the work, not after it."""
    if Path(path).is_dir():
        raise ValueError(f"--out {path} is a folder: name a file")
    if Path(path).suffix.lower() != suffix:
        raise ValueError(f"--out {path} should be a {suffix} file")
    if not Path(path).parent.is_dir():
        raise ValueError(f"--out {path}: there is no folder {Path(path).parent}")
    if Path(path).name == "labels.csv":
        raise ValueError(f"--out {path}: a data set's answers have this name, choose another")


def set_aside(*paths):
    """Move what an earlier run left at these paths of one folder into earlier-1/, and say so;
    ValueError where one is a folder that another run is writing to.
    """
    there = [path for path in map(Path, paths) if os.path.lexists(path)]
    for path in filter(Path.is_dir, there):
        with claimed(path):
            pass
    if there:
        asides = (there[0].parent / f"earlier-{number}" for number in itertools.count(1))
        aside = next(path for path in asides if not path.exists())
        aside.mkdir()
        for path in there:
            path.rename(aside / path.name)
        print(f"{', '.join(path.name for path in there)} of an earlier run moved to {aside}/")


def blank(width, height, title, size=13):
    """(a white Pillow picture under a title, what draws on it in letters of this size)"""
    canvas = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(canvas)
    draw.font = ImageFont.load_default(size)
    draw.text((size, size), title, "black", ImageFont.load_default(size * 4 // 3))
    return canvas, draw


def sheet(images, captions, columns, title, least=96):
    """A labelled contact sheet as a Pillow picture.

    images: uint8 tensors [3, H, W] of one shape; captions: a string each, of several lines if it
    has line breaks. Pictures are enlarged by a whole number, to at least `least` px of height.
    """
    small, large = ImageFont.load_default(13), ImageFont.load_default(17)  # as blank()'s
    height, width = images[0].shape[-2:]
    factor = max(1, -(-least // height))
    height, width = height * factor, width * factor
    lines = max(caption.count("\n") + 1 for caption in captions)
    wide = max([width, *(small.getlength(line) for c in captions for line in c.split("\n"))])
    cell, row = int(wide) + 16, height + 18 * lines + 10
    wide = max(cell * columns + 12, int(large.getlength(title)) + 26)
    canvas, draw = blank(wide, 44 + row * -(-len(images) // columns), title)
    for i, (image, caption) in enumerate(zip(images, captions)):
        x, y = 12 + cell * (i % columns), 44 + row * (i // columns)
        picture = Image.fromarray(image.permute(1, 2, 0).numpy())
        canvas.paste(picture.resize((width, height), Image.Resampling.NEAREST), (x, y))
        draw.multiline_text((x, y + height + 2), caption, "black", spacing=3)
    return canvas


def strip(images, places):
    """uint8 [3, S, W]: up to `places` pictures [3, S, S] side by side, a white px between."""
    side = images.shape[-1]
    row = images.new_full((places, 3, side, side + 1), 255)
    row[: len(images), ..., :side] = images[:places]
    return row.permute(1, 2, 0, 3).flatten(2)[..., :-1]


# ---------------------------------------------------------------- what is there, before training


def print_duplicates(dataset):
    """What is there several times, to the pixel, and what of it in the test part or two classes."""
    answers = [dataset.classes[label] for label in dataset.labels.tolist()]
    names = [*zip(dataset.ids, answers), *((i, None) for i in dataset.test_ids)]
    by_content = {}
    halves = [half for half in (dataset.images, dataset.test_images) if half is not None]
    for name, image in zip(names, (image for half in halves for image in half.numpy())):
        by_content.setdefault(hashlib.blake2b(image.tobytes()).digest(), []).append(name)
    groups = [group for group in by_content.values() if len(group) > 1]
    found = {
        "pictures are there several times": groups,
        "of them in the test part too": [g for g in groups if len({a is None for _, a in g}) > 1],
        "of them with several labels": [g for g in groups if len({a for _, a in g if a}) > 1],
    }
    print("doubled" + ("" if groups else "     none: no two pictures are the same to the pixel"))
    for what, some in found.items():
        if some:
            shown = [" = ".join(f"{i} ({answer or 'test'})" for i, answer in g[:3]) for g in some]
            print(f"  {len(some):>6,}    {what}: {listed(shown, 2)}")


def print_survey(dataset):
    """Layout, counts, classes, sizes, balance, mean and std, duplicates."""
    counts = dataset.labels.bincount(minlength=len(dataset.classes))
    low, high = int(counts.min()), int(counts.max())
    balance = f"{high:,} pictures each"
    if low < high:
        least, most = (dataset.classes[int(i)] for i in (counts.argmin(), counts.argmax()))
        balance = f"from {low:,} ({least}) to {high:,} ({most}) pictures"
    test, answers = len(dataset.test_ids), "" if dataset.test_labels is None else ", with answers"
    val = "none of its own" if dataset.is_val is None else f"{int(dataset.is_val.sum()):,} of these"
    side = dataset.images.shape[-1]
    sizes = dataset.sizes or Counter({(side, side): len(dataset.images)})
    everything = torch.arange(len(dataset.labels))
    mean, std = (" ".join(f"{x:.3f}" for x in xs) for xs in statistics(dataset.images, everything))
    print(
        f"data        {dataset.source} ({dataset.layout})\n"
        f"labelled    {len(dataset.labels):,} pictures\n"
        f"validation  {val}\n"
        f"test        {test:,} pictures{answers}\n"
        f"classes     {len(dataset.classes):,}: {listed(dataset.classes, 10)}\n"
        f"balance     {balance}\n"
        f"sizes       {sizes_listed(sizes)}, read as {side}x{side}\n"
        f"mean        {mean} (red, green, blue of the labelled, from 0 to 1)\n"
        f"std         {std}"
    )
    print_duplicates(dataset)


def draw_classes(dataset, most=48, places=4):
    """A sheet of a few pictures a class, of at most so many classes, spread over all of them."""
    count = len(dataset.classes)
    shown = [i * count // min(most, count) for i in range(min(most, count))]
    mine = [(dataset.labels == k).nonzero().flatten() for k in shown]
    strips = [strip(dataset.images[some[:places]], places) for some in mine]
    captions = [f"{dataset.classes[k]:.30} ({len(some):,})" for k, some in zip(shown, mine)]
    title = f"{len(shown)} of {count} classes, {places} pictures of each (how many there are)"
    return sheet(strips, captions, columns=min(4, len(shown)), title=title, least=64)


# Group, flag, what its value is called, how many there are or its type, help.
FLAGS = [
    ("arguments", "data", "PATH", "?", "folder, archive, cifar10, cifar100 or demo (default: the "
     "one data set below data/ or /kaggle/input/, else the demo)"),
    ("arguments", "--size", "S", SIDE, "resize pictures to S x S pixels (default: their own)"),
    ("arguments", "--limit", "N", at_least(2), "at most N labelled pictures, each class its share"),
    ("arguments", "--out", "FILE", str, "default: data.png"),
]  # fmt: skip


def parse_args(argv=None):
    about = "Say what a data set holds before anything is trained on it: python data.py PATH"
    return parse_flags("data.py", about, FLAGS, argv, out="data.png")


def main(argv=None):
    args = parse_args(argv)
    with sentences("data.py"):
        check_out(args.out)
        dataset = load(args.data, args.size, args.limit)
        print_survey(dataset)
        set_aside(args.out)
        write_picture(args.out, draw_classes(dataset), "a few pictures a class")


if __name__ == "__main__":
    main()
