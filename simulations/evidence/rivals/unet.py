"""MONAI's U-Net with residual units from random weights, on the images themselves (Kerfoot et al., STACOM 2018)."""

from __future__ import annotations

from torch import Tensor, nn

from icmoe.features import Features

SMALL = (16, 32, 64, 128)
LARGE = (32, 64, 128, 256, 512)


class UNet(nn.Module):
    """Instance norm, so that nothing couples the images of a batch.

    Parameters
    ----------
    classes
        K.
    channels
        Per level, each at half the resolution of the one before.
    """

    def __init__(self, classes: int, channels: tuple[int, ...]) -> None:
        super().__init__()
        from monai.networks.nets import UNet as MonaiUNet  # here, since MONAI takes two to three seconds to import

        strides = (2,) * (len(channels) - 1)
        self.net: nn.Module = MonaiUNet(
            spatial_dims=2, in_channels=1, out_channels=classes, channels=channels, strides=strides, num_res_units=2
        )

    def forward(self, features: Features) -> Tensor:
        """Return logits on the image's own grid.

        Parameters
        ----------
        features
            Images B 1 S S in place of an embedding.
        """
        logits_BKSS: Tensor = self.net(features.embedding_BCHW)
        return logits_BKSS
