"""Cost: what a program spends, read off its graph as symbolic expressions."""
