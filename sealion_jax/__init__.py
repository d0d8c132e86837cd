"""SEA-LION in JAX: continued pre-training and post-training of Gemma 3 on TPU and GPU pods."""

__version__ = "0.1.0"
