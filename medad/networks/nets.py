"""The two networks: MONAI U-Nets, one restoring healthy liver, one segmenting what the restoration changed.

The baseline's restoration network is DRAEM's auto-encoder instead.
The thesis's text counts 3 blocks, its figure 3.3 four; widths are a setting and default to four levels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from monai.networks.blocks.activation import Swish
from monai.networks.blocks.convolutions import Convolution
from monai.networks.blocks.upsample import UpSample
from monai.networks.nets import DynUNet
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medad.base.errors import InputError
from medad.config.liver import NetSettings

Role = Literal["restoration", "segmentation"]
PHASES: tuple[Role, ...] = ("restoration", "segmentation")
FORMAT, METADATA = "adflows-net-1", "adflows"
MODEL = "model.safetensors"
WEIGHT_STANDARDISATION_EPS = 1e-5


class WeightStandardisation(nn.Module):
    """Zero mean and unit variance for each output channel's kernel (Qiao et al., 2019), scaled by 1 / sqrt(fan-in).

    The scale keeps the layer's gain at one; the group norm that follows makes the result independent of it.
    """

    def forward(self, weight: Tensor) -> Tensor:
        axes = tuple(range(1, weight.ndim))
        centred = weight - weight.mean(axes, keepdim=True)
        variance = centred.square().mean(axes, keepdim=True)
        scale: Tensor = torch.rsqrt(variance + WEIGHT_STANDARDISATION_EPS) / weight[0].numel() ** 0.5
        return centred * scale


def _u_net(settings: NetSettings, in_channels: int, out_channels: int) -> DynUNet:
    levels = len(settings.widths)
    net = DynUNet(
        spatial_dims=2,
        in_channels=in_channels,
        out_channels=out_channels,
        kernel_size=[3] * levels,
        strides=[1] + [2] * (levels - 1),
        upsample_kernel_size=[2] * (levels - 1),
        filters=list(settings.widths),
        norm_name=("group", {"num_groups": settings.groups}),
        act_name="swish",
    )
    # MONAI writes swish as two operations that keep both results; torch's SiLU is the same function in one
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Swish):
                setattr(module, name, nn.SiLU())
    return net


def _autoencoder(settings: NetSettings) -> nn.Sequential:
    """DRAEM's reconstructive network: all that reaches the output has gone through the narrowest level.

    As its public code has it: two 3 x 3 convolutions a level and max pooling downwards; bilinear up-sampling, then
    three convolutions upwards, of which the last narrows; ReLU; a 3 x 3 convolution at the end; no weight
    standardisation. DRAEM's five levels of 128 to 1024 are `widths: [128, 256, 512, 1024, 1024]`.

    Group norm stands in the place of its batch norm: what a slice is restored to must not depend on the other slices,
    nor on how many of a batch fit into memory at a time.
    """

    def unit(in_channels: int, out_channels: int) -> Convolution:
        norm = ("group", {"num_groups": settings.groups})
        # without bias: batch norm cancels DRAEM's
        return Convolution(2, in_channels, out_channels, kernel_size=3, act="relu", norm=norm, bias=False)

    layers: list[nn.Module] = []
    channels = 1
    for level, width in enumerate(settings.widths):
        layers += [nn.MaxPool2d(2)] if level else []
        layers += [unit(channels, width), unit(width, width)]
        channels = width
    for width in settings.widths[-2::-1]:
        layers.append(
            UpSample(2, channels, channels, 2, mode="nontrainable", interp_mode="bilinear", align_corners=True)
        )
        layers += [unit(channels, channels), unit(channels, channels), unit(channels, width)]
        channels = width
    return nn.Sequential(*layers, nn.Conv2d(channels, 1, 3, padding=1))


def build(role: Role, settings: NetSettings, generator: torch.Generator | None = None) -> nn.Module:
    """Make a network.

    Parameters
    ----------
    role
        `restoration`: 1 channel in, 1 out, grey / 255; the U-Net's convolutions are weight-standardised.
        `segmentation`: 2 channels in (restoration, query), 2 classes out (normal, anomalous), logits; a U-Net.
    settings
        Widths, one a level; each level halves the side. The architecture.
    generator
        Source of the initial weights (He, normal, fan-in); None leaves them for `load` to fill.
    """
    plain = settings.architecture == "autoencoder"
    if plain and role == "segmentation":
        raise ValueError("the segmentation network is always a U-Net")
    net = _autoencoder(settings) if plain else _u_net(settings, *((1, 1) if role == "restoration" else (2, 2)))
    if generator is not None:
        _initialise(net, generator)
    if role == "restoration" and not plain:
        for module in net.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3):
                parametrize.register_parametrization(module, "weight", WeightStandardisation())
    return net


@torch.no_grad()
def _initialise(net: nn.Module, generator: torch.Generator) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def fold_standardisation(net: nn.Module) -> nn.Module:
    """Replace standardised weights by their values, in place: the same outputs, nothing recomputed per call."""
    for module in net.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return net


def save(path: Path, net: nn.Module, role: Role, settings: NetSettings) -> None:
    """Write weights as safetensors; the settings that rebuild the network travel in its metadata."""
    metadata = {"format": FORMAT, "role": role, "net": settings.model_dump(mode="json")}
    weights = {name: value.detach().cpu().contiguous() for name, value in _weights(net).items()}
    # one entry: safetensors writes several in any order, and equal networks must give equal bytes
    save_file(weights, path, {METADATA: json.dumps(metadata)})


def _weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """Every weight once: DynUNet registers its blocks a second time under `skip_layers`. There are no buffers."""
    return dict(net.named_parameters(remove_duplicate=True))


def load(path: Path, role: Role) -> tuple[nn.Module, NetSettings]:
    """Rebuild a network from its file, on the CPU. No code in the file is run.

    Raises
    ------
    InputError
        The file is missing, damaged, not one of ours, or holds the other network.
    """
    if not path.is_file():
        raise InputError(path, f"no {role} network here; expected a model.safetensors made by training")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = json.loads((file.metadata() or {}).get(METADATA, "{}"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(path, f"not a readable safetensors file ({error})") from error
    if metadata.get("format") != FORMAT or metadata.get("role") != role:
        raise InputError(path, f"expected a {FORMAT} {role} network, found {metadata.get('role', 'something else')}")
    try:
        settings = NetSettings.model_validate(metadata["net"])
        net = build(role, settings)
        _copy_weights(net, weights)
    except (KeyError, ValueError, RuntimeError, ValidationError) as error:
        raise InputError(path, "the network's settings and its weights do not fit together") from error
    return net, settings


@torch.no_grad()
def _copy_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = _weights(net)
    if parameters.keys() != weights.keys():
        raise ValueError("other weights than the network's")
    for name, parameter in parameters.items():
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} has another shape")
        parameter.copy_(weights[name])


def restore(net: nn.Module, query: Float[Tensor, "B 1 S S"]) -> Float[Tensor, "B 1 S S"]:
    """Restoration of a query slice; both grey / 255."""
    restored: Tensor = net(query)
    return restored


def segment_logits(
    net: nn.Module, restored: Float[Tensor, "B 1 S S"], query: Float[Tensor, "B 1 S S"]
) -> Float[Tensor, "B 2 S S"]:
    """Logits of (normal, anomalous) from restoration and query, concatenated in that order."""
    logits: Tensor = net(torch.cat((restored, query), 1))
    return logits
