"""C++ decode kernel for small batches on the CPU, compiled at first use."""
