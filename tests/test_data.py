"""Sources in every layout, the split, and the batches: what a network sees and what not."""

import os
import shutil
import tarfile
import zipfile
from collections import Counter

import numpy as np
import pytest
import torch
from conftest import TINY, save_picture
from PIL import Image
from torchvision.transforms.v2 import functional as tv

import augment
import data
import predict
import train


def pack(folder, path):
    """The folder as an archive whose top level is the folder itself."""
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for file in sorted(folder.rglob("*")):
                archive.write(file, file.relative_to(folder.parent))
    else:
        with tarfile.open(path, "w:" + path.suffix[1:].replace("tar", "")) as archive:
            archive.add(folder, folder.name)
    return path


@pytest.mark.parametrize("name", ["x.zip", "x.tar", "x.tar.gz", "x.tar.xz"])
def test_an_archive_holds_what_its_folder_holds(homework, tmp_path, name):
    folder = data.load(homework)
    archive = data.load(pack(homework, tmp_path / name))
    assert torch.equal(folder.images, archive.images)
    assert torch.equal(folder.test_images, archive.test_images)
    assert (folder.ids, folder.test_ids) == (archive.ids, archive.test_ids)
    assert folder.fingerprint == archive.fingerprint


def test_the_homework_as_it_is_published(homework):
    dataset = data.load(homework)
    assert dataset.images.shape == (60, 3, 16, 16) and dataset.images.dtype == torch.uint8
    assert dataset.classes == ["8", "9", "10"]  # 9 before 10
    assert dataset.columns == ("Id", "Category") and dataset.val_indices is None
    rows = [line.split(",") for line in (homework / "labels.csv").read_text().split()[1:]]
    assert [(i, dataset.classes[y]) for i, y in zip(dataset.ids, dataset.labels)] == [
        tuple(row) for row in rows
    ]
    for i in (0, 31, 59):
        with Image.open(homework / "trainval" / dataset.ids[i]) as image:
            assert np.array_equal(dataset.images[i].permute(1, 2, 0), np.asarray(image))
    assert dataset.test_ids == [f"test_{i:05d}.png" for i in range(9)]


def test_the_homework_as_users_have_it(homework, tmp_path):
    plain = data.load(homework)
    deep = tmp_path / "a" / "b"
    for part in ("trainval", "test"):  # doubled, as some archives unpack
        shutil.copytree(homework / part, deep / part / part)
    text = (homework / "labels.csv").read_text().replace("Id,Category", "file,label")
    text = text.replace(".png", "")
    (deep / "labels.csv").write_bytes(
        ("\ufeff" + text.replace(",", ", ").replace("\n", "\r\n")).encode()
    )
    (deep / "trainval" / "more.png").write_bytes(b"a picture that no row names")
    dataset = data.load(tmp_path / "a")
    assert torch.equal(dataset.images, plain.images)
    assert torch.equal(dataset.test_images, plain.test_images)
    assert dataset.columns == ("file", "label")
    assert dataset.ids[0] == "trainval_00000" and dataset.test_ids[0] == "test_00000"


def write_folders(folder, *parts):
    """Pictures of two sizes as part/class/name, or part/name where the part is test."""
    demo = data.load("demo")
    for n, part in enumerate(parts):
        path = folder / part
        path.mkdir(parents=True)
        for i in range(3):
            save_picture(demo.images[n * 3 + i], path / f"{i + 8}.png")
    return folder


def test_one_folder_a_class(tmp_path):
    parts = ["train/b", "train/a", "val/a", "test"]
    dataset = data.load(write_folders(tmp_path / "x", *parts))
    assert dataset.classes == ["a", "b"]
    assert dataset.ids[:3] == ["train/a/8.png", "train/a/9.png", "train/a/10.png"]
    assert dataset.labels.tolist() == [0] * 3 + [1] * 3 + [0] * 3
    assert dataset.val_indices.tolist() == [6, 7, 8]
    assert dataset.test_ids == ["8.png", "9.png", "10.png"]
    assert torch.equal(dataset.images[0], data.load("demo").images[3])
    train, val = data.parts(dataset, None, seed=0)
    assert (train.tolist(), val.tolist()) == ([0, 1, 2, 3, 4, 5], [6, 7, 8])
    assert len(data.parts(dataset, 0.0, seed=0)[1]) == 0  # --val given wins

    flat = data.load(write_folders(tmp_path / "y", "cat", "dog", "test"))
    assert flat.classes == ["cat", "dog"] and len(flat.ids) == 6 and len(flat.test_ids) == 3
    assert data.load(write_folders(tmp_path / "z", "train/1", "train/2")).classes == ["1", "2"]
    packed = data.load(pack(tmp_path / "x", tmp_path / "x.zip"))
    assert packed.ids == dataset.ids and torch.equal(packed.images, dataset.images)
    parts = ["Training/a", "Training/b", "valid/b", "Testing/a", "Testing/b"]
    other = data.load(write_folders(tmp_path / "other", *parts))
    assert (other.classes, other.val_indices.tolist()) == (["a", "b"], [6, 7, 8])
    assert other.test_labels.tolist() == [0] * 3 + [1] * 3
    write_folders(tmp_path / "other", "train/b", "train/a")  # the plain name wins
    twice = data.load(tmp_path / "other")
    assert twice.ids[0] == "train/a/8.png" and len(twice.ids) == 9 and len(twice.left_out) == 6
    write_folders(tmp_path / "several", "a/Training/cat", "b/Training/cat")
    with pytest.raises(ValueError, match="several train/: a/Training, b/Training; name one"):
        data.load(tmp_path / "several")


