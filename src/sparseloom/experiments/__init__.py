"""Studies that run the parts together: comparisons, sweeps, published tables."""
