"""What training minimises: the thesis's two losses, and DRAEM's for the restoration."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from monai.losses.ssim_loss import SSIMLoss
from torch import Tensor
from torch.nn import functional

from medad.config.liver import FocalSettings

SSIM_WINDOW_PX = 11
SSIM_SIGMA_PX = 1.5


def l1_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """Mean absolute difference to the clean slice.

    Eq. 3.2 writes |I_s - I~_s|, the corrupted slice as target, which would teach the identity; the text asks "to
    restore the anomalous region", so the target is I.
    """
    return functional.l1_loss(restored, clean)


def ssim_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """1 - SSIM, the mean over all pixels: 0 for equal slices, at most 2; values 0..1 are expected.

    Wang et al. (2004) with a Gaussian window of 11 px (sigma 1.5). MONAI looks at whole windows only; as in DRAEM's
    public code the slices are put on black, so that each pixel is the middle of a window. Always in single precision:
    variances as differences of means of squares have no digits left in bfloat16.
    """
    margin = [SSIM_WINDOW_PX // 2] * 4
    with torch.autocast(restored.device.type, enabled=False):
        loss: Tensor = SSIMLoss(2, data_range=1.0, win_size=SSIM_WINDOW_PX, kernel_sigma=SSIM_SIGMA_PX)(
            functional.pad(restored.float(), margin), functional.pad(clean.float(), margin)
        )
    return loss


def l2_ssim_loss(restored: Float[Tensor, "B 1 S S"], clean: Float[Tensor, "B 1 S S"]) -> Float[Tensor, ""]:
    """DRAEM's restoration loss (Zavrtanik et al., 2021): mean squared error + (1 - SSIM), weighed alike."""
    return functional.mse_loss(restored, clean) + ssim_loss(restored, clean)


def focal_loss(
    logits: Float[Tensor, "B 2 S S"], mask: Bool[Tensor, "B 1 S S"], settings: FocalSettings
) -> Float[Tensor, ""]:
    """Eq. 3.3: -alpha (1 - m)^gamma log m, m the probability of the true class, alpha alike for both classes; the mean.

    MONAI's FocalLoss weighs the classes alpha and 1 - alpha, so the thesis's alpha = 1 would drop the background there.
    """
    log_probability = functional.log_softmax(logits.float(), 1).gather(1, mask.long())
    return (-settings.alpha * (1 - log_probability.exp()) ** settings.gamma * log_probability).mean()