def test_parts_are_not_taken_for_classes(tmp_path):
    write_folders(tmp_path, "x/train_images", "x/test-images", "y/train", "y/van", "y/test_tube")
    with pytest.raises(ValueError, match="test-images, train_images in .* like parts of a data"):
        data.load(tmp_path / "x")
    assert data.load(tmp_path / "y").classes == ["test_tube", "train", "van"]


def test_a_table_may_label_the_pictures_in_train(homework, tmp_path):
    plain = data.load(homework)
    (homework / "trainval").rename(homework / "train")
    dataset = data.load(homework)
    assert (dataset.fingerprint, dataset.test_ids) == (plain.fingerprint, plain.test_ids)
    (homework / "labels.csv").write_text("number,name\n0,cat\n1,dog\n")
    with pytest.raises(ValueError, match=r"row 3 \(1\); where each class has a folder"):
        data.load(homework)
    write_folders(tmp_path / "x", "images/cat", "images/dog")
    shutil.copy(homework / "labels.csv", tmp_path / "x")
    with pytest.raises(ValueError, match="no picture in train/: .*; where each class has a folder"):
        data.load(tmp_path / "x")


def write_tiny_imagenet(folder):
    """As published: train/<wnid>/images with boxes, val/images with its table, test/images."""
    demo = data.load("demo")
    pictures = iter(demo.images)
    for wnid in ("n10", "n9"):
        (folder / "train" / wnid / "images").mkdir(parents=True)
        (folder / "train" / wnid / f"{wnid}_boxes.txt").write_text(f"{wnid}_0.JPEG\t0\t0\t9\t9\n")
        for i in range(6):
            path = folder / "train" / wnid / "images" / f"{wnid}_{i}.JPEG"
            save_picture(next(pictures), path)
    for part in ("val", "test"):
        (folder / part / "images").mkdir(parents=True)
        for i in range(4):
            save_picture(next(pictures), folder / part / "images" / f"{part}_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{wnid}\t0\t0\t9\t9" for i, wnid in enumerate(["n9", "n10"] * 2)]
    (folder / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")
    for name in ("wnids.txt", "words.txt"):
        (folder / name).write_text("n9\nn10\n")
    return folder


def test_tiny_imagenet_as_published(tmp_path):
    folder = write_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    dataset = data.load(folder)
    assert dataset.classes == ["n9", "n10"] and dataset.layout == "Tiny ImageNet's"
    assert dataset.ids[0] == "train/n9/n9_0.JPEG" and len(dataset.ids) == 16
    assert dataset.labels.tolist() == [0] * 6 + [1] * 6 + [0, 1, 0, 1]
    assert dataset.val_indices.tolist() == [12, 13, 14, 15] and not dataset.left_out
    assert dataset.ids[12] == "val/n9/val_0.JPEG"
    assert dataset.test_ids == [f"test_{i}.JPEG" for i in range(4)] and dataset.test_labels is None
    with Image.open(folder / "val" / "images" / "val_1.JPEG") as image:
        assert np.array_equal(dataset.images[13].permute(1, 2, 0), np.asarray(image))
    for name in ("x.zip", "x.tar.gz"):
        packed = data.load(pack(folder, tmp_path / name))
        assert packed.fingerprint == dataset.fingerprint
        assert torch.equal(packed.images, dataset.images)
    table = folder / "val" / "val_annotations.txt"
    table.write_text(table.read_text() + "val_9.JPEG\tn9\t0\t0\t9\t9\n")
    with pytest.raises(ValueError, match=r"names pictures that are not there: val/val_9.JPEG"):
        data.load(folder)
    table.write_text("val_0.JPEG n9\n")
    with pytest.raises(
        ValueError, match="row 1 of val/val_annotations.txt should be file, tab, wnid"
    ):
        data.load(folder)
    table.unlink()  # as some sort it
    for wnid, i in (("n9", 0), ("n10", 1), ("n9", 2), ("n10", 3)):
        (folder / "val" / wnid).mkdir(exist_ok=True)
        (folder / "val" / "images" / f"val_{i}.JPEG").rename(
            folder / "val" / wnid / f"val_{i}.JPEG"
        )
    assert Counter(data.load(folder).ids) == Counter(dataset.ids)


def test_a_test_part_sorted_by_class_is_one_with_answers(tmp_path):
    parts = ["train/b", "train/a", "test/b", "test/a"]
    dataset = data.load(write_folders(tmp_path / "x", *parts))
    assert dataset.test_ids[0] == "a/8.png" and dataset.test_labels.tolist() == [0] * 3 + [1] * 3
    write_folders(tmp_path / "x", "test/unknown")  # a class that training has not
    assert data.load(tmp_path / "x").test_labels is None


def test_several_training_parts_are_an_error_that_lists_them(tmp_path):
    write_folders(tmp_path / "x", "one/train/a", "one/train/b", "two/train/a", "two/train/b")
    with pytest.raises(ValueError, match=r"several train/: one/train, two/train; name one folder"):
        data.load(tmp_path / "x")
    assert data.load(tmp_path / "x" / "one").classes == ["a", "b"]
    vehicles = write_folders(tmp_path / "vehicles", "bus", "train")
    assert data.load(vehicles).classes == ["bus", "train"]


def odd_pictures(folder):
    """{file: the RGB picture that a viewer shows} of pictures as users have them."""
    random = np.random.default_rng(0)
    rgb = Image.fromarray(random.integers(0, 256, (16, 16, 3), np.uint8))
    grey, alpha = rgb.convert("L"), Image.fromarray(random.integers(0, 256, (16, 16), np.uint8))
    clear = rgb.copy()
    clear.putalpha(alpha)
    on_white = Image.composite(rgb, Image.new("RGB", rgb.size, "white"), alpha)
    palette = rgb.quantize(16)
    holes = np.asarray(palette) == 3
    shown = np.where(holes[..., None], 255, np.asarray(palette.convert("RGB"))).astype(np.uint8)
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    turned = Image.Exif()
    turned[0x0112] = 6  # the camera was held upright: turn it clockwise
    (folder).mkdir(parents=True)
    saved = {
        "grey.png": (grey, grey, {}),
        "black-and-white.png": (grey.convert("1"), grey.convert("1"), {}),
        "palette.png": (palette, palette, {}),
        "palette-with-holes.png": (palette, Image.fromarray(shown), {"transparency": 3}),
        "rgba.png": (clear, on_white, {}),
        "grey-and-alpha.png": (clear.convert("LA"), None, {}),
        "cmyk.tiff": (rgb.convert("CMYK"), rgb, {}),
        "cmyk.jpg": (rgb.convert("CMYK"), None, {}),
        "colour.jpg": (rgb, None, {}),
        "grey.jpg": (grey, None, {}),
        "turned.jpg": (rgb, None, {"exif": turned}),
        "sixteen-bits.png": (deep, grey, {}),
        "turned.png": (rgb, rgb.transpose(Image.Transpose.ROTATE_270), {"exif": turned}),
        "damaged-note.png": (rgb, rgb, {"exif": b"Exif\0\0no exif"}),
        "film.gif": (palette, palette, {"save_all": True, "append_images": [grey]}),
    }
    for name, (image, _, options) in saved.items():
        image.save(folder / name, **options)
    luma = grey.convert("RGB")
    expected = {name: shown for name, (_, shown, _) in saved.items()}
    expected["grey-and-alpha.png"] = Image.composite(
        luma, Image.new("RGB", rgb.size, "white"), alpha
    )
    for path in folder.glob("*.jpg"):  # lossy: as Pillow reads them
        with Image.open(path) as image:
            expected[path.name] = image.convert("RGB")
    expected["turned.jpg"] = expected["turned.jpg"].transpose(Image.Transpose.ROTATE_270)
    return {name: np.asarray(image.convert("RGB")).astype(int) for name, image in expected.items()}


def test_odd_pictures_are_read_as_a_viewer_shows_them(tmp_path):
    expected = odd_pictures(tmp_path / "x")
    images, names = data.load_pictures(tmp_path / "x", 16)
    for image, name in zip(images.permute(0, 2, 3, 1).numpy().astype(int), names):
        assert np.abs(image - expected[name]).max() <= 1, name  # blending rounds either way


def test_cifar_through_torchvision(tmp_path, monkeypatch):
    import pickle

    from torchvision.datasets import CIFAR10

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "data" / CIFAR10.base_folder
    folder.mkdir(parents=True)
    pictures = np.random.default_rng(0).integers(0, 256, (6, 20, 3072), np.uint8)
    names = [name for name, _ in CIFAR10.train_list + CIFAR10.test_list]
    for name, part in zip(names, pictures):
        content = {"data": part, "labels": [i % 10 for i in range(20)]}
        (folder / name).write_bytes(pickle.dumps(content))
    classes = [f"class {i}" for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({"label_names": classes}))
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *args: True)
    dataset = data.load("cifar10")
    assert dataset.images.shape == (100, 3, 32, 32) and dataset.test_images.shape == (20, 3, 32, 32)
    assert np.array_equal(dataset.images[20].flatten(), pictures[1, 0])
    assert dataset.classes == classes and dataset.test_labels[11] == 1
    assert data.load("cifar10", size=20, limit=50).images.shape == (50, 3, 20, 20)
    assert data.find_source() == "cifar10"
    shutil.copytree(folder, tmp_path / "elsewhere" / folder.name)  # where torchvision doesn't look
    assert data.find_source(["elsewhere"]) == "demo"
    train.main(["--limit", "60", "--model", TINY, "--epochs", "1"])
    predict.main(["ckpt.pt"])
    rows = [line.split(",") for line in (tmp_path / "submission.csv").read_text().splitlines()]
    assert [name for name, _ in rows[1:]] == [f"test_{i}" for i in range(20)]
    assert {answer for _, answer in rows[1:]} <= set(classes)


