"""The augmentations against torchvision's own, and the grammar of mixes."""

import pytest
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import augment


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hflip", tv.horizontal_flip),
        ("vflip", tv.vertical_flip),
        ("gray", lambda x: tv.rgb_to_grayscale(x, num_output_channels=3)),
    ],
)
def test_each_does_what_torchvision_does_to_one_picture(name, expected):
    images = torch.rand(8, 3, 21, 34)
    (pipeline,) = augment.parse(f"{name}:1")
    changed = pipeline(images, generator())
    for before, after in zip(images, changed):
        assert torch.allclose(after, expected(before), atol=1e-6)


@pytest.mark.parametrize("name", list(augment.AUGMENTATIONS))
@pytest.mark.parametrize("probability", [None, 0.3])
def test_the_share_of_pictures_touched_is_the_probability(name, probability):
    images = torch.rand(20_000, 3, 4, 4)
    given = "" if probability is None else f":{probability}"
    (pipeline,) = augment.parse(f"{name}{given}")
    touched = (pipeline(images, generator(1)) != images).flatten(1).any(1).double().mean()
    assert abs(touched - (probability or augment.AUGMENTATIONS[name].probability)) < 0.01


def test_default_probabilities_are_torchvisions():
    import torchvision.transforms.v2 as T

    assert augment.AUGMENTATIONS["hflip"].probability == T.RandomHorizontalFlip().p
    assert augment.AUGMENTATIONS["vflip"].probability == T.RandomVerticalFlip().p
    assert augment.AUGMENTATIONS["gray"].probability == T.RandomGrayscale().p


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
    for name in augment.AUGMENTATIONS:
        (pipeline,) = augment.parse(f"{name}:1")
        for images in (torch.zeros(2, 3, 16, 16), torch.ones(2, 3, 16, 16)):
            changed = pipeline(images, generator())
            assert changed.min() >= 0 and changed.max() <= 1 + 1e-6
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
