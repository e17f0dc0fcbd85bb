"""Advantages, losses and corrections: pure functions, each with its formula, its shapes and its paper."""
