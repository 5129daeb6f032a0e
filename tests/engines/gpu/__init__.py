"""Tests of kernels in Triton and recorded forwards."""
