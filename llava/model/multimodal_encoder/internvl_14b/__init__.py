"""InternVL-14B: InternViT-6B with QLLaMA, whose learned queries read the image (spec/model.md §5)."""
