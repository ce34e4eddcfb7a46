"""The networks against torchvision's and the report's figures; checkpoints from strangers."""

import inspect
import pickle
import zipfile

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch.utils.flop_counter import FlopCounterMode

import models


def options_of(network):
    """The options of a network and their defaults."""
    parameters = list(inspect.signature(network).parameters.values())[1:]
    return {parameter.name: parameter.default for parameter in parameters}


@pytest.mark.parametrize(("height", "stride"), [(2, 1), (3, 1), (3, 2), (4, 2)])
def test_a_convolution_of_a_tiny_map_is_torchs_forward_and_backward(height, stride):
    ours, theirs = models.Conv3x3(6, 8, stride), torch.nn.Conv2d(6, 8, 3, stride, 1, bias=False)
    theirs.load_state_dict(ours.state_dict())
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.rand(5, 6, height, height).contiguous(memory_format=layout)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [f(x) for f, x in zip((ours, theirs), inputs)]
        assert torch.allclose(*outputs, atol=1e-6)
        for y in outputs:
            y.square().sum().backward()
        assert torch.allclose(*(x.grad for x in inputs), atol=1e-5)
        assert torch.allclose(ours.weight.grad, theirs.weight.grad, atol=1e-4)


def test_resnet18_starts_with_torchvisions_weights_and_keys():
    torch.manual_seed(3)
    ours = models.build_model("resnet18", 200).state_dict()
    torch.manual_seed(3)
    theirs = torchvision.models.resnet18(num_classes=200).state_dict()
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("size", [40, 57, 96])
@pytest.mark.parametrize("training", [False, True])
def test_resnet18_answers_as_torchvisions(size, training):
    torch.manual_seed(size)
    theirs = torchvision.models.resnet18(num_classes=200)
    with torch.no_grad():
        theirs.train()(
            torch.rand(16, 3, size, size)
        )  # so that the averages aren't the initial ones
    ours = models.build_model("resnet18", 200)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = torch.rand(4, 3, size, size)
    expected = theirs.train(training)(x)
    assert (ours.train(training)(x) - expected).abs().max() <= 1e-5


def test_v14_has_the_reports_size_and_cost():
    network = models.build_model("v14", 200)
    assert sum(p.numel() for p in network.parameters()) == 2_829_576
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network.eval()(torch.rand(1, 3, 40, 40))
    assert round(counter.get_total_flops() / 1e9, 2) == 1.33


@pytest.mark.parametrize(
    "options, millions, gflops",
    [
        ({}, 1.18, (0.036, 0.065, 0.101)),
        (dict(tail=1, path_width=32), 0.76, (0.023, 0.041, 0.063)),
        (dict(tail=1, path_width=32, width=160), 3.82, (0.111, 0.197, 0.308)),
    ],
)
def test_v16_has_the_size_and_the_cost_that_it_says(options, millions, gflops):
    network = models.build_model("v16", 200, **options)
    assert all(group[0].bn2.weight.eq(1).all() for group in network.groups)
    assert isinstance(network.groups[1][0].downsample[0], torch.nn.AvgPool2d)
    assert round(sum(p.numel() for p in network.parameters()) / 1e6, 2) == millions
    for side, gflop in zip((24, 32, 40), gflops):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network.eval()(torch.rand(1, 3, side, side))
        assert round(counter.get_total_flops() / 1e9, 3) == gflop


def test_v16s_options_reach_every_block():
    options = dict(width=64, first=1, depth=2, tail=3, path_width=32, dropout=0.5)
    network = models.build_model("v16", 10, **options)
    kinds = [[type(block).__name__ for block in group] for group in network.groups]
    assert kinds == [["BasicBlock"] * 2] * 2 + [["BasicBlock"] * 2 + ["Bottleneck"] * 3]
    paths = [[block.conv2.groups for block in group] for group in network.groups]
    assert paths == [[2, 2], [4, 4], [8, 8, 8, 8, 8]]
    x = torch.rand(2, 256, 5, 5)
    for block in network.groups[2][1:]:
        block.eval().training = True  # its dropout alone
        assert not torch.equal(block(x), block(x))


@pytest.mark.parametrize(
    "first, widths", [(0.01, [1, 32, 64]), (0.5, [8, 32, 64]), (1, [16, 32, 64])]
)
def test_v16s_first_group_is_as_wide_as_asked(first, widths):
    network = models.build_model("v16", 10, width=16, first=first)
    assert [group[0].conv1.out_channels for group in network.groups] == widths
    assert network.conv1.out_channels == network.bn1.num_features == widths[0]
    assert [group[0].conv1.stride[0] for group in network.groups] == [1, 2, 2]


