"""Bad days at every hospital, drawn by a seed and played on the real processes: `python -m tests.chaos`."""
