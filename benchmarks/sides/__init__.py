"""The two sides of a comparison on the same shapes: ours (`ours`), transformers and PEFT in torch (`peers`), and a batch that both read."""
