"""Starts and supervises NVIDIA Triton on a Covae model repository."""
