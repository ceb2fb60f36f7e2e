"""Calibration: what the operators of programs take on this machine, measured; `moec calibrate`."""
