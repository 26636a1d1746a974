"""What a person reads: progress, metrics, summary."""
