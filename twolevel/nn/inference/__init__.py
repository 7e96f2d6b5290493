"""Exact, faster forms of our convolutions for inference, and what is folded into their neighbours."""
