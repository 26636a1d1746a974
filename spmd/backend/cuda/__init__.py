"""Kernels for NVIDIA GPUs: FlashInfer's and ours.

Only `limits` can be imported without Triton and FlashInfer; `decode_gemm` needs neither but NVIDIA's own libraries.
"""
