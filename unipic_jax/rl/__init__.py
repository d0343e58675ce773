"""Reinforcement learning of the flow model."""
