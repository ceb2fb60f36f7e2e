"""Capture: an ordinary `torch.nn.Module` becomes a program at stage *captured*."""
