"""Kernels of our own in C++, compiled on the user's machine at first use; without a compiler PyTorch's are used."""
