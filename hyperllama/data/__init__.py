"""Data: sources draw an `Episode` of text, `text` encodes it, `packing` makes a `GistBatch` of several."""
