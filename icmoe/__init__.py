"""IC-MoE segmentation over a frozen medical SAM: the learning itself, in plain PyTorch.

Nothing in this package imports Flower or Ray; `tests/test_layout.py` enforces it.
"""

__version__ = "0.1.0"
