"""Long runs: where batches come from, the loop, checkpoints, logs, several processes, sweeps, and what it will cost."""
