"""Training losses: the two losses of the thesis, and DRAEM's restoration loss."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from medad.base.monai_parts import SSIMLoss
from medad.config.training import FocalSettings

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5


def l1_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """Return the mean absolute difference to the clean slice.

    Eq. 3.2 writes |I_s - I~_s|: the corrupted slice is the target, which would teach the identity. The text says "to
    restore the anomalous region", so the target here is the clean slice I.
    """
    return functional.l1_loss(restored, clean)


def ssim_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """Return 1 - SSIM, averaged over all pixels: 0 for equal slices, at most 2. Inputs must be in 0..1.

    SSIM follows Wang et al. (2004) with a Gaussian window of 11 px (sigma 1.5 px). MONAI uses complete windows only. As
    in DRAEM's public code, the slices are padded with zeros, so that each pixel is the centre of a window. The loss is
    always computed in single precision: its variances are small differences, which bfloat16 cannot represent.
    """
    margin = [SSIM_WINDOW_PX // 2] * 4
    with torch.autocast(restored.device.type, enabled=False):
        loss: Tensor = SSIMLoss(2, data_range=1.0, win_size=SSIM_WINDOW_PX, kernel_sigma=SSIM_SIGMA_PX)(
            functional.pad(restored.float(), margin), functional.pad(clean.float(), margin)
        )
    return loss


def l2_ssim_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """Return DRAEM's restoration loss (Zavrtanik et al., 2021): mean squared error + (1 - SSIM), equally weighted."""
    return functional.mse_loss(restored, clean) + ssim_loss(restored, clean)


def focal_loss(
    logits: Float[Tensor, "B 2 S S"], mask: Bool[Tensor, "B 1 S S"], settings: FocalSettings
) -> Float[Tensor, ""]:
    """Return the mean focal loss of eq. 3.3: -alpha (1 - m)^gamma log m.

    m is the probability of the true class. alpha is the same for both classes. MONAI's FocalLoss instead weights the
    classes by alpha and 1 - alpha. There the thesis's alpha = 1 would ignore the background.
    """
    log_probability = functional.log_softmax(logits.float(), 1).gather(1, mask.long())
    return (-settings.alpha * (1 - log_probability.exp()) ** settings.gamma * log_probability).mean()
