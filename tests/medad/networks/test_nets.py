"""Networks: weight standardisation, files, and shapes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import parametrize

from medad.base.errors import InputError
from medad.config.liver import NetSettings
from medad.networks import nets

SMALL = NetSettings(widths=(8, 16, 32), groups=4)
NARROW = SMALL.model_copy(update={"architecture": "autoencoder"})


def _net(role: nets.Role, seed: int = 0) -> nn.Module:
    return nets.build(role, SMALL, torch.Generator().manual_seed(seed))


def _original(module: nn.Module) -> torch.Tensor:
    """Return the weight before standardisation."""
    return module.get_parameter("parametrizations.weight.original").detach()


def test_standardised_weights_have_mean_zero_and_variance_one_over_fan_in() -> None:
    net = _net("restoration")
    convolutions = [
        module for module in net.modules() if isinstance(module, nn.Conv2d) and module.kernel_size == (3, 3)
    ]
    assert len(convolutions) == 2 * (2 * len(SMALL.widths) - 1)  # two per block, in encoder and decoder
    for module in convolutions:
        assert parametrize.is_parametrized(module, "weight")
        kernels = module.weight.detach().flatten(1).double()
        torch.testing.assert_close(kernels.mean(1), torch.zeros(len(kernels)).double(), atol=1e-6, rtol=0)
        fan_in = kernels.shape[1]
        raw = _original(module).flatten(1).double()
        variance = raw.var(1, unbiased=False)
        torch.testing.assert_close(kernels.var(1, unbiased=False), variance / (variance + 1e-5) / fan_in)


def test_segmentation_is_not_standardised() -> None:
    assert not any(parametrize.is_parametrized(module) for module in _net("segmentation").modules())


def test_shifting_and_scaling_a_kernel_changes_nothing() -> None:
    net, x = _net("restoration").eval(), torch.rand(2, 1, 32, 32)
    with torch.no_grad():
        before = net(x)
        for module in net.modules():
            if parametrize.is_parametrized(module):
                _original(module).mul_(10).add_(0.5)
        torch.testing.assert_close(net(x), before, atol=1e-3, rtol=1e-3)


def test_bake_keeps_the_output() -> None:
    net, x = _net("restoration").eval(), torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(nets.fold_standardisation(net)(x), before)
    assert not any(parametrize.is_parametrized(module) for module in net.modules())


@pytest.mark.parametrize("architecture", ["unet", "autoencoder"])
@pytest.mark.parametrize("widths", [(8, 16, 32), (8, 16, 32, 64), (8, 8, 8, 8, 8)])
def test_shapes_at_every_depth(widths: tuple[int, ...], architecture: Literal["unet", "autoencoder"]) -> None:
    settings = NetSettings(widths=widths, groups=4)
    restoration = settings.model_copy(update={"architecture": architecture})
    generator = torch.Generator().manual_seed(0)
    query = torch.rand(2, 1, 64, 64)
    restored = nets.restore(nets.build("restoration", restoration, generator), query)
    logits = nets.segment_logits(nets.build("segmentation", settings, generator), restored, query)
    assert restored.shape == (2, 1, 64, 64)
    assert logits.shape == (2, 2, 64, 64)


def test_equal_seeds_give_equal_nets() -> None:
    one, same, other = _net("segmentation"), _net("segmentation"), _net("segmentation", 1)
    pairs = zip(one.state_dict().values(), same.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(one.state_dict().values(), other.state_dict().values(), strict=True)
    assert not all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    ("role", "shape"), [("restoration", SMALL), ("segmentation", SMALL), ("restoration", NARROW)], ids=str
)
def test_file_round_trip(tmp_path: Path, role: nets.Role, shape: NetSettings) -> None:
    net = nets.build(role, shape, torch.Generator().manual_seed(0)).eval()
    nets.save(tmp_path / "model.safetensors", net, role, shape)
    loaded, settings = nets.load(tmp_path / "model.safetensors", role)
    x = torch.rand(1, 1 if role == "restoration" else 2, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded.eval()(x), net(x))
    assert settings == shape


def test_a_file_without_an_architecture_holds_a_u_net(tmp_path: Path) -> None:
    """Files from before the second architecture have no such entry."""
    path, net = tmp_path / "model.safetensors", _net("restoration")
    net_settings = SMALL.model_dump(mode="json", exclude={"architecture"})
    metadata = {"format": nets.FORMAT, "role": "restoration", "net": net_settings}
    save_file({n: p.detach() for n, p in net.named_parameters()}, path, {nets.METADATA: json.dumps(metadata)})
    assert nets.load(path, "restoration")[1] == SMALL


@pytest.mark.parametrize(("shape", "blind"), [(SMALL, False), (NARROW, True)], ids=["unet", "autoencoder"])
def test_all_that_an_autoencoder_knows_goes_through_its_narrowest_level(shape: NetSettings, blind: bool) -> None:
    """Replace that level's features by zeros: an auto-encoder restores two images alike, a U-Net differently."""
    net = nets.build("restoration", shape, torch.Generator().manual_seed(0)).eval()
    narrowest = [m for m in net.modules() if isinstance(m, torch.nn.GroupNorm) and m.num_channels == shape.widths[-1]]
    hooks = [module.register_forward_hook(lambda _m, _i, out: torch.zeros_like(out)) for module in narrowest]
    with torch.no_grad():
        one, other = net(torch.rand(1, 1, 32, 32)), net(torch.rand(1, 1, 32, 32))
    assert torch.equal(one, other) == blind
    for hook in hooks:
        hook.remove()
    with torch.no_grad():
        assert not torch.equal(net(torch.rand(1, 1, 32, 32)), net(torch.rand(1, 1, 32, 32)))


def test_an_autoencoder_restores_each_slice_by_itself_and_keeps_no_statistics() -> None:
    net = nets.build("restoration", NARROW, torch.Generator().manual_seed(0)).double()
    x = torch.rand(3, 1, 32, 32, dtype=torch.float64)
    assert not list(net.buffers())
    assert not any(parametrize.is_parametrized(module) for module in net.modules())
    with torch.no_grad():
        torch.testing.assert_close(net.train()(x)[1:2], net.eval()(x[1:2]))


def test_a_segmentation_network_is_always_a_u_net(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="always a U-Net"):
        nets.build("segmentation", NARROW)
    path = tmp_path / "model.safetensors"
    nets.save(path, _net("segmentation"), "segmentation", NARROW)
    with pytest.raises(InputError, match="do not fit"):
        nets.load(path, "segmentation")
    nets.save(path, _net("restoration"), "restoration", NARROW)
    with pytest.raises(InputError, match="do not fit"):
        nets.load(path, "restoration")


def test_bad_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with pytest.raises(InputError, match=r"model\.safetensors: no restoration network"):
        nets.load(path, "restoration")
    path.write_bytes(b"not a tensor")
    with pytest.raises(InputError, match="not a readable safetensors"):
        nets.load(path, "restoration")
    save_file({"a": torch.zeros(1)}, path)
    with pytest.raises(InputError, match="found something else"):
        nets.load(path, "restoration")
    nets.save(path, _net("segmentation"), "segmentation", SMALL)
    with pytest.raises(InputError, match="found segmentation"):
        nets.load(path, "restoration")
    nets.save(path, _net("segmentation"), "segmentation", NetSettings(widths=(8, 8, 8), groups=4))
    with pytest.raises(InputError, match="do not fit"):
        nets.load(path, "segmentation")
