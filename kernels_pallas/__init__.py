"""Low-bit kernels on raw arrays; knows only `jax`."""
