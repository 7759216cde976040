"""What is trained for, and the model over packed batches that every trained thing extends."""
