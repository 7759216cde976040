"""Training on transformers' Trainer, and what a checkpoint holds."""
