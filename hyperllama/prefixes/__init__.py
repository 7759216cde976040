"""The soft prefix: its rows, its manifest, its file, stores of many, and other formats."""
