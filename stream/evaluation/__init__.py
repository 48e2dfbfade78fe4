"""What a detector is worth on labelled data: metrics, baselines beside it, and a report that shows the run."""
