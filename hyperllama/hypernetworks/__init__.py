"""Every kind of hypernetwork: a context in, keys and values at every layer out."""
