"""What people would pick instead of IC-MoE, on the same backbone, data, steps and splits; one module per method."""
