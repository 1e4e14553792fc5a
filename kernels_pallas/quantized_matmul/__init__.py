"""Weight-only low-bit matmul."""
