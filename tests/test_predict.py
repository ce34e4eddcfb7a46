"""Answers: submissions, single pictures, folders, averages, scores; and the choice of precision."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY, save_picture, write_homework
from PIL import Image

import data
import models
import predict
import train


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def table(path):
    with open(path, newline="") as file:
        return list(csv.reader(file))


def test_a_submission_is_the_competitions_table(trained, here):
    source, out = trained
    predict.main([str(out / "ckpt.pt")])
    rows = table(here / "submission.csv")
    assert rows[0] == ["Id", "Category"]
    assert [row[0] for row in rows[1:]] == [f"test_{i:05d}.png" for i in range(9)]
    network, _ = models.load_checkpoint(out / "ckpt.pt")
    with torch.no_grad():
        answers = network(data.load(source).test_images.float() / 255).argmax(1).tolist()
    assert [row[1] for row in rows[1:]] == [["8", "9", "10"][answer] for answer in answers]
    assert b"\r" not in (here / "submission.csv").read_bytes()
    predict.main([str(out / "best.pt")])  # an earlier submission is never overwritten
    assert table(here / "earlier-1" / "submission.csv") == rows


def test_a_network_whose_pictures_were_still_growing_answers_at_their_side(homework, here):
    flags = ["--data", str(homework), "--model", TINY, "--lr", "0.1", "--val", "0.2"]
    train.main([*flags, "--size", "32", "--grow", "16", "--epochs", "2"])  # four steps
    network, checkpoint = models.load_checkpoint("ckpt.pt")
    assert (checkpoint["size"], checkpoint["args"]["size"]) == (24, 32)
    dataset = data.load(homework, 32)
    (here / "folder").mkdir()
    for i in range(9):
        save_picture(dataset.images[i], here / "folder" / f"{i}.png")
    for images, flags in (dataset.test_images, []), (dataset.images[:9], ["--data", "folder"]):
        predict.main(["ckpt.pt", *flags])
        expected = predict.logits(network, data.resized(images.float() / 255, 24)).argmax(1)
        answers = [row[1] for row in table(here / "submission.csv")[1:]]
        assert answers == [["8", "9", "10"][k] for k in expected.tolist()]


def test_a_folder_an_archive_and_one_picture_answer_the_same(trained, here, capsys):
    source, out = trained
    checkpoint = str(out / "ckpt.pt")
    predict.main([checkpoint, "--out", "all.csv"])
    expected = table(here / "all.csv")[1:]
    shutil.copytree(source / "test", here / "pictures")
    predict.main([checkpoint, "--data", "pictures", "--out", "folder.csv"])
    shutil.make_archive("pictures", "zip", here / "pictures")
    predict.main([checkpoint, "--data", "pictures.zip", "--out", "zip.csv"])
    assert table(here / "folder.csv")[1:] == expected == table(here / "zip.csv")[1:]
    shutil.make_archive("wrapped", "zip", here, "pictures")
    predict.main([checkpoint, "--data", "wrapped.zip", "--out", "wrapped.csv"])
    wrapped = [[f"pictures/{name}", answer] for name, answer in expected]
    assert table(here / "wrapped.csv")[1:] == wrapped
    for part in ("train_images", "test_images"):  # no classes, which don't matter here
        shutil.copytree(here / "pictures", here / "parts" / part)
    predict.main([checkpoint, "--data", "parts", "--out", "parts.csv"])
    assert [answer for _, answer in table(here / "parts.csv")[1:]] == [a for _, a in expected * 2]
    capsys.readouterr()
    predict.main([checkpoint, "--data", f"pictures/{expected[4][0]}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[1] == expected[4][1]
    shares = [float(line.split()[0].rstrip("%")) for line in lines[1:]]
    assert len(shares) == 3 and shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=0.2)
    predict.main([checkpoint, "--data", f"pictures/{expected[4][0]}", "--out", "one.csv"])
    assert table(here / "one.csv")[1:] == [expected[4]]


def test_several_networks_and_views_are_averaged_as_probabilities():
    torch.manual_seed(0)
    networks = [models.build_model("v14", 5, width=8) for _ in range(2)]
    images = torch.randint(0, 256, (70, 3, 20, 20), dtype=torch.uint8)
    x = images.float() / 255
    with torch.no_grad():
        expected = sum(network.eval()(x).softmax(1) for network in networks) / 2
        answers = predict.predict(networks, images, precision=torch.float32)
        assert torch.allclose(answers, expected, atol=1e-6)
        mirrored = networks[0](x.flip(-1)).softmax(1)
        expected = (networks[0](x).softmax(1) + mirrored) / 2
        answers = predict.predict(networks[:1], images, views=2, precision=torch.float32)
        assert torch.allclose(answers, expected, atol=1e-6)
    with pytest.raises(ValueError, match="--views 11 should be from 1 to 10"):
        predict.predict(networks, images, views=11)


def test_views_move_by_a_pixel_and_reflect_the_edge():
    x = torch.rand(2, 3, 5, 6)
    padded = np.pad(x.numpy(), ((0, 0), (0, 0), (1, 1), (1, 1)), mode="reflect")
    assert torch.equal(predict.shifted(x, False, 1, 1), torch.from_numpy(padded[..., :5, :6]))
    assert torch.equal(predict.shifted(x, False, -1, 1), torch.from_numpy(padded[..., 2:, :6]))
    assert torch.equal(predict.shifted(x, True, 0, 0), x.flip(-1))
    still_and_diagonals = {(0, 0), (1, 1), (-1, -1), (1, -1), (-1, 1)}
    expected = {(flip, *shift) for flip in (False, True) for shift in still_and_diagonals}
    assert set(predict.VIEWS) == expected and len(predict.VIEWS) == 10
    assert predict.VIEWS[:2] == [(False, 0, 0), (True, 0, 0)]


def test_logits_take_bytes_or_floats_however_many_and_leave_the_mode():
    network = models.build_model("v14", 5, width=8).train()
    images = torch.randint(0, 256, (70, 3, 16, 16), dtype=torch.uint8)
    whole = predict.logits(network, images, precision=torch.float32)
    assert network.training and whole.dtype == torch.float32 and not whole.requires_grad
    few = (images.float() / 255).split(7)
    parts = [predict.logits(network, some, precision=torch.float32) for some in few]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)


def test_the_score_is_that_of_training_on_what_training_did_not_see(trained, here, capsys):
    source, out = trained
    accuracy = float(table(out / "log.csv")[-1][5])
    capsys.readouterr()
    predict.main([str(out / "ckpt.pt"), "--score"])
    printed = capsys.readouterr().out
    assert f"validation: accuracy {accuracy:.4f} on 12 pictures" in printed
    rows = table(here / "scores.csv")[1:]
    assert [row[0] for row in rows] == ["8", "9", "10"]
    right = sum(int(row[1]) * float(row[2]) for row in rows)
    assert right / 12 == pytest.approx(accuracy, abs=1e-3)
    assert accuracy < 1  # so there are mistakes to draw
    with Image.open(here / "mistakes.png") as sheet:
        assert sheet.width >= 96 and "no mistakes at all" not in printed
    assert (here / "confusions.png").exists()


def test_a_score_takes_test_pictures_only_where_they_have_answers(homework, here, capsys):
    flags = ["--data", str(homework), "--model", TINY, "--epochs", "1", "--batch-size", "16"]
    (homework / "test" / "test_00000.png").write_bytes(b"damaged")
    train.main([*flags, "--val", "0.2"])
    predict.main(["ckpt.pt", "--score"])
    assert "validation: accuracy" in capsys.readouterr().out
    refused(capsys, ["ckpt.pt"], "1 of 9 pictures can't be decoded")


def test_several_checkpoints_are_scored_on_what_none_of_them_saw(trained, here, capsys):
    source, out = trained
    flags = ["--data", str(source), "--model", TINY, "--epochs", "1", "--batch-size", "16"]
    train.main([*flags, "--val", "0.5", "--seed", "3", "--out", "other"])
    dataset = data.load(source)
    vals = [set(data.parts(dataset, *key)[1].tolist()) for key in ((0.2, 0), (0.5, 3))]
    capsys.readouterr()
    predict.main([str(out / "ckpt.pt"), "other/ckpt.pt", "--score"])
    assert f"on {len(vals[0] & vals[1])} pictures" in capsys.readouterr().out
    train.main([*flags, "--val", "0", "--out", "final"])
    refused(
        capsys, [out / "ckpt.pt", "final/ckpt.pt", "--score"], "trained on all that is labelled"
    )


def test_confusions_and_classes_are_counted_right():
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    answers = torch.tensor([0, 1, 1, 2, 1, 0, 2])
    rows, confusions = predict.by_class(answers, labels, ["a", "b", "c", "d"])
    assert rows == [
        ["a", 4, "0.2500", "b", 2],
        ["b", 2, "0.5000", "a", 1],
        ["c", 1, "1.0000", "", 0],
        ["d", 0, "", "", 0],
    ]
    assert confusions == {("a", "b"): 2, ("a", "c"): 1, ("b", "a"): 1}
    probabilities = torch.tensor([[0.6, 0.4], [0.1, 0.9], [0.3, 0.7], [0.8, 0.2]])
    assert predict.mistakes(probabilities, torch.tensor([1, 0, 1, 1])) == [1, 3, 0]


def write_layout(folder, layout):
    """Three classes named 8, 9, 10 and what else the layout asks for, lossless."""
    demo = data.load("demo")
    three = [demo.images[(demo.labels == k)] for k in range(3)]
    parts = {"train": slice(0, 12), "val": slice(12, 16), "test": slice(16, 20)}
    if layout == "alone":
        parts = {"": slice(0, 16), "test": slice(16, 20)}
    for part, some in parts.items():
        rows = []
        for k, name in enumerate(("8", "9", "10")):
            inner = {"tiny": f"{name}/images" if part == "train" else "images"}.get(layout, name)
            path = folder / part / inner
            path.mkdir(parents=True, exist_ok=True)
            for i, image in enumerate(three[k][some]):
                save_picture(image, path / f"{name}_{i}.png")
                rows.append(f"{name}_{i}.png\t{name}\t0\t0\t9\t9\n")
        if layout == "tiny" and part == "val":
            (folder / "val" / "val_annotations.txt").write_text("".join(rows))
    return folder


def test_the_homework_as_users_have_it_trains_and_predicts_with_the_right_names(here):
    """Doubled folders, a BOM, CRLF, another header, ids without suffix, in an archive."""
    source = write_homework(here / "deep" / "er", header="file,label")
    for part in ("trainval", "test"):
        shutil.move(source / part, here / part)
        shutil.move(here / part, source / part / part)
    text = (source / "labels.csv").read_text().replace(".png", "").replace("\n", "\r\n")
    (source / "labels.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    shutil.make_archive("x", "xztar", here / "deep")
    train.main(["--data", "x.tar.xz", "--model", TINY, "--epochs", "1", "--batch-size", "16"])
    predict.main(["ckpt.pt"])
    rows = table(here / "submission.csv")
    assert rows[0] == ["file", "label"] and {answer for _, answer in rows[1:]} <= {"8", "9", "10"}
    assert [name for name, _ in rows[1:]] == [f"test_{i:05d}" for i in range(9)]


@pytest.mark.parametrize("layout", ["tiny", "split", "alone"])
def test_each_layout_trains_and_predicts_with_the_right_names(here, capsys, layout):
    source = write_layout(here / "source", layout)
    train.main(["--data", str(source), "--model", TINY, "--epochs", "1", "--batch-size", "16"])
    predict.main(["ckpt.pt"])
    rows = table(here / "submission.csv")[1:]
    assert len(rows) == 12 and {answer for _, answer in rows} <= {"8", "9", "10"}
    sorted_by_class = {f"{name}/{name}_{i}.png" for name in (8, 9, 10) for i in range(4)}
    names = {name.split("/")[1] for name in sorted_by_class} if layout == "tiny" else None
    assert {name for name, _ in rows} == (names or sorted_by_class)
    capsys.readouterr()
    predict.main(["ckpt.pt", "--score"])
    said = capsys.readouterr().out
    accuracy = float(table(here / "log.csv")[-1][5])
    assert f"validation: accuracy {accuracy:.4f}" in said
    if layout != "tiny":  # whose test part has no answers
        right = sum(name.split("/")[0] == answer for name, answer in rows) / len(rows)
        assert f"test: accuracy {right:.4f} on 12 pictures" in said


@pytest.mark.usefixtures("on_cpu")
def test_the_same_files_answer_the_same_in_training_a_folder_a_zip_and_one_by_one(
    here, capsys, monkeypatch
):
    """Validation pictures as JPEG of another size, some of them odd ones."""
    source = write_layout(here / "source", "split")
    pictures = sorted((source / "val").rglob("*.png"))
    for path in pictures:
        with Image.open(path) as image:
            image.resize((24, 20)).save(path.with_suffix(".jpg"))
        path.unlink()
    odd = sorted((source / "val").rglob("*.jpg"))
    with Image.open(odd[0]) as image:
        image.convert("CMYK").save(odd[0])
    with Image.open(odd[5]) as image:
        exif = Image.Exif()
        exif[0x0112] = 8
        image.save(odd[5], exif=exif)
    seen, logits = [], predict.logits
    monkeypatch.setattr(
        predict, "logits", lambda *a, **k: seen.append(logits(*a, **k).softmax(1)) or seen[-1].log()
    )
    flags = ["--epochs", "1", "--batch-size", "16", "--lr", "0.01"]
    train.main(["--data", str(source), "--model", TINY, *flags])
    in_training = dict(zip(data.load(source).ids[-12:], seen[-1]))
    shutil.make_archive("val", "zip", source, "val")
    for place, named in ((source / "val", "val/"), (here / "val.zip", "")):
        images, names = data.load_pictures(place, 16)
        network, _ = models.load_checkpoint("ckpt.pt")
        for name, answer in zip(names, predict.predict([network], images)):
            # to rounding: weights lie otherwise in memory while training
            assert torch.allclose(answer, in_training[named + name], atol=1e-5), name
    for name, expected in in_training.items():
        capsys.readouterr()
        predict.main(["ckpt.pt", "--data", str(source / name)])
        lines = capsys.readouterr().out.splitlines()[1:]
        shares = {line.split()[1]: float(line.split()[0].rstrip("%")) / 100 for line in lines}
        assert shares == pytest.approx(dict(zip(["8", "9", "10"], expected.tolist())), abs=6e-4)


def test_confusions_are_drawn_as_a_matrix_or_as_the_commonest_pairs():
    labels, answers = torch.tensor([0, 0, 0, 1, 1, 2]), torch.tensor([0, 1, 1, 1, 1, 0])
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 16, 16).to(torch.uint8) * 30
    matrix, what = predict.draw_confusions(images, labels, answers, ["a", "b", "c"])
    colours = {colour for _, colour in matrix.getcolors(10_000)}
    assert what == "what is taken for what" and (0, 0x72, 0xB2) in colours  # all of b is right
    assert (0xD5, 0x5E, 0) in colours  # all of c is wrong
    many = [f"class {k}" for k in range(21)]
    pairs, what = predict.draw_confusions(images, labels, answers, many)
    colours = {colour for _, colour in pairs.getcolors(10_000)}
    assert "commonest" in what
    for i in range(5):  # what was taken for b, and for a, beside all that is b or a
        assert (i * 30,) * 3 in colours


def test_runs_are_compared_in_a_table_and_a_picture(trained, here, capsys):
    source, out = trained
    log = (out / "log.csv").read_text().splitlines()
    for name in ("other", "one-epoch", "final"):
        (here / name).mkdir()
    better = log[1].split(",")
    better[5] = "0.9999"
    (here / "other" / "log.csv").write_text("\n".join([*log, ",".join(["3", *better[1:]])]))
    (here / "one-epoch" / "log.csv").write_text("\n".join(log[:2]))
    (here / "final" / "log.csv").write_text(
        "\n".join([log[0], "1,0.1,2.3,0.1,,,50,3"])  # --val 0
    )
    capsys.readouterr()
    predict.main(["--compare", str(out / "ckpt.pt"), "other", "one-epoch"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split()[:4] == ["0.9999", "0.9999", "3", "3"] and lines[1].endswith("other")
    with Image.open(here / "compare.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(100_000)}
    assert {(0, 0x72, 0xB2), (0xD5, 0x5E, 0), (0, 0x9E, 0x73)} <= colours
    refused(capsys, ["--compare", "other", "nowhere"], "there is no nowhere: --compare takes")
    refused(capsys, ["--compare", "other", "final"], "final holds no log.csv of a run")
    header, row = "epoch,train_acc,val_acc,seconds\n", ",0.1,0.1,1\n"
    texts = ["epoch,val_acc\n1,x\n", "epoch,val_acc\n1,0.5\n", header, f"{header}1{row}0{row}"]
    texts += [f"{header}1{row}{row}3{row}", f"{header}1,0.1,nan,1\n", f"{header}{'1' * 200_000}\n"]
    for text in texts:  # edited, merged of two runs, or of something else
        (here / "other" / "log.csv").write_text(text)
        refused(capsys, ["--compare", "other"], "other holds no log.csv of a run")
    (here / "other" / "log.csv").unlink()
    refused(capsys, ["--compare", "other"], "other holds no log.csv of a run")


def refused(capsys, argv, *words):
    with pytest.raises(SystemExit) as stop:
        predict.main([str(x) for x in argv])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    for word in words:
        assert word in error, error


def test_what_is_to_be_written_is_looked_at_before_the_work(trained, tmp_path, monkeypatch, capsys):
    for name, argv in (("submission.csv", []), ("scores.csv", ["--score"])):
        (tmp_path / name / name).mkdir(parents=True)
        monkeypatch.chdir(tmp_path / name)
        refused(capsys, [trained[1] / "ckpt.pt", *argv], f"--out {name} is a folder: name a file")


def test_a_wrong_thing_is_one_sentence_and_nothing_is_written(trained, here, capsys):
    source, out = trained
    checkpoint = out / "ckpt.pt"
    other = write_homework(here / "other", labelled=57)
    demo = torch.load(checkpoint, weights_only=True)
    demo.update(classes=["a", "b", "c"])
    torch.save(demo, here / "demo.pt")
    (here / "broken.png").write_bytes(b"no")
    (here / "nothing").mkdir()
    before = sorted(here.rglob("*"))
    refused(capsys, ["none.pt"], "there is no checkpoint none.pt")
    refused(capsys, [here / "broken.png"], "broken.png is not a checkpoint")
    refused(capsys, [checkpoint, here / "demo.pt"], "has other classes")
    refused(capsys, [checkpoint, "--data", "nowhere"], "there is no nowhere")
    demo.update(classes=torch.load(checkpoint, weights_only=True)["classes"], source="gone")
    torch.save(demo, here / "demo.pt")
    refused(capsys, [here / "demo.pt"], "gone, which it was trained on, is not here")
    refused(capsys, [checkpoint, "--data", "nothing"], "nothing holds no pictures")
    refused(capsys, [checkpoint, "--out", "nothing"], "--out nothing is a folder: name a file")
    refused(capsys, [checkpoint, "--out", checkpoint], "should be a .csv file")
    refused(capsys, [checkpoint, "--out", "no/x.csv"], "--out no/x.csv: there is no folder no")
    refused(capsys, [checkpoint, "--out", "labels.csv"], "--out labels.csv: a data set's answers")
    refused(capsys, ["--compare", out, "--score"], "--compare takes runs and --out alone")
    refused(capsys, ["--compare", out, "--out", "x.csv"], "--out x.csv should be a .png file")
    refused(capsys, [checkpoint, "--data", "broken.png"], "broken.png (not a picture)")
    refused(
        capsys, [checkpoint, "--data", other, "--score"], "is not the data that this checkpoint"
    )
    refused(capsys, [checkpoint, "--views", "0"], "argument --views: '0' should be from 1 to 10")
    refused(capsys, [checkpoint, "--vews", "2"], "unknown argument --vews: did you mean --views?")
    assert sorted(here.rglob("*")) == before


def test_precision_and_layout_follow_what_the_hardware_multiplies_in(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    assert predict.choose_precision(cpu) in (torch.bfloat16, torch.float32)
    for capability, precision in {
        (9, 0): torch.bfloat16,  # H100
        (8, 0): torch.bfloat16,  # A100
        (7, 5): torch.float16,  # T4, whatever is_bf16_supported() says
        (6, 0): torch.float32,  # P100
    }.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, c=capability: c)
        assert predict.choose_precision(gpu) == precision
    network = models.build_model("v16", 2)
    for flags, *chosen in (
        ("flags : fpu avx512f avx512_bf16 ht", torch.bfloat16, torch.channels_last),
        ("flags : fpu amx_bf16 amx_tile", torch.bfloat16, torch.contiguous_format),
        ("flags : fpu avx2 avx512f", torch.float32, torch.channels_last),
    ):
        monkeypatch.setattr(Path, "read_text", lambda path, text=flags: text)
        assert [predict.choose_precision(cpu), predict.memory_format(network, cpu)] == chosen
        assert predict.memory_format(network, gpu) == torch.channels_last
    thin = models.build_model("v16", 2, width=8, first=0.5)  # 1x1 convolutions of 4 channels
    assert predict.memory_format(thin, cpu) == torch.contiguous_format


def test_a_card_without_kernels_is_known():
    recent = ["sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "compute_120"]
    assert predict.has_kernels((7, 5), recent) and predict.has_kernels((9, 0), recent)
    assert predict.has_kernels((8, 9), recent)  # the code for 8.6 runs on it
    assert predict.has_kernels((12, 1), recent)  # from the "compute" code
    assert not predict.has_kernels((6, 0), recent)  # a P100
    assert not predict.has_kernels((7, 0), recent)