def test_the_demo_is_the_same_every_time_and_has_no_picture_twice():
    demo, again = data.load("demo"), data.load("demo")
    assert torch.equal(demo.images, again.images) and demo.fingerprint == again.fingerprint
    assert len(demo.classes) == 10 and len(demo.test_labels) == len(demo.test_images)
    train, val = data.parts(demo, None, seed=0)
    counts = Counter(demo.labels[val].tolist())
    assert len(counts) == 10 and len(set(counts.values())) == 1
    flat = demo.images.flatten(1).tolist()
    assert len(set(map(tuple, flat))) == len(flat)  # so none is in both parts
    assert data.load("demo", size=24).images.shape[-1] == 24
    limited = data.load("demo", limit=100)
    shares = [Counter(d.labels[d.val_indices].tolist())[4] / len(d.ids) for d in (demo, limited)]
    assert shares[0] == pytest.approx(shares[1], abs=0.011)


def test_every_class_of_the_demo_is_told_by_its_grey_pattern_and_survives_flips():
    """By the nearest neighbour of Fourier magnitudes, which neither colour nor place changes."""

    def features(images):
        spectrum = torch.fft.rfft2(tv.rgb_to_grayscale(images.float() / 255)).abs().flatten(1)
        spectrum[:, 0] = 0
        return spectrum / spectrum.norm(dim=1, keepdim=True)

    demo = data.load("demo", size=24)
    train, val = data.parts(demo, None, seed=0)
    known = features(demo.images[train])
    for flipped in (demo.images[val], demo.images[val].flip(-1), demo.images[val].flip(-2)):
        nearest = torch.cdist(features(flipped), known).argmin(1)
        right = (demo.labels[train][nearest] == demo.labels[val]).float()
        assert right.mean() > 0.75
        assert all(right[demo.labels[val] == k].mean() > 0.5 for k in range(10))


