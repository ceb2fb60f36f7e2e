"""Costs in time: numbers for letters, seconds for operations, the longest way through."""
