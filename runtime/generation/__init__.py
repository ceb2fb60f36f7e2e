"""Texts from a program that remembers: prompts, sampling, stops, rows that come and go, ranks in step."""
