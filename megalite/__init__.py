"""Megatron-style data, tensor and pipeline parallel training of large language models."""

__version__ = "0.1.0"
