"""The steps that a study may ask of the server after the mean of the updates, a line each.

The server's class is named, not imported: a site checks the study without it. It wraps the strategy that forms the mean,
which is its only argument (`fl_server.wrapping`), and finds its settings in `inner.study.aggregation`.
"""

from __future__ import annotations

SERVER_OPTIMIZERS: dict[str, str] = {
    "none": "",
    "adam": "fl_server.server_optimizer:ServerOptimized",
    "yogi": "fl_server.server_optimizer:ServerOptimized",
}
