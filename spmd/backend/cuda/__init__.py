"""GPUs: FlashInfer's attention, and kernels of ours."""
