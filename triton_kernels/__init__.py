"""Triton kernels and their launchers. Installed as ``repdeg_fast.triton_kernels``."""
