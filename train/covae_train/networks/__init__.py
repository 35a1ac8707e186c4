"""Encoders and decoders that families share."""