def test_the_source_is_looked_for_and_said(tmp_path, monkeypatch, capsys, homework):
    monkeypatch.chdir(tmp_path)
    assert data.find_source() == "demo" and "DEMO" in capsys.readouterr().out
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes").mkdir()
    shutil.copytree(homework, tmp_path / "data" / "bhw1")
    assert data.find_source() == "data/bhw1" and "data/bhw1" in capsys.readouterr().out
    pack(homework, tmp_path / "data" / "other.zip")
    (tmp_path / "data" / "other.zip").rename(tmp_path / "data" / "cifar-10-of-mine.ZIP")
    (tmp_path / "data" / "cifar-10-python.tar.gz").write_bytes(b"which torchvision unpacks")
    with pytest.raises(ValueError, match=r"data/bhw1 and data/cifar-10-of-mine.ZIP:"):
        data.find_source()
    shutil.copytree(homework, tmp_path / "data", dirs_exist_ok=True)
    assert data.find_source() == "data"
    split = write_folders(
        tmp_path / "split", "train/cat", "train/dog", "val/cat", "val/dog", "test"
    )
    assert data.find_source([split]) == str(split)
    elsewhere = write_folders(tmp_path / "input" / "pets", "train/cat", "train/dog")
    assert data.find_source(["nowhere", tmp_path / "input"]) == str(elsewhere)


def test_each_of_kaggles_mounts_is_a_source_by_itself(tmp_path, homework, capsys):
    place = tmp_path / "input"
    (place / "notebooks" / "me" / "former").mkdir(parents=True)
    (place / "notebooks" / "me" / "former" / "ckpt.pt").write_bytes(b"a checkpoint")
    assert data.find_source([place]) == "demo"
    competition = shutil.copytree(homework, place / "competitions" / "bhw1")
    assert data.find_source([place]) == str(competition)
    pets = write_folders(place / "datasets" / "you" / "pets", "cat", "dog")
    with pytest.raises(ValueError, match=f"data sets, {competition} and {pets}: name one"):
        data.find_source([place])
    shutil.rmtree(competition)
    shutil.rmtree(pets)
    pets.mkdir()
    archive = pack(homework, pets / "bhw1.zip")
    assert data.find_source([place]) == str(archive)
    shutil.copytree(homework, competition)
    assert data.find_source([place]) == str(competition)  # beside it an archive is something else
    shutil.rmtree(place / "competitions")
    archive.unlink()
    write_folders(pets, "train/train/cat", "train/train/dog")  # no layout: and never the demo
    capsys.readouterr()
    with pytest.raises(ValueError, match="input holds pictures, but as no data set known here"):
        data.find_source([place])
    assert not capsys.readouterr().out
    assert data.find_source([place, homework.parent]) == str(homework)
    write_folders(tmp_path / "direct", "Training/cat", "Training/dog", "Testing/cat", "Testing/dog")
    assert data.find_source([tmp_path / "direct"]) == str(tmp_path / "direct")


