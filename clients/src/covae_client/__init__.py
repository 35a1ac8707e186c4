"""Sample, edit and score images with Covae models served on NVIDIA Triton."""
