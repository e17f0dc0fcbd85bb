"""The process that keeps rollouts in flight, scores them, records them and forms batches."""
