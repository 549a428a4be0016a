"""Networks whose graphs look like those that people export: the families, narrow, with random weights.

Each is written after its paper or its usual code, with the blocks that make its graph what it is (grouped
and depthwise Convs, channel shuffles, squeeze and excitation, attention, shared heads, transposed Convs,
resizes) and with few channels and few blocks. `tools.real_graphs` exports and converts them. There is a
module for each kind, and `blocks` has what several kinds share.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from tools.architectures import detection, mobile, others, plain, residual, segmentation

__all__ = ["ARCHITECTURES", "Architecture"]


@dataclass(frozen=True)
class Architecture:
    """One network.

    Attributes
    ----------
    name, family : str
    build : callable
        Gives the module; seed torch first.
    inputs : tuple of tuple of int
        Shape of each input without the batch.
    outputs : int
    free_size : bool
        Whether height and width may vary.
    jumps : bool
        Whether outputs jump (by comparisons, TopK): a small error may then change them wholly.
    """

    name: str
    family: str
    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...] = ((3, 32, 32),)
    outputs: int = 1
    free_size: bool = False
    jumps: bool = False


_TWO = ((3, 32, 32), (3, 32, 32))
_MAP = (3, 48, 48)

ARCHITECTURES: tuple[Architecture, ...] = (
    Architecture("AlexNet", "classification", plain.alexnet, ((3, 64, 64),)),
    Architecture("VGG-BN", "classification", plain.vgg_bn),
    Architecture("ResNet, basic", "classification", residual.resnet, free_size=True),
    Architecture("ResNet, bottleneck", "classification", residual.resnet_bottleneck),
    Architecture("ResNeXt", "classification", residual.resnext),
    Architecture("RegNetY", "classification", residual.regnet_y),
    Architecture("Res2Net", "classification", residual.res2net),
    Architecture("SqueezeNet", "classification", plain.squeezenet),
    Architecture("GoogLeNet", "classification", plain.googlenet),
    Architecture("Inception v3", "classification", plain.inception_v3),
    Architecture("DenseNet", "classification", plain.densenet),
    Architecture("MobileNetV2", "classification", mobile.mobilenet_v2),
    Architecture("MobileNetV3", "classification", mobile.mobilenet_v3),
    Architecture("EfficientNet", "classification", mobile.efficientnet),
    Architecture("EfficientNetV2", "classification", mobile.efficientnet_v2),
    Architecture("ShuffleNetV2", "classification", mobile.shufflenet_v2),
    Architecture("GhostNet", "classification", mobile.ghostnet),
    Architecture("CSPDarknet", "classification", residual.csp_darknet),
    Architecture("NFNet", "classification", residual.nfnet),
    Architecture("ConvNeXt", "classification", residual.convnext),
    Architecture("ConvMixer", "classification", residual.convmixer),
    Architecture("CoAtNet", "classification", residual.coatnet),
    Architecture("SSD", "detection", detection.ssd, outputs=2),
    Architecture("RetinaNet", "detection", detection.retinanet, outputs=2),
    Architecture("FCOS", "detection", detection.fcos, outputs=4),
    Architecture(
        "Faster R-CNN, proposals", "detection", detection.region_proposals, outputs=2, jumps=True
    ),
    Architecture("CenterNet", "detection", detection.centernet, outputs=3, jumps=True),
    Architecture("YOLOv5", "detection", detection.yolov5, ((3, 64, 64),), outputs=2),
    Architecture("YOLOv8", "detection", detection.yolov8),
    Architecture("U-Net, transposed", "segmentation", segmentation.unet_transposed, free_size=True),
    Architecture("U-Net, resized", "segmentation", segmentation.unet_resized),
    Architecture("FCN", "segmentation", segmentation.fcn, (_MAP,), outputs=2, free_size=True),
    Architecture("DeepLabV3", "segmentation", segmentation.deeplab_v3, (_MAP,), free_size=True),
    Architecture("LR-ASPP", "segmentation", segmentation.lraspp, (_MAP,)),
    Architecture("PSPNet", "segmentation", segmentation.pspnet),
    Architecture("HRNet", "segmentation", segmentation.hrnet),
    Architecture("ESPCN", "super-resolution", others.espcn, ((1, 24, 24),), free_size=True),
    Architecture("EDSR", "super-resolution", others.edsr, ((3, 24, 24),), free_size=True),
    Architecture("SRResNet", "super-resolution", others.srresnet, ((3, 24, 24),)),
    Architecture("Style transfer", "image to image", others.style_transfer),
    Architecture("Autoencoder", "image to image", others.autoencoder),
    Architecture("Siamese", "two inputs", others.siamese, _TWO, outputs=2),
    Architecture("Two streams", "two inputs", others.two_streams, ((3, 32, 32), (1, 32, 32))),
    Architecture("ResNet, channels last", "other shapes", others.channels_last, ((32, 32, 3),)),
    Architecture("M5, 1-D", "other shapes", others.audio, ((1, 1024),)),
    Architecture("R3D, 3-D", "other shapes", others.video, ((3, 8, 16, 16),)),
)
