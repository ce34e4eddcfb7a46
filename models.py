"""Every network of the project, written out by hand, and how to get one back from a checkpoint.

    network = build_model("v14", num_classes=200, dropout=0.25)
    logits = network(pictures)                        # float [B, 3, H, W] in [0, 1] -> [B, 200]
    network, checkpoint = load_checkpoint("ckpt.pt")  # in eval mode

A new network is one class and one line in MODELS. Its options are the keyword arguments of its
`__init__`: their names and defaults are what `--model name:option=value` accepts, and what a
checkpoint stores. A network's first act is to normalise, so that its users need no statistics.
"""

import inspect
import pickletools
import re
import zipfile
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn


class Network(nn.Module):
    """Base of all networks: holds the statistics of the training pictures and normalises by them.

    The buffers are no part of the state dict, so that resnet18 has torchvision's keys exactly.
    """

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.ones(1, 3, 1, 1), persistent=False)

    def normalise(self, x):
        """[B, 3, H, W] in [0, 1] to zero mean and unit standard deviation a channel."""
        return (x - self.mean) / self.std


class Conv3x3(nn.Conv2d):
    """A padded 3x3 convolution without bias; on maps of 2x2, where each output sees all inputs,
    computed as one matrix product, which on a CPU was seen to be three times as fast.

    With path_width the channels, as many in as out, go through parallel paths of at least so many
    each (ResNeXt, arXiv:1611.05431; torch's groups), for a fraction of the operations; 0: one path.
    """

    def __init__(self, in_channels, channels, stride=1, path_width=0):
        most = max(1, channels // (path_width or channels))
        paths = max(n for n in range(1, most + 1) if channels % n == 0)
        super().__init__(in_channels, channels, 3, stride, padding=1, groups=paths, bias=False)

    def forward(self, x):
        if x.shape[-2:] != (2, 2) or self.stride != (1, 1) or self.groups > 1 or x.is_cuda:
            return super().forward(x)
        outputs = [self.weight[:, :, 1 - i : 3 - i, 1 - j : 3 - j] for i in (0, 1) for j in (0, 1)]
        matrix = torch.cat(outputs).permute(0, 2, 3, 1).flatten(1)  # [4 O, 4 I]
        x = x.permute(0, 2, 3, 1).flatten(1) @ matrix.T
        return x.view(len(x), 2, 2, -1).permute(0, 3, 1, 2)


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a skip connection: relu(x + f(x)), then dropout (0: none).

    The block of ResNet-18 (He et al. 2015, arXiv:1512.03385, figure 5 left), with torchvision's
    names. With dropout it is the report's RsBlock, which ends in a Dropout. With avg_down the skip
    connection averages what its stride leaves out otherwise (ResNet-D, arXiv:1812.01187).
    path_width: of the second convolution.
    """

    def __init__(self, in_channels, channels, stride=1, dropout=0.0, avg_down=False, path_width=0):
        super().__init__()
        self.conv1 = Conv3x3(in_channels, channels, stride)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels, path_width=path_width)
        self.bn2 = nn.BatchNorm2d(channels)
        self.dropout = dropout
        self.downsample = None
        if stride != 1 or in_channels != channels:
            pool = [nn.AvgPool2d(stride, ceil_mode=True)] if avg_down else []
            conv = nn.Conv2d(in_channels, channels, 1, 1 if avg_down else stride, bias=False)
            self.downsample = nn.Sequential(*pool, conv, nn.BatchNorm2d(channels))

    def forward(self, x):
        skip = x if self.downsample is None else self.downsample(x)
        x = self.bn1(self.conv1(x)).relu_()  # in place: on a CPU a step is up to a tenth shorter
        x = self.bn2(self.conv2(x)).add_(skip).relu_()
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


class Bottleneck(nn.Module):
    """A 1x1, a 3x3 and a 1x1 convolution and a skip connection, all as wide as what comes in: with
    narrow paths deeper than a BasicBlock for a third of its operations. ResNeXt's block as RegNetX
    has it (arXiv:2003.13678), with torchvision's names.
    """

    def __init__(self, channels, path_width, dropout=0.0):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = Conv3x3(channels, channels, path_width=path_width)
        self.bn2 = nn.BatchNorm2d(channels)
        self.conv3 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(channels)
        self.dropout = dropout

    def forward(self, x):
        skip = x
        x = self.bn1(self.conv1(x)).relu_()
        x = self.bn2(self.conv2(x)).relu_()
        x = self.bn3(self.conv3(x)).add_(skip).relu_()
        return F.dropout(x, self.dropout, self.training) if self.dropout else x


def stage(in_channels, channels, stride, dropout=0.0, depth=2, **options):
    """Basic blocks, two in the report's "group"; the first changes width and resolution."""
    rest = [BasicBlock(channels, channels, 1, dropout, **options) for _ in range(depth - 1)]
    return nn.Sequential(BasicBlock(in_channels, channels, stride, dropout, **options), *rest)


def kaiming_fan_out(network):
    """Draw every convolution from N(0, 2 / fan_out) (He et al. 2015, arXiv:1502.01852)."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def start_as_identity(network):
    """Kaiming convolutions, and zero for the last norm of each block (arXiv:1706.02677, 5.1)."""
    kaiming_fan_out(network)
    for module in network.modules():
        if isinstance(module, (BasicBlock, Bottleneck)):
            nn.init.zeros_(getattr(module, "bn3", module.bn2).weight)


class ResNet18(Network):
    """The standard ResNet-18, not pretrained: torchvision's structure, initialisation and keys.

    Made for 224 px: the 7x7 stride-2 stem and the max-pool leave 10x10 of a 40x40 picture before
    the first block and 2x2 after the last. Report, ledger B1 to B8.
    """

    def __init__(self, num_classes):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = stage(64, 64, stride=1)
        self.layer2 = stage(64, 128, stride=2)
        self.layer3 = stage(128, 256, stride=2)
        self.layer4 = stage(256, 512, stride=2)
        self.fc = nn.Linear(512, num_classes)
        kaiming_fan_out(self)

    def forward(self, x):
        x = self.bn1(self.conv1(self.normalise(x))).relu_()  # [B, 64, 20, 20] at 40 px
        x = self.layer1(self.maxpool(x))  # [B, 64, 10, 10]
        x = self.layer4(self.layer3(self.layer2(x)))  # [B, 512, 2, 2]
        return self.fc(x.mean((2, 3)))


def convolution(in_channels, channels, stride=1):
    """ResNet's triple: 3x3 convolution, batch norm, ReLU."""
    norm = nn.BatchNorm2d(channels)
    return nn.Sequential(Conv3x3(in_channels, channels, stride), norm, nn.ReLU(inplace=True))


class V2(Network):
    """The report's first own network: a part of ResNet with AlexNet's classifier (ledger V1).

    The report says of v2 to v13: v2 takes convolution, batch norm and ReLU from ResNet and the
    classifier with dropout from AlexNet, since plain ResNet overfitted at once; up to v7 more
    layers, other parameters, then a skip connection; up to v9 everything played with, careful
    initialisation among it; up to v13 more play with layers. It names nothing else: each change
    below is of the kind it names, and every number is our reading.

    Here: ResNet-18's stem, two stages of one 3x3 convolution, and a classifier of two hidden layers
    as in AlexNet (Krizhevsky et al. 2012), with 1024 units instead of 4096.
    """

    stem_kernel, max_pool = 7, True
    widths = (64, 128)  # channels of the stages; each but the first halves the resolution
    hidden = (1024, 1024)  # units of the classifier's hidden layers
    dropout = 0.5  # before each of them
    stage = staticmethod(convolution)  # function of the channels before and after, and the stride

    def __init__(self, num_classes):
        super().__init__()
        kernel, first = self.stem_kernel, self.widths[0]
        self.conv1 = nn.Conv2d(3, first, kernel, 2, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(first)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if self.max_pool else nn.Identity()
        pairs = zip([first, *self.widths], self.widths)
        self.stages = nn.Sequential(*(self.stage(a, b, 1 if a == b else 2) for a, b in pairs))
        layers, units = [nn.AdaptiveAvgPool2d(2), nn.Flatten()], 4 * self.widths[-1]
        for hidden in self.hidden:
            layers += [nn.Dropout(self.dropout), nn.Linear(units, hidden), nn.ReLU()]
            units = hidden
        self.classifier = nn.Sequential(*layers, nn.Linear(units, num_classes))

    def forward(self, x):
        x = self.bn1(self.conv1(self.normalise(x))).relu_()  # [B, 64, 20, 20] at 40 px
        return self.classifier(self.stages(self.maxpool(x)))


class V3(V2):
    """More layers: a third stage."""

    widths = (64, 128, 256)


class V4(V3):
    """More layers: a second convolution in each stage."""

    def stage(self, inputs, width, stride):
        return nn.Sequential(convolution(inputs, width, stride), convolution(width, width))


class V5(V4):
    """Other parameters: a 3x3 stem, since 7x7 is a sixth of a 40x40 picture's side."""

    stem_kernel = 3


class V6(V5):
    """Other parameters: half the dropout."""

    dropout = 0.25


class Skip(nn.Module):
    """x + f(x)"""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return x + self.function(x)


class V7(V6):
    """A skip connection around the second convolution of each stage."""

    def stage(self, inputs, width, stride):
        return nn.Sequential(convolution(inputs, width, stride), Skip(convolution(width, width)))


class V8(V7):
    """Fewer layers: one hidden layer in the classifier (V2)."""

    hidden = (1024,)


class V9(V8):
    """Careful initialisation: Kaiming convolutions; linear layers small, biases zero (V2)."""

    def __init__(self, num_classes):
        super().__init__(num_classes)
        kaiming_fan_out(self)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)


class V10(V9):
    """More layers: a fourth stage (V3)."""

    widths = (64, 128, 256, 512)


class V11(V10):
    """No max-pool after the stem: the stages see 20x20 of a 40x40 picture, not 10x10 (V3)."""

    max_pool = False


class V12(V11):
    """ResNet's own basic block for each stage, its skip connection past the stride too (V3)."""

    stage = BasicBlock


class V13(V12):
    """More layers: two basic blocks a stage, which v14 keeps (V3)."""

    stage = staticmethod(stage)


class V14(Network):
    """The report's final network: ResNet's structure made for 40x40.

    A picture stays 40x40 until the second group. With the defaults and 200 classes: 2,829,576
    parameters, 1.33 GFLOP a picture forward at 40 px (multiplication and addition counted apart).

    groups: 2, 3 or 4 stages of two blocks, of width, 2 width, 4 width (and 8 width) channels (F3:
        four a little better than three, two worse).
    stem_kernel: 3 or 5 (F6: 5 much better).
    dropout: at the end of each block, 0 to below 1 (F4: 0.1 better than 0.25).
    max_pool: the max-pool after the stem that ResNet has (F0: worse).
    zero_init: start the last norm of each block at zero, so that each block starts as the identity,
        with Kaiming convolutions (Goyal et al. 2017, arXiv:1706.02677, section 5.1). Off is torch's
        plain initialisation, the report's as far as one can tell; at its rate of 0.5 that one is on
        the edge of what trains at all. The one departure from the report, hence an option.
    width: channels of the first group; the report's is 64.
    """

    group, head, first = staticmethod(stage), nn.Linear, 1  # what v15 and v16 change

    def __init__(self, num_classes, groups=3, stem_kernel=5, dropout=0.1, max_pool=False,
                 zero_init=True, width=64):  # fmt: skip
        super().__init__()
        require("groups", groups, groups in (2, 3, 4), "2, 3 or 4")
        require("stem_kernel", stem_kernel, stem_kernel in (3, 5), "3 or 5")
        require("dropout", dropout, 0 <= dropout < 1, "at least 0 and below 1")
        require("width", width, 1 <= width <= 1024, "from 1 to 1024")
        widths = [max(1, round(self.first * width)), *(width * 2**i for i in range(1, groups))]
        self.conv1 = nn.Conv2d(3, widths[0], stem_kernel, padding=stem_kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if max_pool else nn.Identity()
        pairs = zip([widths[0], *widths], widths)
        parts = (self.group(a, b, 1 if a == b else 2, dropout) for a, b in pairs)
        self.groups = nn.Sequential(*parts)
        self.fc = self.head(widths[-1], num_classes)
        if zero_init:
            start_as_identity(self)

    def forward(self, x):
        x = self.bn1(self.conv1(self.normalise(x))).relu_()  # [B, 64, 40, 40]
        x = self.groups(self.maxpool(x))  # [B, 256, 10, 10] after three groups
        return self.fc(x.mean((2, 3)))


class V15(V14):
    """v14 with dropout after each group instead of in its blocks, and a larger last linear part
    (F5: terrible). One hidden layer of 1024 units is our reading of "larger". Options as v14's.
    """

    def group(self, in_channels, channels, stride, dropout):
        return nn.Sequential(stage(in_channels, channels, stride), nn.Dropout(dropout))

    def head(self, features, num_classes):
        return nn.Sequential(nn.Linear(features, 1024), nn.ReLU(), nn.Linear(1024, num_classes))


class V16(V14):
    """Ours, made for accuracy in little time: v14 with a stem that halves the resolution at once
    (most of v14's operations are spent before it does), one block in each of three groups and a
    narrower first group, whose maps are the largest. The recipe quick also has a bottleneck in the
    last group, whose maps are the smallest, and paths of 32 channels.
    200 classes: 1.18 M parameters; 0.036, 0.065, 0.101 GFLOP forward at 24, 32, 40 px; so as quick
    has it 0.76 M; 0.023, 0.041, 0.063 GFLOP; as long 3.82 M; 0.111, 0.197, 0.308 GFLOP.

    width: half the channels of the second group. first: channels of the stem and the first group
    as a share of width, above 0 to 1. depth: basic blocks a group, 1 to 100. tail: bottlenecks
    after these in the last group, 0 to 100. path_width: channels of each path in a block's second
    convolution, at least; 0: one path. stride: of the stem, 1 or 2. avg_down: BasicBlock's. The
    others: v14's.
    """

    def __init__(self, num_classes, width=64, first=0.5, depth=1, groups=3, tail=0, path_width=0,
                 stride=2, dropout=0.0, zero_init=False, avg_down=True):  # fmt: skip
        require("first", first, 0 < first <= 1, "above 0 and at most 1")
        require("depth", depth, 1 <= depth <= 100, "from 1 to 100")
        require("tail", tail, 0 <= tail <= 100, "from 0 to 100")
        require("path_width", path_width, 0 <= path_width <= 1024, "from 0 to 1024")
        require("stride", stride, stride in (1, 2), "1 or 2")
        self.first = first  # both are read while V14 builds its groups
        self.options = dict(depth=depth, avg_down=avg_down, path_width=path_width)
        super().__init__(num_classes, groups, stem_kernel=3, dropout=dropout, zero_init=False,
                         width=width)  # fmt: skip
        if stride == 2:
            self.conv1 = nn.Conv2d(3, self.bn1.num_features, 6, stride=2, padding=2, bias=False)
        channels = self.fc.in_features
        self.groups[-1].extend(Bottleneck(channels, path_width, dropout) for _ in range(tail))
        if zero_init:
            start_as_identity(self)

    def group(self, in_channels, channels, stride, dropout):
        return stage(in_channels, channels, stride, dropout, **self.options)


MODELS = dict(
    resnet18=ResNet18, v2=V2, v3=V3, v4=V4, v5=V5, v6=V6, v7=V7, v8=V8, v9=V9, v10=V10, v11=V11,
    v12=V12, v13=V13, v14=V14, v15=V15, v16=V16,
)  # fmt: skip

# What each checkpoint holds; one to resume from has "resume" too (train.py's Run.state).
FIELDS = dict(
    format=int, model=str, options=dict, num_classes=int, classes=list, size=int, mean=list,
    std=list, weights=dict, args=dict, source=str, fingerprint=str, epoch=int, log=list,
    versions=dict, computed_on=str,
)  # fmt: skip


def require(option, value, fits, expected):
    """Raise the ValueError that says what a network's option should have been."""
    if not fits:
        raise ValueError(f"option {option}={value} of the network should be {expected}")


def checked_options(name, options):
    """All options of a network, those given with the types of their defaults, so that a checkpoint
    doesn't change with a later default; ValueError for an unknown network or option.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}; the models are {', '.join(MODELS)}")
    parameters = list(inspect.signature(MODELS[name]).parameters.values())[1:]
    defaults, checked = {parameter.name: parameter.default for parameter in parameters}, {}
    for option, value in options.items():
        if option not in defaults:
            known = ", ".join(f"{key}={x}" for key, x in defaults.items()) or "no options"
            raise ValueError(f"model {name} has no option {option!r}; it takes {known}")
        kind = type(defaults[option])  # a stranger's list can be endless to print
        text = str(value).lower() if isinstance(value, (str, int, float)) else "?"
        try:
            checked[option] = {"true": True, "false": False}[text] if kind is bool else kind(text)
        except (KeyError, ValueError):
            wanted = {bool: "true or false", int: "a whole number", float: "a number"}[kind]
            raise ValueError(f"option {option}={text} of {name} should be {wanted}") from None
    return {**defaults, **checked}


def parse(spec):
    """'v14:groups=4' -> ('v14', {'groups': 4, 'stem_kernel': 5, and so on}), both checked."""
    name, _, rest = spec.replace(" ", "").partition(":")
    options = dict(item.partition("=")[::2] for item in rest.split(",") if item)
    options = checked_options(name, options)
    with torch.device("meta"):  # no memory, no random numbers: just to see that the values fit
        build_model(name, 2, **options)
    return name, options


def build_model(name, num_classes, mean=(0, 0, 0), std=(1, 1, 1), **options):
    """A new network with random weights.

    It takes float [B, 3, H, W] in [0, 1] with any H, W >= 16 and gives logits [B, num_classes];
    it first normalises by mean and std, one value a channel, of the training pictures.
    An unknown name or option raises a ValueError that lists the valid ones.
    """
    options = checked_options(name, options)
    network = MODELS[name](num_classes, **options)
    network.mean.copy_(torch.tensor(mean).view(1, 3, 1, 1))
    network.std.copy_(torch.tensor(std).view(1, 3, 1, 1))
    return network


def check_archive(path):
    """ValueError unless a file is as torch.save writes it: whole, not compressed, without code; so
    it takes as much memory as it is long, but for its pickle, which may take more and is small.
    """
    known = r"collections OrderedDict|torch\._utils _rebuild_tensor_v2|torch \w+Storage"
    with zipfile.ZipFile(path) as archive:
        sizes = {x.filename.lower(): x.file_size for x in archive.infolist()}  # torch ignores case
        pickles = [name for name in archive.namelist() if name.lower().endswith("data.pkl")]
        packed = any(x.compress_type for x in archive.infolist()) or len(pickles) != 1
        if packed or len(sizes) < len(archive.namelist()) or archive.testzip():
            raise ValueError("it is damaged, or packed otherwise")
        if sum(sizes.values()) > Path(path).stat().st_size or sizes[pickles[0].lower()] > 4 << 20:
            raise ValueError("it takes more memory than a checkpoint does")
        for code, name, _ in pickletools.genops(archive.read(pickles[0])):
            if code.name in ("GLOBAL", "STACK_GLOBAL") and not re.fullmatch(known, str(name)):
                raise ValueError("it holds code")


def load_checkpoint(path, device="cpu"):
    """(the network in eval mode on `device`, the checkpoint's dict) from a file of train.py.

    Nothing in the file is executed, and little more memory taken than it is long. FileNotFoundError
    where there is no such file, ValueError in one sentence where it isn't one of this project.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}: train.py writes ckpt.pt, best.pt")
    try:
        check_archive(path)
        saved = torch.load(path, map_location="cpu", weights_only=True)
        wrong = [key for key, kind in FIELDS.items() if not isinstance(saved.get(key), kind)]
        if wrong or saved["format"] != 1:  # the only one so far
            raise ValueError(f"it has no {', '.join(wrong) or 'format 1'}")
        count, kinds = len({*saved["classes"]}), {*map(type, saved["classes"])}
        if not count == len(saved["classes"]) == saved["num_classes"] or kinds != {str}:
            raise ValueError("it has another number of classes than of class names")
        saved["weights"] = dict(saved["weights"])  # without a state dict's hints on loading it
        if sum(w.nbytes for w in saved["weights"].values()) > Path(path).stat().st_size:
            raise ValueError("its weights are larger than the file")
        saved["options"] = checked_options(saved["model"], saved["options"])
        named = (saved["model"], saved["num_classes"], saved["mean"], saved["std"])
        with torch.device("meta"):  # keys and shapes, before any memory is taken
            build_model(*named, **saved["options"]).load_state_dict(saved["weights"], assign=True)
        with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they were
            network = build_model(*named, **saved["options"])
        network.load_state_dict(saved["weights"])
    except PermissionError:
        raise
    except Exception as error:  # whatever a damaged or hostile file makes its readers raise
        reason = str(error) if type(error) is ValueError else "it is damaged, or of another network"
        raise ValueError(f"{path} is not a checkpoint of this train.py: {reason:.200}") from error
    return network.to(device).eval(), saved
