"""Partial and full fine-tuning of the encoder under the mask head alone; batch norm keeps its statistics throughout."""

from __future__ import annotations

from simulations.evidence.rivals.encoder import Stages


def set_free(encoder: Stages) -> None:
    """Let everything in `encoder` train: the whole of it behind cut 0, the last stage and the neck behind cut 3."""
    encoder.requires_grad_(requires_grad=True)
