"""NVIDIA GPUs: FlashInfer's kernels and ours. Without Triton only `limits` and `decode_gemm` can be imported."""
