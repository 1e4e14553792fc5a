"""Model compression for JAX: pure function transforms over parameter pytrees."""
