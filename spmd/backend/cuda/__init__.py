"""NVIDIA GPUs: FlashInfer's kernels and ours.

Without Triton only `limits`, `decode_gemm`, `sampler` and `nvrtc` can be imported.
"""
