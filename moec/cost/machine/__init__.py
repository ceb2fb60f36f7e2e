"""Machines: devices, links, what connects them, and what was measured of them."""
