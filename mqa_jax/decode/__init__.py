"""From prompts to tokens: `search` (greedy, sampling) and `beam` search over any model, rules on
`logits`, and `generate` for the project's own models."""
