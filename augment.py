"""Batched augmentations and the small grammar that says which copies a training set is made of.

    pipelines = parse("clean+hflip:0.5,vflip:0.5,gray:0.1")   # the report's final set: two copies
    images = pipelines[1](images, generator)                  # float [B, 3, H, W] in [0, 1]

`+` concatenates copies of the data set, `,` composes augmentations inside a copy, `=` gives a
strength and `:` a probability, each with its usual default. `clean` is a copy left as it is.
A pipeline works on a whole batch on its own device and draws for each picture on its own.

    python augment.py clean+hflip,gray      # draws a sheet of before and after: augment.png
"""

import difflib
import math
from typing import Callable, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torchvision.transforms.v2 import functional as tv

IMMEDIATE = ["cpu"]  # devices whose results, such as the number of hits, needn't be waited for
REPORT_MIX = "clean+hflip:0.5,vflip:0.5,gray:0.1"


class Augmentation(NamedTuple):
    """apply(images, generator, strength) -> images changes every picture of a batch."""

    apply: Callable
    probability: float  # by default; torchvision's
    strength: Optional[float] = None  # by default; None: it takes none
    highest: float = math.inf  # strength; the lowest is 0
    meaning: str = ""  # of the strength


# ---------------------------------------------------------------- geometry
# Each draws its parameters for all pictures at once, as torchvision's transform of the same name
# draws them for one, and says for every pixel of the result where in the picture it comes from.


def warp(images, x, y):
    """Each picture at its own coordinates x, y in pixels, [B, H, W]: bilinear, black outside."""
    height, width = images.shape[-2:]
    grid = torch.stack([(2 * x + 1) / width - 1, (2 * y + 1) / height - 1], dim=-1)
    grid.nan_to_num_(2.0).clamp_(-2, 2)  # black where corners that met leave a place undefined
    return F.grid_sample(images, grid, align_corners=False).clamp_(0, 1)


def pixels(images):
    """The coordinates x [1, 1, W] and y [1, H, 1] of a picture's pixels."""
    y, x = (torch.arange(side, device=images.device).float() for side in images.shape[-2:])
    return x.view(1, 1, -1), y.view(1, -1, 1)


def uniform(low, high, shape, images, generator):
    """Random numbers on the device of the images."""
    return low + (high - low) * torch.rand(shape, generator=generator, device=images.device)


def reflected(places, side):
    """Whole places along a side, those beyond an edge reflected at it (2 1 | 0 1 2 | 1 0)."""
    period = max(1, 2 * (side - 1))
    return torch.minimum(places % period, -places % period)


def shift(images, generator, strength):
    """Moved by up to so many whole pixels along each side; the edge reflects."""
    (count, channels, height, width), strength = images.shape, int(strength)
    moved = (uniform(0, 1, (2, count, 1), images, generator) * (2 * strength + 1)).floor().long()
    x, y = (p.flatten() - strength for p in pixels(images))
    x, y = reflected(x + moved[0], width).long(), reflected(y + moved[1], height).long()
    places = (y[:, None, :, None] * width + x[:, None, None, :]).expand(-1, channels, -1, -1)
    return images.flatten(2).gather(2, places.flatten(2)).view_as(images)


def elastic(images, generator, strength):
    """A random field of displacements, blurred (Simard et al. 2003)."""
    x, y = pixels(images)
    shift_x, shift_y = draw_displacements(images, generator, strength)
    return warp(images, x + shift_x, y + shift_y)


def draw_displacements(images, generator, alpha, sigma=5.0):
    """[2, B, H, W] in pixels along x and y: noise in -1 to 1, blurred by sigma, times alpha / 2."""
    (count, _, height, width), device = images.shape, images.device
    noise = uniform(-1, 1, (2, count, height, width), images, generator)
    blurred = blur(height, sigma, device) @ noise @ blur(width, sigma, device).T
    blurred[0] *= alpha / height * width / 2
    blurred[1] *= alpha / width * height / 2
    return blurred


