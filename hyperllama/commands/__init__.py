"""What the verbs do. Recipes are unpacked here and in `eval`, and nowhere below."""
