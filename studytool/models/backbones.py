"""The networks a study can compare: one table without torch, read by the spec, the errors and `build_model`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from studytool.errors import SpecError, unknown_name
from studytool.registry import INITIALIZATIONS

FREEZE_RULES: Mapping[str, str] = {
    "none": "everything is trained",
    "backbone": "only the head is trained",
    "norm_only": "only normalization layers and the head are trained",
    "gradual": "the head first, then one stage more from the top every `gradual_epochs` epochs",
    "layer_decay": "everything is trained, the learning rate times `layer_decay` for every stage further from the head",
}
CHECKPOINT = "checkpoint:"
Clip: TypeAlias = tuple[int, int, int]


@dataclass(frozen=True)
class WeightsFile:
    """A published file of weights.

    `digest` is its SHA-256 in hexadecimal, or as many first digits of it as the publisher gives; "" where none is
    known. `url` is a direct link; where it is "", `page` says where a person finds the file. A `shipped` one needs
    none of these: it comes with studytool.
    """

    name: str
    url: str
    digest: str = ""
    page: str = ""
    shipped: bool = False


@dataclass(frozen=True)
class Backbone:
    """What is known of a network before it is built.

    `build` is called without arguments and gives the untouched network (3 channels, 400 classes, published parameter
    names); `split` takes it apart into `stages`. `head` is the prefix of the parameters that the study's own head
    replaces. Clips are (frames, height, width): `native_clip_thw` is what the published weights were trained on,
    smaller sides than `smallest_thw` are resized up to it, and sides are resized up to a multiple of `multiple_thw`.
    `inflate` turns names of a 2D network's tensors into this one's, `rename` published names into those the network has
    in newer versions of its package. `positions` says how positions enter.
    """

    name: str
    source: str
    build: str
    split: str
    head: str
    stages: tuple[str, ...]
    native_clip_thw: Clip | None
    licence: str
    paper: str
    weights: Mapping[str, WeightsFile] = field(default_factory=dict)
    inflate: str = ""
    rename: str = ""
    smallest_thw: Clip = (1, 1, 1)
    multiple_thw: Clip = (1, 1, 1)
    positions: str = "none"
    pathways: int = 1
    stem_stride_removable: bool = True
    package: str = ""

    @property
    def initializations(self) -> tuple[str, ...]:
        """The names `init:` may have for this backbone, besides `checkpoint:PATH`."""
        shuffled = ("shuffled",) if self.video_init else ()
        return ("random", *self.weights, *shuffled)

    @property
    def video_init(self) -> str:
        """The initialization of weights trained on videos, which `shuffled` shuffles; "" where there is none."""
        return next((init for init in ("kinetics400", "motion") if init in self.weights), "")

    @property
    def freeze_points(self) -> tuple[str, ...]:
        """The names `freeze:` may have for this backbone."""
        return (*FREEZE_RULES, *self.stages)


def find_backbone(name: str) -> Backbone:
    """The backbone of that name; `package.module:function` gives one of the user's own.

    Such a function takes no arguments and returns a `torch.nn.Module` whose children, in order, are the stem and the
    stages, each taking the output of the one before; the last output is averaged over all but batch and channels.
    The stem takes [B, 1, T, H, W], or [B, 3, T, H, W] if it begins with a Conv3d of three input channels. For any other
    ending the function returns a `studytool.models.anatomy.Anatomy`, or a `StagedModel`.

    Raises:
        SpecError: no such backbone.
    """
    if name in BACKBONES:
        return BACKBONES[name]
    if ":" not in name:
        raise SpecError(unknown_name("backbone", name, BACKBONES))
    return Backbone(
        name=name,
        source="your own",
        build=name,
        split="studytool.models.anatomy:split_children",
        head="",
        stages=(),
        native_clip_thw=None,
        licence="your own",
        paper="",
    )


def check_model_choice(backbone: str, init: str, freeze: str, stem_stride: str = "keep") -> None:
    """Refuse a combination that `build_model` could not build; what only a built network can tell is left to it.

    Raises:
        SpecError: one line that names what the backbone offers.
    """
    chosen = find_backbone(backbone)
    if not init.startswith(CHECKPOINT) and init not in chosen.initializations:
        offered = ", ".join((*chosen.initializations, "checkpoint:PATH"))
        if init not in INITIALIZATIONS:
            raise SpecError(f"{unknown_name('initialization', init, INITIALIZATIONS)}; {backbone} offers {offered}")
        raise SpecError(f"backbone {backbone} has no initialization {init!r}; it offers {offered}")
    own_stage = not chosen.stages and re.fullmatch(r"stem|stage[1-9]\d*", freeze)
    if freeze not in chosen.freeze_points and not own_stage:
        problem = unknown_name("freeze point", freeze, chosen.freeze_points)
        raise SpecError(f"backbone {backbone}: {problem}; it has {', '.join(chosen.freeze_points)}")
    if stem_stride == "remove" and not chosen.stem_stride_removable:
        raise SpecError(f"backbone {backbone} cuts its input into patches; its stem_stride can only be 'keep'")


_FOUR_STAGES = ("stem", "stage1", "stage2", "stage3", "stage4")
_FULL_DIGESTS = (
    "b3b3357ead25631ec9c57362ff2128a92d0427e01e2cd184951a44380c3f2e9d",  # r3d_18
    "a90a0ba35ca1242d15b77511ff28bfb29cc596988b5ea36081042f8e2f54212b",  # mc3_18
    "91a641e6c2ab531d1aca5f4321b4d802ec5c3babc15df855cdb6e39c6a1107c8",  # r2plus1d_18
    "ae3be16733081f6d1cd40e4ab980ca23d6df6dc6486d15ada05a5e8ab8c9b975",  # mvit_v2_s
    "7615ae035996b65eb38dad437ae533d2dfcd36f9f89d28c0f0fa7bfb8e6b3130",  # swin3d_t
    "f37072fd47e89c5e827621c5baffa7500819f7896bbacec160b1a16c560e07ec",  # resnet18
    "0676ba61b6795bbe1773cffd859882e5e297624d384b6993f7c9e683e722fb8a",  # resnet50
    "704ceda373461b0a224fcdddd75cd2a5e9f8064512ed47adbddef7f343fd147b",  # swin_t
)
_MOTION_DIGEST = "6623410813c2e6fe438b6e561d3b3b824d50e88b718c1c0b276497b2e49eb2ef"
_KINETICS = "weights trained on Kinetics-400, whose annotations are CC BY 4.0"
_INFLATE = "studytool.models.inflate"


def _torchvision_file(name: str) -> WeightsFile:
    """A file of torchvision: its name ends with the first 8 digits of its SHA-256."""
    digits = name.rpartition("-")[2].partition(".")[0]
    digest = next((full for full in _FULL_DIGESTS if full.startswith(digits)), digits)
    return WeightsFile(name, f"https://download.pytorch.org/models/{name}", digest)


def _files(kinetics400: WeightsFile, imagenet: str = "") -> Mapping[str, WeightsFile]:
    files = {"kinetics400": kinetics400}
    return {**files, "imagenet_inflated": _torchvision_file(imagenet)} if imagenet else files


def _torchvision(
    name: str, file: str, split: str, head: str, clip_thw: Clip, paper: str, imagenet: str = "", **facts: Any
) -> Backbone:
    return Backbone(
        name=name,
        source="torchvision",
        build=f"torchvision.models.video:{name}",
        split=f"studytool.models.torchvision_nets:{split}",
        head=head,
        stages=_FOUR_STAGES,
        native_clip_thw=clip_thw,
        licence=f"BSD-3-Clause; {_KINETICS}",
        paper=paper,
        weights=_files(_torchvision_file(file), imagenet),
        **facts,
    )


def _video_resnet(name: str, file: str, imagenet: str = "", **facts: Any) -> Backbone:
    paper = "Tran et al., CVPR 2018, arXiv 1711.11248"
    return _torchvision(name, file, "split_resnet", "fc.", (16, 112, 112), paper, imagenet, **facts)


def _swin(name: str, file: str, imagenet: str) -> Backbone:
    return _torchvision(
        name,
        file,
        "split_swin",
        "head.",
        (32, 224, 224),
        "Liu et al., CVPR 2022, arXiv 2106.13230",
        imagenet,
        inflate=f"{_INFLATE}:swin_name",
        positions="relative, in windows; a window larger than the volume is cut down to it",
        stem_stride_removable=False,
    )


def _torchvision_mvit(name: str, file: str, paper: str, positions: str) -> Backbone:
    return _torchvision(
        name,
        file,
        "split_mvit",
        "head.",
        (16, 224, 224),
        paper,
        positions=positions,
        stem_stride_removable=False,
    )


def _pytorchvideo(
    name: str, file: str, split: str, head: str, clip_thw: Clip, paper: str, imagenet: str = "", **facts: Any
) -> Backbone:
    url = f"https://dl.fbaipublicfiles.com/pytorchvideo/model_zoo/kinetics/{file}"
    return Backbone(
        name=name,
        source="pytorchvideo",
        build=f"pytorchvideo.models.hub:{name}",
        split=f"studytool.models.pytorchvideo_nets:{split}",
        head=head,
        stages=_FOUR_STAGES,
        native_clip_thw=clip_thw,
        licence=f"Apache-2.0; {_KINETICS}",
        paper=paper,
        weights=_files(WeightsFile(file, url), imagenet),
        **facts,
    )


def _x3d(name: str, file: str, clip_thw: Clip) -> Backbone:
    paper = "Feichtenhofer, CVPR 2020, arXiv 2004.04730"
    return _pytorchvideo(name, file, "split_x3d", "blocks.5.proj.", clip_thw, paper)


def _pytorchvideo_mvit(name: str, file: str, frames: int) -> Backbone:
    return _pytorchvideo(
        name,
        file,
        "split_mvit",
        "head.",
        (frames, 224, 224),
        "Fan et al., ICCV 2021, arXiv 2104.11227",
        positions=_INTERPOLATED,
        stem_stride_removable=False,
    )


def _hara(name: str, file: str) -> Backbone:
    return Backbone(
        name=name,
        source="Hara et al.",
        build=f"studytool.models.hara:{name}",
        split="studytool.models.hara:split",
        head="fc.",
        stages=_FOUR_STAGES,
        native_clip_thw=(16, 112, 112),
        licence=f"MIT; {_KINETICS}",
        paper="Hara, Kataoka, Satoh, CVPR 2018, arXiv 1711.09577",
        weights=_files(WeightsFile(file, "", page="https://github.com/kenshohara/3D-ResNets-PyTorch (old models)")),
    )


def _transformer(name: str, repository: str, frames: int, licence: str, paper: str, positions: str) -> Backbone:
    family = name.partition("_")[0]
    url = f"https://huggingface.co/{repository}/resolve/main/pytorch_model.bin"
    return Backbone(
        name=name,
        source="transformers",
        build=f"studytool.models.transformer_nets:{name}",
        split=f"studytool.models.transformer_nets:split_{family}",
        head="classifier.",
        stages=_FOUR_STAGES,
        native_clip_thw=(frames, 224, 224),
        licence=f"{licence}; {_KINETICS}",
        paper=paper,
        weights=_files(WeightsFile(f"{repository.partition('/')[2]}.bin", url)),
        rename=f"studytool.models.transformer_nets:{family}_name",
        multiple_thw=(2, 16, 16),
        positions=positions,
        stem_stride_removable=False,
        package="transformers",
    )


def _own(name: str, file: str, digest: str) -> Backbone:
    return Backbone(
        name=name,
        source="studytool",
        build=f"studytool.models.tiny:{name}",
        split="studytool.models.tiny:split",
        head="",
        stages=("stem", "stage1", "stage2", "stage3"),
        native_clip_thw=(24, 24, 24),
        licence="Apache-2.0; weights trained on generated clips, Apache-2.0",
        paper="after Tran et al., CVPR 2018, arXiv 1711.11248",
        weights={"motion": WeightsFile(file, "", digest, page="a fresh installation", shipped=True)},
        rename="studytool.models.tiny:own_name",
    )


_INTERPOLATED = "learned table, interpolated to the volume"
_SLOWFAST = "Feichtenhofer et al., ICCV 2019, arXiv 1812.03982"
_I3D = "Carreira and Zisserman, CVPR 2017, arXiv 1705.07750"
_R2PLUS1D = "Tran et al., CVPR 2018, arXiv 1711.11248"
_RESNET50 = "resnet50-0676ba61.pth"
_POOLED = f"{_INFLATE}:resnet50_pooled_name"

BACKBONES: Mapping[str, Backbone] = {
    backbone.name: backbone
    for backbone in (
        _video_resnet("r3d_18", "r3d_18-b3b3357e.pth", "resnet18-f37072fd.pth", inflate=f"{_INFLATE}:resnet18_name"),
        _video_resnet("mc3_18", "mc3_18-a90a0ba3.pth"),
        _video_resnet("r2plus1d_18", "r2plus1d_18-91a641e6.pth"),
        _torchvision(
            "s3d",
            "s3d-d76dad2f.pth",
            "split_s3d",
            "classifier.",
            (16, 224, 224),
            "Xie et al., ECCV 2018, arXiv 1712.04851",
            smallest_thw=(5, 17, 17),
        ),
        _torchvision_mvit(
            "mvit_v1_b", "mvit_v1_b-dbeb1030.pth", "Fan et al., ICCV 2021, arXiv 2104.11227", _INTERPOLATED
        ),
        _torchvision_mvit(
            "mvit_v2_s", "mvit_v2_s-ae3be167.pth", "Li et al., CVPR 2022, arXiv 2112.01526", "relative, interpolated"
        ),
        _swin("swin3d_t", "swin3d_t-7615ae03.pth", "swin_t-704ceda3.pth"),
        _swin("swin3d_s", "swin3d_s-da41c237.pth", "swin_s-5e29d889.pth"),
        _swin("swin3d_b", "swin3d_b_1k-24f7c7c6.pth", "swin_b-68c6b09e.pth"),
        _pytorchvideo(
            "slow_r50",
            "SLOW_8x8_R50.pyth",
            "split_resnet",
            "blocks.5.proj.",
            (8, 224, 224),
            _SLOWFAST,
            _RESNET50,
            inflate=f"{_INFLATE}:resnet50_name",
        ),
        _pytorchvideo(
            "slowfast_r50",
            "SLOWFAST_8x8_R50.pyth",
            "split_slowfast",
            "blocks.6.proj.",
            (32, 224, 224),
            _SLOWFAST,
            pathways=2,
        ),
        _pytorchvideo(
            "c2d_r50",
            "C2D_8x8_R50.pyth",
            "split_resnet",
            "blocks.6.proj.",
            (8, 224, 224),
            "Wang et al., CVPR 2018, arXiv 1711.07971",
            _RESNET50,
            inflate=_POOLED,
        ),
        _pytorchvideo(
            "i3d_r50",
            "I3D_8x8_R50.pyth",
            "split_resnet",
            "blocks.6.proj.",
            (8, 224, 224),
            _I3D,
            _RESNET50,
            inflate=_POOLED,
        ),
        _pytorchvideo(
            "csn_r101",
            "CSN_32x2_R101.pyth",
            "split_resnet",
            "blocks.5.proj.",
            (32, 224, 224),
            "Tran et al., ICCV 2019, arXiv 1904.02811",
        ),
        _pytorchvideo(
            "r2plus1d_r50", "R2PLUS1D_16x4_R50.pyth", "split_resnet", "blocks.5.proj.", (16, 224, 224), _R2PLUS1D
        ),
        _x3d("x3d_xs", "X3D_XS.pyth", (4, 160, 160)),
        _x3d("x3d_s", "X3D_S.pyth", (13, 160, 160)),
        _x3d("x3d_m", "X3D_M.pyth", (16, 224, 224)),
        _x3d("x3d_l", "X3D_L.pyth", (16, 312, 312)),
        _pytorchvideo_mvit("mvit_base_16x4", "MVIT_B_16x4.pyth", 16),
        _pytorchvideo_mvit("mvit_base_32x3", "MVIT_B_32x3_f294077834.pyth", 32),
        _hara("r3d_34", "resnet-34-kinetics.pth"),
        _hara("r3d_50", "resnet-50-kinetics.pth"),
        _transformer(
            "vivit_b_16x2",
            "google/vivit-b-16x2-kinetics400",
            32,
            "MIT",
            "Arnab et al., ICCV 2021, arXiv 2103.15691",
            _INTERPOLATED,
        ),
        _transformer(
            "videomae_b",
            "MCG-NJU/videomae-base-finetuned-kinetics",
            16,
            "CC BY-NC 4.0 (not for commercial use)",
            "Tong et al., NeurIPS 2022, arXiv 2203.12602",
            "fixed sine table, interpolated to the volume",
        ),
        _own("r2plus1d_tiny", "motion.safetensors", _MOTION_DIGEST),
    )
}
