"""The two networks: one restores healthy liver, the other segments what the restoration changed.

Both are MONAI U-Nets. Alternatively, the restoration network is DRAEM's auto-encoder.
The thesis's text counts three blocks, but its figure 3.3 shows four. The widths are a setting; the default is four
levels.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import parametrize

from medad.base.errors import InputError
from medad.base.monai_parts import Convolution, DynUNet, Swish, UpSample
from medad.config.liver import NetSettings

Role = Literal["restoration", "segmentation"]
PHASES: tuple[Role, ...] = ("restoration", "segmentation")
FORMAT, METADATA = "adflows-net-1", "adflows"
MODEL = "model.safetensors"
STORED_TYPES = (torch.float32, torch.float16)
"""Types of weights in a file. Models in the package are stored in half precision."""
WEIGHT_STANDARDISATION_EPS = 1e-5


class WeightStandardisation(nn.Module):
    """Weight standardisation (Qiao et al., 2019), scaled by 1 / sqrt(fan-in).

    Each output channel's kernel gets mean 0 and variance 1. The scale keeps the layer's gain at one. The group norm
    that follows makes the result independent of the scale.
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
    # MONAI computes swish in two operations and stores both results; torch's SiLU is the same function in one
    for module in list(net.modules()):
        for name, child in module.named_children():
            if isinstance(child, Swish):
                setattr(module, name, nn.SiLU())
    return net


def _autoencoder(settings: NetSettings) -> nn.Sequential:
    """Build DRAEM's reconstructive network: an auto-encoder without skip connections.

    The layers follow DRAEM's public code. The encoder has two 3 x 3 convolutions per level and max pooling. The decoder
    has bilinear up-sampling and three convolutions per level; the last one reduces the width. The activation is ReLU.
    A 3 x 3 convolution ends the network. Weights are not standardised. DRAEM's five levels of 128 to 1024
    channels are `widths: [128, 256, 512, 1024, 1024]`.

    Group norm replaces DRAEM's batch norm. The restoration of a slice must not depend on the other slices of its batch,
    or on how many of them fit into memory at a time.
    """

    def unit(in_channels: int, out_channels: int) -> Convolution:
        norm = ("group", {"num_groups": settings.groups})
        # no bias: DRAEM has one, but its batch norm cancels it
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
    """Build a network.

    Parameters
    ----------
    role
        `restoration`: 1 input and 1 output channel, grey / 255. The U-Net's convolutions are weight-standardised.
        `segmentation`: 2 input channels (restoration, query), and logits of 2 classes (normal, anomalous). Always a
        U-Net.
    settings
        Architecture, and one width per level. Each level halves the side of the feature map.
    generator
        Random generator for the initial weights (He, normal, fan-in). None: `load` sets the weights later.
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
    """Replace the standardised weights by their values, in place.

    The outputs stay the same, and the weights are not recomputed in each call.
    """
    for module in net.modules():
        if parametrize.is_parametrized(module):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)
    return net


def save(path: Path, net: nn.Module, role: Role, settings: NetSettings, *, dtype: torch.dtype = torch.float32) -> None:
    """Write the weights as safetensors in `dtype`. The metadata has the settings needed to rebuild the network."""
    metadata = {"format": FORMAT, "role": role, "net": settings.model_dump(mode="json")}
    weights = {name: value.detach().cpu().to(dtype).contiguous() for name, value in _weights(net).items()}
    # a single entry: safetensors does not fix the order of several, and equal networks must give equal bytes
    save_file(weights, path, {METADATA: json.dumps(metadata)})


def _weights(net: nn.Module) -> dict[str, nn.Parameter]:
    """Return every weight once. DynUNet registers its blocks twice. The networks have no buffers."""
    return dict(net.named_parameters(remove_duplicate=True))


def load(path: Path, role: Role) -> tuple[nn.Module, NetSettings]:
    """Rebuild a network from its file, on the CPU, with weights in float32. No code from the file is run.

    Raises
    ------
    InputError
        The file is missing, damaged, of another format, or contains the other network.
    """
    if not path.is_file():
        raise InputError(path, f"no {role} network here; expected the model.safetensors that training writes")
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
        raise InputError(path, "the network's settings and weights do not fit together") from error
    return net, settings


@torch.no_grad()
def _copy_weights(net: nn.Module, weights: dict[str, Tensor]) -> None:
    parameters = _weights(net)
    if parameters.keys() != weights.keys():
        raise ValueError("the file's weights are not those of the network")
    for name, parameter in parameters.items():
        if weights[name].dtype not in STORED_TYPES:
            raise ValueError(f"{name} has type {weights[name].dtype}, expected one of {STORED_TYPES}")
        if parameter.shape != weights[name].shape:
            raise ValueError(f"{name} has shape {tuple(weights[name].shape)}, expected {tuple(parameter.shape)}")
        parameter.copy_(weights[name])


def restore(net: nn.Module, query: Float[Tensor, "B 1 S S"]) -> Float[Tensor, "B 1 S S"]:
    """Return the restoration of query slices. Both are grey / 255."""
    restored: Tensor = net(query)
    return restored


def segment_logits(
    net: nn.Module, restored: Float[Tensor, "B 1 S S"], query: Float[Tensor, "B 1 S S"]
) -> Float[Tensor, "B 2 S S"]:
    """Return logits of (normal, anomalous) from restoration and query, concatenated in that order."""
    logits: Tensor = net(torch.cat((restored, query), 1))
    return logits
