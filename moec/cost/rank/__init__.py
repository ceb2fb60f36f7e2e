"""What one rank holds and sends."""
