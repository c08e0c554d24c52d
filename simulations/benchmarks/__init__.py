"""Speed and bytes as ratios, measured side by side in one run."""
