"""Products with packed weights: one description of an operand, its Triton kernels, and their float64 reference."""
