"""Recovery: a converted network learns from its original, on images without labels."""
