"""The augmentations against torchvision's own, and the grammar of mixes."""

import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torchvision import transforms
from torchvision.transforms.v2 import functional as tv
from torchvision.transforms.v2.functional import pil_to_tensor

import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hflip", tv.horizontal_flip),
        ("vflip", tv.vertical_flip),
        ("gray", lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
        ("invert", tv.invert),
        ("equalize", tv.equalize),
    ],
)
def test_each_does_what_torchvision_does_to_one_picture(name, expected):
    dark = torch.randint(40, 90, (8, 3, 21, 34)) / 255  # for equalize to have something to do
    images = torch.cat([torch.rand(8, 3, 21, 34), dark])
    (pipeline,) = augment.parse(f"{name}:1")
    changed = pipeline(images, generator())
    for before, after in zip(images, changed):
        assert torch.allclose(after, expected(before), atol=1e-6)


def test_equalize_is_pillows_too():
    images = torch.randint(40, 90, (4, 3, 30, 30), dtype=torch.uint8)
    (pipeline,) = augment.parse("equalize:1")
    for before, after in zip(images, pipeline(images / 255, generator())):
        picture = ImageOps.equalize(Image.fromarray(before.permute(1, 2, 0).numpy()))
        assert torch.equal((after * 255).round().to(torch.uint8), pil_to_tensor(picture))


SIZES = [(40, 40), (24, 33), (16, 16)]


def singly(function, images, *parameters):
    """function, one of torchvision's, on each picture with its own parameters."""
    return torch.stack([function(*each) for each in zip(images, *parameters)])


@pytest.mark.parametrize(("height", "width"), SIZES)
def test_given_the_same_parameters_the_geometry_is_torchvisions(height, width):
    images = torch.rand(64, 3, height, width)
    corners = augment.draw_corners(images, generator(), 0.5)
    start = [[0, 0], [width - 1, 0], [width - 1, height - 1], [0, height - 1]]
    expected = singly(
        lambda x, c: tv.perspective(x, start, c.int().tolist(), fill=None), images, corners
    )
    assert torch.allclose(augment.warp_perspective(images, corners), expected, atol=1e-4)

    degrees = torch.linspace(-180, 180, 64)
    bilinear = tv.InterpolationMode.BILINEAR
    expected = singly(lambda x, d: tv.rotate(x, float(d), bilinear), images, degrees)
    assert torch.allclose(augment.warp_rotated(images, degrees), expected, atol=1e-4)

    crops = augment.draw_crops(images, generator(), 0.08)
    expected = singly(
        lambda x, left, top, w, h: tv.resized_crop(
            x, int(top), int(left), int(h), int(w), [height, width], antialias=True
        ),
        images,
        *crops,
    )
    assert torch.allclose(augment.warp_crops(images, *crops), expected, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), SIZES[:2])
def test_given_the_same_noise_elastic_is_torchvisions(height, width):
    images = torch.rand(16, 3, height, width)
    noise = torch.rand(2, 16, height, width, generator=generator(5)) * 2 - 1
    blurred = tv.gaussian_blur(noise, [41, 41], [5.0, 5.0])
    displacement = torch.stack([blurred[0] * 50 / height, blurred[1] * 50 / width], dim=-1)
    expected = singly(lambda x, d: tv.elastic(x, d[None], fill=None), images, displacement)
    x, y = augment.pixels(images)
    shift = augment.draw_displacements(images, generator(5), 50.0)
    assert torch.allclose(augment.warp(images, x + shift[0], y + shift[1]), expected, atol=1e-4)
    ours = augment.elastic(images, generator(5), 50.0)
    assert torch.equal(ours, augment.warp(images, x + shift[0], y + shift[1]))


def furthest_apart(a, b):
    """The Kolmogorov-Smirnov distance of two samples: 0 alike, 1 apart."""
    points = torch.cat([a, b]).sort().values
    return max(
        abs((a <= point).double().mean() - (b <= point).double().mean()) for point in points[::20]
    )