def test_sizes_are_made_equal(homework, capsys):
    small = Image.new("RGB", (9, 20), "red")
    small.save(homework / "trainval" / "trainval_00004.png")
    Image.new("L", (40, 16), 128).save(homework / "trainval" / "trainval_00005.png")
    dataset = data.load(homework)
    said = capsys.readouterr().out
    assert "3 sizes, the commonest 16x16" in said and "brought to 16x16" in said
    assert dataset.images.shape[-1] == 16
    assert (dataset.images[4].float().mean((1, 2)) == torch.tensor([255.0, 0, 0])).all()
    assert (dataset.images[5] == 128).all()
    assert data.load(homework, size=20).images.shape[-1] == 20


def test_pictures_that_would_be_lost_or_black_are_named(tmp_path):
    pets = write_folders(tmp_path / "pets", "train/cat", "train/dog", "test", "testing")
    with pytest.raises(ValueError, match="two pictures are 8.png: test/8.png and testing/8.png"):
        data.load(pets)
    shutil.copytree(pets / "test", tmp_path / "shots" / "test")
    shutil.copytree(pets / "test", tmp_path / "shots" / "testing")
    with pytest.raises(data.NotADataSet):  # all of them may be answered
        data.load(tmp_path / "shots")
    shutil.rmtree(pets / "testing")
    Image.fromarray(np.full((16, 16), 0.5, np.float32)).save(pets / "train" / "cat" / "half.tif")
    with pytest.raises(ValueError, match=r"train/cat/half.tif \(its pixels are fractions"):
        data.load(pets)


def test_limit_keeps_classes_in_proportion_and_the_choice_is_always_the_same(homework):
    whole, limited = data.load(homework), data.load(homework, limit=30)
    assert Counter(limited.labels.tolist()) == {0: 10, 1: 10, 2: 10}
    assert limited.ids == data.load(homework, limit=30).ids and set(limited.ids) < set(whole.ids)
    assert limited.fingerprint != whole.fingerprint
    assert torch.equal(limited.images[7], whole.images[whole.ids.index(limited.ids[7])])


def test_what_lies_beside_the_data_is_left_alone(homework, tmp_path, capsys):
    pets = write_folders(tmp_path / "pets", "cat", "dog", "dog/more")
    before = data.load(pets)
    assert "3 pictures are in no class folder: dog/more/8.png" in capsys.readouterr().out
    shutil.copy(pets / "cat" / "8.png", pets / "thumb.png")
    (pets / "earlier-1").mkdir()
    (pets / "run").mkdir()
    (pets / "cat" / "log.csv").write_text("whatever it is of\n")
    for name in ("data.png", "earlier-1/augment.png", "run/curves.png"):  # our own
        shutil.copy(pets / "cat" / "8.png", pets / name)
    after = data.load(pets)
    assert (after.ids, after.classes) == (before.ids, ["cat", "dog"])
    assert data.load(pack(pets, tmp_path / "pets.zip")).ids == before.ids
    around = write_folders(tmp_path / "around", "pets/train/cat", "pets/train/dog", "old/val/cat")
    write_folders(around, "old/test", "docs")
    shutil.copy(pets / "thumb.png", around)
    capsys.readouterr()
    dataset = data.load(around)
    assert (len(dataset.ids), dataset.is_val, dataset.test_ids) == (6, None, [])
    assert "10 pictures are in no class folder: docs/8.png" in capsys.readouterr().out
    (tmp_path / "linked").mkdir()
    shutil.copy(homework / "labels.csv", tmp_path / "linked")
    (tmp_path / "linked" / "trainval").symlink_to(homework / "trainval", target_is_directory=True)
    assert data.load(tmp_path / "linked").ids == data.load(homework).ids


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tar.xz", "x.zip"])
def test_an_archive_cut_short_is_refused(homework, tmp_path, name):
    path = pack(homework, tmp_path / name)
    whole = path.read_bytes()
    for share in (0.3, 0.7, 0.99 if name != "x.tar" else 0.5):
        path.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(ValueError, match=rf"{name} can't be read as an archive"):
            data.load(path)


def damage(homework, how):
    """Make one thing wrong; gives words that the sentence about it must have."""
    table = homework / "labels.csv"
    text = table.read_text()
    if how == "no picture":
        (homework / "trainval" / "trainval_00003.png").unlink()
        return "1 rows of labels.csv name no picture in trainval/: row 5 (trainval_00003.png)"
    if how == "two trainvals":
        shutil.copytree(homework / "trainval", homework / "old" / "trainval")
        return "two pictures are trainval_00000.png"
    if how == "no labels":
        table.unlink()
        return "has a folder trainval/ but no labels.csv"
    if how == "broken pictures":
        (homework / "trainval" / "trainval_00003.png").write_bytes(b"no")
        path = homework / "trainval" / "trainval_00007.png"
        path.write_bytes(path.read_bytes()[:200])
        path = homework / "trainval" / "trainval_00008.png"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 255  # as long as before, and damaged within
        path.write_bytes(content)
        return "3 of 60 pictures can't be decoded"
    changes = {
        "leaves": ("trainval_00002.png", "../labels.csv", "no picture in trainval/: row 4 (../lab"),
        "absolute": ("trainval_00002.png", "/etc/passwd", "no picture in trainval/: row 4 (/etc/p"),
        "one field": ("trainval_00002.png,", "trainval_00002.png", "row 4 of labels.csv should be"),
        "doubled": ("trainval_00002.png", "trainval_00001.png", "ids in several rows"),
        "header only": (text.split("\n", 1)[1], "", "labels.csv has no rows below its header"),
        "no header": ("Id,Category\n", "", "labels.csv has no header"),
        "no header, no suffixes": (
            text,
            text.split("\n", 1)[1].replace(".png", ""),
            "has no header",
        ),
        "some suffixes": ("trainval_00003.png", "trainval_00003", "1 rows of labels.csv name no"),
        "one class": (text, "Id,Category\ntrainval_00000.png,8\n", "only the class '8'"),
    }
    before, after, words = changes[how]
    table.write_text(text.replace(before, after, 1))
    return words


