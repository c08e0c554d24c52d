"""segment-anything's attention in another order: window by window, in blocks of scores that stay in the processor's cache.

The same sums as `segment_anything.modeling.image_encoder.Attention` with its windows, but

* query, key and value are computed of the tokens that are there. segment-anything pads the map to whole windows before: at
  256 px, 784 tokens for 256. A padded token's query, key and value are the bias of their layer, so padded keys are filled in
  and padded queries left out.
* the decomposed relative positions are added to a block of scores where it is made, not to the whole map of them. PyTorch's
  fused attention would need them as a mask of full size, or folded into a query and key of three times the width.

Shapes: B images, H x W tokens of the map, r x c of them in a window of h x w, L = h w keys, n heads of d channels, G = B n,
g heads and X queries at once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

CPU_SCORES, GPU_SCORES = 2**18, 2**26
"""Scores at once: 1 MiB for each thread of a CPU, half of a usual second-level cache; 256 MiB on a GPU."""


class SamAttention(nn.Module):
    """segment-anything's attention, windows included; the block around it must not partition.

    Parameters
    ----------
    stock
        The module whose weights are used.
    window
        Side of a window, tokens; 0 for one window that is the map.
    """

    def __init__(self, stock: Any, window: int) -> None:  # noqa: ANN401  (segment-anything is untyped)
        super().__init__()
        self.num_heads: int = stock.num_heads
        self.scale: float = stock.scale
        self.qkv: nn.Linear = stock.qkv
        self.proj: nn.Linear = stock.proj
        self.rel_pos_h: nn.Parameter = stock.rel_pos_h
        self.rel_pos_w: nn.Parameter = stock.rel_pos_w
        self.window = window

    def forward(self, x_BHWC: Tensor) -> Tensor:
        """Return B H W C."""
        B, H, W, C = x_BHWC.shape
        h, w = (self.window, self.window) if self.window else (H, W)
        offsets_hhd, offsets_wwd = relative_positions(self.rel_pos_h, h), relative_positions(self.rel_pos_w, w)
        qkv_BHW3nd = self.qkv(x_BHWC).view(B, H, W, 3, self.num_heads, -1)
        mixed_BHWnd = torch.empty_like(qkv_BHW3nd[:, :, :, 0])
        for rows, columns in _windows(H, W, h, w):
            part_B3nrcd = qkv_BHW3nd[:, rows, columns].permute(0, 3, 4, 1, 2, 5)
            mixed_Bnrcd = self._mixed(part_B3nrcd, offsets_hhd, offsets_wwd)
            mixed_BHWnd[:, rows, columns] = mixed_Bnrcd.permute(0, 2, 3, 1, 4)
        attended: Tensor = self.proj(mixed_BHWnd.view(B, H, W, C))
        return attended

    def _mixed(self, part_B3nrcd: Tensor, offsets_hhd: Tensor, offsets_wwd: Tensor) -> Tensor:
        """Return the attended values of a window's tokens, B n r c d."""
        query_Bnrcd = part_B3nrcd[:, 0]
        r, c, d = query_Bnrcd.shape[2:]
        row_Bnrch = torch.einsum("bnrcd,rhd->bnrch", query_Bnrcd, offsets_hhd[:r])
        column_Bnrcw = torch.einsum("bnrcd,cwd->bnrcw", query_Bnrcd, offsets_wwd[:c])
        key_GLd, value_GLd = (self._padded(part_B3nrcd[:, at], at, len(offsets_hhd), len(offsets_wwd)) for at in (1, 2))
        query_GXd, row_GXh, column_GXw = (
            each.reshape(len(key_GLd), r * c, -1) for each in (query_Bnrcd, row_Bnrch, column_Bnrcw)
        )
        return attend(query_GXd, key_GLd, value_GLd, row_GXh, column_GXw, scale=self.scale).view(-1, self.num_heads, r, c, d)

    def _padded(self, part_Bnrcd: Tensor, at: int, h: int, w: int) -> Tensor:
        """Return keys or values of a whole window, G L d: what lies beyond the map is the bias of their layer."""
        B, n, r, c, d = part_Bnrcd.shape
        if (r, c) == (h, w):
            return part_Bnrcd.reshape(B * n, h * w, d)
        # Made like the part, so that `torch.func.vmap` knows that it differs from slice to slice.
        whole_Bnhwd = part_Bnrcd.new_empty(B, n, h, w, d)
        whole_Bnhwd[:] = self.qkv.bias.view(3, n, 1, 1, d)[at].to(part_Bnrcd)
        whole_Bnhwd[:, :, :r, :c] = part_Bnrcd
        return whole_Bnhwd.view(B * n, h * w, d)


def _windows(H: int, W: int, h: int, w: int) -> Iterator[tuple[slice, slice]]:
    """Yield rows and columns of each window as far as the map reaches."""
    for top in range(0, H, h):
        for left in range(0, W, w):
            yield slice(top, min(top + h, H)), slice(left, min(left + w, W))


def attend(query_GXd: Tensor, key_GLd: Tensor, value_GLd: Tensor, row_GXh: Tensor, column_GXw: Tensor, *, scale: float) -> Tensor:
    """Return softmax(scale q k + row + column) v, G X d.

    Parameters
    ----------
    query_GXd, key_GLd, value_GLd
        Of G heads; keys lie row by row.
    row_GXh, column_GXw
        What a query adds to the scores of all keys in a row and in a column, h w = L.
    scale
        Of the products alone.
    """
    G, X, L = len(query_GXd), query_GXd.shape[1], key_GLd.shape[1]
    at_once = CPU_SCORES * torch.get_num_threads() if query_GXd.device.type == "cpu" else GPU_SCORES
    heads = max(1, min(G, at_once // (L * min(X, 64))))
    queries = max(1, min(X, at_once // (L * heads)))
    mixed_GXd = torch.empty_like(query_GXd)
    for some in (slice(at, at + heads) for at in range(0, G, heads)):
        key_gdL = key_GLd[some].transpose(1, 2)
        for these in (slice(at, at + queries) for at in range(0, X, queries)):
            scores_gXL = (row_GXh[some, these, :, None] + column_GXw[some, these, None, :]).flatten(2)
            scores_gXL.baddbmm_(query_GXd[some, these], key_gdL, alpha=scale)
            mixed_GXd[some, these] = scores_gXL.softmax(dim=2) @ value_GLd[some]
    return mixed_GXd


def relative_positions(table_Pd: Tensor, size: int) -> Tensor:
    """Return R, size x size x d: the learned vector of each offset between two rows or two columns.

    Parameters
    ----------
    table_Pd
        One vector per offset from -(n-1) to n-1; resampled where n is not `size`.
    size
        Tokens along the axis.
    """
    wanted = 2 * size - 1
    if table_Pd.shape[0] != wanted:
        table_Pd = F.interpolate(table_Pd.T[None], size=wanted, mode="linear")[0].T
    at = torch.arange(size, device=table_Pd.device)
    return table_Pd[at[:, None] - at + size - 1]