def test_the_parameters_are_drawn_as_torchvision_draws_them():
    torch.manual_seed(0)
    count, side = 3000, 40
    images = torch.zeros(count, 3, side, side)
    theirs = [
        transforms.RandomResizedCrop.get_params(images[0], (0.08, 1.0), (3 / 4, 4 / 3))
        for _ in range(count)
    ]
    left, top, width, height = augment.draw_crops(images, generator(), 0.08)
    for ours, column in zip((top, left, height, width), torch.tensor(theirs).T):
        assert furthest_apart(ours, column) < 0.04
    theirs = [transforms.RandomPerspective.get_params(side, side, 0.5)[1] for _ in range(count)]
    corners = augment.draw_corners(images, generator(), 0.5).flatten(1)
    for ours, column in zip(corners.T, torch.tensor(theirs).flatten(1).T):
        assert furthest_apart(ours, column) < 0.04
    theirs = [
        transforms.ElasticTransform.get_params([50.0, 50.0], [5.0, 5.0], [side, side])
        for _ in range(500)
    ]
    theirs = torch.cat(theirs).permute(3, 0, 1, 2) * side / 2  # from half pictures to pixels
    ours = augment.draw_displacements(images[:500], generator(), 50.0)
    for axis in (0, 1):
        for place in (0, 20):  # on the edge, where the blur reflects, and in the middle
            assert furthest_apart(ours[axis, :, place, 20], theirs[axis, :, place, 20]) < 0.1


def test_rotation_is_uniform_between_its_degrees():
    images = torch.rand(1, 3, 33, 33).expand(2000, -1, -1, -1)
    turned = augment.rotate(images, generator(), 30.0)
    by_ends = augment.warp_rotated(images[:2], torch.tensor([-30.0, 30.0]))
    assert len(turned.flatten(1).unique(dim=0)) == 2000
    drawn = augment.uniform(-30, 30, 2000, images, generator())
    assert torch.equal(turned, augment.warp_rotated(images, drawn))
    assert furthest_apart(drawn, torch.linspace(-30, 30, 2000)) < 0.04
    assert not torch.allclose(by_ends[0], by_ends[1])


@pytest.mark.parametrize("name", ["elastic", "perspective", "rotate", "resizedcrop"])
def test_pictures_of_a_batch_get_different_draws_and_a_seed_the_same(name):
    images = torch.rand(1, 3, 32, 32).expand(64, -1, -1, -1)
    (pipeline,) = augment.parse(f"{name}:1")
    changed = pipeline(images, generator(1))
    assert len(changed.flatten(1).unique(dim=0)) == 64
    assert torch.equal(changed, pipeline(images, generator(1)))
    assert not torch.equal(changed, pipeline(images, generator(2)))


@pytest.mark.parametrize("name", list(augment.AUGMENTATIONS))
@pytest.mark.parametrize("probability", [None, 0.3])
def test_the_share_of_pictures_touched_is_the_probability(name, probability):
    images = torch.rand(20_000, 3, 16, 16)
    given = "" if probability is None else f":{probability}"
    (pipeline,) = augment.parse(f"{name}{given}")
    touched = (pipeline(images, generator(1)) != images).flatten(1).any(1).double().mean()
    expected = probability or augment.AUGMENTATIONS[name].probability
    expected *= 80 / 81 if name == "shift" else 1  # one of its 9 x 9 moves leads nowhere
    assert abs(touched - expected) < 0.01


def test_a_shift_moves_each_picture_by_whole_pixels_either_way_alike():
    (pipeline,) = augment.parse("shift=2")
    images = torch.rand(1, 3, 16, 20).expand(5000, -1, -1, -1).contiguous()
    changed = pipeline(images, generator())
    padded = F.pad(images[:1], (2, 2, 2, 2), mode="reflect")
    seen = torch.stack([
        (changed == padded[..., y : y + 16, x : x + 20]).flatten(1).all(1).double().mean()
        for y in range(5) for x in range(5)
    ])  # fmt: skip
    assert abs(seen.sum() - 1) < 1e-9 and (seen - 1 / 25).abs().max() < 0.012


def test_default_probabilities_are_torchvisions():
    import torchvision.transforms.v2 as T

    transforms = dict(
        hflip=T.RandomHorizontalFlip(), vflip=T.RandomVerticalFlip(), gray=T.RandomGrayscale(),
        invert=T.RandomInvert(), equalize=T.RandomEqualize(), perspective=T.RandomPerspective(),
    )  # fmt: skip
    for name, transform in transforms.items():
        assert augment.AUGMENTATIONS[name].probability == transform.p
    assert augment.AUGMENTATIONS["perspective"].strength == T.RandomPerspective().distortion_scale
    assert augment.AUGMENTATIONS["elastic"].strength == T.ElasticTransform().alpha[0]
    assert augment.AUGMENTATIONS["resizedcrop"].strength == T.RandomResizedCrop(40).scale[0]