def blur(side, sigma, device):
    """Gaussian blur along one side as a matrix [side, side]; the edge reflects, as often as the
    window of 8 sigma asks for (torchvision's padding can't reflect twice, as 16 pixels need).
    """
    offsets = torch.arange(-int(4 * sigma), int(4 * sigma) + 1, device=device)
    weights = torch.softmax(-(offsets**2) / (2 * sigma**2), dim=0)
    source = reflected(torch.arange(side, device=device)[:, None] + offsets, side)
    return torch.zeros(side, side, device=device).scatter_add_(1, source, weights.expand(side, -1))


def perspective(images, generator, strength):
    """Seen from the side: each corner moves inwards by a random part of half the picture."""
    return warp_perspective(images, draw_corners(images, generator, strength))


def draw_corners(images, generator, distortion):
    """[B, 4, 2]: where the corners go, clockwise from top left, in whole pixels (x, y)."""
    height, width = images.shape[-2:]
    corners = torch.tensor([[0, 0], [1, 0], [1, 1], [0, 1]], device=images.device)
    sides = torch.tensor([width, height], device=images.device)
    furthest = (distortion * (sides // 2).double()).int() + 1
    moved = (uniform(0, 1, (len(images), 4, 2), images, generator) * furthest).floor()
    return torch.where(corners == 1, sides - 1 - moved, moved)


def warp_perspective(images, corners):
    """Pictures whose corners come to lie at `corners` [B, 4, 2]."""
    height, width = images.shape[-2:]
    x, y = corners.double().unbind(-1)  # of the result: [B, 4]
    u = x.new_tensor([0, width - 1, width - 1, 0]).expand_as(x)  # of the picture
    v = x.new_tensor([0, 0, height - 1, height - 1]).expand_as(x)
    # u = (a x + b y + c) / (g x + h y + 1) and v = (d x + e y + f) / (g x + h y + 1) at the four
    # corners: eight linear equations for the eight coefficients.
    one, zero = torch.ones_like(x), torch.zeros_like(x)
    for_u = torch.stack([x, y, one, zero, zero, zero, -u * x, -u * y], dim=-1)
    for_v = torch.stack([zero, zero, zero, x, y, one, -v * x, -v * y], dim=-1)
    system = torch.cat([for_u, for_v], dim=1)
    solution, _ = torch.linalg.solve_ex(system, torch.cat([u, v], dim=1))  # _ex: waits for no GPU
    a, b, c, d, e, f, g, h = solution.float().T[:, :, None, None]
    x, y = pixels(images)
    x, y = x + 0.5, y + 0.5  # torchvision takes the corners' numbers as places between pixels
    depth = g * x + h * y + 1
    return warp(images, (a * x + b * y + c) / depth - 0.5, (d * x + e * y + f) / depth - 0.5)


def rotate(images, generator, strength):
    """By up to so many degrees either way, about the centre."""
    return warp_rotated(images, uniform(-strength, strength, len(images), images, generator))


def warp_rotated(images, degrees):
    """Pictures turned anticlockwise by `degrees` [B]."""
    height, width = images.shape[-2:]
    x, y = pixels(images)
    x, y = x - (width - 1) / 2, y - (height - 1) / 2
    angle = torch.deg2rad(degrees).view(-1, 1, 1)
    cos, sin = angle.cos(), angle.sin()
    return warp(images, cos * x - sin * y + (width - 1) / 2, sin * x + cos * y + (height - 1) / 2)


def resizedcrop(images, generator, strength):
    """A part of the picture, of at least this share of its area, enlarged to the whole."""
    return warp_crops(images, *draw_crops(images, generator, strength))


def draw_crops(images, generator, least):
    """left, top, width, height, each [B] in whole pixels: area between `least` and all of it, the
    sides' ratio between 3/4 and 4/3; ten tries as in torchvision, then all that the ratio allows.
    """
    (count, _, height, width), tries = images.shape, (10, len(images))
    area = uniform(least, 1, tries, images, generator) * height * width
    ratio = uniform(math.log(3 / 4), math.log(4 / 3), tries, images, generator).exp()
    w, h = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
    fits = (w > 0) & (w <= width) & (h > 0) & (h <= height)
    first = fits.int().argmax(0, keepdim=True)  # the first that fits
    fits = fits.any(0)
    w = torch.where(fits, w.gather(0, first)[0], min(width, round(height * 4 / 3)))
    h = torch.where(fits, h.gather(0, first)[0], min(height, round(width * 4 / 3)))
    left = (uniform(0, 1, count, images, generator) * (width - w + 1)).floor()
    top = (uniform(0, 1, count, images, generator) * (height - h + 1)).floor()
    return left, top, w, h


def warp_crops(images, left, top, width, height):
    """Crops [B] in pixels, enlarged; what lies outside a crop doesn't shine into it."""
    left, top, width, height = (t.view(-1, 1, 1) for t in (left, top, width, height))
    x, y = pixels(images)
    x = ((x + 0.5) * width / images.shape[-1] - 0.5).clamp_min(0).minimum(width - 1)
    y = ((y + 0.5) * height / images.shape[-2] - 0.5).clamp_min(0).minimum(height - 1)
    return warp(images, *torch.broadcast_tensors(left + x, top + y))


# A new augmentation is one function above and one line here. Probabilities and strengths are
# torchvision's; it has none for the rotation, nor does the report: 15 degrees are ours. The
# shift isn't the report's; 4 pixels are what everyone takes for pictures of this size.
AUGMENTATIONS = {
    "hflip": Augmentation(lambda images, *_: images.flip(-1), 0.5),
    "vflip": Augmentation(lambda images, *_: images.flip(-2), 0.5),
    "gray": Augmentation(lambda images, *_: tv.rgb_to_grayscale(images, 3), 0.1),  # ITU-R 601 luma
    "invert": Augmentation(lambda images, *_: 1 - images, 0.5),
    "equalize": Augmentation(lambda images, *_: tv.equalize(images), 0.5),  # a flat histogram
    "elastic": Augmentation(elastic, 1.0, 50.0, 1000, "displacement"),
    "perspective": Augmentation(perspective, 0.5, 0.5, 1, "distortion"),
    "rotate": Augmentation(rotate, 1.0, 15.0, 180, "degrees"),
    "resizedcrop": Augmentation(resizedcrop, 1.0, 0.08, 1, "least share of the area"),
    "shift": Augmentation(shift, 1.0, 4.0, 16, "pixels"),
}


class Step(NamedTuple):
    """One augmentation as the mix asks for it."""

    name: str
    probability: float
    strength: Optional[float]

    def __call__(self, images, generator):
        apply, strength = AUGMENTATIONS[self.name].apply, self.strength
        hit = torch.rand(len(images), generator=generator, device=images.device) < self.probability
        if images.device.type not in IMMEDIATE:
            return torch.where(hit.view(-1, 1, 1, 1), apply(images, generator, strength), images)
        chosen = hit.nonzero().flatten()
        changed = apply(images.index_select(0, chosen), generator, strength)
        return images.index_copy(0, chosen, changed)

    def __str__(self):
        strength = "" if self.strength is None else f"={self.strength:g}"
        return f"{self.name}{strength}:{self.probability:g}"


class Pipeline:
    """The steps of one copy, in order; none is the clean copy.

    Called with images (float [B, 3, H, W] in [0, 1]) and a torch.Generator on their device, it
    gives the same shape and range, and doesn't write into what it was given.
    """

    def __init__(self, steps):
        self.steps = list(steps)

    def __call__(self, images, generator):
        for step in self.steps:
            images = step(images, generator)
        return images

    def __str__(self):
        return ",".join(map(str, self.steps)) or "clean"


def parse(mix):
    """The pipelines of a mix, one a copy of the data; a ValueError says what is wrong with it."""
    copies = [[] if copy.strip() == "clean" else copy.split(",") for copy in mix.split("+")]
    return [Pipeline(map(parse_step, steps)) for steps in copies]


def parse_step(text):
    """'rotate=15:0.5' -> Step('rotate', probability=0.5, strength=15.0)"""
    rest, colon, probability = text.strip().partition(":")
    name, equals, strength = rest.partition("=")
    if name not in AUGMENTATIONS:
        known = ["clean", *AUGMENTATIONS]
        close = difflib.get_close_matches(name, known, 1)
        hint = f"did you mean {close[0]}? " if close else ""
        hint = "clean stands alone between two +; " if name == "clean" else hint
        raise ValueError(f"unknown augmentation {name!r}: {hint}there are {', '.join(known)}")
    default = AUGMENTATIONS[name]
    if equals and default.strength is None:
        raise ValueError(f"{name} takes no strength: {text!r} should be {name} or {name}:0.5")
    try:
        probability = float(probability) if colon else default.probability
        strength = float(strength) if equals else default.strength
    except ValueError:
        raise ValueError(f"{text!r} should read name, name:0.5, name=15 or name=15:0.5") from None
    if not 0 <= probability <= 1:
        raise ValueError(f"the probability in {text!r} should be between 0 and 1")
    if equals and not 0 <= strength <= default.highest:
        raise ValueError(f"the {default.meaning} in {text!r} should be 0 to {default.highest}")
    if equals and default.meaning == "pixels" and strength % 1:
        raise ValueError(f"the pixels in {text!r} should be a whole number")
    return Step(name, probability, strength)


# ---------------------------------------------------------------- the sheet


def draw_sheet(images, pipelines, seed=0):
    """(pictures, captions, columns) of a sheet with one row a picture: the picture, each step of
    the mix applied for sure, then each augmented copy twice as training would draw it.
    """
    generator, images = torch.Generator().manual_seed(seed), images.float() / 255
    columns = [("before", images)]
    for step in dict.fromkeys(step for pipeline in pipelines for step in pipeline.steps):
        columns.append((f"{step.name} alone", step._replace(probability=1.0)(images, generator)))
    for number, pipeline in enumerate(pipelines, start=1):
        if pipeline.steps:
            for draw in "ab":
                columns.append((f"copy {number}, draw {draw}", pipeline(images, generator)))
    captions, pictures = zip(*columns)
    pictures = (torch.stack(pictures, dim=1).flatten(0, 1) * 255).round().byte()
    return pictures, captions * len(images), len(columns)


def parse_args(argv=None):
    import data

    about = "Draw what a mix of augmentations does to pictures: python augment.py MIX"
    flags = [  # group, flag, what its value is called, how many there are or its type, help
        ("arguments", "mix", "MIX", "?", f"default: {REPORT_MIX}"),
        ("arguments", "--data", "PATH", str, "where pictures come from, as in train.py"),
        ("arguments", "--size", "S", data.SIDE, "resize pictures to S x S pixels"),
        ("arguments", "--out", "FILE", str, "default: augment.png"),
    ]
    return data.parse_flags("augment.py", about, flags, argv, mix=REPORT_MIX, out="augment.png")


def main(argv=None):
    import data

    args = parse_args(argv)
    with data.sentences("augment.py"):
        pipelines = parse(args.mix)
        data.check_out(args.out)
        dataset = data.load(args.data, args.size, limit=100, test=False)
        first = {label: i for i, label in reversed(list(enumerate(dataset.labels.tolist())))}
        images = dataset.images[list(first.values())[:6]]
        data.set_aside(args.out)
        sheet = data.sheet(*draw_sheet(images, pipelines), title=f"--augment {args.mix}")
        data.write_picture(args.out, sheet, f"{len(images)} pictures, before and after")


if __name__ == "__main__":
    main()
