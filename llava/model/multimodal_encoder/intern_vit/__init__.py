"""InternViT: configuration, modules, and its entry in the tower registry."""
