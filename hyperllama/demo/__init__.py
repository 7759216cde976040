"""`hyperllama demo`: a page on which examples are compressed, and a prefix is compared with what it stands for."""