@pytest.mark.parametrize("first", ["0", "-1", "nan", "inf", "1.01"])
def test_v16s_first_group_is_a_share_of_the_width(first):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        models.parse(f"v16:first={first}")


def test_v14_keeps_the_resolution_until_the_second_group():
    network = models.build_model("v14", 10).eval()
    shapes = []
    for group in network.groups:
        group.register_forward_hook(lambda module, x, y: shapes.append(tuple(y.shape[1:])))
    network(torch.rand(1, 3, 40, 40))
    assert shapes == [(64, 40, 40), (128, 20, 20), (256, 10, 10)]


def test_v14s_options_change_what_they_say():
    def build(**options):
        return models.build_model("v14", 10, **options)

    assert build(groups=4).fc.in_features == 512 and build(groups=2).fc.in_features == 128
    assert build(stem_kernel=3).conv1.weight.shape[-1] == 3
    assert build(width=8).conv1.weight.shape[0] == 8
    shapes = []
    network = build(max_pool=True).eval()
    network.groups[0].register_forward_hook(lambda module, x, y: shapes.append(y.shape[-1]))
    network(torch.rand(1, 3, 40, 40))
    assert shapes == [20]
    x = torch.ones(1, 3, 16, 16)
    for dropout, differ in ((0.5, True), (0.0, False)):
        network = build(dropout=dropout).eval()
        for module in network.modules():  # dropout alone in training mode
            module.training = isinstance(module, models.BasicBlock)
        assert (not torch.equal(network(x), network(x))) == differ


@pytest.mark.parametrize(
    "spec, group, block", [("v14", 0, 0), ("v16", 0, 0), ("v16:tail=1", -1, -1)]
)
def test_a_zero_initialised_block_is_the_identity_and_a_plain_one_is_not(spec, group, block):
    name, options = models.parse(spec)
    network = models.build_model(name, 10, **{**options, "zero_init": True})
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    for weight in (m.weight for m in convolutions if m.weight.numel() > 2000):
        kaiming = (2 / (weight.shape[0] * weight[0, 0].numel())) ** 0.5  # of fan_out
        assert 0.9 < weight.std() / kaiming < 1.1
    identity = network.eval().groups[group][block]
    x = torch.rand(2, identity.conv1.in_channels, 8, 8)
    assert torch.equal(identity(x), x)
    plain = models.build_model(name, 10, **{**options, "zero_init": False})
    plain = plain.eval().groups[group][block]
    assert not torch.allclose(plain(x), x)


@pytest.mark.parametrize("avg_down, seen", [(False, 9), (True, 25)])
def test_an_averaging_skip_connection_sees_every_pixel(avg_down, seen):
    x = torch.zeros(1, 1, 5, 5, requires_grad=True)
    block = models.BasicBlock(1, 2, stride=2, avg_down=avg_down)
    skip = block.downsample[:-1](x)  # without its norm
    assert skip.shape == block.conv1(x).shape
    skip[:, 0].sum().backward()
    assert (x.grad != 0).sum() == seen
    ones = block.downsample[:-1](torch.ones_like(x))  # also where the last square is cut short
    assert torch.allclose(ones, ones[:, :, :1, :1].expand_as(ones))


