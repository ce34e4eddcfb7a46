"""Batched augmentations and the small grammar that says which copies a training set is made of.

    pipelines = parse("clean+hflip:0.5,vflip:0.5,gray:0.1")   # the report's final set: two copies
    images = pipelines[1](images, generator)                  # float [B, 3, H, W] in [0, 1]

`+` concatenates copies of the data set, `,` composes augmentations inside a copy, `=` gives a
strength and `:` a probability, each with its usual default. `clean` is a copy left as it is.
A pipeline works on a whole batch on its own device and draws for each picture on its own.

    python augment.py clean+hflip,gray      # draws a sheet of before and after: augment.png
"""

import argparse
import difflib
import sys
from typing import Callable, NamedTuple, Optional

import torch
from torchvision.transforms.v2 import functional as tv

REPORT_MIX = "clean+hflip:0.5,vflip:0.5,gray:0.1"


class Augmentation(NamedTuple):
    """apply(images, generator, strength) -> images changes every picture of a batch."""

    apply: Callable
    probability: float  # by default; torchvision's
    strength: Optional[float] = None  # by default; None: it takes none


def hflip(images, generator, strength):
    """Left becomes right."""
    return images.flip(-1)


def vflip(images, generator, strength):
    """Top becomes bottom."""
    return images.flip(-2)


def gray(images, generator, strength):
    """Luma in all three channels (ITU-R 601, as torchvision weighs them)."""
    return tv.rgb_to_grayscale(images, num_output_channels=3)


# A new augmentation is one function above and one line here.
AUGMENTATIONS = {
    "hflip": Augmentation(hflip, 0.5),
    "vflip": Augmentation(vflip, 0.5),
    "gray": Augmentation(gray, 0.1),
}


class Step(NamedTuple):
    """One augmentation as the mix asks for it."""

    name: str
    probability: float
    strength: Optional[float]

    def __call__(self, images, generator):
        changed = AUGMENTATIONS[self.name].apply(images, generator, self.strength)
        draws = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device)
        return torch.where(draws < self.probability, changed, images)

    def __str__(self):
        strength = "" if self.strength is None else f"={self.strength:g}"
        return f"{self.name}{strength}:{self.probability:g}"


class Pipeline:
    """The steps of one copy, in order; none is the clean copy.

    Called with images (float [B, 3, H, W] in [0, 1]) and a torch.Generator on their device, it
    gives the same shape and range, and doesn't write into what it was given.
    """

    def __init__(self, steps=()):
        self.steps = list(steps)

    def __call__(self, images, generator):
        for step in self.steps:
            images = step(images, generator)
        return images

    def __str__(self):
        return ",".join(map(str, self.steps)) or "clean"


def parse(mix):
    """The pipelines of a mix, one a copy of the data; a ValueError says what is wrong with it."""
    return [
        Pipeline() if copy.strip() == "clean" else Pipeline(map(parse_step, copy.split(",")))
        for copy in mix.split("+")
    ]


def parse_step(text):
    """'rotate=15:0.5' -> Step('rotate', probability=0.5, strength=15.0)"""
    rest, colon, probability = text.strip().partition(":")
    name, equals, strength = rest.partition("=")
    if name not in AUGMENTATIONS:
        close = difflib.get_close_matches(name, AUGMENTATIONS, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        clean = " (clean stands alone between two +)" if name == "clean" else ""
        known = ", ".join(AUGMENTATIONS)
        raise ValueError(f"unknown augmentation {name!r}{clean}: {hint}there are {known}")
    default = AUGMENTATIONS[name]
    if equals and default.strength is None:
        raise ValueError(f"{name} takes no strength: {text!r} should be {name} or {name}:0.5")
    try:
        step = Step(
            name,
            float(probability) if colon else default.probability,
            float(strength) if equals else default.strength,
        )
    except ValueError:
        raise ValueError(f"{text!r} should read name, name:0.5, name=15 or name=15:0.5") from None
    if not 0 <= step.probability <= 1:
        raise ValueError(f"the probability in {text!r} should be between 0 and 1")
    return step


# ---------------------------------------------------------------- the sheet


def draw_sheet(images, pipelines, seed=0):
    """(pictures, captions, columns) of a sheet with one row a picture: the picture, each step of
    the mix applied for sure, then each augmented copy twice as training would draw it.
    """
    generator = torch.Generator().manual_seed(seed)
    images = images.float() / 255
    columns = [("before", images)]
    for step in dict.fromkeys(step for pipeline in pipelines for step in pipeline.steps):
        columns.append((f"{step.name} alone", step._replace(probability=1.0)(images, generator)))
    for number, pipeline in enumerate(pipelines, start=1):
        if pipeline.steps:
            for draw in "ab":
                columns.append((f"copy {number}, draw {draw}", pipeline(images, generator)))
    pictures = [picture for row in zip(*(column for _, column in columns)) for picture in row]
    return pictures, [caption for caption, _ in columns] * len(images), len(columns)


def parse_args(argv=None):
    import data

    parser = argparse.ArgumentParser(
        prog="augment.py",
        usage=argparse.SUPPRESS,
        description="Draw what a mix of augmentations does to pictures: python augment.py MIX",
        allow_abbrev=False,
    )
    parser.add_argument(
        "mix", metavar="MIX", nargs="?", default=REPORT_MIX, help=f"default: {REPORT_MIX}"
    )
    parser.add_argument("--data", metavar="PATH", help="where pictures come from, as in train.py")
    parser.add_argument("--out", metavar="FILE", default="augment.png", help="default: augment.png")
    return data.parse_flags(parser, argv)


def main(argv=None):
    import data

    args = parse_args(argv)
    try:
        pipelines = parse(args.mix)
        data.check_out(args.out)
        dataset = data.load(args.data, limit=100, test=False)
        first = {label: i for i, label in reversed(list(enumerate(dataset.labels.tolist())))}
        images = dataset.images[list(first.values())[:6]]
        sheet = data.sheet(*draw_sheet(images, pipelines), title=f"--augment {args.mix}")
        data.set_aside(args.out)
        data.write_file(args.out, lambda file: sheet.save(file, "PNG"))
    except (ValueError, OSError) as error:
        print(f"augment.py: error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    print(f"wrote {args.out}: {len(images)} pictures, before and after")


if __name__ == "__main__":
    main()
