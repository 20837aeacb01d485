"""The model's arithmetic, from token ids to logits."""