def test_steps_draw_apart_and_the_same_generator_draws_the_same():
    images = torch.rand(4000, 3, 4, 4)
    (pipeline,) = augment.parse("hflip:0.5,vflip:0.5")
    before = images.clone()
    changed = pipeline(images, generator(2))
    assert torch.equal(images, before)  # it does not write into what it was given
    assert torch.equal(changed, pipeline(images, generator(2)))
    assert not torch.equal(changed, pipeline(images, generator(3)))
    outcomes = [images, images.flip(-1), images.flip(-2), images.flip(-1, -2)]
    shares = [(changed == x).flatten(1).all(1).double().mean() for x in outcomes]
    assert all(abs(share - 0.25) < 0.03 for share in shares)


def test_nothing_leaves_the_unit_interval():
    furthest = ("elastic=1000", "perspective=1", "rotate=180", "resizedcrop=0", "resizedcrop=1")
    for name in (*augment.AUGMENTATIONS, *furthest):
        (pipeline,) = augment.parse(f"{name}:1")
        noise = torch.rand(2000, 3, 16, 16)
        for images in (torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16), noise, noise.round()):
            changed = pipeline(images, generator())
            assert changed.min() >= 0 and changed.max() <= 1 + 1e-6  # gray: rounding
            assert changed.shape == images.shape and changed.dtype == images.dtype


def test_a_mix_says_which_copies_there_are():
    pipelines = augment.parse("clean+hflip:0.25,gray + vflip")
    steps = [[(s.name, s.probability) for s in p.steps] for p in pipelines]
    assert steps == [[], [("hflip", 0.25), ("gray", 0.1)], [("vflip", 0.5)]]
    images = torch.rand(3, 3, 8, 8)
    assert torch.equal(pipelines[0](images, generator()), images)
    assert str(pipelines[1]) == "hflip:0.25,gray:0.1"


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ("clean+hflop", "unknown augmentation 'hflop': did you mean hflip?"),
        ("clean+", "unknown augmentation ''"),
        ("", "unknown augmentation ''"),
        ("clean,hflip", "clean stands alone"),
        ("hflip:2", "the probability in 'hflip:2' should be between 0 and 1"),
        ("hflip:nan", "should be between 0 and 1"),
        ("hflip:often", "'hflip:often' should read name"),
        ("hflip=3", "hflip takes no strength"),
        ("rotate=200", "the degrees in 'rotate=200' should be 0 to 180"),
        ("hflip,shift=0.5", "the pixels in 'shift=0.5' should be a whole number"),
        ("perspective=-1:0.5", "the distortion in 'perspective=-1:0.5' should be 0 to 1"),
        ("resizedcrop=nan", "the least share of the area in 'resizedcrop=nan' should be"),
        ("elastic=much", "'elastic=much' should read name"),
        ("hflip:0.5:0.5", "'hflip:0.5:0.5' should read name"),
    ],
)
def test_a_wrong_mix_is_one_sentence(mix, words):
    with pytest.raises(ValueError) as error:
        augment.parse(mix)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_the_sheet_is_drawn_and_what_was_there_is_kept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    augment.main(["clean+hflip,gray", "--data", "demo"])
    first = (tmp_path / "augment.png").read_bytes()
    with Image.open(tmp_path / "augment.png") as sheet:
        assert sheet.width > 300 and sheet.height > 300 and len(sheet.getcolors(1 << 20)) > 1000
    augment.main(["clean+vflip", "--data", "demo"])
    assert (tmp_path / "earlier-1" / "augment.png").read_bytes() == first
    with pytest.raises(SystemExit) as stop:
        augment.main(["hflop", "--data", "demo"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "did you mean hflip" in error and error.count("\n") == 1


def test_the_sheet_shows_large_pictures_at_the_size_that_is_given(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("cat", "dog"):
        (tmp_path / "photos" / name).mkdir(parents=True)
        Image.new("RGB", (700, 600), "red").save(tmp_path / "photos" / name / "1.png")
    with pytest.raises(SystemExit):
        augment.main(["hflip", "--data", "photos"])
    assert "600 px: say --size 64" in capsys.readouterr().err
    augment.main(["hflip", "--data", "photos", "--size", "64"])
    with Image.open(tmp_path / "augment.png") as sheet:
        assert sheet.height < 400  # two rows of pictures of 128 px


def test_on_a_gpu_where_all_are_computed_the_same_are_changed(monkeypatch):
    images = torch.rand(64, 3, 20, 20)
    mix = augment.parse("hflip,vflip,gray:0.5,invert,equalize")[0]  # which draw but who is hit
    chosen = mix(images, torch.Generator().manual_seed(5))
    monkeypatch.setattr(augment, "IMMEDIATE", [])
    assert torch.equal(mix(images, torch.Generator().manual_seed(5)), chosen)
    assert not torch.equal(chosen, images)