@pytest.mark.parametrize(
    "how",
    ["no picture", "broken pictures", "leaves", "absolute", "one field", "doubled", "header only"]
    + ["no header", "one class", "no header, no suffixes", "some suffixes", "two trainvals"]
    + ["no labels"],
)
def test_a_fault_in_the_data_is_one_sentence(homework, how):
    words = damage(homework, how)
    with pytest.raises(ValueError) as error:
        data.load(homework)
    message = str(error.value)
    assert words in message and "\n" not in message
    if how == "broken pictures":  # all of them are named
        assert all(f"trainval_0000{i}.png (" in message for i in (3, 7, 8))


def test_a_path_that_is_none_is_an_error_and_never_the_demo(tmp_path):
    with pytest.raises(FileNotFoundError, match="there is no"):
        data.load(tmp_path / "nothing")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="holds no data set"):
        data.load(tmp_path / "empty")
    for name, content in (("x.zip", b"no"), ("x.tar.xz", b"no"), ("x.txt", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=name):
            data.load(tmp_path / name)


@pytest.mark.parametrize("fraction", [0, 0.1, 0.37, 0.5])
def test_a_split_is_stratified_disjoint_and_everything(fraction):
    labels = torch.randint(0, 13, (1000,), generator=torch.Generator().manual_seed(0))
    train, val = data.split(labels, fraction, seed=4)
    assert sorted(train.tolist() + val.tolist()) == list(range(1000))
    assert len(val) == round(1000 * fraction)
    for k in range(13):
        assert abs((labels[val] == k).sum() - fraction * (labels == k).sum()) <= 1
    again, other = data.split(labels, fraction, seed=4)[1], data.split(labels, fraction, seed=5)[1]
    assert torch.equal(val, again) and (fraction == 0 or not torch.equal(val, other))


def test_no_class_is_always_or_never_in_validation():
    lone = torch.tensor([0] * 20 + [1])
    chosen = [20 in data.split(lone, 0.1, seed)[1] for seed in range(60)]
    assert 0 < sum(chosen) < 30
    labels = torch.arange(100).repeat(2)
    validated = set().union(*(labels[data.split(labels, 0.1, s)[1]].tolist() for s in range(60)))
    assert len(validated) == 100
    demo = data.load("demo", limit=10)
    assert min(map(len, data.parts(demo, None, 0))) > 0


def test_a_name_twice_in_a_zip_is_one_picture(homework, tmp_path):
    path = pack(homework, tmp_path / "x.zip")
    with zipfile.ZipFile(path, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.write(homework / "test" / "test_00000.png", "homework/test/test_00000.png")
    assert data.load(path).test_ids == data.load(homework).test_ids


def test_a_zip_with_the_separators_of_windows_holds_what_its_folder_holds(homework, tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for file in sorted(homework.rglob("*.*")):
            entry = zipfile.ZipInfo("homework/x")
            entry.filename = str(file.relative_to(homework.parent)).replace("/", "\\")
            archive.writestr(entry, file.read_bytes())
    assert b"homework\\trainval\\" in (tmp_path / "x.zip").read_bytes()
    found, expected = data.load(tmp_path / "x.zip"), data.load(homework)
    assert found.ids == expected.ids and torch.equal(found.images, expected.images)
    assert found.test_ids == expected.test_ids


def test_a_folder_is_read_under_its_own_name_and_not_that_of_a_link_to_it(tmp_path):
    pets = write_folders(tmp_path / "pets", "train/cat", "train/dog", "val/cat", "val/dog")
    before = data.load(pets)
    (pets / "test").symlink_to(pets / "val", target_is_directory=True)
    (pets / "train" / "animal").symlink_to(pets / "train" / "cat", target_is_directory=True)
    (pets / "check").mkdir()  # before train/, in order of names
    (pets / "check" / "cat").symlink_to(pets / "train" / "cat", target_is_directory=True)
    after = data.load(pets)
    assert after.classes == before.classes == ["cat", "dog"] and after.ids == before.ids
    assert after.is_val.any() and not after.test_ids


def test_links_that_lead_in_a_circle_end(homework):
    (homework / "trainval" / "a").symlink_to(homework, target_is_directory=True)
    (homework / "trainval" / "b").symlink_to(homework, target_is_directory=True)
    assert len(data.load(homework).ids) == 60


def test_statistics_are_those_of_the_chosen_pictures():
    images = torch.randint(0, 256, (5000, 3, 6, 6), dtype=torch.uint8)
    images[:, 2] = 77  # one value alone: its spread must not divide by zero
    chosen = torch.arange(10, 4600)
    mean, std = data.statistics(images, chosen)
    expected = images[chosen].numpy() / 255
    assert np.allclose(mean, expected.mean((0, 2, 3)), atol=1e-9)
    assert np.allclose(std[:2], expected.std((0, 2, 3))[:2], atol=1e-9) and std[2] >= 1 / 255 - 1e-9


def batches_of(count, mix, batch_size, seed=0, side=2, share=(0, 1)):
    """Batches over pictures that carry their own number, the last tenth kept for validation."""
    numbers = torch.arange(count).view(-1, 1, 1, 1)
    images = torch.cat([numbers // 256, numbers % 256, 0 * numbers], 1).to(torch.uint8)
    images = images.repeat(1, 1, side, side)
    images[:, 2, 0, 0] = 1  # so that a flip shows
    train = torch.arange(count - count // 10)
    pipelines = augment.parse(mix)
    labels = numbers.flatten()
    return data.Batches(images, labels, train, pipelines, batch_size, seed, "cpu", share)


@pytest.mark.parametrize(
    ("count", "batch_size"), [(1000, 64), (1001, 64), (33, 2), (71, 64), (2, 8)]
)
def test_an_epoch_shows_every_training_picture_once_a_copy_and_no_other(count, batch_size):
    batches = batches_of(count, "clean+hflip+vflip,gray", batch_size)
    seen, lengths = Counter(), []
    for x, y in batches.epoch(0):
        numbers = (x * 255).round().long().amax((2, 3))  # which a flip doesn't change
        assert x.dtype == torch.float32 and x.min() >= 0 and x.max() <= 1
        clean = x[:, 0, 0, 0] != x[:, 1, 0, 0]
        assert (numbers[clean, 0] * 256 + numbers[clean, 1] == y[clean]).all()
        seen.update(y.tolist())
        lengths.append(len(y))
    train = count - count // 10
    assert seen == dict.fromkeys(range(train), 3)
    assert len(lengths) == len(batches)
    assert max(lengths) - min(lengths) <= 1 and min(lengths) >= 2
    assert max(lengths) <= batch_size + 1


def test_the_order_is_a_function_of_seed_and_epoch_and_an_epoch_can_start_anywhere():
    def epoch(number, start=0, seed=0):
        return list(batches_of(500, "clean+hflip", 32, seed).epoch(number, start))

    first = epoch(3)
    for expected, found in ((first, epoch(3)), (first[7:], epoch(3, start=7))):
        assert len(expected) == len(found) >= 20
        for (x, y), (z, w) in zip(expected, found):
            assert torch.equal(x, z) and torch.equal(y, w)
    assert not torch.equal(first[0][1], epoch(4)[0][1])
    assert not torch.equal(first[0][1], epoch(3, seed=1)[0][1])


def test_the_clean_copy_is_clean():
    """REPORT.md E2: with the final mix, 0.6125 of what the network sees is untouched."""
    count = 10_000
    images = torch.randint(0, 256, (count, 3, 8, 8), dtype=torch.uint8)
    pipelines = augment.parse(augment.REPORT_MIX)
    everything = torch.arange(count)
    batches = data.Batches(images, everything, everything, pipelines, 64, 0, "cpu")
    untouched = 0
    for x, y in batches.epoch(0):
        untouched += (x == images[y].float() / 255).flatten(1).all(1).sum().item()
    assert abs(untouched / (2 * count) - 0.6125) < 0.005
    clean = augment.parse("clean")
    batches = data.Batches(images, everything, everything, clean, 64, 0, "cpu")
    assert all(torch.equal(x, images[y].float() / 255) for x, y in batches.epoch(0))


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "x"
    data.write_file(path, lambda file: file.write(b"old"))

    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(data.Failed, match="x can't be written: No space left on device; what it"):
        data.write_file(path, lambda file: file.write(b"new, but"))
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["x"]


def test_a_sheet_holds_every_picture_enlarged():
    images = [torch.full((3, 10, 10), value, dtype=torch.uint8) for value in (10, 20, 30)]
    sheet = np.asarray(data.sheet(images, ["a", "b\nc", "d"], columns=2, title="three"))
    for value in (10, 20, 30):
        shown = np.argwhere((sheet == value).all(2))
        assert len(shown) >= 100 * 100 and np.ptp(shown, axis=0).max() >= 99


def test_sides_grow_in_three_parts_that_take_equally_long():
    assert [side for side, _ in data.growing(24, 40)] == [24, 32, 40]
    assert [side for side, _ in data.growing(24, 64)] == [24, 44, 64]
    assert sum(share for _, share in data.growing(24, 40)) == pytest.approx(1)
    assert len({round(share * side**2, 9) for side, share in data.growing(24, 40)}) == 1
    assert data.growing(None, 40) == data.growing(64, 40) == [(40, 1)]
    sides = data.growing(24, 40)
    until = sides[0][1]
    assert [data.side_at(sides, done) for done in (0, until - 1e-6, until, 1)] == [24, 24, 32, 40]
    third, rest = until, sides[1][1]
    times = [data.time_at(sides, done) for done in (0, third / 2, third, third + rest, 1)]
    assert times == pytest.approx([0, 1 / 6, 1 / 3, 2 / 3, 1])
    assert data.time_at([(40, 1)], 0.3) == pytest.approx(0.3)
    for costs in ([1, 1, 1], [2, 3, 5]):
        times = [data.time_at(sides, done, costs) for done in (0, 0.3, 0.8, 1)]
        steps = [data.time_at(sides, time, costs, reverse=True) for time in times]
        assert steps == pytest.approx([0, 0.3, 0.8, 1])


def test_pictures_are_resized_without_aliasing_as_pillow_does():
    images = torch.rand(4, 3, 40, 40)
    for side in (24, 32, 64):
        for image, small in zip(images, data.resized(images, side)):
            for plane, found in zip(image, small):
                expected = Image.fromarray(plane.numpy()).resize((side, side), Image.BILINEAR)
                assert torch.allclose(found, torch.from_numpy(np.array(expected)), atol=1e-5)
    assert data.resized(images, 40) is images


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_mixed_pictures_have_the_labels_of_what_they_are_made_of(kind):
    torch.manual_seed(0)
    y = torch.arange(200)
    images = (
        y.float().view(-1, 1, 1, 1).expand(-1, 3, 20, 20).contiguous()
    )  # picture i is full of i
    x, shares = data.mixed(images, y, 200, **{kind: 1.0})
    assert torch.allclose(shares.sum(1), torch.ones(200)) and ((shares > 0).sum(1) <= 2).all()
    assert torch.allclose(x.mean((1, 2, 3)), shares @ y.float(), atol=1e-3)
    two = (shares > 0).sum(1) == 2
    pairs = shares[two].topk(2).indices  # not all with their neighbours in the batch
    assert two.sum() > 100 and (pairs.diff(dim=1).abs() > 1).double().mean() > 0.9
    pure = (x == x.round()).all()  # whole pixels of one picture or the other
    assert pure if kind == "cutmix" else not pure
    assert data.mixed(images, y, 200)[0] is images


def test_a_survey_says_what_is_there_and_draws_it(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = write_folders(tmp_path / "x", "train/cat", "train/dog", "val/cat", "test")
    shutil.copy(folder / "train/cat/8.png", folder / "train/cat/12.png")  # twice
    shutil.copy(folder / "train/cat/8.png", folder / "test/a.png")  # in the test part as well
    shutil.copy(folder / "train/dog/8.png", folder / "train/cat/11.png")  # both a cat and a dog
    demo = data.load("demo")
    Image.fromarray(demo.images[99].permute(1, 2, 0).numpy()).resize((30, 20)).save(
        folder / "train" / "dog" / "wide.png"
    )
    data.main([str(folder)])
    said = capsys.readouterr().out
    mean, std = data.statistics(data.load(folder).images, torch.arange(12))
    for words in (
        f"{folder} (one folder a class)",
        "labelled    12 pictures\n",
        "validation  3 of these\n",
        "test        4 pictures\n",
        "classes     2: cat, dog\n",
        "balance     from 4 (dog) to 8 (cat) pictures\n",
        "sizes       2 sizes, the commonest 16x16, 30x20, read as 16x16",
        f"mean        {mean[0]:.3f} ",
        f"std         {std[0]:.3f} ",
        "2    pictures are there several times: train/cat/8.png (cat) = train/cat/12.png (cat)",
        "1    of them in the test part too",
        "1    of them with several labels: train/cat/11.png (cat) = train/dog/8.png (dog)",
    ):
        assert words in said, words
    with Image.open("data.png") as sheet:
        assert sheet.width > 4 * 64 and sheet.height > 64
    data.main([str(folder)])  # an earlier sheet is never overwritten
    assert (tmp_path / "earlier-1" / "data.png").exists()


def test_a_survey_of_many_classes_shows_some_of_them_and_says_so():
    labels = torch.arange(200).repeat(3)
    images = torch.zeros(600, 3, 16, 16, dtype=torch.uint8)
    classes = [f"class {k}" for k in range(200)]
    dataset = data.Dataset("many", classes, labels, list("x" * 600), images)
    sheet = data.draw_classes(dataset)
    assert sheet.width < 1600 and sheet.height < 1600  # for the eye, not for the archive
    strip = data.strip(images[:2] + 9, 3)
    assert strip.shape == (3, 16, 3 * 17 - 1) and (strip[..., 34:] == 255).all()
    assert (strip[..., :16] == 9).all() and (strip[..., 16] == 255).all()


@pytest.mark.parametrize("argv", ["nowhere", "x.txt", "demo --out no/x.png", "demo --out x.txt"])
def test_a_survey_of_what_is_not_there_is_one_sentence(tmp_path, monkeypatch, capsys, argv):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").write_text("no")
    with pytest.raises(SystemExit) as stop:
        data.main(argv.split())
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith("data.py: error: ") and error.count("\n") == 1
    assert (tmp_path / "x.txt").read_text() == "no"
