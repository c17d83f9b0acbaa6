"""The C++ and CUDA kernels of ``csrc/``: :mod:`~repdeg_fast.native.build` compiles, caches and loads them."""
