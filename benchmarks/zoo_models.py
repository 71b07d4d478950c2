"""Which networks the zoo holds: those of torchvision, small ones of timm's families, and other packages."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import timm
import torch
import torchvision
from torch import nn
from torchvision.models import quantization
from torchvision.ops import FrozenBatchNorm2d

from benchmarks.zoo_entry import Entry, images, images_with_boxes
from benchmarks.zoo_packages import entries_of_packages

# The smallest size that a network accepts, where that is not 64.
_SIZES = {
    "inception_v3": 299,
    "timm/inception_v3": 128,
    "quantized_inception_v3": 299,
    **dict.fromkeys(
        ("timm/inception_resnet_v2", "timm/inception_v4", "timm/nasnetalarge", "timm/pnasnet5large"), 96
    ),
    **dict.fromkeys(("timm/halonet26t", "timm/bat_resnext26ts"), 256),
    "maxvit_t": 224,
    "vit_h_14": 56,
}
_VIT = {"vit_b_16", "vit_b_32", "vit_l_16", "vit_l_32", "vit_h_14"}

_TIMM = """
resnet18 resnet26d resnext50_32x4d seresnet18 resnetrs50 ecaresnet26t skresnet18 skresnext50_32x4d
resnest14d resnetv2_18 regnetx_002 regnety_002 regnetz_b16 regnetv_040 gernet_s repvgg_a0
mobileone_s0 gcresnext26ts halonet26t botnet26t_256 lambda_resnet26t bat_resnext26ts efficientnet_b0
efficientnet_lite0 tf_efficientnet_lite0 tf_efficientnetv2_b0 efficientnetv2_rw_t mixnet_s
mnasnet_small mobilenetv2_050 semnasnet_075 spnasnet_100 fbnetc_100 tinynet_e mobilenetv3_small_050
tf_mobilenetv3_small_minimal_100 mobilenetv4_conv_small mobilenetv4_hybrid_medium lcnet_050
fbnetv3_b hardcorenas_a rexnet_100 rexnetr_200 ghostnet_050 ghostnetv2_100 repghostnet_050
convnext_atto convnextv2_atto densenet121 densenetblur121d rdnet_tiny dla34 dla60_res2net
hrnet_w18_small res2net50_14w_8s res2next50 nf_resnet26 nf_regnet_b0 eca_nfnet_l0 dm_nfnet_f0
selecsls42b ese_vovnet19b_dw vovnet39a cspresnet50 cspdarknet53 darknet53 cs3darknet_s cspnext_tiny
dpn48b legacy_seresnet18 tresnet_m vgg11_bn xception41 legacy_xception inception_v3 inception_v4
inception_resnet_v2 inception_next_atto nasnetalarge pnasnet5large hgnetv2_b0 fasternet_t0
starnet_s1 mambaout_femto convmixer_768_32 repvit_m0_9 shvit_s1 swiftformer_xs efficientvim_m1
lowformer_b0 vit_tiny_patch16_224 vit_small_r26_s32_224 vit_relpos_small_patch16_224
deit_tiny_patch16_224 deit_tiny_distilled_patch16_224 deit3_small_patch16_224 beit_base_patch16_224
eva02_tiny_patch14_224 swin_tiny_patch4_window7_224 swin_s3_tiny_224 swinv2_tiny_window8_256
swinv2_cr_tiny_ns_224 mixer_s16_224 resmlp_12_224 gmlp_ti16_224 gmixer_12_224 poolformer_s12
convformer_s18 caformer_s18 levit_128s pit_ti_224 xcit_nano_12_p16_224 cait_xxs24_224 coat_tiny
coat_lite_tiny twins_pcpvt_small twins_svt_small visformer_tiny edgenext_xx_small mobilevit_xxs
mobilevitv2_050 efficientformer_l1 efficientformerv2_s0 fastvit_t8 maxvit_rmlp_pico_rw_256
coatnet_pico_rw_224 crossvit_tiny_240 volo_d1_224 tnt_s_patch16_224 convit_tiny nest_tiny pvt_v2_b0
mvitv2_tiny sequencer2d_s focalnet_tiny_srf gcvit_xxtiny davit_tiny efficientvit_b0 efficientvit_m0
nextvit_small tiny_vit_5m_224 hiera_tiny_224 iformer_t vitamin_small_224
"""


def entries() -> list[Entry]:
    """Returns all networks of the zoo."""
    return [*_torchvision(), *_quantizable(), *_dense(), *_backbones(), *_timm(), *entries_of_packages()]


def _torchvision() -> Iterator[Entry]:
    for name in torchvision.models.list_models(module=torchvision.models):
        size = _SIZES.get(name, 64)
        sized = {"image_size": size} if name in _VIT else {}
        yield _entry(name, size, _builder(name, **sized))


def _quantizable() -> Iterator[Entry]:
    for name in torchvision.models.list_models(module=quantization):
        for mode in ("eager", "fx"):
            size = _SIZES.get(name, 64)
            build, call = _builder(name, quantize=False), images(size)
            yield Entry(f"{name} ({mode})", "torchvision", _family(name), str(size), build, call, mode)


def _dense() -> Iterator[Entry]:
    for name in ("deeplabv3_resnet50", "fcn_resnet50"):
        yield _entry(name, 64, _builder(name, weights_backbone=None))
    name = "fasterrcnn_resnet50_fpn"
    build = _builder(name, weights_backbone=None, min_size=128, max_size=128)
    call = images_with_boxes(128)
    yield Entry(name, "torchvision", _family(name), "128", build, call, part="backbone")


def _backbones() -> Iterator[Entry]:
    """Yields the backbones of detectors, also with frozen batch-norms, as they come with trained weights."""
    resnets = ("fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn")
    for name in (*resnets, "ssdlite320_mobilenet_v3_large"):
        yield _entry(name, 128, _backbone(name), ".backbone")
    for name in resnets:
        yield _entry(name, 128, _frozen(_backbone(name), 128), ".backbone (frozen)")


def _entry(name: str, size: int, build: Callable[[], nn.Module], what: str = "") -> Entry:
    return Entry(f"{name}{what}", "torchvision", _family(name), str(size), build, images(size))


def _backbone(name: str) -> Callable[[], nn.Module]:
    return lambda: _builder(name, weights_backbone=None)().get_submodule("backbone")


def _frozen(build: Callable[[], nn.Module], size: int) -> Callable[[], nn.Module]:
    """Returns what freezes the batch-norms of a network, with the statistics of a batch."""

    def frozen() -> nn.Module:
        network = build()
        norms = {name: m for name, m in network.named_modules() if isinstance(m, nn.BatchNorm2d)}
        for norm in norms.values():
            norm.momentum = 1.0
        with torch.no_grad():
            network(torch.randn(2, 3, size, size))
        for name, norm in norms.items():
            network.set_submodule(name, FrozenBatchNorm2d(norm.num_features, norm.eps))
            network.get_submodule(name).load_state_dict(norm.state_dict())
        return network

    return frozen


def _builder(name: str, **options: Any) -> Callable[[], nn.Module]:
    return lambda: torchvision.models.get_model(name, weights=None, **_options(name), **options)


def _options(name: str) -> dict[str, Any]:
    """Returns the arguments with which a constructor neither warns nor initializes for a minute."""
    return {"init_weights": False} if name.removeprefix("quantized_") in ("googlenet", "inception_v3") else {}


def _family(name: str) -> str:
    return torchvision.models.get_model_builder(name).__module__.rpartition(".")[2]


def _timm() -> Iterator[Entry]:
    for name in _TIMM.split():
        config: Any = timm.get_pretrained_cfg(name)
        native = config.input_size[1]
        size = native if config.fixed_input_size else _SIZES.get(f"timm/{name}", 64)
        family = timm.models.model_entrypoint(name).__module__.rpartition(".")[2]
        yield Entry(f"timm/{name}", "timm", family, str(size), _timm_builder(name), images(size))


def _timm_builder(name: str) -> Callable[[], nn.Module]:
    return lambda: timm.create_model(name, pretrained=False)