@pytest.mark.parametrize("training", [False, True])
def test_a_bottleneck_is_torchvisions_resnext_block(training):
    theirs = torchvision.models.resnet.Bottleneck(64, 16, groups=2, base_width=128)
    for values in theirs.state_dict().values():  # norms that can be told apart
        if values.shape == (64,):
            values.uniform_(0.5, 1.5)
    ours = models.Bottleneck(64, path_width=32)
    ours.load_state_dict(theirs.state_dict())
    x = torch.rand(4, 64, 5, 5)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    outputs = [f.train(training)(x) for f, x in zip((ours, theirs), inputs)]
    assert torch.allclose(*outputs, atol=1e-5)
    for y in outputs:
        y.square().sum().backward()
    pairs = zip(ours.parameters(), theirs.parameters())
    for mine, other in [inputs, *pairs]:
        assert torch.allclose(mine.grad, other.grad, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("side", [2, 5])  # at 2 a convolution with one path is a matrix product
def test_each_path_of_a_block_sees_its_own_channels(side):
    block = models.BasicBlock(6, 12, path_width=4)
    x = torch.rand(2, 12, side, side)
    weights = block.conv2.weight.chunk(3)
    expected = [F.conv2d(a, w, padding=1) for a, w in zip(x.chunk(3, 1), weights)]
    assert torch.allclose(block.conv2(x), torch.cat(expected, 1), atol=1e-6)


@pytest.mark.parametrize("channels", [1, 8, 48, 75, 100, 128, 200, 256])
@pytest.mark.parametrize("width", [0, 1, 24, 32, 1024])
def test_there_are_as_many_paths_as_the_channels_fill(channels, width):
    block = models.BasicBlock(4, channels, path_width=width)
    paths = block.conv2.groups
    assert block.conv1.groups == 1 and channels % paths == 0
    if not width or channels < 2 * width:
        assert paths == 1
    else:
        assert channels / paths >= width
        more = range(paths + 1, channels // width + 1)
        assert all(channels % number for number in more)


@pytest.mark.parametrize("name", list(models.MODELS))
def test_every_network_takes_any_size_and_learns_in_every_parameter(name):
    torch.manual_seed(0)
    network = models.build_model(name, 7)
    for height, width in ((16, 16), (40, 40), (57, 33)):
        assert network.eval()(torch.rand(2, 3, height, width)).shape == (2, 7)
    x, y = torch.rand(64, 3, 16, 16), torch.arange(64) % 7
    optimizer = torch.optim.SGD(network.parameters(), 0.05, momentum=0.9)
    losses = []
    network.train()
    for _ in range(8):
        loss = F.cross_entropy(network(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in network.parameters())


def test_a_network_normalises_first():
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    plain = models.build_model("v14", 5, width=8).eval()
    network = models.build_model("v14", 5, mean, std, width=8).eval()
    network.load_state_dict(plain.state_dict())
    x = torch.rand(2, 3, 16, 16)
    expected = torchvision.transforms.functional.normalize(x, mean, std)
    assert torch.allclose(network(x), plain(expected), atol=1e-6)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("resnet17", "unknown model 'resnet17'; the models are resnet18, v2, v3"),
        ("v14:depth=3", "no option 'depth'; it takes groups=3, stem_kernel=5"),
        ("v14:groups=5", "groups=5 of the network should be 2, 3 or 4"),
        ("v14:groups=2.5", "groups=2.5 of v14 should be a whole number"),
        ("v14:max_pool=1", "max_pool=1 of v14 should be true or false"),
        ("v14:groups=true", "groups=true of v14 should be a whole number"),
        ("v14:width=1000000000", "width=1000000000 of the network should be from 1 to 1024"),
        ("v16:tail=-1", "tail=-1 of the network should be from 0 to 100"),
        ("v16:tail=101", "tail=101 of the network should be from 0 to 100"),
        ("v16:path_width=-1", "path_width=-1 of the network should be from 0 to 1024"),
        ("v14:dropout=nan", "dropout=nan of the network should be"),
        ("v14:dropout=much", "dropout=much of v14 should be a number"),
        ("v14:groups", "option groups= of v14 should be a whole number"),
        ("resnet18:width=3", "no option 'width'; it takes no options"),
    ],
)
def test_a_wrong_model_is_one_sentence(spec, words):
    with pytest.raises(ValueError) as error:
        name, options = models.parse(spec)
        models.build_model(name, 10, **options)
    assert words in str(error.value) and "\n" not in str(error.value)


def test_each_version_differs_from_the_one_before_as_its_docstring_says():
    def kinds(name, kind):
        network = models.build_model(name, 10)
        return [m for m in network.modules() if isinstance(m, kind)]

    convolutions = [len(kinds(f"v{n}", torch.nn.Conv2d)) for n in range(2, 14)]
    hidden = [len(kinds(f"v{n}", torch.nn.Linear)) - 1 for n in range(2, 14)]
    assert convolutions == [3, 4, 7, 7, 7, 7, 7, 7, 9, 9, 12, 20]  # v12, v13: with 1x1 ones
    assert hidden == [2, 2, 2, 2, 2, 2, 1, 1, 1, 1, 1, 1]
    assert [kinds(f"v{n}", torch.nn.Conv2d)[0].kernel_size[0] for n in (4, 5)] == [7, 3]
    assert [kinds(f"v{n}", torch.nn.Dropout)[0].p for n in (5, 6)] == [0.5, 0.25]
    assert [len(kinds(f"v{n}", models.Skip)) for n in (6, 7)] == [0, 3]
    assert [len(kinds(f"v{n}", torch.nn.MaxPool2d)) for n in (10, 11)] == [1, 0]
    linear = [kinds(f"v{n}", torch.nn.Linear)[0] for n in (8, 9)]
    assert linear[0].bias.abs().max() > 0 and linear[1].bias.abs().max() == 0
    assert abs(linear[1].weight.std() - 0.01) < 1e-4


def test_v15_is_v14_with_its_dropout_moved_and_a_larger_last_part():
    v14 = models.build_model("v14", 10, width=8)
    v15 = models.build_model("v15", 10, width=8)
    convolutions = [
        [m.weight.shape for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
        for network in (v14, v15)
    ]
    assert convolutions[0] == convolutions[1]
    blocks = [m.dropout for m in v15.modules() if isinstance(m, models.BasicBlock)]
    assert set(blocks) == {0.0} and [type(g[-1]).__name__ for g in v15.groups] == ["Dropout"] * 3
    assert (
        sum(p.numel() for p in v15.fc.parameters()) > sum(p.numel() for p in v14.parameters()) / 10
    )
    assert options_of(models.V15) == options_of(models.V14)


def test_build_model_itself_knows_what_is_valid():
    with pytest.raises(ValueError, match="unknown model 'v99'; the models are resnet18, v2, v3"):
        models.build_model("v99", 10)
    with pytest.raises(ValueError, match="model v14 has no option 'depth'; it takes groups=3"):
        models.build_model("v14", 10, depth=3)


def test_options_are_read_as_the_types_they_have():
    name, options = models.parse("v14:groups=4,dropout=0,max_pool=true,zero_init=False")
    given = {"groups": 4, "dropout": 0.0, "max_pool": True, "zero_init": False}
    assert name == "v14" and {key: options[key] for key in given} == given
    assert type(options["dropout"]) is float
    assert options == {**options_of(models.V14), **given}  # the others too: defaults may change


class Hostile:
    def __reduce__(self):
        return (print, ("the code in the checkpoint ran",))


def test_a_checkpoint_that_may_not_be_read_is_not_called_damaged(tmp_path, monkeypatch):
    def denied(path):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "x.pt").write_bytes(b"whatever")
    monkeypatch.setattr(models, "check_archive", denied)
    with pytest.raises(PermissionError, match="x.pt"):
        models.load_checkpoint(tmp_path / "x.pt")


def test_a_checkpoint_that_is_none_or_holds_code_is_refused(tmp_path, capfd):
    good = {key: kind() for key, kind in models.FIELDS.items()}  # empty where unused here
    good.update(format=1, model="v14", options={"width": 8}, num_classes=3, mean=[0.0] * 3)
    good.update(classes=["a", "b", "c"])
    good.update(std=[1.0] * 3, weights=models.build_model("v14", 3, width=8).state_dict())
    cases = {
        "code": {**good, "extra": Hostile()},
        "no model": {key: good[key] for key in good if key != "model"},
        "no args": {key: good[key] for key in good if key != "args"},
        "another format": {**good, "format": 2},
        "wrong model": {**good, "model": "v99"},
        "wrong option": {**good, "options": {"width": 10**9}},
        "wrong shapes": {**good, "options": {"width": 16}},
        "too few names": {**good, "classes": ["a"]},
        "a list": [good],
    }
    path = tmp_path / "x.pt"
    for case, content in cases.items():
        torch.save(content, path)
        with pytest.raises(ValueError, match=r"x\.pt"):
            models.load_checkpoint(path)
        if case == "code":
            with pytest.raises(ValueError, match="holds code"):
                models.load_checkpoint(path)
    torch.save(good, path)
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    models.load_checkpoint(path)
    assert torch.equal(torch.rand(1), expected)  # the caller's random numbers stay as they were
    network, checkpoint = models.load_checkpoint(path)
    assert network(torch.rand(1, 3, 16, 16)).shape == (1, 3)
    assert checkpoint["options"] == {**options_of(models.V14), "width": 8}  # those left out too
    whole = path.read_bytes()
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("hello", "world")
    other = (tmp_path / "other.zip").read_bytes()
    for content in (
        b"",
        b"no",
        pickle.dumps(Hostile()),
        whole[:1000],
        whole[: len(whole) // 2],
        other,
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"x\.pt is not a checkpoint"):
            models.load_checkpoint(path)
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        models.load_checkpoint(tmp_path / "none.pt")
    assert "ran" not in capfd.readouterr().out
