"""Passes: graph → graph, one rewrite per file; imported as `moec.passes`."""
