"""An SPMD batch-inference engine for large language models: every rank runs the same loop."""
