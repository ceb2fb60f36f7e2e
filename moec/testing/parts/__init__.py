"""The parts random decoders are put together from: ordinary PyTorch, many spellings of each."""
